//! Options of `run`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Result, bail};
use clap::{Args as ClapArgs, ValueEnum, builder::BoolishValueParser};
use lb_common::abi::TraceFilter;
use lb_core::{compile::CompileConfig, rules};
use serde_json::Value;
use tracing::warn;

use super::{
    EXAMPLES, Mode, ModeChoice, cgroup_root, node_name,
    policy::{PolicyArgs, put, typed},
};
use crate::{
    config::{self, File, kube_proxy::KubeProxyConfiguration, settings::Settings},
    datapath::{
        ebpf::{
            attach::{TcMode, XdpMode},
            maps::Pins,
        },
        ipvs::IpvsConfig,
    },
    drift,
    probe::{self, Facts},
    source::kubernetes::Access,
    trace,
};

/// As Kubernetes writes them: `1s`, `2h22m`.
type Period = kube::core::Duration;

/// Options of `run`.
#[derive(ClapArgs, Clone, Debug)]
#[command(after_help = EXAMPLES, args_override_self = true)]
pub struct RunArgs {
    /// What carries packets to backends; auto if neither this nor the configuration says.
    #[arg(long, alias = "proxy-mode", env = "LB_MODE")]
    mode: Option<ModeChoice>,
    /// Touch nothing in the kernel: count how far what kube-proxy or another agent has there is from what it should
    /// be, as metric lb_dry_run_differences. Without --mode for the one that serves this node.
    #[arg(long, conflicts_with = "trace_packets")]
    dry_run: bool,
    /// This node's name in the cluster; the host name if not given.
    #[arg(long, alias = "hostname-override", env = "NODE_NAME")]
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
    /// External devices, separated by commas; auto, if not given, finds them.
    #[arg(long, value_name = "auto|NAMES")]
    devices: Option<String>,
    /// Host sides of pods' veths, separated by commas; auto, if not given, finds them.
    #[arg(long, value_name = "auto|none|NAMES")]
    pod_devices: Option<String>,
    /// Where XDP is attached on external devices.
    #[arg(long)]
    xdp_mode: Option<XdpMode>,
    /// How tc programs are attached.
    #[arg(long)]
    tc_mode: Option<TcMode>,
    /// Once this mode serves, remove what kube-proxy left in its modes; its connections go on until they end. kube-proxy
    /// itself has to be gone.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    replace_kube_proxy: Option<bool>,
    /// What becomes of TCP connections and connected UDP sockets when their backend is gone from all EndpointSlices (for
    /// UDP: when it no longer serves). In the ebpf mode only; keep if not given.
    #[arg(long)]
    on_backend_gone: Option<OnBackendGone>,
    /// Policy.
    #[command(flatten)]
    pub policy: PolicyArgs,
    /// kube-proxy's options.
    #[command(flatten)]
    kube_proxy: KubeProxyArgs,
    /// Entries in each flow table; a connection takes two. Holds for tables that are not pinned yet [default: by the node's
    /// CPUs and memory].
    #[arg(long, value_name = "N")]
    flows_max: Option<u32>,
    /// Maps of Services grow with the cluster, but none beyond so many entries [default: 4194304].
    #[arg(long, value_name = "N")]
    map_entries_max: Option<u32>,
    /// Log each decision on packets that match: `any`, `10.0.0.5`, `10.0.0.5:80`, `:53/udp`, `[fd00::1]:443/tcp`.
    #[arg(long, value_name = "FILTER")]
    trace_packets: Option<String>,
    /// Least time between two writes to the kernel; what changes meanwhile is written together [default: 5ms].
    #[arg(long, value_name = "DURATION")]
    min_sync_period: Option<Period>,
    /// Time between two looks for what others took away from the kernel. A change that waits for it for twice as long makes
    /// /healthz and /livez answer 503 [default: 30s].
    #[arg(long, value_name = "DURATION")]
    sync_period: Option<Period>,
}

/// kube-proxy's options of the same names (`cmd/kube-proxy/app/options.go`).
#[derive(ClapArgs, Clone, Debug)]
#[command(next_help_heading = "Options of kube-proxy")]
struct KubeProxyArgs {
    /// The API server's address, whatever the kubeconfig says.
    #[arg(long, value_name = "URL")]
    master: Option<String>,
    /// Where /healthz and /livez are served, nowhere if empty; with --dry-run 127.0.0.1:10356 [default: 0.0.0.0:10256].
    #[arg(long, value_name = "IP[:PORT]")]
    healthz_bind_address: Option<String>,
    /// Where /metrics is served, nowhere if empty; with --dry-run 127.0.0.1:10349 [default: 127.0.0.1:10249].
    #[arg(long, value_name = "IP[:PORT]")]
    metrics_bind_address: Option<String>,
    /// The port of /healthz where --healthz-bind-address isn't given; 0 for none. Deprecated by kube-proxy.
    #[arg(long, hide = true)]
    healthz_port: Option<u16>,
    /// The port of /metrics where --metrics-bind-address isn't given; 0 for none. Deprecated by kube-proxy.
    #[arg(long, hide = true)]
    metrics_port: Option<u16>,
    /// How the kernel's OOM killer weighs the agent [default: -999].
    #[arg(long, allow_negative_numbers = true)]
    oom_score_adj: Option<i32>,
    /// net.netfilter.nf_conntrack_max for each CPU; 0 leaves it [default: 32768].
    #[arg(long)]
    conntrack_max_per_core: Option<u32>,
    /// net.netfilter.nf_conntrack_max at least [default: 131072].
    #[arg(long)]
    conntrack_min: Option<u32>,
    /// net.netfilter.nf_conntrack_tcp_timeout_established; 0 leaves it [default: 24h].
    #[arg(long, value_name = "DURATION")]
    conntrack_tcp_timeout_established: Option<Period>,
    /// net.netfilter.nf_conntrack_tcp_timeout_close_wait; 0 leaves it [default: 1h].
    #[arg(long, value_name = "DURATION")]
    conntrack_tcp_timeout_close_wait: Option<Period>,
    /// net.netfilter.nf_conntrack_tcp_be_liberal=1; iptables and ipvs modes then drop no INVALID packets.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    conntrack_tcp_be_liberal: Option<bool>,
    /// net.netfilter.nf_conntrack_udp_timeout.
    #[arg(long, value_name = "DURATION")]
    conntrack_udp_timeout: Option<Period>,
    /// net.netfilter.nf_conntrack_udp_timeout_stream.
    #[arg(long, value_name = "DURATION")]
    conntrack_udp_timeout_stream: Option<Period>,
    /// After twice this long without success /healthz says so, in iptables and ebpf modes [default: 30s].
    #[arg(long, value_name = "DURATION")]
    iptables_sync_period: Option<Period>,
    /// Least time between two writes in iptables mode.
    #[arg(long, value_name = "DURATION")]
    iptables_min_sync_period: Option<Period>,
    /// After twice this long without success /healthz says so, in ipvs mode [default: 30s].
    #[arg(long, value_name = "DURATION")]
    ipvs_sync_period: Option<Period>,
    /// Least time between two writes in ipvs mode.
    #[arg(long, value_name = "DURATION")]
    ipvs_min_sync_period: Option<Period>,
    /// In the ipvs mode, answer ARP for the asked device's own addresses only (arp_ignore=1, arp_announce=2): bound
    /// VIPs are not announced by accident.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    ipvs_strict_arp: Option<bool>,
    /// When IPVS forgets an idle TCP connection.
    #[arg(long, value_name = "DURATION")]
    ipvs_tcp_timeout: Option<Period>,
    /// When IPVS forgets a TCP connection after a FIN.
    #[arg(long, value_name = "DURATION")]
    ipvs_tcpfin_timeout: Option<Period>,
    /// When IPVS forgets a UDP flow.
    #[arg(long, value_name = "DURATION")]
    ipvs_udp_timeout: Option<Period>,
    /// Feature gates, as in A=true,B=false. AllowServiceExternalIPs=false takes externalIPs out of service; no other has a
    /// meaning here.
    #[arg(long, value_delimiter = ',', value_parser = feature_gate, value_name = "NAME=BOOL")]
    feature_gates: Option<Vec<(String, bool)>>,
    /// Log level as a number: from 4 on debug messages, from 8 on all. --log says it by module.
    #[arg(short, long, value_name = "NUMBER")]
    v: Option<u32>,
    /// text, or json: one object a line.
    #[arg(long, value_name = "FORMAT")]
    logging_format: Option<String>,
    /// Remove everything of ours and of kube-proxy from this node and end, as `cleanup --kube-proxy` does.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    pub(super) cleanup: Option<bool>,
    /// Set sysctls and end.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    pub(super) init_only: Option<bool>,
    /// Write the configuration that results from --config and the options into this file and end.
    #[arg(long, value_name = "FILE")]
    pub(super) write_config_to: Option<PathBuf>,
    /// The program was called kube-proxy: as that does with what its other modes left, what it left itself is removed.
    #[arg(long, hide = true)]
    in_kube_proxys_place: bool,
    /// Options of kube-proxy that were typed and that it does not look at beside --config.
    #[arg(long, hide = true, value_delimiter = ',')]
    not_looked_at: Vec<String>,
    #[command(flatten)]
    without_meaning: WithoutMeaning,
}

/// Options of kube-proxy that may stand in a DaemonSet and do nothing here; `config check --all` says why.
#[derive(ClapArgs, Clone, Debug)]
struct WithoutMeaning {
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true)]
    bind_address_hard_fail: Option<Option<String>>,
    #[arg(long, hide = true)]
    config_sync_period: Option<String>,
    #[arg(long, hide = true)]
    ipvs_exclude_cidrs: Option<String>,
    #[arg(long, hide = true)]
    kube_api_burst: Option<String>,
    #[arg(long, hide = true)]
    kube_api_content_type: Option<String>,
    #[arg(long, hide = true)]
    kube_api_qps: Option<String>,
    #[arg(long, hide = true)]
    log_flush_frequency: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true)]
    profiling: Option<Option<String>>,
    #[arg(long, hide = true)]
    log_json_info_buffer_size: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true)]
    log_json_split_stream: Option<Option<String>>,
    #[arg(long, hide = true)]
    log_text_info_buffer_size: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true)]
    log_text_split_stream: Option<Option<String>>,
    #[arg(long, hide = true)]
    show_hidden_metrics_for_version: Option<String>,
    #[arg(long, hide = true)]
    vmodule: Option<String>,
}

impl WithoutMeaning {
    fn typed(&self) -> Vec<&'static str> {
        let all = [
            ("--bind-address-hard-fail", self.bind_address_hard_fail.is_some()),
            ("--config-sync-period", self.config_sync_period.is_some()),
            ("--ipvs-exclude-cidrs", self.ipvs_exclude_cidrs.is_some()),
            ("--kube-api-burst", self.kube_api_burst.is_some()),
            ("--kube-api-content-type", self.kube_api_content_type.is_some()),
            ("--kube-api-qps", self.kube_api_qps.is_some()),
            ("--log-flush-frequency", self.log_flush_frequency.is_some()),
            ("--log-json-info-buffer-size", self.log_json_info_buffer_size.is_some()),
            ("--log-json-split-stream", self.log_json_split_stream.is_some()),
            ("--log-text-info-buffer-size", self.log_text_info_buffer_size.is_some()),
            ("--log-text-split-stream", self.log_text_split_stream.is_some()),
            ("--profiling", self.profiling.is_some()),
            ("--show-hidden-metrics-for-version", self.show_hidden_metrics_for_version.is_some()),
            ("--vmodule", self.vmodule.is_some()),
        ];
        all.into_iter().filter_map(|(name, typed)| typed.then_some(name)).collect()
    }
}

impl KubeProxyArgs {
    fn put_into(&self, to: &mut KubeProxyConfiguration) {
        put(&mut to.healthz_bind_address, self.healthz_bind_address.clone());
        put(&mut to.metrics_bind_address, self.metrics_bind_address.clone());
        put(&mut to.oom_score_adj, self.oom_score_adj);
        put(&mut to.conntrack.max_per_core, self.conntrack_max_per_core);
        put(&mut to.conntrack.min, self.conntrack_min);
        put(&mut to.conntrack.tcp_established_timeout, self.conntrack_tcp_timeout_established);
        put(&mut to.conntrack.tcp_close_wait_timeout, self.conntrack_tcp_timeout_close_wait);
        put(&mut to.conntrack.tcp_be_liberal, self.conntrack_tcp_be_liberal);
        put(&mut to.conntrack.udp_timeout, self.conntrack_udp_timeout);
        put(&mut to.conntrack.udp_stream_timeout, self.conntrack_udp_timeout_stream);
        put(&mut to.iptables.sync_period, self.iptables_sync_period);
        put(&mut to.iptables.min_sync_period, self.iptables_min_sync_period);
        put(&mut to.ipvs.sync_period, self.ipvs_sync_period);
        put(&mut to.ipvs.min_sync_period, self.ipvs_min_sync_period);
        put(&mut to.ipvs.strict_arp, self.ipvs_strict_arp);
        put(&mut to.ipvs.tcp_timeout, self.ipvs_tcp_timeout);
        put(&mut to.ipvs.tcp_fin_timeout, self.ipvs_tcpfin_timeout);
        put(&mut to.ipvs.udp_timeout, self.ipvs_udp_timeout);
        if let Some(gates) = &self.feature_gates {
            to.feature_gates.get_or_insert_default().extend(gates.iter().cloned());
        }
        put(&mut to.logging.verbosity, self.v);
        put(&mut to.logging.format, self.logging_format.clone());
    }
}

fn feature_gate(text: &str) -> Result<(String, bool), String> {
    let (name, value) =
        text.split_once('=').ok_or_else(|| format!("{text:?} is not NAME=true or NAME=false"))?;
    let value = value.trim().to_lowercase();
    match value.as_str() {
        "true" | "t" | "1" => Ok((name.trim().to_owned(), true)),
        "false" | "f" | "0" => Ok((name.trim().to_owned(), false)),
        _ => Err(format!("{value:?} is neither true nor false")),
    }
}

/// What became of an address by what was typed: none if that is empty, or a deprecated port is 0.
fn bound(configured: Option<SocketAddr>, typed: Option<&str>, port: Option<u16>) -> Option<SocketAddr> {
    match (typed, port) {
        (Some(""), _) | (None, Some(0)) => None,
        (Some(_), _) | (None, None) => configured,
        (None, Some(port)) => configured.map(|addr| SocketAddr::new(addr.ip(), port)),
    }
}

/// `--on-backend-gone` of `run`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnBackendGone {
    /// They are left to their own timeouts.
    Keep,
    /// After a second sockets get ECONNABORTED (who sends on a UDP socket: EDESTADDRREQ), and connections that are
    /// translated packet by packet a reset with their next segment. A terminating backend is not gone.
    Reset,
}

/// What `run` is to do instead of serving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Instead {
    /// kube-proxy `--cleanup`.
    Cleanup,
    /// kube-proxy `--init-only`.
    Init,
    /// kube-proxy `--write-config-to`.
    WriteConfig(PathBuf),
}

/// What can become of connections in the mode that is taken. Where the agent chose it, it does without rather than not
/// serve.
pub(super) fn on_backend_gone(
    choice: ModeChoice,
    taken: Mode,
    wanted: OnBackendGone,
) -> Result<OnBackendGone> {
    if taken == Mode::Ebpf || wanted == OnBackendGone::Keep {
        return Ok(wanted);
    }
    if choice == ModeChoice::Auto {
        warn!(
            mode = taken.name(),
            "--on-backend-gone reset needs the ebpf mode, which does not work here (`lb-agent probe` says why): connections to backends that are gone are kept"
        );
        return Ok(OnBackendGone::Keep);
    }
    bail!(
        "--on-backend-gone reset is done by BPF programs and by what they remember: run it with --mode ebpf, or with --mode auto to have it where that works"
    )
}

/// Where objects come from.
#[derive(Clone, Debug)]
pub enum SourceConfig {
    /// A folder.
    Manifests(PathBuf),
    /// An API server.
    Kubernetes(Access),
}

impl SourceConfig {
    /// A folder if one is given, else an API server.
    pub fn new(manifests: Option<PathBuf>, access: Access) -> Self {
        match manifests {
            Some(dir) => Self::Manifests(dir),
            None => Self::Kubernetes(access),
        }
    }
}

/// What the options mean on this machine.
#[derive(Clone, Debug)]
pub struct Config {
    /// What file and options say.
    pub settings: Settings,
    /// All of it, for `/configz`.
    pub in_force: Value,
    /// This node's name.
    pub node_name: Arc<str>,
    /// Pins.
    pub bpf_root: PathBuf,
    /// Source.
    pub source: SourceConfig,
    /// Socket hooks' cgroup, or why there is none.
    pub cgroup_root: Result<PathBuf, String>,
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
    /// What becomes of connections to backends that are gone.
    pub on_backend_gone: OnBackendGone,
    /// Which packets to log.
    pub trace: Option<TraceFilter>,
    /// Least time between two writes.
    pub min_sync_period: Duration,
    /// A change that waits for twice as long makes the node unhealthy.
    pub sync_period: Duration,
}

/// Ports of a dry run: kube-proxy has the usual ones.
const DRY_RUN: [(&str, u16); 2] = [("127.0.0.1", 10356), ("127.0.0.1", 10349)];

impl RunArgs {
    /// What to do instead of serving.
    pub fn instead(&self) -> Option<Instead> {
        let options = &self.kube_proxy;
        let write = || options.write_config_to.clone().map(Instead::WriteConfig);
        let asked = |option: Option<bool>, instead| option.unwrap_or(false).then_some(instead);
        asked(options.cleanup, Instead::Cleanup).or(asked(options.init_only, Instead::Init)).or_else(write)
    }

    /// Options that were typed and do nothing.
    pub fn without_meaning(&self) -> Vec<&'static str> {
        self.kube_proxy.without_meaning.typed()
    }

    /// Options that were typed and that kube-proxy, in whose place this is, does not look at beside --config.
    pub fn not_looked_at(&self) -> &[String] {
        &self.kube_proxy.not_looked_at
    }

    /// A file with the options in it.
    pub fn configuration(&self, file: &File) -> KubeProxyConfiguration {
        let mut to = file.configuration.clone();
        self.policy.put_into(&mut to);
        self.kube_proxy.put_into(&mut to);
        put(&mut to.lb.mode, self.mode.and_then(typed));
        put(&mut to.hostname_override, self.node_name.clone());
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.to_string_lossy().into_owned());
        put(&mut to.client_connection.kubeconfig, path(&self.kubeconfig));
        put(&mut to.lb.cgroup_root, path(&self.cgroup_root));
        let names = |text: &String| -> Option<Vec<String>> {
            let names = text.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty());
            match text.as_str() {
                "auto" => None,
                "none" => Some(Vec::new()),
                _ => Some(names.collect()),
            }
        };
        if let Some(text) = &self.devices {
            to.lb.devices = names(text);
        }
        if let Some(text) = &self.pod_devices {
            to.lb.pod_devices = names(text);
        }
        put(&mut to.lb.xdp_mode, self.xdp_mode.and_then(typed));
        put(&mut to.lb.tc_mode, self.tc_mode.and_then(typed));
        put(&mut to.lb.replace_kube_proxy, self.replace_kube_proxy);
        if self.kube_proxy.in_kube_proxys_place {
            to.lb.replace_kube_proxy.get_or_insert(true);
        }
        put(&mut to.lb.on_backend_gone, self.on_backend_gone.and_then(typed));
        put(&mut to.lb.flows_max, self.flows_max);
        put(&mut to.lb.map_entries_max, self.map_entries_max);
        put(&mut to.lb.min_sync_period, self.min_sync_period);
        for of_mode in [&mut to.iptables.sync_period, &mut to.ipvs.sync_period, &mut to.nftables.sync_period]
        {
            put(of_mode, self.sync_period);
        }
        if self.dry_run {
            let [healthz, metrics] = DRY_RUN.map(|(addr, port)| Some(format!("{addr}:{port}")));
            to.healthz_bind_address = self.kube_proxy.healthz_bind_address.clone().or(healthz);
            to.metrics_bind_address = self.kube_proxy.metrics_bind_address.clone().or(metrics);
        }
        to
    }

    /// Resolves file and options against this machine.
    pub fn resolve(&self, file: &File, bpf_root: &Path) -> Result<Config> {
        let configuration = self.configuration(file);
        let mut settings = config::settings(&configuration)?;
        let typed = &self.kube_proxy;
        settings.healthz = bound(settings.healthz, typed.healthz_bind_address.as_deref(), typed.healthz_port);
        settings.metrics = bound(settings.metrics, typed.metrics_bind_address.as_deref(), typed.metrics_port);
        let cgroup_root = cgroup_root(settings.cgroup_root.clone());
        let mode = match settings.mode {
            ModeChoice::Fixed(mode) => mode,
            ModeChoice::Auto if self.dry_run => drift::mode_in_force(&Pins::new(bpf_root))?,
            ModeChoice::Auto => probe::auto(&Facts::read(bpf_root, &cgroup_root))?,
        };
        if mode != Mode::Ebpf && self.trace_packets.is_some() {
            bail!("--trace-packets follows packets through BPF programs: run it with --mode ebpf");
        }
        settings.on_backend_gone = on_backend_gone(settings.mode, mode, settings.on_backend_gone)?;
        let node_name: Arc<str> = Arc::from(node_name(settings.node_name.clone())?);
        Ok(Config {
            in_force: config::in_force::in_force(&configuration, &settings, mode, &node_name),
            node_name,
            bpf_root: bpf_root.to_owned(),
            source: SourceConfig::new(
                self.manifests.clone(),
                Access {
                    kubeconfig: settings.kubeconfig.clone(),
                    context: self.context.clone(),
                    master: self.kube_proxy.master.clone(),
                },
            ),
            cgroup_root,
            mode,
            dry_run: self.dry_run,
            compile: settings.compile(mode),
            rules: settings.rules(mode),
            ipvs: settings.ipvs,
            replace_kube_proxy: settings.replace_kube_proxy,
            on_backend_gone: settings.on_backend_gone,
            trace: self.trace_packets.as_deref().map(trace::parse_filter).transpose()?,
            min_sync_period: settings.min_sync_period(mode),
            sync_period: settings.sync_period(mode),
            settings,
        })
    }
}
