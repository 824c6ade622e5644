//! Backends (`LB4_BACKENDS`, `LB6_BACKENDS`): arrays indexed by backend id. `SLOTS` holds backend ids.

use super::pod_for_both;

/// A backend of one service port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendValue<A> {
    /// Address.
    pub addr: A,
    /// Port, native order.
    pub port: u16,
    /// Bits of [`backend_flags`]; 0 is an empty place.
    pub flags: u8,
    /// Zero.
    pub pad: u8,
    /// The service port it belongs to.
    pub service_id: u32,
    /// Raised every time this place gets or loses a backend: tells an old flow that its backend is gone.
    pub generation: u32,
}

/// Bits of [`BackendValue::flags`].
pub mod backend_flags {
    /// The place is taken and the endpoint serves: flows to it go on.
    pub const ALIVE: u8 = 1 << 0;
    /// The endpoint is on this node.
    pub const LOCAL: u8 = 1 << 1;
    /// In the service's cluster list: new flows may choose it.
    pub const IN_CLUSTER_LIST: u8 = 1 << 2;
    /// In the service's local list: new flows may choose it.
    pub const IN_LOCAL_LIST: u8 = 1 << 3;
    /// The address is one of this node's own (a host-network endpoint).
    pub const NODE_ADDRESS: u8 = 1 << 4;
}

pod_for_both! {
    BackendValue: 16, 28;
}
