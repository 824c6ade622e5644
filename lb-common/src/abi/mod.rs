//! The maps' keys and values: plain `repr(C)` structs without implicit padding, the same bytes on both sides.
//!
//! `docs/map-abi.md` lists every map with its writer, readers and size. Changing a layout here means raising
//! [`LAYOUT_VERSION`].
//!
//! Keys are aligned beyond their fields' needs: programs build them on the BPF stack, where the verifier accepts
//! aligned accesses only.

mod affinity;
mod backend;
mod bench;
mod flow;
mod frontend;
mod node;
mod sock;
mod source_range;

pub use affinity::{AffinityKey, AffinityValue};
pub use backend::{BackendValue, backend_flags};
pub use bench::BenchConfig;
pub use flow::{FlowKey, FlowValue, direction, next_hop, role, transmit};
pub use frontend::{FrontendKey, FrontendValue, SlotRange, VipKey, VipValue, frontend_flags, vip_kind};
pub use node::{DeviceValue, NodeConfig, TraceFilter, device_flags, node_flags};
pub use sock::{PeerValue, SockFlowKey, SockFlowValue, sock_direction};
pub use source_range::SourceRangeData;

/// Version of the map layouts; part of the pin path. Raised whenever a struct of this module changes.
pub const LAYOUT_VERSION: u32 = 1;

/// An IPv4 address in network order.
pub type Addr4 = [u8; 4];
/// An IPv6 address in network order.
pub type Addr6 = [u8; 16];

/// Declares one `Pod` impl per address family for generic structs, with the size that proves there is no padding.
macro_rules! pod_for_both {
    ($($name:ident: $v4:literal, $v6:literal;)+) => {$(
        const _: () = assert!(size_of::<$name<crate::abi::Addr4>>() == $v4);
        const _: () = assert!(size_of::<$name<crate::abi::Addr6>>() == $v6);
        // SAFETY: repr(C), all fields are integers or byte arrays, and the sizes above are the sums of the
        // fields' sizes: no padding, every bit pattern is a value.
        unsafe impl bytemuck::Zeroable for $name<crate::abi::Addr4> {}
        // SAFETY: as above.
        unsafe impl bytemuck::Pod for $name<crate::abi::Addr4> {}
        // SAFETY: as above.
        unsafe impl bytemuck::Zeroable for $name<crate::abi::Addr6> {}
        // SAFETY: as above.
        unsafe impl bytemuck::Pod for $name<crate::abi::Addr6> {}
    )+};
}
use pod_for_both;
