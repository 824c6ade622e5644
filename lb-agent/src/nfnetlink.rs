//! netfilter's netlink: messages, and the generation of nftables' ruleset.
//!
//! `include/uapi/linux/netfilter/nfnetlink.h`, `linux/netfilter/nf_tables.h`. Numbers in attributes are in network order.

use std::io;

use lb_core::model::Family;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::nlmsg::{ACK, Link, REQUEST, find};

/// Length of the nfnetlink header, which follows the message's.
const NF_HEADER: usize = 4;

/// A socket to netfilter in this network namespace.
pub struct Netfilter(Link);

impl Netfilter {
    /// Opens it.
    pub fn open() -> io::Result<Self> {
        Link::open(NETLINK_NETFILTER).map(Self)
    }

    /// Sends a message of this type: subsystem in the high byte, what is asked in the low one.
    pub fn send(&mut self, kind: u16, flags: u16, family: Family, body: &[u8]) -> io::Result<()> {
        let mut payload = vec![number(family), 0, 0, 0];
        payload.extend(body);
        self.0.send(kind, flags, &payload)
    }

    /// Hands over type and attributes of each message of the answer, as [`Link::receive`] does.
    pub fn receive(&self, mut take: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.0.receive(|kind, payload| take(kind, payload.get(NF_HEADER..).unwrap_or_default()))
    }
}

/// `NFNL_SUBSYS_NFTABLES`, and `NFT_MSG_GETGEN` with its attribute `NFTA_GEN_ID`.
const NFTABLES: u16 = 10 << 8;
const GET_GENERATION: u16 = 16;
const GENERATION: u16 = 1;

/// The generation of nftables' ruleset: another one after every transaction, whoever's.
pub fn generation() -> io::Result<u32> {
    let mut netfilter = Netfilter::open()?;
    netfilter.send(NFTABLES | GET_GENERATION, REQUEST | ACK, Family::V4, &[])?;
    let mut generation = None;
    netfilter.receive(|_, payload| {
        let id = find(payload, GENERATION).and_then(|id| id.first_chunk());
        generation = generation.or(id.map(|id| u32::from_be_bytes(*id)));
    })?;
    generation.ok_or_else(|| io::Error::other("the kernel tells no generation"))
}

fn number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}
