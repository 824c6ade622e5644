//! A packet in iptables' chains.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{End, Hook, Hooked, MAX_DEPTH, Packet, TraceError, ipvs, trace};
use crate::{
    compile::NodeView,
    flow::{Answer, Flow},
    model::Family,
    rules::{
        Match, Net, Rule, Target,
        facts::Owners,
        iptables::{self, Chain, Config, Table},
        ipvs::State,
    },
    table::{Changes, ServiceTable},
};

/// The chains of both families, the kernel's own among them.
#[derive(Clone, Debug)]
pub struct Iptables {
    chains: BTreeMap<Family, BTreeMap<Chain, Vec<Rule>>>,
    own: BTreeSet<IpAddr>,
}

impl Iptables {
    /// The rules of a table, on a node with these addresses.
    pub fn new(table: &ServiceTable, node: &NodeView, config: &Config) -> Self {
        let of = |family| (family, chains(table, family, config));
        Self {
            chains: [Family::V4, Family::V6].map(of).into(),
            own: node.addresses.iter().copied().collect(),
        }
    }

    /// What becomes of a flow.
    ///
    /// # Errors
    ///
    /// If the rules can't be followed, or end in different ways by chance.
    pub fn trace(&self, flow: &Flow) -> Result<Answer, TraceError> {
        let rules = Rules { chains: &self.chains[&Family::of(flow.dst)], own: &self.own, sets: None };
        trace(&rules, flow)
    }
}

/// As the kernel holds them: rules of services, then those at the end, and jumps from the kernel's chains.
pub(super) fn chains(table: &ServiceTable, family: Family, config: &Config) -> BTreeMap<Chain, Vec<Rule>> {
    let mut chains: BTreeMap<Chain, Vec<Rule>> = BTreeMap::new();
    let mut owners = Owners::default();
    for id in owners.learn(table, &Changes::all(table), family) {
        let Some(entry) = table.services.get(&id) else { continue };
        let frontends = owners.frontends(table, &id);
        if frontends.is_empty() {
            continue;
        }
        let rules = iptables::of_service(&id, entry, &frontends, config, false);
        for (of, chain, rule) in rules.shared {
            chains.entry((of, chain.into())).or_default().push(rule);
        }
        chains.extend(rules.own.into_iter().map(|(chain, rules)| ((Table::Nat, chain), rules)));
    }
    for (chain, rules) in iptables::base(table, family, config) {
        chains.entry(chain).or_default().extend(rules);
    }
    for (of, from, rule) in iptables::jumps(family, config) {
        chains.entry((of, from.into())).or_default().insert(0, rule);
    }
    chains
}

/// Chains, and what their rules ask.
pub(super) struct Rules<'a> {
    pub(super) chains: &'a BTreeMap<Chain, Vec<Rule>>,
    /// Addresses that are local.
    pub(super) own: &'a BTreeSet<IpAddr>,
    /// Whose elements are in the sets; rules that translate by themselves have none.
    pub(super) sets: Option<&'a State>,
}

impl Hooked for Rules<'_> {
    /// Tables in the kernel's order: destinations are translated before packets are filtered, sources after that.
    fn pass(&self, hook: Hook, packet: Packet) -> Result<Vec<(End, Packet)>, TraceError> {
        let (chain, tables): (&str, &[Table]) = match hook {
            Hook::Prerouting => ("PREROUTING", &[Table::Mangle, Table::Nat]),
            Hook::Input => ("INPUT", &[Table::Mangle, Table::Filter]),
            Hook::Forward => ("FORWARD", &[Table::Mangle, Table::Filter]),
            Hook::Output => ("OUTPUT", &[Table::Mangle, Table::Nat, Table::Filter]),
            Hook::Postrouting => ("POSTROUTING", &[Table::Mangle, Table::Nat]),
        };
        self.tables(chain, tables, packet)
    }

    fn takes_in(&self, packet: &Packet) -> bool {
        self.is_own(packet.dst)
    }
}

/// Whether a rule is for a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hit {
    Yes,
    No,
    /// By chance, or by what came before.
    Perhaps,
}

impl Rules<'_> {
    pub(super) fn is_own(&self, addr: IpAddr) -> bool {
        self.own.contains(&addr) || addr.is_loopback()
    }

    /// All ways out of one of the kernel's chains, table by table.
    pub(super) fn tables(
        &self,
        chain: &str,
        tables: &[Table],
        packet: Packet,
    ) -> Result<Vec<(End, Packet)>, TraceError> {
        let mut ways = vec![(End::Through, packet)];
        for table in tables {
            let Some(rules) = self.chains.get(&(*table, chain.into())) else { continue };
            let mut next = Vec::new();
            for (end, packet) in ways {
                match end {
                    End::Through | End::Accept => next.extend(self.walk(*table, rules, packet, 0)?),
                    End::Drop | End::Reject => next.push((end, packet)),
                }
            }
            ways = next;
        }
        Ok(ways)
    }

    fn walk(
        &self,
        table: Table,
        rules: &[Rule],
        packet: Packet,
        depth: usize,
    ) -> Result<Vec<(End, Packet)>, TraceError> {
        let mut ended = Vec::new();
        let mut live = vec![packet];
        for rule in rules {
            let mut next = Vec::new();
            for packet in live {
                let hit = self.hit(rule, &packet)?;
                if hit != Hit::Yes {
                    next.push(packet);
                }
                if hit != Hit::No {
                    self.carry_out(table, rule, packet, depth, &mut next, &mut ended)?;
                }
            }
            live = next;
        }
        ended.extend(live.into_iter().map(|packet| (End::Through, packet)));
        Ok(ended)
    }

    /// The rule's target: what goes on with the next rule is put into `next`, all else into `ended`.
    fn carry_out(
        &self,
        table: Table,
        rule: &Rule,
        mut packet: Packet,
        depth: usize,
        next: &mut Vec<Packet>,
        ended: &mut Vec<(End, Packet)>,
    ) -> Result<(), TraceError> {
        match &rule.target {
            None => next.push(packet),
            Some(Target::Jump(chain)) => {
                let rules = self.chain(table, chain, depth)?;
                for (end, packet) in self.walk(table, rules, packet, depth + 1)? {
                    match end {
                        End::Through => next.push(packet),
                        End::Accept | End::Drop | End::Reject => ended.push((end, packet)),
                    }
                }
            }
            Some(Target::Accept) => ended.push((End::Accept, packet)),
            Some(Target::Drop) => ended.push((End::Drop, packet)),
            Some(Target::Reject) => ended.push((End::Reject, packet)),
            Some(Target::Return) => ended.push((End::Through, packet)),
            Some(Target::MarkOr(bits)) => {
                packet.mark |= bits;
                next.push(packet);
            }
            Some(Target::MarkXor(bits)) => {
                packet.mark ^= bits;
                next.push(packet);
            }
            Some(Target::Masquerade { .. }) => {
                packet.masqueraded = true;
                ended.push((End::Accept, packet));
            }
            Some(Target::Dnat(to)) => {
                packet.translate(*to);
                ended.push((End::Accept, packet));
            }
        }
        Ok(())
    }

    fn chain(&self, table: Table, name: &Arc<str>, depth: usize) -> Result<&[Rule], TraceError> {
        let full = || format!("{}/{name}", table.name());
        if depth >= MAX_DEPTH {
            return Err(TraceError::Circle(full()));
        }
        let rules = self.chains.get(&(table, name.clone()));
        rules.map(Vec::as_slice).ok_or_else(|| TraceError::NoChain(full()))
    }

    fn hit(&self, rule: &Rule, packet: &Packet) -> Result<Hit, TraceError> {
        let hits = rule.matches.iter().map(|one| self.holds(one, packet));
        let hits = hits.collect::<Result<Vec<Hit>, _>>()?;
        Ok(if hits.contains(&Hit::No) {
            Hit::No
        } else if hits.contains(&Hit::Perhaps) {
            Hit::Perhaps
        } else {
            Hit::Yes
        })
    }

    fn holds(&self, one: &Match, packet: &Packet) -> Result<Hit, TraceError> {
        let holds = match one {
            Match::Comment(_) | Match::RememberSource(_) | Match::Counted(_) => true,
            Match::Protocol(protocol) => *protocol == packet.protocol,
            Match::Dst(net) => contains(net, packet.dst),
            Match::NotDst(net) => !contains(net, packet.dst),
            Match::Src(net) => contains(net, packet.source),
            Match::NotSrc(net) => !contains(net, packet.source),
            Match::DstPort(port) => *port == packet.port,
            Match::DstLocal => self.is_own(packet.dst),
            Match::SrcLocal => self.is_own(packet.source),
            Match::SrcNotLocal => !self.is_own(packet.source),
            Match::NotFromBridgePort => !packet.from_pod,
            Match::From(_) => packet.from_pod,
            Match::NotFrom(_) => !packet.from_pod,
            Match::Mark(value, mask) => packet.mark & mask == *value,
            Match::NotMark(value, mask) => packet.mark & mask != *value,
            Match::CtState(states) => is_in_state(packet, states),
            Match::NotCtState(states) => !is_in_state(packet, states),
            Match::InSet(set, parts) => match self.sets {
                Some(state) => ipvs::is_in_set(state, set, parts, packet)?,
                None => return Err(TraceError::NoSet(set.to_string())),
            },
            Match::VirtualServer(server) => packet.server == Some(*server),
            Match::OneOf(_) | Match::RecentlySeen(..) => return Ok(Hit::Perhaps),
        };
        Ok(if holds { Hit::Yes } else { Hit::No })
    }
}

fn contains(net: &Net, addr: IpAddr) -> bool {
    match net {
        Net::Addr(only) => *only == addr,
        Net::Range(range) => range.contains(&addr),
    }
}

/// The first packet of its connection, whose destination may be translated by now.
fn is_in_state(packet: &Packet, states: &str) -> bool {
    states.split(',').any(|state| state == "NEW" || state == "DNAT" && packet.translated)
}
