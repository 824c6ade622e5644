//! Socket calls: a connection is translated once, when it is made, and costs nothing per packet after that.
//!
//! A dual-stack socket dials IPv4 by IPv4-mapped addresses (RFC 4291 §2.5.5.2), so an IPv6 call may be about an IPv4
//! frontend: [`Form`] says which. A service without endpoints is `ECONNREFUSED` at once; what a packet would be
//! dropped for is `EPERM`.

use aya_ebpf::{
    EbpfContext,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_set_retval},
    programs::SockAddrContext,
};
use lb_common::{
    abi::{
        AffinityKey, FlowKey, FrontendKey, PeerValue, SockFlowKey, SockFlowValue, VipKey, backend_flags,
        direction, frontend_flags as flag, node_flags, sock_direction, vip_kind,
    },
    net::{PROTO_TCP, PROTO_UDP},
    outcome::{Hook, Outcome},
};

use crate::{
    count,
    family::{Family, V4, V6, Words6},
    maps,
    stage::{affinity, classify, select, select::Choice},
    verdict::{End, Stage},
};

/// The call goes on.
const PROCEED: i32 = 1;
/// The call fails: with `EPERM`, unless an errno was set.
const REJECT: i32 = 0;

const ECONNREFUSED: i32 = 111;

/// `connect` by an IPv4 socket: chooses a backend for the connection's whole life.
#[inline(always)]
pub fn connect4(ctx: &SockAddrContext) -> i32 {
    verdict(connect::<Plain4>(ctx))
}

/// As [`connect4`], by an IPv6 socket.
#[inline(always)]
pub fn connect6(ctx: &SockAddrContext) -> i32 {
    verdict(if is_mapped(&addr6(ctx)) { connect::<Mapped4>(ctx) } else { connect::<Plain6>(ctx) })
}

/// `sendto` by an unconnected IPv4 UDP socket: the same backend for the same frontend as long as it lives.
#[inline(always)]
pub fn sendmsg4(ctx: &SockAddrContext) -> i32 {
    verdict(sendmsg::<Plain4>(ctx))
}

/// As [`sendmsg4`], by an IPv6 socket.
#[inline(always)]
pub fn sendmsg6(ctx: &SockAddrContext) -> i32 {
    verdict(if is_mapped(&addr6(ctx)) { sendmsg::<Mapped4>(ctx) } else { sendmsg::<Plain6>(ctx) })
}

/// `recvfrom` by an IPv4 UDP socket: a backend's datagram comes from the frontend that was dialled.
#[inline(always)]
pub fn recvmsg4(ctx: &SockAddrContext) -> i32 {
    verdict(recvmsg::<Plain4>(ctx))
}

/// As [`recvmsg4`], by an IPv6 socket.
#[inline(always)]
pub fn recvmsg6(ctx: &SockAddrContext) -> i32 {
    verdict(if is_mapped(&addr6(ctx)) { recvmsg::<Mapped4>(ctx) } else { recvmsg::<Plain6>(ctx) })
}

/// `getpeername` by an IPv4 socket: the peer is the frontend that was dialled.
#[inline(always)]
pub fn getpeername4(ctx: &SockAddrContext) -> i32 {
    verdict(getpeername::<Plain4>(ctx))
}

/// As [`getpeername4`], by an IPv6 socket.
#[inline(always)]
pub fn getpeername6(ctx: &SockAddrContext) -> i32 {
    verdict(if is_mapped(&addr6(ctx)) { getpeername::<Mapped4>(ctx) } else { getpeername::<Plain6>(ctx) })
}

/// How a call writes an address, and which family it means.
trait Form {
    /// The family of the frontend.
    type F: Family;
    /// The call's address.
    fn read(ctx: &SockAddrContext) -> Addr<Self>;
    /// Replaces the call's address.
    fn write(ctx: &SockAddrContext, addr: &Addr<Self>);
    /// As the maps of this module keep it.
    fn to6(addr: &Addr<Self>) -> Words6;
    /// From there.
    fn from6(addr: &Words6) -> Addr<Self>;
}

type Addr<M> = <<M as Form>::F as Family>::Addr;

/// An IPv4 socket.
enum Plain4 {}
/// An IPv6 socket about an IPv6 address.
enum Plain6 {}
/// An IPv6 socket about an IPv4 address.
enum Mapped4 {}

/// The third word of an IPv4-mapped address, in network order.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

#[inline(always)]
fn is_mapped(addr: &Words6) -> bool {
    addr[0] | addr[1] == 0 && addr[2] == MAPPED
}

/// The words of the call's IPv6 address. Read one by one: the verifier knows these fields by the word.
#[inline(always)]
fn addr6(ctx: &SockAddrContext) -> Words6 {
    // SAFETY: fields of the context.
    unsafe {
        let words = &raw const (*ctx.sock_addr).user_ip6;
        let word = |i| words.cast::<u32>().add(i).read_volatile();
        [word(0), word(1), word(2), word(3)]
    }
}

impl Form for Plain4 {
    type F = V4;
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> Addr<Self> {
        // SAFETY: a field of the context.
        [unsafe { (*ctx.sock_addr).user_ip4 }]
    }
    #[inline(always)]
    fn write(ctx: &SockAddrContext, addr: &Addr<Self>) {
        // SAFETY: a field of the context.
        unsafe { (*ctx.sock_addr).user_ip4 = addr[0] };
    }
    #[inline(always)]
    fn to6(addr: &Addr<Self>) -> Words6 {
        [0, 0, MAPPED, addr[0]]
    }
    #[inline(always)]
    fn from6(addr: &Words6) -> Addr<Self> {
        [addr[3]]
    }
}

impl Form for Mapped4 {
    type F = V4;
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> Addr<Self> {
        [addr6(ctx)[3]]
    }
    #[inline(always)]
    fn write(ctx: &SockAddrContext, addr: &Addr<Self>) {
        Plain6::write(ctx, &Self::to6(addr));
    }
    #[inline(always)]
    fn to6(addr: &Addr<Self>) -> Words6 {
        Plain4::to6(addr)
    }
    #[inline(always)]
    fn from6(addr: &Words6) -> Addr<Self> {
        Plain4::from6(addr)
    }
}

impl Form for Plain6 {
    type F = V6;
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> Addr<Self> {
        addr6(ctx)
    }
    #[inline(always)]
    fn write(ctx: &SockAddrContext, addr: &Addr<Self>) {
        // SAFETY: fields of the context, written one by one as they are read.
        unsafe {
            let words = (&raw mut (*ctx.sock_addr).user_ip6).cast::<u32>();
            words.write_volatile(addr[0]);
            words.add(1).write_volatile(addr[1]);
            words.add(2).write_volatile(addr[2]);
            words.add(3).write_volatile(addr[3]);
        }
    }
    #[inline(always)]
    fn to6(addr: &Addr<Self>) -> Words6 {
        *addr
    }
    #[inline(always)]
    fn from6(addr: &Words6) -> Addr<Self> {
        *addr
    }
}

#[inline(always)]
fn connect<M: Form>(ctx: &SockAddrContext) -> Stage<End> {
    let proto = protocol(ctx);
    if proto != PROTO_TCP && proto != PROTO_UDP {
        return Err(End::pass(Outcome::PassNotL4));
    }
    let (addr, frontend_port) = (M::read(ctx), port(ctx));
    let choice = match resolve::<M::F>(ctx, &addr, frontend_port, proto) {
        Ok(choice) => choice,
        Err(end) => {
            forget_peer(ctx, proto);
            return Err(end);
        }
    };
    let backend = choice.backend;
    let mut peer = PeerValue {
        frontend: bytes(M::to6(&addr)),
        backend: bytes(M::to6(&backend.addr)),
        frontend_port,
        backend_port: backend.port,
        backend_id: choice.id,
    };
    remember_peer(ctx, &mut peer);
    if proto == PROTO_UDP && maps::node().is_some_and(|node| node.flags & node_flags::RESETS != 0) {
        // SAFETY: the context is one the helper takes.
        let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
        // Without it the socket is not found when its backend goes.
        let _ = maps::SOCK_CONNECTED.insert(cookie, peer, 0);
    }
    M::write(ctx, &backend.addr);
    set_port(ctx, backend.port);
    Ok(End::pass(Outcome::SockTranslated))
}

#[inline(always)]
fn sendmsg<M: Form>(ctx: &SockAddrContext) -> Stage<End> {
    if protocol(ctx) != PROTO_UDP {
        return Err(End::pass(Outcome::PassNotL4));
    }
    let (addr, frontend_port) = (M::read(ctx), port(ctx));
    classify::maybe_vip::<M::F>(&addr)?;
    // SAFETY: the context is one the helper takes.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let forward = SockFlowKey {
        cookie,
        addr: bytes(M::to6(&addr)),
        port: frontend_port,
        direction: sock_direction::FORWARD,
        pad: 0,
    };
    if let Some((addr, port)) = remembered::<M>(&forward) {
        M::write(ctx, &addr);
        set_port(ctx, port);
        return Ok(End::pass(Outcome::SockTranslated));
    }
    let choice = resolve::<M::F>(ctx, &addr, frontend_port, PROTO_UDP)?;
    let backend = choice.backend;
    let mut value = SockFlowValue {
        addr: bytes(M::to6(&backend.addr)),
        port: backend.port,
        pad: 0,
        backend_id: choice.id,
        backend_generation: backend.generation,
    };
    // A full table would cost the reply its source: an LRU makes room instead.
    let _ = maps::SOCK_FLOWS.insert(forward, value, 0);
    let reply =
        SockFlowKey { addr: value.addr, port: value.port, direction: sock_direction::REPLY, ..forward };
    value.addr = forward.addr;
    value.port = forward.port;
    let _ = maps::SOCK_FLOWS.insert(reply, value, 0);
    M::write(ctx, &backend.addr);
    set_port(ctx, backend.port);
    Ok(End::pass(Outcome::SockTranslated))
}

/// The backend this socket had for this frontend, if it still serves.
#[inline(always)]
fn remembered<M: Form>(forward: &SockFlowKey) -> Option<(Addr<M>, u16)> {
    // SAFETY: values are replaced as a whole; copied out at once.
    let flow = unsafe { maps::SOCK_FLOWS.get(forward) }?;
    let backend = M::F::backend(flow.backend_id)?;
    let serves = backend.generation == flow.backend_generation && backend.flags & backend_flags::ALIVE != 0;
    serves.then(|| (M::from6(&words(flow.addr)), flow.port))
}

#[inline(always)]
fn recvmsg<M: Form>(ctx: &SockAddrContext) -> Stage<End> {
    if let Ok(end) = getpeername::<M>(ctx) {
        return Ok(end);
    }
    // SAFETY: the context is one the helper takes.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let reply = SockFlowKey {
        cookie,
        addr: bytes(M::to6(&M::read(ctx))),
        port: port(ctx),
        direction: sock_direction::REPLY,
        pad: 0,
    };
    // SAFETY: values are replaced as a whole; copied out at once.
    let Some(frontend) = (unsafe { maps::SOCK_FLOWS.get(reply) }) else {
        return Err(End::pass(Outcome::PassNotOurs));
    };
    M::write(ctx, &M::from6(&words(frontend.addr)));
    set_port(ctx, frontend.port);
    Ok(End::pass(Outcome::SockReply))
}

#[inline(always)]
fn getpeername<M: Form>(ctx: &SockAddrContext) -> Stage<End> {
    // SAFETY: the socket is the context's own.
    let peer = unsafe { maps::SOCK_PEERS.get_ptr_mut(ctx) };
    if peer.is_null() {
        return Err(End::pass(Outcome::PassNotOurs));
    }
    // SAFETY: not null, and it lives as long as the socket.
    let peer = unsafe { &*peer };
    let (addr, dialled) = (M::to6(&M::read(ctx)), words(peer.backend));
    let same =
        addr[0] == dialled[0] && addr[1] == dialled[1] && addr[2] == dialled[2] && addr[3] == dialled[3];
    if !same || port(ctx) != peer.backend_port {
        return Err(End::pass(Outcome::PassNotOurs));
    }
    M::write(ctx, &M::from6(&words(peer.frontend)));
    set_port(ctx, peer.frontend_port);
    Ok(End::pass(Outcome::SockReply))
}

/// The backend for a new connection to an address, by the rules that a packet from a pod would meet.
#[inline(always)]
fn resolve<F: Family>(
    ctx: &SockAddrContext,
    addr: &F::Addr,
    port: u16,
    proto: u8,
) -> Stage<Choice<'static, F::Addr>> {
    classify::maybe_vip::<F>(addr)?;
    left_to_others::<F>(ctx, addr, port, proto)?;
    let Some(frontend) = F::frontend(&FrontendKey { addr: *addr, port, proto, pad: 0 }) else {
        return Err(match F::vip(&VipKey { addr: *addr }).map(|vip| vip.kind) {
            Some(vip_kind::VIP) => End::refuse(Outcome::RefuseUnknownPort),
            Some(_) => End::pass(Outcome::PassNodeAddress),
            None => End::pass(Outcome::PassNotOurs),
        });
    };
    // SAFETY: the context is one the helper takes.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let in_host = maps::node().is_some_and(|node| node.host_netns_cookie == netns);
    if frontend.flags & flag::HOST_ONLY != 0 && !in_host {
        return Err(End::pass(Outcome::PassNotOurs));
    }
    if frontend.flags & (flag::SOURCE_RANGES | flag::INTERNAL_MASQ_ALWAYS) != 0 && !in_host {
        // The pod's address isn't known yet: its packets meet the ranges, or are masqueraded, at the veth.
        return Err(End::pass(Outcome::PassToTc));
    }
    if frontend.flags & flag::SOURCE_RANGES != 0 && frontend.flags & flag::SOURCE_RANGES_ALLOW_HOST == 0 {
        return Err(End::drop(Outcome::DropSourceRange));
    }
    let service = classify::internal(frontend);
    let client = AffinityKey::netns(netns, service.id);
    if service.affinity_secs != 0
        && let Some(choice) = affinity::lookup::<F>(&client, &service)
    {
        affinity::remember(&client, &choice);
        return Ok(choice);
    }
    let choice = select::backend::<F>(&service, unsafe { bpf_get_prandom_u32() })?;
    if service.affinity_secs != 0 {
        affinity::remember(&client, &choice);
    }
    Ok(choice)
}

/// As `classify::left_to_others`, by what a socket shows: its own address may not be chosen yet.
#[inline(always)]
fn left_to_others<F: Family>(ctx: &SockAddrContext, addr: &F::Addr, port: u16, proto: u8) -> Stage<()> {
    if maps::node().is_some_and(|node| node.flags & node_flags::DRAINING != 0) {
        return Err(End::pass(Outcome::PassDraining));
    }
    if proto != PROTO_UDP {
        return Ok(());
    }
    // SAFETY: fields of the context; the socket is there as long as its call.
    let sport = unsafe {
        let sk = (*ctx.sock_addr).__bindgen_anon_1.sk;
        if sk.is_null() { 0 } else { (*sk).src_port as u16 }
    };
    let key = FlowKey {
        saddr: F::UNSPECIFIED,
        daddr: *addr,
        sport,
        dport: port,
        proto,
        direction: direction::IN,
        pad: 0,
    };
    if sport != 0 && F::is_foreign(&key) { Err(End::pass(Outcome::PassForeign)) } else { Ok(()) }
}

/// Notes what a connected socket dialled, for `getpeername` and `recvfrom`. Out of memory loses only that.
#[inline(always)]
fn remember_peer(ctx: &SockAddrContext, value: &mut PeerValue) {
    // SAFETY: the socket is the context's own.
    let peer = unsafe { maps::SOCK_PEERS.get_or_insert_ptr_mut(ctx, Some(value)) };
    if !peer.is_null() {
        // A UDP socket may connect again: creating keeps what is there.
        // SAFETY: not null, and it lives as long as the socket.
        unsafe { *peer = *value };
    }
}

/// A UDP socket may connect again, to something that is no frontend.
#[inline(always)]
fn forget_peer(ctx: &SockAddrContext, proto: u8) {
    if proto == PROTO_UDP {
        // SAFETY: the socket is the context's own; the field is named by the ABI.
        let _ = unsafe { maps::SOCK_PEERS.delete((*ctx.sock_addr).__bindgen_anon_1.sk) };
    }
}

#[inline(always)]
fn protocol(ctx: &SockAddrContext) -> u8 {
    // SAFETY: a field of the context.
    unsafe { (*ctx.sock_addr).protocol as u8 }
}

/// The call's port, native order.
#[inline(always)]
fn port(ctx: &SockAddrContext) -> u16 {
    // SAFETY: a field of the context; network order in the low half.
    u16::from_be(unsafe { (*ctx.sock_addr).user_port } as u16)
}

#[inline(always)]
fn set_port(ctx: &SockAddrContext, port: u16) {
    // SAFETY: a field of the context.
    unsafe { (*ctx.sock_addr).user_port = port.to_be().into() };
}

/// Words as the bytes that maps declare.
#[inline(always)]
fn bytes(words: Words6) -> [u8; 16] {
    // SAFETY: same size, every bit pattern is a value.
    unsafe { core::mem::transmute(words) }
}

/// Bytes of a map as words.
#[inline(always)]
fn words(bytes: [u8; 16]) -> Words6 {
    // SAFETY: same size, every bit pattern is a value.
    unsafe { core::mem::transmute(bytes) }
}

/// Counts the end and turns it into the call's.
#[inline(always)]
fn verdict(end: Stage<End>) -> i32 {
    let end = end.unwrap_or_else(|end| end);
    count::record(Hook::Socket, end.outcome());
    if end.is_refusal() {
        // SAFETY: only sets this call's errno.
        let _ = unsafe { bpf_set_retval(-ECONNREFUSED) };
        return REJECT;
    }
    match end.action() {
        crate::verdict::Action::Drop => REJECT,
        _ => PROCEED,
    }
}
