//! Carries a plan out on the pinned maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Instant,
};

use aya::maps::{MapError, lpm_trie::Key};
use ipnet::IpNet;
use lb_common::abi::{BackendValue, FrontendKey, SourceRangeData, VipKey, VipValue, backend_flags};
use lb_core::{
    model::{Family, Protocol},
    table::{Changes, FrontendAddr, ServiceTable},
};
use tracing::debug;

use super::{
    foreign::Foreign,
    maps::{FamilyMaps, Maps, Pins, Wire, WireAddr, filter_bit, map_error, set_filter_bit},
    plan::{Actual, Capacity, Op, PlannedBackend, Planner},
};
use crate::datapath::{ApplyReport, Datapath, DatapathError};

/// The eBPF datapath's maps, kept equal to a table.
pub struct EbpfDatapath {
    maps: Maps,
    /// `None` until the kernel's state is known: at start and after a failed write.
    planner: Option<Planner>,
    foreign: Foreign,
    /// netfilter's flows have been looked for.
    imported: bool,
}

impl EbpfDatapath {
    /// Takes over the pinned maps.
    pub fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let (maps, foreign) = (Maps::open(pins)?, Foreign::open(pins)?);
        Ok(Self { maps, planner: None, foreign, imported: false })
    }

    /// Sizes of the pinned maps.
    pub fn capacity(&self) -> Capacity {
        Capacity {
            slots: self.maps.slots_len(),
            backends4: self.maps.backends_len(Family::V4),
            backends6: self.maps.backends_len(Family::V6),
            frontends: FRONTENDS,
        }
    }

    /// Reads what the kernel holds.
    pub fn actual(&self) -> Result<Actual, DatapathError> {
        let mut actual = Actual::default();
        read_family(&self.maps.v4, Family::V4, "LB4", &mut actual)?;
        read_family(&self.maps.v6, Family::V6, "LB6", &mut actual)?;
        let ranges = actual.frontends.values().flat_map(|value| [value.external, value.internal]);
        let slots: BTreeSet<u32> = ranges.flat_map(|range| range.first..range.first + range.count).collect();
        for slot in slots {
            let id = self.maps.slots.get(&slot, 0).map_err(|source| map_error("read", "SLOTS", source))?;
            actual.slots.insert(slot, id);
        }
        Ok(actual)
    }

    /// The VIP filter lets the programs look at packets to this address.
    pub fn is_looked_at(&self, addr: IpAddr) -> Result<bool, DatapathError> {
        let bit = filter_bit(addr);
        let word = self.maps.filter.get(&(bit >> 6), 0);
        Ok(word.map_err(|source| map_error("read", "VIP_FILTER", source))? >> (bit & 63) & 1 == 1)
    }

    fn execute(&mut self, op: &Op) -> Result<(), DatapathError> {
        match op {
            Op::Backend(_, id, backend) => match backend.addr {
                IpAddr::V4(addr) => {
                    write_backend(&mut self.maps.v4, "LB4_BACKENDS", *id, addr.octets(), backend)
                }
                IpAddr::V6(addr) => {
                    write_backend(&mut self.maps.v6, "LB6_BACKENDS", *id, addr.octets(), backend)
                }
            },
            Op::Slots(first, ids) => (*first..).zip(ids).try_for_each(|(slot, id)| {
                self.maps.slots.set(slot, *id, 0).map_err(|source| map_error("update", "SLOTS", source))
            }),
            Op::SourceRange(service_id, net) => {
                let written = match range_key(*service_id, *net) {
                    RangeKey::V4(key) => self.maps.v4.source_ranges.insert(&key, 1, 0),
                    RangeKey::V6(key) => self.maps.v6.source_ranges.insert(&key, 1, 0),
                };
                written.map_err(|source| map_error("update", "LB_SOURCE_RANGES", source))
            }
            Op::DeleteSourceRange(service_id, net) => {
                let deleted = match range_key(*service_id, *net) {
                    RangeKey::V4(key) => self.maps.v4.source_ranges.remove(&key),
                    RangeKey::V6(key) => self.maps.v6.source_ranges.remove(&key),
                };
                gone(deleted, "LB_SOURCE_RANGES")
            }
            Op::Vip(addr, kind) => {
                set_filter_bit(&mut self.maps.filter, *addr)?;
                let value = Wire(VipValue { kind: *kind });
                let written = match addr {
                    IpAddr::V4(addr) => {
                        self.maps.v4.vips.insert(Wire(VipKey { addr: addr.octets() }), value, 0)
                    }
                    IpAddr::V6(addr) => {
                        self.maps.v6.vips.insert(Wire(VipKey { addr: addr.octets() }), value, 0)
                    }
                };
                written.map_err(|source| map_error("update", "LB_VIPS", source))
            }
            Op::DeleteVip(addr) => {
                let deleted = match addr {
                    IpAddr::V4(addr) => self.maps.v4.vips.remove(&Wire(VipKey { addr: addr.octets() })),
                    IpAddr::V6(addr) => self.maps.v6.vips.remove(&Wire(VipKey { addr: addr.octets() })),
                };
                gone(deleted, "LB_VIPS")
            }
            Op::Frontend(addr, value) => {
                let written = match addr.addr {
                    IpAddr::V4(ip) => {
                        self.maps.v4.frontends.insert(Wire(key(addr, ip.octets())), Wire(*value), 0)
                    }
                    IpAddr::V6(ip) => {
                        self.maps.v6.frontends.insert(Wire(key(addr, ip.octets())), Wire(*value), 0)
                    }
                };
                written.map_err(|source| map_error("update", "LB_FRONTENDS", source))
            }
            Op::DeleteFrontend(addr) => {
                let deleted = match addr.addr {
                    IpAddr::V4(ip) => self.maps.v4.frontends.remove(&Wire(key(addr, ip.octets()))),
                    IpAddr::V6(ip) => self.maps.v6.frontends.remove(&Wire(key(addr, ip.octets()))),
                };
                gone(deleted, "LB_FRONTENDS")
            }
        }
    }
}

/// Entries of the frontend maps (`lb-ebpf/src/maps.rs`).
const FRONTENDS: usize = 65536;

impl Datapath for EbpfDatapath {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn apply(&mut self, table: &ServiceTable, changes: &Changes) -> Result<ApplyReport, DatapathError> {
        let mut changes = std::borrow::Cow::Borrowed(changes);
        let mut planner = match self.planner.take() {
            Some(planner) => planner,
            None => {
                let planner = Planner::adopt(self.capacity(), self.actual()?, table);
                let mut all = Changes::all(table);
                all.merge(planner.leftovers(table));
                changes = std::borrow::Cow::Owned(all);
                planner
            }
        };
        if !self.imported {
            // Before the programs know any frontend: else they would choose for flows that have a backend.
            self.foreign.import(table)?;
            self.imported = true;
        }
        let started = Instant::now();
        let (ops, refused) = planner.plan(table, &changes);
        let planned = started.elapsed();
        for op in &ops {
            // After a failed write the planner no longer knows what the kernel holds: the next call adopts again.
            self.execute(op)?;
        }
        // A backend that is gone takes its flows with it.
        self.foreign.reconcile(table);
        debug!(ops = ops.len(), plan_us = planned.as_micros() as u64, "applied a plan");
        self.planner = Some(planner);
        let is_delete = |op: &&Op| match op {
            Op::DeleteFrontend(_) | Op::DeleteVip(_) | Op::DeleteSourceRange(..) => true,
            Op::Backend(_, _, backend) => backend.flags == 0,
            Op::Slots(..) | Op::SourceRange(..) | Op::Vip(..) | Op::Frontend(..) => false,
        };
        let deletes = ops.iter().filter(is_delete).count();
        let slot_writes: usize =
            ops.iter().map(|op| if let Op::Slots(_, ids) = op { ids.len() - 1 } else { 0 }).sum();
        Ok(ApplyReport {
            upserts: ops.len() - deletes + slot_writes,
            deletes,
            refused,
            ..ApplyReport::default()
        })
    }

    fn is_intact(&mut self, table: &ServiceTable) -> bool {
        self.foreign.reconcile(table);
        true
    }
}

fn key<A>(addr: &FrontendAddr, ip: A) -> FrontendKey<A> {
    FrontendKey { addr: ip, port: addr.port, proto: addr.protocol.number(), pad: 0 }
}

/// A delete of what is already gone has done its work.
fn gone(result: Result<(), MapError>, map: &str) -> Result<(), DatapathError> {
    match result {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Err(source) => Err(map_error("delete from", map, source)),
    }
}

enum RangeKey {
    V4(Key<Wire<SourceRangeData<[u8; 4]>>>),
    V6(Key<Wire<SourceRangeData<[u8; 16]>>>),
}

fn range_key(service_id: u32, net: IpNet) -> RangeKey {
    let len = 32 + u32::from(net.prefix_len());
    match net {
        IpNet::V4(net) => {
            RangeKey::V4(Key::new(len, Wire(SourceRangeData { service_id, addr: net.network().octets() })))
        }
        IpNet::V6(net) => {
            RangeKey::V6(Key::new(len, Wire(SourceRangeData { service_id, addr: net.network().octets() })))
        }
    }
}

fn write_backend<A: WireAddr>(
    maps: &mut FamilyMaps<A>,
    name: &str,
    id: u32,
    addr: A,
    backend: &PlannedBackend,
) -> Result<(), DatapathError>
where
    Wire<FrontendKey<A>>: aya::Pod,
    Wire<VipKey<A>>: aya::Pod,
    Wire<BackendValue<A>>: aya::Pod,
    Wire<SourceRangeData<A>>: aya::Pod,
{
    let value = BackendValue {
        addr,
        port: backend.port,
        flags: backend.flags,
        pad: 0,
        service_id: backend.service_id,
        generation: backend.generation,
    };
    maps.backends.set(id, Wire(value), 0).map_err(|source| map_error("update", name, source))
}

/// Reads one family's frontends, VIPs, source ranges and backends. An entry that another program wrote in an unknown
/// way is left out, and so deleted.
fn read_family<A: WireAddr>(
    maps: &FamilyMaps<A>,
    family: Family,
    prefix: &str,
    actual: &mut Actual,
) -> Result<(), DatapathError>
where
    Wire<FrontendKey<A>>: aya::Pod,
    Wire<VipKey<A>>: aya::Pod,
    Wire<BackendValue<A>>: aya::Pod,
    Wire<SourceRangeData<A>>: aya::Pod,
{
    for entry in &maps.frontends {
        let (Wire(key), Wire(value)) =
            entry.map_err(|source| map_error("read", &format!("{prefix}_FRONTENDS"), source))?;
        if let Some(protocol) = Protocol::from_number(key.proto) {
            actual.frontends.insert(FrontendAddr { addr: key.addr.to_ip(), port: key.port, protocol }, value);
        }
    }
    for entry in &maps.vips {
        let (Wire(key), Wire(value)) =
            entry.map_err(|source| map_error("read", &format!("{prefix}_VIPS"), source))?;
        actual.vips.insert(key.addr.to_ip(), value.kind);
    }
    for entry in &maps.source_ranges {
        let (key, _) =
            entry.map_err(|source| map_error("read", &format!("{prefix}_SOURCE_RANGES"), source))?;
        let data = key.data().0;
        let len = u8::try_from(key.prefix_len().saturating_sub(32)).unwrap_or(u8::MAX);
        if let Ok(net) = IpNet::new(data.addr.to_ip(), len) {
            actual.source_ranges.insert((data.service_id, net));
        }
    }
    if actual.frontends.keys().any(|addr| Family::of(addr.addr) == family) {
        actual.backends.extend(read_backends(maps, family, prefix)?);
    }
    Ok(())
}

fn read_backends<A: WireAddr>(
    maps: &FamilyMaps<A>,
    family: Family,
    prefix: &str,
) -> Result<BTreeMap<(Family, u32), PlannedBackend>, DatapathError>
where
    Wire<FrontendKey<A>>: aya::Pod,
    Wire<VipKey<A>>: aya::Pod,
    Wire<BackendValue<A>>: aya::Pod,
    Wire<SourceRangeData<A>>: aya::Pod,
{
    let mut backends = BTreeMap::new();
    let mut empty = 0;
    for id in 1..maps.backends.len() {
        let Wire(value) = maps
            .backends
            .get(&id, 0)
            .map_err(|source| map_error("read", &format!("{prefix}_BACKENDS"), source))?;
        // Ids are given from the lowest up, so a long run without any use is the end.
        empty = if value.generation == 0 { empty + 1 } else { 0 };
        if empty > 1024 {
            break;
        }
        if value.generation != 0 {
            let backend = PlannedBackend {
                addr: value.addr.to_ip(),
                port: value.port,
                flags: value.flags & backend_flags_known(),
                service_id: value.service_id,
                generation: value.generation,
            };
            backends.insert((family, id), backend);
        }
    }
    Ok(backends)
}

const fn backend_flags_known() -> u8 {
    use backend_flags::{ALIVE, IN_CLUSTER_LIST, IN_LOCAL_LIST, LOCAL, NODE_ADDRESS};
    ALIVE | IN_CLUSTER_LIST | IN_LOCAL_LIST | LOCAL | NODE_ADDRESS
}
