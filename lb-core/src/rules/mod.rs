//! Rules of the netfilter datapaths: what they say, apart from how they are written and loaded.
//!
//! A [`Rule`] prints as the line kube-proxy would write for `iptables-restore`.

mod facts;
pub mod incremental;
pub mod iptables;
pub mod ipvs;
pub mod names;
pub mod nftables;
#[cfg(test)]
mod tests;
pub mod trace;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use crate::{model::Protocol, table::FrontendAddr};

/// One rule: all matches hold, then the target. Matches print in their order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// Conditions.
    pub matches: Vec<Match>,
    /// What then; `None` goes on with the next rule.
    pub target: Option<Target>,
}

/// A condition of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Match {
    /// Holds always; for readers.
    Comment(String),
    /// The IP protocol.
    Protocol(Protocol),
    /// Destination address.
    Dst(Net),
    /// Not this destination.
    NotDst(Net),
    /// Source address.
    Src(Net),
    /// Not this source.
    NotSrc(Net),
    /// The device it came in from; `+` at the end stands for anything.
    From(Arc<str>),
    /// Some other device, or none.
    NotFrom(Arc<str>),
    /// Destination port; needs [`Match::Protocol`] before it.
    DstPort(u16),
    /// The destination is an address of this node.
    DstLocal,
    /// The source is an address of this node.
    SrcLocal,
    /// The source is no address of this node.
    SrcNotLocal,
    /// The packet did not enter through a port of a bridge.
    NotFromBridgePort,
    /// The mark's bits under the mask equal the value: value, mask.
    Mark(u32, u32),
    /// They don't.
    NotMark(u32, u32),
    /// One of these conntrack states.
    CtState(&'static str),
    /// None of these conntrack states.
    NotCtState(&'static str),
    /// One packet in so many, at random.
    OneOf(usize),
    /// The source is in this list of recent sources and was seen within so many seconds.
    RecentlySeen(Arc<str>, u32),
    /// Holds always, and puts the source into this list of recent sources.
    RememberSource(Arc<str>),
    /// Parts of the packet are an element of this ipset: set, parts.
    InSet(Arc<str>, &'static str),
    /// Holds always, and counts the packet in this counter of nfacct, which has to be there.
    Counted(&'static str),
    /// IPVS took the packet for this virtual server.
    VirtualServer(FrontendAddr),
}

/// An address, or a range of them; they print as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Net {
    /// One address, printed without prefix length.
    Addr(IpAddr),
    /// A range, printed with prefix length even if it is one address.
    Range(IpNet),
}

/// Where a packet goes when all matches hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Another chain, and back when that ends.
    Jump(Arc<str>),
    /// Let it pass this table.
    Accept,
    /// Throw it away in silence.
    Drop,
    /// Throw it away and tell the sender.
    Reject,
    /// Back to the calling chain.
    Return,
    /// Set these bits of the mark.
    MarkOr(u32),
    /// Flip these bits of the mark.
    MarkXor(u32),
    /// Rewrite the source to the outgoing device's address; at a random port if so told.
    Masquerade {
        /// `--random-fully`.
        random: bool,
    },
    /// Rewrite the destination.
    Dnat(SocketAddr),
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(addr) => addr.fmt(f),
            Self::Range(net) => net.fmt(f),
        }
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Comment(text) if text.contains(' ') => write!(f, "-m comment --comment \"{text}\""),
            Self::Comment(text) => write!(f, "-m comment --comment {text}"),
            Self::Protocol(protocol) => {
                let name = names::protocol(*protocol);
                write!(f, "-m {name} -p {name}")
            }
            Self::Dst(net) => write!(f, "-d {net}"),
            Self::NotDst(net) => write!(f, "! -d {net}"),
            Self::Src(net) => write!(f, "-s {net}"),
            Self::NotSrc(net) => write!(f, "! -s {net}"),
            Self::From(device) => write!(f, "-i {device}"),
            Self::NotFrom(device) => write!(f, "! -i {device}"),
            Self::DstPort(port) => write!(f, "--dport {port}"),
            Self::DstLocal => f.write_str("-m addrtype --dst-type LOCAL"),
            Self::SrcLocal => f.write_str("-m addrtype --src-type LOCAL"),
            Self::SrcNotLocal => f.write_str("-m addrtype ! --src-type LOCAL"),
            Self::NotFromBridgePort => f.write_str("-m physdev ! --physdev-is-in"),
            Self::Mark(value, mask) => write!(f, "-m mark --mark {value:#x}/{mask:#x}"),
            Self::NotMark(value, mask) => write!(f, "-m mark ! --mark {value:#x}/{mask:#x}"),
            Self::CtState(states) => write!(f, "-m conntrack --ctstate {states}"),
            Self::NotCtState(states) => write!(f, "-m conntrack ! --ctstate {states}"),
            // kube-proxy `computeProbability`: ten digits.
            Self::OneOf(n) => {
                write!(f, "-m statistic --mode random --probability {:.10}", 1.0 / *n as f64)
            }
            Self::RecentlySeen(list, seconds) => {
                write!(f, "-m recent --name {list} --rcheck --seconds {seconds} --reap")
            }
            Self::RememberSource(list) => write!(f, "-m recent --name {list} --set"),
            Self::InSet(set, parts) => write!(f, "-m set --match-set {set} {parts}"),
            Self::Counted(counter) => write!(f, "-m nfacct --nfacct-name {counter}"),
            Self::VirtualServer(FrontendAddr { addr, port, protocol }) => {
                let protocol = names::protocol(*protocol);
                write!(f, "-m ipvs --vaddr {addr} --vproto {protocol} --vport {port}")
            }
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Jump(chain) => write!(f, "-j {chain}"),
            Self::Accept => f.write_str("-j ACCEPT"),
            Self::Drop => f.write_str("-j DROP"),
            Self::Reject => f.write_str("-j REJECT"),
            Self::Return => f.write_str("-j RETURN"),
            Self::MarkOr(bits) => write!(f, "-j MARK --or-mark {bits:#x}"),
            Self::MarkXor(bits) => write!(f, "-j MARK --xor-mark {bits:#x}"),
            Self::Masquerade { random: false } => f.write_str("-j MASQUERADE"),
            Self::Masquerade { random: true } => f.write_str("-j MASQUERADE --random-fully"),
            Self::Dnat(to) => write!(f, "-j DNAT --to-destination {to}"),
        }
    }
}

impl fmt::Display for Rule {
    /// The rule without the chain it belongs to.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for one in &self.matches {
            if !std::mem::take(&mut first) {
                f.write_str(" ")?;
            }
            one.fmt(f)?;
        }
        match &self.target {
            Some(target) if first => target.fmt(f),
            Some(target) => write!(f, " {target}"),
            None => Ok(()),
        }
    }
}
