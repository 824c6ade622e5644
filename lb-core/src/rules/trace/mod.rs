//! What the kernel makes of a flow, given rules: one packet's way through netfilter's hooks, on paper.
//!
//! kube-proxy's own tests do the same (`pkg/proxy/iptables/proxier_test.go` `iptablesTracer`,
//! `pkg/proxy/nftables/helpers_test.go` `nftablesTracer`). Where a rule is a matter of chance or of what came before,
//! both ways are followed: the answer holds every backend that can be reached.

mod iptables;
mod ipvs;
mod nft_syntax;
mod nftables;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

pub use iptables::Iptables;
pub use ipvs::Ipvs;
pub use nftables::Nftables;

use crate::{
    flow::{Answer, Flow, Origin, Source},
    model::Protocol,
    table::FrontendAddr,
};

/// Rules that can't be followed, or that contradict themselves.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// A rule leads to a chain that isn't there.
    #[error("a rule leads to chain {0}, which does not exist")]
    NoChain(String),
    /// A rule asks a set or map that isn't there.
    #[error("a rule asks set {0}, which does not exist")]
    NoSet(String),
    /// Chains lead to each other in a circle.
    #[error("chain {0} leads back to itself")]
    Circle(String),
    /// A line that is none of those we write.
    #[error("cannot read `{line}`: {what}")]
    Unreadable {
        /// The line.
        line: String,
        /// What about it.
        what: String,
    },
    /// Chance decides whether the flow is served at all, or whom a backend sees.
    #[error("{0}: the rules end in more than one way: {1}")]
    Ambiguous(String, String),
}

/// Deeper than any rules of ours; the kernel's own limit is 16 (`NFT_JUMP_STACK_SIZE`).
const MAX_DEPTH: usize = 16;

/// A packet on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packet {
    source: IpAddr,
    dst: IpAddr,
    port: u16,
    protocol: Protocol,
    mark: u32,
    /// The destination was rewritten.
    translated: bool,
    /// The source will be rewritten.
    masqueraded: bool,
    /// It came in from a pod: by the device that rules ask for, and by a port of a bridge.
    from_pod: bool,
    /// The virtual server that it was sent to.
    server: Option<FrontendAddr>,
}

impl Packet {
    fn of(flow: &Flow) -> Self {
        Self {
            source: flow.source,
            dst: flow.dst,
            port: flow.port,
            protocol: flow.protocol,
            mark: 0,
            translated: false,
            masqueraded: false,
            from_pod: matches!(flow.origin, Origin::Pod | Origin::PodSocket),
            server: None,
        }
    }

    fn translate(&mut self, to: SocketAddr) {
        (self.dst, self.port, self.translated) = (to.ip(), to.port(), true);
    }
}

/// How a packet leaves a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// At its end, or told to return.
    Through,
    Accept,
    Drop,
    Reject,
}

/// Where netfilter is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

/// Hooks that rules stand at.
trait Hooked {
    /// The flow's first packet.
    fn sent(&self, flow: &Flow) -> Packet {
        Packet::of(flow)
    }

    /// All ways out of a hook.
    fn pass(&self, hook: Hook, packet: Packet) -> Result<Vec<(End, Packet)>, TraceError>;

    /// The node takes the packet in, rather than sending it on.
    fn takes_in(&self, packet: &Packet) -> bool;
}

/// One flow through all hooks.
fn trace(rules: &impl Hooked, flow: &Flow) -> Result<Answer, TraceError> {
    // Packets to loopback addresses never leave the network namespace that they are from.
    if flow.dst.is_loopback() && flow.origin != Origin::Node {
        return Ok(Answer::Pass);
    }
    let first = if flow.origin == Origin::Node { Hook::Output } else { Hook::Prerouting };
    let mut answers = Vec::new();
    for (end, packet) in rules.pass(first, rules.sent(flow))? {
        match end {
            End::Drop => answers.push(Answer::Drop),
            End::Reject => answers.push(Answer::Reject),
            End::Through | End::Accept => finish(rules, flow, packet, &mut answers)?,
        }
    }
    join(flow, answers)
}

/// The hooks after the destination is settled.
fn finish(
    rules: &impl Hooked,
    flow: &Flow,
    packet: Packet,
    answers: &mut Vec<Answer>,
) -> Result<(), TraceError> {
    let hooks: &[Hook] = match (flow.origin, rules.takes_in(&packet)) {
        // By way of the loopback device. Destinations are not translated twice.
        (Origin::Node, true) => &[Hook::Postrouting, Hook::Input],
        (Origin::Node, false) => &[Hook::Postrouting],
        (_, true) => &[Hook::Input],
        (_, false) => &[Hook::Forward, Hook::Postrouting],
    };
    let mut live = through(rules, hooks, vec![packet], answers)?;
    if hooks == [Hook::Input] {
        // What was translated only here goes on to where it is meant for.
        let (stays, leaves) = live.into_iter().partition(|packet| rules.takes_in(packet));
        live = stays;
        live.extend(through(rules, &[Hook::Postrouting], leaves, answers)?);
    }
    answers.extend(live.into_iter().map(|packet| match packet.translated {
        true => {
            let source = if packet.masqueraded { Source::Masqueraded } else { Source::Kept };
            Answer::Serve([(SocketAddr::new(packet.dst, packet.port), source)].into())
        }
        false => Answer::Pass,
    }));
    Ok(())
}

/// Packets through hooks, one after the other; what ends there is an answer.
fn through(
    rules: &impl Hooked,
    hooks: &[Hook],
    mut live: Vec<Packet>,
    answers: &mut Vec<Answer>,
) -> Result<Vec<Packet>, TraceError> {
    for hook in hooks {
        let mut next = Vec::new();
        for packet in live {
            for (end, packet) in rules.pass(*hook, packet)? {
                match end {
                    End::Drop => answers.push(Answer::Drop),
                    End::Reject => answers.push(Answer::Reject),
                    End::Through | End::Accept => next.push(packet),
                }
            }
        }
        live = next;
    }
    Ok(live)
}

/// All ways as one answer.
fn join(flow: &Flow, answers: Vec<Answer>) -> Result<Answer, TraceError> {
    let ambiguous = |one: &Answer, other: &Answer| {
        Err(TraceError::Ambiguous(flow.to_string(), format!("{one}; {other}")))
    };
    let mut joined: Option<Answer> = None;
    for answer in answers {
        joined = Some(match (joined, answer) {
            (None, answer) => answer,
            (Some(Answer::Serve(mut backends)), Answer::Serve(more)) => {
                let agrees = |(backend, source)| backends.get(backend).is_none_or(|known| known == source);
                if !more.iter().all(agrees) {
                    return ambiguous(&Answer::Serve(backends), &Answer::Serve(more));
                }
                backends.extend(more);
                Answer::Serve(backends)
            }
            (Some(known), answer) if known == answer => known,
            (Some(known), answer) => return ambiguous(&known, &answer),
        });
    }
    Ok(joined.unwrap_or(Answer::Serve(BTreeMap::new())))
}
