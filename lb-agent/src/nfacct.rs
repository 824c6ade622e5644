//! nfacct: counters with names, which rules count packets in.
//!
//! Messages and attributes are those of `include/uapi/linux/netfilter/nfnetlink_acct.h`. A kernel without
//! `CONFIG_NETFILTER_NETLINK_ACCT` answers every message with an error.

use std::io;

use lb_core::model::Family;

use crate::{
    nfnetlink::Netfilter,
    nlmsg::{ACK, CREATE, REQUEST, find, plain},
};

/// `NFNL_SUBSYS_ACCT`, as the high byte of a message's type; the low byte is what is asked (`NFNL_MSG_ACCT_*`).
const SUBSYSTEM: u16 = 7 << 8;
const NEW: u16 = 0;
const GET: u16 = 1;
const DELETE: u16 = 3;

/// `NFACCT_*`.
const NAME: u16 = 1;
const PACKETS: u16 = 2;

/// The counters of this network namespace. Rules of both families use the same.
pub struct Counters(Netfilter);

impl Counters {
    /// Opens a socket to them.
    pub fn open() -> io::Result<Self> {
        Netfilter::open().map(Self)
    }

    /// Makes a counter at 0; one that is there goes on counting.
    pub fn make(&mut self, name: &str) -> io::Result<()> {
        match self.ask(NEW, CREATE, name) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST)) => Ok(()),
            made => made.map(drop),
        }
    }

    /// Packets that a counter has seen; `None` if there is no such counter.
    pub fn packets(&mut self, name: &str) -> io::Result<Option<u64>> {
        match self.ask(GET, 0, name) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            answered => answered.map(Some),
        }
    }

    /// Removes a counter, unless a rule uses it; says whether it is gone.
    pub fn remove(&mut self, name: &str) -> io::Result<bool> {
        match self.ask(DELETE, 0, name) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(true),
            removed => removed.map(|_| true),
        }
    }

    /// Returns the packets of the counter that the answer is about; without one, 0.
    fn ask(&mut self, what: u16, flags: u16, name: &str) -> io::Result<u64> {
        // Any family will do.
        self.0.send(SUBSYSTEM | what, REQUEST | ACK | flags, Family::V4, &named(name))?;
        let mut packets = 0;
        self.0.receive(|_, payload| packets = counted(payload).unwrap_or(packets))?;
        Ok(packets)
    }
}

/// A counter's name as the kernel takes it, with the zero that ends it.
fn named(name: &str) -> Vec<u8> {
    plain(NAME, &[name.as_bytes(), &[0]].concat())
}

/// What a message says of a counter's packets.
fn counted(payload: &[u8]) -> Option<u64> {
    find(payload, PACKETS)?.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_read_among_other_attributes() {
        let packets = plain(PACKETS, &258u64.to_be_bytes());
        let bytes = plain(3, &[9; 8]);
        assert_eq!(counted(&[named("x"), packets.clone(), bytes.clone()].concat()), Some(258));
        assert_eq!(counted(&[named("x"), bytes].concat()), None);
        assert_eq!(counted(&packets[..8]), None, "truncated");
        assert_eq!(named("abc"), [8, 0, 1, 0, b'a', b'b', b'c', 0]);
    }
}
