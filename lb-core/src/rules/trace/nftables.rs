//! A packet in nftables' chains, as read from the text that `nft -f` gets.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{
    End, Hook, Hooked, MAX_DEPTH, Packet, TraceError,
    nft_syntax::{Chain, MarkChange, Statement, Tables, Test, Verdict},
    trace,
};
use crate::{
    compile::NodeView,
    flow::{Answer, Flow},
    model::Family,
    rules::names,
};

/// The tables of both families.
#[derive(Clone, Debug)]
pub struct Nftables {
    tables: Tables,
    own: BTreeSet<IpAddr>,
}

impl Nftables {
    /// Reads transactions, such as [`crate::rules::nftables::Rules::all`] gives for each family, on a node with these
    /// addresses.
    ///
    /// # Errors
    ///
    /// If there is a line that we would not write.
    pub fn read(text: &str, node: &NodeView) -> Result<Self, TraceError> {
        Ok(Self { tables: Tables::read(text)?, own: node.addresses.iter().copied().collect() })
    }

    /// What becomes of a flow.
    ///
    /// # Errors
    ///
    /// If the rules can't be followed, or end in different ways by chance.
    pub fn trace(&self, flow: &Flow) -> Result<Answer, TraceError> {
        let family = Family::of(flow.dst);
        let Some(table) = self.tables.of(family) else { return Ok(Answer::Pass) };
        trace(&Rules { chains: &table.chains, sets: &table.sets, own: &self.own }, flow)
    }
}

struct Rules<'a> {
    chains: &'a BTreeMap<String, Chain>,
    sets: &'a BTreeMap<String, BTreeMap<String, Option<Verdict>>>,
    own: &'a BTreeSet<IpAddr>,
}

impl Hooked for Rules<'_> {
    /// Base chains by priority. Accepting ends one of them, dropping ends all.
    fn pass(&self, hook: Hook, packet: Packet) -> Result<Vec<(End, Packet)>, TraceError> {
        let name = match hook {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        };
        let at_hook = |chain: &&Chain| chain.hook.as_ref().is_some_and(|(known, _)| known == name);
        let mut bases: Vec<&Chain> = self.chains.values().filter(at_hook).collect();
        bases.sort_by_key(|chain| chain.hook.as_ref().map(|(_, priority)| *priority));
        let mut ways = vec![(End::Through, packet)];
        for base in bases {
            let mut next = Vec::new();
            for (end, packet) in ways {
                match end {
                    End::Through | End::Accept => next.extend(self.walk(&base.rules, packet, 0)?),
                    End::Drop | End::Reject => next.push((end, packet)),
                }
            }
            ways = next;
        }
        Ok(ways)
    }

    fn takes_in(&self, packet: &Packet) -> bool {
        self.is_own(packet.dst)
    }
}

/// What a statement leads to.
enum Step {
    /// The rule's next statement.
    Next(Packet),
    /// The next rule.
    NextRule(Packet),
    /// Out of the chain.
    End(End, Packet),
}

impl Rules<'_> {
    fn is_own(&self, addr: IpAddr) -> bool {
        self.own.contains(&addr) || addr.is_loopback()
    }

    fn walk(
        &self,
        rules: &[Vec<Statement>],
        packet: Packet,
        depth: usize,
    ) -> Result<Vec<(End, Packet)>, TraceError> {
        let mut ended = Vec::new();
        let mut live = vec![packet];
        for rule in rules {
            let mut after = Vec::new();
            for statement in rule {
                let mut next = Vec::new();
                for packet in live {
                    for step in self.step(statement, packet, depth)? {
                        match step {
                            Step::Next(packet) => next.push(packet),
                            Step::NextRule(packet) => after.push(packet),
                            Step::End(end, packet) => ended.push((end, packet)),
                        }
                    }
                }
                live = next;
            }
            live.extend(after);
        }
        ended.extend(live.into_iter().map(|packet| (End::Through, packet)));
        Ok(ended)
    }

    fn step(&self, statement: &Statement, mut packet: Packet, depth: usize) -> Result<Vec<Step>, TraceError> {
        Ok(vec![match statement {
            Statement::Is(test) => match self.holds(test, &packet)? {
                true => Step::Next(packet),
                false => Step::NextRule(packet),
            },
            // Whom a set of recent sources holds is a matter of what came before.
            Statement::RecentSource => return Ok(vec![Step::Next(packet), Step::NextRule(packet)]),
            Statement::RememberSource => Step::Next(packet),
            Statement::Mark(change) => {
                match change {
                    MarkChange::Or(bits) => packet.mark |= bits,
                    MarkChange::Xor(bits) => packet.mark ^= bits,
                }
                Step::Next(packet)
            }
            Statement::Lookup { with_addr, map } => {
                let protocol = names::protocol(packet.protocol);
                let key = match with_addr {
                    true => format!("{} . {protocol} . {}", packet.dst, packet.port),
                    false => format!("{protocol} . {}", packet.port),
                };
                match self.set(map)?.get(&key) {
                    Some(Some(verdict)) => return self.carry_out(verdict, packet, depth),
                    Some(None) | None => Step::NextRule(packet),
                }
            }
            Statement::Choose(verdicts) => {
                let ways = verdicts.iter().map(|verdict| self.carry_out(verdict, packet, depth));
                return Ok(ways.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect());
            }
            Statement::Masquerade => {
                packet.masqueraded = true;
                Step::End(End::Accept, packet)
            }
            Statement::Dnat(to) => {
                packet.translate(*to);
                Step::End(End::Accept, packet)
            }
            Statement::Verdict(verdict) => return self.carry_out(verdict, packet, depth),
        }])
    }

    fn carry_out(&self, verdict: &Verdict, packet: Packet, depth: usize) -> Result<Vec<Step>, TraceError> {
        Ok(match verdict {
            Verdict::Drop => vec![Step::End(End::Drop, packet)],
            Verdict::Reject => vec![Step::End(End::Reject, packet)],
            Verdict::Return => vec![Step::End(End::Through, packet)],
            Verdict::Jump(chain) => {
                let back = |(end, packet)| match end {
                    End::Through => Step::NextRule(packet),
                    End::Accept | End::Drop | End::Reject => Step::End(end, packet),
                };
                self.enter(chain, packet, depth)?.into_iter().map(back).collect()
            }
            // What comes to that chain's end goes on where this one was called.
            Verdict::Goto(chain) => {
                let ways = self.enter(chain, packet, depth)?;
                ways.into_iter().map(|(end, packet)| Step::End(end, packet)).collect()
            }
        })
    }

    fn enter(&self, name: &str, packet: Packet, depth: usize) -> Result<Vec<(End, Packet)>, TraceError> {
        if depth >= MAX_DEPTH {
            return Err(TraceError::Circle(name.to_owned()));
        }
        let chain = self.chains.get(name).ok_or_else(|| TraceError::NoChain(name.to_owned()))?;
        self.walk(&chain.rules, packet, depth + 1)
    }

    fn holds(&self, test: &Test, packet: &Packet) -> Result<bool, TraceError> {
        Ok(match test {
            Test::DstInSet(set) => self.set(set)?.contains_key(&packet.dst.to_string()),
            Test::Dst(net) => net.contains(&packet.dst),
            Test::SrcIn(nets) => nets.iter().any(|net| net.contains(&packet.source)),
            Test::SrcNotIn(nets) => !nets.iter().any(|net| net.contains(&packet.source)),
            Test::SrcLocal => self.is_own(packet.source),
            Test::FromPod => packet.from_pod,
            Test::NotFromPod => !packet.from_pod,
            Test::Protocol(protocol) => *protocol == packet.protocol,
            // Each flow is followed by its first packet.
            Test::New => true,
            Test::MarkIsClear(bits) => packet.mark & bits == 0,
        })
    }

    fn set(&self, name: &str) -> Result<&BTreeMap<String, Option<Verdict>>, TraceError> {
        self.sets.get(name).ok_or_else(|| TraceError::NoSet(name.to_owned()))
    }
}
