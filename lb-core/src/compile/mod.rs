//! Cluster → [`ServiceTable`]. Total and deterministic; work per change is proportional to the Services it touches.

mod endpoints;
mod frontends;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use self::frontends::{Resolved, resolve, warning};
use crate::{
    model::{Event, Family, Node, NodePortAddress, ObjectName, Warning},
    snapshot::{ClusterSnapshot, Dirty},
    table::{Changes, FrontendAddr, ServiceTable, VipKind},
};

/// What this node is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Its name, as in endpoints' `nodeName`.
    pub name: Arc<str>,
    /// Its zone; taken from its Node object when that is known.
    pub zone: Option<Arc<str>>,
    /// Its live addresses, without loopback and link-local ones.
    pub addresses: Vec<IpAddr>,
    /// The main one of each family; taken from its Node object when that is known.
    pub primary: Vec<IpAddr>,
}

/// Choices of the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompileConfig {
    /// Node addresses that answer NodePorts; empty is all.
    pub node_port_addresses: Vec<NodePortAddress>,
    /// The node's primary address of its family, whatever its Node object says (kube-proxy `bindAddress`).
    pub node_ip: Option<IpAddr>,
    /// Answer NodePorts on 127.0.0.1 too, for the host's own processes.
    pub localhost_node_ports: bool,
    /// Masquerade all traffic to services.
    pub masquerade_all: bool,
    /// The datapath can carry SCTP; else its service ports are left out, with a warning.
    pub sctp: bool,
}

impl Default for CompileConfig {
    fn default() -> Self {
        Self {
            node_port_addresses: Vec::new(),
            node_ip: None,
            localhost_node_ports: true,
            masquerade_all: false,
            sctp: false,
        }
    }
}

/// A table and what a person should know about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// What this node serves.
    pub table: ServiceTable,
    /// What it doesn't, and why.
    pub warnings: Vec<Warning>,
}

/// Resolves everything at once.
pub fn compile(cluster: &ClusterSnapshot, node: &NodeView, config: &CompileConfig) -> Compiled {
    let mut compiler = Compiler::new(config.clone(), node.clone());
    compiler.snapshot = cluster.clone();
    compiler.dirty = Dirty::All;
    compiler.compile();
    Compiled { warnings: compiler.warnings().cloned().collect(), table: compiler.table }
}

/// Keeps a table up to date with the cluster.
pub struct Compiler {
    config: CompileConfig,
    node: NodeView,
    snapshot: ClusterSnapshot,
    dirty: Dirty,
    table: ServiceTable,
    resolved: BTreeMap<ObjectName, Resolved>,
    /// Who claims a frontend, the oldest first: that one has it.
    claims: BTreeMap<FrontendAddr, Vec<(i64, ObjectName)>>,
    collisions: BTreeMap<FrontendAddr, Vec<Warning>>,
    /// How many frontends stand on an address.
    vip_uses: BTreeMap<IpAddr, usize>,
    node_addresses: BTreeSet<IpAddr>,
}

impl Compiler {
    /// An empty cluster.
    pub fn new(config: CompileConfig, node: NodeView) -> Self {
        Self {
            config,
            node,
            snapshot: ClusterSnapshot::default(),
            dirty: Dirty::All,
            table: ServiceTable::default(),
            resolved: BTreeMap::new(),
            claims: BTreeMap::new(),
            collisions: BTreeMap::new(),
            vip_uses: BTreeMap::new(),
            node_addresses: BTreeSet::new(),
        }
    }

    /// Takes a change of the cluster in; the table follows at the next [`Compiler::compile`].
    pub fn apply(&mut self, event: Event) {
        let dirty = self.snapshot.apply(event);
        match (&mut self.dirty, dirty) {
            (Dirty::Services(all), Dirty::Services(more)) => all.extend(more),
            (all, Dirty::All) => *all = Dirty::All,
            (Dirty::All, _) => {}
        }
    }

    /// Takes this node's addresses in.
    pub fn set_addresses(&mut self, addresses: Vec<IpAddr>) {
        if self.node.addresses != addresses {
            self.node.addresses = addresses;
            self.dirty = Dirty::All;
        }
    }

    /// The table as of the last [`Compiler::compile`].
    pub fn table(&self) -> &ServiceTable {
        &self.table
    }

    /// This node's Node object.
    pub fn node(&self) -> Option<&Node> {
        self.snapshot.node(&self.node.name)
    }

    /// What is known of the cluster.
    pub fn snapshot(&self) -> &ClusterSnapshot {
        &self.snapshot
    }

    /// All warnings that hold now.
    pub fn warnings(&self) -> impl Iterator<Item = &Warning> {
        self.resolved
            .values()
            .flat_map(|resolved| &resolved.warnings)
            .chain(self.collisions.values().flatten())
    }

    /// Brings the table up to date and says which keys changed.
    pub fn compile(&mut self) -> Changes {
        let mut changes = Changes::default();
        let names: BTreeSet<ObjectName> =
            match std::mem::replace(&mut self.dirty, Dirty::Services(BTreeSet::new())) {
                Dirty::Services(names) => names,
                Dirty::All => {
                    self.take_node_facts(&mut changes);
                    let known = self.snapshot.services().map(|service| service.name.clone());
                    known.chain(self.resolved.keys().cloned()).collect()
                }
            };
        for name in names {
            self.update(&name, &mut changes);
        }
        let service_cidrs = self.snapshot.service_cidrs();
        if self.table.service_cidrs != service_cidrs {
            self.table.service_cidrs = service_cidrs;
            changes.service_cidrs = true;
        }
        changes
    }

    fn take_node_facts(&mut self, changes: &mut Changes) {
        if let Some(node) = self.snapshot.node(&self.node.name) {
            self.node.zone.clone_from(&node.zone);
            let of = |family| {
                let chosen = self.config.node_ip.filter(|addr| Family::of(*addr) == family);
                chosen.or_else(|| node.addresses.iter().copied().find(|addr| Family::of(*addr) == family))
            };
            self.node.primary = [Family::V4, Family::V6].into_iter().filter_map(of).collect();
        }
        self.node_addresses =
            self.snapshot.node_addresses().chain(self.node.addresses.iter().copied()).collect();
        for (addr, kind) in &mut self.table.vips {
            let now = vip_kind(&self.node_addresses, &self.node.addresses, *addr);
            if *kind != now {
                *kind = now;
                changes.vips.insert(*addr);
            }
        }
    }

    /// Resolves one Service anew and carries the difference into the table.
    fn update(&mut self, name: &ObjectName, changes: &mut Changes) {
        let desired = match self.snapshot.service(name) {
            Some(service) => resolve(service, &self.snapshot.slices(service), &self.node, &self.config),
            None => Resolved::default(),
        };
        let actual = self.resolved.remove(name).unwrap_or_default();
        if desired == actual && self.created(name) == self.claimed_at(name, &actual) {
            self.keep(name, desired);
            return;
        }
        for key in &actual.without_local {
            self.table.without_local.entry(*key).and_modify(|count| *count -= 1);
        }
        for key in &desired.without_local {
            *self.table.without_local.entry(*key).or_default() += 1;
        }
        self.table.without_local.retain(|_, count| *count > 0);
        let health_check = desired.health_check.clone();
        if self.table.health_checks.get(name) != health_check.as_ref() {
            changes.health_checks = true;
            match health_check {
                Some(check) => self.table.health_checks.insert(name.clone(), check),
                None => self.table.health_checks.remove(name),
            };
        }
        for id in actual.entries.keys().filter(|id| !desired.entries.contains_key(*id)) {
            self.table.services.remove(id);
            changes.services.insert(id.clone());
        }
        for (id, entry) in desired.entries.iter() {
            if self.table.services.get(id) != Some(entry) {
                self.table.services.insert(id.clone(), entry.clone());
                changes.services.insert(id.clone());
            }
        }
        let touched: BTreeSet<FrontendAddr> =
            actual.frontends.keys().chain(desired.frontends.keys()).copied().collect();
        let created = self.created(name);
        for addr in &touched {
            let claims = self.claims.entry(*addr).or_default();
            claims.retain(|(_, claimant)| claimant != name);
            if desired.frontends.contains_key(addr) {
                let claim = (created, name.clone());
                if let Err(place) = claims.binary_search(&claim) {
                    // Hardly ever is there more than one.
                    claims.reserve_exact(1);
                    claims.insert(place, claim);
                }
            }
        }
        self.keep(name, desired);
        for addr in touched {
            self.settle(addr, changes);
        }
    }

    fn keep(&mut self, name: &ObjectName, resolved: Resolved) {
        if resolved != Resolved::default() {
            self.resolved.insert(name.clone(), resolved.shrunk());
        }
    }

    fn created(&self, name: &ObjectName) -> i64 {
        self.snapshot.service(name).map_or(0, |service| service.created_unix_secs)
    }

    /// The creation time its claims were made with.
    fn claimed_at(&self, name: &ObjectName, resolved: &Resolved) -> i64 {
        let claims = resolved.frontends.keys().next().and_then(|addr| self.claims.get(addr));
        claims
            .and_then(|claims| claims.iter().find(|(_, claimant)| claimant == name))
            .map_or_else(|| self.created(name), |(created, _)| *created)
    }

    /// Gives a frontend to the oldest of its claimants.
    fn settle(&mut self, addr: FrontendAddr, changes: &mut Changes) {
        let claims = self.claims.get(&addr).filter(|claims| !claims.is_empty());
        let winner = claims.and_then(|claims| claims.first()).map(|(_, name)| name.clone());
        let frontend =
            winner.as_ref().and_then(|name| self.resolved.get(name)?.frontends.get(&addr)).cloned();
        let losers: Vec<ObjectName> = claims
            .into_iter()
            .flat_map(|claims| claims.iter().skip(1))
            .map(|(_, name)| name.clone())
            .collect();
        if claims.is_none() {
            self.claims.remove(&addr);
        }
        self.note_collisions(addr, winner.as_ref(), &losers);

        let had = self.table.frontends.get(&addr);
        if had == frontend.as_ref() {
            return;
        }
        let difference = isize::from(frontend.is_some()) - isize::from(had.is_some());
        changes.frontends.insert(addr);
        match frontend {
            Some(frontend) => self.table.frontends.insert(addr, frontend),
            None => self.table.frontends.remove(&addr),
        };
        let uses = self.vip_uses.entry(addr.addr).or_default();
        *uses = uses.saturating_add_signed(difference);
        let desired = (*uses > 0).then(|| vip_kind(&self.node_addresses, &self.node.addresses, addr.addr));
        if *uses == 0 {
            self.vip_uses.remove(&addr.addr);
        }
        let actual = match desired {
            Some(kind) => self.table.vips.insert(addr.addr, kind),
            None => self.table.vips.remove(&addr.addr),
        };
        if actual != desired {
            changes.vips.insert(addr.addr);
        }
    }

    fn note_collisions(&mut self, addr: FrontendAddr, winner: Option<&ObjectName>, losers: &[ObjectName]) {
        let Some(winner) = winner.filter(|_| !losers.is_empty()) else {
            self.collisions.remove(&addr);
            return;
        };
        let warnings = losers
            .iter()
            .filter_map(|loser| self.snapshot.service(loser))
            .map(|loser| {
                warning(
                    loser,
                    "spec".into(),
                    format!("{addr} belongs to the older Service {winner}; here it is not served"),
                )
            })
            .collect();
        self.collisions.insert(addr, warnings);
    }
}

fn vip_kind(node_addresses: &BTreeSet<IpAddr>, own: &[IpAddr], addr: IpAddr) -> VipKind {
    match addr {
        _ if own.contains(&addr) || addr.is_loopback() => VipKind::OwnAddress,
        _ if node_addresses.contains(&addr) => VipKind::NodeAddress,
        _ => VipKind::Vip,
    }
}
