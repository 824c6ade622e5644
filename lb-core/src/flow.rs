//! One connection attempt and what a node makes of it: the words that [`crate::oracle`], [`crate::evaluate`] and
//! [`crate::rules::trace`] share, so that their answers can be compared.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
};

use crate::model::Protocol;

/// How a node handles traffic to services; the modes differ on purpose here and there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dialect {
    /// The eBPF programs.
    Ebpf,
    /// kube-proxy's iptables mode.
    Iptables,
    /// kube-proxy's nftables mode.
    Nftables,
    /// kube-proxy's IPVS mode, without the addresses of nodes.
    Ipvs,
}

impl Dialect {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ebpf, Self::Iptables, Self::Nftables, Self::Ipvs];
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ebpf => "ebpf",
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
            Self::Ipvs => "ipvs",
        })
    }
}

/// Where a connection attempt comes from, as the node that handles it sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// Another machine, or a pod on one.
    Outside,
    /// A packet of one of this node's pods.
    Pod,
    /// A socket call of one of this node's pods. Only eBPF sees it; to netfilter it is a packet like any other.
    PodSocket,
    /// A process in this node's own network namespace.
    Node,
}

/// The first packet of a connection, or the socket call that would send it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Where it comes from.
    pub origin: Origin,
    /// Its source; for [`Origin::Node`] the one that routing would choose.
    pub source: IpAddr,
    /// The address that is dialled, of the source's family.
    pub dst: IpAddr,
    /// The port that is dialled.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dialled = SocketAddr::new(self.dst, self.port);
        write!(f, "{:?} {} -> {dialled}/{}", self.origin, self.source, self.protocol)
    }
}

/// Whom the backend sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// The client.
    Kept,
    /// The node.
    Masqueraded,
}

/// What becomes of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Any of these backends may serve it; each with whom it would see.
    Serve(BTreeMap<SocketAddr, Source>),
    /// Refused, and the client is told.
    Reject,
    /// Thrown away in silence.
    Drop,
    /// Not for a service: it goes where it would without us.
    Pass,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backends = match self {
            Self::Serve(backends) => backends,
            Self::Reject => return f.write_str("reject"),
            Self::Drop => return f.write_str("drop"),
            Self::Pass => return f.write_str("pass"),
        };
        f.write_str("served by")?;
        for (backend, source) in backends {
            let seen = if *source == Source::Kept { "the client" } else { "the node" };
            write!(f, " {backend} (sees {seen})")?;
        }
        Ok(())
    }
}
