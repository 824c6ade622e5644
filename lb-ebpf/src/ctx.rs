//! What differs between XDP and tc: how bytes are changed and how a frame is sent.
//!
//! XDP owns the bytes and writes them. tc goes through helpers, because a packet of a local sender may carry a
//! partial checksum (`CHECKSUM_PARTIAL`: only the pseudo-header's sum, the device adds the rest) and only
//! `bpf_l4_csum_replace` knows which (`net/core/filter.c`).

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext,
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, xdp_action},
    helpers::generated::{
        bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_head, bpf_skb_change_tail,
        bpf_skb_pull_data, bpf_skb_store_bytes, bpf_xdp_adjust_head, bpf_xdp_adjust_tail,
    },
    programs::{TcContext, XdpContext},
};
use lb_common::{
    abi::FlowValue,
    csum,
    net::{PROTO_TCP, PROTO_UDP},
    outcome::Outcome,
};

use crate::{
    family::Family,
    packet::Bytes,
    stage::{forward, parse::Flow},
    verdict::{End, Stage},
};

/// One hook's packet.
pub trait Ctx {
    /// XDP finishes only what it can and leaves the rest to tc.
    const IS_XDP: bool;

    /// The frame's linear bytes, headers included as far as the frame has them. Changes below make it stale.
    fn bytes(&mut self) -> Bytes;
    /// The device the packet came in by (or leaves by, on egress).
    fn ifindex(&self) -> u32;
    /// For helpers.
    fn as_ptr(&self) -> *mut c_void;
    /// Writes bytes.
    fn store<T: Copy>(&mut self, offset: usize, value: T) -> Option<()>;
    /// Adds a delta to the IP header's checksum.
    fn add_to_ip_csum(&mut self, offset: usize, delta: u16) -> Option<()>;
    /// Adds a delta to a transport checksum: `pseudo` if the change is in the pseudo-header.
    fn add_to_l4_csum(&mut self, offset: usize, delta: u16, proto: u8, pseudo: bool) -> Option<()>;
    /// Cuts the frame to `len` bytes, then makes room for `front` bytes before it.
    fn reshape(&mut self, len: usize, front: usize) -> Option<()>;
    /// Sends the frame out of a device as it is.
    fn send(&self, ifindex: u32) -> u32;
    /// Sends the packet out of a device by the kernel's neighbour output.
    fn send_to_neighbour(&self, ifindex: u32) -> u32;

    /// Stops if the packet may not be routed any further.
    #[inline(always)]
    fn check_ttl<F: Family>(&mut self) -> Stage<()> {
        match self.bytes().read::<u8>(F::TTL_OFFSET) {
            Some(ttl) if ttl > 1 => Ok(()),
            _ => Err(End::drop(Outcome::DropTtl)),
        }
    }

    /// Writes an entry's rewrite into the packet, checksums included. `decrement_ttl`: we are its router.
    #[inline(always)]
    fn rewrite<F: Family>(
        &mut self,
        flow: &Flow<F::Addr>,
        to: &FlowValue<F::Addr>,
        decrement_ttl: bool,
    ) -> Option<()> {
        let csum_offset = flow.l4_offset + l4_csum_offset(flow.proto);
        self.add_to_l4_csum(csum_offset, to.addr_delta, flow.proto, true)?;
        if to.sport != flow.sport || to.dport != flow.dport {
            self.add_to_l4_csum(csum_offset, to.port_delta, flow.proto, false)?;
            let [s0, s1] = to.sport.to_be_bytes();
            let [d0, d1] = to.dport.to_be_bytes();
            self.store(flow.l4_offset, [s0, s1, d0, d1])?;
        }
        self.store(F::SADDR_OFFSET, F::pair(to.saddr, to.daddr))?;
        let mut ip_deltas = u32::from(to.addr_delta);
        if decrement_ttl {
            ip_deltas += u32::from(self.set_ttl::<F>(None)?);
        }
        match F::IP_CSUM_OFFSET {
            Some(offset) => self.add_to_ip_csum(offset, csum::fold(ip_deltas)),
            None => Some(()),
        }
    }

    /// Sets the TTL, or lowers it by one; returns the header checksum's delta.
    #[inline(always)]
    fn set_ttl<F: Family>(&mut self, ttl: Option<u8>) -> Option<u16> {
        // IPv4 sums TTL and protocol as one word; for IPv6 the delta is not used.
        let [old, proto]: [u8; 2] = self.bytes().read(F::TTL_OFFSET)?;
        let new = ttl.unwrap_or(old.wrapping_sub(1));
        self.store(F::TTL_OFFSET, new)?;
        Some(csum::delta16(u16::from_ne_bytes([old, proto]), u16::from_ne_bytes([new, proto])))
    }
}

/// Loads a packet pointer from a context. The fields are declared 32 bits wide, but the verifier makes the load a
/// pointer; LLVM would move it through a 32-bit register, and what is left is a number ("R5=scalar", 6.18).
///
/// # Safety
///
/// `OFFSET` must be that of such a field.
#[inline(always)]
unsafe fn load_pointer<const OFFSET: i16>(ctx: *mut c_void) -> usize {
    let pointer: usize;
    // SAFETY: a load from the context, which the verifier checks.
    unsafe {
        core::arch::asm!(
            "{pointer} = *(u32 *)({ctx} + {offset})",
            pointer = out(reg) pointer,
            ctx = in(reg) ctx,
            offset = const OFFSET,
            options(nostack, preserves_flags),
        );
    }
    pointer
}

/// Offset of the checksum in the transport header.
#[inline(always)]
fn l4_csum_offset(proto: u8) -> usize {
    if proto == PROTO_TCP { 16 } else { 6 }
}

/// An XDP frame.
pub struct Xdp(XdpContext);

impl Xdp {
    /// Takes the hook's context.
    #[inline(always)]
    pub fn new(ctx: XdpContext) -> Self {
        Self(ctx)
    }
}

impl Ctx for Xdp {
    const IS_XDP: bool = true;

    #[inline(always)]
    fn bytes(&mut self) -> Bytes {
        // SAFETY: offsets of `data` and `data_end` in `struct xdp_md` (include/uapi/linux/bpf.h).
        unsafe { Bytes::new(load_pointer::<0>(self.as_ptr()), load_pointer::<4>(self.as_ptr())) }
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        unsafe { (*self.0.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        self.0.as_ptr()
    }

    #[inline(always)]
    fn store<T: Copy>(&mut self, offset: usize, value: T) -> Option<()> {
        self.bytes().write(offset, value)
    }

    #[inline(always)]
    fn add_to_ip_csum(&mut self, offset: usize, delta: u16) -> Option<()> {
        let bytes = self.bytes();
        let field = u16::from_ne_bytes(bytes.read(offset)?);
        bytes.write(offset, csum::apply(field, delta.into()).to_ne_bytes())
    }

    #[inline(always)]
    fn add_to_l4_csum(&mut self, offset: usize, delta: u16, proto: u8, _: bool) -> Option<()> {
        let bytes = self.bytes();
        let field = u16::from_ne_bytes(bytes.read(offset)?);
        let sum = match proto {
            PROTO_UDP => csum::apply_udp(field, delta.into()),
            _ => csum::apply(field, delta.into()),
        };
        bytes.write(offset, sum.to_ne_bytes())
    }

    #[inline(always)]
    fn reshape(&mut self, len: usize, front: usize) -> Option<()> {
        let cut = len as i32 - self.bytes().len() as i32;
        // SAFETY: the helpers check both against the frame's room.
        let done = unsafe {
            bpf_xdp_adjust_tail(self.0.ctx, cut) == 0 && bpf_xdp_adjust_head(self.0.ctx, -(front as i32)) == 0
        };
        done.then_some(())
    }

    #[inline(always)]
    fn send(&self, ifindex: u32) -> u32 {
        if ifindex == self.ifindex() {
            return xdp_action::XDP_TX;
        }
        // SAFETY: the helper only notes the device.
        unsafe { bpf_redirect(ifindex, 0) as u32 }
    }

    #[inline(always)]
    fn send_to_neighbour(&self, _: u32) -> u32 {
        // stage::forward gives XDP no such exit.
        xdp_action::XDP_DROP
    }
}

/// Aligned as the verifier wants what lies on the stack.
#[repr(C, align(8))]
struct OnStack<T>(T);

/// A socket buffer at a tc hook.
pub struct Tc(TcContext);

/// Linear bytes wanted before parsing: Ethernet, the longest IPv4 header, a TCP header without options.
const HEADERS_LEN: u32 = 14 + 60 + 20;

impl Tc {
    /// Takes the context of a hook that [`Tc::linear`] has seen.
    #[inline(always)]
    pub fn new(ctx: TcContext) -> Self {
        Self(ctx)
    }

    /// Takes the hook's context and makes the packet's headers linear, so that they can be read.
    #[inline(always)]
    pub fn linear(ctx: TcContext) -> Self {
        let mut this = Self(ctx);
        let (linear, len) = (this.bytes().len(), this.0.len());
        if linear < HEADERS_LEN as usize && len as usize > linear {
            let wanted = if len < HEADERS_LEN { len } else { HEADERS_LEN };
            // A failure leaves the bytes as they are: parsing then finds the frame too short.
            let _ = unsafe { bpf_skb_pull_data(this.skb(), wanted) };
        }
        this
    }

    #[inline(always)]
    fn skb(&self) -> *mut __sk_buff {
        self.0.skb.skb
    }
}

impl Ctx for Tc {
    const IS_XDP: bool = false;

    #[inline(always)]
    fn bytes(&mut self) -> Bytes {
        // SAFETY: offsets of `data` and `data_end` in `struct __sk_buff` (include/uapi/linux/bpf.h).
        unsafe { Bytes::new(load_pointer::<76>(self.as_ptr()), load_pointer::<80>(self.as_ptr())) }
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        unsafe { (*self.skb()).ifindex }
    }

    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        self.0.as_ptr()
    }

    #[inline(always)]
    fn store<T: Copy>(&mut self, offset: usize, value: T) -> Option<()> {
        let value = OnStack(value);
        // SAFETY: the helper checks the offset against the buffer's length.
        let done = unsafe {
            bpf_skb_store_bytes(
                self.skb(),
                offset as u32,
                (&raw const value).cast(),
                size_of::<T>() as u32,
                0,
            )
        };
        (done == 0).then_some(())
    }

    #[inline(always)]
    fn add_to_ip_csum(&mut self, offset: usize, delta: u16) -> Option<()> {
        // SAFETY: the helper checks the offset. From 0 and size 0 mean "to is a difference".
        (unsafe { bpf_l3_csum_replace(self.skb(), offset as u32, 0, delta.into(), 0) } == 0).then_some(())
    }

    #[inline(always)]
    fn add_to_l4_csum(&mut self, offset: usize, delta: u16, proto: u8, pseudo: bool) -> Option<()> {
        let mut flags = if proto == PROTO_UDP { BPF_F_MARK_MANGLED_0 } else { 0 };
        if pseudo {
            flags |= BPF_F_PSEUDO_HDR;
        }
        // SAFETY: as above.
        let done = unsafe { bpf_l4_csum_replace(self.skb(), offset as u32, 0, delta.into(), flags.into()) };
        (done == 0).then_some(())
    }

    #[inline(always)]
    fn reshape(&mut self, len: usize, front: usize) -> Option<()> {
        // SAFETY: the helpers check both against the buffer's room.
        let done = unsafe {
            bpf_skb_change_tail(self.skb(), len as u32, 0) == 0
                && bpf_skb_change_head(self.skb(), front as u32, 0) == 0
        };
        done.then_some(())
    }

    #[inline(always)]
    fn send(&self, ifindex: u32) -> u32 {
        // SAFETY: the helper only notes the device.
        unsafe { bpf_redirect(ifindex, 0) as u32 }
    }

    #[inline(always)]
    fn send_to_neighbour(&self, ifindex: u32) -> u32 {
        forward::redirect_neighbour(ifindex)
    }
}
