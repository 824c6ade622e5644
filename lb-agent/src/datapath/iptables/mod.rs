//! kube-proxy's iptables rules, loaded and kept.

pub mod counters;
pub mod exec;

use std::{fs, path::Path};

use lb_core::{
    model::Family,
    rules::{
        incremental::{Rules, Transaction},
        iptables::{self, Config, Table, Translation},
        names,
    },
    table::{Changes, ServiceTable},
};
use tracing::{info, warn};

use self::exec::{Loaded, Programs, Variant};
use super::{ApplyReport, Datapath, DatapathError, RuleCount};

/// The rules of both families.
pub struct IptablesDatapath {
    families: Vec<FamilyRules>,
}

/// Chains in one call of iptables-nft-restore, whose time grows with the square of what it reads; iptables-legacy-restore's
/// doesn't, and it writes the whole table at each call.
const PIECE: usize = 500;

/// The rules of one family.
struct FamilyRules {
    programs: Programs,
    family: Family,
    config: Config,
    /// Chains to be loaded at once.
    at_once: usize,
    /// `None` until it is known what is loaded: at start, after a failed load and when somebody flushed the rules.
    rules: Option<Rules>,
}

impl IptablesDatapath {
    /// Finds the programs and prepares the host.
    pub fn open(config: Config) -> Result<Self, DatapathError> {
        let localhost = config.localhost_node_ports;
        let mut datapath = Self::find(config)?;
        datapath.count();
        if localhost {
            route_localnet();
        }
        Ok(datapath)
    }

    /// Finds the programs that this machine's rules are in. A machine without IPv6 rules is served in IPv4.
    pub fn find(config: Config) -> Result<Self, DatapathError> {
        let variant = Variant::detect()?;
        let mut families = Vec::new();
        for family in [Family::V4, Family::V6] {
            let programs = Programs { variant, family };
            if let Err(error) = programs.save(Some(Table::Nat)) {
                match family {
                    Family::V4 => return Err(error),
                    Family::V6 => warn!(%error, "no IPv6 rules on this machine; IPv4 is served"),
                }
                continue;
            }
            let mut config = config.clone();
            config.random_fully = programs.knows_random_fully();
            config.drop_invalid &= !sysctl_is_on("net/netfilter/nf_conntrack_tcp_be_liberal");
            let at_once = if programs.are_nft() { PIECE } else { usize::MAX };
            families.push(FamilyRules { programs, family, config, at_once, rules: None });
            info!(program = programs.name(), "rules go through");
        }
        Ok(Self { families })
    }

    /// Has the rules count what kube-proxy counts, where this network namespace can.
    pub fn count(&mut self) {
        // kube-proxy's rules beside IPVS have no counters.
        if self.families.iter().any(|family| family.config.translation == Translation::Ipvs) {
            return;
        }
        for family in &mut self.families {
            match counters::prepare(family.programs) {
                Ok(()) => family.config.accounting = true,
                Err(error) => info!(
                    program = family.programs.name(),
                    error = %format!("{error:#}"),
                    "no nfacct here: packets that are INVALID, or for NodePorts on 127.0.0.1, are not counted"
                ),
            }
        }
        if !self.families.iter().any(|family| family.config.accounting) {
            counters::remove_unused();
        }
    }

    /// The programs of each family.
    pub fn programs(&self) -> Vec<Programs> {
        self.families.iter().map(|family| family.programs).collect()
    }
}

impl IptablesDatapath {
    /// The families that are served.
    pub fn families(&self) -> impl Iterator<Item = Family> {
        self.families.iter().map(|family| family.family)
    }
}

fn sysctl_is_on(name: &str) -> bool {
    fs::read_to_string(Path::new("/proc/sys").join(name)).is_ok_and(|value| value.trim() == "1")
}

/// Without it the kernel drops what is translated from 127.0.0.1 to a pod as martian.
fn route_localnet() {
    let sysctl = "/proc/sys/net/ipv4/conf/all/route_localnet";
    if let Err(error) = fs::write(sysctl, "1") {
        warn!(%error, sysctl, "can't be set to 1: NodePorts don't answer on 127.0.0.1");
    }
}

impl Datapath for IptablesDatapath {
    fn name(&self) -> &'static str {
        "iptables"
    }

    fn apply(&mut self, table: &ServiceTable, changes: &Changes) -> Result<ApplyReport, DatapathError> {
        let mut report = ApplyReport::default();
        for family in &mut self.families {
            let (of, partial) = (family.family, family.rules.is_some());
            let pieces = family.apply(table, changes).map_err(|source| DatapathError::Rules {
                family: of,
                partial,
                source: Box::new(source),
            })?;
            report.upserts += pieces.iter().map(Transaction::upserts).sum::<usize>();
            report.deletes += pieces.iter().map(Transaction::deletes).sum::<usize>();
            report.rules.extend(family.count(&pieces));
        }
        Ok(report)
    }

    fn is_intact(&mut self, _: &ServiceTable) -> bool {
        // All are asked: one that was flushed forgets what it wrote.
        let intact: Vec<bool> = self.families.iter_mut().map(FamilyRules::is_intact).collect();
        intact.into_iter().all(|intact| intact)
    }
}

impl FamilyRules {
    /// Returns what was loaded.
    fn apply(&mut self, table: &ServiceTable, changes: &Changes) -> Result<Vec<Transaction>, DatapathError> {
        // Taken out, so that a failure leaves the state unknown and the next call loads everything.
        let (rules, pieces) = match self.rules.take() {
            Some(mut rules) => {
                let transaction = rules.update(table, changes);
                (rules, transaction.pieces(self.at_once, &[]))
            }
            None => self.everything(table)?,
        };
        for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
            self.programs.restore(&piece.to_string())?;
        }
        self.rules = Some(rules);
        Ok(pieces)
    }

    fn count(&self, pieces: &[Transaction]) -> impl Iterator<Item = RuleCount> {
        let total = |table| self.rules.as_ref().map_or(0, |rules| rules.count(table));
        let written = |table| pieces.iter().map(|piece| piece.written(table)).sum();
        [Table::Filter, Table::Nat].into_iter().map(move |table| RuleCount {
            family: self.family,
            table,
            total: total(table),
            written: written(table),
        })
    }

    /// How to write the rules now: counters that they speak of are made first.
    fn countable(&self) -> Config {
        let mut config = self.config.clone();
        if config.accounting
            && let Err(error) = counters::make()
        {
            warn!(%error, "nfacct's counters can't be made: packets are not counted");
            config.accounting = false;
        }
        config
    }

    /// All rules, without the chains of an earlier agent or kube-proxy that no longer have a place.
    fn everything(&self, table: &ServiceTable) -> Result<(Rules, Vec<Transaction>), DatapathError> {
        let loaded = Loaded::parse(&self.programs.save(None)?);
        let mut rules = Rules::new(self.family, self.countable());
        let mut transaction = rules.update(table, &Changes::all(table));
        let desired = rules.chains();
        let gone = |of: Table, chain: &str| {
            !desired.contains(&(of, chain.into())) && !loaded.is_of_kubelet(of, chain)
        };
        for (of, _, to, line) in &loaded.jumps {
            if gone(*of, to) {
                transaction.remove_jump(*of, line.clone());
            }
        }
        for (of, chain) in loaded.chains.iter().filter(|(of, chain)| gone(*of, chain)) {
            transaction.delete(*of, chain.clone());
        }
        for (of, from, rule) in iptables::jumps(self.family, &self.config) {
            let target = rule.target.as_ref().map(ToString::to_string).unwrap_or_default();
            let there = loaded
                .jumps
                .iter()
                .any(|(table, caller, to, _)| *table == of && caller == from && target == format!("-j {to}"));
            if !there {
                transaction.jump(of, from, rule.to_string());
            }
        }
        // Chains without a mark would be taken for kube-proxy's, if this is the last that we do.
        let mut missing = vec![(Table::Mangle, names::OWNER.into()), (Table::Nat, names::MARK_MASQ.into())];
        missing.retain(|chain| !loaded.chains.contains(chain));
        Ok((rules, transaction.pieces(self.at_once, &missing)))
    }

    fn is_intact(&mut self) -> bool {
        if self.rules.is_none() {
            return true;
        }
        // Whoever removes a table's chains takes its canary with them (kube-proxy `pkg/util/iptables` Monitor); whoever
        // empties them, our jumps.
        let lacks = |table, chain, what: &str| {
            self.programs.list(table, chain).is_some_and(|rules| !rules.contains(what))
        };
        let gone = Table::ALL.iter().any(|table| lacks(*table, names::CANARY, names::CANARY))
            || iptables::jumps(self.family, &self.config).into_iter().any(|(table, from, rule)| {
                rule.target.is_some_and(|target| lacks(table, from, &target.to_string()))
            });
        if gone {
            warn!(program = self.programs.name(), "somebody flushed the rules; all are loaded again");
            self.rules = None;
        }
        !gone
    }
}

/// Holds conntrack when rules are gone, where there is no nft for [`super::nftables::keep`]: a chain that nobody calls,
/// with a rule that looks at conntrack. The table holds NAT as long as the machine runs.
const KEEPER: &str = "LB-AGENT-DRAIN";

/// Keeps translated connections.
pub fn keep(programs: Programs) -> Result<(), DatapathError> {
    programs.restore(&format!(
        "*nat\n:{KEEPER} - [0:0]\n-A {KEEPER} -m conntrack --ctstate ESTABLISHED -j RETURN\nCOMMIT\n"
    ))
}

/// Where connections are kept.
pub fn keepers() -> Vec<Programs> {
    let variants = [Variant::Nft, Variant::Legacy, Variant::Plain].into_iter();
    let all =
        variants.flat_map(|variant| [Family::V4, Family::V6].map(|family| Programs { variant, family }));
    let has_keeper = |programs: &Programs| {
        programs.save(Some(Table::Nat)).is_ok_and(|text| text.contains(&format!(":{KEEPER} ")))
    };
    all.filter(has_keeper).collect()
}

/// Ends the keeping of connections.
pub fn remove_keepers() -> Result<(), DatapathError> {
    for programs in keepers() {
        // The last of the variants is one of the others: it may be gone already.
        if programs.list(Table::Nat, KEEPER).is_some_and(|rules| !rules.is_empty()) {
            programs.restore(&keeper_removal())?;
        }
    }
    Ok(())
}

/// What ends the keeping of connections, for `iptables-restore --noflush`.
pub fn keeper_removal() -> String {
    format!("*nat\n:{KEEPER} - [0:0]\n-X {KEEPER}\nCOMMIT\n")
}

/// What removes the rules of this machine, by program. Without `all` only those that our agent wrote; with it
/// kube-proxy's too, which have the same names. A kubelet's chains stay.
pub fn removals(all: bool) -> Result<Vec<(Programs, Transaction)>, DatapathError> {
    let mut removals = Vec::new();
    for variant in [Variant::Nft, Variant::Legacy, Variant::Plain] {
        for family in [Family::V4, Family::V6] {
            let programs = Programs { variant, family };
            // What can't be read holds no rules of ours.
            let Ok(text) = programs.save(None) else { continue };
            let loaded = Loaded::parse(&text);
            if all || loaded.is_owned() {
                let removal = removal(&loaded);
                if !removal.is_empty() {
                    removals.push((programs, removal));
                }
            }
        }
        // Plain is one of the two: it counts where they are not.
        if variant == Variant::Legacy && !removals.is_empty() {
            break;
        }
    }
    Ok(removals)
}

/// How services are served by this machine's rules, if they are; without `all` only if our agent wrote them.
pub fn serves(all: bool) -> Result<Option<Translation>, DatapathError> {
    let Ok(variant) = Variant::detect() else { return Ok(None) };
    let loaded = Loaded::parse(&Programs { variant, family: Family::V4 }.save(None)?);
    let dispatch = (Table::Nat, names::SERVICES.into());
    // kube-proxy has it since 1.26.
    let beside_ipvs = (Table::Filter, names::IPVS_FILTER.into());
    let serves = loaded.chains.contains(&dispatch) && (all || loaded.is_owned());
    Ok(serves.then(|| match loaded.chains.contains(&beside_ipvs) {
        true => Translation::Ipvs,
        false => Translation::Rules,
    }))
}

fn removal(loaded: &Loaded) -> Transaction {
    let mut removal = Transaction::default();
    for (table, _, to, line) in &loaded.jumps {
        if !loaded.is_of_kubelet(*table, to) {
            removal.remove_jump(*table, line.clone());
        }
    }
    for (table, chain) in &loaded.chains {
        if !loaded.is_of_kubelet(*table, chain) {
            removal.delete(*table, chain.clone());
        }
    }
    removal
}
