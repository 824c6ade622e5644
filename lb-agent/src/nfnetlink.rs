//! netfilter's netlink: messages, and what nftables has, as far as that is asked for often. nft itself lists all tables with all
//! that is in them to answer whatever is asked (1.0.6), which takes seconds where there are thousands of services.
//!
//! `include/uapi/linux/netfilter/nfnetlink.h`, `linux/netfilter/nf_tables.h`. Numbers in attributes are in network order.

use std::io;

use lb_core::model::Family;
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::nlmsg::{ACK, DUMP, Link, REQUEST, find, listed, plain};

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
/// `NFT_MSG_GETTABLE`, `NFTA_TABLE_NAME`, `NFTA_TABLE_HANDLE`.
const GET_TABLE: u16 = 1;
const TABLE_NAME: u16 = 1;
const TABLE_HANDLE: u16 = 4;
/// `NFT_MSG_GETCHAIN`, `NFTA_CHAIN_TABLE`, `NFTA_CHAIN_NAME`.
const GET_CHAIN: u16 = 4;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
/// `NFT_MSG_GETRULE`, `NFTA_RULE_TABLE`, `NFTA_RULE_CHAIN`.
const GET_RULE: u16 = 7;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;

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

/// The handle of a table of nftables, if there is one of this name.
pub fn table(family: Family, name: &str) -> io::Result<Option<u64>> {
    let mut handle = None;
    let is_there = is_there(family, GET_TABLE, &string(TABLE_NAME, name), |payload| {
        handle = find(payload, TABLE_HANDLE).and_then(|bytes| bytes.first_chunk()).copied();
    })?;
    match handle {
        _ if !is_there => Ok(None),
        Some(bytes) => Ok(Some(u64::from_be_bytes(bytes))),
        None => Err(io::Error::other("the kernel tells no handle")),
    }
}

/// There is a chain of this name in a table of nftables.
pub fn has_chain(family: Family, table: &str, chain: &str) -> io::Result<bool> {
    let body = [string(CHAIN_TABLE, table), string(CHAIN_NAME, chain)].concat();
    is_there(family, GET_CHAIN, &body, |_| {})
}

/// A rule of a chain names this set or map. Without the chain there is none.
pub fn chain_uses(family: Family, table: &str, chain: &str, set: &str) -> io::Result<bool> {
    let body = [string(RULE_TABLE, table), string(RULE_CHAIN, chain)].concat();
    // As its attribute is, whatever expressions it lies in.
    let named = string(SET_NAME, set);
    let listed = listed(|| {
        let mut netfilter = Netfilter::open()?;
        netfilter.send(NFTABLES | GET_RULE, REQUEST | DUMP, family, &body)?;
        let mut uses = false;
        netfilter.receive(|_, payload| uses |= payload.windows(named.len()).any(|bytes| bytes == named))?;
        Ok(uses)
    });
    absent_is_none(listed).map(|uses| uses == Some(true))
}

/// `NFTA_LOOKUP_SET`, in the expression `lookup` of a rule.
const SET_NAME: u16 = 1;

/// Asks for one object, and hands over its attributes if it is there.
fn is_there(family: Family, what: u16, body: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<bool> {
    let mut netfilter = Netfilter::open()?;
    netfilter.send(NFTABLES | what, REQUEST | ACK, family, body)?;
    absent_is_none(netfilter.receive(|_, payload| take(payload))).map(|found| found.is_some())
}

fn absent_is_none<T>(answered: io::Result<T>) -> io::Result<Option<T>> {
    match answered {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        answered => answered.map(Some),
    }
}

/// A string as the kernel takes it, with the zero that ends it.
fn string(kind: u16, text: &str) -> Vec<u8> {
    plain(kind, &[text.as_bytes(), &[0]].concat())
}

fn number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}
