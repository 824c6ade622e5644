//! The way from one [`State`] to another, in an order in which nothing ever points at nothing and no port of a VIP is
//! open that should not be.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use super::{DEVICE, Link, ROUTES, RULE_PRIORITY, Server, State, names, sets::Set};
use crate::{
    model::{Family, Protocol},
    table::FrontendAddr,
};

/// Steps, in their order. Each is the input of one program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// netfilter hears of what comes.
    AddElements,
    /// Virtual servers and destinations come, change and drain.
    AddServers,
    /// Addresses and ports become local.
    Link,
    /// Addresses and ports cease to be local.
    Unlink,
    /// Virtual servers and destinations go.
    DeleteServers,
    /// netfilter forgets.
    DeleteElements,
}

impl Phase {
    /// The program that reads this step's lines, with its arguments.
    pub const fn program(self, family: Family) -> &'static [&'static str] {
        match (self, family) {
            (Self::AddElements | Self::DeleteElements, _) => &["ipset", "restore"],
            (Self::AddServers | Self::DeleteServers, _) => &["ipvsadm", "-R"],
            // What can be done is done, whatever fails before it.
            (Self::Link | Self::Unlink, Family::V4) => &["ip", "-4", "-force", "-batch", "-"],
            (Self::Link | Self::Unlink, Family::V6) => &["ip", "-6", "-force", "-batch", "-"],
        }
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// Complete as it is.
    Text(String),
    /// A route of an address that another node has; it needs an address of this node to send from, else the kernel
    /// would send from that other node's.
    Route(IpAddr),
}

/// Local routes take 64 KiB, and datagrams that need fragments further on would be sent with the order not to
/// fragment them: IPVS could only refuse them. A locked MTU sends them in fragments of Ethernet's size, and without that
/// order (`ip_dont_fragment`).
const MTU: u32 = 1500;

impl Line {
    /// The line, with the address that this node sends from to `addr`; `None` leaves that to the kernel.
    pub fn text(&self, source: impl Fn(IpAddr) -> Option<IpAddr>) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Route(addr) => {
                let source = source(*addr).map(|source| format!(" src {source}")).unwrap_or_default();
                format!("route replace local {addr} dev lo table {ROUTES} mtu lock {MTU}{source}")
            }
        }
    }
}

/// Changes of one family. Prints as the programs' input, each under its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    family: Family,
    phases: BTreeMap<Phase, Vec<Line>>,
    /// Destinations whose weight is 0 from now on, until their connections have ended.
    pub draining: BTreeSet<(FrontendAddr, SocketAddr)>,
}

impl Transaction {
    pub(super) fn new(family: Family) -> Self {
        Self { family, phases: BTreeMap::new(), draining: BTreeSet::new() }
    }

    /// What leads from `actual` to `desired`.
    pub fn between(family: Family, actual: &State, desired: &State) -> Self {
        let mut transaction = Self::new(family);
        for (set, element) in desired.elements.difference(&actual.elements) {
            transaction.element("add", *set, element, Phase::AddElements);
        }
        for (set, element) in actual.elements.difference(&desired.elements) {
            transaction.element("del", *set, element, Phase::DeleteElements);
        }
        for (addr, server) in &desired.servers {
            transaction.serve(addr, actual.servers.get(addr), server);
        }
        for addr in actual.servers.keys().filter(|addr| !desired.servers.contains_key(*addr)) {
            transaction.push(Phase::DeleteServers, format!("-D {}", service(addr)));
        }
        for link in desired.links.difference(&actual.links) {
            transaction.link(link, true);
        }
        for link in actual.links.difference(&desired.links) {
            transaction.link(link, false);
        }
        transaction
    }

    fn push(&mut self, phase: Phase, line: String) {
        self.phases.entry(phase).or_default().push(Line::Text(line));
    }

    fn element(&mut self, verb: &str, set: Set, element: &str, phase: Phase) {
        self.push(phase, format!("{verb} {} {element} -exist", set.name(self.family)));
    }

    fn serve(&mut self, addr: &FrontendAddr, actual: Option<&Server>, desired: &Server) {
        let service = service(addr);
        match actual {
            None => self.push(Phase::AddServers, format!("-A {service} {}", desired.options)),
            Some(actual) if actual.options != desired.options => {
                self.push(Phase::AddServers, format!("-E {service} {}", desired.options));
            }
            Some(_) => {}
        }
        let none = BTreeMap::new();
        let had = actual.map_or(&none, |server| &server.destinations);
        for (destination, weight) in &desired.destinations {
            let verb = match had.get(destination) {
                None => "-a",
                Some(actual) if actual != weight => "-e",
                Some(_) => continue,
            };
            self.push(Phase::AddServers, format!("{verb} {service} -r {destination} -m -w {weight}"));
        }
        for (destination, weight) in had {
            if desired.destinations.contains_key(destination) {
                continue;
            }
            // kube-proxy `graceful_termination.go`: only TCP has connections to wait for.
            if addr.protocol != Protocol::Tcp {
                self.delete_destination(addr, destination);
                continue;
            }
            if *weight != 0 {
                self.push(Phase::AddServers, format!("-e {service} -r {destination} -m -w 0"));
            }
            self.draining.insert((*addr, *destination));
        }
    }

    pub(super) fn delete_destination(&mut self, addr: &FrontendAddr, destination: &SocketAddr) {
        self.push(Phase::DeleteServers, format!("-d {} -r {destination}", service(addr)));
    }

    fn link(&mut self, link: &Link, add: bool) {
        let (phase, verb) = if add { (Phase::Link, "add") } else { (Phase::Unlink, "del") };
        match link {
            // Nobody is asked on a dummy device whether the address is free. Deprecated from the start: else the kernel
            // would masquerade with a VIP where it is nearer to the destination than the node's address (RFC 6724,
            // section 5, rules 3 and 8).
            Link::Bind(addr) if add && addr.is_ipv6() => {
                self.push(phase, format!("addr add {addr}/128 dev {DEVICE} nodad preferred_lft 0"));
            }
            Link::Bind(addr) => {
                let length = if addr.is_ipv6() { 128 } else { 32 };
                self.push(phase, format!("addr {verb} {addr}/{length} dev {DEVICE}"));
            }
            Link::Route(addr) if add => self.phases.entry(phase).or_default().push(Line::Route(*addr)),
            Link::Route(addr) => self.push(phase, format!("route del local {addr} dev lo table {ROUTES}")),
            Link::Rule(addr) => {
                let protocol = names::protocol(addr.protocol);
                let to = format!("to {} ipproto {protocol} dport {}", addr.addr, addr.port);
                self.push(phase, format!("rule {verb} pref {RULE_PRIORITY} {to} lookup {ROUTES}"));
            }
        }
    }

    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.phases.is_empty()
    }

    /// Of which family.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The steps in their order.
    pub fn phases(&self) -> impl Iterator<Item = (Phase, &[Line])> {
        self.phases.iter().map(|(phase, lines)| (*phase, lines.as_slice()))
    }

    fn count(&self, counted: impl Fn(Phase) -> bool) -> usize {
        self.phases.iter().filter(|(phase, _)| counted(**phase)).map(|(_, lines)| lines.len()).sum()
    }

    /// Lines that write something.
    pub fn upserts(&self) -> usize {
        self.count(|phase| phase <= Phase::Link)
    }

    /// Lines that remove something.
    pub fn deletes(&self) -> usize {
        self.count(|phase| phase > Phase::Link)
    }

    /// The programs' input, each under its name as a comment.
    pub fn text(&self, source: impl Fn(IpAddr) -> Option<IpAddr> + Copy) -> String {
        let mut text = String::new();
        for (phase, lines) in self.phases() {
            text += &format!("# {}\n", phase.program(self.family).join(" "));
            lines.iter().for_each(|line| text += &format!("{}\n", line.text(source)));
        }
        text
    }
}

impl fmt::Display for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text(|_| None))
    }
}

/// A virtual server as ipvsadm names it.
fn service(addr: &FrontendAddr) -> String {
    let protocol = match addr.protocol {
        Protocol::Tcp => "-t",
        Protocol::Udp => "-u",
        Protocol::Sctp => "--sctp-service",
    };
    format!("{protocol} {}", SocketAddr::new(addr.addr, addr.port))
}
