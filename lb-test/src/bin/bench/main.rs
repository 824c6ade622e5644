//! Benchmarks: what a packet costs, and how long programming takes. They report; they never fail on a time.

mod wire;

use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use aya::{
    Ebpf,
    maps::{Array, MapError, ProgramArray},
    programs::{Program, ProgramFd, TestRun, TestRunOptions, Xdp},
};
use clap::{Parser, Subcommand};
use lb_agent::{
    args::Mode,
    datapath::{
        Datapath,
        ebpf::{
            load::Generation,
            maps::{Maps, Pins, Wire},
        },
        iptables::IptablesDatapath,
        ipvs::{IpvsConfig, IpvsDatapath},
        nftables::NftablesDatapath,
    },
};
use lb_common::{
    abi::{BenchConfig, FrontendKey},
    outcome::Hook,
};
use lb_core::{
    compile::{CompileConfig, Compiler, NodeView},
    model::Event,
    rules, synthetic,
};
use lb_test::{
    apiserver::ApiServer,
    cluster::{CLIENT as CLIENT_ADDRESS, Cluster, Cni},
    netns,
    object::{CLIENT_MAC, NODE_MAC, Node, OTHER_MAC, Run, source_of},
    packet::{Frame, syn, tcp},
    plot,
};
use serde_json::{Value, json};

/// ns per packet by `BPF_PROG_TEST_RUN`, and programming time.
#[derive(Parser)]
struct Args {
    /// What to measure.
    #[command(subcommand)]
    what: What,
    /// One JSON object instead of a table.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum What {
    /// lb_xdp, packet by packet.
    Packet,
    /// Services with 10 endpoints each, and one endpoint that changes.
    Sync {
        /// How many Services, one measurement each.
        #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000])]
        services: Vec<u32>,
        /// ebpf, nftables, iptables, ipvs.
        #[arg(long, value_delimiter = ',', default_values = ["ebpf", "nftables", "iptables", "ipvs"])]
        modes: Vec<Mode>,
    },
    /// Draw what `sync --json` printed into files as an SVG picture.
    Plot {
        /// Those files.
        #[arg(required = true)]
        measured: Vec<PathBuf>,
        /// The picture.
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
    },
    /// A watch event, read from JSON and from protobuf.
    Wire,
    /// An agent that starts at an API server with so many Services of 10 endpoints each, and 1 000 Nodes.
    Api {
        /// How many Services, one measurement each.
        #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000])]
        services: Vec<u32>,
    },
}

fn main() -> Result<()> {
    let args = Args::parse();
    let rows = match args.what {
        What::Packet => packet()?,
        What::Sync { services, modes } => sync(&services, &modes)?,
        What::Plot { measured, to } => return draw(&measured, &to),
        What::Wire => wire::wire(slice(1, (0, 0x0b00_0001)))?,
        What::Api { services } => services.iter().map(|count| api(*count)).collect::<Result<_>>()?,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&json!({ "machine": machine(), "rows": rows }))?);
    } else {
        println!("{}", machine());
        rows.iter().for_each(|row| println!("{}", line(row)));
    }
    Ok(())
}

fn draw(measured: &[PathBuf], to: &Path) -> Result<()> {
    let mut rows = Vec::new();
    for file in measured {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        let read: Value = serde_json::from_str(&text).with_context(|| format!("read {}", file.display()))?;
        rows.extend(read["rows"].as_array().into_iter().flatten().cloned());
    }
    plot::sync(&rows, to)
}

fn line(row: &Value) -> String {
    let fields =
        row.as_object().into_iter().flatten().filter(|(key, value)| *key != "case" && !value.is_null());
    let fields: Vec<String> = fields.map(|(key, value)| format!("{key} {value}")).collect();
    format!("{:<44} {}", row["case"].as_str().unwrap_or_default(), fields.join("   "))
}

fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    format!("kernel {}, load {}", read("/proc/sys/kernel/osrelease"), read("/proc/loadavg"))
}

/// Packets per timed round, and rounds.
const REPEAT: u32 = 400_000;
const ROUNDS: usize = 11;

struct Bench {
    node: Node,
    driver: Ebpf,
    base: (u64, u64),
    rows: Vec<Value>,
}

/// What varies from case to case.
#[derive(Clone, Copy)]
struct Case<'a> {
    name: &'a str,
    frame: &'a Frame,
    flows: u32,
    vips: u32,
    /// The share of runs that must end so: verdict and rewrite are checked by the packet tests, this guards the case.
    outcome: &'a str,
    fresh: bool,
    /// Packets a round.
    repeat: u32,
}

fn packet() -> Result<Vec<Value>> {
    pin_to_cpu(1);
    let object =
        fs::read("target/bpf/bench.o").context("read target/bpf/bench.o: run `cargo xtask build-ebpf`")?;
    let mut driver = Ebpf::load(&object).context("load bench.o")?;
    for name in ["bench_driver", "bench_nothing"] {
        let program: &mut Xdp = driver.program_mut(name).context(name)?.try_into()?;
        program.load()?;
    }
    let mut bench = Bench { node: Node::new()?, driver, base: (0, 0), rows: Vec::new() };
    let vip = "10.96.0.1:80";
    let (open, follow) = (client(syn("192.0.2.9:1024", vip)), client(tcp("192.0.2.9:1024", vip, 16)));
    let pass = client(tcp("192.0.2.9:1024", "203.0.113.1:80", 16));

    let nothing: &Xdp = bench.driver.program("bench_nothing").context("bench_nothing")?.try_into()?;
    let nothing = nothing.fd()?.try_clone()?;
    bench.target(&nothing)?;
    bench.configure(&pass, 1, 1, 0)?;
    bench.base = bench.time(REPEAT)?;
    bench.row(json!({ "case": "the driver itself", "min_ns": bench.base.0, "median_ns": bench.base.1 }));

    let case = Case {
        name: "",
        frame: &follow,
        flows: 1,
        vips: 1,
        outcome: "to_remote_backend",
        fresh: false,
        repeat: REPEAT,
    };
    bench.serve(1, 250)?;
    bench.case(Case { name: "not a VIP", frame: &pass, outcome: "pass_not_ours", ..case })?;
    for flows in [1, 1024, 65536] {
        bench.warm(&open, flows, 1)?;
        bench.case(Case { name: "established", flows, ..case })?;
    }
    let ran = bench.node.run(Run::Xdp, &client(syn("192.0.2.9:60000", vip)).build())?;
    let backend = format!("10.244.2.{}:8080", ran.frame[33]);
    let reply = tcp(&backend, &source_of(&ran.frame).to_string(), 16).macs(OTHER_MAC, NODE_MAC);
    bench.case(Case { name: "reply", frame: &reply, outcome: "reply", ..case })?;
    for services in [1024, 32768] {
        for flows in [1024, 65536] {
            bench.serve(services, 2)?;
            bench.warm(&open, flows, services)?;
            let name = format!("established, {services} services");
            bench.case(Case { name: &name, flows, vips: services, ..case })?;
        }
    }
    bench.serve(1, 250)?;
    let fresh = Case { name: "never-seen flow", frame: &open, fresh: true, ..case };
    // As many flows as the table has room for, then many more.
    bench.case(Case { repeat: 10_000, ..fresh })?;
    bench.case(Case { name: "never-seen flow, table full", ..fresh })?;
    bench.serve(1, 1)?;
    bench.case(Case { name: "never-seen flow, ports used up", outcome: "drop_snat_ports", ..fresh })?;
    Ok(bench.rows)
}

fn client(frame: Frame) -> Frame {
    frame.macs(CLIENT_MAC, NODE_MAC)
}

impl Bench {
    /// Services 10.96.0.1 and on, each with so many backends on the other node: 250 different addresses, because
    /// each has 28 976 source ports. On a new node, because a table that earlier flows fill evicts.
    fn serve(&mut self, services: u32, backends: u32) -> Result<()> {
        self.node = Node::new()?;
        let under_test = match self.node.program("lb_xdp")? {
            Program::Xdp(program) => program.fd()?.try_clone()?,
            _ => bail!("lb_xdp is no XDP program"),
        };
        self.target(&under_test)?;
        let events = (0..services).flat_map(|i| {
            let mut slice = synthetic::slice(i, backends, 0);
            for (n, endpoint) in slice.endpoints.iter_mut().enumerate() {
                endpoint.addr = Ipv4Addr::from(0x0af4_0201 + (i * backends + n as u32) % 250).into();
                endpoint.node = Some("node-2".into());
            }
            [Event::Service(synthetic::service(i)), Event::EndpointSlice(slice)]
        });
        self.node.apply(events).map(drop)
    }

    fn target(&mut self, program: &ProgramFd) -> Result<()> {
        let mut targets: ProgramArray<_> = self.driver.map_mut("TARGET").context("TARGET")?.try_into()?;
        targets.set(0, program, 0).context("set the program under test")
    }

    fn configure(&mut self, frame: &Frame, flows: u32, vips: u32, base: u32) -> Result<()> {
        let mut bytes = frame.build();
        bytes.resize(64, 0);
        let mut config = BenchConfig {
            packet_len: 64,
            flow_mask: flows - 1,
            multiplier: 0x9e37_79b1,
            base,
            vip_mask: vips - 1,
            source: 0x0a01_0001,
            destination: 0x0a60_0001,
            source_port: 1024,
            ..BenchConfig::default()
        };
        bytemuck::cast_slice_mut::<u64, u8>(&mut config.template).copy_from_slice(&bytes);
        let mut map: Array<_, Wire<BenchConfig>> =
            self.driver.map_mut("BENCH").context("BENCH")?.try_into()?;
        Ok(map.set(0, Wire(config), 0)?)
    }

    /// Opens every flow once.
    fn warm(&mut self, open: &Frame, flows: u32, vips: u32) -> Result<()> {
        self.configure(open, flows, vips, 0)?;
        self.round(flows).map(drop)
    }

    fn case(&mut self, case: Case<'_>) -> Result<()> {
        let flows = if case.fresh { 1 << 30 } else { case.flows };
        self.configure(case.frame, flows, case.vips, if case.fresh { 1 << 20 } else { 0 })?;
        let before = self.counted()?;
        let (min, median) = self.time(case.repeat)?;
        let mut ended = self.counted()?;
        ended.iter_mut().for_each(|(outcome, count)| *count -= before.get(outcome).copied().unwrap_or(0));
        let share =
            ended.get(case.outcome).copied().unwrap_or(0) as f64 / (f64::from(case.repeat) * ROUNDS as f64);
        if share < 0.95 {
            bail!(
                "{}, {} flows: too few packets ended as {}: {ended:?}",
                case.name,
                case.flows,
                case.outcome
            );
        }
        self.row(json!({
            "case": case.name, "flows": if case.fresh { Value::Null } else { json!(case.flows) },
            "min_ns": min.saturating_sub(self.base.0), "median_ns": median.saturating_sub(self.base.0),
        }));
        Ok(())
    }

    /// Notes a result, and shows that it is there.
    fn row(&mut self, row: Value) {
        eprintln!("measured: {}", row["case"].as_str().unwrap_or_default());
        self.rows.push(row);
    }

    /// How many packets ended how at the XDP hook.
    fn counted(&self) -> Result<BTreeMap<&'static str, u64>> {
        let all = lb_agent::datapath::ebpf::maps::metrics(self.node.pins())?;
        Ok(all
            .into_iter()
            .filter(|(hook, ..)| *hook == Hook::Xdp)
            .map(|(_, outcome, count)| (outcome.as_str(), count))
            .collect())
    }

    /// Minimum and median of the rounds, ns a packet.
    fn time(&mut self, repeat: u32) -> Result<(u64, u64)> {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push(self.round(repeat)?.as_nanos() as u64);
        }
        rounds.sort_unstable();
        Ok((rounds[0], rounds[ROUNDS / 2]))
    }

    fn round(&mut self, repeat: u32) -> Result<Duration> {
        let driver: &mut Xdp = self.driver.program_mut("bench_driver").context("bench_driver")?.try_into()?;
        let packet = [0; 64];
        let context: Vec<u8> =
            [0, 64, 0, self.node.eth0(), 0, 0].iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
        let mut options = TestRunOptions::new();
        options.data_in = Some(&packet);
        options.ctx_in = Some(&context);
        options.repeat = repeat;
        let result = driver.test_run(options)?;
        if result.return_value == 0 {
            bail!("the driver aborted: is the target set?");
        }
        Ok(result.duration)
    }
}

fn pin_to_cpu(cpu: usize) {
    // SAFETY: a valid, zeroed set; a machine with one processor keeps its affinity.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// Endpoints of each Service.
const ENDPOINTS: u32 = 10;
/// One-endpoint changes in a measurement: of maps, and of rules, of which one may take a second.
const CHANGES: (u32, u32) = (50, 10);

fn sync(scales: &[u32], modes: &[Mode]) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    for &services in scales {
        for &mode in modes {
            if mode == Mode::Ebpf {
                let mut node = Node::new()?;
                rows.extend(sync_of("ebpf", services, CHANGES.0, |events| Ok(node.apply(events)?.1))?);
                continue;
            }
            if mode == Mode::Ipvs && !has_ipvs() {
                eprintln!(
                    "SKIP ipvs, {services} services: this kernel has no IPVS; `cargo xtask bench sync --vm` boots one that has"
                );
                continue;
            }
            // A thread with a network namespace of its own, which goes when the thread ends.
            let measured = thread::spawn(move || sync_of_rules(mode, services)).join();
            rows.extend(measured.map_err(|_| anyhow!("the benchmark of {mode:?} panicked"))??);
        }
    }
    Ok(rows)
}

/// The module is there, or the kernel has it built in.
fn has_ipvs() -> bool {
    let found = std::process::Command::new("modprobe").args(["-q", "ip_vs"]).status();
    found.is_ok_and(|status| status.success()) || Path::new("/proc/net/ip_vs").exists()
}

fn sync_of_rules(mode: Mode, services: u32) -> Result<Vec<Value>> {
    // SAFETY: a plain system call; nothing else runs in this thread.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(std::io::Error::last_os_error()).context("make a network namespace");
    }
    // A node has addresses: without any the kernel takes every endpoint for a broadcast address.
    netns::run(std::process::Command::new("ip").args(["link", "set", "lo", "up"]))?;
    let config =
        rules::iptables::Config { localhost_node_ports: false, ..rules::iptables::Config::default() };
    let mut datapath: Box<dyn Datapath> = match mode {
        Mode::Nftables => Box::new(NftablesDatapath::open(&config)?),
        Mode::Iptables => Box::new(IptablesDatapath::open(config)?),
        Mode::Ipvs => Box::new(IpvsDatapath::open(config, IpvsConfig::default())?),
        Mode::Ebpf => bail!("maps are measured without a namespace"),
    };
    let name = datapath.name();
    let mut compiler = Compiler::new(CompileConfig::default(), NodeView::default());
    sync_of(name, services, CHANGES.1, |events| {
        events.into_iter().for_each(|event| compiler.apply(event));
        let changes = compiler.compile();
        let report = datapath.apply(compiler.table(), &changes)?;
        Ok(report.upserts + report.deletes)
    })
}

/// Programs a cluster, then changes one endpoint so many times. `apply` carries events out and counts writes.
fn sync_of(
    mode: &str,
    services: u32,
    changes: u32,
    mut apply: impl FnMut(Vec<Event>) -> Result<usize>,
) -> Result<Vec<Value>> {
    let events: Vec<Event> = synthetic::cluster(services, ENDPOINTS).collect();
    let before = rss_mib();
    let started = Instant::now();
    let writes = apply(events)?;
    let first = started.elapsed();
    let rss = rss_mib();
    let mut micros = Vec::new();
    let mut change_writes = 0;
    for version in 1..=changes {
        let slice = synthetic::slice(version * 37 % services, ENDPOINTS, version % 3 + 1);
        let started = Instant::now();
        change_writes = apply(vec![Event::EndpointSlice(slice)])?;
        micros.push(started.elapsed().as_micros() as u64);
    }
    micros.sort_unstable();
    eprintln!("measured: {mode}, {services} services");
    let scale = format!("{mode}, {services} services x {ENDPOINTS} endpoints");
    Ok(vec![
        json!({ "case": format!("{scale}: all"), "ms": first.as_millis() as u64, "writes": writes, "rss_mib": rss, "before_mib": before }),
        json!({
            "case": format!("{scale}: one endpoint changes"), "median_us": micros[micros.len() / 2],
            "max_us": micros.last(), "writes": change_writes,
        }),
    ])
}

/// `VmRSS`, MiB.
fn rss_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// An agent at an API server: how soon it serves, what it holds and takes, and how far behind changes it falls.
fn api(services: u32) -> Result<Value> {
    let mut cluster = Cluster::new(Cni::Routed, 0)?;
    let server = ApiServer::start(&cluster.lab, "client", format!("{CLIENT_ADDRESS}:6443").parse()?)?;
    fill(&server, services)?;
    cluster.kubeconfig = Some(server.kubeconfig()?);
    let started = Instant::now();
    cluster.start_agents(&[1])?;
    let elapsed = started.elapsed();
    let pid = cluster.agent_pid(1).context("an agent")?;
    thread::sleep(SETTLING);
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let before = cpu_time(pid)?;
    thread::sleep(IDLE);
    let idle = cpu_time(pid)? - before;
    let pins = Pins::new(&cluster.lab.bpf_root("node1"));
    let behind: Vec<Value> = [5, 10, 20]
        .into_iter()
        .zip(services..)
        .map(|(secs, more)| churn(&server, &pins, pid, services, Duration::from_secs(secs), more))
        .collect::<Result<_>>()?;
    let kib = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok())
    };
    Ok(json!({
        "case": format!("api server, {services} services"),
        "ms": elapsed.as_millis() as u64,
        "peak_mib": kib("VmHWM:").map(|kib| kib / 1024),
        "mib": kib("VmRSS:").map(|kib| kib / 1024),
        "idle_percent_of_a_core": percent(idle, IDLE),
        "under_updates": behind,
    }))
}

/// What is left to do after the first sync is done after so long.
const SETTLING: Duration = Duration::from_secs(5);

/// How long nothing happens: two periods in which everything is looked at.
const IDLE: Duration = Duration::from_secs(60);

/// In hundredths of a percent.
fn percent(cpu: Duration, of: Duration) -> f64 {
    (cpu.as_secs_f64() / of.as_secs_f64() * 10_000.0).round() / 100.0
}

/// CPU time that a process has taken, threads that are gone included.
fn cpu_time(pid: u32) -> Result<Duration> {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both write to what is passed, which lives as long as the calls.
    let failed = unsafe {
        libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) != 0
            || libc::clock_gettime(clock, &mut time) != 0
    };
    if failed {
        bail!("no CPU clock of process {pid}");
    }
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// For some time one endpoint after the other is replaced, 5 000 times a second; then one more Service comes: how soon is
/// it served?
fn churn(
    server: &ApiServer,
    pins: &Pins,
    pid: u32,
    services: u32,
    time: Duration,
    more: u32,
) -> Result<Value> {
    let (begun, before) = (Instant::now(), cpu_time(pid)?);
    let mut sent = 0;
    while begun.elapsed() < time {
        for _ in 0..50 {
            let replaced = (sent % 10, 0x0b00_0000 + sent);
            server.put_value(slice(sent % services, replaced))?;
            sent += 1;
        }
        thread::sleep(
            (begun + Duration::from_millis(u64::from(sent) / 5)).saturating_duration_since(Instant::now()),
        );
    }
    let per_second = f64::from(sent) / begun.elapsed().as_secs_f64();
    server.put_value(slice(more, (0, 0x0b00_0000)))?;
    server.put_value(service(more))?;
    let last = Instant::now();
    while !has_frontend(pins, cluster_ip(more))? {
        if last.elapsed() > GIVE_UP {
            bail!("{} isn't served after {GIVE_UP:?}", cluster_ip(more));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(json!({
        "s": time.as_secs(),
        "per_s": per_second as u64,
        "behind_ms": last.elapsed().as_millis() as u64,
        "percent_of_a_core": percent(cpu_time(pid)? - before, begun.elapsed()),
    }))
}

/// An agent that takes longer is not behind but broken.
const GIVE_UP: Duration = Duration::from_secs(60);

/// Whether the kernel has a frontend on port 80.
fn has_frontend(pins: &Pins, addr: Ipv4Addr) -> Result<bool> {
    let maps = Maps::open(pins, Generation::Present)?;
    let key = FrontendKey { addr: addr.octets(), port: 80, proto: libc::IPPROTO_TCP as u8, pad: 0 };
    match maps.v4.frontends.get(&Wire(key), 0) {
        Ok(_) => Ok(true),
        Err(MapError::KeyNotFound) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn cluster_ip(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a60_0000 + number + 10)
}

fn service(number: u32) -> Value {
    let name = format!("service-{number}");
    json!({
        "kind": "Service",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "clusterIP": cluster_ip(number),
            "selector": {"app": name},
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
        },
    })
}

/// Ten endpoints, one of which has another address.
fn slice(number: u32, (replaced, by): (u32, u32)) -> Value {
    let name = format!("service-{number}");
    let endpoints = (0..10).map(|endpoint| {
        let own = 0x0a80_0000 + number * 16 + endpoint + 1;
        json!({
            "addresses": [Ipv4Addr::from(if endpoint == replaced { by } else { own })],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("worker-{}", (number + endpoint) % 1_000),
            "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("{name}-{endpoint}"), "uid": "11111111-1111-4111-8111-111111111111"},
            "zone": "a",
        })
    });
    json!({
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{name}-abcde"),
            "labels": {"kubernetes.io/service-name": name, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints.collect::<Vec<_>>(),
    })
}

/// Objects as large as real ones: a slice of 10 endpoints with all that its controller writes.
fn fill(server: &ApiServer, services: u32) -> Result<()> {
    for number in 0..1_000 {
        let address = Ipv4Addr::from(0xac10_0000 + number);
        // The agent's own is among them: a node without one is not healthy.
        let name = if number == 0 { "node1".to_owned() } else { format!("worker-{number}") };
        server.put_value(json!({
            "kind": "Node",
            "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": "a"}},
            "spec": {"podCIDRs": [format!("{}/24", Ipv4Addr::from(0x0a80_0000 + number * 256))]},
            "status": {
                "addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}],
                "images": (0..50).map(|image| json!({"names": [format!("registry.example/image-{image}@sha256:{number:064x}")], "sizeBytes": 1})).collect::<Vec<_>>(),
            },
        }))?;
    }
    for number in 0..services {
        server.put_value(service(number))?;
        server.put_value(slice(number, (0, 0x0a80_0000 + number * 16 + 1)))?;
    }
    Ok(())
}
