//! The benchmark driver's configuration (`BENCH`); in no shipped program.

use bytemuck::{Pod, Zeroable};

/// What the driver makes of each packet. Addresses and ports are native integers here, so that it can count with them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct BenchConfig {
    /// The first 64 bytes of the packet.
    pub template: [u64; 8],
    /// The packet's length.
    pub packet_len: u32,
    /// Packets so far.
    pub count: u32,
    /// Flows minus one, a power of two minus one; 0 leaves the source alone.
    pub flow_mask: u32,
    /// Odd: the order in which flows come.
    pub multiplier: u32,
    /// The first flow.
    pub base: u32,
    /// Destinations minus one, a power of two minus one; 0 leaves the destination alone.
    pub vip_mask: u32,
    /// First source address.
    pub source: u32,
    /// First destination address.
    pub destination: u32,
    /// First source port.
    pub source_port: u16,
    /// Zero.
    pub pad: [u16; 3],
}
