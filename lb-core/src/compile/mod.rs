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
    /// Serve `spec.externalIPs` (Kubernetes' feature gate `AllowServiceExternalIPs`).
    pub external_ips: bool,
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
            external_ips: true,
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
    compiler.compile();
    Compiled { warnings: compiler.warnings().cloned().collect(), table: compiler.table }
}

/// Keeps a table up to date with the cluster.
pub struct Compiler {
    config: CompileConfig,
    node: NodeView,
    snapshot: ClusterSnapshot,
    dirty: Dirty,
    /// Something that every Service depends on changed, or nothing is resolved yet.
    all_dirty: bool,
    table: ServiceTable,
    resolved: BTreeMap<ObjectName, Resolved>,
    /// Who claims a frontend, the oldest first: that one has it.
    claims: BTreeMap<FrontendAddr, Vec<(i64, ObjectName)>>,
    collisions: BTreeMap<FrontendAddr, Vec<Warning>>,
    /// How many frontends stand on an address.
    vip_uses: BTreeMap<IpAddr, usize>,
    news: WarningChanges,
}

/// Warnings that came and went. One may do both, when it stays but is found anew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WarningChanges {
    /// They hold now.
    pub new: Vec<Warning>,
    /// They held before.
    pub gone: Vec<Warning>,
}

impl WarningChanges {
    fn replace(&mut self, before: &[Warning], now: &[Warning]) {
        if before != now {
            self.new.extend_from_slice(now);
            self.gone.extend_from_slice(before);
        }
    }
}

impl Compiler {
    /// An empty cluster.
    pub fn new(config: CompileConfig, node: NodeView) -> Self {
        Self {
            config,
            node,
            snapshot: ClusterSnapshot::default(),
            dirty: Dirty::default(),
            all_dirty: true,
            table: ServiceTable::default(),
            resolved: BTreeMap::new(),
            claims: BTreeMap::new(),
            collisions: BTreeMap::new(),
            vip_uses: BTreeMap::new(),
            news: WarningChanges::default(),
        }
    }

    /// Takes a change of the cluster in; the table follows at the next [`Compiler::compile`].
    pub fn apply(&mut self, event: Event) {
        if let Some(event) = self.snapshot.seen_by(&self.node.name, event) {
            self.dirty.merge(self.snapshot.apply(event));
        }
    }

    /// Takes this node's addresses in.
    pub fn set_addresses(&mut self, addresses: Vec<IpAddr>) {
        if self.node.addresses != addresses {
            self.node.addresses = addresses;
            self.all_dirty = true;
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

    /// Which warnings the last [`Compiler::compile`] changed.
    pub fn news(&self) -> &WarningChanges {
        &self.news
    }

    /// Brings the table up to date and says which keys changed.
    pub fn compile(&mut self) -> Changes {
        let mut changes = Changes::default();
        self.news = WarningChanges::default();
        let dirty = std::mem::take(&mut self.dirty);
        let mut all = std::mem::take(&mut self.all_dirty);
        if all || dirty.nodes.contains(&self.node.name) {
            all |= self.take_node_facts();
        }
        let (names, addresses) = if all {
            let known = self.snapshot.services().map(|service| service.name.clone());
            let names = known.chain(self.resolved.keys().cloned()).collect();
            (names, self.table.vips.keys().copied().collect())
        } else {
            (dirty.services, dirty.addresses)
        };
        for addr in addresses {
            self.classify(addr, &mut changes);
        }
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

    /// Takes in what its Node object says of this node, and whether that is something else than it said before.
    fn take_node_facts(&mut self) -> bool {
        let Some(node) = self.snapshot.node(&self.node.name) else { return false };
        let of = |family| {
            let chosen = self.config.node_ip.filter(|addr| Family::of(*addr) == family);
            chosen.or_else(|| node.addresses.iter().copied().find(|addr| Family::of(*addr) == family))
        };
        let primary: Vec<IpAddr> = [Family::V4, Family::V6].into_iter().filter_map(of).collect();
        let is_new = (&self.node.zone, &self.node.primary) != (&node.zone, &primary);
        self.node.zone.clone_from(&node.zone);
        self.node.primary = primary;
        is_new
    }

    /// Says anew what a frontend's address is.
    fn classify(&mut self, addr: IpAddr, changes: &mut Changes) {
        let now = self.vip_kind(addr);
        if let Some(kind) = self.table.vips.get_mut(&addr).filter(|kind| **kind != now) {
            *kind = now;
            changes.vips.insert(addr);
        }
    }

    fn vip_kind(&self, addr: IpAddr) -> VipKind {
        match addr {
            _ if self.node.addresses.contains(&addr) || addr.is_loopback() => VipKind::OwnAddress,
            _ if self.snapshot.is_node_address(addr) => VipKind::NodeAddress,
            _ => VipKind::Vip,
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
        self.news.replace(&actual.warnings, &desired.warnings);
        for key in &actual.without_local {
            self.table.without_local.entry(*key).and_modify(|count| *count -= 1);
        }
        for key in &desired.without_local {
            *self.table.without_local.entry(*key).or_default() += 1;
        }
        self.table.without_local.retain(|_, count| *count > 0);
        let health_check = desired.health_check.clone();
        if self.table.health_checks.get(name) != health_check.as_ref() {
            changes.health_checks.insert(name.clone());
            match health_check {
                Some(check) => self.table.health_checks.insert(name.clone(), check),
                None => self.table.health_checks.remove(name),
            };
        }
        for id in actual.entries.keys().filter(|id| !desired.entries.contains_key(*id)) {
            let gone = self.table.services.remove(id);
            self.table.endpoints -= gone.map_or(0, |entry| entry.serving.len());
            changes.services.insert(id.clone());
        }
        for (id, entry) in desired.entries.iter() {
            if self.table.services.get(id) != Some(entry) {
                let before = self.table.services.insert(id.clone(), entry.clone());
                self.table.endpoints -= before.map_or(0, |entry| entry.serving.len());
                self.table.endpoints += entry.serving.len();
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
        let is_used = *uses > 0;
        if !is_used {
            self.vip_uses.remove(&addr.addr);
        }
        let desired = is_used.then(|| self.vip_kind(addr.addr));
        let actual = match desired {
            Some(kind) => self.table.vips.insert(addr.addr, kind),
            None => self.table.vips.remove(&addr.addr),
        };
        if actual != desired {
            changes.vips.insert(addr.addr);
        }
    }

    fn note_collisions(&mut self, addr: FrontendAddr, winner: Option<&ObjectName>, losers: &[ObjectName]) {
        let text = |winner| format!("{addr} belongs to the older Service {winner}; here it is not served");
        let known = losers.iter().filter_map(|loser| self.snapshot.service(loser));
        let warnings: Vec<Warning> = winner
            .into_iter()
            .flat_map(|winner| known.clone().map(move |loser| warning(loser, "spec".into(), text(winner))))
            .collect();
        let before = match warnings.is_empty() {
            true => self.collisions.remove(&addr),
            false => self.collisions.insert(addr, warnings.clone()),
        };
        self.news.replace(&before.unwrap_or_default(), &warnings);
    }
}
