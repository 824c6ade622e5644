//! Facts about this node: `NODE` (an array of one) and `DEVICES` (a hash by ifindex).

use bytemuck::{Pod, Zeroable};

use super::{Addr4, Addr6};

/// What programs need to know of the node. Written by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct NodeConfig {
    /// Cookie of the host's network namespace.
    pub host_netns_cookie: u64,
    /// Raised on any change of routes, neighbours, links or addresses: cached next hops of older generations are
    /// looked up anew.
    pub routing_generation: u32,
    /// First source port of masqueraded flows; the range lies outside the host's own ephemeral ports.
    pub snat_port_first: u16,
    /// Number of ports in the range.
    pub snat_port_count: u16,
    /// The node's address to masquerade to when the egress device has none, all zero for none.
    pub addr4: Addr4,
    /// As `addr4`, IPv6.
    pub addr6: Addr6,
    /// Bits of [`node_flags`].
    pub flags: u32,
}

/// Bits of [`NodeConfig::flags`].
pub mod node_flags {
    /// Another datapath serves: flows that have an entry are carried on, everything new is left to it.
    pub const DRAINING: u32 = 1 << 0;
    /// Connections to backends that are gone are reset: connected UDP sockets are noted in `SOCK_CONNECTED`.
    pub const RESETS: u32 = 1 << 1;
}

/// A device packets may leave by.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct DeviceValue {
    /// Bits of [`device_flags`].
    pub flags: u32,
    /// Its primary IPv4 address, all zero for none.
    pub addr4: Addr4,
    /// Its primary global IPv6 address, all zero for none.
    pub addr6: Addr6,
}

/// Bits of [`DeviceValue::flags`].
pub mod device_flags {
    /// XDP may send frames out of it.
    pub const XDP_TARGET: u32 = 1 << 0;
}

/// Which packets the tracing build of the programs logs (`TRACE`, an array of one). Zero matches all.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct TraceFilter {
    /// Either address, IPv4-mapped if IPv4.
    pub addr: Addr6,
    /// Either port, native order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}
