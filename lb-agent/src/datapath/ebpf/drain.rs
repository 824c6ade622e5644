//! Leaving without cutting a connection: the programs carry on the flows they know and leave everything new to whoever
//! serves instead, until no flow is left.

use std::net::SocketAddr;

use lb_common::{
    abi::{FlowKey, FlowValue, node_flags, role, transmit},
    net::{PROTO_TCP, PROTO_UDP},
    tcp,
};

use super::{
    gone::backend,
    inspect::now_ticks,
    maps::{Flows, NodeMaps, Pins, Wire, WireAddr, open_flows},
};
use crate::{conntrack::Tuple, datapath::DatapathError};

/// An open connection that says nothing for so many ticks, about two hours, is given up (kernel
/// `tcp_keepalive_time`: whoever needs it longer has said something by then).
const TCP_TICKS: u32 = 6_700;

/// Starts or ends draining.
pub fn set(pins: &Pins, draining: bool) -> Result<(), DatapathError> {
    let mut maps = NodeMaps::open(pins)?;
    let mut node = maps.node()?;
    node.flags =
        if draining { node.flags | node_flags::DRAINING } else { node.flags & !node_flags::DRAINING };
    maps.set_node(node)
}

/// Whether the programs drain.
pub fn is_set(pins: &Pins) -> Result<bool, DatapathError> {
    Ok(NodeMaps::open(pins)?.node()?.flags & node_flags::DRAINING != 0)
}

/// Flows that are still alive.
#[derive(Debug, Default)]
pub struct Left {
    /// How many.
    pub flows: u64,
    /// What those that are masqueraded look like on their way to the backend.
    pub masqueraded: Vec<Tuple>,
}

/// Looks for flows that are still alive. Others are deleted: their ports are free for netfilter to masquerade to. So are
/// UDP flows to backends that no longer serve: they choose anew.
pub fn flows_left(pins: &Pins, serves: impl Fn(&SocketAddr) -> bool + Copy) -> Result<Left, DatapathError> {
    let (mut v4, mut v6) = open_flows(pins)?;
    let (now, mut left) = (now_ticks() as u32, Left::default());
    left_of_family(&mut v4, now, serves, &mut left);
    left_of_family(&mut v6, now, serves, &mut left);
    Ok(left)
}

fn left_of_family<A: WireAddr>(
    flows: &mut Flows<A>,
    now: u32,
    serves: impl Fn(&SocketAddr) -> bool,
    left: &mut Left,
) where
    Wire<FlowKey<A>>: aya::Pod,
    Wire<FlowValue<A>>: aya::Pod,
{
    // The table changes under us: an entry that vanishes between key and value is left out.
    let entries: Vec<(FlowKey<A>, FlowValue<A>)> =
        flows.iter().filter_map(Result::ok).map(|(Wire(key), Wire(value))| (key, value)).collect();
    for (key, value) in &entries {
        let is_reply = value.role & role::REPLY != 0;
        let backend = backend(key, value);
        let is_alive =
            value.transmit != transmit::RESET && is_alive(key.proto, value.tcp, now.wrapping_sub(value.seen));
        if !is_alive || (key.proto == PROTO_UDP && !serves(&backend)) {
            let _ = flows.remove(&Wire(*key));
        } else if !is_reply {
            left.flows += 1;
            if value.transmit != transmit::STACK {
                let src = SocketAddr::new(value.saddr.to_ip(), value.sport);
                left.masqueraded.push(Tuple { src, dst: backend, proto: key.proto });
            }
        }
    }
}

fn is_alive(proto: u8, tcp: u8, idle_ticks: u32) -> bool {
    let limit = tcp::idle_limit_ticks(proto, tcp, tcp);
    idle_ticks <= if proto == PROTO_TCP { limit.min(TCP_TICKS) } else { limit }
}

#[cfg(test)]
mod tests {
    use lb_common::net::tcp_flags::{ACK, FIN, SYN};

    use super::*;

    #[test]
    fn a_flow_is_alive_as_long_as_its_state_lets_it_be_silent() {
        for (proto, flags, idle, alive) in [
            (PROTO_TCP, ACK, 6_000, true),
            (PROTO_TCP, ACK, 7_000, false),
            (PROTO_TCP, SYN, 61, false),
            (PROTO_TCP, FIN | ACK, 11, false),
            (PROTO_UDP, 0, 120, true),
            (PROTO_UDP, 0, 121, false),
        ] {
            assert_eq!(is_alive(proto, tcp::seen(flags), idle), alive, "{proto} {flags:#x} {idle}");
        }
    }
}
