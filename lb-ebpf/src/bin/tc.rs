//! tc on external devices and on the host side of pod veths: the whole path.
//!
//! Passing is `TCX_NEXT` (−1): other programs on the device, and the stack, go on with the packet.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod program {
    use aya_ebpf::{
        bindings::{__sk_buff, TC_ACT_SHOT},
        macros::classifier,
        programs::TcContext,
    };
    use lb_common::outcome::Hook;
    use lb_ebpf::{
        count,
        ctx::{Ctx, Tc},
        family::{V4, V6},
        origin::{Outside, Pod},
        pipeline::{self, Subprograms},
        trace,
        verdict::{Action, End},
    };

    /// `TCX_NEXT`, which clsact calls `TC_ACT_UNSPEC`.
    const NEXT: i32 = -1;

    #[classifier]
    pub fn lb_netdev_in(ctx: TcContext) -> i32 {
        verdict(Hook::NetdevIngress, Tc::linear(ctx), pipeline::arriving::<_, Netdev>)
    }

    #[classifier]
    pub fn lb_netdev_out(ctx: TcContext) -> i32 {
        verdict(Hook::NetdevEgress, Tc::linear(ctx), pipeline::leaving::<_, Netdev>)
    }

    #[classifier]
    pub fn lb_pod_in(ctx: TcContext) -> i32 {
        verdict(Hook::PodIngress, Tc::linear(ctx), pipeline::arriving::<_, PodVeth>)
    }

    #[classifier]
    pub fn lb_pod_out(ctx: TcContext) -> i32 {
        verdict(Hook::PodEgress, Tc::linear(ctx), pipeline::leaving::<_, Netdev>)
    }

    #[inline(always)]
    fn verdict(hook: Hook, mut ctx: Tc, way: impl FnOnce(&mut Tc) -> End) -> i32 {
        let end = way(&mut ctx);
        count::record(hook, end.outcome());
        trace::ended(&ctx, hook, end);
        match end.action() {
            Action::Pass => NEXT,
            Action::Drop => TC_ACT_SHOT as i32,
            Action::Redirect(verdict) => verdict as i32,
        }
    }

    enum Netdev {}
    enum PodVeth {}

    #[rustfmt::skip]
    impl Subprograms for Netdev {
        #[inline(always)]
        fn known4<C: Ctx>(ctx: &C, direction: u8) -> End { End::from_bits(known4(ctx.as_ptr().cast(), direction)) }
        #[inline(always)]
        fn known6<C: Ctx>(ctx: &C, direction: u8) -> End { End::from_bits(known6(ctx.as_ptr().cast(), direction)) }
        #[inline(always)]
        fn open4<C: Ctx>(ctx: &C) -> End { End::from_bits(netdev_open4(ctx.as_ptr().cast())) }
        #[inline(always)]
        fn open6<C: Ctx>(ctx: &C) -> End { End::from_bits(netdev_open6(ctx.as_ptr().cast())) }
        #[inline(always)]
        fn refuse4<C: Ctx>(ctx: &C, outcome: u32) -> End { End::from_bits(refuse4(ctx.as_ptr().cast(), outcome)) }
        #[inline(always)]
        fn refuse6<C: Ctx>(ctx: &C, outcome: u32) -> End { End::from_bits(refuse6(ctx.as_ptr().cast(), outcome)) }
    }

    #[rustfmt::skip]
    impl Subprograms for PodVeth {
        #[inline(always)]
        fn known4<C: Ctx>(ctx: &C, direction: u8) -> End { End::from_bits(known4(ctx.as_ptr().cast(), direction)) }
        #[inline(always)]
        fn known6<C: Ctx>(ctx: &C, direction: u8) -> End { End::from_bits(known6(ctx.as_ptr().cast(), direction)) }
        #[inline(always)]
        fn open4<C: Ctx>(ctx: &C) -> End { End::from_bits(pod_open4(ctx.as_ptr().cast())) }
        #[inline(always)]
        fn open6<C: Ctx>(ctx: &C) -> End { End::from_bits(pod_open6(ctx.as_ptr().cast())) }
        #[inline(always)]
        fn refuse4<C: Ctx>(ctx: &C, outcome: u32) -> End { End::from_bits(refuse4(ctx.as_ptr().cast(), outcome)) }
        #[inline(always)]
        fn refuse6<C: Ctx>(ctx: &C, outcome: u32) -> End { End::from_bits(refuse6(ctx.as_ptr().cast(), outcome)) }
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn known4(ctx: *mut __sk_buff, direction: u8) -> u64 {
        pipeline::known::<V4, _>(&mut Tc::new(TcContext::new(ctx)), direction)
            .unwrap_or_else(|end| end)
            .bits()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn known6(ctx: *mut __sk_buff, direction: u8) -> u64 {
        pipeline::known::<V6, _>(&mut Tc::new(TcContext::new(ctx)), direction)
            .unwrap_or_else(|end| end)
            .bits()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn netdev_open4(ctx: *mut __sk_buff) -> u64 {
        pipeline::open::<V4, Outside, _>(&mut Tc::new(TcContext::new(ctx))).unwrap_or_else(|end| end).bits()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn netdev_open6(ctx: *mut __sk_buff) -> u64 {
        pipeline::open::<V6, Outside, _>(&mut Tc::new(TcContext::new(ctx))).unwrap_or_else(|end| end).bits()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn pod_open4(ctx: *mut __sk_buff) -> u64 {
        pipeline::open::<V4, Pod, _>(&mut Tc::new(TcContext::new(ctx))).unwrap_or_else(|end| end).bits()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn pod_open6(ctx: *mut __sk_buff) -> u64 {
        pipeline::open::<V6, Pod, _>(&mut Tc::new(TcContext::new(ctx))).unwrap_or_else(|end| end).bits()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn refuse4(ctx: *mut __sk_buff, outcome: u32) -> u64 {
        pipeline::refuse::<V4, _>(&mut Tc::new(TcContext::new(ctx)), outcome).unwrap_or_else(|end| end).bits()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn refuse6(ctx: *mut __sk_buff, outcome: u32) -> u64 {
        pipeline::refuse::<V6, _>(&mut Tc::new(TcContext::new(ctx)), outcome).unwrap_or_else(|end| end).bits()
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
