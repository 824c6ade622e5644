//! Stage 2: is it for a service, and which? What no frontend claims is refused or passes, by what the address is.

use lb_common::{
    abi::{
        FrontendKey, FrontendValue, SlotRange, VipKey, direction, frontend_flags as flag, node_flags,
        vip_kind,
    },
    hash,
    net::PROTO_UDP,
    outcome::Outcome,
};

use crate::{
    family::Family,
    maps::{self, VIP_FILTER},
    stage::{flow, parse::Flow},
    verdict::{End, Stage},
};

/// One scope of a frontend, ready to be carried out.
#[derive(Clone, Copy)]
pub struct Service {
    /// Service port id.
    pub id: u32,
    /// Affinity timeout in seconds, 0 for none.
    pub affinity_secs: u32,
    /// The scope's backends.
    pub slots: SlotRange,
    /// A backend flag: set on the backends that this scope's list holds.
    pub list_flag: u8,
    /// Drops, rather than refuses, when it has no backend.
    pub none_drops: bool,
    /// Masquerades if the backend is on another node.
    pub masquerade_remote: bool,
    /// Masquerades always.
    pub masquerade_always: bool,
    /// Sources are restricted.
    pub source_ranges: bool,
}

/// Passes at once what is for no VIP. One bit, read from an 8 KiB array: most packets end here.
#[inline(always)]
pub fn maybe_vip<F: Family>(daddr: &F::Addr) -> Stage<()> {
    let bit = hash::vip_filter_bit_of_words(daddr.as_ref());
    match VIP_FILTER.get(bit >> 6) {
        Some(word) if word >> (bit & 63) & 1 != 0 => Ok(()),
        _ => Err(End::pass(Outcome::PassNotOurs)),
    }
}

/// From now on packets to this address don't end at [`maybe_vip`].
#[inline(always)]
pub fn look_at<F: Family>(addr: &F::Addr) {
    let bit = hash::vip_filter_bit_of_words(addr.as_ref());
    let Some(word) = VIP_FILTER.get_ptr_mut(bit >> 6) else { return };
    let mask = 1u64 << (bit & 63);
    // Mostly it is set already, and every CPU reads this line for every packet.
    // SAFETY: a word of the map, which lives as long as the program.
    if unsafe { word.read_volatile() } & mask == 0 {
        // In one step, for others set bits of the same word; core has no such method for this target.
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("lock *(u64 *)({word} + 0) |= {mask}", word = in(reg) word, mask = in(reg) mask);
        }
    }
}

/// Passes what is another datapath's: all that is new while this one drains, and UDP flows that netfilter had before.
#[inline(always)]
pub fn left_to_others<F: Family>(flow: &Flow<F::Addr>) -> Stage<()> {
    if maps::node().is_some_and(|node| node.flags & node_flags::DRAINING != 0) {
        return Err(End::pass(Outcome::PassDraining));
    }
    if flow.proto == PROTO_UDP
        && let Some(scratch) = F::scratch()
    {
        scratch.key = flow::key(flow, direction::IN);
        if F::is_foreign(&scratch.key) {
            return Err(End::pass(Outcome::PassForeign));
        }
    }
    Ok(())
}

/// The frontend a packet is for. A packet that can't open a flow passes: its connection may be another datapath's.
#[inline(always)]
pub fn frontend<F: Family>(flow: &Flow<F::Addr>) -> Stage<&'static FrontendValue> {
    let key = FrontendKey { addr: flow.daddr, port: flow.dport, proto: flow.proto, pad: 0 };
    match F::frontend(&key) {
        Some(frontend) if flow.may_open() => Ok(frontend),
        Some(_) => Err(End::pass(Outcome::PassMidStream)),
        None => Err(unknown_port::<F>(flow)),
    }
}

/// What becomes of a port that no frontend claims: a node's own address keeps all its other ports, always.
#[inline(always)]
fn unknown_port<F: Family>(flow: &Flow<F::Addr>) -> End {
    match F::vip(&VipKey { addr: flow.daddr }).map(|vip| vip.kind) {
        Some(vip_kind::VIP) if flow.may_open() => End::refuse(Outcome::RefuseUnknownPort),
        Some(vip_kind::VIP) => End::pass(Outcome::PassMidStream),
        Some(_) => End::pass(Outcome::PassNodeAddress),
        None => End::pass(Outcome::PassNotOurs),
    }
}

/// The frontend as packets from outside see it.
#[inline(always)]
pub fn external(frontend: &FrontendValue) -> Service {
    let has = |bit| frontend.flags & bit != 0;
    Service {
        id: frontend.service_id,
        affinity_secs: frontend.affinity_secs,
        slots: frontend.external,
        list_flag: list_flag(has(flag::EXTERNAL_LOCAL_LIST)),
        none_drops: has(flag::EXTERNAL_NONE_DROPS),
        masquerade_remote: has(flag::EXTERNAL_MASQ_REMOTE),
        masquerade_always: has(flag::EXTERNAL_MASQ_ALWAYS),
        source_ranges: has(flag::SOURCE_RANGES),
    }
}

/// The frontend as this node's pods and processes see it.
#[inline(always)]
pub fn internal(frontend: &FrontendValue) -> Service {
    let has = |bit| frontend.flags & bit != 0;
    Service {
        id: frontend.service_id,
        affinity_secs: frontend.affinity_secs,
        slots: frontend.internal,
        list_flag: list_flag(has(flag::INTERNAL_LOCAL_LIST)),
        none_drops: has(flag::INTERNAL_NONE_DROPS),
        masquerade_remote: false,
        masquerade_always: has(flag::INTERNAL_MASQ_ALWAYS),
        source_ranges: has(flag::SOURCE_RANGES),
    }
}

#[inline(always)]
fn list_flag(local: bool) -> u8 {
    use lb_common::abi::backend_flags::{IN_CLUSTER_LIST, IN_LOCAL_LIST};
    if local { IN_LOCAL_LIST } else { IN_CLUSTER_LIST }
}
