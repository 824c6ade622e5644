//! Marks TCP connections whose backend is gone: their next segment is answered with a reset.

use std::net::SocketAddr;

use lb_common::{
    abi::{FlowKey, FlowValue, next_hop, role, transmit},
    net::PROTO_TCP,
};

use super::maps::{Flows, Pins, Wire, WireAddr, map_error, open_flows};
use crate::datapath::DatapathError;

/// `BPF_EXIST` (`include/uapi/linux/bpf.h`): a flow that was dropped meanwhile stays so.
const IF_THERE: u64 = 2;

/// Marks all of which `goes_on` says no for their backend. Returns how many connections that are.
pub fn mark(pins: &Pins, goes_on: impl Fn(&SocketAddr) -> bool + Copy) -> Result<usize, DatapathError> {
    let (mut v4, mut v6) = open_flows(pins)?;
    Ok(mark_family(&mut v4, "LB4_FLOWS", goes_on)? + mark_family(&mut v6, "LB6_FLOWS", goes_on)?)
}

fn mark_family<A: WireAddr>(
    flows: &mut Flows<A>,
    name: &str,
    goes_on: impl Fn(&SocketAddr) -> bool,
) -> Result<usize, DatapathError>
where
    Wire<FlowKey<A>>: aya::Pod,
    Wire<FlowValue<A>>: aya::Pod,
{
    let is_lost = |key: &FlowKey<A>, value: &FlowValue<A>| {
        key.proto == PROTO_TCP && value.transmit != transmit::RESET && !goes_on(&backend(key, value))
    };
    // The table changes under us: an entry that vanishes between key and value is left out.
    let entries = flows.iter().filter_map(Result::ok).map(|(Wire(key), Wire(value))| (key, value));
    let lost: Vec<(FlowKey<A>, FlowValue<A>)> = entries.filter(|(key, value)| is_lost(key, value)).collect();
    for (key, value) in &lost {
        let marked = FlowValue { transmit: transmit::RESET, next_hop: next_hop::UNKNOWN, ..*value };
        match flows.insert(Wire(*key), Wire(marked), IF_THERE) {
            Err(error) if !is_gone(&error) => return Err(map_error("update", name, error)),
            _ => {}
        }
    }
    Ok(lost.iter().filter(|(_, value)| value.role & role::REPLY == 0).count())
}

fn is_gone(error: &aya::maps::MapError) -> bool {
    let aya::maps::MapError::SyscallError(error) = error else { return false };
    error.io_error.raw_os_error() == Some(libc::ENOENT)
}

/// The backend of a flow's entry of either direction.
pub fn backend<A: WireAddr>(key: &FlowKey<A>, value: &FlowValue<A>) -> SocketAddr {
    match value.role & role::REPLY {
        0 => SocketAddr::new(value.daddr.to_ip(), value.dport),
        _ => SocketAddr::new(key.saddr.to_ip(), key.sport),
    }
}
