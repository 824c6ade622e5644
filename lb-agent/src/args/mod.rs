//! The command line: what was typed, and what it means.

mod kube_proxy;
mod policy;
mod run;
#[cfg(test)]
mod tests;

use std::{fs, net::SocketAddr, path::PathBuf, sync::LazyLock};

use anyhow::{Context, Result, bail};
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum, builder::PossibleValue};
pub use kube_proxy::command_line;
pub use policy::{DetectLocalMode, LegacyExternalIp, PolicyArgs};
pub use run::{Config, Instead, OnBackendGone, RunArgs, SourceConfig};

/// Serves Kubernetes Services on this node with eBPF.
#[derive(Parser, Debug)]
#[command(name = "lb-agent", version, after_help = EXAMPLES)]
pub struct Args {
    /// Where maps and links are pinned; one folder per node.
    #[arg(long, global = true, default_value = "/sys/fs/bpf/lb", env = "LB_BPF_ROOT")]
    pub bpf_root: PathBuf,
    /// Log filter, as in `info,lb_agent=debug`.
    #[arg(long, global = true, default_value = DEFAULT_LOG, env = "LB_LOG")]
    pub log: String,
    /// Log format.
    #[arg(long, global = true, default_value = "text")]
    pub log_format: LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What is logged if nothing is said.
pub const DEFAULT_LOG: &str = "info";

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
  lb-agent cleanup --dry-run
  lb-agent run --config /var/lib/kube-proxy/config.conf                   kube-proxy's own configuration
  lb-agent config check /var/lib/kube-proxy/config.conf                   what each of its fields does here";

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
    /// Configuration files.
    Config {
        /// What to do with one.
        #[command(subcommand)]
        command: ConfigCommand,
    },
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
    pub fn carries_sctp(self) -> bool {
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

impl ModeChoice {
    /// For messages.
    pub const ALL_NAMES: &str = "auto, ebpf, nftables, iptables or ipvs";
}

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

impl CleanupArgs {
    /// What kube-proxy's `--cleanup` means.
    pub fn of_kube_proxy() -> Self {
        let kube_proxy_metrics = ([127, 0, 0, 1], 10249).into();
        Self { dry_run: false, kube_proxy: true, drain: false, kube_proxy_metrics }
    }
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

/// What can be done with a configuration file.
#[derive(Subcommand, Debug)]
pub enum ConfigCommand {
    /// Say what each field of a KubeProxyConfiguration does here; exit code 1 if the agent could not run with it.
    Check {
        /// The file, as in a kube-proxy ConfigMap's config.conf.
        file: PathBuf,
        /// All fields that there are, not only those that the file gives.
        #[arg(long)]
        all: bool,
    },
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

/// The node's name in the cluster: the host name if not given, and in small letters as kubelet registers it.
pub fn node_name(given: Option<String>) -> Result<String> {
    let name = match given {
        Some(name) => name,
        None => fs::read_to_string("/proc/sys/kernel/hostname").context("read the host name")?,
    };
    let name = name.trim().to_lowercase();
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
