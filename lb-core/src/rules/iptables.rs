//! A [`ServiceTable`] as the rules kube-proxy 1.36 writes (`pkg/proxy/iptables/proxier.go` `syncProxyRules`).
//!
//! [`of_service`] gives one service port's rules, [`base`] those that stand once; [`super::incremental`] puts them
//! together. Rules of different service ports exclude each other, so their order among themselves is free; within
//! a chain of one service port it is kube-proxy's.

use std::{collections::BTreeMap, net::SocketAddr, ops::Deref, sync::Arc};

use ipnet::IpNet;

use super::{
    Match, Net, Rule, Target,
    facts::Facts,
    ipvs,
    names::{self, of_endpoint},
};
use crate::{
    model::{Family, LocalDetector, NodePortAddress, Protocol},
    table::{
        Backend, BackendList, Frontend, FrontendAddr, FrontendKind, ServiceEntry, ServicePortId, ServiceTable,
    },
};

/// What the rules depend on besides the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Masquerade all traffic to services.
    pub masquerade_all: bool,
    /// How pods are told from others; who is no pod is masqueraded on the way to ClusterIPs.
    pub pods: LocalDetector,
    /// NodePorts answer on 127.0.0.1 too.
    pub localhost_node_ports: bool,
    /// Node addresses that answer NodePorts, where they are not all.
    pub node_port_addresses: Vec<NodePortAddress>,
    /// The bit of the packet mark that asks for masquerading (kube-proxy `--iptables-masquerade-bit`).
    pub masquerade_mark: u32,
    /// The kernel and iptables know `MASQUERADE --random-fully`.
    pub random_fully: bool,
    /// Drop what conntrack calls INVALID; not needed with `nf_conntrack_tcp_be_liberal`.
    pub drop_invalid: bool,
    /// Count what kube-proxy counts ([`names::COUNTERS`]): the counters are there, and kernel and iptables know nfacct.
    pub accounting: bool,
    /// Capture externalIPs as kube-proxy 1.20 did: not from this node's bridged pods and own processes, unless the
    /// address is this node's.
    pub legacy_external_ip: bool,
    /// Who translates.
    pub translation: Translation,
}

/// Who translates what the rules let through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Translation {
    /// Rules of each service port.
    #[default]
    Rules,
    /// IPVS; the rules masquerade and filter ([`super::ipvs::chains`]).
    Ipvs,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            masquerade_all: false,
            pods: LocalDetector::NONE,
            localhost_node_ports: true,
            node_port_addresses: Vec::new(),
            masquerade_mark: 1 << 14,
            random_fully: true,
            drop_invalid: true,
            accounting: false,
            legacy_external_ip: false,
            translation: Translation::Rules,
        }
    }
}

/// From so many endpoints on, rules of endpoints carry no comment (kube-proxy `largeClusterEndpointsThreshold`).
pub const LARGE_CLUSTER: usize = 1000;

/// netfilter's tables, as far as they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Only the canary.
    Mangle,
    /// Refusals.
    Filter,
    /// Translations.
    Nat,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Mangle, Self::Filter, Self::Nat];

    /// As `-t` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mangle => "mangle",
            Self::Filter => "filter",
            Self::Nat => "nat",
        }
    }
}

/// A chain.
pub type Chain = (Table, Arc<str>);

/// Rules of one service port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceRules {
    /// Rules in chains shared by all.
    pub shared: Vec<(Table, &'static str, Rule)>,
    /// Chains of its own, all in table nat.
    pub own: BTreeMap<Arc<str>, Vec<Rule>>,
}

impl ServiceRules {
    fn share(&mut self, table: Table, chain: &'static str, matches: Vec<Match>, target: Target) {
        self.shared.push((table, chain, Rule { matches, target: Some(target) }));
    }

    fn own(&mut self, chain: &Arc<str>, matches: Vec<Match>, target: Target) {
        self.own.entry(chain.clone()).or_default().push(Rule { matches, target: Some(target) });
    }
}

/// The chain names of a service port.
struct Chains {
    cluster: Arc<str>,
    local: Arc<str>,
    external: Arc<str>,
    firewall: Arc<str>,
}

/// One service port on its way into rules.
struct Port<'a> {
    facts: Facts<'a>,
    config: &'a Config,
    chains: Chains,
    /// Without comments at endpoints.
    large: bool,
}

/// The rules of one service port, whose frontends these are.
pub fn of_service(
    id: &ServicePortId,
    entry: &ServiceEntry,
    frontends: &[(FrontendAddr, &Frontend)],
    config: &Config,
    large: bool,
) -> ServiceRules {
    let chains = Chains {
        cluster: names::of_service("KUBE-SVC-", id),
        local: names::of_service("KUBE-SVL-", id),
        external: names::of_service("KUBE-EXT-", id),
        firewall: names::of_service("KUBE-FW-", id),
    };
    let facts = Facts::new(id, entry, frontends);
    if config.translation == Translation::Ipvs {
        return ipvs::chains::of_service(&facts);
    }
    let port = Port { facts, config, chains, large };
    let mut rules = ServiceRules::default();
    port.capture_cluster_ips(&mut rules);
    port.capture_external_ips(&mut rules);
    port.capture_load_balancer_ips(&mut rules);
    port.capture_node_port(&mut rules);
    port.admit_health_checks(&mut rules);
    port.enter_from_outside(&mut rules);
    port.check_source_ranges(&mut rules);
    if !entry.cluster.is_empty() {
        port.balance(&port.chains.cluster, &entry.cluster, &mut rules);
    }
    if !entry.local.is_empty() {
        port.balance(&port.chains.local, &entry.local, &mut rules);
    }
    port.translate(&mut rules);
    rules
}

impl<'a> Deref for Port<'a> {
    type Target = Facts<'a>;

    fn deref(&self) -> &Facts<'a> {
        &self.facts
    }
}

impl Port<'_> {
    fn policy_chain(&self, list: BackendList) -> &Arc<str> {
        match list {
            BackendList::Cluster => &self.chains.cluster,
            BackendList::Local => &self.chains.local,
        }
    }

    /// Comment, protocol, destination and port, in kube-proxy's order.
    fn dialled(&self, comment: String, addr: &FrontendAddr) -> Vec<Match> {
        let dst = Match::Dst(Net::Addr(addr.addr));
        vec![Match::Comment(comment), Match::Protocol(addr.protocol), dst, Match::DstPort(addr.port)]
    }

    fn refusal(&self) -> (String, Target) {
        match self.has_endpoints {
            false => (format!("{} has no endpoints", self.name), Target::Reject),
            true => (format!("{} has no local endpoints", self.name), Target::Drop),
        }
    }

    fn refuse_from_outside(&self, addr: &FrontendAddr, rules: &mut ServiceRules) {
        let (comment, target) = self.refusal();
        rules.share(Table::Filter, names::EXTERNAL_SERVICES, self.dialled(comment, addr), target);
    }

    fn capture_cluster_ips(&self, rules: &mut ServiceRules) {
        for (addr, frontend) in self.of_kind(FrontendKind::ClusterIp) {
            let list = frontend.internal.list;
            if !self.has_endpoints || self.backends(list).is_empty() {
                let (comment, target) = self.refusal();
                rules.share(Table::Filter, names::SERVICES, self.dialled(comment, addr), target);
                continue;
            }
            let chain = self.policy_chain(list);
            let dialled = self.dialled(format!("{} cluster IP", self.name), addr);
            rules.share(Table::Nat, names::SERVICES, dialled.clone(), Target::Jump(chain.clone()));
            if self.config.masquerade_all {
                rules.own(chain, dialled, Target::Jump(names::MARK_MASQ.into()));
            } else if let Some(from_others) = from_others(&self.config.pods, self.id.family) {
                let mut matches = dialled;
                matches.push(from_others);
                rules.own(chain, matches, Target::Jump(names::MARK_MASQ.into()));
            }
        }
    }

    fn capture_external_ips(&self, rules: &mut ServiceRules) {
        for (addr, _) in self.of_kind(FrontendKind::ExternalIp) {
            if self.has_endpoints && self.config.legacy_external_ip {
                self.capture_external_ip_as_1_20(addr, rules);
            } else if self.has_endpoints {
                let dialled = self.dialled(format!("{} external IP", self.name), addr);
                let target = Target::Jump(self.chains.external.clone());
                rules.share(Table::Nat, names::SERVICES, dialled, target);
            }
            if !self.has_external_endpoints() {
                self.refuse_from_outside(addr, rules);
            }
        }
    }

    /// kube-proxy 1.20 `iptables/proxier.go:1087-1170`: marked unless policy Local; captured when it enters from
    /// outside, or when the address is this node's. For policy Local 1.20 had a chain KUBE-XLB-; KUBE-EXT- does
    /// the same.
    fn capture_external_ip_as_1_20(&self, addr: &FrontendAddr, rules: &mut ServiceRules) {
        let net = Net::Range(IpNet::from(addr.addr));
        let dialled = vec![
            Match::Comment(format!("{} external IP", self.name)),
            Match::Protocol(addr.protocol),
            Match::Dst(net),
            Match::DstPort(addr.port),
        ];
        let with = |more: &[Match]| [&dialled, more].concat();
        let chain = match self.external_list() {
            Some(BackendList::Local) => &self.chains.external,
            _ => {
                let mark = Target::Jump(names::MARK_MASQ.into());
                rules.share(Table::Nat, names::SERVICES, dialled.clone(), mark);
                &self.chains.cluster
            }
        };
        let from_outside = with(&[Match::NotFromBridgePort, Match::SrcNotLocal]);
        rules.share(Table::Nat, names::SERVICES, from_outside, Target::Jump(chain.clone()));
        let local = with(&[Match::DstLocal]);
        rules.share(Table::Nat, names::SERVICES, local, Target::Jump(chain.clone()));
    }

    fn capture_load_balancer_ips(&self, rules: &mut ServiceRules) {
        for (addr, _) in self.of_kind(FrontendKind::LoadBalancer) {
            if self.has_endpoints {
                let chain = if self.uses_firewall() { &self.chains.firewall } else { &self.chains.external };
                let dialled = self.dialled(format!("{} loadbalancer IP", self.name), addr);
                rules.share(Table::Nat, names::SERVICES, dialled, Target::Jump(chain.clone()));
            }
            if self.uses_firewall() {
                let comment = format!("{} traffic not accepted by {}", self.name, self.chains.firewall);
                rules.share(Table::Filter, names::PROXY_FIREWALL, self.dialled(comment, addr), Target::Drop);
            }
            if !self.has_external_endpoints() {
                self.refuse_from_outside(addr, rules);
            }
        }
    }

    /// One rule for all of the node's addresses: which those are is decided where [`names::NODE_PORTS`] is called.
    fn capture_node_port(&self, rules: &mut ServiceRules) {
        let mut node_ports = self.of_kind(FrontendKind::NodePort);
        let Some((addr, _)) =
            node_ports.next().or_else(|| self.of_kind(FrontendKind::LocalhostNodePort).next())
        else {
            return;
        };
        let port = [Match::Protocol(addr.protocol), Match::DstPort(addr.port)];
        if self.has_endpoints {
            let comment = Match::Comment(self.name.clone());
            let target = || Target::Jump(self.chains.external.clone());
            if self.config.accounting && self.config.localhost_node_ports && self.id.family == Family::V4 {
                let [protocol, number] = port.clone();
                let counted = Match::Counted(names::LOCALHOST_ACCEPTED);
                let matches = vec![comment.clone(), protocol, Match::Dst(loopback()), number, counted];
                rules.share(Table::Nat, names::NODE_PORTS, matches, target());
            }
            rules.share(Table::Nat, names::NODE_PORTS, [&[comment][..], &port].concat(), target());
        }
        if !self.has_external_endpoints() {
            let (comment, target) = self.refusal();
            let matches = [&[Match::Comment(comment), Match::DstLocal][..], &port].concat();
            rules.share(Table::Filter, names::EXTERNAL_SERVICES, matches, target);
        }
    }

    fn admit_health_checks(&self, rules: &mut ServiceRules) {
        if self.entry.health_check_node_port != 0 {
            let matches = vec![
                Match::Comment(format!("{} health check node port", self.name)),
                Match::Protocol(Protocol::Tcp),
                Match::DstPort(self.entry.health_check_node_port),
            ];
            rules.share(Table::Filter, names::NODE_PORTS, matches, Target::Accept);
        }
    }

    /// The chain that all frontends but ClusterIPs lead to.
    fn enter_from_outside(&self, rules: &mut ServiceRules) {
        let (Some(list), true) = (self.external_list(), self.has_endpoints) else { return };
        let straight = |kind| match kind {
            FrontendKind::ClusterIp => true,
            FrontendKind::ExternalIp => self.config.legacy_external_ip && list == BackendList::Cluster,
            _ => false,
        };
        if self.frontends.iter().all(|(_, frontend)| straight(frontend.kind)) {
            return;
        }
        let chain = &self.chains.external;
        let comment = |what: &str, verb: &str| {
            Match::Comment(format!("{verb} {what} for {} external destinations", self.name))
        };
        let mark = Target::Jump(names::MARK_MASQ.into());
        match list {
            BackendList::Cluster => rules.own(chain, vec![comment("traffic", "masquerade")], mark),
            BackendList::Local => {
                let cluster = Target::Jump(self.chains.cluster.clone());
                if let Some(from_pod) = from_pods(&self.config.pods, self.id.family) {
                    let text = format!("pod traffic for {} external destinations", self.name);
                    rules.own(chain, vec![Match::Comment(text), from_pod], cluster.clone());
                }
                let from_node = |verb| vec![comment("LOCAL traffic", verb), Match::SrcLocal];
                rules.own(chain, from_node("masquerade"), mark);
                rules.own(chain, from_node("route"), cluster);
            }
        }
        if self.has_external_endpoints() {
            rules.own(chain, Vec::new(), Target::Jump(self.policy_chain(list).clone()));
        }
    }

    fn check_source_ranges(&self, rules: &mut ServiceRules) {
        if !self.uses_firewall() {
            return;
        }
        let chain = &self.chains.firewall;
        let comment = || Match::Comment(format!("{} loadbalancer IP", self.name));
        let allow = || Target::Jump(self.chains.external.clone());
        for range in self.source_ranges() {
            rules.own(chain, vec![comment(), Match::Src(Net::Range(*range))], allow());
        }
        // A node that dials a load balancer's address it has itself is its own client, from that very address.
        for (addr, frontend) in self.of_kind(FrontendKind::LoadBalancer) {
            if frontend.source_ranges_allow_host {
                rules.own(chain, vec![comment(), Match::Src(Net::Addr(addr.addr))], allow());
            }
        }
        let text = format!("other traffic to {} will be dropped by {}", self.name, names::PROXY_FIREWALL);
        let rest = Rule { matches: vec![Match::Comment(text)], target: None };
        rules.own.entry(chain.clone()).or_default().push(rest);
    }

    /// Affinity first, then each endpoint with its share.
    fn balance(&self, chain: &Arc<str>, backends: &[Backend], rules: &mut ServiceRules) {
        let comment = |backend: &Backend| {
            let text = format!("{} -> {}", self.name, SocketAddr::new(backend.addr, backend.port));
            (!self.large).then_some(Match::Comment(text))
        };
        let endpoint = |backend: &Backend| of_endpoint(self.id, backend.addr, backend.port);
        if let Some(secs) = self.entry.affinity_secs {
            for backend in backends {
                let matches = comment(backend).into_iter();
                let matches = matches.chain([Match::RecentlySeen(endpoint(backend), secs)]).collect();
                rules.own(chain, matches, Target::Jump(endpoint(backend)));
            }
        }
        for (index, backend) in backends.iter().enumerate() {
            let left = backends.len() - index;
            let share = (left > 1).then_some(Match::OneOf(left));
            let matches = comment(backend).into_iter().chain(share).collect();
            rules.own(chain, matches, Target::Jump(endpoint(backend)));
        }
    }

    /// A chain for each endpoint.
    fn translate(&self, rules: &mut ServiceRules) {
        let lists = self.entry.cluster.iter().chain(&self.entry.local);
        let used: BTreeMap<(_, u16), &Backend> =
            lists.map(|backend| ((backend.addr, backend.port), backend)).collect();
        for backend in used.values() {
            let chain = of_endpoint(self.id, backend.addr, backend.port);
            let comment = (!self.large).then(|| Match::Comment(self.name.clone()));
            let mut hairpin: Vec<Match> = comment.clone().into_iter().collect();
            hairpin.push(Match::Src(Net::Addr(backend.addr)));
            rules.own(&chain, hairpin, Target::Jump(names::MARK_MASQ.into()));
            let mut matches: Vec<Match> = comment.into_iter().collect();
            if self.entry.affinity_secs.is_some() {
                matches.push(Match::RememberSource(chain.clone()));
            }
            matches.push(Match::Protocol(self.id.protocol));
            rules.own(&chain, matches, Target::Dnat(SocketAddr::new(backend.addr, backend.port)));
        }
    }
}

/// Chains that stand once, with the rules that come after those of services.
pub fn base(table: &ServiceTable, family: Family, config: &Config) -> BTreeMap<Chain, Vec<Rule>> {
    if config.translation == Translation::Ipvs {
        return ipvs::chains::base(family, config);
    }
    let rule = |matches: Vec<Match>, target| Rule { matches, target: Some(target) };
    let comment = |text: &str| Match::Comment(text.into());
    let mark = config.masquerade_mark;
    let mut chains: BTreeMap<Chain, Vec<Rule>> = BTreeMap::new();
    let mut chain = |table: Table, name: &str, rules: Vec<Rule>| chains.insert((table, name.into()), rules);
    for table in Table::ALL {
        chain(table, names::CANARY, Vec::new());
    }
    chain(Table::Mangle, names::OWNER, Vec::new());
    for name in [names::SERVICES, names::EXTERNAL_SERVICES, names::NODE_PORTS, names::PROXY_FIREWALL] {
        chain(Table::Filter, name, Vec::new());
    }
    let mut forward = Vec::new();
    if config.drop_invalid {
        let counted = config.accounting.then_some(Match::Counted(names::INVALID_DROPPED));
        let matches = [Match::CtState("INVALID")].into_iter().chain(counted).collect();
        forward.push(rule(matches, Target::Drop));
    }
    forward.push(rule(vec![comment("kubernetes forwarding rules"), Match::Mark(mark, mark)], Target::Accept));
    forward.push(rule(
        vec![comment("kubernetes forwarding conntrack rule"), Match::CtState("RELATED,ESTABLISHED")],
        Target::Accept,
    ));
    chain(Table::Filter, names::FORWARD, forward);
    if family == Family::V4 {
        let martian = vec![
            comment("block incoming localnet connections"),
            Match::Dst(loopback()),
            Match::NotSrc(loopback()),
            Match::NotCtState("RELATED,ESTABLISHED,DNAT"),
        ];
        chain(Table::Filter, names::KUBELET_FIREWALL, vec![rule(martian, Target::Drop)]);
    }
    chain(Table::Nat, names::SERVICES, to_node_ports(table, family, config));
    chain(Table::Nat, names::NODE_PORTS, Vec::new());
    chain(Table::Nat, names::MARK_MASQ, vec![rule(Vec::new(), Target::MarkOr(mark))]);
    chain(
        Table::Nat,
        names::POSTROUTING,
        vec![
            rule(vec![Match::NotMark(mark, mark)], Target::Return),
            // Else a packet that is encapsulated and comes by again would be masqueraded twice.
            rule(Vec::new(), Target::MarkXor(mark)),
            rule(
                vec![comment("kubernetes service traffic requiring SNAT")],
                Target::Masquerade { random: config.random_fully },
            ),
        ],
    );
    chains
}

/// The last rules of nat/KUBE-SERVICES: addresses of this node.
fn to_node_ports(table: &ServiceTable, family: Family, config: &Config) -> Vec<Rule> {
    let text = "kubernetes service nodeports; NOTE: this must be the last rule in this chain";
    let rule = |matches: Vec<Match>| Rule {
        matches: [&[Match::Comment(text.into())][..], &matches].concat(),
        target: Some(Target::Jump(names::NODE_PORTS.into())),
    };
    if NodePortAddress::select(&config.node_port_addresses, family) {
        let mut addrs: Vec<_> = table
            .frontends
            .iter()
            .filter(|(addr, frontend)| {
                Family::of(addr.addr) == family
                    && matches!(frontend.kind, FrontendKind::NodePort | FrontendKind::LocalhostNodePort)
            })
            .map(|(addr, _)| addr.addr)
            .collect();
        addrs.dedup();
        return addrs.into_iter().map(|addr| rule(vec![Match::Dst(Net::Addr(addr))])).collect();
    }
    let mut matches = vec![Match::DstLocal];
    match family {
        Family::V6 => matches.push(Match::NotDst(Net::Range("::1/128".parse().expect("a network")))),
        Family::V4 if !config.localhost_node_ports => {
            matches.push(Match::NotDst(loopback()));
        }
        Family::V4 => {}
    }
    vec![rule(matches)]
}

/// IPv4's addresses of a node's own.
fn loopback() -> Net {
    Net::Range("127.0.0.0/8".parse().expect("a network"))
}

/// The sender is a pod; `None` if pods are not told apart.
fn from_pods(pods: &LocalDetector, family: Family) -> Option<Match> {
    match pods {
        LocalDetector::Ranges(_) => Some(Match::Src(Net::Range(pods.range(family)?))),
        LocalDetector::Bridge(name) => Some(Match::From(name.clone())),
        LocalDetector::DevicePrefix(prefix) => Some(Match::From(any_beginning_with(prefix))),
    }
}

/// The sender is none of the pods.
pub(super) fn from_others(pods: &LocalDetector, family: Family) -> Option<Match> {
    match pods {
        LocalDetector::Ranges(_) => Some(Match::NotSrc(Net::Range(pods.range(family)?))),
        LocalDetector::Bridge(name) => Some(Match::NotFrom(name.clone())),
        LocalDetector::DevicePrefix(prefix) => Some(Match::NotFrom(any_beginning_with(prefix))),
    }
}

/// Devices in iptables' words.
fn any_beginning_with(prefix: &str) -> Arc<str> {
    format!("{prefix}+").into()
}

/// Where the kernel's chains call ours: table, calling chain, rule. Each is prepended, so that the last comes first
/// (kube-proxy `iptablesJumpChains`, `iptablesKubeletJumpChains`).
pub fn jumps(family: Family, config: &Config) -> Vec<(Table, &'static str, Rule)> {
    if config.translation == Translation::Ipvs {
        return ipvs::chains::jumps();
    }
    let jump = |table, from: &'static str, to: &str, text: &str, new: bool| {
        let state = new.then_some(Match::CtState("NEW"));
        let matches = state.into_iter().chain([Match::Comment(text.into())]).collect();
        (table, from, Rule { matches, target: Some(Target::Jump(to.into())) })
    };
    let external = "kubernetes externally-visible service portals";
    let portals = "kubernetes service portals";
    let firewall = "kubernetes load balancer firewall";
    let mut jumps = vec![
        jump(Table::Filter, "INPUT", names::EXTERNAL_SERVICES, external, true),
        jump(Table::Filter, "FORWARD", names::EXTERNAL_SERVICES, external, true),
        jump(Table::Filter, "INPUT", names::NODE_PORTS, "kubernetes health check service ports", false),
        jump(Table::Filter, "FORWARD", names::SERVICES, portals, true),
        jump(Table::Filter, "OUTPUT", names::SERVICES, portals, true),
        jump(Table::Filter, "FORWARD", names::FORWARD, "kubernetes forwarding rules", false),
        jump(Table::Filter, "INPUT", names::PROXY_FIREWALL, firewall, true),
        jump(Table::Filter, "OUTPUT", names::PROXY_FIREWALL, firewall, true),
        jump(Table::Filter, "FORWARD", names::PROXY_FIREWALL, firewall, true),
        jump(Table::Nat, "OUTPUT", names::SERVICES, portals, false),
        jump(Table::Nat, "PREROUTING", names::SERVICES, portals, false),
        jump(Table::Nat, "POSTROUTING", names::POSTROUTING, "kubernetes postrouting rules", false),
    ];
    if family == Family::V4 {
        for from in ["INPUT", "OUTPUT"] {
            let target = Some(Target::Jump(names::KUBELET_FIREWALL.into()));
            jumps.push((Table::Filter, from, Rule { matches: Vec::new(), target }));
        }
    }
    jumps
}
