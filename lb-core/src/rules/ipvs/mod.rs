//! A [`ServiceTable`] in IPVS: virtual servers, sets of what netfilter has to know of them, and what makes their
//! addresses local (kube-proxy 1.36 `pkg/proxy/ipvs/proxier.go`).
//!
//! IPVS sees packets that are delivered to this node. kube-proxy therefore binds every VIP to a dummy device; here
//! **an address of any node is never bound**: of such an address only the service's port is made local, by a rule that
//! looks at the destination port, and every other port of it stays where it was.

pub mod chains;
pub mod sets;
#[cfg(test)]
mod tests;
mod transaction;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use self::sets::Set;
pub use self::transaction::{Line, Phase, Transaction};
use super::{
    facts::{Facts, Owners},
    names,
};
use crate::{
    model::{Family, Protocol, TrafficPolicy},
    table::{
        Backend, BackendList, Changes, Frontend, FrontendAddr, FrontendKind, ServicePortId, ServiceTable,
        VipKind,
    },
};

/// The device that VIPs are bound to, kube-proxy's too.
pub const DEVICE: &str = "kube-ipvs0";

/// The routing table of addresses of which only some ports are local.
pub const ROUTES: u32 = 5050;

/// Where the rules that look at ports stand among the kernel's: after the local table, before main.
pub const RULE_PRIORITY: u32 = 50;

/// How IPVS chooses a destination (`ipvsadm(8)`, `--scheduler`); [`Scheduler::explanation`] says what each does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are IPVS's own")]
pub enum Scheduler {
    #[default]
    Rr,
    Wrr,
    Lc,
    Wlc,
    Lblc,
    Lblcr,
    Sh,
    Dh,
    Mh,
    Sed,
    Nq,
}

impl Scheduler {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Rr,
        Self::Wrr,
        Self::Lc,
        Self::Wlc,
        Self::Lblc,
        Self::Lblcr,
        Self::Sh,
        Self::Dh,
        Self::Mh,
        Self::Sed,
        Self::Nq,
    ];

    /// As ipvsadm and the kernel's module names have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rr => "rr",
            Self::Wrr => "wrr",
            Self::Lc => "lc",
            Self::Wlc => "wlc",
            Self::Lblc => "lblc",
            Self::Lblcr => "lblcr",
            Self::Sh => "sh",
            Self::Dh => "dh",
            Self::Mh => "mh",
            Self::Sed => "sed",
            Self::Nq => "nq",
        }
    }

    /// What a destination is chosen by, in a line.
    pub const fn explanation(self) -> &'static str {
        match self {
            Self::Rr => "Round robin",
            Self::Wrr => "Round robin by weight",
            Self::Lc => "Fewest connections",
            Self::Wlc => "Fewest connections by weight",
            Self::Lblc => "Always the same for a dialled address, unless that has too many connections",
            Self::Lblcr => "One of a few that a dialled address has",
            Self::Sh => "By a hash of the source",
            Self::Dh => "By a hash of the destination",
            Self::Mh => "Maglev, by a hash of source address and port",
            Self::Sed => "Shortest expected delay",
            Self::Nq => "An idle destination, else the shortest expected delay",
        }
    }
}

/// One virtual server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Server {
    /// Scheduler and persistence, as ipvsadm takes and prints them.
    pub options: String,
    /// Destinations and their weights; one of weight 0 gets no new connections.
    pub destinations: BTreeMap<SocketAddr, u32>,
}

/// Something that makes a VIP local to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Link {
    /// The address is bound to the dummy device: it belongs to no node.
    Bind(IpAddr),
    /// Packets to this address that the rules below send here are delivered locally.
    Route(IpAddr),
    /// Packets to this port of a node's address go to [`Link::Route`]; all others don't.
    Rule(FrontendAddr),
}

/// An element of a set.
pub type Element = (Set, String);

/// What is in the kernel, or should be, of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Virtual servers.
    pub servers: BTreeMap<FrontendAddr, Server>,
    /// Elements of sets.
    pub elements: BTreeSet<Element>,
    /// Addresses and ports that are local.
    pub links: BTreeSet<Link>,
}

impl State {
    /// The destinations that `actual` lacks, if that is all that it differs in.
    pub fn missing_destinations(mut self, actual: &Self) -> Option<BTreeSet<(FrontendAddr, SocketAddr)>> {
        let mut missing = BTreeSet::new();
        for (addr, server) in &mut self.servers {
            let there = &actual.servers.get(addr)?.destinations;
            let lacks = server.destinations.extract_if(.., |destination, _| !there.contains_key(destination));
            missing.extend(lacks.map(|(destination, _)| (*addr, destination)));
        }
        (self == *actual).then_some(missing)
    }
}

/// What one service port asks for.
type PortState = State;

/// What has been asked for in one family.
#[derive(Debug)]
pub struct Servers {
    family: Family,
    scheduler: Scheduler,
    ports: BTreeMap<ServicePortId, PortState>,
    owners: Owners,
    /// How many service ports ask for an element or a link.
    elements: BTreeMap<Element, usize>,
    links: BTreeMap<Link, usize>,
    /// Destinations that are gone but may have connections: their weight is 0.
    draining: BTreeSet<(FrontendAddr, SocketAddr)>,
}

impl Servers {
    /// Nothing asked for yet.
    pub fn new(family: Family, scheduler: Scheduler) -> Self {
        Self {
            family,
            scheduler,
            ports: BTreeMap::new(),
            owners: Owners::default(),
            elements: BTreeMap::new(),
            links: BTreeMap::new(),
            draining: BTreeSet::new(),
        }
    }

    /// Of which family.
    pub fn family(&self) -> Family {
        self.family
    }

    /// What is to be in the kernel now; destinations that drain are in it.
    pub fn state(&self) -> State {
        let mut state = State {
            servers: BTreeMap::new(),
            elements: self.elements.keys().cloned().collect(),
            links: self.links.keys().copied().collect(),
        };
        state.servers.extend(self.ports.values().flat_map(|port| port.servers.clone()));
        for (server, destination) in &self.draining {
            if let Some(server) = state.servers.get_mut(server) {
                server.destinations.insert(*destination, 0);
            }
        }
        state
    }

    /// Everything for a table, as one transaction from nothing.
    pub fn all(table: &ServiceTable, family: Family, scheduler: Scheduler) -> Transaction {
        Self::new(family, scheduler).replace(table, &State::default())
    }

    /// Everything for a table, in place of what is there.
    pub fn replace(&mut self, table: &ServiceTable, actual: &State) -> Transaction {
        *self = Self::new(self.family, self.scheduler);
        self.learn(table, &Changes::all(table));
        let desired = self.state();
        self.carry(actual, &desired)
    }

    /// What has to be written so that the kernel's state is that of `table`; `changes` names the keys that may differ
    /// from the last call's.
    pub fn update(&mut self, table: &ServiceTable, changes: &Changes) -> Transaction {
        let (before, after) = self.learn(table, changes);
        self.carry(&before, &after)
    }

    /// Deletes destinations that are gone and have no connections left.
    pub fn sweep(&mut self, idle: impl Fn(&FrontendAddr, &SocketAddr) -> bool) -> Transaction {
        let mut transaction = Transaction::new(self.family);
        self.draining.retain(|(server, destination)| {
            let idle = idle(server, destination);
            if idle {
                transaction.delete_destination(server, destination);
            }
            !idle
        });
        transaction
    }

    /// Destinations that wait for their last connection to end.
    pub fn draining(&self) -> usize {
        self.draining.len()
    }

    /// Takes the table in; returns what the touched service ports had in the kernel and what they are to have, without
    /// what others hold all the while.
    fn learn(&mut self, table: &ServiceTable, changes: &Changes) -> (State, State) {
        let mut touched = self.owners.learn(table, changes, self.family);
        for addr in changes.vips.iter().filter(|addr| Family::of(**addr) == self.family) {
            touched.extend(self.owners.of_address(*addr).cloned());
        }
        let (mut before, mut after) = (State::default(), State::default());
        for id in &touched {
            let had = self.ports.remove(id).unwrap_or_default();
            had.elements.iter().for_each(|element| release(&mut self.elements, element));
            had.links.iter().for_each(|link| release(&mut self.links, link));
            before.add(had);
        }
        for id in &touched {
            let wanted = self.wanted(table, id);
            if table.services.contains_key(id) {
                self.ports.insert(id.clone(), wanted.clone());
            }
            after.add(wanted);
        }
        for state in [&mut before, &mut after] {
            state.elements.retain(|element| !self.elements.contains_key(element));
            state.links.retain(|link| !self.links.contains_key(link));
        }
        for id in &touched {
            let Some(port) = self.ports.get(id) else { continue };
            port.elements.iter().for_each(|e| *self.elements.entry(e.clone()).or_default() += 1);
            port.links.iter().for_each(|link| *self.links.entry(*link).or_default() += 1);
        }
        for (server, destination) in &self.draining {
            if let Some(server) = before.servers.get_mut(server) {
                server.destinations.insert(*destination, 0);
            }
        }
        (before, after)
    }

    /// The way from one state to another; destinations on the way out are remembered.
    fn carry(&mut self, before: &State, after: &State) -> Transaction {
        self.draining.retain(|(server, _)| !before.servers.contains_key(server));
        let transaction = Transaction::between(self.family, before, after);
        self.draining.extend(transaction.draining.iter().copied());
        transaction
    }

    fn wanted(&self, table: &ServiceTable, id: &ServicePortId) -> PortState {
        let frontends = self.owners.frontends(table, id);
        match table.services.get(id) {
            Some(entry) if !frontends.is_empty() => {
                let port = Port { facts: Facts::new(id, entry, &frontends), table };
                port.state(self.scheduler)
            }
            _ => PortState::default(),
        }
    }
}

fn release<T: Ord>(uses: &mut BTreeMap<T, usize>, thing: &T) {
    if let Some(count) = uses.get_mut(thing) {
        *count -= 1;
        if *count == 0 {
            uses.remove(thing);
        }
    }
}

impl State {
    /// This state without what no connection needs any more; what is left takes no new ones. Elements stay: they say
    /// that the rest is ours.
    pub fn drained(&self, in_use: impl Fn(&FrontendAddr) -> bool) -> Self {
        let mut servers = self.servers.clone();
        servers.retain(|addr, _| in_use(addr));
        for server in servers.values_mut() {
            server.destinations.values_mut().for_each(|weight| *weight = 0);
        }
        let needs = |addr: IpAddr| servers.keys().any(|server| server.addr == addr);
        let links = self.links.iter().filter(|link| match link {
            Link::Bind(addr) | Link::Route(addr) => needs(*addr),
            Link::Rule(addr) => servers.contains_key(addr),
        });
        Self { links: links.copied().collect(), elements: self.elements.clone(), servers }
    }

    fn add(&mut self, other: Self) {
        self.servers.extend(other.servers);
        self.elements.extend(other.elements);
        self.links.extend(other.links);
    }
}

/// One service port on its way into IPVS.
struct Port<'a> {
    facts: Facts<'a>,
    table: &'a ServiceTable,
}

impl Port<'_> {
    fn state(&self, scheduler: Scheduler) -> PortState {
        let mut state = PortState::default();
        for (addr, frontend) in self.facts.frontends {
            // kube-proxy's IPVS mode answers no NodePorts on loopback.
            if frontend.kind == FrontendKind::LocalhostNodePort {
                continue;
            }
            state.servers.insert(*addr, self.server(frontend, scheduler));
            self.name(addr, frontend, &mut state.elements);
            self.make_local(addr, frontend, &mut state);
        }
        let lists = self.facts.entry.cluster.iter().chain(&self.facts.entry.local);
        for backend in lists.filter(|backend| backend.local) {
            let addr = backend.addr;
            let element = format!("{addr},{}:{},{addr}", self.protocol(), backend.port);
            state.elements.insert((Set::LoopBack, element));
        }
        if self.facts.entry.health_check_node_port != 0 {
            let port = self.facts.entry.health_check_node_port.to_string();
            state.elements.insert((Set::HealthCheckNodePort, port));
        }
        state
    }

    fn protocol(&self) -> &'static str {
        names::protocol(self.facts.id.protocol)
    }

    fn server(&self, frontend: &Frontend, scheduler: Scheduler) -> Server {
        let mut options = format!("-s {}", scheduler.name());
        if let Some(secs) = self.facts.entry.affinity_secs {
            options += &format!(" -p {secs}");
        }
        if scheduler == Scheduler::Mh {
            // Else all connections of a client would go to one destination.
            options += " -b mh-port";
        }
        let backends = self.backends(frontend);
        let destinations = backends.iter().map(|b| (SocketAddr::new(b.addr, b.port), 1)).collect();
        Server { options, destinations }
    }

    /// A virtual server has one list for all its clients. Policy Local without an endpoint here takes those of the
    /// cluster, for the sake of this node's own clients (kube-proxy `syncEndpoint`).
    fn backends(&self, frontend: &Frontend) -> &[Backend] {
        let scope =
            if frontend.kind == FrontendKind::ClusterIp { frontend.internal } else { frontend.external };
        match self.facts.backends(scope.list) {
            [] => self.facts.backends(BackendList::Cluster),
            backends => backends,
        }
    }

    /// Tells netfilter of a frontend.
    fn name(&self, addr: &FrontendAddr, frontend: &Frontend, elements: &mut BTreeSet<Element>) {
        let dialled = format!("{},{}:{}", addr.addr, self.protocol(), addr.port);
        let policy = match frontend.external.list {
            BackendList::Cluster => TrafficPolicy::Cluster,
            BackendList::Local => TrafficPolicy::Local,
        };
        let is_local = policy == TrafficPolicy::Local;
        match frontend.kind {
            FrontendKind::ClusterIp => {
                elements.insert((Set::ClusterIp, dialled));
            }
            FrontendKind::ExternalIp => {
                let set = if is_local { Set::ExternalIpLocal } else { Set::ExternalIp };
                elements.insert((set, dialled));
            }
            FrontendKind::LoadBalancer => {
                if is_local {
                    elements.insert((Set::LoadBalancerLocal, dialled.clone()));
                }
                if !frontend.source_ranges.is_empty() {
                    elements.insert((Set::LoadBalancerFirewall, dialled.clone()));
                }
                for range in &*frontend.source_ranges {
                    // ipset prints a range of one address as that address.
                    let is_host = range.prefix_len() == range.max_prefix_len();
                    let range = if is_host { range.addr().to_string() } else { range.trunc().to_string() };
                    elements.insert((Set::LoadBalancerSourceCidr, format!("{dialled},{range}")));
                }
                if frontend.source_ranges_allow_host {
                    // A node that dials an address it has itself is its own client, from that very address.
                    elements.insert((Set::LoadBalancerSourceIp, format!("{dialled},{}", addr.addr)));
                }
                elements.insert((Set::LoadBalancer, dialled));
            }
            FrontendKind::NodePort => {
                let (all, local) = match addr.protocol {
                    Protocol::Tcp => (Set::NodePortTcp, Set::NodePortLocalTcp),
                    Protocol::Udp => (Set::NodePortUdp, Set::NodePortLocalUdp),
                    Protocol::Sctp => (Set::NodePortSctp, Set::NodePortLocalSctp),
                };
                let element = match addr.protocol {
                    Protocol::Sctp => dialled,
                    Protocol::Tcp | Protocol::Udp => addr.port.to_string(),
                };
                if is_local {
                    elements.insert((local, element.clone()));
                }
                elements.insert((all, element));
            }
            FrontendKind::LocalhostNodePort => {}
        }
    }

    /// Binds an address that no node has; of a node's address, only this port is made local.
    fn make_local(&self, addr: &FrontendAddr, frontend: &Frontend, state: &mut PortState) {
        if frontend.kind == FrontendKind::NodePort {
            return;
        }
        match self.table.vips.get(&addr.addr) {
            // Local as it is.
            Some(VipKind::OwnAddress) => {}
            Some(VipKind::NodeAddress) => {
                state.links.extend([Link::Route(addr.addr), Link::Rule(*addr)]);
            }
            Some(VipKind::Vip) | None => {
                state.links.insert(Link::Bind(addr.addr));
                state.elements.insert((Set::Bound, addr.addr.to_string()));
            }
        }
    }
}
