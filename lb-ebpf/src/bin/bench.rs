//! The benchmark's driver: restores and varies the packet at every repeat of `BPF_PROG_TEST_RUN`, then calls the program
//! under test.
//!
//! The kernel gives each repeat what the one before left: a program that rewrites would see its own output from the
//! second packet on.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod program {
    use aya_ebpf::{
        bindings::xdp_action,
        btf_maps::{Array, ProgramArray},
        helpers::generated::bpf_xdp_adjust_head,
        macros::{btf_map, xdp},
        programs::XdpContext,
    };
    use lb_common::abi::BenchConfig;

    /// What to make of each packet.
    #[btf_map]
    static BENCH: Array<BenchConfig, 1> = Array::new();

    /// Slot 0: the program under test.
    #[btf_map]
    static TARGET: ProgramArray<1> = ProgramArray::new();

    #[xdp(frags)]
    pub fn bench_driver(ctx: XdpContext) -> u32 {
        drive(ctx).unwrap_or(xdp_action::XDP_ABORTED)
    }

    #[inline(always)]
    fn drive(ctx: XdpContext) -> Option<u32> {
        let config = BENCH.get_ptr_mut(0)?;
        // SAFETY: the map's only value; test runs of it don't overlap.
        let config = unsafe { &mut *config };
        let len = ctx.data_end() - ctx.data();
        if len != config.packet_len as usize {
            // SAFETY: the helper checks the room.
            unsafe { bpf_xdp_adjust_head(ctx.ctx, len as i32 - config.packet_len as i32) };
        }
        let (data, end) = (ctx.data(), ctx.data_end());
        if data + 64 > end {
            return None;
        }
        // SAFETY: 64 bytes by the check above.
        unsafe { *(data as *mut [u64; 8]) = config.template };
        let flow = config.count.wrapping_mul(config.multiplier).wrapping_add(config.base) & config.flow_mask;
        config.count = config.count.wrapping_add(1);
        // IPv4 without options behind Ethernet: source at 26, destination at 30, source port at 34.
        if config.flow_mask != 0 {
            // SAFETY: inside the 64 bytes.
            unsafe {
                *((data + 26) as *mut u32) = (config.source + (flow >> 14)).to_be();
                *((data + 34) as *mut u16) = (config.source_port + (flow & 0x3fff) as u16).to_be();
            }
        }
        if config.vip_mask != 0 {
            let vip = flow.wrapping_mul(0x9e37_79b1) >> 8 & config.vip_mask;
            // SAFETY: inside the 64 bytes.
            unsafe { *((data + 30) as *mut u32) = (config.destination + vip).to_be() };
        }
        // SAFETY: the program takes the same context.
        let _ = unsafe { TARGET.tail_call(&ctx, 0) };
        None
    }

    /// For the far side of a test's veth: the kernel delivers what was sent by `XDP_TX` at once only to a peer that has
    /// a program (`drivers/net/veth.c: veth_xdp_flush`).
    #[xdp(frags)]
    pub fn bench_pass(_: XdpContext) -> u32 {
        xdp_action::XDP_PASS
    }

    /// The cost of the driver itself.
    #[xdp(frags)]
    pub fn bench_nothing(_: XdpContext) -> u32 {
        xdp_action::XDP_TX
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
