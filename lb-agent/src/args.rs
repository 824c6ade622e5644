//! The command line: what was typed, and what it means.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::{
    Args as ClapArgs, Parser, Subcommand, ValueEnum,
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
};
use ipnet::IpNet;
use lb_common::abi::TraceFilter;
use lb_core::{
    compile::CompileConfig,
    rules::{self, ipvs::Scheduler},
};

use crate::{
    datapath::{
        ebpf::{
            attach::{Modes, TcMode, XdpMode},
            load::Sizes,
            maps::Pins,
        },
        ipvs::IpvsConfig,
    },
    drift,
    netlink::DeviceChoice,
    probe::{self, Facts},
    trace,
};

/// Serves Kubernetes Services on this node with eBPF.
#[derive(Parser, Debug)]
#[command(name = "lb-agent", version, after_help = EXAMPLES)]
pub struct Args {
    /// Where maps and links are pinned; one folder per node.
    #[arg(long, global = true, default_value = "/sys/fs/bpf/lb", env = "LB_BPF_ROOT")]
    pub bpf_root: PathBuf,
    /// Log filter, as in `info,lb_agent=debug`.
    #[arg(long, global = true, default_value = "info", env = "LB_LOG")]
    pub log: String,
    /// Log format.
    #[arg(long, global = true, default_value = "text")]
    pub log_format: LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "Examples:
  lb-agent run                                  in a DaemonSet, with the pod's service account
  lb-agent run --kubeconfig ~/.kube/config --node-name node-1
  lb-agent run --manifests ./manifests          without an API server
  lb-agent probe                                which modes work here, and why not the others
  lb-agent service list
  lb-agent backend list -o json
  lb-agent status
  lb-agent render --mode iptables --manifests ./manifests --node-name node-1
  lb-agent run --dry-run --mode iptables --cluster-cidr 10.244.0.0/16     beside kube-proxy
  lb-agent diff --manifests ./manifests --node-name node-1
  lb-agent cleanup --dry-run";

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Serve this node until told to stop; the kernel goes on serving after that.
    Run(Box<RunArgs>),
    /// What this machine can, which modes work on it, and which one `run` takes; leaves everything as it is.
    Probe(ProbeArgs),
    /// What this node has against what it should have: exit code 1 if they differ, 2 if that can't be told.
    Diff(Box<DiffArgs>),
    /// Remove everything of ours from this node, and nothing else.
    Cleanup(CleanupArgs),
    /// Print what a node would be programmed with; touches nothing and needs no privileges.
    Render(RenderArgs),
    /// What is attached where, in which mode and why; and the counters.
    Status(OutputArgs),
    /// Frontends, from the pinned maps.
    Service {
        /// What to do with them.
        #[command(subcommand)]
        command: ListCommand,
    },
    /// Backends, from the pinned maps.
    Backend {
        /// What to do with them.
        #[command(subcommand)]
        command: ListCommand,
    },
    /// Flows, from the pinned maps.
    Flow {
        /// What to do with them.
        #[command(subcommand)]
        command: ListCommand,
    },
}

/// What carries packets to backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// BPF programs.
    Ebpf,
    /// kube-proxy's nftables tables.
    Nftables,
    /// kube-proxy's iptables rules.
    Iptables,
    /// IPVS, as kube-proxy sets it up but for addresses of nodes, which are never bound.
    Ipvs,
}

impl Mode {
    /// As it is typed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
        }
    }

    /// The BPF programs know TCP and UDP only.
    fn carries_sctp(self) -> bool {
        match self {
            Self::Ebpf => false,
            Self::Nftables | Self::Iptables | Self::Ipvs => true,
        }
    }
}

/// `--mode` of `run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModeChoice {
    /// The best that works here.
    Auto,
    /// This one.
    Fixed(Mode),
}

static MODE_CHOICES: LazyLock<Vec<ModeChoice>> = LazyLock::new(|| {
    let fixed = Mode::value_variants().iter().copied().map(ModeChoice::Fixed);
    std::iter::once(ModeChoice::Auto).chain(fixed).collect()
});

impl ValueEnum for ModeChoice {
    fn value_variants<'a>() -> &'a [Self] {
        &MODE_CHOICES
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            Self::Auto => Some(PossibleValue::new("auto").help("The best that works here; see `probe`")),
            Self::Fixed(mode) => mode.to_possible_value(),
        }
    }
}

/// Options of `diff`.
#[derive(ClapArgs, Debug)]
pub struct DiffArgs {
    /// Of which datapath; the one that serves this node if not given.
    #[arg(long)]
    pub mode: Option<Mode>,
    /// Take objects from the YAML and JSON files of this folder instead of an API server.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kubeconfig", "context"])]
    pub manifests: Option<PathBuf>,
    /// A kubeconfig file; else $KUBECONFIG or the pod's service account.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig.
    #[arg(long)]
    pub context: Option<String>,
    /// This node's name in the cluster; the host name if not given.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: Option<String>,
    /// Policy: give what `run` was given.
    #[command(flatten)]
    pub policy: PolicyArgs,
}

/// Options of `probe`.
#[derive(ClapArgs, Debug)]
pub struct ProbeArgs {
    /// The cgroup v2 directory whose sockets would be served; the mount's root if not given.
    #[arg(long, value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// How to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Options of `cleanup`.
#[derive(ClapArgs, Debug)]
pub struct CleanupArgs {
    /// Say what would be removed, and remove nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Remove kube-proxy's own rules too. End kube-proxy first: it would write them again.
    #[arg(long)]
    pub kube_proxy: bool,
    /// Wait until no connection needs what is removed: BPF programs carry on the flows they know and leave new ones to
    /// whoever serves instead. Interrupted, they go on like that.
    #[arg(long, conflicts_with = "dry_run")]
    pub drain: bool,
    /// Where a kube-proxy of this node serves metrics. The rules of one that runs are left, though an agent wrote them
    /// first: they have the same names.
    #[arg(long, default_value = "127.0.0.1:10249")]
    pub kube_proxy_metrics: SocketAddr,
}

/// Options of `render`.
#[derive(ClapArgs, Debug)]
pub struct RenderArgs {
    /// For which datapath.
    #[arg(long, default_value = "ebpf")]
    pub mode: Mode,
    /// Objects, in YAML and JSON files.
    #[arg(long, value_name = "DIR")]
    pub manifests: PathBuf,
    /// The node; its addresses are those of its Node object.
    #[arg(long)]
    pub node_name: String,
    /// Policy.
    #[command(flatten)]
    pub policy: PolicyArgs,
}

/// Options that decide what is served and how.
#[derive(ClapArgs, Clone, Debug)]
pub struct PolicyArgs {
    /// Masquerade all traffic to services, as kube-proxy's option of this name.
    #[arg(long)]
    masquerade_all: bool,
    /// Node addresses that answer NodePorts, as CIDRs separated by commas; all if not given.
    #[arg(long, value_delimiter = ',', value_name = "CIDR")]
    node_port_addresses: Vec<IpNet>,
    /// Addresses of the cluster's pods, one CIDR a family, separated by commas: netfilter rules tell pods from others
    /// by it. The ebpf mode knows pods by their devices.
    #[arg(long, value_delimiter = ',', value_name = "CIDR")]
    cluster_cidr: Vec<IpNet>,
    /// Whose rules for externalIPs the iptables mode writes: today's, or kube-proxy 1.20's, which leave an address
    /// that is not this node's to the network when a bridged pod or this node dials it.
    #[arg(long, default_value = "modern")]
    legacy_external_ip: LegacyExternalIp,
    /// Which destination a connection gets in the ipvs mode.
    #[arg(long, default_value = "rr", value_parser = schedulers())]
    ipvs_scheduler: Scheduler,
}

/// Takes the names of [`Scheduler::ALL`].
fn schedulers() -> impl TypedValueParser<Value = Scheduler> {
    let named = |scheduler: Scheduler| PossibleValue::new(scheduler.name()).help(scheduler.explanation());
    PossibleValuesParser::new(Scheduler::ALL.map(named)).map(|name| {
        let named = Scheduler::ALL.into_iter().find(|scheduler| scheduler.name() == name);
        named.expect("clap takes only these names")
    })
}

/// Rules for externalIPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LegacyExternalIp {
    /// kube-proxy 1.21 and later.
    Modern,
    /// kube-proxy 1.20.
    #[value(name = "1.20")]
    V1_20,
}

impl PolicyArgs {
    /// For the compiler.
    pub fn compile(&self, mode: Mode) -> CompileConfig {
        CompileConfig {
            node_port_addresses: self.node_port_addresses.clone(),
            localhost_node_ports: true,
            masquerade_all: self.masquerade_all,
            sctp: mode.carries_sctp(),
        }
    }

    /// For netfilter rules.
    pub fn rules(&self) -> rules::iptables::Config {
        rules::iptables::Config {
            masquerade_all: self.masquerade_all,
            cluster_cidrs: self.cluster_cidr.clone(),
            node_ports_by_address: !self.node_port_addresses.is_empty(),
            legacy_external_ip: self.legacy_external_ip == LegacyExternalIp::V1_20,
            ..rules::iptables::Config::default()
        }
    }

    /// For IPVS.
    pub fn ipvs_scheduler(&self) -> Scheduler {
        self.ipvs_scheduler
    }
}

/// What lists can do.
#[derive(Subcommand, Debug)]
pub enum ListCommand {
    /// Print them.
    List(OutputArgs),
}

/// How to print.
#[derive(ClapArgs, Debug)]
pub struct OutputArgs {
    /// Output format.
    #[arg(short, long, default_value = "table")]
    pub output: Output,
}

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Aligned columns.
    Table,
    /// A JSON array.
    Json,
}

/// Options of `run`.
#[derive(ClapArgs, Debug)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// What carries packets to backends.
    #[arg(long, default_value = "auto", env = "LB_MODE")]
    mode: ModeChoice,
    /// Touch nothing in the kernel: count how far what kube-proxy or another agent has there is from what it should
    /// be, as metric lb_dry_run_differences. Without --mode for the one that serves this node.
    #[arg(long, conflicts_with = "trace_packets")]
    dry_run: bool,
    /// This node's name in the cluster; the host name if not given.
    #[arg(long, env = "NODE_NAME")]
    node_name: Option<String>,
    /// Take objects from the YAML and JSON files of this folder instead of an API server.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kubeconfig", "context"])]
    manifests: Option<PathBuf>,
    /// A kubeconfig file; else $KUBECONFIG or the pod's service account.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig.
    #[arg(long)]
    context: Option<String>,
    /// The cgroup v2 directory whose sockets are served; the mount's root if not given.
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
    /// External devices, separated by commas.
    #[arg(long, default_value = "auto", value_name = "auto|NAMES")]
    devices: String,
    /// Host sides of pods' veths, separated by commas.
    #[arg(long, default_value = "auto", value_name = "auto|none|NAMES")]
    pod_devices: String,
    /// Where XDP is attached on external devices.
    #[arg(long, default_value = "auto")]
    xdp_mode: XdpMode,
    /// How tc programs are attached.
    #[arg(long, default_value = "auto")]
    tc_mode: TcMode,
    /// Once this mode serves, remove what kube-proxy left in its modes; its connections go on until they end. kube-proxy
    /// itself has to be gone.
    #[arg(long)]
    replace_kube_proxy: bool,
    /// Policy.
    #[command(flatten)]
    policy: PolicyArgs,
    /// In the ipvs mode, answer ARP for the asked device's own addresses only (arp_ignore=1, arp_announce=2): bound
    /// VIPs are not announced by accident.
    #[arg(long)]
    ipvs_strict_arp: bool,
    /// Entries in each flow table; a connection takes two. Holds for tables that are not pinned yet.
    #[arg(long, default_value_t = 262_144)]
    flows_max: u32,
    /// Log each decision on packets that match: `any`, `10.0.0.5`, `10.0.0.5:80`, `:53/udp`, `[fd00::1]:443/tcp`.
    #[arg(long, value_name = "FILTER")]
    trace_packets: Option<String>,
    /// Where /healthz and /livez are served; with --dry-run 127.0.0.1:10356.
    #[arg(long, default_value = "0.0.0.0:10256", default_value_if("dry_run", "true", "127.0.0.1:10356"))]
    healthz_bind_address: SocketAddr,
    /// Where /metrics is served; with --dry-run 127.0.0.1:10349.
    #[arg(long, default_value = "127.0.0.1:10249", default_value_if("dry_run", "true", "127.0.0.1:10349"))]
    metrics_bind_address: SocketAddr,
    /// Least time between two writes to the kernel, in milliseconds: what changes meanwhile is written together.
    #[arg(long, default_value_t = 5)]
    min_sync_interval_ms: u64,
    /// A change that waits for the kernel for twice as long makes /healthz and /livez answer 503, in milliseconds.
    #[arg(long, default_value_t = 30_000)]
    sync_period_ms: u64,
}

/// Where objects come from.
#[derive(Clone, Debug)]
pub enum SourceConfig {
    /// A folder.
    Manifests(PathBuf),
    /// An API server.
    Kubernetes {
        /// Kubeconfig file.
        kubeconfig: Option<PathBuf>,
        /// Its context.
        context: Option<String>,
    },
}

impl SourceConfig {
    /// A folder if one is given, else an API server.
    pub fn new(manifests: Option<PathBuf>, kubeconfig: Option<PathBuf>, context: Option<String>) -> Self {
        match manifests {
            Some(dir) => Self::Manifests(dir),
            None => Self::Kubernetes { kubeconfig, context },
        }
    }
}

/// What the options mean.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node's name.
    pub node_name: Arc<str>,
    /// Pins.
    pub bpf_root: PathBuf,
    /// Source.
    pub source: SourceConfig,
    /// Socket hooks' cgroup, or why there is none.
    pub cgroup_root: Result<PathBuf, String>,
    /// Devices.
    pub devices: DeviceChoice,
    /// How programs are attached.
    pub modes: Modes,
    /// What carries packets to backends.
    pub mode: Mode,
    /// Compare only.
    pub dry_run: bool,
    /// Policy.
    pub compile: CompileConfig,
    /// How netfilter rules are written.
    pub rules: rules::iptables::Config,
    /// How IPVS is set up.
    pub ipvs: IpvsConfig,
    /// kube-proxy's rules are removed once this mode serves.
    pub replace_kube_proxy: bool,
    /// Map sizes.
    pub sizes: Sizes,
    /// Which packets to log.
    pub trace: Option<TraceFilter>,
    /// `/healthz`.
    pub healthz: SocketAddr,
    /// `/metrics`.
    pub metrics: SocketAddr,
    /// Milliseconds between writes.
    pub min_sync_interval_ms: u64,
    /// A change that waits for twice as long makes the node unhealthy.
    pub sync_period: Duration,
}

impl RunArgs {
    /// Resolves the options against this machine.
    pub fn resolve(self, bpf_root: &Path) -> Result<Config> {
        let node_name = node_name(self.node_name)?;
        let cgroup_root = cgroup_root(self.cgroup_root);
        let mode = match self.mode {
            ModeChoice::Fixed(mode) => mode,
            ModeChoice::Auto if self.dry_run => drift::mode_in_force(&Pins::new(bpf_root))?,
            ModeChoice::Auto => probe::auto(&Facts::read(bpf_root, &cgroup_root))?,
        };
        if mode != Mode::Ebpf && self.trace_packets.is_some() {
            bail!("--trace-packets follows packets through BPF programs: run it with --mode ebpf");
        }
        let names = |text: &str| {
            text.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect()
        };
        Ok(Config {
            node_name: Arc::from(node_name),
            bpf_root: bpf_root.to_owned(),
            source: SourceConfig::new(self.manifests, self.kubeconfig, self.context),
            cgroup_root,
            devices: DeviceChoice {
                external: (self.devices != "auto").then(|| names(&self.devices)),
                pods: match self.pod_devices.as_str() {
                    "auto" => None,
                    "none" => Some(Vec::new()),
                    list => Some(names(list)),
                },
            },
            modes: Modes { xdp: self.xdp_mode, tc: self.tc_mode },
            mode,
            dry_run: self.dry_run,
            compile: self.policy.compile(mode),
            rules: self.policy.rules(),
            replace_kube_proxy: self.replace_kube_proxy,
            ipvs: IpvsConfig { scheduler: self.policy.ipvs_scheduler(), strict_arp: self.ipvs_strict_arp },
            sizes: Sizes { flows: self.flows_max.max(1024) },
            trace: self.trace_packets.as_deref().map(trace::parse_filter).transpose()?,
            healthz: self.healthz_bind_address,
            metrics: self.metrics_bind_address,
            min_sync_interval_ms: self.min_sync_interval_ms,
            sync_period: Duration::from_millis(self.sync_period_ms),
        })
    }
}

/// The node's name in the cluster: the host name if not given.
pub fn node_name(given: Option<String>) -> Result<String> {
    let name = match given {
        Some(name) => name,
        None => {
            fs::read_to_string("/proc/sys/kernel/hostname").context("read the host name")?.trim().to_owned()
        }
    };
    if name.is_empty() {
        bail!("the node's name is empty: give --node-name");
    }
    Ok(name)
}

/// The directory whose sockets are served, or why there is none.
pub fn cgroup_root(given: Option<PathBuf>) -> Result<PathBuf, String> {
    given
        .or_else(|| cgroup2_mount(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()))
        .ok_or_else(|| "no cgroup v2 is mounted; mount one or give --cgroup-root".to_owned())
}

/// The mount point of cgroup v2: at `/sys/fs/cgroup`, or beside v1's controllers at `…/unified`.
fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        // Fields before " - ": …, mount point is the fifth; after it: file system type (proc(5)).
        let (mount, kind) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        kind.starts_with("cgroup2 ").then(|| PathBuf::from(point))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn packets_are_traced_in_bpf_programs_only() {
        for (mode, works) in [("ebpf", true), ("nftables", false), ("iptables", false), ("ipvs", false)] {
            let typed = ["lb-agent", "run", "--node-name", "n", "--trace-packets", "any", "--mode", mode];
            let Command::Run(options) = Args::parse_from(typed).command else { panic!("run was typed") };
            assert_eq!(options.resolve(Path::new("/sys/fs/bpf/lb")).is_ok(), works, "{mode}");
        }
    }

    #[test]
    fn a_dry_run_has_ports_of_its_own() {
        for (more, ports) in [
            (&[][..], [10256, 10249]),
            (&["--dry-run"], [10356, 10349]),
            (&["--dry-run", "--metrics-bind-address", "127.0.0.1:1"], [10356, 1]),
        ] {
            let typed = ["lb-agent", "run", "--node-name", "n", "--mode", "ebpf"];
            let Command::Run(options) = Args::parse_from(typed.iter().chain(more)).command else {
                panic!("run was typed")
            };
            let config = options.resolve(Path::new("/sys/fs/bpf/lb")).unwrap();
            assert_eq!([config.healthz.port(), config.metrics.port()], ports, "{more:?}");
        }
    }

    #[test]
    fn cgroup2_is_found_beside_v1() {
        let mountinfo = "30 1 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mount(mountinfo), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup2_mount(""), None);
    }
}
