//! kube-proxy's nftables tables, loaded and kept.

use std::{collections::BTreeMap, fmt::Write as _};

use lb_core::{
    model::Family,
    rules::{
        iptables::Config,
        nftables::{OWNER, Rules, TABLE, Transaction},
    },
    table::{Changes, FrontendAddr, ServicePortId, ServiceTable},
};
use tracing::warn;

use super::{ApplyReport, Datapath, DatapathError, program};
use crate::nfnetlink;

/// The tables of both families.
pub struct NftablesDatapath {
    families: Vec<FamilyTable>,
    /// The ruleset's generation, as far as all that led to it is known: if it is the kernel's, nobody changed anything.
    generation: Option<u32>,
}

/// The table of one family.
struct FamilyTable {
    family: Family,
    config: Config,
    /// What we wrote; `None` until it is known: at start and after a failed load.
    rules: Option<Rules>,
    /// The kernel's handle of the table: another one means that somebody removed ours.
    handle: Option<u64>,
    /// Chains that are no longer used could not be removed.
    unclean: bool,
    /// Transactions since they were last counted.
    transactions: u32,
}

impl NftablesDatapath {
    /// Finds nft.
    pub fn open(config: &Config) -> Result<Self, DatapathError> {
        nft(&["--version"], "")?;
        let family = |family| FamilyTable {
            family,
            config: config.clone(),
            rules: None,
            handle: None,
            unclean: false,
            transactions: 0,
        };
        Ok(Self { families: [Family::V4, Family::V6].map(family).into(), generation: None })
    }
}

impl Datapath for NftablesDatapath {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn apply(&mut self, table: &ServiceTable, changes: &Changes) -> Result<ApplyReport, DatapathError> {
        let mut report = ApplyReport::default();
        for family in &mut self.families {
            let (of, partial) = (family.family, family.rules.is_some());
            let applied = family.apply(table, changes).map_err(|source| DatapathError::Rules {
                family: of,
                partial,
                source: Box::new(source),
            });
            let (upserts, deletes) = applied?;
            report.cleanup_failures.extend(std::mem::take(&mut family.unclean).then_some(of));
            report.upserts += upserts;
            report.deletes += deletes;
        }
        self.follow();
        Ok(report)
    }

    fn is_intact(&mut self, _: &ServiceTable) -> bool {
        let now = nfnetlink::generation().ok();
        let unchanged = now.is_some() && now == self.generation;
        // All are asked: one whose table is gone forgets what it wrote.
        let intact: Vec<bool> = self.families.iter_mut().map(|family| family.is_intact(unchanged)).collect();
        self.generation = now;
        self.follow();
        intact.into_iter().all(|intact| intact)
    }
}

impl NftablesDatapath {
    /// The generation after our transactions; unknown if anybody else had one meanwhile, for nobody has looked at what it
    /// did.
    fn follow(&mut self) {
        let ours: u32 = self.families.iter_mut().map(|family| std::mem::take(&mut family.transactions)).sum();
        let expected = self.generation.map(|generation| generation.wrapping_add(ours));
        self.generation =
            expected.filter(|expected| nfnetlink::generation().is_ok_and(|now| now == *expected));
    }
}

impl FamilyTable {
    /// Returns rules and elements written, and what was deleted.
    fn apply(&mut self, table: &ServiceTable, changes: &Changes) -> Result<(usize, usize), DatapathError> {
        // Taken out, so that a failure leaves the state unknown and the next call loads everything.
        let Some(mut rules) = self.rules.take() else { return self.load_all(table) };
        let transaction = rules.update(table, changes);
        if !transaction.is_empty() {
            self.load(&transaction)?;
        }
        self.rules = Some(rules);
        Ok((transaction.upserts(), transaction.deletes()))
    }

    /// Loads everything: in place of a table that is there at once, so that there is no moment without rules; where
    /// there is none in pieces, which is far faster: for each anonymous set the kernel walks all of a transaction
    /// (`nft_set_lookup_byid`).
    fn load_all(&mut self, table: &ServiceTable) -> Result<(usize, usize), DatapathError> {
        let mut rules = Rules::new(self.family, self.config.clone());
        let all = Changes::all(table);
        let pieces = if handle(self.family)?.is_some() { vec![all] } else { pieces(table, all) };
        let (mut upserts, mut deletes) = (0, 0);
        for piece in pieces {
            let transaction = rules.update(table, &piece);
            self.load(&transaction)?;
            upserts += transaction.upserts();
            deletes += transaction.deletes();
        }
        self.handle = handle(self.family)?;
        self.rules = Some(rules);
        Ok((upserts, deletes))
    }

    fn load(&mut self, transaction: &Transaction) -> Result<(), DatapathError> {
        load(&transaction.to_string())?;
        self.transactions = self.transactions.wrapping_add(1);
        Ok(())
    }

    /// `unchanged`: nobody has written to any table since our last transaction.
    fn is_intact(&mut self, unchanged: bool) -> bool {
        if self.rules.is_none() {
            return true;
        }
        match if unchanged { Ok(true) } else { is_there(self.family, self.handle) } {
            Ok(true) => self.sweep(),
            Ok(false) => {
                warn!(family = %self.family, table = TABLE, "somebody removed or emptied the table; it is loaded again");
                self.rules = None;
                false
            }
            // Nothing is known: what is loaded stays.
            Err(error) => {
                warn!(%error, "can't look after the table");
                true
            }
        }
    }

    /// Removes chains that are no longer used; after `false` everything has to be loaded again.
    fn sweep(&mut self) -> bool {
        let swept = self.rules.as_mut().map(Rules::sweep).filter(|swept| !swept.is_empty());
        let Some(Err(error)) = swept.map(|swept| self.load(&swept)) else { return true };
        warn!(%error, "chains that are no longer used can't be removed; everything is loaded again");
        (self.rules, self.unclean) = (None, true);
        false
    }
}

/// The table is the one we made, and the chain that all packets go through has its rules: who empties a table empties
/// all of its chains.
fn is_there(family: Family, known: Option<u64>) -> Result<bool, DatapathError> {
    let found = handle(family)?;
    if found.is_none() || found != known {
        return Ok(false);
    }
    nfnetlink::chain_uses(family, TABLE, "services", "service-ips").map_err(|error| not_told(family, &error))
}

/// Service ports in one transaction of a first load.
const PIECE: usize = 200;

/// `all` of a table in pieces, each service port with its frontends. There is at least one piece.
fn pieces(table: &ServiceTable, all: Changes) -> Vec<Changes> {
    let mut frontends: BTreeMap<&ServicePortId, Vec<FrontendAddr>> = BTreeMap::new();
    for (addr, frontend) in &table.frontends {
        frontends.entry(&frontend.service).or_default().push(*addr);
    }
    let ids: Vec<ServicePortId> = all.services.into_iter().collect();
    let piece = |ids: &[ServicePortId]| Changes {
        frontends: ids.iter().filter_map(|id| frontends.get(id)).flatten().copied().collect(),
        services: ids.iter().cloned().collect(),
        ..Changes::default()
    };
    if ids.is_empty() { vec![Changes::default()] } else { ids.chunks(PIECE).map(piece).collect() }
}

/// The family in nft's words.
pub fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// The kernel's handle of our table, if it is there.
pub fn handle(family: Family) -> Result<Option<u64>, DatapathError> {
    nfnetlink::table(family, TABLE).map_err(|error| not_told(family, &error))
}

fn not_told(family: Family, error: &std::io::Error) -> DatapathError {
    let family = name(family);
    failed(format!(
        "ask the kernel for table {family} {TABLE}, which takes nf_tables and CAP_NET_ADMIN: {error}"
    ))
}

fn load(text: &str) -> Result<(), DatapathError> {
    nft(&["-f", "-"], text).map(drop)
}

/// Runs nft and returns what it prints.
pub fn nft(args: &[&str], input: &str) -> Result<String, DatapathError> {
    let output = program::feed("nft", args, input)?;
    match output.status.success() {
        true => Ok(program::printed(&output)),
        false => Err(failed(program::complaint(&output))),
    }
}

fn failed(source: String) -> DatapathError {
    program::failed("nft", &[], source)
}

/// Families whose table there is; without `all` only where our agent made it, not kube-proxy.
pub fn removals(all: bool) -> Vec<Family> {
    let ours = |family: &Family| {
        // Without nf_tables in the kernel there is no table.
        nfnetlink::has_chain(*family, TABLE, OWNER).unwrap_or(false)
            || (all && handle(*family).is_ok_and(|handle| handle.is_some()))
    };
    [Family::V4, Family::V6].into_iter().filter(ours).collect()
}

/// Holds netfilter's NAT and conntrack when rules are gone: without any chain and rule that uses them the kernel
/// unregisters their hooks, and translated connections would end (`net/netfilter/nf_nat_core.c`
/// `nf_nat_unregister_fn`, `nf_conntrack_proto.c` `nf_ct_netns_put`).
const KEEPER: &str = "lb-agent-drain";

fn keeper(family: Family) -> String {
    let (family, mut text) = (name(family), String::new());
    let _ = writeln!(
        text,
        "add table {family} {KEEPER} {{ comment \"translated connections go on until they end\" ; }}"
    );
    for (hook, priority) in [("prerouting", -100), ("output", -100), ("input", 100), ("postrouting", 100)] {
        let _ = writeln!(
            text,
            "add chain {family} {KEEPER} {hook} {{ type nat hook {hook} priority {priority} ; }}"
        );
        // Chains alone hold NAT; it takes a rule that looks at conntrack to hold that.
        let _ = writeln!(text, "add rule {family} {KEEPER} {hook} ct state established accept");
    }
    text
}

/// Removes a family's table at once with putting up what keeps its connections.
pub fn retire(family: Family) -> Result<(), DatapathError> {
    load(&(keeper(family) + &removal(family)))
}

/// Keeps translated connections.
pub fn keep(family: Family) -> Result<(), DatapathError> {
    load(&keeper(family))
}

/// Families whose connections are kept.
pub fn keepers() -> impl Iterator<Item = Family> {
    let there = |family: &Family| nfnetlink::table(*family, KEEPER).is_ok_and(|handle| handle.is_some());
    [Family::V4, Family::V6].into_iter().filter(there)
}

/// Connections are kept.
pub fn has_keeper() -> bool {
    keepers().next().is_some()
}

/// Ends the keeping of connections.
pub fn remove_keepers() -> Result<(), DatapathError> {
    keepers().try_for_each(|family| load(&keeper_removal(family)))
}

/// What ends the keeping of a family's connections, for `nft -f`.
pub fn keeper_removal(family: Family) -> String {
    format!("delete table {} {KEEPER}\n", name(family))
}

/// Removes a family's table.
pub fn remove(family: Family) -> Result<(), DatapathError> {
    load(&removal(family))
}

/// What [`remove`] hands to `nft -f`.
pub fn removal(family: Family) -> String {
    format!("delete table {} {TABLE}\n", name(family))
}
