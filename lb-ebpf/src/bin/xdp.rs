//! XDP on external devices: the fast path. What it can't finish goes on to tc untouched.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod program {
    use aya_ebpf::{
        bindings::{xdp_action, xdp_md},
        macros::xdp,
        programs::XdpContext,
    };
    use lb_common::outcome::Hook;
    use lb_ebpf::{
        count,
        ctx::{Ctx, Xdp},
        family::{V4, V6},
        origin::Outside,
        pipeline::{self, Subprograms},
        trace,
        verdict::{Action, End},
    };

    #[xdp(frags)]
    pub fn lb_xdp(ctx: XdpContext) -> u32 {
        let mut ctx = Xdp::new(ctx);
        let end = pipeline::arriving::<_, Subs>(&mut ctx);
        count::record(Hook::Xdp, end.outcome());
        trace::ended(&ctx, Hook::Xdp, end);
        match end.action() {
            Action::Pass => xdp_action::XDP_PASS,
            Action::Drop => xdp_action::XDP_DROP,
            Action::Redirect(verdict) => verdict,
        }
    }

    enum Subs {}

    #[rustfmt::skip]
    impl Subprograms for Subs {
        // The hottest part stays in the program itself: a call costs a nanosecond or two.
        #[inline(always)]
        fn known4<C: Ctx>(ctx: &C, direction: u8) -> End { End::from_bits(known4(ctx.as_ptr().cast(), direction)) }
        #[inline(always)]
        fn known6<C: Ctx>(ctx: &C, direction: u8) -> End { End::from_bits(known6(ctx.as_ptr().cast(), direction)) }
        #[inline(always)]
        fn open4<C: Ctx>(ctx: &C) -> End { End::from_bits(open4(ctx.as_ptr().cast())) }
        #[inline(always)]
        fn open6<C: Ctx>(ctx: &C) -> End { End::from_bits(open6(ctx.as_ptr().cast())) }
        #[inline(always)]
        fn refuse4<C: Ctx>(ctx: &C, outcome: u32) -> End { End::from_bits(refuse4(ctx.as_ptr().cast(), outcome)) }
        #[inline(always)]
        fn refuse6<C: Ctx>(ctx: &C, outcome: u32) -> End { End::from_bits(refuse6(ctx.as_ptr().cast(), outcome)) }
    }

    // With logging its stack is too large to lie below that of the others.
    #[cfg_attr(not(feature = "trace"), inline(always))]
    #[cfg_attr(feature = "trace", inline(never))]
    fn known4(ctx: *mut xdp_md, direction: u8) -> u64 {
        pipeline::known::<V4, _>(&mut Xdp::new(XdpContext::new(ctx)), direction)
            .unwrap_or_else(|end| end)
            .bits()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn known6(ctx: *mut xdp_md, direction: u8) -> u64 {
        pipeline::known::<V6, _>(&mut Xdp::new(XdpContext::new(ctx)), direction)
            .unwrap_or_else(|end| end)
            .bits()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn open4(ctx: *mut xdp_md) -> u64 {
        pipeline::open::<V4, Outside, _>(&mut Xdp::new(XdpContext::new(ctx))).unwrap_or_else(|end| end).bits()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn open6(ctx: *mut xdp_md) -> u64 {
        pipeline::open::<V6, Outside, _>(&mut Xdp::new(XdpContext::new(ctx))).unwrap_or_else(|end| end).bits()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn refuse4(ctx: *mut xdp_md, outcome: u32) -> u64 {
        pipeline::refuse::<V4, _>(&mut Xdp::new(XdpContext::new(ctx)), outcome)
            .unwrap_or_else(|end| end)
            .bits()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn refuse6(ctx: *mut xdp_md, outcome: u32) -> u64 {
        pipeline::refuse::<V6, _>(&mut Xdp::new(XdpContext::new(ctx)), outcome)
            .unwrap_or_else(|end| end)
            .bits()
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
