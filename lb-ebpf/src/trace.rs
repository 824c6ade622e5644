//! Logging of decisions, in the tracing build only; in the normal build every function here is empty.
//!
//! The stage that first knows a packet's addresses decides once whether it is to be logged, in [`packet`]; until the
//! packet's end every other function asks for that answer only.

use lb_common::{abi::FlowValue, outcome::Hook};

use crate::{
    ctx::Ctx,
    family::Family,
    stage::{classify::Service, parse::Flow, select::Choice},
    verdict::End,
};

#[cfg(not(feature = "trace"))]
mod off {
    use super::*;

    /// A hook was entered: nothing is known of its packet.
    #[inline(always)]
    pub fn entered() {}
    /// The packet was read.
    #[inline(always)]
    pub fn packet<F: Family, C: Ctx>(_: &C, _: &Flow<F::Addr>) {}
    /// An entry of the flow table applies.
    #[inline(always)]
    pub fn known<F: Family, C: Ctx>(_: &C, _: &FlowValue<F::Addr>) {}
    /// The frontend's scope is known.
    #[inline(always)]
    pub fn service<C: Ctx>(_: &C, _: &Service) {}
    /// The backend is chosen.
    #[inline(always)]
    pub fn choice<F: Family, C: Ctx>(_: &C, _: &Choice<'_, F::Addr>) {}
    /// A new flow has its entries; its own is in the scratch space.
    #[inline(always)]
    pub fn opened<F: Family>() {}
    /// The packet's way has ended.
    #[inline(always)]
    pub fn ended<C: Ctx>(_: &C, _: Hook, _: End) {}
}
#[cfg(not(feature = "trace"))]
pub use off::*;

#[cfg(feature = "trace")]
mod on {
    use aya_ebpf::{btf_maps::PerCpuArray, macros::btf_map};
    use aya_log_ebpf::info;
    use lb_common::net::ETHERTYPE_IPV4;

    use super::*;
    use crate::{
        family::{V4, V6},
        maps::TRACE,
    };

    /// Whether this CPU's packet is to be logged.
    #[btf_map]
    static TRACED: PerCpuArray<u32, 1> = PerCpuArray::new();

    #[inline(always)]
    fn set(traced: bool) {
        if let Some(slot) = TRACED.get_ptr_mut(0) {
            // SAFETY: a per-CPU slot; these programs run with softirqs off.
            unsafe { *slot = traced.into() };
        }
    }

    #[inline(always)]
    fn traced() -> bool {
        TRACED.get(0).is_some_and(|traced| *traced != 0)
    }

    /// A hook was entered: nothing is known of its packet.
    #[inline(always)]
    pub fn entered() {
        set(false);
    }

    /// The packet was read.
    #[inline(always)]
    pub fn packet<F: Family, C: Ctx>(ctx: &C, flow: &Flow<F::Addr>) {
        let Some(filter) = TRACE.get(0) else { return };
        let port = filter.port == 0 || filter.port == flow.sport || filter.port == flow.dport;
        let proto = filter.proto == 0 || filter.proto == flow.proto;
        let any = filter.addr == [0; 16];
        let addr = any || F::shown16(&flow.saddr) == filter.addr || F::shown16(&flow.daddr) == filter.addr;
        if port && proto && addr && !traced() {
            set(true);
            info!(
                ctx.as_ptr(),
                "packet {:i}:{} > {:i}:{} protocol {} tcp flags {:x}",
                F::shown(&flow.saddr),
                flow.sport,
                F::shown(&flow.daddr),
                flow.dport,
                flow.proto,
                flow.tcp_flags
            );
        }
    }

    /// An entry of the flow table applies.
    #[inline(always)]
    pub fn known<F: Family, C: Ctx>(ctx: &C, to: &FlowValue<F::Addr>) {
        if traced() {
            info!(
                ctx.as_ptr(),
                "flow known: becomes {:i}:{} > {:i}:{}, role {}, backend {}",
                F::shown(&to.saddr),
                to.sport,
                F::shown(&to.daddr),
                to.dport,
                to.role,
                to.backend_id
            );
        }
    }

    /// The frontend's scope is known.
    #[inline(always)]
    pub fn service<C: Ctx>(_: &C, service: &Service) {
        let Service { id, slots, affinity_secs, .. } = *service;
        trace_service(id, slots.count, slots.first, affinity_secs);
    }

    /// The backend is chosen.
    #[inline(always)]
    pub fn choice<F: Family, C: Ctx>(_: &C, choice: &Choice<'_, F::Addr>) {
        match F::ETHERTYPE {
            ETHERTYPE_IPV4 => trace_choice4(choice.id),
            _ => trace_choice6(choice.id),
        };
    }

    /// A new flow has its entries; its own is in the scratch space.
    #[inline(always)]
    pub fn opened<F: Family>() {
        match F::ETHERTYPE {
            ETHERTYPE_IPV4 => trace_opened4(),
            _ => trace_opened6(),
        };
    }

    /// The packet's way has ended. The agent puts names for the numbers.
    #[inline(always)]
    pub fn ended<C: Ctx>(ctx: &C, hook: Hook, end: End) {
        trace_ended(hook as u32, end.outcome(), ctx.ifindex());
    }

    // Global subprograms: their stacks don't lie beside those of the hook's other subprograms, and what a packet is
    // logged or not logged as is not followed through the rest of its way. Linux 6.1 would see more than a million
    // instructions otherwise.

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn trace_service(id: u32, count: u32, first: u32, affinity_secs: u32) -> u32 {
        if traced() {
            info!(
                (),
                "service port {}: {} backends in slots {} and on, affinity {} s",
                id,
                count,
                first,
                affinity_secs
            );
        }
        0
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn trace_choice4(id: u32) -> u32 {
        log_choice::<V4>(id)
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn trace_choice6(id: u32) -> u32 {
        log_choice::<V6>(id)
    }

    #[inline(always)]
    fn log_choice<F: Family>(id: u32) -> u32 {
        if traced()
            && let Some(backend) = F::backend(id)
        {
            info!((), "backend {}: {:i}:{}", id, F::shown(&backend.addr), backend.port);
        }
        0
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn trace_opened4() -> u32 {
        log_opened::<V4>()
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn trace_opened6() -> u32 {
        log_opened::<V6>()
    }

    #[inline(always)]
    fn log_opened<F: Family>() -> u32 {
        if traced()
            && let Some(scratch) = F::scratch()
        {
            let to = &scratch.entry;
            info!(
                (),
                "flow opened: becomes {:i}:{} > {:i}:{}, role {}",
                F::shown(&to.saddr),
                to.sport,
                F::shown(&to.daddr),
                to.dport,
                to.role
            );
        }
        0
    }

    #[inline(never)]
    #[unsafe(no_mangle)]
    extern "C" fn trace_ended(hook: u32, outcome: u32, ifindex: u32) -> u32 {
        if traced() {
            info!((), "ended: hook {} outcome {} ifindex {}", hook, outcome, ifindex);
        }
        0
    }
}
#[cfg(feature = "trace")]
pub use on::*;
