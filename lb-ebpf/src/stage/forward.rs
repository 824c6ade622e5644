//! Stage 8: where does a packet go that we send ourselves? To the next hop its entry remembers, or else to the one
//! the kernel's routes and neighbours give now.
//!
//! A remembered next hop holds for one routing generation. Every [`NEIGHBOUR_TICKS`] one packet goes through the
//! kernel's own neighbour output instead, which probes a neighbour that has gone quiet (`net/core/neighbour.c`):
//! without that a changed MAC address would never be noticed when the agent is away.

use aya_ebpf::{
    bindings::{bpf_fib_lookup, bpf_redir_neigh},
    helpers::generated::{bpf_fib_lookup as fib_lookup, bpf_redirect_neigh},
};
use lb_common::{
    abi::{FlowValue, device_flags, next_hop, transmit},
    outcome::Outcome,
};

use crate::{
    ctx::Ctx,
    family::Family,
    maps,
    verdict::{End, Stage},
};

/// How long a neighbour is trusted without the kernel's own check, in ticks; below the kernel's default
/// `base_reachable_time` of 30 s.
const NEIGHBOUR_TICKS: u32 = 25;

/// `BPF_FIB_LKUP_RET_SUCCESS`, `BPF_FIB_LKUP_RET_NO_NEIGH` (`include/uapi/linux/bpf.h`).
const FIB_SUCCESS: i64 = 0;
const FIB_NO_NEIGHBOUR: i64 = 7;

/// How the packet leaves this hook.
#[derive(Clone, Copy)]
pub enum Exit {
    /// To the stack.
    Stack,
    /// Back where it came from.
    TurnAround,
    /// Out of the entry's device, with the entry's Ethernet addresses.
    Direct,
    /// Out of the entry's device, by the kernel's neighbour output.
    Neighbour,
}

/// Where an address is reached.
#[derive(Clone, Copy)]
pub struct Route<'a, A> {
    /// Egress device.
    pub ifindex: u32,
    /// The neighbour is known: `dmac` and `smac` hold.
    pub resolved: bool,
    /// Ethernet address of the next hop.
    pub dmac: [u8; 6],
    /// Ethernet address of the egress device.
    pub smac: [u8; 6],
    /// XDP may send frames out of the device.
    pub xdp_target: bool,
    /// The node's address on that device, or else its main one.
    pub source: &'a A,
}

/// Asks the kernel's routes and neighbours.
#[inline(always)]
pub fn route<F: Family, C: Ctx>(
    ctx: &C,
    params: &mut bpf_fib_lookup,
    saddr: &F::Addr,
    daddr: &F::Addr,
) -> Stage<Route<'static, F::Addr>> {
    // What the last answer left behind is no part of this question.
    params.l4_protocol = 0;
    params.sport = 0;
    params.dport = 0;
    params.__bindgen_anon_1.tot_len = 0;
    params.__bindgen_anon_2.flowinfo = 0;
    params.ifindex = ctx.ifindex();
    F::fib_question(params, saddr, daddr);
    // SAFETY: the size is params' own.
    let answer = unsafe { fib_lookup(ctx.as_ptr(), &raw mut *params, size_of::<bpf_fib_lookup>() as i32, 0) };
    if answer != FIB_SUCCESS && answer != FIB_NO_NEIGHBOUR {
        return Err(End::drop(Outcome::DropNoRoute));
    }
    // SAFETY: values are replaced as a whole.
    let device = unsafe { maps::DEVICES.get(params.ifindex) };
    let node = maps::node().ok_or(End::drop(Outcome::DropNoNodeAddress))?;
    let source = match device {
        Some(device) if !F::is_unspecified(F::device_addr(device)) => F::device_addr(device),
        _ => F::node_addr(node),
    };
    Ok(Route {
        ifindex: params.ifindex,
        resolved: answer == FIB_SUCCESS,
        dmac: params.dmac,
        smac: params.smac,
        xdp_target: device.is_some_and(|device| device.flags & device_flags::XDP_TARGET != 0),
        source,
    })
}

/// Writes a route into an entry.
#[inline(always)]
fn remember<A>(entry: &mut FlowValue<A>, route: &Route<'_, A>, routing_generation: u32) {
    entry.ifindex = route.ifindex;
    entry.routing_generation = routing_generation;
    entry.macs[..6].copy_from_slice(&route.dmac);
    entry.macs[6..].copy_from_slice(&route.smac);
    entry.next_hop = match (route.resolved, route.xdp_target) {
        (false, _) => next_hop::UNKNOWN,
        (true, false) => next_hop::KNOWN,
        (true, true) => next_hop::KNOWN_TO_XDP,
    };
}

/// How the first packet of a forwarded flow leaves; its route goes into the entry.
#[inline(always)]
pub fn first_exit<F: Family, C: Ctx>(
    entry: &mut FlowValue<F::Addr>,
    route: &Route<'_, F::Addr>,
    routing_generation: u32,
) -> Stage<Exit> {
    remember(entry, route, routing_generation);
    match entry.next_hop {
        next_hop::KNOWN_TO_XDP => Ok(Exit::Direct),
        _ if C::IS_XDP => Err(End::pass(Outcome::PassToTc)),
        next_hop::KNOWN => Ok(Exit::Direct),
        _ => Ok(Exit::Neighbour),
    }
}

/// How a packet with this entry leaves. XDP hands what it can't send to tc, before anything is rewritten.
#[inline(always)]
pub fn exit<F: Family, C: Ctx>(ctx: &C, entry: &mut FlowValue<F::Addr>, now: u32) -> Stage<Exit> {
    match entry.transmit {
        transmit::STACK if C::IS_XDP => return Err(End::pass(Outcome::PassToTc)),
        transmit::STACK => return Ok(Exit::Stack),
        transmit::TURN_AROUND => return Ok(Exit::TurnAround),
        _ => {}
    }
    let generation = maps::node().map_or(0, |node| node.routing_generation);
    let due = now.wrapping_sub(entry.neighbour_checked) > NEIGHBOUR_TICKS;
    if C::IS_XDP && due {
        return Err(End::pass(Outcome::PassToTc));
    }
    if due || entry.next_hop == next_hop::UNKNOWN || entry.routing_generation != generation {
        if entry.transmit == transmit::RESET {
            return Err(End::refuse(Outcome::RefuseBackendGone));
        }
        let (saddr, daddr) = (entry.saddr, entry.daddr);
        let scratch = F::scratch().ok_or(End::drop(Outcome::DropNoRoute))?;
        let route = route::<F, C>(ctx, &mut scratch.fib, &saddr, &daddr)?;
        remember(entry, &route, generation);
        if !C::IS_XDP {
            entry.neighbour_checked = now;
            return Ok(Exit::Neighbour);
        }
    }
    match entry.next_hop {
        next_hop::KNOWN if !C::IS_XDP => Ok(Exit::Direct),
        next_hop::KNOWN_TO_XDP => Ok(Exit::Direct),
        _ if C::IS_XDP => Err(End::pass(Outcome::PassToTc)),
        _ => Ok(Exit::Neighbour),
    }
}

/// `bpf_redirect_neigh`: the kernel finds route and neighbour and resolves it if need be (5.10).
#[inline(always)]
pub fn redirect_neighbour(ifindex: u32) -> u32 {
    // SAFETY: no parameters are passed.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut::<bpf_redir_neigh>(), 0, 0) as u32 }
}
