//! A packet in the IPVS mode: through iptables' chains with their sets, and IPVS between them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    End, Hook, Hooked, Packet, TraceError,
    iptables::{Rules, chains},
    trace,
};
use crate::{
    compile::NodeView,
    flow::{Answer, Flow, Origin},
    model::Family,
    rules::{
        Rule,
        iptables::{Chain, Config, Table, Translation},
        ipvs::{Link, Scheduler, Servers, State, sets::Set},
        names,
    },
    table::{FrontendAddr, ServiceTable},
};

/// Virtual servers, sets and chains of both families.
#[derive(Clone, Debug)]
pub struct Ipvs {
    families: BTreeMap<Family, OneFamily>,
}

#[derive(Clone, Debug)]
struct OneFamily {
    chains: BTreeMap<Chain, Vec<Rule>>,
    state: State,
    /// The node's own addresses and those that are bound.
    local: BTreeSet<IpAddr>,
}

impl Ipvs {
    /// What a table becomes, on a node with these addresses.
    pub fn new(table: &ServiceTable, node: &NodeView, config: &Config) -> Self {
        let config = Config { translation: Translation::Ipvs, ..config.clone() };
        let of = |family| {
            let mut servers = Servers::new(family, Scheduler::default());
            servers.replace(table, &State::default());
            let state = servers.state();
            let mut local: BTreeSet<IpAddr> = node.addresses.iter().copied().collect();
            local.extend(state.links.iter().filter_map(|link| match link {
                Link::Bind(addr) => Some(*addr),
                Link::Route(_) | Link::Rule(_) => None,
            }));
            (family, OneFamily { chains: chains(table, family, &config), state, local })
        };
        Self { families: [Family::V4, Family::V6].map(of).into() }
    }

    /// What becomes of a flow.
    ///
    /// # Errors
    ///
    /// If the rules can't be followed, or end in different ways by chance.
    pub fn trace(&self, flow: &Flow) -> Result<Answer, TraceError> {
        let OneFamily { chains, state, local } = &self.families[&Family::of(flow.dst)];
        trace(&Balanced { rules: Rules { chains, own: local, sets: Some(state) }, state }, flow)
    }
}

/// Rules with IPVS between them.
struct Balanced<'a> {
    rules: Rules<'a>,
    state: &'a State,
}

impl Hooked for Balanced<'_> {
    /// The kernel sends from the address that it sends to, if that is bound.
    fn sent(&self, flow: &Flow) -> Packet {
        let mut packet = Packet::of(flow);
        if flow.origin == Origin::Node && self.state.links.contains(&Link::Bind(flow.dst)) {
            packet.source = flow.dst;
        }
        packet
    }

    /// IPVS translates what was let in, and what the node sends itself before it is filtered (kernel
    /// `net/netfilter/ipvs/ip_vs_core.c` `ip_vs_ops4`).
    fn pass(&self, hook: Hook, packet: Packet) -> Result<Vec<(End, Packet)>, TraceError> {
        match hook {
            Hook::Input => then(self.rules.pass(hook, packet)?, |packet| {
                then(self.balance(packet), |balanced| match balanced == packet || self.takes_in(&balanced) {
                    true => Ok(vec![(End::Through, balanced)]),
                    // It leaves as if the node had sent it (`ip_vs_xmit.c` `ip_vs_nat_send_or_cont`), but conntrack
                    // has decided on its destination.
                    false => self.rules.tables("OUTPUT", &[Table::Mangle, Table::Filter], balanced),
                })
            }),
            Hook::Output => {
                let ways = self.rules.tables("OUTPUT", &[Table::Mangle, Table::Nat], packet)?;
                let ways = then(ways, |packet| Ok(self.balance(packet)))?;
                then(ways, |packet| self.rules.tables("OUTPUT", &[Table::Filter], packet))
            }
            Hook::Prerouting | Hook::Forward | Hook::Postrouting => self.rules.pass(hook, packet),
        }
    }

    /// Of a node's address that is not this node's, the ports that rules name. IPVS asks for the way to a destination
    /// without a port.
    fn takes_in(&self, packet: &Packet) -> bool {
        let named = || self.state.links.contains(&Link::Rule(dialled(packet)));
        self.rules.is_own(packet.dst) || !packet.translated && named()
    }
}

impl Balanced<'_> {
    /// To each destination of the packet's virtual server. One without any refuses (`ip_vs_core.c` `ip_vs_leave`).
    fn balance(&self, packet: Packet) -> Vec<(End, Packet)> {
        let dialled = dialled(&packet);
        let Some(server) = self.state.servers.get(&dialled).filter(|_| !packet.translated) else {
            return vec![(End::Through, packet)];
        };
        let open = server.destinations.iter().filter(|(_, weight)| **weight > 0);
        let ways: Vec<(End, Packet)> = open
            .map(|(destination, _)| {
                let mut packet = Packet { server: Some(dialled), ..packet };
                packet.translate(*destination);
                (End::Through, packet)
            })
            .collect();
        if ways.is_empty() { vec![(End::Reject, packet)] } else { ways }
    }
}

/// What goes on goes through `step`.
fn then(
    ways: Vec<(End, Packet)>,
    step: impl Fn(Packet) -> Result<Vec<(End, Packet)>, TraceError>,
) -> Result<Vec<(End, Packet)>, TraceError> {
    let mut next = Vec::new();
    for (end, packet) in ways {
        match end {
            End::Through | End::Accept => next.extend(step(packet)?),
            End::Drop | End::Reject => next.push((end, packet)),
        }
    }
    Ok(next)
}

fn dialled(packet: &Packet) -> FrontendAddr {
    FrontendAddr { addr: packet.dst, port: packet.port, protocol: packet.protocol }
}

/// Whether these parts of a packet are an element of the set with this name.
pub(super) fn is_in_set(state: &State, name: &str, parts: &str, packet: &Packet) -> Result<bool, TraceError> {
    let no_set = || TraceError::NoSet(name.to_owned());
    let set = Set::by_name(Family::of(packet.dst), name).ok_or_else(no_set)?;
    let (method, kinds) = set.kind().split_once(':').ok_or_else(no_set)?;
    let wanted = kinds.split(',').zip(parts.split(',')).map(|(kind, direction)| {
        let addr = if direction == "src" { packet.source } else { packet.dst };
        match (kind, method) {
            ("ip", _) => Part::Text(addr.to_string()),
            ("net", _) => Part::Within(addr),
            ("port", "bitmap") => Part::Text(packet.port.to_string()),
            _ => Part::Text(format!("{}:{}", names::protocol(packet.protocol), packet.port)),
        }
    });
    let wanted: Vec<Part> = wanted.collect();
    let mut elements = state.elements.range((set, String::new())..).take_while(|(of, _)| *of == set);
    Ok(elements.any(|(_, element)| element.split(',').zip(&wanted).all(|(text, part)| part.is(text))))
}

/// What a part of an element has to be.
enum Part {
    Text(String),
    Within(IpAddr),
}

impl Part {
    fn is(&self, text: &str) -> bool {
        match self {
            Self::Text(wanted) => text == wanted,
            Self::Within(addr) => is_in_net(text, *addr),
        }
    }
}

/// ipset has a range of one address as that address.
fn is_in_net(text: &str, addr: IpAddr) -> bool {
    match text.parse::<IpAddr>() {
        Ok(only) => only == addr,
        Err(_) => text.parse::<IpNet>().is_ok_and(|net| net.contains(&addr)),
    }
}
