//! What a configuration means: every field read and checked, defaults filled in as kube-proxy has them
//! (`pkg/proxy/apis/config/v1alpha1/defaults.go`, `…/validation/validation.go`).

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use clap::ValueEnum;
use ipnet::IpNet;
use lb_core::{
    compile::CompileConfig,
    model::{LocalDetector, NodePortAddress},
    rules::{self, ipvs::Scheduler},
};
use tracing::warn;

use super::{
    conntrack::{self, MAX_CONNECTIONS, Sysctl},
    kube_proxy::{Conntrack, KubeProxyConfiguration, Logging},
};
use crate::{
    args::{LegacyExternalIp, Mode, ModeChoice, OnBackendGone},
    datapath::{
        ebpf::attach::{Modes, TcMode, XdpMode},
        ipvs::{IpvsConfig, Timeouts},
    },
    netlink::DeviceChoice,
};

/// A field that can't be used, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Its path, as in the file.
    pub field: &'static str,
    /// What it should be.
    pub problem: String,
}

impl Problem {
    /// kube-proxy checks the sections `ipvs` and `nftables` only if their mode is asked for (`validation.go`).
    fn counts_in(&self, mode: ModeChoice) -> bool {
        let asked = |of: Mode| mode == ModeChoice::Fixed(of);
        match self.field.split_once('.') {
            Some(("ipvs", _)) => asked(Mode::Ipvs),
            Some(("nftables", _)) => asked(Mode::Nftables),
            _ => true,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

/// How netfilter's modes tell pods from others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// As it stands.
    By(LocalDetector),
    /// By the ranges in this node's Node object.
    NodeCidr,
}

/// What is common to netfilter's modes but can differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OfMode {
    masquerade_all: bool,
    masquerade_bit: u32,
    sync_period: Duration,
    /// `None`: the section says nothing.
    min_sync_period: Option<Duration>,
}

/// A configuration, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which mode.
    pub mode: ModeChoice,
    /// This node's name.
    pub node_name: Option<String>,
    /// Credentials.
    pub kubeconfig: Option<PathBuf>,
    /// Where `/healthz` is served; `None` is nowhere, which only options can say.
    pub healthz: Option<SocketAddr>,
    /// Where `/metrics` is served, likewise.
    pub metrics: Option<SocketAddr>,
    /// How pods are told.
    pub detect_local: DetectLocal,
    /// How IPVS is set up.
    pub ipvs: IpvsConfig,
    /// `/proc/self/oom_score_adj`.
    pub oom_score_adj: i32,
    /// What is logged, and how.
    pub logging: Logging,
    /// How conntrack is set up.
    pub conntrack: Vec<Sysctl>,
    /// How programs are attached.
    pub modes: Modes,
    /// Devices.
    pub devices: DeviceChoice,
    /// Entries in each flow table; `None`: as they suit the node.
    pub flows_max: Option<u32>,
    /// No map of Services gets more entries.
    pub map_entries_max: u32,
    /// The cgroup whose sockets are served.
    pub cgroup_root: Option<PathBuf>,
    /// kube-proxy's leftovers go.
    pub replace_kube_proxy: bool,
    /// What becomes of connections to backends that are gone.
    pub on_backend_gone: OnBackendGone,
    external_ips: bool,
    node_ip: Option<IpAddr>,
    /// `None`: as the mode has it.
    node_port_addresses: Option<Vec<NodePortAddress>>,
    localhost_node_ports: bool,
    be_liberal: bool,
    legacy_external_ip: bool,
    iptables: OfMode,
    ipvs_mode: OfMode,
    nftables: OfMode,
    min_sync_period: Duration,
    /// What is wrong in sections of modes that are not asked for; defaults hold there.
    pub not_looked_at: Vec<Problem>,
}

/// Ours: a write costs microseconds, and what changes while one goes on is written together.
const MIN_SYNC_PERIOD: Duration = Duration::from_millis(5);
const SYNC_PERIOD: Duration = Duration::from_secs(30);
/// On in Kubernetes 1.36, where it is new; KEP-5707 turns it off later.
pub(super) const EXTERNAL_IPS: &str = "AllowServiceExternalIPs";
/// kube-proxy `--iptables-masquerade-bit`.
const MASQUERADE_BIT: u32 = 14;
/// kube-proxy `--oom-score-adj`.
const OOM_SCORE_ADJ: i32 = -999;
const HEALTHZ_PORT: u16 = 10256;
const METRICS_PORT: u16 = 10249;
/// The kernel takes no more by far.
const ENTRIES_MAX: u32 = 1 << 28;
/// Some 100 000 Services with 40 endpoints each.
const MAP_ENTRIES_MAX: u32 = 1 << 22;
/// `IFNAMSIZ`, with the closing zero.
const DEVICE_NAME_MAX: usize = 16;

impl Settings {
    /// Reads a configuration; all that is wrong with it at once.
    pub fn of(file: &KubeProxyConfiguration) -> Result<Self, Vec<Problem>> {
        let mut problems = Problems::default();
        let p = &mut problems;
        let bind = p
            .optional("bindAddress", &file.bind_address, "an IP address", |text| text.parse::<IpAddr>().ok());
        let v6 = bind.is_some_and(|addr| addr.is_ipv6());
        let (any, loopback): ([IpAddr; 2], [IpAddr; 2]) =
            ([[0; 4].into(), [0u16; 8].into()], [[127, 0, 0, 1].into(), [0, 0, 0, 0, 0, 0, 0, 1u16].into()]);
        let mode = match p.optional("lb.mode", &file.lb.mode, ModeChoice::ALL_NAMES, mode) {
            Some(mode) => mode,
            None => p.optional("mode", &file.mode, ModeChoice::ALL_NAMES, mode).unwrap_or(ModeChoice::Auto),
        };
        let mut settings = Self {
            mode,
            node_name: given(&file.hostname_override).map(|name| name.trim().to_lowercase()),
            kubeconfig: given(&file.client_connection.kubeconfig).map(PathBuf::from),
            healthz: p
                .address("healthzBindAddress", &file.healthz_bind_address, HEALTHZ_PORT)
                .or(Some((any[usize::from(v6)], HEALTHZ_PORT).into())),
            metrics: p
                .address("metricsBindAddress", &file.metrics_bind_address, METRICS_PORT)
                .or(Some((loopback[usize::from(v6)], METRICS_PORT).into())),
            detect_local: p.detect_local(file),
            ipvs: IpvsConfig {
                scheduler: p
                    .optional(
                        "ipvs.scheduler",
                        &file.ipvs.scheduler,
                        "a scheduler of IPVS: rr, wrr, lc, wlc, lblc, lblcr, sh, dh, mh, sed, nq",
                        |text| Scheduler::ALL.into_iter().find(|one| one.name() == text),
                    )
                    .unwrap_or_default(),
                strict_arp: file.ipvs.strict_arp.unwrap_or(false),
                timeouts: Timeouts {
                    tcp: p.period("ipvs.tcpTimeout", file.ipvs.tcp_timeout).map_or(0, |time| time.as_secs()),
                    tcp_fin: p
                        .period("ipvs.tcpFinTimeout", file.ipvs.tcp_fin_timeout)
                        .map_or(0, |time| time.as_secs()),
                    udp: p.period("ipvs.udpTimeout", file.ipvs.udp_timeout).map_or(0, |time| time.as_secs()),
                },
            },
            oom_score_adj: p.between("oomScoreAdj", file.oom_score_adj, -1000, 1000).unwrap_or(OOM_SCORE_ADJ),
            logging: file.logging.clone(),
            conntrack: p.conntrack(&file.conntrack),
            modes: Modes {
                xdp: p.choice("lb.xdpMode", &file.lb.xdp_mode).unwrap_or(XdpMode::Auto),
                tc: p.choice("lb.tcMode", &file.lb.tc_mode).unwrap_or(TcMode::Auto),
            },
            devices: DeviceChoice { external: file.lb.devices.clone(), pods: file.lb.pod_devices.clone() },
            flows_max: p.between("lb.flowsMax", file.lb.flows_max, 1024, ENTRIES_MAX),
            map_entries_max: p
                .between("lb.mapEntriesMax", file.lb.map_entries_max, 64, ENTRIES_MAX)
                .unwrap_or(MAP_ENTRIES_MAX),
            cgroup_root: given(&file.lb.cgroup_root).map(PathBuf::from),
            replace_kube_proxy: file.lb.replace_kube_proxy.unwrap_or(false),
            on_backend_gone: p
                .choice("lb.onBackendGone", &file.lb.on_backend_gone)
                .unwrap_or(OnBackendGone::Keep),
            external_ips: file
                .feature_gates
                .as_ref()
                .and_then(|gates| gates.get(EXTERNAL_IPS).copied())
                .unwrap_or(true),
            node_ip: bind.filter(|addr| !addr.is_unspecified() && !addr.is_loopback()),
            node_port_addresses: p.node_port_addresses(&file.node_port_addresses),
            localhost_node_ports: file.iptables.localhost_node_ports.unwrap_or(true),
            be_liberal: file.conntrack.tcp_be_liberal.unwrap_or(false),
            legacy_external_ip: p
                .choice("lb.legacyExternalIP", &file.lb.legacy_external_ip)
                .is_some_and(|rules: LegacyExternalIp| rules == LegacyExternalIp::V1_20),
            iptables: OfMode {
                masquerade_all: file.iptables.masquerade_all.unwrap_or(false),
                masquerade_bit: p.bit("iptables.masqueradeBit", file.iptables.masquerade_bit),
                sync_period: p
                    .period("iptables.syncPeriod", file.iptables.sync_period)
                    .unwrap_or(SYNC_PERIOD),
                min_sync_period: p.period("iptables.minSyncPeriod", file.iptables.min_sync_period),
            },
            ipvs_mode: OfMode {
                masquerade_all: file.iptables.masquerade_all.unwrap_or(false),
                masquerade_bit: p.bit("iptables.masqueradeBit", file.iptables.masquerade_bit),
                sync_period: p.period("ipvs.syncPeriod", file.ipvs.sync_period).unwrap_or(SYNC_PERIOD),
                min_sync_period: p.period("ipvs.minSyncPeriod", file.ipvs.min_sync_period),
            },
            nftables: OfMode {
                masquerade_all: file.nftables.masquerade_all.unwrap_or(false),
                masquerade_bit: p.bit("nftables.masqueradeBit", file.nftables.masquerade_bit),
                sync_period: p
                    .period("nftables.syncPeriod", file.nftables.sync_period)
                    .unwrap_or(SYNC_PERIOD),
                min_sync_period: p.period("nftables.minSyncPeriod", file.nftables.min_sync_period),
            },
            min_sync_period: p.period("lb.minSyncPeriod", file.lb.min_sync_period).unwrap_or(MIN_SYNC_PERIOD),
            not_looked_at: Vec::new(),
        };
        for (field, of) in [
            ("iptables.minSyncPeriod", &mut settings.iptables),
            ("ipvs.minSyncPeriod", &mut settings.ipvs_mode),
            ("nftables.minSyncPeriod", &mut settings.nftables),
        ] {
            if of.min_sync_period.take_if(|min| *min > of.sync_period).is_some() {
                p.add(field, "must not be longer than syncPeriod".into());
            }
        }
        problems.0.dedup();
        let (wrong, not_looked_at) = problems.0.into_iter().partition(|problem| problem.counts_in(mode));
        settings.not_looked_at = not_looked_at;
        if wrong.is_empty() { Ok(settings) } else { Err(wrong) }
    }

    /// Names what is wrong and does not matter now.
    pub fn warn(&self) {
        for problem in &self.not_looked_at {
            warn!(%problem, "wrong, but of a mode that is not asked for: the default holds");
        }
    }

    fn of_mode(&self, mode: Mode) -> OfMode {
        match mode {
            Mode::Iptables => self.iptables,
            Mode::Ipvs => self.ipvs_mode,
            Mode::Nftables => self.nftables,
            Mode::Ebpf => OfMode { min_sync_period: None, ..self.iptables },
        }
    }

    /// Least time between two writes.
    pub fn min_sync_period(&self, mode: Mode) -> Duration {
        self.of_mode(mode).min_sync_period.unwrap_or(self.min_sync_period)
    }

    /// After twice this long without success the node is not well.
    pub fn sync_period(&self, mode: Mode) -> Duration {
        self.of_mode(mode).sync_period
    }

    /// For the compiler.
    pub fn compile(&self, mode: Mode) -> CompileConfig {
        CompileConfig {
            node_port_addresses: self.node_port_addresses(mode),
            node_ip: self.node_ip,
            localhost_node_ports: self.localhost_node_ports,
            masquerade_all: self.of_mode(mode).masquerade_all,
            external_ips: self.external_ips,
            sctp: mode.carries_sctp(),
        }
    }

    /// kube-proxy's nftables mode answers NodePorts on the primary addresses, if nothing is said.
    fn node_port_addresses(&self, mode: Mode) -> Vec<NodePortAddress> {
        let default = if mode == Mode::Nftables { vec![NodePortAddress::Primary] } else { Vec::new() };
        self.node_port_addresses.clone().unwrap_or(default)
    }

    /// For netfilter's rules, as far as they are known before the Node object is.
    pub fn rules(&self, mode: Mode) -> rules::iptables::Config {
        self.rules_of(mode, &[])
    }

    /// For netfilter's rules, on a node with these ranges of pods.
    pub fn rules_of(&self, mode: Mode, pod_cidrs: &[IpNet]) -> rules::iptables::Config {
        rules::iptables::Config {
            masquerade_all: self.of_mode(mode).masquerade_all,
            pods: match &self.detect_local {
                DetectLocal::By(detector) => detector.clone(),
                DetectLocal::NodeCidr => LocalDetector::Ranges(pod_cidrs.to_vec()),
            },
            localhost_node_ports: self.localhost_node_ports,
            node_port_addresses: self.node_port_addresses(mode),
            masquerade_mark: 1 << self.of_mode(mode).masquerade_bit,
            drop_invalid: !self.be_liberal,
            legacy_external_ip: self.legacy_external_ip,
            ..rules::iptables::Config::default()
        }
    }
}

/// A string that says something.
fn given(value: &Option<String>) -> Option<&str> {
    value.as_deref().filter(|text| !text.is_empty())
}

fn mode(text: &str) -> Option<ModeChoice> {
    ModeChoice::from_str(text, true).ok()
}

/// What is wrong so far. Each function reads a field, and notes if it can't.
#[derive(Default)]
struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, field: &'static str, problem: String) {
        self.0.push(Problem { field, problem });
    }

    fn optional<T>(
        &mut self,
        field: &'static str,
        value: &Option<String>,
        wanted: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let text = given(value)?;
        let read = read(text);
        if read.is_none() {
            self.add(field, format!("{text:?} is not {wanted}"));
        }
        read
    }

    fn choice<T: ValueEnum>(&mut self, field: &'static str, value: &Option<String>) -> Option<T> {
        let names = T::value_variants().iter().filter_map(ValueEnum::to_possible_value);
        let names: Vec<String> = names.map(|value| value.get_name().to_owned()).collect();
        self.optional(field, value, &format!("one of {}", names.join(", ")), |text| {
            T::from_str(text, true).ok()
        })
    }

    fn period(&mut self, field: &'static str, value: Option<kube::core::Duration>) -> Option<Duration> {
        let value = value?;
        if value.is_negative() {
            self.add(field, "must not be negative".into());
            return None;
        }
        Some(Duration::from(value)).filter(|time| !time.is_zero())
    }

    fn between<T: Copy + PartialOrd + fmt::Display>(
        &mut self,
        field: &'static str,
        value: Option<T>,
        first: T,
        last: T,
    ) -> Option<T> {
        let value = value?;
        if !(first..=last).contains(&value) {
            self.add(field, format!("{value} is not within {first} and {last}"));
            return None;
        }
        Some(value)
    }

    fn bit(&mut self, field: &'static str, value: Option<u32>) -> u32 {
        self.between(field, value, 0, 31).unwrap_or(MASQUERADE_BIT)
    }

    /// An address with or without a port.
    fn address(&mut self, field: &'static str, value: &Option<String>, port: u16) -> Option<SocketAddr> {
        self.optional(field, value, "an IP address with or without a port", |text| {
            text.parse()
                .ok()
                .or_else(|| Some((text.trim_matches(['[', ']']).parse::<IpAddr>().ok()?, port).into()))
        })
    }

    fn ranges(&mut self, field: &'static str, value: &Option<String>) -> Vec<IpNet> {
        let read = |text: &str| text.split(',').map(|range| IpNet::from_str(range.trim()).ok()).collect();
        let ranges: Vec<IpNet> = self
            .optional(field, value, "one CIDR a family, as in 10.244.0.0/16,fd00:10:244::/48", read)
            .unwrap_or_default();
        if ranges.iter().filter(|range| range.addr().is_ipv4()).count() > 1
            || ranges.iter().filter(|range| range.addr().is_ipv6()).count() > 1
        {
            self.add(field, "has more than one range of a family".into());
        }
        ranges
    }

    fn detect_local(&mut self, file: &KubeProxyConfiguration) -> DetectLocal {
        let ranges = self.ranges("clusterCIDR", &file.cluster_cidr);
        let by = match given(&file.detect_local_mode) {
            None | Some("ClusterCIDR") => LocalDetector::Ranges(ranges),
            Some("NodeCIDR") => return DetectLocal::NodeCidr,
            Some("BridgeInterface") => LocalDetector::Bridge(
                self.device("detectLocal.bridgeInterface", &file.detect_local.bridge_interface),
            ),
            Some("InterfaceNamePrefix") => LocalDetector::DevicePrefix(
                self.device("detectLocal.interfaceNamePrefix", &file.detect_local.interface_name_prefix),
            ),
            Some(other) => {
                let all = "ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix";
                self.add("detectLocalMode", format!("{other:?} is not {all}"));
                LocalDetector::NONE
            }
        };
        DetectLocal::By(by)
    }

    fn device(&mut self, field: &'static str, value: &Option<String>) -> Arc<str> {
        let name = given(value).unwrap_or_default();
        // What stands in a rule has to be one word there.
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.@:".contains(c);
        if name.is_empty() || name.len() >= DEVICE_NAME_MAX || !name.chars().all(is_name) {
            self.add(field, format!("{name:?} is not the name of a device, which detectLocalMode asks for"));
        }
        name.into()
    }

    fn node_port_addresses(&mut self, value: &Option<Vec<String>>) -> Option<Vec<NodePortAddress>> {
        let field = "nodePortAddresses";
        let range = |text: &str| text.parse().ok().map(NodePortAddress::Range);
        let mut addresses = Vec::new();
        for text in value.iter().flatten() {
            let meant: Option<Vec<NodePortAddress>> = match text.as_str() {
                "primary" => Some(vec![NodePortAddress::Primary]),
                "localhost" => ["127.0.0.0/8", "::1/128"].into_iter().map(range).collect(),
                "all" => ["0.0.0.0/0", "::/0"].into_iter().map(range).collect(),
                text => range(text).map(|range| vec![range]),
            };
            match meant {
                Some(meant) => addresses.extend(meant),
                None => self.add(field, format!("{text:?} is not a CIDR, primary, localhost or all")),
            }
        }
        (!addresses.is_empty()).then_some(addresses)
    }

    /// kube-proxy's values (`cmd/kube-proxy/app/conntrack.go`, `server_linux.go` `setupConntrack`).
    fn conntrack(&mut self, file: &Conntrack) -> Vec<Sysctl> {
        let mut sysctls = Vec::new();
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
        let per_cpu = file.max_per_core.unwrap_or(conntrack::MAX_PER_CORE);
        if per_cpu > 0 {
            let least = file.min.unwrap_or(conntrack::MAX_AT_LEAST);
            let value = (u64::from(per_cpu) * cpus).max(least.into());
            // Who has made it larger meant it, unless the file says otherwise.
            let at_least = file.max_per_core.or(file.min).is_none();
            sysctls.push(Sysctl { name: MAX_CONNECTIONS, value, at_least });
        }
        let timeouts = [
            (
                "nf_conntrack_tcp_timeout_established",
                "conntrack.tcpEstablishedTimeout",
                file.tcp_established_timeout,
                Some(conntrack::TCP_ESTABLISHED),
            ),
            (
                "nf_conntrack_tcp_timeout_close_wait",
                "conntrack.tcpCloseWaitTimeout",
                file.tcp_close_wait_timeout,
                Some(conntrack::TCP_CLOSE_WAIT),
            ),
            ("nf_conntrack_udp_timeout", "conntrack.udpTimeout", file.udp_timeout, None),
            ("nf_conntrack_udp_timeout_stream", "conntrack.udpStreamTimeout", file.udp_stream_timeout, None),
        ];
        for (sysctl, field, value, default) in timeouts {
            let time = if value.is_some() { self.period(field, value) } else { default };
            sysctls.extend(time.map(|time| Sysctl::exactly(sysctl, time.as_secs())));
        }
        if file.tcp_be_liberal == Some(true) {
            sysctls.push(Sysctl::exactly("nf_conntrack_tcp_be_liberal", 1));
        }
        sysctls
    }
}
