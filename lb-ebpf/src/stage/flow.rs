//! Stage 7: the flow table. A known flow needs no policy and no choice: its entry holds the whole rewrite.
//!
//! Both directions have an entry; the reply's insert with `BPF_NOEXIST` is the reservation of the source port. At
//! most once a tick an entry notes that it is alive and looks at its twin, putting it back if the LRU dropped it.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::generated::bpf_ktime_get_coarse_ns,
};
use lb_common::{
    abi::{FlowKey, FlowValue, backend_flags, direction, next_hop, role, transmit},
    csum, hash,
    net::{PROTO_TCP, PROTO_UDP},
    outcome::Outcome,
    tcp,
};

use crate::{
    family::Family,
    maps,
    maps::Scratch,
    stage::{nat::Source, parse::Flow, select::Choice},
    verdict::{End, Stage},
};

/// Source ports tried before giving up. The hash starts anywhere in the range, so with a fraction `u` of the range
/// in use a flow fails with probability `u^16`: 3 % at 80 %. The tracing build tries half as many, for the verifier of Linux
/// 6.1 would see more than a million instructions.
const PORT_ATTEMPTS: u32 = if cfg!(feature = "trace") { 8 } else { 16 };

/// Prime stride between attempts: visits every port of any range it doesn't divide.
const PORT_STRIDE: u32 = 7919;

/// Now, in ticks of about a second.
#[inline(always)]
pub fn now_ticks() -> u32 {
    // The coarse clock is a memory read; reading the TSC costs as much as two map lookups.
    (unsafe { bpf_ktime_get_coarse_ns() } >> tcp::TICK_SHIFT) as u32
}

/// The packet's key.
#[inline(always)]
pub fn key<A: Copy>(flow: &Flow<A>, direction: u8) -> FlowKey<A> {
    FlowKey {
        saddr: flow.saddr,
        daddr: flow.daddr,
        sport: flow.sport,
        dport: flow.dport,
        proto: flow.proto,
        direction,
        pad: 0,
    }
}

/// The packet's entry, unless it has none that still holds: a SYN re-opens a closed connection, and a new datagram
/// or SYN for a backend that is gone chooses again. A backend that accepts again after it has answered accepts something
/// else: its client dialled it directly, from a port that it had dialled a service from.
#[inline(always)]
pub fn lookup<F: Family>(
    key: &FlowKey<F::Addr>,
    flow: &Flow<F::Addr>,
) -> Option<&'static mut FlowValue<F::Addr>> {
    let entry = F::flow(key)?;
    if entry.role & role::REPLY == 0 {
        if flow.may_open() && !still_holds::<F>(key, entry) {
            return None;
        }
    } else if flow.is_syn_ack() && entry.tcp & tcp::SEEN_DATA != 0 {
        F::remove_flow(key);
        return None;
    }
    Some(entry)
}

/// What this datagram is for is no service: if its client had a flow to one from this very port, with this very backend,
/// that flow ends here, for answers would be taken for the service's.
#[inline(always)]
pub fn leave_to_backend<F: Family>(flow: &Flow<F::Addr>) {
    if flow.proto != PROTO_UDP {
        return;
    }
    let Some(Scratch { key, twin_key, .. }) = F::scratch() else { return };
    *key = FlowKey {
        saddr: flow.daddr,
        daddr: flow.saddr,
        sport: flow.dport,
        dport: flow.sport,
        proto: flow.proto,
        direction: direction::OUT,
        pad: 0,
    };
    let Some(reply) = F::flow(key) else { return };
    if reply.role & role::REPLY != 0 {
        write_twin_key(twin_key, key, reply);
        F::remove_flow(twin_key);
        F::remove_flow(key);
    }
}

#[inline(always)]
fn still_holds<F: Family>(key: &FlowKey<F::Addr>, entry: &mut FlowValue<F::Addr>) -> bool {
    let Some(backend) = F::backend(entry.backend_id) else { return false };
    if backend.generation != entry.backend_generation || backend.flags & backend_flags::ALIVE == 0 {
        return false;
    }
    if key.proto != PROTO_TCP {
        return true;
    }
    let Some(Scratch { twin_key, .. }) = F::scratch() else { return true };
    write_twin_key(twin_key, key, entry);
    let Some(twin) = F::flow(twin_key) else { return false };
    let is_closed = tcp::is_closed(entry.tcp, twin.tcp);
    // A client that forgot its connection begins one; the backend may accept it.
    twin.tcp = 0;
    entry.tcp = 0;
    !is_closed
}

/// Notes what the packet shows of its connection, and once a tick that both directions are alive.
#[inline(always)]
pub fn track<F: Family>(
    key: &FlowKey<F::Addr>,
    entry: &mut FlowValue<F::Addr>,
    flow: &Flow<F::Addr>,
    now: u32,
) {
    if flow.proto == PROTO_TCP {
        let seen = entry.tcp | tcp::seen(flow.tcp_flags);
        if seen != entry.tcp {
            entry.tcp = seen;
        }
    }
    if entry.seen != now {
        entry.seen = now;
        if let Some(Scratch { twin_key, twin, .. }) = F::scratch() {
            write_twin_key(twin_key, key, entry);
            match F::flow(twin_key) {
                Some(twin) => twin.seen = now,
                None => {
                    write_twin(twin, key, entry);
                    let _ = F::insert_flow(twin_key, twin, BPF_NOEXIST.into());
                }
            }
        }
    }
}

/// Writes the forward entry of a new flow whose source is kept.
#[inline(always)]
pub fn plan<F: Family>(
    entry: &mut FlowValue<F::Addr>,
    flow: &Flow<F::Addr>,
    choice: &Choice<'_, F::Addr>,
    service_id: u32,
    source: Source,
    role: u8,
) {
    let now = now_ticks();
    entry.saddr = flow.saddr;
    entry.daddr = choice.backend.addr;
    entry.sport = flow.sport;
    entry.dport = choice.backend.port;
    entry.addr_delta = csum::delta_words(flow.daddr.as_ref(), choice.backend.addr.as_ref());
    entry.transmit = match source {
        Source::Keep => transmit::STACK,
        Source::Masquerade => transmit::FORWARD,
        Source::Hairpin => transmit::TURN_AROUND,
    };
    entry.role = role;
    entry.tcp = if flow.proto == PROTO_TCP { tcp::seen(flow.tcp_flags) } else { 0 };
    entry.next_hop = next_hop::UNKNOWN;
    entry.service_id = service_id;
    entry.backend_id = choice.id;
    entry.backend_generation = choice.backend.generation;
    entry.ifindex = 0;
    entry.routing_generation = 0;
    entry.seen = now;
    entry.neighbour_checked = now;
    entry.macs = [0; 12];
}

/// Gives a planned entry the node's address as its source.
#[inline(always)]
pub fn masquerade<F: Family>(
    entry: &mut FlowValue<F::Addr>,
    flow: &Flow<F::Addr>,
    node_addr: &F::Addr,
) -> Stage<()> {
    if F::is_unspecified(node_addr) {
        return Err(End::drop(Outcome::DropNoNodeAddress));
    }
    entry.saddr = *node_addr;
    let source_delta = csum::delta_words(flow.saddr.as_ref(), node_addr.as_ref());
    entry.addr_delta = csum::fold(u32::from(entry.addr_delta) + u32::from(source_delta));
    Ok(())
}

/// Inserts a planned entry and its twin.
///
/// Stops with a drop when no source port is free or the table refuses.
#[inline(always)]
pub fn insert<F: Family>(flow: &Flow<F::Addr>, hash: u32, scratch: &mut Scratch<F::Addr>) -> Stage<()> {
    reserve_port::<F>(flow, hash, scratch)?;
    if F::insert_flow(&scratch.key, &scratch.entry, BPF_ANY.into()).is_err() {
        F::remove_flow(&scratch.twin_key);
        return Err(End::drop(Outcome::DropFlowTable));
    }
    Ok(())
}

/// Finds a source port under which the reply is unambiguous, by inserting the reply's entry.
///
/// A kept source tries its own port first: only a client that uses one port towards two VIPs of one backend needs
/// another.
#[inline(always)]
fn reserve_port<F: Family>(
    flow: &Flow<F::Addr>,
    hash: u32,
    Scratch { key, twin_key, entry, twin, .. }: &mut Scratch<F::Addr>,
) -> Stage<()> {
    let (first, count) =
        maps::node().map_or((0, 0), |node| (node.snat_port_first, u32::from(node.snat_port_count)));
    let mut offset = hash::scale(hash.rotate_left(16), count);
    let mut own_port = entry.transmit == transmit::STACK;
    for _ in 0..PORT_ATTEMPTS {
        if own_port {
            own_port = false;
        } else if count == 0 {
            break;
        } else {
            offset = (offset + PORT_STRIDE) % count;
            entry.sport = first + offset as u16;
        }
        entry.port_delta = port_delta(flow, entry.sport, entry.dport);
        write_twin_key(twin_key, key, entry);
        // Looked up first: an LRU insert evicts an entry even when it then fails (`kernel/bpf/hashtab.c:
        // htab_lru_map_update_elem`).
        let insert = match F::flow(twin_key) {
            // A port that netfilter masqueraded to has replies of its own.
            None if entry.transmit != transmit::STACK && F::is_foreign(twin_key) => continue,
            None => BPF_NOEXIST,
            Some(existing) if may_replace(existing, twin_key.proto, flow, entry.seen) => BPF_ANY,
            Some(_) => continue,
        };
        write_twin(twin, key, entry);
        match F::insert_flow(twin_key, twin, insert.into()) {
            Err(EEXIST) => {}
            inserted => return inserted.map_err(|_| End::drop(Outcome::DropFlowTable)),
        }
    }
    Err(End::drop(Outcome::DropSnatPorts))
}

const EEXIST: i32 = -17;

/// A reply entry may be replaced if it is this very client's towards this very frontend, or dead.
#[inline(always)]
fn may_replace<A: Copy + PartialEq>(existing: &FlowValue<A>, proto: u8, flow: &Flow<A>, now: u32) -> bool {
    if existing.daddr == flow.saddr
        && existing.dport == flow.sport
        && existing.saddr == flow.daddr
        && existing.sport == flow.dport
    {
        return true;
    }
    let idle = now.wrapping_sub(existing.seen);
    // The reply's own state has to do for its forward twin's: a look at that would cost the stack another key. A
    // connection that both sides closed shows a FIN or RST here.
    idle > tcp::idle_limit_ticks(proto, existing.tcp, existing.tcp)
}

/// The checksum delta of a port rewrite.
#[inline(always)]
fn port_delta<A>(flow: &Flow<A>, sport: u16, dport: u16) -> u16 {
    csum::fold(
        u32::from(csum::delta16(flow.sport.to_be(), sport.to_be()))
            + u32::from(csum::delta16(flow.dport.to_be(), dport.to_be())),
    )
}

/// The key of the other direction: this direction's result, read backwards. What the stack delivers comes back
/// through the other side of the stack; what we send ourselves comes back where packets come in.
#[inline(always)]
fn write_twin_key<A: Copy>(twin_key: &mut FlowKey<A>, key: &FlowKey<A>, value: &FlowValue<A>) {
    *twin_key = FlowKey {
        saddr: value.daddr,
        daddr: value.saddr,
        sport: value.dport,
        dport: value.sport,
        proto: key.proto,
        direction: if value.transmit == transmit::STACK {
            key.direction ^ direction::OUT
        } else {
            direction::IN
        },
        pad: 0,
    };
}

/// Writes the entry of the other direction: this direction's key, read backwards. A delta's one's complement undoes
/// it.
#[inline(always)]
fn write_twin<A: Copy>(twin: &mut FlowValue<A>, key: &FlowKey<A>, value: &FlowValue<A>) {
    *twin = FlowValue {
        saddr: key.daddr,
        daddr: key.saddr,
        sport: key.dport,
        dport: key.sport,
        addr_delta: !value.addr_delta,
        port_delta: !value.port_delta,
        role: value.role ^ role::REPLY,
        tcp: 0,
        next_hop: next_hop::UNKNOWN,
        ifindex: 0,
        routing_generation: 0,
        macs: [0; 12],
        ..*value
    };
}
