//! The other end: an answer that says no. A SYN becomes a reset, a datagram becomes an ICMP port unreachable around
//! it, and both go back where they came from, with the frontend as their source.
//!
//! The reset reuses the segment's frame, its options blanked: swapping addresses and ports leaves every sum as it is,
//! which also holds for a partial one. Data that a segment in mid-stream has goes back with it (RFC 9293 §3.1 lets a reset
//! have some): the sum without them would have to be taken anew.

use lb_common::{
    csum,
    net::{ETH_LEN, PROTO_TCP, tcp_flags},
};

use crate::{
    ctx::Ctx,
    family::{Family, V4, V6},
    packet::{Bytes, Macs},
    stage::parse::{Flow, Parse},
};

/// TTL of what we send ourselves (the kernel's default, `net.ipv4.ip_default_ttl`).
const TTL: u8 = 64;

/// Most 32-bit words of options that a TCP header has (RFC 9293 §3.1).
const MAX_OPTION_WORDS: usize = 10;

/// Four no-operation options (RFC 9293 §3.2).
const NO_OPERATIONS: [u8; 4] = [1; 4];

/// Answers the packet; `None` if it can't be answered (no room in the frame, IP options around a datagram).
#[inline(always)]
pub fn answer<F: Unreachable, C: Ctx>(ctx: &mut C, flow: &Flow<F::Addr>) -> Option<u32> {
    match flow.proto {
        PROTO_TCP => reset::<F, C>(ctx, flow)?,
        _ => port_unreachable::<F, C>(ctx, flow)?,
    }
    Some(ctx.send(ctx.ifindex()))
}

/// Turns a SYN into `<SEQ=0><ACK=SEG.SEQ+1><CTL=RST,ACK>`, and a segment that acknowledges into `<SEQ=SEG.ACK><CTL=RST>`
/// (RFC 9293 §3.10.7.1). A reset isn't answered.
#[inline(always)]
fn reset<F: Family, C: Ctx>(ctx: &mut C, flow: &Flow<F::Addr>) -> Option<()> {
    if flow.tcp_flags & tcp_flags::RST != 0 {
        return None;
    }
    let at = flow.l4_offset;
    let bytes = ctx.bytes();
    let macs: Macs = bytes.read(0)?;
    let old: [u8; 20] = bytes.read(at)?;
    let option_words = usize::from(old[12] >> 4) - 5;

    let ack = u32::from_be_bytes([old[4], old[5], old[6], old[7]]).wrapping_add(1).to_be_bytes();
    let old_middle = [
        old[4], old[5], old[6], old[7], old[8], old[9], old[10], old[11], old[12], old[13], old[14], old[15],
    ];
    let new_middle = if flow.tcp_flags & tcp_flags::ACK != 0 {
        [old[8], old[9], old[10], old[11], 0, 0, 0, 0, old[12], tcp_flags::RST, 0, 0]
    } else {
        [0, 0, 0, 0, ack[0], ack[1], ack[2], ack[3], old[12], tcp_flags::RST | tcp_flags::ACK, 0, 0]
    };
    let mut deltas = u32::from(csum::delta(&old_middle, &new_middle));
    deltas += u32::from(csum::delta(&[old[18], old[19]], &[0, 0]));
    for word in 0..MAX_OPTION_WORDS {
        if word < option_words {
            let option: [u8; 4] = ctx.bytes().read(at + 20 + word * 4)?;
            deltas += u32::from(csum::delta(&option, &NO_OPERATIONS));
            ctx.store(at + 20 + word * 4, NO_OPERATIONS)?;
        }
    }
    ctx.store(at, [old[2], old[3], old[0], old[1]])?;
    ctx.store(at + 4, new_middle)?;
    ctx.store(at + 18, [0u8; 2])?;
    ctx.add_to_l4_csum(at + 16, csum::fold(deltas), PROTO_TCP, false)?;

    ctx.store(F::SADDR_OFFSET, F::pair(flow.daddr, flow.saddr))?;
    let ttl_delta = ctx.set_ttl::<F>(Some(TTL))?;
    if let Some(offset) = F::IP_CSUM_OFFSET {
        ctx.add_to_ip_csum(offset, ttl_delta)?;
    }
    ctx.store(0, macs.swapped())
}

/// Wraps a datagram in a port unreachable that quotes its headers (RFC 792, RFC 4443 §3.1).
///
/// Sums are taken from the packet word by word: two headers as arrays would fill the BPF stack.
#[inline(always)]
fn port_unreachable<F: Unreachable, C: Ctx>(ctx: &mut C, flow: &Flow<F::Addr>) -> Option<()> {
    if flow.l4_offset != ETH_LEN + F::HEADER_LEN {
        return None;
    }
    let bytes = ctx.bytes();
    let macs: Macs = bytes.read(0)?;
    let quoted = sum(bytes, ETH_LEN, F::HEADER_LEN + 8)?;
    let addresses = sum(bytes, F::SADDR_OFFSET, size_of::<F::Pair>())?;
    ctx.reshape(ETH_LEN + F::HEADER_LEN + 8, F::HEADER_LEN + 8)?;
    ctx.store(0, macs.swapped())?;
    ctx.store(12, F::ETHERTYPE.to_be_bytes())?;
    ctx.store(F::SADDR_OFFSET, F::pair(flow.daddr, flow.saddr))?;
    F::write_headers(ctx, quoted, addresses)
}

/// The one's-complement sum of `len` bytes of the frame, a multiple of four, from `offset`.
#[inline(always)]
fn sum(bytes: Bytes, offset: usize, len: usize) -> Option<u32> {
    let mut total = 0;
    for word in 0..len / 4 {
        let [a, b, c, d]: [u8; 4] = bytes.read(offset + word * 4)?;
        total += u32::from(u16::from_ne_bytes([a, b])) + u32::from(u16::from_ne_bytes([c, d]));
    }
    Some(total)
}

/// A family's ICMP port unreachable.
pub trait Unreachable: Parse {
    /// Writes the IP header (but for its addresses) and the ICMP header in front of the quoted packet, given the sums
    /// of the quoted bytes and of the two addresses.
    fn write_headers<C: Ctx>(ctx: &mut C, quoted: u32, addresses: u32) -> Option<()>;
}

impl Unreachable for V4 {
    #[inline(always)]
    fn write_headers<C: Ctx>(ctx: &mut C, quoted: u32, addresses: u32) -> Option<()> {
        // 56 bytes, don't fragment; TOS as the kernel's errors have it (`IPTOS_PREC_INTERNETCONTROL`).
        let ip = [0x45, 0xc0, 0, 56, 0, 0, 0x40, 0, TTL, Self::ICMP];
        ctx.store(ETH_LEN, ip)?;
        ctx.store(ETH_LEN + 10, checksum(csum::sum(&ip) + addresses))?;
        // Type 3, destination unreachable; code 3, port.
        let [a, b] = checksum(csum::sum(&[3, 3]) + quoted);
        ctx.store(ETH_LEN + 20, [3, 3, a, b, 0, 0, 0, 0])
    }
}

impl Unreachable for V6 {
    #[inline(always)]
    fn write_headers<C: Ctx>(ctx: &mut C, quoted: u32, addresses: u32) -> Option<()> {
        // Payload: an ICMPv6 header, the quoted header, the UDP header.
        const PAYLOAD: u8 = 8 + 40 + 8;
        ctx.store(ETH_LEN, [0x60, 0, 0, 0, 0, PAYLOAD, Self::ICMP, TTL])?;
        // The pseudo-header counts too (RFC 8200 §8.1): addresses, length, next header.
        let pseudo = addresses + csum::sum(&[0, PAYLOAD, 0, Self::ICMP]);
        // Type 1, destination unreachable; code 4, port.
        let [a, b] = checksum(csum::sum(&[1, 4]) + pseudo + quoted);
        ctx.store(ETH_LEN + 40, [1, 4, a, b, 0, 0, 0, 0])
    }
}

/// A sum as a checksum field.
#[inline(always)]
fn checksum(sum: u32) -> [u8; 2] {
    (!csum::fold(sum)).to_ne_bytes()
}
