//! What each command does.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail};
use lb_core::{
    model::Family,
    rules::{self, incremental::Transaction},
};
use tracing::warn;

use crate::{
    args::{
        self, Args, CleanupArgs, Command, ConfigCommand, DiffArgs, Instead, ListCommand, Output, RunArgs,
    },
    config::{self, File, kube_proxy::Logging},
    datapath::{
        ebpf::{attach, drain, inspect, maps::Pins},
        iptables::{self, exec::Programs},
        ipvs, nftables,
    },
    drift,
    kube_proxy::{self, Serves},
    log::Log,
    print,
    probe::{self, Facts},
    render, run,
};

/// Runs a command.
pub fn main(args: Args) -> Result<ExitCode> {
    let pins = Pins::new(&args.bpf_root);
    let file = match &args.command {
        Command::Run(options) => options.policy.file()?,
        _ => File::default(),
    };
    let logging = match &args.command {
        Command::Run(options) => options.configuration(&file).logging,
        _ => Logging::default(),
    };
    let log = Log::start(&args.log, args.log_format, &logging)?;
    let done = match args.command {
        Command::Run(options) => run(*options, file, args.bpf_root, &pins, &log),
        Command::Probe(options) => {
            let facts = Facts::read(&args.bpf_root, &args::cgroup_root(options.cgroup_root));
            probe::report(&facts, options.output.output)
        }
        Command::Diff(options) => return Ok(diff(*options, &pins)),
        Command::Cleanup(options) => cleanup(&options, &pins),
        Command::Render(options) => render::render(&options),
        Command::Config { command: ConfigCommand::Check { file, all } } => {
            print!("{}", config::check(&file, all)?);
            Ok(())
        }
        Command::Status(options) => status(&pins, options.output),
        Command::Service { command: ListCommand::List(options) } => {
            check_pinned(&pins)?;
            print::rows(&inspect::services(&pins)?, options.output)
        }
        Command::Backend { command: ListCommand::List(options) } => {
            check_pinned(&pins)?;
            print::rows(&inspect::backends(&pins)?, options.output)
        }
        Command::Flow { command: ListCommand::List(options) } => {
            check_pinned(&pins)?;
            print::rows(&inspect::flows(&pins)?, options.output)
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Serves, or does what kube-proxy's options ask for instead.
fn run(options: RunArgs, file: File, bpf_root: PathBuf, pins: &Pins, log: &Log) -> Result<()> {
    let configuration = options.configuration(&file);
    if let Some(path) = &options.policy.config {
        file.warn(path);
    }
    let without_meaning = options.without_meaning().join(", ");
    if !without_meaning.is_empty() {
        warn!(options = without_meaning, "have no meaning here; `lb-agent config check --all` says why");
    }
    let ignored = options.not_looked_at().join(", ");
    if !ignored.is_empty() {
        warn!(
            options = ignored,
            "are not looked at beside --config, as in kube-proxy; write them into the file, or call the program lb-agent"
        );
    }
    let settings = config::settings(&configuration)?;
    match options.instead() {
        Some(Instead::Cleanup) => cleanup(&CleanupArgs::of_kube_proxy(), pins),
        Some(Instead::Init) => {
            let _ = config::conntrack::set(&settings.conntrack);
            Ok(())
        }
        Some(Instead::WriteConfig(path)) => config::write(&configuration, &path),
        None => {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .context("start the async runtime")?;
            runtime.block_on(run::run(options, file, bpf_root, log))
        }
    }
}

/// 0: no differences, 1: some, 2: they can't be told.
fn diff(options: DiffArgs, pins: &Pins) -> ExitCode {
    match drift::command::diff(options, pins) {
        Ok(false) => ExitCode::SUCCESS,
        Ok(true) => ExitCode::from(1),
        Err(error) => {
            eprintln!("lb-agent: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn status(pins: &Pins, output: Output) -> Result<()> {
    check_pinned(pins)?;
    let status = inspect::status(pins)?;
    if output == Output::Json {
        println!("{}", serde_json::to_string_pretty(&status)?);
        return Ok(());
    }
    if status.draining {
        println!("draining: another mode serves, flows that are known are carried on\n");
    }
    print!("{}\n{}", print::table(&status.attached)?, print::table(&status.counters)?);
    Ok(())
}

fn cleanup(options: &CleanupArgs, pins: &Pins) -> Result<()> {
    // First: kube-proxy may be started while flows end.
    if options.drain {
        wait_for_flows(pins)?;
    }
    let successor = match options.kube_proxy {
        true => None,
        false => kube_proxy::serves(options.kube_proxy_metrics),
    };
    let (removals, servers) = match successor {
        Some(Serves::Xtables) => Default::default(),
        _ => (iptables::removals(options.kube_proxy)?, ipvs::removals(options.kube_proxy)?),
    };
    let tables = match successor {
        Some(Serves::Nftables) => Vec::new(),
        _ => nftables::removals(options.kube_proxy),
    };
    if let Some(serves) = successor {
        eprintln!(
            "kube-proxy runs on this node: its {} are left. To remove them, end it first",
            match serves {
                Serves::Xtables => "iptables rules and IPVS servers",
                Serves::Nftables => "nftables tables",
            }
        );
    }
    let counters = match successor {
        Some(Serves::Xtables) => Vec::new(),
        _ => iptables::counters::existing(),
    };
    if options.dry_run {
        return print_removals(pins, &removals, &counters, &tables, &servers);
    }
    for family in tables {
        nftables::remove(family)?;
    }
    nftables::remove_keepers()?;
    iptables::remove_keepers()?;
    for (programs, removal) in &removals {
        programs.restore(&removal.to_string())?;
    }
    if !counters.is_empty() {
        iptables::counters::remove_unused();
    }
    ipvs::remove(&servers)?;
    Ok(attach::remove_all(pins)?)
}

/// Everything that `cleanup` would remove, as what it would hand to which program.
fn print_removals(
    pins: &Pins,
    removals: &[(Programs, Transaction)],
    counters: &[&str],
    tables: &[Family],
    servers: &[rules::ipvs::Transaction],
) -> Result<()> {
    if pins.dir().is_dir() {
        println!("programs, links and maps pinned under {}", pins.dir().display());
    }
    for (programs, removal) in removals {
        println!("{}-restore --noflush:\n{removal}", programs.name());
    }
    if !counters.is_empty() {
        println!("# nfacct, unless other rules use them");
        counters.iter().for_each(|counter| println!("delete {counter}"));
    }
    for programs in iptables::keepers() {
        println!("{}-restore --noflush:\n{}", programs.name(), iptables::keeper_removal());
    }
    for removal in tables.iter().map(|family| nftables::removal(*family)) {
        println!("nft -f -:\n{removal}");
    }
    for removal in nftables::keepers().map(nftables::keeper_removal) {
        println!("nft -f -:\n{removal}");
    }
    for removal in servers {
        print!("{removal}");
    }
    if !servers.is_empty() {
        print!("# ipset restore\n{}# ip\nlink del {}\n", ipvs::destroyed_sets()?, rules::ipvs::DEVICE);
    }
    Ok(())
}

/// How often flows are counted.
const DRAIN_POLL: Duration = Duration::from_secs(2);

/// Takes no new flows and waits for the known ones to end.
fn wait_for_flows(pins: &Pins) -> Result<()> {
    if !pins.dir().is_dir() {
        return Ok(());
    }
    drain::set(pins, true)?;
    let mut shown = None;
    loop {
        // Whether a UDP backend still serves is not known here: its flows end when they are silent.
        let flows = drain::flows_left(pins, |_| true)?.flows;
        if flows == 0 {
            return Ok(());
        }
        if shown != Some(flows) {
            eprintln!(
                "{flows} flows are carried on until they end; new ones are left to whoever serves instead"
            );
            shown = Some(flows);
        }
        std::thread::sleep(DRAIN_POLL);
    }
}

fn check_pinned(pins: &Pins) -> Result<()> {
    if !pins.dir().is_dir() {
        bail!(
            "nothing is pinned under {}: is the agent running on this node, in mode ebpf and with this --bpf-root? \
             Other modes have no maps: see `nft list table ip kube-proxy` or iptables-save",
            pins.dir().display()
        );
    }
    Ok(())
}
