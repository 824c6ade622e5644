//! ClientIP affinity (`AFFINITY`): an LRU hash from (client, service port) to a backend.

use bytemuck::{Pod, Zeroable};

use super::{Addr4, Addr6};

/// Who, and to which service port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct AffinityKey {
    /// The client: an IPv6 address, an IPv4-mapped one (RFC 4291 §2.5.5.2), or a network namespace.
    pub client: Addr6,
    /// Service port id.
    pub service_id: u32,
}

impl AffinityKey {
    /// The key of an IPv4 client.
    #[inline(always)]
    pub const fn v4(c: Addr4, service_id: u32) -> Self {
        Self { client: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, c[0], c[1], c[2], c[3]], service_id }
    }

    /// The key of an IPv6 client.
    #[inline(always)]
    pub const fn v6(client: Addr6, service_id: u32) -> Self {
        Self { client, service_id }
    }

    /// The key of a socket, whose source address isn't known before it connects: its network namespace's cookie
    /// under a multicast prefix, which no client can have as its address.
    #[inline(always)]
    pub const fn netns(cookie: u64, service_id: u32) -> Self {
        let c = cookie.to_be_bytes();
        Self {
            client: [0xff, 0, 0, 0, 0, 0, 0, 0, c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]],
            service_id,
        }
    }
}

/// The backend this client had last.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct AffinityValue {
    /// Backend id.
    pub backend_id: u32,
    /// The backend's generation when it was chosen.
    pub backend_generation: u32,
    /// Seconds since boot (monotonic clock) of the last new flow.
    pub last_used_secs: u32,
}
