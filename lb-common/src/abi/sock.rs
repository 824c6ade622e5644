//! What the socket hooks remember: `SOCK_PEERS` (socket storage, one per connected socket), `SOCK_CONNECTED` (the same of UDP
//! sockets by their cookie, if somebody wants to find them) and `SOCK_FLOWS` (an LRU hash for unconnected UDP sockets).

use bytemuck::{Pod, Zeroable};

use super::Addr6;

/// The frontend a connected socket dialled and the backend it got. IPv4 addresses are IPv4-mapped.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PeerValue {
    /// Frontend address.
    pub frontend: Addr6,
    /// Backend address.
    pub backend: Addr6,
    /// Frontend port, native order.
    pub frontend_port: u16,
    /// Backend port, native order.
    pub backend_port: u16,
    /// Backend id.
    pub backend_id: u32,
}

/// An address as one unconnected UDP socket sees it. IPv4 addresses are IPv4-mapped.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct SockFlowKey {
    /// Socket cookie.
    pub cookie: u64,
    /// Address: a frontend's (forward) or a backend's (reply).
    pub addr: Addr6,
    /// Port, native order.
    pub port: u16,
    /// One of [`sock_direction`].
    pub direction: u16,
    /// Zero.
    pub pad: u32,
}

/// What it stands for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct SockFlowValue {
    /// Address: the backend's (forward) or the frontend's (reply).
    pub addr: Addr6,
    /// Port, native order.
    pub port: u16,
    /// Zero.
    pub pad: u16,
    /// Backend id.
    pub backend_id: u32,
    /// The backend's generation when it was chosen.
    pub backend_generation: u32,
}

/// Values of [`SockFlowKey::direction`].
pub mod sock_direction {
    /// Keyed by frontend, gives the backend.
    pub const FORWARD: u16 = 0;
    /// Keyed by backend, gives the frontend.
    pub const REPLY: u16 = 1;
}
