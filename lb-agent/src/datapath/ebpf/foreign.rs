//! Connections that netfilter translated before this datapath served: they are left to it until they end.
//!
//! A UDP flow would be broken by another choice of backend, and a masqueraded connection by a new flow whose replies come
//! to the same address and port. (TCP segments in mid-stream are left to netfilter anyway.)

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use aya::maps::{HashMap, MapData};
use lb_common::{
    abi::{Addr4, Addr6, FlowKey, direction},
    net::PROTO_UDP,
};
use lb_core::{
    model::{Family, Protocol},
    table::{FrontendAddr, ServiceTable},
};
use tracing::{info, warn};

use super::maps::{Pins, Wire, WireAddr, map_error, open_foreign};
use crate::{
    conntrack::{Conntrack, Entry, Tuple},
    datapath::DatapathError,
};

/// The map of one family.
pub type ForeignMap<A> = HashMap<MapData, Wire<FlowKey<A>>, u32>;

/// Both families' maps, and what is in them.
pub struct Foreign {
    v4: ForeignMap<Addr4>,
    v6: ForeignMap<Addr6>,
    marks: BTreeSet<Tuple>,
}

impl Foreign {
    /// Takes over the pinned maps.
    pub fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let (v4, v6) = open_foreign(pins)?;
        Ok(Self { v4, v6, marks: BTreeSet::new() })
    }

    /// Marks netfilter's connections to this table's frontends. To be called before the programs know the frontends.
    pub fn import(&mut self, table: &ServiceTable) -> Result<(), DatapathError> {
        let v4 = self.v4.keys().filter_map(Result::ok).map(|Wire(key)| tuple(&key));
        let v6 = self.v6.keys().filter_map(Result::ok).map(|Wire(key)| tuple(&key));
        self.marks = v4.chain(v6).collect();
        let connections = self.keep(table);
        if connections > 0 {
            info!(connections, "are left to netfilter, which translates them");
        }
        Ok(())
    }

    /// Unmarks connections that have ended. A UDP flow whose backend serves no more is ended here: its next datagram
    /// chooses anew.
    pub fn reconcile(&mut self, table: &ServiceTable) {
        if !self.marks.is_empty() {
            self.keep(table);
        }
    }

    /// Returns how many connections are netfilter's.
    fn keep(&mut self, table: &ServiceTable) -> usize {
        let (mut desired, mut connections) = (BTreeSet::new(), 0);
        for family in [Family::V4, Family::V6] {
            // A kernel without conntrack translates nothing.
            let Ok(mut conntrack) = Conntrack::open() else { continue };
            let Ok(entries) = conntrack.list(family) else { continue };
            for entry in entries.iter().filter(|entry| is_ours(table, entry)) {
                if entry.orig.proto != PROTO_UDP || serves(table, entry) {
                    connections += 1;
                    desired.extend(marks(entry));
                } else if let Err(error) = conntrack.forget(&entry.orig) {
                    warn!(%error, client = %entry.orig.src, frontend = %entry.orig.dst, "a flow to a backend that is gone can't be ended");
                }
            }
        }
        let actual = std::mem::take(&mut self.marks);
        actual.difference(&desired).for_each(|mark| self.unmark(mark));
        let mut refused = 0;
        for mark in desired {
            match actual.contains(&mark) || self.mark(&mark).is_ok() {
                true => drop(self.marks.insert(mark)),
                false => refused += 1,
            }
        }
        if refused > 0 {
            warn!(
                refused,
                "LB_FOREIGN is full: UDP flows may get another backend, masqueraded connections be mixed up"
            );
        }
        connections
    }

    /// Leaves these packets to netfilter.
    pub fn mark(&mut self, mark: &Tuple) -> Result<(), DatapathError> {
        let marked = match (key::<Addr4>(mark), key::<Addr6>(mark)) {
            (Some(key), _) => self.v4.insert(key, 0, 0),
            (_, Some(key)) => self.v6.insert(key, 0, 0),
            (None, None) => Ok(()),
        };
        marked.map_err(|source| map_error("update", "LB_FOREIGN", source))
    }

    /// Takes them back.
    pub fn unmark(&mut self, mark: &Tuple) {
        // It may not have fitted in.
        match (key::<Addr4>(mark), key::<Addr6>(mark)) {
            (Some(key), _) => drop(self.v4.remove(&key)),
            (_, Some(key)) => drop(self.v6.remove(&key)),
            (None, None) => {}
        }
    }
}

/// What the programs may see of a connection: a client's datagrams, as packets show them and as an unconnected socket
/// does, which has a port but no address; and replies to where it was masqueraded to.
fn marks(entry: &Entry) -> impl Iterator<Item = Tuple> {
    let any: IpAddr = match entry.orig.src {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let of_socket = Tuple { src: SocketAddr::new(any, entry.orig.src.port()), ..entry.orig };
    let is_udp = entry.orig.proto == PROTO_UDP;
    let is_masqueraded = entry.reply.dst != entry.orig.src;
    let datagrams = [entry.orig, of_socket].into_iter().filter(move |_| is_udp);
    datagrams.chain(is_masqueraded.then_some(entry.reply))
}

fn key<A: WireAddr>(mark: &Tuple) -> Option<Wire<FlowKey<A>>> {
    Some(Wire(FlowKey {
        saddr: A::from_ip(mark.src.ip())?,
        daddr: A::from_ip(mark.dst.ip())?,
        sport: mark.src.port(),
        dport: mark.dst.port(),
        proto: mark.proto,
        direction: direction::IN,
        pad: 0,
    }))
}

fn tuple<A: WireAddr>(key: &FlowKey<A>) -> Tuple {
    Tuple {
        src: SocketAddr::new(key.saddr.to_ip(), key.sport),
        dst: SocketAddr::new(key.daddr.to_ip(), key.dport),
        proto: key.proto,
    }
}

/// netfilter translates it on its way to one of our frontends.
fn is_ours(table: &ServiceTable, entry: &Entry) -> bool {
    entry.dst_nat && frontend(entry).is_some_and(|frontend| table.frontends.contains_key(&frontend))
}

fn frontend(entry: &Entry) -> Option<FrontendAddr> {
    let protocol = Protocol::from_number(entry.orig.proto)?;
    Some(FrontendAddr { addr: entry.orig.dst.ip(), port: entry.orig.dst.port(), protocol })
}

/// The backend that answers this flow is one of its service port's.
fn serves(table: &ServiceTable, entry: &Entry) -> bool {
    let found = frontend(entry).and_then(|frontend| table.frontends.get(&frontend));
    let service = found.and_then(|frontend| table.services.get(&frontend.service));
    let answers = (entry.reply.src.ip(), entry.reply.src.port());
    service.is_some_and(|service| service.in_use().any(|endpoint| endpoint == answers))
}

/// How many connections to this table's frontends netfilter translates; 0 if there is no telling.
pub fn translated(table: &ServiceTable) -> u64 {
    let of_family = |family| {
        let entries = Conntrack::open().and_then(|mut conntrack| conntrack.list(family)).unwrap_or_default();
        entries.iter().filter(|entry| is_ours(table, entry)).count() as u64
    };
    of_family(Family::V4) + of_family(Family::V6)
}
