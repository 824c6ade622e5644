//! From a table to a list of map writes. Pure: what the kernel holds now is a value here.
//!
//! The order of writes keeps every prefix safe: a frontend never points to a slot without a live backend.
//!
//! 1. backends: nothing points to new ones yet;
//! 2. slots, in fresh places: nothing points there yet;
//! 3. source ranges: before the frontend that asks for them;
//! 4. VIPs and filter bits: a packet that finds no frontend yet is handled as before;
//! 5. frontends: each flips to its new slots in one write;
//! 6. frontends that are gone, then their VIPs and source ranges;
//! 7. backends that are gone: nothing points to them any more.
//!
//! Old slots and backend ids are reused by the next plan at the earliest: a program that has just read the old frontend
//! still reads valid ids there, and a kill at the end of a plan can't hit a backend written at its beginning.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use lb_common::abi::{FrontendValue, SlotRange, backend_flags, frontend_flags as flag, vip_kind};
use lb_core::{
    ids::{IdPool, RangePool},
    model::Family,
    table::{
        Backend, BackendList, Changes, Frontend, FrontendAddr, FrontendKind, Masquerade, NoBackends,
        ServiceEntry, ServicePortId, ServiceTable, VipKind,
    },
};

use super::sizes::{Capacity, Full, index};

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes a backend; flags 0 empties the place.
    Backend(Family, u32, PlannedBackend),
    /// Writes backend ids from a slot on.
    Slots(u32, Vec<u32>),
    /// Allows a source range.
    SourceRange(u32, IpNet),
    /// Writes a VIP and sets its filter bit.
    Vip(IpAddr, u32),
    /// Writes a frontend.
    Frontend(FrontendAddr, FrontendValue),
    /// Deletes a frontend.
    DeleteFrontend(FrontendAddr),
    /// Deletes a VIP. Its filter bit stays: flows may still need it, and it costs a lookup at most.
    DeleteVip(IpAddr),
    /// Deletes a source range.
    DeleteSourceRange(u32, IpNet),
}

/// A backend as planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedBackend {
    /// Address.
    pub addr: IpAddr,
    /// Port.
    pub port: u16,
    /// `backend_flags`.
    pub flags: u8,
    /// Its service port.
    pub service_id: u32,
    /// See the map's ABI.
    pub generation: u32,
}

/// What the kernel holds, as an agent that starts finds it.
#[derive(Clone, Debug, Default)]
pub struct Actual {
    /// Frontends.
    pub frontends: BTreeMap<FrontendAddr, FrontendValue>,
    /// Backend ids in the slots that frontends point to.
    pub slots: BTreeMap<u32, u32>,
    /// Backends of those ids, and all others that are alive.
    pub backends: BTreeMap<(Family, u32), PlannedBackend>,
    /// VIPs.
    pub vips: BTreeMap<IpAddr, u32>,
    /// Source ranges.
    pub source_ranges: BTreeSet<(u32, IpNet)>,
}

impl Actual {
    /// Follows a write.
    pub fn write(&mut self, op: &Op) {
        match op {
            Op::Backend(family, id, backend) => drop(self.backends.insert((*family, *id), *backend)),
            Op::Slots(first, ids) => self.slots.extend((*first..).zip(ids.iter().copied())),
            Op::SourceRange(id, net) => drop(self.source_ranges.insert((*id, *net))),
            Op::Vip(addr, kind) => drop(self.vips.insert(*addr, *kind)),
            Op::Frontend(addr, value) => drop(self.frontends.insert(*addr, *value)),
            Op::DeleteFrontend(addr) => drop(self.frontends.remove(addr)),
            Op::DeleteVip(addr) => drop(self.vips.remove(addr)),
            Op::DeleteSourceRange(id, net) => drop(self.source_ranges.remove(&(*id, *net))),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct List {
    range: SlotRange,
    ids: Vec<u32>,
}

#[derive(Clone, Debug, Default)]
struct Programmed {
    service_id: u32,
    affinity_secs: u32,
    /// Id and value by address.
    backends: BTreeMap<(IpAddr, u16), (u32, PlannedBackend)>,
    cluster: List,
    local: List,
    source_ranges: BTreeSet<IpNet>,
    frontends: BTreeSet<FrontendAddr>,
}

/// A service port for which there is no room, or not for all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Which.
    pub service: ServicePortId,
    /// Where.
    pub full: Full,
}

/// Entries of maps that the kernel counts: of frontends, addresses and source ranges, IPv4 and IPv6.
#[derive(Clone, Copy, Debug, Default)]
struct Entries {
    frontends: [u32; 2],
    vips: [u32; 2],
    source_ranges: [u32; 2],
}

/// The programmed state and the pools behind it.
pub struct Planner {
    capacity: Capacity,
    /// As many as there are while a plan is carried out: what it deletes goes last.
    held: Entries,
    deleted: Entries,
    /// Looked at again by every plan: there may be room now.
    refused: BTreeMap<ServicePortId, Full>,
    programmed: BTreeMap<ServicePortId, Programmed>,
    frontends: BTreeMap<FrontendAddr, (Option<ServicePortId>, FrontendValue)>,
    vips: BTreeMap<IpAddr, u32>,
    service_ids: IdPool,
    backend_ids: [IdPool; 2],
    /// Generation of every backend place that was ever taken.
    generations: BTreeMap<(Family, u32), u32>,
    slots: RangePool,
    retired: Vec<SlotRange>,
    /// Found in the kernel, and no list of the first table: frontends point there until the first plan has been written.
    unclaimed: Vec<SlotRange>,
    retired_ids: Vec<(Family, u32)>,
    /// Found in the kernel and claimed by no service of the first table.
    orphans: Vec<((Family, u32), PlannedBackend)>,
    orphan_ranges: Vec<(u32, IpNet)>,
    /// Lost a frontend with source ranges in this plan.
    perhaps_unrestricted: BTreeSet<ServicePortId>,
}

/// Service ids are 32 bits wide; this many are plenty.
const SERVICE_IDS: u32 = 1 << 24;

impl Planner {
    /// Starts from what the kernel holds: `table` says which of it to keep.
    pub fn adopt(capacity: Capacity, actual: Actual, table: &ServiceTable) -> Self {
        let mut planner = Self {
            capacity,
            held: Entries::default(),
            deleted: Entries::default(),
            refused: BTreeMap::new(),
            programmed: BTreeMap::new(),
            frontends: BTreeMap::new(),
            vips: actual.vips.clone(),
            service_ids: IdPool::new(SERVICE_IDS),
            backend_ids: capacity.backends.map(IdPool::new),
            generations: actual.backends.iter().map(|(key, backend)| (*key, backend.generation)).collect(),
            slots: RangePool::new(capacity.slots),
            retired: Vec::new(),
            unclaimed: Vec::new(),
            retired_ids: Vec::new(),
            orphans: Vec::new(),
            orphan_ranges: Vec::new(),
            perhaps_unrestricted: BTreeSet::new(),
        };
        actual.frontends.keys().for_each(|addr| planner.held.frontends[of(addr.addr)] += 1);
        actual.vips.keys().for_each(|addr| planner.held.vips[of(*addr)] += 1);
        actual.source_ranges.iter().for_each(|(_, net)| planner.held.source_ranges[of(net.addr())] += 1);
        for ((family, id), backend) in &actual.backends {
            if backend.flags & backend_flags::ALIVE != 0 {
                planner.backend_ids[index(*family)].reserve(*id);
            }
        }
        let mut ranges: BTreeSet<(u32, u32)> = BTreeSet::new();
        for value in actual.frontends.values() {
            planner.service_ids.reserve(value.service_id);
            ranges.extend(
                [value.external, value.internal].iter().filter(|r| r.count > 0).map(|r| (r.first, r.count)),
            );
        }
        ranges.retain(|(first, count)| planner.slots.reserve(*first, *count));
        planner.adopt_services(&actual, table, &mut ranges);
        planner.unclaimed.extend(ranges.into_iter().map(|(first, count)| SlotRange { first, count }));
        planner
    }

    fn adopt_services(&mut self, actual: &Actual, table: &ServiceTable, ranges: &mut BTreeSet<(u32, u32)>) {
        let mut owners: BTreeMap<u32, ServicePortId> = BTreeMap::new();
        // ClusterIPs first: other frontends may have gone from one Service to another since, their id is the other's.
        let mut frontends: Vec<(&FrontendAddr, &Frontend)> = table.frontends.iter().collect();
        frontends.sort_by_key(|(addr, frontend)| (frontend.kind, **addr));
        for (addr, frontend) in frontends {
            let Some(value) = actual.frontends.get(addr) else { continue };
            let known = self.programmed.get(&frontend.service).map(|programmed| programmed.service_id);
            if known.is_some_and(|id| id != value.service_id)
                || owners.get(&value.service_id).is_some_and(|owner| *owner != frontend.service)
            {
                continue;
            }
            owners.entry(value.service_id).or_insert_with(|| frontend.service.clone());
            let programmed = self.programmed.entry(frontend.service.clone()).or_insert_with(|| Programmed {
                service_id: value.service_id,
                affinity_secs: value.affinity_secs,
                ..Programmed::default()
            });
            for (range, local) in [
                (value.external, value.flags & flag::EXTERNAL_LOCAL_LIST != 0),
                (value.internal, value.flags & flag::INTERNAL_LOCAL_LIST != 0),
            ] {
                let list = if local { &mut programmed.local } else { &mut programmed.cluster };
                if range.count > 0 && list.ids.is_empty() && ranges.remove(&(range.first, range.count)) {
                    let slots = range.first..range.first + range.count;
                    *list = List {
                        range,
                        ids: slots.filter_map(|slot| actual.slots.get(&slot).copied()).collect(),
                    };
                }
            }
        }
        let alive = |backend: &PlannedBackend| backend.flags & backend_flags::ALIVE != 0;
        for (key, backend) in actual.backends.iter().filter(|(_, backend)| alive(backend)) {
            let owner = owners.get(&backend.service_id).filter(|owner| owner.family == key.0);
            match owner.and_then(|owner| self.programmed.get_mut(owner)) {
                Some(programmed) => {
                    let addr = (backend.addr, backend.port);
                    if let Some((id, twin)) = programmed.backends.insert(addr, (key.1, *backend)) {
                        self.orphans.push(((key.0, id), twin));
                    }
                }
                None => {
                    // Nobody else gets its service's id while it lives.
                    self.service_ids.reserve(backend.service_id);
                    self.orphans.push((*key, *backend));
                }
            }
        }
        for (service_id, range) in &actual.source_ranges {
            let owner = owners.get(service_id);
            match owner.and_then(|owner| Some((owner, self.programmed.get_mut(owner)?))) {
                Some((owner, programmed)) => {
                    programmed.source_ranges.insert(*range);
                    self.perhaps_unrestricted.insert(owner.clone());
                }
                None => {
                    // Nobody else gets its id before it is deleted.
                    self.service_ids.reserve(*service_id);
                    self.orphan_ranges.push((*service_id, *range));
                }
            }
        }
        for (addr, value) in &actual.frontends {
            let owner = owners.get(&value.service_id).cloned();
            if let Some(programmed) = owner.as_ref().and_then(|owner| self.programmed.get_mut(owner)) {
                programmed.frontends.insert(*addr);
            }
            self.frontends.insert(*addr, (owner, *value));
        }
    }

    /// The writes that lead to `table`, and the service ports for which there is no room. Where there is some for a part
    /// of them only, the oldest get it.
    pub fn plan(&mut self, table: &ServiceTable, changes: &Changes) -> (Vec<Op>, Vec<Refusal>) {
        self.reuse();
        self.retired.append(&mut self.unclaimed);
        let mut writes = Writes::default();
        let mut services: Vec<&ServicePortId> = changes.services.iter().collect();
        let mut flips = changes.frontends.clone();
        let mut vips = changes.vips.clone();
        let refused = std::mem::take(&mut self.refused);
        if !refused.is_empty() {
            services.extend(refused.keys().filter(|id| !changes.services.contains(*id)));
            let of_refused = |(_, frontend): &(_, &Frontend)| refused.contains_key(&frontend.service);
            flips.extend(table.frontends.iter().filter(of_refused).map(|(addr, _)| *addr));
            vips.extend(flips.iter().map(|addr| addr.addr).filter(|addr| table.vips.contains_key(addr)));
        }
        let created = |id: &ServicePortId| table.services.get(id).map(|entry| entry.created_unix_secs);
        services.sort_by_cached_key(|id| created(id));
        for id in services.iter().copied() {
            let Some(entry) = table.services.get(id) else { continue };
            if self.plan_service(id, entry, &mut writes) {
                flips.extend(self.programmed.get(id).into_iter().flat_map(|p| p.frontends.iter().copied()));
            }
        }
        let mut flips: Vec<FrontendAddr> = flips.into_iter().collect();
        flips.sort_by_cached_key(|addr| table.frontends.get(addr).and_then(|it| created(&it.service)));
        let oldest_first = flips.iter().map(|addr| addr.addr).filter(|addr| vips.contains(addr));
        self.plan_vips(table, oldest_first.chain(vips.iter().copied()), &mut writes);
        for addr in flips {
            match table.frontends.get(&addr) {
                Some(frontend) => {
                    if let Err(full) = self.plan_frontend(addr, frontend, &mut writes) {
                        self.refused.entry(frontend.service.clone()).or_insert(full);
                        if self
                            .frontends
                            .get(&addr)
                            .is_some_and(|(owner, _)| owner.as_ref() != Some(&frontend.service))
                        {
                            // Whose it was has lost it all the same.
                            self.forget_frontend(addr, &mut writes);
                        }
                    }
                }
                None => self.forget_frontend(addr, &mut writes),
            }
        }
        for id in services.into_iter().filter(|id| !table.services.contains_key(*id)) {
            self.forget_service(id, &mut writes);
        }
        self.forget_unused_ranges(&mut writes);
        for ((family, id), backend) in std::mem::take(&mut self.orphans) {
            self.kill(family, id, backend, &mut writes);
        }
        for (id, net) in std::mem::take(&mut self.orphan_ranges) {
            self.delete_range(id, net, &mut writes);
        }
        let refusals = self.refused.iter().map(|(id, full)| Refusal { service: id.clone(), full: *full });
        (writes.in_order(), refusals.collect())
    }

    /// What the last plan deleted has room for others now.
    fn reuse(&mut self) {
        for range in std::mem::take(&mut self.retired) {
            self.slots.release(range.first, range.count);
        }
        for (family, id) in std::mem::take(&mut self.retired_ids) {
            self.backend_ids[index(family)].release(id);
        }
        let deleted = std::mem::take(&mut self.deleted);
        for family in [0, 1] {
            self.held.frontends[family] -= deleted.frontends[family];
            self.held.vips[family] -= deleted.vips[family];
            self.held.source_ranges[family] -= deleted.source_ranges[family];
        }
    }

    /// The last plan deleted something, whose room another plan could use.
    pub fn has_new_room(&self) -> bool {
        let deleted = [self.deleted.frontends, self.deleted.vips, self.deleted.source_ranges];
        !self.retired.is_empty()
            || !self.retired_ids.is_empty()
            || deleted.as_flattened().iter().any(|n| *n > 0)
    }

    /// The maps are larger now; no id has changed.
    pub fn extend(&mut self, capacity: Capacity) {
        self.capacity = capacity;
        self.slots.extend(capacity.slots);
        for (pool, ids) in self.backend_ids.iter_mut().zip(capacity.backends) {
            pool.extend(ids);
        }
    }

    /// Frontends and VIPs that the kernel has and the table hasn't: changes of the first plan.
    pub fn leftovers(&self, table: &ServiceTable) -> Changes {
        let mut changes = Changes::default();
        changes.frontends.extend(self.frontends.keys().filter(|addr| !table.frontends.contains_key(addr)));
        changes.vips.extend(self.vips.keys().filter(|addr| !table.vips.contains_key(addr)));
        changes
            .services
            .extend(self.programmed.keys().filter(|id| !table.services.contains_key(id)).cloned());
        changes
    }

    /// Backends, slots and affinity of one service port; says whether its frontends must be written. A new service port
    /// gets room for all of it or none; one that is served keeps what it has, and gets as many new backends as there is
    /// room for.
    fn plan_service(&mut self, id: &ServicePortId, entry: &ServiceEntry, writes: &mut Writes) -> bool {
        let (mut programmed, is_new) = match self.programmed.remove(id) {
            Some(programmed) => (programmed, false),
            None => {
                let Some(service_id) = self.service_ids.take() else {
                    self.refused.insert(id.clone(), Full::Frontends(id.family));
                    return false;
                };
                (Programmed { service_id, ..Programmed::default() }, true)
            }
        };
        let written = (writes.backends.len(), writes.slots.len());
        let (changed, full) = self.plan_backends(id.family, entry, &mut programmed, writes);
        if let Some(full) = full {
            self.refused.insert(id.clone(), full);
            if is_new {
                writes.backends.truncate(written.0);
                writes.slots.truncate(written.1);
                self.release(id.family, &programmed);
                return false;
            }
        }
        self.programmed.insert(id.clone(), programmed);
        changed
    }

    /// Gives back what was planned for a service port and won't be written.
    fn release(&mut self, family: Family, programmed: &Programmed) {
        for (id, _) in programmed.backends.values() {
            self.backend_ids[index(family)].release(*id);
        }
        for list in [&programmed.cluster, &programmed.local] {
            if list.range.count > 0 {
                self.slots.release(list.range.first, list.range.count);
            }
        }
        self.service_ids.release(programmed.service_id);
    }

    /// Says whether the frontends must be written, and where there was no room.
    fn plan_backends(
        &mut self,
        family: Family,
        entry: &ServiceEntry,
        programmed: &mut Programmed,
        writes: &mut Writes,
    ) -> (bool, Option<Full>) {
        let mut full = None;
        let desired = flags_by_addr(entry);
        for ((addr, port), flags) in &desired {
            let value = |generation| PlannedBackend {
                addr: *addr,
                port: *port,
                flags: *flags,
                service_id: programmed.service_id,
                generation,
            };
            match programmed.backends.get_mut(&(*addr, *port)) {
                Some((_, known)) if known.flags == *flags => {}
                Some((id, known)) => {
                    *known = value(known.generation);
                    writes.backends.push(Op::Backend(family, *id, *known));
                }
                None => {
                    let Some(id) = self.backend_ids[index(family)].take() else {
                        full = Some(Full::Backends(family));
                        continue;
                    };
                    let generation = self.next_generation(family, id);
                    writes.backends.push(Op::Backend(family, id, value(generation)));
                    programmed.backends.insert((*addr, *port), (id, value(generation)));
                }
            }
        }
        let affinity_secs = entry.affinity_secs.unwrap_or(0);
        let mut changed = programmed.affinity_secs != affinity_secs;
        programmed.affinity_secs = affinity_secs;
        for local in [false, true] {
            let backends = if local { &entry.local } else { &entry.cluster };
            let ids: Vec<u32> = backends
                .iter()
                .filter_map(|backend| {
                    programmed.backends.get(&(backend.addr, backend.port)).map(|(id, _)| *id)
                })
                .collect();
            let list = if local { &mut programmed.local } else { &mut programmed.cluster };
            if list.ids == ids {
                continue;
            }
            let mut range = SlotRange::default();
            if !ids.is_empty() {
                let count = u32::try_from(ids.len()).unwrap_or(u32::MAX);
                let Some(first) = self.slots.take(count) else {
                    // Its old slots go on: none of their backends may go yet.
                    return (changed, Some(Full::Slots(count)));
                };
                range = SlotRange { first, count };
                writes.slots.push(Op::Slots(first, ids.clone()));
            }
            let old = std::mem::replace(list, List { range, ids });
            if old.range.count > 0 {
                self.retired.push(old.range);
            }
            changed = true;
        }
        let gone: Vec<(IpAddr, u16)> =
            programmed.backends.keys().filter(|key| !desired.contains_key(*key)).copied().collect();
        for key in gone {
            if let Some((id, backend)) = programmed.backends.remove(&key) {
                self.kill(family, id, backend, writes);
            }
        }
        (changed, full)
    }

    fn plan_vips(
        &mut self,
        table: &ServiceTable,
        changed: impl Iterator<Item = IpAddr>,
        writes: &mut Writes,
    ) {
        for addr in changed {
            let desired = table.vips.get(&addr).map(|kind| match kind {
                VipKind::Vip => vip_kind::VIP,
                VipKind::NodeAddress | VipKind::OwnAddress => vip_kind::NODE_ADDRESS,
            });
            match desired {
                Some(kind) if self.vips.get(&addr) == Some(&kind) => {}
                Some(kind) => {
                    if !self.vips.contains_key(&addr) {
                        if self.held.vips[of(addr)] >= self.capacity.frontends[of(addr)] {
                            continue;
                        }
                        self.held.vips[of(addr)] += 1;
                    }
                    self.vips.insert(addr, kind);
                    writes.vips.push(Op::Vip(addr, kind));
                }
                None => {
                    if self.vips.remove(&addr).is_some() {
                        self.deleted.vips[of(addr)] += 1;
                        writes.delete_vips.push(Op::DeleteVip(addr));
                    }
                }
            }
        }
    }

    fn plan_frontend(
        &mut self,
        addr: FrontendAddr,
        frontend: &Frontend,
        writes: &mut Writes,
    ) -> Result<(), Full> {
        let family = Family::of(addr.addr);
        let Some(programmed) = self.programmed.get_mut(&frontend.service) else {
            // Refused, for a reason that is noted already.
            return Err(Full::Frontends(family));
        };
        let is_new = !self.frontends.contains_key(&addr);
        let has_room = self.held.frontends[index(family)] < self.capacity.frontends[index(family)];
        if is_new && !(has_room && self.vips.contains_key(&addr.addr)) {
            return Err(Full::Frontends(family));
        }
        let mut added: Vec<IpNet> = frontend
            .source_ranges
            .iter()
            .filter(|net| !programmed.source_ranges.contains(net))
            .copied()
            .collect();
        let room = self.capacity.source_ranges[index(family)] - self.held.source_ranges[index(family)];
        let fits = added.len() <= room as usize;
        if !fits && is_new {
            return Err(Full::SourceRanges(family));
        }
        // One that is served has to follow its backends: who has no room among its sources is not let in.
        added.truncate(room as usize);
        self.held.source_ranges[index(family)] += added.len() as u32;
        programmed.source_ranges.extend(&added);
        writes.ranges.extend(added.into_iter().map(|net| Op::SourceRange(programmed.service_id, net)));
        if frontend.kind == FrontendKind::LoadBalancer {
            let service_id = programmed.service_id;
            let stale: Vec<IpNet> = programmed
                .source_ranges
                .iter()
                .filter(|net| !frontend.source_ranges.contains(net))
                .copied()
                .collect();
            for net in stale {
                programmed.source_ranges.remove(&net);
                self.deleted.source_ranges[index(family)] += 1;
                writes.delete_ranges.push(Op::DeleteSourceRange(service_id, net));
            }
        }
        self.held.frontends[index(family)] += u32::from(is_new);
        let value = frontend_value(frontend, programmed);
        programmed.frontends.insert(addr);
        match self.frontends.get(&addr).cloned() {
            Some((Some(owner), before)) if owner != frontend.service => self.disown(addr, before, &owner),
            Some((Some(owner), before)) if before.flags & !value.flags & flag::SOURCE_RANGES != 0 => {
                self.perhaps_unrestricted.insert(owner);
            }
            _ => {}
        }
        let entry = (Some(frontend.service.clone()), value);
        if self.frontends.get(&addr) != Some(&entry) {
            let same_value = self.frontends.get(&addr).is_some_and(|(_, known)| *known == value);
            self.frontends.insert(addr, entry);
            if !same_value {
                writes.frontends.push(Op::Frontend(addr, value));
            }
        }
        if fits { Ok(()) } else { Err(Full::SourceRanges(family)) }
    }

    fn forget_frontend(&mut self, addr: FrontendAddr, writes: &mut Writes) {
        if let Some((owner, value)) = self.frontends.remove(&addr) {
            self.deleted.frontends[of(addr.addr)] += 1;
            writes.delete_frontends.push(Op::DeleteFrontend(addr));
            if let Some(owner) = owner {
                self.disown(addr, value, &owner);
            }
        }
    }

    /// A service port has one frontend less, and perhaps no more use for its source ranges.
    fn disown(&mut self, addr: FrontendAddr, value: FrontendValue, owner: &ServicePortId) {
        if let Some(programmed) = self.programmed.get_mut(owner) {
            programmed.frontends.remove(&addr);
            if value.flags & flag::SOURCE_RANGES != 0 {
                self.perhaps_unrestricted.insert(owner.clone());
            }
        }
    }

    /// Source ranges that no frontend asks for any more.
    fn forget_unused_ranges(&mut self, writes: &mut Writes) {
        for id in std::mem::take(&mut self.perhaps_unrestricted) {
            let Some(programmed) = self.programmed.get_mut(&id) else { continue };
            let asks =
                |addr| self.frontends.get(addr).is_some_and(|(_, it)| it.flags & flag::SOURCE_RANGES != 0);
            if !programmed.frontends.iter().any(asks) {
                let service_id = programmed.service_id;
                for net in std::mem::take(&mut programmed.source_ranges) {
                    self.delete_range(service_id, net, writes);
                }
            }
        }
    }

    fn forget_service(&mut self, id: &ServicePortId, writes: &mut Writes) {
        let Some(programmed) = self.programmed.remove(id) else { return };
        for addr in &programmed.frontends {
            self.forget_frontend(*addr, writes);
        }
        for (backend_id, backend) in programmed.backends.values() {
            self.kill(id.family, *backend_id, *backend, writes);
        }
        for net in &programmed.source_ranges {
            self.delete_range(programmed.service_id, *net, writes);
        }
        self.retired.extend(
            [programmed.cluster.range, programmed.local.range].iter().filter(|range| range.count > 0),
        );
        self.service_ids.release(programmed.service_id);
    }

    fn delete_range(&mut self, service_id: u32, net: IpNet, writes: &mut Writes) {
        self.deleted.source_ranges[of(net.addr())] += 1;
        writes.delete_ranges.push(Op::DeleteSourceRange(service_id, net));
    }

    fn kill(&mut self, family: Family, id: u32, backend: PlannedBackend, writes: &mut Writes) {
        let generation = self.next_generation(family, id);
        writes.kills.push(Op::Backend(family, id, PlannedBackend { flags: 0, generation, ..backend }));
        self.retired_ids.push((family, id));
    }

    fn next_generation(&mut self, family: Family, id: u32) -> u32 {
        let generation = self.generations.entry((family, id)).or_default();
        *generation = generation.wrapping_add(1);
        *generation
    }
}

#[derive(Default)]
struct Writes {
    backends: Vec<Op>,
    slots: Vec<Op>,
    ranges: Vec<Op>,
    vips: Vec<Op>,
    frontends: Vec<Op>,
    delete_frontends: Vec<Op>,
    delete_vips: Vec<Op>,
    delete_ranges: Vec<Op>,
    kills: Vec<Op>,
}

impl Writes {
    /// The order of the module's list.
    fn in_order(self) -> Vec<Op> {
        [
            self.backends,
            self.slots,
            self.ranges,
            self.vips,
            self.frontends,
            self.delete_frontends,
            self.delete_vips,
            self.delete_ranges,
            self.kills,
        ]
        .concat()
    }
}

fn of(addr: IpAddr) -> usize {
    index(Family::of(addr))
}

/// Every backend a flow may have, with its flags.
fn flags_by_addr(entry: &ServiceEntry) -> BTreeMap<(IpAddr, u16), u8> {
    let mut flags: BTreeMap<(IpAddr, u16), u8> =
        entry.serving.iter().map(|key| (*key, backend_flags::ALIVE)).collect();
    let mut add = |backends: &[Backend], list| {
        for backend in backends {
            let bits = flags.entry((backend.addr, backend.port)).or_default();
            *bits |= backend_flags::ALIVE | list;
            if backend.local {
                *bits |= backend_flags::LOCAL;
            }
            if backend.own_address {
                *bits |= backend_flags::NODE_ADDRESS;
            }
        }
    };
    add(&entry.cluster, backend_flags::IN_CLUSTER_LIST);
    add(&entry.local, backend_flags::IN_LOCAL_LIST);
    flags
}

fn frontend_value(frontend: &Frontend, programmed: &Programmed) -> FrontendValue {
    let range = |list| match list {
        BackendList::Cluster => programmed.cluster.range,
        BackendList::Local => programmed.local.range,
    };
    let external = &frontend.external;
    let internal = &frontend.internal;
    let mut flags = 0;
    for (holds, bit) in [
        (external.none == NoBackends::Drop, flag::EXTERNAL_NONE_DROPS),
        (internal.none == NoBackends::Drop, flag::INTERNAL_NONE_DROPS),
        (external.masquerade == Masquerade::Remote, flag::EXTERNAL_MASQ_REMOTE),
        (external.masquerade == Masquerade::Always, flag::EXTERNAL_MASQ_ALWAYS),
        (internal.masquerade == Masquerade::Always, flag::INTERNAL_MASQ_ALWAYS),
        (external.list == BackendList::Local, flag::EXTERNAL_LOCAL_LIST),
        (internal.list == BackendList::Local, flag::INTERNAL_LOCAL_LIST),
        (!frontend.source_ranges.is_empty(), flag::SOURCE_RANGES),
        (frontend.source_ranges_allow_host, flag::SOURCE_RANGES_ALLOW_HOST),
        (frontend.kind == FrontendKind::LocalhostNodePort, flag::HOST_ONLY),
    ] {
        if holds {
            flags |= bit;
        }
    }
    FrontendValue {
        service_id: programmed.service_id,
        flags,
        affinity_secs: programmed.affinity_secs,
        external: range(external.list),
        internal: range(internal.list),
    }
}

#[cfg(test)]
mod tests;
