//! Every way to a service, as a table: who dials what, and what must come of it in each mode.
//!
//! The same rows are asked on paper (`tests/flow_table.rs`: the reference, the compiled table, the rules) and with real
//! sockets ([`check_all`], from netns tests). Where modes differ on purpose the row says so.

mod cases;
mod cluster;
mod live;
mod paper;

use std::{fmt, net::SocketAddr};

pub use cases::cases;
pub use cluster::{CLUSTER_CIDR, cluster, manifests};
use lb_core::flow::Dialect;
pub use live::check_all;
pub use paper::{Paper, PaperNode};

/// One question and what must come of it.
#[derive(Clone, Debug)]
pub struct FlowCase {
    /// What the row is about.
    pub what: &'static str,
    /// The namespace it comes from: `client`, `node1`, `pod12`.
    pub from: &'static str,
    /// In its node's cgroup tree: its socket calls are translated by eBPF. Else its packets are.
    pub by_socket: bool,
    /// What is dialled.
    pub target: SocketAddr,
    expect: Expect,
    instead: Vec<(Dialect, Expect)>,
}

/// What must come of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// One of these pods serves; each with whom it sees.
    Serve(Vec<(&'static str, Seen)>),
    /// Refused, and the client is told.
    Refuse,
    /// Lost in silence.
    Drop,
    /// Refused by the socket call itself, with `EPERM`: on paper a drop.
    Deny,
    /// Sent to these, and the replies go astray: they don't come back by the node that sent it there.
    Astray(Vec<&'static str>),
    /// No service answers; perhaps somebody else does.
    Pass(Option<&'static str>),
}

/// Whom a backend sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Who dialled.
    Client,
    /// This node.
    Node(u8),
}

impl FlowCase {
    /// What must come of it in a mode.
    pub fn expect(&self, dialect: Dialect) -> &Expect {
        let special = self.instead.iter().find(|(of, _)| *of == dialect);
        special.map_or(&self.expect, |(_, expect)| expect)
    }

    /// A deliberate difference: in these modes something else comes of it.
    fn but(mut self, dialects: &[Dialect], expect: &Expect) -> Self {
        for dialect in dialects {
            self.instead.retain(|(known, _)| known != dialect);
            self.instead.push((*dialect, expect.clone()));
        }
        self
    }
}

impl fmt::Display for FlowCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.by_socket { "socket" } else { "packet" };
        write!(f, "{}: {} ({how}) -> {}", self.what, self.from, self.target)
    }
}
