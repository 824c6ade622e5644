//! Flows (`LB4_FLOWS`, `LB6_FLOWS`): LRU hashes with one entry per direction, holding the complete rewrite.
//!
//! The two entries of a connection are *twins*: the reply's key is the forward rewrite's result read backwards, and
//! the reply's rewrite is the forward key read backwards. So either can be rebuilt from the other.

use super::pod_for_both;

/// A five-tuple as it lies on the wire at its hook.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey<A> {
    /// Source address.
    pub saddr: A,
    /// Destination address.
    pub daddr: A,
    /// Source port, native order.
    pub sport: u16,
    /// Destination port, native order.
    pub dport: u16,
    /// IP protocol number.
    pub proto: u8,
    /// One of [`direction`].
    pub direction: u8,
    /// Zero.
    pub pad: u16,
}

/// Values of [`FlowKey::direction`].
pub mod direction {
    /// Seen on ingress: packets coming into the node's stack, from outside or from a pod.
    pub const IN: u8 = 0;
    /// Seen on egress: packets leaving the node's stack, to outside or to a pod.
    pub const OUT: u8 = 1;
}

/// What to do with a packet of this direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowValue<A> {
    /// Source address after the rewrite.
    pub saddr: A,
    /// Destination address after the rewrite.
    pub daddr: A,
    /// Source port after the rewrite, native order.
    pub sport: u16,
    /// Destination port after the rewrite, native order.
    pub dport: u16,
    /// Checksum delta of the addresses (`lb_common::csum`).
    pub addr_delta: u16,
    /// Checksum delta of the ports.
    pub port_delta: u16,
    /// One of [`transmit`].
    pub transmit: u8,
    /// One of [`role`].
    pub role: u8,
    /// TCP state this direction has shown (`lb_common::tcp`).
    pub tcp: u8,
    /// One of [`next_hop`].
    pub next_hop: u8,
    /// Service port id.
    pub service_id: u32,
    /// Backend id.
    pub backend_id: u32,
    /// The backend's generation when it was chosen.
    pub backend_generation: u32,
    /// Egress device of `transmit::FORWARD`.
    pub ifindex: u32,
    /// `NodeConfig::routing_generation` for which the next hop was looked up.
    pub routing_generation: u32,
    /// Tick of the last packet, to a second (`lb_common::tcp::TICK_SHIFT`).
    pub seen: u32,
    /// Tick when a packet last went through the kernel's neighbour table.
    pub neighbour_checked: u32,
    /// Ethernet destination, then source, of the next hop.
    pub macs: [u8; 12],
}

/// Values of [`FlowValue::transmit`].
pub mod transmit {
    /// Rewritten and left to the stack.
    pub const STACK: u8 = 0;
    /// Rewritten and sent to the next hop.
    pub const FORWARD: u8 = 1;
    /// Rewritten and sent back where it came from.
    pub const TURN_AROUND: u8 = 2;
    /// Answered with a reset; written by the agent, together with `next_hop::UNKNOWN`.
    pub const RESET: u8 = 3;
}

/// Values of [`FlowValue::next_hop`].
pub mod next_hop {
    /// Not known yet.
    pub const UNKNOWN: u8 = 0;
    /// `macs` and `ifindex` hold it, as of `routing_generation`.
    pub const KNOWN: u8 = 1;
    /// As `KNOWN`, and XDP may send frames out of that device.
    pub const KNOWN_TO_XDP: u8 = 2;
}

/// Values of [`FlowValue::role`]; names the outcome that is counted. A reply has [`role::REPLY`] set beside the role
/// of its forward twin.
pub mod role {
    /// From a client outside to a backend on this node.
    pub const TO_LOCAL: u8 = 0;
    /// From a client to a backend, masqueraded.
    pub const TO_REMOTE: u8 = 1;
    /// From a pod to a backend.
    pub const FROM_POD: u8 = 2;
    /// From a pod to itself.
    pub const HAIRPIN: u8 = 3;
    /// Bit: from the backend back to the client.
    pub const REPLY: u8 = 0x80;
}

pod_for_both! {
    FlowKey: 16, 40;
    FlowValue: 60, 84;
}
