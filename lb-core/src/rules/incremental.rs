//! Keeps the rules of one IP family up to date: each change of the table becomes a [`Transaction`] that rewrites the
//! chains that differ and no others.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use super::{
    facts::Owners,
    iptables::{self, Chain, Config, LARGE_CLUSTER, Table},
};
use crate::{
    model::Family,
    table::{Changes, ServicePortId, ServiceTable},
};

/// What has been written of one family.
#[derive(Debug)]
pub struct Rules {
    family: Family,
    config: Config,
    ports: BTreeMap<ServicePortId, Written>,
    owners: Owners,
    /// Digests of chains that service ports share, and how many rules are in them.
    shared: BTreeMap<Chain, (u64, usize)>,
    /// What stands in them once, after that; `None` before the first update.
    base: Option<BTreeMap<Chain, Vec<String>>>,
    /// Rules in service ports' own chains.
    own_rules: usize,
    endpoints: usize,
    large: bool,
}

/// What has been written of one service port.
#[derive(Debug, Default)]
struct Written {
    /// Lines in shared chains.
    shared: Vec<(Table, &'static str, String)>,
    /// Digests of its own chains.
    own: BTreeMap<Arc<str>, u64>,
    /// Rules in them, all of table nat.
    own_rules: usize,
    endpoints: usize,
}

/// Changes that netfilter takes over all at once, table by table. Prints as input of `iptables-restore --noflush`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    tables: BTreeMap<Table, TableChange>,
    /// Chains of table nat that are one service port's.
    ports: Vec<Vec<Arc<str>>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct TableChange {
    /// New content of chains.
    chains: BTreeMap<Arc<str>, Vec<String>>,
    /// Rules put in front of the kernel's own chains: chain, rule.
    jumps: Vec<(&'static str, String)>,
    /// Rules taken out of the kernel's own chains, as `-A CHAIN RULE`.
    unjumped: Vec<String>,
    /// Chains that go.
    deleted: BTreeSet<Arc<str>>,
}

impl Rules {
    /// Nothing written yet.
    pub fn new(family: Family, config: Config) -> Self {
        Self {
            family,
            config,
            ports: BTreeMap::new(),
            owners: Owners::default(),
            shared: BTreeMap::new(),
            base: None,
            own_rules: 0,
            endpoints: 0,
            large: false,
        }
    }

    /// Everything for a table, as one transaction from nothing; the jumps are in it.
    pub fn all(table: &ServiceTable, family: Family, config: &Config) -> Transaction {
        let mut transaction = Self::new(family, config.clone()).update(table, &Changes::all(table));
        for (of, from, rule) in iptables::jumps(family, config) {
            transaction.jump(of, from, rule.to_string());
        }
        transaction
    }

    /// What has to be written so that the rules are those of `table`; `changes` names the keys that may differ from
    /// the last call's.
    pub fn update(&mut self, table: &ServiceTable, changes: &Changes) -> Transaction {
        let mut transaction = Transaction::default();
        let mut touched = self.owners.learn(table, changes, self.family);
        for id in &touched {
            let before = self.ports.get(id).map_or(0, |written| written.endpoints);
            self.endpoints = self.endpoints - before + endpoints(table, id);
        }
        let large = self.endpoints > LARGE_CLUSTER;
        if large != self.large {
            self.large = large;
            touched.extend(self.ports.keys().cloned());
        }
        let mut shared = false;
        for id in &touched {
            shared |= self.rewrite(table, id, &mut transaction);
        }
        // Endpoints come and go in chains of their own; what stands there once knows addresses of NodePorts.
        let dialled = changes.frontends.iter().any(|addr| Family::of(addr.addr) == self.family);
        if dialled || self.base.is_none() {
            let base = iptables::base(table, self.family, &self.config).into_iter();
            let base = base.map(|(chain, rules)| (chain, rules.iter().map(ToString::to_string).collect()));
            let base = Some(base.collect());
            shared |= self.base != base;
            self.base = base;
        }
        if shared {
            self.rewrite_shared(&mut transaction);
        }
        transaction
    }

    /// Names of the chains that are written now.
    pub fn chains(&self) -> BTreeSet<Chain> {
        let own = self.ports.values().flat_map(|written| written.own.keys());
        own.map(|name| (Table::Nat, name.clone())).chain(self.shared.keys().cloned()).collect()
    }

    /// Takes the shared chains for others than were written.
    #[cfg(test)]
    pub(super) fn forget_shared(&mut self) {
        self.shared.clear();
    }

    /// How many rules a table has in these chains now.
    pub fn count(&self, table: Table) -> usize {
        let shared = self.shared.iter().filter(|((of, _), _)| *of == table).map(|(_, (_, rules))| rules);
        shared.sum::<usize>() + if table == Table::Nat { self.own_rules } else { 0 }
    }

    /// Rewrites a service port's own chains. Returns whether its lines in shared ones changed.
    fn rewrite(&mut self, table: &ServiceTable, id: &ServicePortId, transaction: &mut Transaction) -> bool {
        let before = self.ports.remove(id).unwrap_or_default();
        let frontends = self.owners.frontends(table, id);
        let rules = match table.services.get(id) {
            Some(entry) if !frontends.is_empty() => {
                iptables::of_service(id, entry, &frontends, &self.config, self.large)
            }
            _ => iptables::ServiceRules::default(),
        };
        let mut written = Written { endpoints: endpoints(table, id), ..Written::default() };
        for (of, chain, rule) in &rules.shared {
            written.shared.push((*of, chain, rule.to_string()));
        }
        let mut changed = Vec::new();
        for (chain, rules) in &rules.own {
            let digest = digest(rules);
            if before.own.get(chain) != Some(&digest) {
                changed.push(chain.clone());
                transaction.write(Table::Nat, chain.clone(), rules.iter().map(ToString::to_string).collect());
            }
            written.own.insert(chain.clone(), digest);
            written.own_rules += rules.len();
        }
        transaction.ports.extend((!changed.is_empty()).then_some(changed));
        for chain in before.own.keys().filter(|chain| !written.own.contains_key(*chain)) {
            transaction.delete(Table::Nat, chain.clone());
        }
        self.own_rules = self.own_rules - before.own_rules + written.own_rules;
        let changed = before.shared != written.shared;
        if table.services.contains_key(id) {
            self.ports.insert(id.clone(), written);
        }
        changed
    }

    /// Rewrites the chains of all service ports, with what stands in them once, after that.
    fn rewrite_shared(&mut self, transaction: &mut Transaction) {
        let base = || self.base.iter().flatten();
        let mut lines: BTreeMap<Chain, Vec<&str>> =
            base().map(|(chain, _)| (chain.clone(), Vec::new())).collect();
        for (of, chain, line) in self.ports.values().flat_map(|written| &written.shared) {
            lines.entry((*of, Arc::from(*chain))).or_default().push(line);
        }
        for (chain, rules) in base() {
            lines.entry(chain.clone()).or_default().extend(rules.iter().map(String::as_str));
        }
        for (chain, lines) in lines {
            let (digest, rules) = (digest(&lines), lines.len());
            if self.shared.get(&chain) != Some(&(digest, rules)) {
                let text = lines.into_iter().map(str::to_owned).collect();
                transaction.write(chain.0, chain.1.clone(), text);
                self.shared.insert(chain, (digest, rules));
            }
        }
    }
}

fn endpoints(table: &ServiceTable, id: &ServicePortId) -> usize {
    table.services.get(id).map_or(0, |entry| entry.cluster.len().max(entry.local.len()))
}

fn digest(content: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    hasher.finish()
}

impl Transaction {
    fn write(&mut self, table: Table, chain: Arc<str>, lines: Vec<String>) {
        self.tables.entry(table).or_default().chains.insert(chain, lines);
    }

    /// Removes a chain. Every rule that leads to it has to go in this transaction or be gone.
    pub fn delete(&mut self, table: Table, chain: Arc<str>) {
        self.tables.entry(table).or_default().deleted.insert(chain);
    }

    /// Puts a rule in front of one of the kernel's chains.
    pub fn jump(&mut self, table: Table, from: &'static str, rule: String) {
        self.tables.entry(table).or_default().jumps.push((from, rule));
    }

    /// Takes a rule out of one of the kernel's chains; `line` is it as `iptables-save` prints it.
    pub fn remove_jump(&mut self, table: Table, line: String) {
        self.tables.entry(table).or_default().unjumped.push(line);
    }

    /// The same in pieces of about so many chains, to be loaded one after the other. First come chains that are missing and
    /// that those of service ports lead to; then those, all of a port at once; and then what packets go through and what
    /// goes. So a packet finds the old way or the new one of its service port, and both are whole.
    pub fn pieces(mut self, chains: usize, missing: &[Chain]) -> Vec<Self> {
        if self.ports.iter().map(Vec::len).sum::<usize>() <= chains {
            return vec![self];
        }
        let mut pieces = Vec::new();
        let mut piece = Self::default();
        let ports = std::mem::take(&mut self.ports);
        missing.iter().for_each(|chain| self.hand_over(chain, &mut piece));
        for port in ports {
            port.into_iter().for_each(|chain| self.hand_over(&(Table::Nat, chain), &mut piece));
            if piece.chains() >= chains {
                pieces.push(std::mem::take(&mut piece));
            }
        }
        pieces.push(piece);
        pieces.push(self);
        pieces.retain(|piece| !piece.is_empty());
        pieces
    }

    /// Moves a chain's new content.
    fn hand_over(&mut self, (table, chain): &Chain, to: &mut Self) {
        let lines = self.tables.get_mut(table).and_then(|change| change.chains.remove(chain));
        if let Some(lines) = lines {
            to.write(*table, chain.clone(), lines);
        }
    }

    /// Chains written.
    fn chains(&self) -> usize {
        self.tables.values().map(|change| change.chains.len()).sum()
    }

    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// Rules written to one table.
    pub fn written(&self, table: Table) -> usize {
        self.tables.get(&table).map_or(0, TableChange::written)
    }

    /// Rules written.
    pub fn upserts(&self) -> usize {
        self.tables.values().map(TableChange::written).sum()
    }

    /// Chains and jumps removed.
    pub fn deletes(&self) -> usize {
        self.tables.values().map(|change| change.deleted.len() + change.unjumped.len()).sum()
    }
}

impl TableChange {
    fn written(&self) -> usize {
        self.chains.values().map(Vec::len).sum::<usize>() + self.jumps.len()
    }
}

impl fmt::Display for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (table, change) in &self.tables {
            writeln!(f, "*{}", table.name())?;
            for chain in change.chains.keys().chain(&change.deleted) {
                // Made if new, emptied if not.
                writeln!(f, ":{chain} - [0:0]")?;
            }
            for line in &change.unjumped {
                writeln!(f, "-D{}", line.strip_prefix("-A").unwrap_or(line))?;
            }
            for (from, rule) in &change.jumps {
                writeln!(f, "-I {from} {rule}")?;
            }
            for (chain, lines) in &change.chains {
                for line in lines {
                    writeln!(f, "-A {chain} {line}")?;
                }
            }
            for chain in &change.deleted {
                writeln!(f, "-X {chain}")?;
            }
            writeln!(f, "COMMIT")?;
        }
        Ok(())
    }
}
