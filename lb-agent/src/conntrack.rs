//! Netfilter's connections, by ctnetlink: which of them it translates, and a word in when they end.
//!
//! Messages and attributes are those of `include/uapi/linux/netfilter/nfnetlink_conntrack.h`. Connections in zones of
//! their own are left out: they are somebody else's.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use lb_common::net::PROTO_TCP;
use lb_core::model::Family;

use crate::{
    nfnetlink::Netfilter,
    nlmsg::{ACK, CREATE, DUMP, REQUEST, find, listed, nested, plain},
};

/// `NFNL_SUBSYS_CTNETLINK`, as the high byte of a message's type; the low byte is what is asked.
const SUBSYSTEM: u16 = 1 << 8;
const NEW: u16 = 0;
const GET: u16 = 1;
const DELETE: u16 = 2;

/// `CTA_*`.
mod attribute {
    pub const TUPLE_ORIG: u16 = 1;
    pub const TUPLE_REPLY: u16 = 2;
    pub const STATUS: u16 = 3;
    pub const PROTOINFO: u16 = 4;
    pub const TIMEOUT: u16 = 7;
    pub const ZONE: u16 = 18;
    /// In a tuple.
    pub const TUPLE_IP: u16 = 1;
    pub const TUPLE_PROTO: u16 = 2;
    /// In its addresses.
    pub const V4_SRC: u16 = 1;
    pub const V4_DST: u16 = 2;
    pub const V6_SRC: u16 = 3;
    pub const V6_DST: u16 = 4;
    /// In its protocol.
    pub const PROTO_NUM: u16 = 1;
    pub const PROTO_SRC_PORT: u16 = 2;
    pub const PROTO_DST_PORT: u16 = 3;
    /// In the protocol's state.
    pub const PROTOINFO_TCP: u16 = 1;
    pub const TCP_STATE: u16 = 1;
}

/// `IPS_*` (`include/uapi/linux/netfilter/nf_conntrack_common.h`).
const SEEN_REPLY: u32 = 1 << 1;
const ASSURED: u32 = 1 << 2;
/// The kernel sets it before it compares what is asked for, and lets nobody take it away.
const CONFIRMED: u32 = 1 << 3;
const DST_NAT: u32 = 1 << 5;

/// `TCP_CONNTRACK_ESTABLISHED` (`include/uapi/linux/netfilter/nf_conntrack_tcp.h`).
const TCP_ESTABLISHED: u8 = 3;

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple {
    /// Source.
    pub src: SocketAddr,
    /// Destination.
    pub dst: SocketAddr,
    /// IP protocol number.
    pub proto: u8,
}

/// A connection of TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Packets of the side that began, as they come in.
    pub orig: Tuple,
    /// Packets of the other side, as they come in: what differs from `orig` is translated.
    pub reply: Tuple,
    /// The destination is translated.
    pub dst_nat: bool,
}

/// Connections that were asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// Those of them that the kernel told of.
    pub entries: Vec<Entry>,
    /// It told of all: nothing was interrupted.
    pub is_whole: bool,
}

impl Found {
    fn of(entries: Vec<Entry>, listed: io::Result<()>) -> io::Result<Self> {
        match listed {
            Ok(()) => Ok(Self { entries, is_whole: true }),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Self { entries, is_whole: false }),
            Err(error) => Err(error),
        }
    }
}

/// Of a list that is not whole.
pub fn interrupted() -> io::Error {
    io::Error::new(
        io::ErrorKind::Interrupted,
        "the kernel's list of connections changed each time it was read",
    )
}

/// The kernel's table of connections, of this network namespace.
pub struct Conntrack(Netfilter);

impl Conntrack {
    /// Opens a socket to it.
    pub fn open() -> io::Result<Self> {
        Netfilter::open().map(Self)
    }

    /// All TCP and UDP connections of a family.
    pub fn list(&mut self, family: Family) -> io::Result<Vec<Entry>> {
        let found = self.find(family, |_| true)?;
        match found.is_whole {
            true => Ok(found.entries),
            false => Err(interrupted()),
        }
    }

    /// Those connections of a family that are wanted; the others take no memory. A list that is not whole is asked for
    /// again, some times, and then taken as it is.
    pub fn find(&mut self, family: Family, wanted: impl Fn(&Entry) -> bool) -> io::Result<Found> {
        let mut entries = Vec::new();
        let listed = listed(|| {
            self.0.send(SUBSYSTEM | GET, REQUEST | DUMP, family, &[])?;
            entries.clear();
            self.0.receive(|kind, payload| {
                if kind == SUBSYSTEM | NEW {
                    entries.extend(parse(payload).filter(&wanted));
                }
            })
        });
        Found::of(entries, listed)
    }

    /// Forgets a connection; its next packet begins a new one.
    pub fn forget(&mut self, orig: &Tuple) -> io::Result<()> {
        self.0.send(
            SUBSYSTEM | DELETE,
            REQUEST | ACK,
            family(orig),
            &nested(attribute::TUPLE_ORIG, &tuple(orig)),
        )?;
        match self.0.receive(|_, _| {}) {
            // It has ended meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            result => result,
        }
    }

    /// Makes netfilter believe in an untranslated connection for so many seconds: none that it translates gets these
    /// addresses and ports.
    pub fn hold(&mut self, orig: &Tuple, secs: u32) -> io::Result<()> {
        let back = Tuple { src: orig.dst, dst: orig.src, proto: orig.proto };
        let mut body = nested(attribute::TUPLE_ORIG, &tuple(orig));
        body.extend(nested(attribute::TUPLE_REPLY, &tuple(&back)));
        body.extend(plain(attribute::STATUS, &(SEEN_REPLY | ASSURED | CONFIRMED).to_be_bytes()));
        body.extend(plain(attribute::TIMEOUT, &secs.to_be_bytes()));
        if orig.proto == PROTO_TCP {
            let state = plain(attribute::TCP_STATE, &[TCP_ESTABLISHED]);
            body.extend(nested(attribute::PROTOINFO, &nested(attribute::PROTOINFO_TCP, &state)));
        }
        self.0.send(SUBSYSTEM | NEW, REQUEST | ACK | CREATE, family(orig), &body)?;
        self.0.receive(|_, _| {})
    }
}

fn family(tuple: &Tuple) -> Family {
    Family::of(tuple.dst.ip())
}

/// A connection from its attributes; `None` for other protocols than TCP and UDP, and for other zones.
fn parse(payload: &[u8]) -> Option<Entry> {
    if find(payload, attribute::ZONE).is_some() {
        return None;
    }
    let word = |kind| find(payload, kind)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
    let status = word(attribute::STATUS)?;
    Some(Entry {
        orig: parse_tuple(find(payload, attribute::TUPLE_ORIG)?)?,
        reply: parse_tuple(find(payload, attribute::TUPLE_REPLY)?)?,
        dst_nat: status & DST_NAT != 0,
    })
}

fn parse_tuple(payload: &[u8]) -> Option<Tuple> {
    let (ip, proto) = (find(payload, attribute::TUPLE_IP)?, find(payload, attribute::TUPLE_PROTO)?);
    let addr = |v4, v6| {
        let v4 = find(ip, v4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()).map(IpAddr::from);
        v4.or_else(|| find(ip, v6).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()).map(IpAddr::from))
    };
    let port = |kind| find(proto, kind)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes));
    Some(Tuple {
        src: SocketAddr::new(addr(attribute::V4_SRC, attribute::V6_SRC)?, port(attribute::PROTO_SRC_PORT)?),
        dst: SocketAddr::new(addr(attribute::V4_DST, attribute::V6_DST)?, port(attribute::PROTO_DST_PORT)?),
        proto: *find(proto, attribute::PROTO_NUM)?.first()?,
    })
}

/// A tuple's attributes.
fn tuple(tuple: &Tuple) -> Vec<u8> {
    let addr = |v4, v6, addr| match addr {
        IpAddr::V4(addr) => plain(v4, &addr.octets()),
        IpAddr::V6(addr) => plain(v6, &addr.octets()),
    };
    let mut ip = addr(attribute::V4_SRC, attribute::V6_SRC, tuple.src.ip());
    ip.extend(addr(attribute::V4_DST, attribute::V6_DST, tuple.dst.ip()));
    let mut proto = plain(attribute::PROTO_NUM, &[tuple.proto]);
    proto.extend(plain(attribute::PROTO_SRC_PORT, &tuple.src.port().to_be_bytes()));
    proto.extend(plain(attribute::PROTO_DST_PORT, &tuple.dst.port().to_be_bytes()));
    let mut both = nested(attribute::TUPLE_IP, &ip);
    both.extend(nested(attribute::TUPLE_PROTO, &proto));
    both
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(orig: &Tuple, reply: &Tuple, status: u32) -> Vec<u8> {
        let mut body = nested(attribute::TUPLE_ORIG, &tuple(orig));
        body.extend(nested(attribute::TUPLE_REPLY, &tuple(reply)));
        body.extend(plain(attribute::STATUS, &status.to_be_bytes()));
        body
    }

    fn between(src: &str, dst: &str) -> Tuple {
        Tuple { src: src.parse().unwrap(), dst: dst.parse().unwrap(), proto: 17 }
    }

    #[test]
    fn connections_are_read_as_they_are_written() {
        for (orig, reply) in [
            (between("192.0.2.9:4000", "10.96.0.10:53"), between("10.244.2.11:5353", "192.0.2.11:1024")),
            (between("[2001:db8::9]:4000", "[fd00::10]:53"), between("[fd00::2]:5353", "[2001:db8::9]:4000")),
        ] {
            let read = parse(&entry(&orig, &reply, DST_NAT)).unwrap();
            assert_eq!(read, Entry { orig, reply, dst_nat: true });
        }
    }

    #[test]
    fn zones_of_their_own_and_other_protocols_are_left_out() {
        let (orig, reply) = (between("192.0.2.9:1", "10.96.0.10:2"), between("10.244.2.11:2", "192.0.2.9:1"));
        let mut zoned = entry(&orig, &reply, DST_NAT);
        assert!(parse(&zoned).is_some());
        zoned.extend(plain(attribute::ZONE, &7u16.to_be_bytes()));
        assert_eq!(parse(&zoned), None);
        // ICMP has no ports.
        let ip = nested(attribute::TUPLE_IP, &plain(attribute::V4_SRC, &[192, 0, 2, 9]));
        assert_eq!(parse(&nested(attribute::TUPLE_ORIG, &ip)), None);
    }

    #[test]
    fn a_list_that_is_not_whole_is_taken_as_it_is() {
        let orig = between("192.0.2.9:1", "10.96.0.10:2");
        let entries = vec![Entry { orig, reply: orig, dst_nat: true }];
        let of = |listed| Found::of(entries.clone(), listed).map_err(|error| error.kind());
        assert_eq!(of(Ok(())), Ok(Found { entries: entries.clone(), is_whole: true }));
        assert_eq!(of(Err(interrupted())), Ok(Found { entries: entries.clone(), is_whole: false }));
        let denied = io::ErrorKind::PermissionDenied;
        assert_eq!(of(Err(denied.into())), Err(denied));
    }

    #[test]
    fn truncated_messages_end_the_reading() {
        let whole = entry(&between("192.0.2.9:1", "10.96.0.10:2"), &between("10.0.0.1:2", "192.0.2.9:1"), 0);
        for len in 0..whole.len() {
            let _ = parse(&whole[..len]);
        }
    }
}
