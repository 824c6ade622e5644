//! Reads the pinned maps for people: no agent has to run.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use aya::maps::MapError;
use lb_common::abi::{
    Addr4, Addr6, BackendValue, FlowKey, FlowValue, FrontendKey, FrontendValue, SlotRange, SourceRangeData,
    VipKey, backend_flags, direction, frontend_flags as flag, role, transmit,
};
use serde::Serialize;

use super::{
    attach::{self, Attached},
    drain,
    load::Generation,
    maps::{FamilyMaps, Flows, Maps, Pins, Wire, WireAddr, map_error, metrics, open_flows},
};
use crate::datapath::DatapathError;

/// One frontend.
#[derive(Clone, Debug, Serialize)]
pub struct ServiceRow {
    /// Address, port and protocol.
    pub frontend: String,
    /// Service port id.
    pub id: u32,
    /// Backends for packets from outside.
    pub external: Vec<String>,
    /// Backends for pods and processes of this node.
    pub internal: Vec<String>,
    /// Affinity timeout, seconds.
    pub affinity_secs: u32,
    /// Policies, in words.
    pub flags: Vec<&'static str>,
}

/// One backend.
#[derive(Clone, Debug, Serialize)]
pub struct BackendRow {
    /// Backend id.
    pub id: u32,
    /// Address and port.
    pub backend: String,
    /// Its service port.
    pub service_id: u32,
    /// State, in words.
    pub flags: Vec<&'static str>,
    /// Generation of its place.
    pub generation: u32,
}

/// One direction of a connection.
#[derive(Clone, Debug, Serialize)]
pub struct FlowRow {
    /// TCP or UDP.
    pub protocol: &'static str,
    /// `in` or `out`: at which side of the stack.
    pub direction: &'static str,
    /// Source as on the wire.
    pub source: String,
    /// Destination as on the wire.
    pub destination: String,
    /// Source after the rewrite.
    pub new_source: String,
    /// Destination after the rewrite.
    pub new_destination: String,
    /// What it is.
    pub role: &'static str,
    /// How it leaves.
    pub transmit: &'static str,
    /// Seconds since its last packet, to a second or so.
    pub idle_secs: u64,
}

/// One counter.
#[derive(Clone, Debug, Serialize)]
pub struct CounterRow {
    /// Hook.
    pub hook: &'static str,
    /// Outcome.
    pub outcome: &'static str,
    /// Packets, or calls.
    pub count: u64,
}

/// Hooks and counters.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Another mode serves: only flows that are known are carried on.
    pub draining: bool,
    /// Hooks.
    pub attached: Vec<Attached>,
    /// Counters that aren't zero.
    pub counters: Vec<CounterRow>,
}

/// What is attached, and what was counted.
pub fn status(pins: &Pins) -> Result<Status, DatapathError> {
    let counters = metrics(pins)?;
    Ok(Status {
        draining: drain::is_set(pins)?,
        attached: attach::read_status(pins),
        counters: counters
            .into_iter()
            .map(|(hook, outcome, count)| CounterRow {
                hook: hook.as_str(),
                outcome: outcome.as_str(),
                count,
            })
            .collect(),
    })
}

/// All frontends, sorted.
pub fn services(pins: &Pins) -> Result<Vec<ServiceRow>, DatapathError> {
    let maps = Maps::open(pins, Generation::Present)?;
    let mut rows = BTreeMap::new();
    services_of(&maps, &maps.v4, &mut rows)?;
    services_of(&maps, &maps.v6, &mut rows)?;
    Ok(rows.into_values().collect())
}

fn services_of<A: WireAddr>(
    maps: &Maps,
    family: &FamilyMaps<A>,
    rows: &mut BTreeMap<(IpAddr, u16, u8), ServiceRow>,
) -> Result<(), DatapathError>
where
    Wire<FrontendKey<A>>: aya::Pod,
    Wire<VipKey<A>>: aya::Pod,
    Wire<BackendValue<A>>: aya::Pod,
    Wire<SourceRangeData<A>>: aya::Pod,
{
    let backends = |range: SlotRange| -> Result<Vec<String>, MapError> {
        (range.first..range.first + range.count)
            .map(|slot| {
                let Wire(backend) = family.backends.get(&maps.slots.get(&slot, 0)?, 0)?;
                Ok(SocketAddr::new(backend.addr.to_ip(), backend.port).to_string())
            })
            .collect()
    };
    for entry in &family.frontends {
        let (Wire(key), Wire(value)) = entry.map_err(|source| map_error("read", "LB_FRONTENDS", source))?;
        let error = |source| map_error("read", "SLOTS", source);
        let addr = key.addr.to_ip();
        let row = ServiceRow {
            frontend: format!("{}/{}", SocketAddr::new(addr, key.port), protocol(key.proto)),
            id: value.service_id,
            external: backends(value.external).map_err(error)?,
            internal: backends(value.internal).map_err(error)?,
            affinity_secs: value.affinity_secs,
            flags: frontend_words(&value),
        };
        rows.insert((addr, key.port, key.proto), row);
    }
    Ok(())
}

fn frontend_words(value: &FrontendValue) -> Vec<&'static str> {
    words(
        value.flags,
        &[
            (flag::EXTERNAL_LOCAL_LIST, "external-local"),
            (flag::INTERNAL_LOCAL_LIST, "internal-local"),
            (flag::EXTERNAL_MASQ_REMOTE, "masquerade-remote"),
            (flag::EXTERNAL_MASQ_ALWAYS, "masquerade-all"),
            (flag::SOURCE_RANGES, "source-ranges"),
            (flag::HOST_ONLY, "host-only"),
        ],
    )
}

fn words(bits: u32, names: &[(u32, &'static str)]) -> Vec<&'static str> {
    names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect()
}

/// All backends, by family and id.
pub fn backends(pins: &Pins) -> Result<Vec<BackendRow>, DatapathError> {
    let maps = Maps::open(pins, Generation::Present)?;
    let mut rows = Vec::new();
    backends_of(&maps.v4, &mut rows)?;
    backends_of(&maps.v6, &mut rows)?;
    Ok(rows)
}

fn backends_of<A: WireAddr>(family: &FamilyMaps<A>, rows: &mut Vec<BackendRow>) -> Result<(), DatapathError>
where
    Wire<FrontendKey<A>>: aya::Pod,
    Wire<VipKey<A>>: aya::Pod,
    Wire<BackendValue<A>>: aya::Pod,
    Wire<SourceRangeData<A>>: aya::Pod,
{
    let mut unused = 0;
    for id in 1..family.backends.len() {
        let Wire(backend) =
            family.backends.get(&id, 0).map_err(|source| map_error("read", "LB_BACKENDS", source))?;
        unused = if backend.generation == 0 { unused + 1 } else { 0 };
        if unused > 1024 {
            break;
        }
        if backend.flags & backend_flags::ALIVE == 0 {
            continue;
        }
        rows.push(BackendRow {
            id,
            backend: SocketAddr::new(backend.addr.to_ip(), backend.port).to_string(),
            service_id: backend.service_id,
            flags: words(
                backend.flags.into(),
                &[
                    (backend_flags::IN_CLUSTER_LIST.into(), "cluster-list"),
                    (backend_flags::IN_LOCAL_LIST.into(), "local-list"),
                    (backend_flags::LOCAL.into(), "here"),
                    (backend_flags::NODE_ADDRESS.into(), "host-network"),
                ],
            ),
            generation: backend.generation,
        });
    }
    Ok(())
}

/// All flows, sorted by source.
pub fn flows(pins: &Pins) -> Result<Vec<FlowRow>, DatapathError> {
    let (v4, v6): (Flows<Addr4>, Flows<Addr6>) = open_flows(pins)?;
    let now = now_ticks();
    let mut rows: Vec<FlowRow> = Vec::new();
    // The tables change under us: an entry that vanishes between key and value is left out.
    rows.extend(v4.iter().filter_map(Result::ok).map(|(Wire(key), Wire(value))| flow_row(&key, &value, now)));
    rows.extend(v6.iter().filter_map(Result::ok).map(|(Wire(key), Wire(value))| flow_row(&key, &value, now)));
    rows.sort_by(|a, b| {
        (&a.source, &a.destination, a.direction).cmp(&(&b.source, &b.destination, b.direction))
    });
    Ok(rows)
}

fn flow_row<A: WireAddr>(key: &FlowKey<A>, value: &FlowValue<A>, now: u64) -> FlowRow {
    let socket = |addr: A, port| SocketAddr::new(addr.to_ip(), port).to_string();
    FlowRow {
        protocol: protocol(key.proto),
        direction: if key.direction == direction::IN { "in" } else { "out" },
        source: socket(key.saddr, key.sport),
        destination: socket(key.daddr, key.dport),
        new_source: socket(value.saddr, value.sport),
        new_destination: socket(value.daddr, value.dport),
        role: match value.role {
            role::TO_LOCAL => "to-local",
            role::TO_REMOTE => "to-remote",
            role::FROM_POD => "from-pod",
            role::HAIRPIN => "hairpin",
            _ => "reply",
        },
        transmit: match value.transmit {
            transmit::STACK => "stack",
            transmit::FORWARD => "forward",
            transmit::RESET => "reset",
            _ => "turn-around",
        },
        idle_secs: (now.saturating_sub(value.seen.into()) << lb_common::tcp::TICK_SHIFT) / 1_000_000_000,
    }
}

/// The monotonic clock in the programs' ticks.
pub fn now_ticks() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: now is a valid timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    (now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64) >> lb_common::tcp::TICK_SHIFT
}

fn protocol(number: u8) -> &'static str {
    match number {
        6 => "TCP",
        17 => "UDP",
        _ => "?",
    }
}
