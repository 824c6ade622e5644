//! Stage 1: what is this packet? Reads addresses, then ports; everything that can't be translated passes untouched.
//!
//! Fragments have no ports (RFC 791 §3.2, RFC 8200 §4.5): those of a VIP pass and are counted. A header that is cut
//! short or contradicts itself passes too: the stack drops it and says so in its own statistics.

use lb_common::{
    net::{ETH_LEN, PROTO_TCP, PROTO_UDP, tcp_flags},
    outcome::Outcome,
};

use crate::{
    family::{Family, V4, V6, Words4, Words6},
    packet::Bytes,
    verdict::{End, Stage},
};

/// What the network header says.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct Network<A> {
    /// Source address.
    pub saddr: A,
    /// Destination address.
    pub daddr: A,
    /// Protocol (IPv4) or first next header (IPv6).
    next: u8,
    /// Offset of what follows the fixed header or its IPv4 options.
    offset: usize,
    /// A fragment, first or later.
    fragment: bool,
}

/// A TCP or UDP packet.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct Flow<A> {
    /// Source address.
    pub saddr: A,
    /// Destination address.
    pub daddr: A,
    /// Source port, native order.
    pub sport: u16,
    /// Destination port, native order.
    pub dport: u16,
    /// `PROTO_TCP` or `PROTO_UDP`.
    pub proto: u8,
    /// TCP flags; 0 for UDP.
    pub tcp_flags: u8,
    /// Offset of the TCP or UDP header in the frame.
    pub l4_offset: usize,
}

impl<A: Copy> Flow<A> {
    /// Opens a connection, or is UDP, which opens one with any packet.
    #[inline(always)]
    pub fn may_open(&self) -> bool {
        self.proto == PROTO_UDP || self.is_syn()
    }

    /// A SYN without ACK.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
    }

    /// What a server answers a SYN with.
    #[inline(always)]
    pub fn is_syn_ack(&self) -> bool {
        self.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN | tcp_flags::ACK
    }

    /// Both ports in one word.
    #[inline(always)]
    pub fn ports(&self) -> u32 {
        u32::from(self.sport) << 16 | u32::from(self.dport)
    }
}

/// A family's network header at its fixed place behind the Ethernet header.
pub trait Parse: Family {
    /// Reads it.
    fn network(bytes: Bytes) -> Option<Network<Self::Addr>>;
    /// Finds the transport header: protocol, offset, and whether a fragment header was on the way.
    fn transport(bytes: Bytes, network: &Network<Self::Addr>) -> Option<(u8, usize, bool)>;
}

/// RFC 791 §3.1, without options.
#[repr(C, align(4))]
#[derive(Clone, Copy)]
struct Header4 {
    version_ihl: u8,
    tos: u8,
    total_len: [u8; 2],
    id: [u8; 2],
    fragment: [u8; 2],
    ttl: u8,
    proto: u8,
    checksum: [u8; 2],
    saddr: Words4,
    daddr: Words4,
}

/// RFC 8200 §3.
#[repr(C, align(4))]
#[derive(Clone, Copy)]
struct Header6 {
    version: u8,
    class_flow: [u8; 3],
    payload_len: [u8; 2],
    next: u8,
    hop_limit: u8,
    saddr: Words6,
    daddr: Words6,
}

/// RFC 9293 §3.1, without options.
#[repr(C, align(4))]
#[derive(Clone, Copy)]
struct TcpHeader {
    ports: [u8; 4],
    sequence: [u8; 4],
    acknowledgement: [u8; 4],
    data_offset: u8,
    flags: u8,
    window: [u8; 2],
    checksum: [u8; 2],
    urgent: [u8; 2],
}

impl Parse for V4 {
    #[inline(always)]
    fn network(bytes: Bytes) -> Option<Network<Self::Addr>> {
        let header: Header4 = bytes.read(ETH_LEN)?;
        let header_len = usize::from(header.version_ihl & 0x0f) * 4;
        let total_len = usize::from(u16::from_be_bytes(header.total_len));
        if header.version_ihl >> 4 != 4 || header_len < 20 || total_len < header_len {
            return None;
        }
        Some(Network {
            saddr: header.saddr,
            daddr: header.daddr,
            next: header.proto,
            // More-fragments bit or an offset (RFC 791 §3.1); don't-fragment is not looked at.
            fragment: u16::from_be_bytes(header.fragment) & 0x3fff != 0,
            offset: ETH_LEN + header_len,
        })
    }

    #[inline(always)]
    fn transport(_: Bytes, network: &Network<Self::Addr>) -> Option<(u8, usize, bool)> {
        Some((network.next, network.offset, network.fragment))
    }
}

/// Extension headers followed before giving up; real traffic has none or one.
const MAX_EXTENSION_HEADERS: usize = 3;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

impl Parse for V6 {
    #[inline(always)]
    fn network(bytes: Bytes) -> Option<Network<Self::Addr>> {
        let header: Header6 = bytes.read(ETH_LEN)?;
        if header.version >> 4 != 6 {
            return None;
        }
        Some(Network {
            saddr: header.saddr,
            daddr: header.daddr,
            next: header.next,
            offset: ETH_LEN + Self::HEADER_LEN,
            fragment: false,
        })
    }

    #[inline(always)]
    fn transport(bytes: Bytes, network: &Network<Self::Addr>) -> Option<(u8, usize, bool)> {
        let mut next = network.next;
        let mut offset = network.offset;
        for _ in 0..MAX_EXTENSION_HEADERS {
            match next {
                HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                    let [following, len]: [u8; 2] = bytes.read(offset)?;
                    next = following;
                    // Length in units of 8 bytes, not counting the first (RFC 8200 §4.3).
                    offset += (usize::from(len) + 1) * 8;
                }
                FRAGMENT => return Some((next, offset, true)),
                _ => break,
            }
        }
        Some((next, offset, false))
    }
}

/// Reads the network header.
#[inline(always)]
pub fn network<F: Parse>(bytes: Bytes) -> Stage<Network<F::Addr>> {
    F::network(bytes).ok_or(End::pass(Outcome::PassMalformed))
}

/// Reads the transport header.
#[inline(always)]
pub fn flow<F: Parse>(bytes: Bytes, network: &Network<F::Addr>) -> Stage<Flow<F::Addr>> {
    let malformed = End::pass(Outcome::PassMalformed);
    let (proto, l4_offset, fragment) = F::transport(bytes, network).ok_or(malformed)?;
    if fragment {
        return Err(End::pass(Outcome::PassFragment));
    }
    let tcp_flags = match proto {
        PROTO_TCP => {
            let header: TcpHeader = bytes.read(l4_offset).ok_or(malformed)?;
            // The data offset counts words and is at least five.
            if header.data_offset >> 4 < 5 {
                return Err(malformed);
            }
            header.flags
        }
        PROTO_UDP => {
            let _: [u8; 8] = bytes.read(l4_offset).ok_or(malformed)?;
            0
        }
        _ => return Err(End::pass(Outcome::PassNotL4)),
    };
    let ports: [u8; 4] = bytes.read(l4_offset).ok_or(malformed)?;
    Ok(Flow {
        saddr: network.saddr,
        daddr: network.daddr,
        sport: u16::from_be_bytes([ports[0], ports[1]]),
        dport: u16::from_be_bytes([ports[2], ports[3]]),
        proto,
        tcp_flags,
        l4_offset,
    })
}
