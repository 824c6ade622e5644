//! What happens to a packet, stage by stage: one function per place where it can enter.

use lb_common::{
    abi::{FlowValue, direction, role},
    net::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, PROTO_UDP},
    outcome::Outcome,
};

use crate::{
    ctx::Ctx,
    family::Family,
    maps,
    origin::Origin,
    packet::Macs,
    stage::{
        affinity, classify,
        classify::Service,
        flow, forward,
        forward::Exit,
        nat::Source,
        parse,
        parse::{Flow, Parse},
        refuse,
        refuse::Unreachable,
        select,
        select::Choice,
        source_range,
    },
    trace,
    verdict::{End, Stage},
};

/// Parts of a packet's way that are subprograms: the verifier checks each once, whatever leads to it, and their
/// stacks don't lie beside each other's.
pub trait Subprograms {
    /// [`known`] for IPv4.
    fn known4<C: Ctx>(ctx: &C, direction: u8) -> End;
    /// [`known`] for IPv6.
    fn known6<C: Ctx>(ctx: &C, direction: u8) -> End;
    /// [`open`] for IPv4.
    fn open4<C: Ctx>(ctx: &C) -> End;
    /// [`open`] for IPv6.
    fn open6<C: Ctx>(ctx: &C) -> End;
    /// [`refuse`] for IPv4, and the number of the outcome.
    fn refuse4<C: Ctx>(ctx: &C, outcome: u32) -> End;
    /// [`refuse`] for IPv6, and the number of the outcome.
    fn refuse6<C: Ctx>(ctx: &C, outcome: u32) -> End;
}

/// Packets coming in: client or other node → a frontend on this node, a pod → any frontend, or a backend's reply to
/// what we masqueraded or turned around.
#[inline(always)]
pub fn arriving<C: Ctx, S: Subprograms>(ctx: &mut C) -> End {
    trace::entered();
    match ethertype(ctx) {
        ETHERTYPE_IPV4 => {
            let end = S::known4(ctx, direction::IN);
            let end = if end.is_new_flow() { S::open4(ctx) } else { end };
            if end.is_refusal() { S::refuse4(ctx, end.outcome()) } else { end }
        }
        ETHERTYPE_IPV6 => {
            let end = S::known6(ctx, direction::IN);
            let end = if end.is_new_flow() { S::open6(ctx) } else { end };
            if end.is_refusal() { S::refuse6(ctx, end.outcome()) } else { end }
        }
        _ => End::pass(Outcome::PassNotIp),
    }
}

/// Packets leaving the stack, out of an external device or into a pod: a backend's reply is translated back.
#[inline(always)]
pub fn leaving<C: Ctx, S: Subprograms>(ctx: &mut C) -> End {
    trace::entered();
    let end = match ethertype(ctx) {
        ETHERTYPE_IPV4 => S::known4(ctx, direction::OUT),
        ETHERTYPE_IPV6 => S::known6(ctx, direction::OUT),
        _ => End::pass(Outcome::PassNotIp),
    };
    match end {
        end if end.is_new_flow() => End::pass(Outcome::PassNotOurs),
        // What leaves can't be answered.
        end if end.is_refusal() => End::drop(Outcome::RefuseBackendGone),
        end => end,
    }
}

/// A packet of a known flow: one lookup, then its rewrite.
#[inline(always)]
pub fn known<F: Parse, C: Ctx>(ctx: &mut C, direction: u8) -> Stage<End> {
    let bytes = ctx.bytes();
    let network = parse::network::<F>(bytes)?;
    if direction == direction::IN {
        classify::maybe_vip::<F>(&network.daddr)?;
    }
    let packet = parse::flow::<F>(bytes, &network)?;
    trace::packet::<F, C>(ctx, &packet);
    let key = flow::key(&packet, direction);
    let entry = flow::lookup::<F>(&key, &packet).ok_or(End::NEW_FLOW)?;
    trace::known::<F, C>(ctx, entry);
    let now = flow::now_ticks();
    let exit = forward::exit::<F, C>(ctx, entry, now)?;
    flow::track::<F>(&key, entry, &packet, now);
    translate::<F, C>(ctx, &packet, entry, exit)
}

/// The first packet of a flow: policy, choice, and an entry for each direction.
#[inline(always)]
pub fn open<F: Parse, O: Origin, C: Ctx>(ctx: &mut C) -> Stage<End> {
    let bytes = ctx.bytes();
    let network = parse::network::<F>(bytes)?;
    let packet = &parse::flow::<F>(bytes, &network)?;
    classify::left_to_others::<F>(packet)?;
    let frontend = classify::frontend::<F>(packet).inspect_err(|_| flow::leave_to_backend::<F>(packet))?;
    let service = O::scope(frontend);
    trace::service(ctx, &service);
    source_range::check::<F>(packet, &service)?;
    let hash = F::hash(&packet.saddr, &packet.daddr, packet.ports(), packet.proto);
    let choice = choose::<F>(packet, &service, hash)?;
    trace::choice::<F, C>(ctx, &choice);
    let source = O::source(packet, &service, choice.backend);
    if C::IS_XDP && source != Source::Masquerade {
        // The stack delivers it: tc makes the same choice from the same hash.
        return Err(End::pass(Outcome::PassToTc));
    }
    if packet.proto == PROTO_UDP && source == Source::Keep {
        // Datagrams to the backend itself have to be told from those to the service.
        classify::look_at::<F>(&choice.backend.addr);
    }
    let node = maps::node().ok_or(End::drop(Outcome::DropNoNodeAddress))?;
    let scratch = F::scratch().ok_or(End::drop(Outcome::DropFlowTable))?;
    let entry = &mut scratch.entry;
    let mut exit = if source == Source::Keep { Exit::Stack } else { Exit::TurnAround };
    scratch.key = flow::key(packet, direction::IN);
    flow::plan::<F>(entry, packet, &choice, service.id, source, O::role(source));
    if source == Source::Masquerade {
        let route = forward::route::<F, C>(ctx, &mut scratch.fib, &packet.saddr, &choice.backend.addr)?;
        exit = forward::first_exit::<F, C>(entry, &route, node.routing_generation)?;
        flow::masquerade::<F>(entry, packet, route.source)?;
    } else if source == Source::Hairpin {
        flow::masquerade::<F>(entry, packet, F::node_addr(node))?;
    }
    flow::insert::<F>(packet, hash, scratch)?;
    trace::opened::<F>();
    translate::<F, C>(ctx, packet, &scratch.entry, exit)
}

/// The backend this client had before, or the one its flow's hash falls on.
#[inline(always)]
fn choose<F: Family>(
    packet: &Flow<F::Addr>,
    service: &Service,
    hash: u32,
) -> Stage<Choice<'static, F::Addr>> {
    if service.affinity_secs == 0 {
        return select::backend::<F>(service, hash);
    }
    let client = F::affinity_key(packet.saddr, service.id);
    let choice = match affinity::lookup::<F>(&client, service) {
        Some(choice) => choice,
        None => select::backend::<F>(service, hash)?,
    };
    affinity::remember(&client, &choice);
    Ok(choice)
}

/// Rewrites the packet and sends it on its way.
#[inline(always)]
fn translate<F: Family, C: Ctx>(
    ctx: &mut C,
    packet: &Flow<F::Addr>,
    entry: &FlowValue<F::Addr>,
    exit: Exit,
) -> Stage<End> {
    let failed = End::drop(Outcome::DropRewrite);
    let forwards = matches!(exit, Exit::Direct | Exit::Neighbour);
    if forwards {
        ctx.check_ttl::<F>()?;
    }
    let outcome = outcome(entry.role);
    ctx.rewrite::<F>(packet, entry, forwards).ok_or(failed)?;
    Ok(match exit {
        Exit::Stack => End::pass(outcome),
        Exit::TurnAround => {
            let macs: Macs = ctx.bytes().read(0).ok_or(failed)?;
            ctx.store(0, macs.swapped()).ok_or(failed)?;
            End::redirect(outcome, ctx.send(ctx.ifindex()))
        }
        Exit::Direct => {
            ctx.store(0, Macs(entry.macs)).ok_or(failed)?;
            End::redirect(outcome, ctx.send(entry.ifindex))
        }
        Exit::Neighbour => End::redirect(outcome, ctx.send_to_neighbour(entry.ifindex)),
    })
}

/// What is counted for a packet of this role.
#[inline(always)]
fn outcome(entry_role: u8) -> Outcome {
    match entry_role {
        role::TO_LOCAL => Outcome::ToLocalBackend,
        role::TO_REMOTE => Outcome::ToRemoteBackend,
        role::FROM_POD => Outcome::FromPod,
        role::HAIRPIN => Outcome::Hairpin,
        _ => Outcome::Reply,
    }
}

/// Answers a packet that no stage has changed.
#[inline(always)]
pub fn refuse<F: Unreachable, C: Ctx>(ctx: &mut C, outcome: u32) -> Stage<End> {
    let bytes = ctx.bytes();
    let network = parse::network::<F>(bytes)?;
    let packet = parse::flow::<F>(bytes, &network)?;
    match refuse::answer::<F, C>(ctx, &packet) {
        Some(verdict) => Ok(End::answered(outcome, verdict)),
        None => Err(End::drop(Outcome::DropUnanswered)),
    }
}

/// The frame's EtherType, host order; 0 if it has none.
#[inline(always)]
fn ethertype<C: Ctx>(ctx: &mut C) -> u16 {
    ctx.bytes().read(12).map_or(0, u16::from_be_bytes)
}
