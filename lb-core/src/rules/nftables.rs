//! A [`ServiceTable`] in nftables: kube-proxy 1.36's table `kube-proxy` in each family
//! (`pkg/proxy/nftables/proxier.go`), brought up to date by what changed and nothing else.
//!
//! Frontends are elements of verdict maps, so a packet costs a lookup and a change costs its own chains and elements,
//! however many services there are. Hairpins are marked at the endpoint's chain.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    hash::{DefaultHasher, Hash, Hasher},
    net::SocketAddr,
};

use ipnet::IpNet;

use super::{
    facts::{Facts, Owners},
    iptables::Config,
    names,
};
use crate::{
    model::{Family, LocalDetector},
    table::{Backend, BackendList, Changes, FrontendKind, ServicePortId, ServiceTable},
};

/// The table's name, kube-proxy's too: whoever writes it last owns it all.
pub const TABLE: &str = "kube-proxy";

/// Empty; kube-proxy doesn't make it: the table is ours.
pub const OWNER: &str = "lb-agent-owner";

/// An element of a set or map: container, key.
type ElementKey = (&'static str, String);

/// One service port in nftables.
#[derive(Debug, Default, PartialEq, Eq)]
struct PortRules {
    chains: BTreeMap<String, Vec<String>>,
    /// Sets of recent sources.
    sets: BTreeSet<String>,
    /// Verdict, or nothing in sets, by element.
    elements: BTreeMap<ElementKey, String>,
}

/// What has been written of one service port.
#[derive(Debug, Default)]
struct Written {
    /// Digests of chains.
    chains: BTreeMap<String, u64>,
    sets: BTreeSet<String>,
    elements: BTreeMap<ElementKey, String>,
}

/// What has been written of one family.
#[derive(Debug)]
pub struct Rules {
    family: Family,
    config: Config,
    ports: BTreeMap<ServicePortId, Written>,
    owners: Owners,
    /// How many service ports have an element.
    uses: BTreeMap<ElementKey, usize>,
    started: bool,
    /// Ranges of ClusterIPs as written.
    service_cidrs: Vec<IpNet>,
    /// Emptied chains and sets that are to go with a later transaction: kernels before 6.2 don't see within one that
    /// the last element that led to them is gone (kube-proxy `staleChains`).
    stale: BTreeSet<(&'static str, String)>,
}

/// Changes that the kernel takes over all at once. Prints as input of `nft -f`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    family: Option<Family>,
    /// Lines in the order in which nft has to see them, by phase.
    phases: BTreeMap<Phase, Vec<String>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Base,
    Stale,
    Declare,
    Flush,
    Rules,
    DeleteElements,
    AddElements,
}

impl Rules {
    /// Nothing written yet.
    pub fn new(family: Family, config: Config) -> Self {
        Self {
            family,
            config,
            ports: BTreeMap::new(),
            owners: Owners::default(),
            uses: BTreeMap::new(),
            started: false,
            service_cidrs: Vec::new(),
            stale: BTreeSet::new(),
        }
    }

    /// Everything for a table, from nothing.
    pub fn all(table: &ServiceTable, family: Family, config: &Config) -> Transaction {
        Self::new(family, config.clone()).update(table, &Changes::all(table))
    }

    /// What has to be written so that the rules are those of `table`; `changes` names the keys that may differ from
    /// the last call's. The first call replaces whatever the table holds.
    pub fn update(&mut self, table: &ServiceTable, changes: &Changes) -> Transaction {
        let mut transaction = Transaction { family: Some(self.family), phases: BTreeMap::new() };
        let of_family = |range: &&IpNet| Family::of(range.addr()) == self.family;
        let service_cidrs: Vec<IpNet> = table.service_cidrs.iter().filter(of_family).copied().collect();
        if !self.started {
            self.started = true;
            let base = base(self.family, &self.config, &service_cidrs);
            base.into_iter().for_each(|line| transaction.push(Phase::Base, line));
        } else if self.service_cidrs != service_cidrs {
            transaction.push(Phase::Flush, format!("flush chain {CLUSTER_IPS_CHECK}"));
            for rule in cluster_ips_check(self.family, &service_cidrs) {
                transaction.push(Phase::Rules, format!("add rule {CLUSTER_IPS_CHECK} {rule}"));
            }
        }
        self.service_cidrs = service_cidrs;
        for (kind, name) in std::mem::take(&mut self.stale) {
            transaction.push(Phase::Stale, format!("delete {kind} {name}"));
        }
        let touched = self.owners.learn(table, changes, self.family);
        // Elements first leave, then arrive: two service ports may swap a frontend in one change.
        let mut arriving = Vec::new();
        for id in touched {
            self.rewrite(table, &id, &mut arriving, &mut transaction);
        }
        for (key, verdict) in arriving {
            let uses = self.uses.entry(key.clone()).or_default();
            *uses += 1;
            if *uses == 1 {
                transaction.push(Phase::AddElements, element("add", &key, &verdict));
            }
        }
        transaction
    }

    /// Removes what [`Rules::update`] left for later; to be called once in a while.
    pub fn sweep(&mut self) -> Transaction {
        let mut transaction = Transaction { family: Some(self.family), phases: BTreeMap::new() };
        for (kind, name) in std::mem::take(&mut self.stale) {
            transaction.push(Phase::Stale, format!("delete {kind} {name}"));
        }
        transaction
    }

    fn rewrite(
        &mut self,
        table: &ServiceTable,
        id: &ServicePortId,
        arriving: &mut Vec<(ElementKey, String)>,
        transaction: &mut Transaction,
    ) {
        let before = self.ports.remove(id).unwrap_or_default();
        let rules = self.rules_of(table, id);
        let mut written = Written::default();
        for name in rules.sets.difference(&before.sets) {
            self.stale.remove(&("set", name.clone()));
            let of = address_type(self.family);
            transaction
                .push(Phase::Declare, format!("add set {name} {{ type {of} ; flags dynamic,timeout ; }}"));
        }
        for (name, lines) in &rules.chains {
            let digest = digest(lines);
            if before.chains.get(name) != Some(&digest) {
                let was_stale = self.stale.remove(&("chain", name.clone()));
                transaction.push(Phase::Declare, format!("add chain {name}"));
                if before.chains.contains_key(name) || was_stale {
                    transaction.push(Phase::Flush, format!("flush chain {name}"));
                }
                for line in lines {
                    transaction.push(Phase::Rules, format!("add rule {name} {line}"));
                }
            }
            written.chains.insert(name.clone(), digest);
        }
        for (key, verdict) in &before.elements {
            if rules.elements.get(key) != Some(verdict) {
                let uses = self.uses.entry(key.clone()).or_default();
                *uses = uses.saturating_sub(1);
                if *uses == 0 {
                    self.uses.remove(key);
                    transaction.push(Phase::DeleteElements, element("delete", key, ""));
                }
            }
        }
        for (key, verdict) in &rules.elements {
            if before.elements.get(key) != Some(verdict) {
                arriving.push((key.clone(), verdict.clone()));
            }
        }
        for name in before.chains.keys().filter(|name| !rules.chains.contains_key(*name)) {
            transaction.push(Phase::Flush, format!("flush chain {name}"));
            self.stale.insert(("chain", name.clone()));
        }
        for name in before.sets.difference(&rules.sets) {
            self.stale.insert(("set", name.clone()));
        }
        (written.sets, written.elements) = (rules.sets, rules.elements);
        if table.services.contains_key(id) {
            self.ports.insert(id.clone(), written);
        }
    }

    fn rules_of(&self, table: &ServiceTable, id: &ServicePortId) -> PortRules {
        let frontends = self.owners.frontends(table, id);
        match table.services.get(id) {
            Some(entry) if !frontends.is_empty() => {
                of_service(&Facts::new(id, entry, &frontends), &self.config)
            }
            _ => PortRules::default(),
        }
    }
}

fn digest(lines: &[String]) -> u64 {
    let mut hasher = DefaultHasher::new();
    lines.hash(&mut hasher);
    hasher.finish()
}

fn element(verb: &str, (container, key): &ElementKey, verdict: &str) -> String {
    let verdict = if verdict.is_empty() { String::new() } else { format!(" : {verdict}") };
    format!("{verb} element {container} {{ {key}{verdict} }}")
}

/// `ip` or `ip6`, as in expressions and in the table's family.
fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn address_type(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4_addr",
        Family::V6 => "ipv6_addr",
    }
}

/// Packets that are still addressed to a ClusterIP when they are to leave.
const CLUSTER_IPS_CHECK: &str = "cluster-ips-check";

/// Its rules: another port of a ClusterIP, and addresses that are nobody's.
fn cluster_ips_check(family: Family, service_cidrs: &[IpNet]) -> Vec<String> {
    let ip = ip(family);
    let mut rules = vec![format!(
        "{ip} daddr @cluster-ips reject comment \"Reject traffic to invalid ports of ClusterIPs\""
    )];
    if !service_cidrs.is_empty() {
        let ranges: Vec<String> = apart(service_cidrs.to_vec()).iter().map(ToString::to_string).collect();
        rules.push(format!(
            "{ip} daddr {{ {} }} drop comment \"Drop traffic to unallocated ClusterIPs\"",
            ranges.join(", ")
        ));
    }
    rules
}

/// The table with everything that doesn't depend on services.
fn base(family: Family, config: &Config, service_cidrs: &[IpNet]) -> Vec<String> {
    let (ip, of, mark) = (ip(family), address_type(family), config.masquerade_mark);
    let mut lines = Vec::new();
    let mut set = |kind: &str, name: &str, of: &str, comment: &str| {
        lines.push(format!("add {kind} {name} {{ type {of} ; comment \"{comment}\" ; }}"));
    };
    let frontend = format!("{of} . inet_proto . inet_service : verdict");
    let node_port = "inet_proto . inet_service : verdict";
    set("set", "cluster-ips", of, "Active ClusterIPs");
    set("set", "nodeport-ips", of, "IPs that accept NodePort traffic");
    set("map", "service-ips", &frontend, "ClusterIP, ExternalIP and LoadBalancer IP traffic");
    set("map", "service-nodeports", node_port, "NodePort traffic");
    set(
        "map",
        "no-endpoint-services",
        &frontend,
        "vmap to drop or reject packets to services with no endpoints",
    );
    set(
        "map",
        "no-endpoint-nodeports",
        node_port,
        "vmap to drop or reject packets to service nodeports with no endpoints",
    );
    set("map", "firewall-ips", &frontend, "destinations that are subject to LoadBalancerSourceRanges");
    for (chain, hook) in [
        ("filter-prerouting-pre-dnat", "type filter hook prerouting priority -110"),
        ("filter-output-pre-dnat", "type filter hook output priority -110"),
        ("filter-input", "type filter hook input priority 0"),
        ("filter-forward", "type filter hook forward priority 0"),
        ("filter-output", "type filter hook output priority 0"),
        ("nat-prerouting", "type nat hook prerouting priority -100"),
        ("nat-output", "type nat hook output priority -100"),
        ("nat-postrouting", "type nat hook postrouting priority 100"),
    ] {
        lines.push(format!("add chain {chain} {{ {hook} ; }}"));
    }
    lines.push(format!("add chain {OWNER}"));
    let mut rules = vec![
        ("mark-for-masquerade", format!("mark set mark or {mark:#x}")),
        ("masquerading", format!("mark and {mark:#x} == 0 return")),
        ("masquerading", format!("mark set mark xor {mark:#x}")),
        ("masquerading", "masquerade fully-random".into()),
        ("reject-chain", "reject".into()),
        ("services", format!("{ip} daddr . meta l4proto . th dport vmap @service-ips")),
        ("services", format!("{ip} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports")),
        ("firewall-check", format!("{ip} daddr . meta l4proto . th dport vmap @firewall-ips")),
        (
            "service-endpoints-check",
            format!("{ip} daddr . meta l4proto . th dport vmap @no-endpoint-services"),
        ),
        (
            "nodeport-endpoints-check",
            format!("{ip} daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports"),
        ),
    ];
    let checks = cluster_ips_check(family, service_cidrs);
    rules.extend(checks.into_iter().map(|rule| (CLUSTER_IPS_CHECK, rule)));
    rules.extend([
        ("filter-prerouting-pre-dnat", "ct state new jump firewall-check".into()),
        ("filter-output-pre-dnat", "ct state new jump firewall-check".into()),
        ("filter-input", "ct state new jump nodeport-endpoints-check".into()),
        ("filter-input", "ct state new jump service-endpoints-check".into()),
        ("filter-forward", "ct state new jump service-endpoints-check".into()),
        ("filter-forward", "ct state new jump cluster-ips-check".into()),
        ("filter-output", "ct state new jump service-endpoints-check".into()),
        ("filter-output", "ct state new jump cluster-ips-check".into()),
        ("nat-prerouting", "jump services".into()),
        ("nat-output", "jump services".into()),
        ("nat-postrouting", "jump masquerading".into()),
    ]);
    let named: BTreeSet<&str> = rules.iter().map(|(chain, _)| *chain).collect();
    let hooked = lines.clone();
    for chain in named {
        if !hooked.iter().any(|line| line.starts_with(&format!("add chain {chain} {{"))) {
            lines.push(format!("add chain {chain}"));
        }
    }
    lines.extend(rules.iter().map(|(chain, rule)| format!("add rule {chain} {rule}")));
    lines
}

/// The chains, sets and elements of one service port.
fn of_service(port: &Facts<'_>, config: &Config) -> PortRules {
    let mut rules = PortRules::default();
    let ip = ip(port.id.family);
    let name = names::nft_service(port.id);
    let protocol = names::protocol(port.id.protocol);
    let chain_of = |list| match list {
        BackendList::Cluster => format!("service-{name}"),
        BackendList::Local => format!("local-{name}"),
    };
    let (external, firewall) = (format!("external-{name}"), format!("firewall-{name}"));
    let refusal = if port.has_endpoints { "drop" } else { "goto reject-chain" };
    let refused = comment(&port.name);
    let senders = |is| senders(&config.pods, port.id.family, is);

    for (addr, frontend) in port.frontends {
        let key = match frontend.kind {
            FrontendKind::NodePort => format!("{protocol} . {}", addr.port),
            // kube-proxy's nftables mode answers no NodePorts on loopback.
            FrontendKind::LocalhostNodePort => continue,
            _ => format!("{} . {protocol} . {}", addr.addr, addr.port),
        };
        let (served, unserved) = match frontend.kind {
            FrontendKind::NodePort => ("service-nodeports", "no-endpoint-nodeports"),
            _ => ("service-ips", "no-endpoint-services"),
        };
        match frontend.kind {
            FrontendKind::ClusterIp => {
                rules.elements.insert(("cluster-ips", addr.addr.to_string()), String::new());
                let list = frontend.internal.list;
                if port.backends(list).is_empty() {
                    rules.elements.insert((unserved, format!("{key} {refused}")), refusal.into());
                    continue;
                }
                let chain = chain_of(list);
                rules.elements.insert((served, key), format!("goto {chain}"));
                let mark = match config.masquerade_all {
                    true => Some(String::new()),
                    false => senders("!= ").map(|others| format!("{others} ")),
                };
                if let Some(condition) = mark {
                    let line = format!("{ip} daddr {} {condition}jump mark-for-masquerade", addr.addr);
                    rules.chains.entry(chain).or_default().push(line);
                }
                continue;
            }
            FrontendKind::NodePort => {
                rules.elements.insert(("nodeport-ips", addr.addr.to_string()), String::new());
            }
            _ => {}
        }
        if port.has_endpoints {
            rules.elements.insert((served, key.clone()), format!("goto {external}"));
        }
        if frontend.kind == FrontendKind::LoadBalancer && port.uses_firewall() {
            let commented = format!("{key} {refused}");
            rules.elements.insert(("firewall-ips", commented), format!("goto {firewall}"));
        }
        if !port.has_external_endpoints() {
            rules.elements.insert((unserved, format!("{key} {refused}")), refusal.into());
        }
    }
    if let (Some(list), true) = (port.external_list(), port.has_endpoints) {
        let lines = rules.chains.entry(external).or_default();
        match list {
            BackendList::Cluster => lines.push("jump mark-for-masquerade".into()),
            BackendList::Local => {
                let cluster = chain_of(BackendList::Cluster);
                // Without endpoints that policy Cluster may use there is no chain to go to.
                let short = |condition: &str, comment: &str| {
                    (!port.entry.cluster.is_empty()).then(|| {
                        format!("{condition} goto {cluster} comment \"short-circuit {comment} traffic\"")
                    })
                };
                lines.extend(senders("").and_then(|pods| short(&pods, "pod")));
                lines.push(
                    "fib saddr type local jump mark-for-masquerade comment \"masquerade local traffic\""
                        .into(),
                );
                lines.extend(short("fib saddr type local", "local"));
            }
        }
        if port.has_external_endpoints() {
            lines.push(format!("goto {}", chain_of(list)));
        }
    }
    if port.uses_firewall() {
        let mut allowed = port.source_ranges().to_vec();
        let own = port.of_kind(FrontendKind::LoadBalancer).filter(|(_, vip)| vip.source_ranges_allow_host);
        allowed.extend(own.map(|(addr, _)| IpNet::from(addr.addr)));
        let allowed: Vec<String> = apart(allowed).iter().map(ToString::to_string).collect();
        let line = format!("{ip} saddr != {{ {} }} drop", allowed.join(", "));
        rules.chains.insert(firewall, vec![line]);
    }
    for (list, backends) in
        [(BackendList::Cluster, &port.entry.cluster), (BackendList::Local, &port.entry.local)]
    {
        if !backends.is_empty() {
            balance(port, &chain_of(list), backends, &mut rules);
        }
    }
    rules
}

/// The condition that the sender is a pod, or with `is` as `!= ` that it is none; `None` if pods are not told apart.
fn senders(pods: &LocalDetector, family: Family, is: &str) -> Option<String> {
    Some(match pods {
        LocalDetector::Ranges(_) => format!("{} saddr {is}{}", ip(family), pods.range(family)?),
        LocalDetector::Bridge(name) => format!("iifname {is}\"{name}\""),
        LocalDetector::DevicePrefix(prefix) => format!("iifname {is}\"{prefix}*\""),
    })
}

/// The same addresses in ranges that don't overlap: nft refuses others in one set.
fn apart(ranges: Vec<IpNet>) -> Vec<IpNet> {
    let overlaps = |(index, range): (usize, &IpNet)| {
        ranges[..index].iter().any(|other| other.contains(range) || range.contains(other))
    };
    match ranges.iter().enumerate().any(overlaps) {
        true => IpNet::aggregate(&ranges),
        false => ranges,
    }
}

/// For readers; nft takes 128 bytes, with the closing zero.
fn comment(text: &str) -> String {
    // Names of Services and ports are ASCII (RFC 1123): any cut is between characters.
    format!("comment \"{}\"", text.get(..127).unwrap_or(text))
}

/// Affinity first, then a random endpoint; and the chains of the endpoints.
fn balance(port: &Facts<'_>, chain: &str, backends: &[Backend], rules: &mut PortRules) {
    let ip = ip(port.id.family);
    let names: Vec<String> =
        backends.iter().map(|backend| names::nft_endpoint(port.id, backend.addr, backend.port)).collect();
    let lines = rules.chains.entry(chain.to_owned()).or_default();
    if port.entry.affinity_secs.is_some() {
        lines.extend(names.iter().map(|name| format!("{ip} saddr @affinity-{name} goto endpoint-{name}")));
    }
    let mut choice = format!("numgen random mod {} vmap {{ ", backends.len());
    for (index, name) in names.iter().enumerate() {
        let comma = if index == 0 { "" } else { " , " };
        let _ = write!(choice, "{comma}{index} : goto endpoint-{name}");
    }
    lines.push(choice + " }");
    for (backend, name) in backends.iter().zip(names) {
        let to = SocketAddr::new(backend.addr, backend.port);
        let mut lines = vec![format!("{ip} saddr {} jump mark-for-masquerade", backend.addr)];
        if let Some(seconds) = port.entry.affinity_secs {
            rules.sets.insert(format!("affinity-{name}"));
            // The time is the element's, not the set's, which could not change it while it is in use.
            lines.push(format!("update @affinity-{name} {{ {ip} saddr timeout {seconds}s }}"));
        }
        lines.push(format!("meta l4proto {} dnat to {to}", names::protocol(port.id.protocol)));
        rules.chains.insert(format!("endpoint-{name}"), lines);
    }
}

impl Transaction {
    fn push(&mut self, phase: Phase, line: String) {
        self.phases.entry(phase).or_default().push(line);
    }

    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.phases.is_empty()
    }

    fn count(&self, verb: &str) -> usize {
        self.phases.values().flatten().filter(|line| line.starts_with(verb)).count()
    }

    /// Rules and elements written.
    pub fn upserts(&self) -> usize {
        self.count("add rule") + self.count("add element")
    }

    /// Chains, sets and elements removed.
    pub fn deletes(&self) -> usize {
        self.count("delete")
    }
}

impl fmt::Display for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(family) = self.family.map(ip) else { return Ok(()) };
        for (phase, lines) in &self.phases {
            if *phase == Phase::Base {
                // Made if it isn't there, so that it can be removed; then made anew.
                writeln!(f, "add table {family} {TABLE}\ndelete table {family} {TABLE}")?;
                writeln!(f, "add table {family} {TABLE} {{ comment \"rules for kube-proxy\" ; }}")?;
            }
            for line in lines {
                // Verb, object, then the rest: the table goes between.
                let mut words = line.splitn(3, ' ');
                let (verb, object) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
                writeln!(f, "{verb} {object} {family} {TABLE} {}", words.next().unwrap_or_default())?;
            }
        }
        Ok(())
    }
}
