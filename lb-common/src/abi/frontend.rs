//! Frontends (`LB4_FRONTENDS`, `LB6_FRONTENDS`) and the addresses they stand on (`LB4_VIPS`, `LB6_VIPS`).

use bytemuck::{Pod, Zeroable};

use super::pod_for_both;

/// What clients dial.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey<A> {
    /// Address.
    pub addr: A,
    /// Port, native order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}

/// A run of slots in `SLOTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct SlotRange {
    /// Index of the first slot.
    pub first: u32,
    /// Number of slots; 0 when the scope has no backend.
    pub count: u32,
}

/// How a frontend is served.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct FrontendValue {
    /// Service port id; shared by all frontends of one service port and family.
    pub service_id: u32,
    /// Bits of [`frontend_flags`].
    pub flags: u32,
    /// ClientIP affinity timeout in seconds, 0 for none.
    pub affinity_secs: u32,
    /// Backends for packets from outside.
    pub external: SlotRange,
    /// Backends for this node's pods and processes.
    pub internal: SlotRange,
}

/// Bits of [`FrontendValue::flags`].
pub mod frontend_flags {
    /// External scope without backends drops silently; else it refuses.
    pub const EXTERNAL_NONE_DROPS: u32 = 1 << 0;
    /// Internal scope without backends drops silently; else it refuses.
    pub const INTERNAL_NONE_DROPS: u32 = 1 << 1;
    /// External scope: rewrite the source if the backend is on another node.
    pub const EXTERNAL_MASQ_REMOTE: u32 = 1 << 2;
    /// External scope: always rewrite the source.
    pub const EXTERNAL_MASQ_ALWAYS: u32 = 1 << 3;
    /// Internal scope: always rewrite the source.
    pub const INTERNAL_MASQ_ALWAYS: u32 = 1 << 4;
    /// Sources are restricted to the service's entries in `SOURCE_RANGES`.
    pub const SOURCE_RANGES: u32 = 1 << 5;
    /// With `SOURCE_RANGES`: this node's own processes are allowed.
    pub const SOURCE_RANGES_ALLOW_HOST: u32 = 1 << 6;
    /// For sockets in the host's network namespace only (127.0.0.1 with a NodePort).
    pub const HOST_ONLY: u32 = 1 << 7;
    /// External scope uses the service's local list (else its cluster list).
    pub const EXTERNAL_LOCAL_LIST: u32 = 1 << 8;
    /// Internal scope uses the service's local list (else its cluster list).
    pub const INTERNAL_LOCAL_LIST: u32 = 1 << 9;
}

/// An address that has frontends.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VipKey<A> {
    /// Address.
    pub addr: A,
}

/// What the address is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct VipValue {
    /// One of [`vip_kind`].
    pub kind: u32,
}

/// Values of [`VipValue::kind`].
pub mod vip_kind {
    /// Belongs to no node: ports without frontend are refused.
    pub const VIP: u32 = 1;
    /// A node's address: ports without frontend pass untouched.
    pub const NODE_ADDRESS: u32 = 2;
}

pod_for_both! {
    FrontendKey: 8, 20;
    VipKey: 4, 16;
}
const _: () = assert!(size_of::<FrontendValue>() == 28);
