//! Stage 6: what is rewritten? A plan, from plain values.

use lb_common::abi::{BackendValue, backend_flags};

use crate::stage::{classify::Service, parse::Flow};

/// What becomes of the packet's source.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The backend sees the client; the stack routes the packet.
    Keep,
    /// The backend sees the node, so that the reply comes back here; we forward the packet, because the stack
    /// would take one from its own address for a martian (`net/ipv4/fib_frontend.c: fib_validate_source`).
    Masquerade,
    /// The client is the backend: it sees the node, and the packet turns around.
    Hairpin,
}

/// A packet from outside.
#[inline(always)]
pub fn from_outside<A>(service: &Service, backend: &BackendValue<A>) -> Source {
    let local = backend.flags & backend_flags::LOCAL != 0;
    // A host-network backend can't be sent a packet from its own address.
    let own = backend.flags & backend_flags::NODE_ADDRESS != 0;
    if !own && (service.masquerade_always || service.masquerade_remote && !local) {
        Source::Masquerade
    } else {
        Source::Keep
    }
}

/// A packet of one of this node's pods.
#[inline(always)]
pub fn from_pod<A: Copy + PartialEq>(flow: &Flow<A>, service: &Service, backend: &BackendValue<A>) -> Source {
    if backend.addr == flow.saddr {
        Source::Hairpin
    } else if service.masquerade_always && backend.flags & backend_flags::NODE_ADDRESS == 0 {
        Source::Masquerade
    } else {
        Source::Keep
    }
}
