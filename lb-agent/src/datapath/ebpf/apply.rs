//! Carries a plan out on the pinned maps.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Instant,
};

use aya::maps::{MapError, lpm_trie::Key};
use ipnet::IpNet;
use lb_common::abi::{BackendValue, FrontendKey, SourceRangeData, VipKey, VipValue, backend_flags};
use lb_core::{
    model::{Family, Protocol},
    reconcile,
    table::{Changes, FrontendAddr, ServiceTable},
};
use tracing::{info, warn};

use super::{
    foreign::Foreign,
    grow::Growth,
    load::Generation,
    maps::{FamilyMaps, Maps, Pins, Wire, WireAddr, filter_bit, map_error, set_filter_bit},
    plan::{Actual, Op, PlannedBackend, Planner, Refusal},
    sizes::{Capacity, Full},
};
use crate::datapath::{ApplyReport, Datapath, DatapathError, Refused};

/// The eBPF datapath's maps, kept equal to a table.
pub struct EbpfDatapath {
    maps: Maps,
    /// `None` until the kernel's state is known: at start and after a failed write.
    planner: Option<Planner>,
    foreign: Foreign,
    /// netfilter's flows have been looked for.
    imported: bool,
    /// `None`: the maps stay as large as they are.
    growth: Option<Growth>,
}

impl EbpfDatapath {
    /// Takes over the pinned maps.
    pub fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let (maps, foreign) = (Maps::open(pins, Generation::Present)?, Foreign::open(pins)?);
        Ok(Self { maps, planner: None, foreign, imported: false, growth: None })
    }

    /// Lets the maps grow.
    pub fn growing(self, growth: Growth) -> Self {
        Self { growth: Some(growth), ..self }
    }

    /// Reads what the kernel holds.
    pub fn actual(&self) -> Result<Actual, DatapathError> {
        self.maps.read()
    }

    /// The VIP filter lets the programs look at packets to this address.
    pub fn is_looked_at(&self, addr: IpAddr) -> Result<bool, DatapathError> {
        let bit = filter_bit(addr);
        let word = self.maps.filter.get(&(bit >> 6), 0);
        Ok(word.map_err(|source| map_error("read", "VIP_FILTER", source))? >> (bit & 63) & 1 == 1)
    }
}

impl Maps {
    /// Reads what the kernel holds.
    pub fn read(&self) -> Result<Actual, DatapathError> {
        let mut actual = Actual::default();
        read_family(&self.v4, Family::V4, "LB4", &mut actual)?;
        read_family(&self.v6, Family::V6, "LB6", &mut actual)?;
        let ranges = actual.frontends.values().flat_map(|value| [value.external, value.internal]);
        let slots: BTreeSet<u32> = ranges.flat_map(|range| range.first..range.first + range.count).collect();
        for slot in slots {
            let id = self.slots.get(&slot, 0).map_err(|source| map_error("read", "SLOTS", source))?;
            actual.slots.insert(slot, id);
        }
        Ok(actual)
    }

    /// Carries one write out.
    pub fn write(&mut self, op: &Op) -> Result<(), DatapathError> {
        match op {
            Op::Backend(_, id, backend) => match backend.addr {
                IpAddr::V4(addr) => write_backend(&mut self.v4, "LB4_BACKENDS", *id, addr.octets(), backend),
                IpAddr::V6(addr) => write_backend(&mut self.v6, "LB6_BACKENDS", *id, addr.octets(), backend),
            },
            Op::Slots(first, ids) => (*first..).zip(ids).try_for_each(|(slot, id)| {
                self.slots.set(slot, *id, 0).map_err(|source| map_error("update", "SLOTS", source))
            }),
            Op::SourceRange(service_id, net) => {
                let written = match range_key(*service_id, *net) {
                    RangeKey::V4(key) => self.v4.source_ranges.insert(&key, 1, 0),
                    RangeKey::V6(key) => self.v6.source_ranges.insert(&key, 1, 0),
                };
                written.map_err(|source| map_error("update", "LB_SOURCE_RANGES", source))
            }
            Op::DeleteSourceRange(service_id, net) => {
                let deleted = match range_key(*service_id, *net) {
                    RangeKey::V4(key) => self.v4.source_ranges.remove(&key),
                    RangeKey::V6(key) => self.v6.source_ranges.remove(&key),
                };
                gone(deleted, "LB_SOURCE_RANGES")
            }
            Op::Vip(addr, kind) => {
                set_filter_bit(&mut self.filter, *addr)?;
                let value = Wire(VipValue { kind: *kind });
                let written = match addr {
                    IpAddr::V4(addr) => self.v4.vips.insert(Wire(VipKey { addr: addr.octets() }), value, 0),
                    IpAddr::V6(addr) => self.v6.vips.insert(Wire(VipKey { addr: addr.octets() }), value, 0),
                };
                written.map_err(|source| map_error("update", "LB_VIPS", source))
            }
            Op::DeleteVip(addr) => {
                let deleted = match addr {
                    IpAddr::V4(addr) => self.v4.vips.remove(&Wire(VipKey { addr: addr.octets() })),
                    IpAddr::V6(addr) => self.v6.vips.remove(&Wire(VipKey { addr: addr.octets() })),
                };
                gone(deleted, "LB_VIPS")
            }
            Op::Frontend(addr, value) => {
                let written = match addr.addr {
                    IpAddr::V4(ip) => self.v4.frontends.insert(Wire(key(addr, ip.octets())), Wire(*value), 0),
                    IpAddr::V6(ip) => self.v6.frontends.insert(Wire(key(addr, ip.octets())), Wire(*value), 0),
                };
                written.map_err(|source| map_error("update", "LB_FRONTENDS", source))
            }
            Op::DeleteFrontend(addr) => {
                let deleted = match addr.addr {
                    IpAddr::V4(ip) => self.v4.frontends.remove(&Wire(key(addr, ip.octets()))),
                    IpAddr::V6(ip) => self.v6.frontends.remove(&Wire(key(addr, ip.octets()))),
                };
                gone(deleted, "LB_FRONTENDS")
            }
        }
    }
}

impl Datapath for EbpfDatapath {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn apply(&mut self, table: &ServiceTable, changes: &Changes) -> Result<ApplyReport, DatapathError> {
        let (mut planner, changes) = match self.planner.take() {
            Some(planner) => (planner, Cow::Borrowed(changes)),
            None => self.adopt(table)?,
        };
        if !self.imported {
            // Before the programs know any frontend: else they would choose for flows that have a backend.
            self.foreign.import(table)?;
            self.imported = true;
        }
        let mut report = ApplyReport::default();
        let mut refusals = self.carry_out(planner.plan(table, &changes), &mut report)?;
        while !refusals.is_empty() {
            let full: Vec<Full> = refusals.iter().map(|refusal| refusal.full).collect();
            let wanted = Capacity::comfortable(table).or_larger(self.maps.capacity().with_room(&full));
            let has_grown = self.grow(wanted, &mut planner);
            if !has_grown && !planner.has_new_room() {
                break;
            }
            refusals = self.carry_out(planner.plan(table, &Changes::default()), &mut report)?;
            if !has_grown {
                break;
            }
        }
        // A backend that is gone takes its flows with it.
        if !reconcile::families(&changes).is_empty() {
            self.foreign.reconcile(table);
        }
        report.refused = refusals.into_iter().map(|refusal| self.refused(refusal)).collect();
        self.planner = Some(planner);
        Ok(report)
    }

    fn is_intact(&mut self, table: &ServiceTable) -> bool {
        self.foreign.reconcile(table);
        true
    }
}

fn key<A>(addr: &FrontendAddr, ip: A) -> FrontendKey<A> {
    FrontendKey { addr: ip, port: addr.port, proto: addr.protocol.number(), pad: 0 }
}

impl EbpfDatapath {
    /// Starts from what the kernel holds, in maps that are large enough for the whole table if they can be.
    fn adopt(&mut self, table: &ServiceTable) -> Result<(Planner, Cow<'static, Changes>), DatapathError> {
        if !self.maps.capacity().holds(Capacity::needed(table)) {
            self.make_room(Capacity::comfortable(table));
        }
        let planner = Planner::adopt(self.maps.capacity(), self.actual()?, table);
        let mut changes = Changes::all(table);
        changes.merge(planner.leftovers(table));
        Ok((planner, Cow::Owned(changes)))
    }

    /// Makes the maps larger; says whether they are.
    fn grow(&mut self, wanted: Capacity, planner: &mut Planner) -> bool {
        let before = self.maps.capacity();
        self.make_room(wanted);
        planner.extend(self.maps.capacity());
        self.maps.capacity() != before
    }

    /// Without success all stays as it is.
    fn make_room(&mut self, wanted: Capacity) {
        let Some(growth) = &mut self.growth else { return };
        let started = Instant::now();
        match growth.grow(&self.maps, wanted) {
            Ok(Some(maps)) => {
                self.maps = maps;
                let now = self.maps.capacity();
                info!(slots = now.slots, backends = ?now.backends, frontends = ?now.frontends, elapsed_ms = started.elapsed().as_millis() as u64, "the maps have grown");
            }
            Ok(None) => {}
            Err(error) => warn!(error = %format!("{:#}", anyhow::Error::from(error)), "the maps can't grow"),
        }
    }

    /// Writes a plan; returns what it had no room for.
    fn carry_out(
        &mut self,
        (ops, refusals): (Vec<Op>, Vec<Refusal>),
        report: &mut ApplyReport,
    ) -> Result<Vec<Refusal>, DatapathError> {
        for op in &ops {
            // After a failed write the planner no longer knows what the kernel holds: the next call adopts again.
            self.maps.write(op)?;
            match op {
                Op::DeleteFrontend(_) | Op::DeleteVip(_) | Op::DeleteSourceRange(..) => report.deletes += 1,
                Op::Backend(_, _, backend) if backend.flags == 0 => report.deletes += 1,
                Op::Slots(_, ids) => report.upserts += ids.len(),
                Op::Backend(..) | Op::SourceRange(..) | Op::Vip(..) | Op::Frontend(..) => report.upserts += 1,
            }
        }
        Ok(refusals)
    }

    fn refused(&self, refusal: Refusal) -> Refused {
        let most = self.growth.as_ref().map(Growth::most);
        let reason = match most {
            Some(most) => format!(
                "{}, and maps may not have more than {most} entries, or the kernel has no memory for them: raise --map-entries-max, or delete Services",
                refusal.full
            ),
            None => refusal.full.to_string(),
        };
        Refused { service: refusal.service, reason }
    }
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
    actual.backends.extend(read_backends(maps, family, prefix)?);
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
