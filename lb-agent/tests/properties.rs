//! Whatever happens to a cluster and in whatever order: the table ends as if it had begun with what there is, the maps hold the
//! table, and no write on the way there leaves a frontend that points to a slot without a live backend.

#[path = "../../lb-core/tests/agreement/history.rs"]
mod history;
#[path = "../../lb-core/tests/agreement/random.rs"]
#[expect(dead_code, reason = "the other test asks for more")]
mod random;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use history::Step;
use ipnet::IpNet;
use lb_agent::datapath::ebpf::{
    plan::{Actual, Op, Planner, Refusal},
    sizes::{Capacity, index},
};
use lb_common::abi::{SlotRange, backend_flags};
use lb_core::{
    compile::{Compiler, compile},
    flow::Dialect,
    model::Family,
    table::{Changes, FrontendAddr, ServiceTable},
};
use random::{Random, Scene};

/// Clusters, and what happens to each.
const CLUSTERS: u64 = 150;
const EVENTS: usize = 80;

/// Too small for many of the clusters.
const SMALL: Capacity = Capacity { slots: 24, backends: [9, 7], frontends: [14, 9], source_ranges: [4, 3] };

/// The maps, and what may be in them.
struct Kernel {
    maps: Actual,
    room: Capacity,
}

impl Kernel {
    /// Each write by itself: what a program may see between it and the next.
    fn carry_out(&mut self, (ops, refused): (Vec<Op>, Vec<Refusal>)) -> usize {
        for op in &ops {
            self.maps.write(op);
            self.check(op);
        }
        refused.len()
    }

    fn check(&self, op: &Op) {
        for (addr, value) in &self.maps.frontends {
            for slot in [value.external, value.internal].iter().flat_map(|range| slots(*range)) {
                let id = self.maps.slots.get(&slot);
                let id = id.unwrap_or_else(|| panic!("{op:?}: {addr}: slot {slot} is empty"));
                let backend = self.maps.backends.get(&(Family::of(addr.addr), *id));
                let backend = backend.unwrap_or_else(|| panic!("{op:?}: {addr}: no backend {id}"));
                assert!(backend.flags & backend_flags::ALIVE != 0, "{op:?}: {addr}: backend {id} is dead");
                assert_eq!(backend.service_id, value.service_id, "{op:?}: {addr}: another's backend {id}");
            }
        }
        let mut held = Capacity { slots: 0, backends: [0; 2], frontends: [0; 2], source_ranges: [0; 2] };
        let mut vips = [0; 2];
        self.maps.frontends.keys().for_each(|addr| held.frontends[index(Family::of(addr.addr))] += 1);
        self.maps.vips.keys().for_each(|addr| vips[index(Family::of(*addr))] += 1);
        for (_, net) in &self.maps.source_ranges {
            held.source_ranges[index(Family::of(net.addr()))] += 1;
        }
        held.slots = self.maps.slots.keys().max().map_or(0, |slot| slot + 1);
        for (family, id) in self.maps.backends.keys() {
            held.backends[index(*family)] = held.backends[index(*family)].max(id + 1);
        }
        assert!(self.room.holds(held), "{op:?}: {held:?} in {:?}", self.room);
        assert!(vips[0] <= self.room.frontends[0] && vips[1] <= self.room.frontends[1], "{op:?}: {vips:?}");
    }
}

fn slots(range: SlotRange) -> std::ops::Range<u32> {
    range.first..range.first + range.count
}

/// What the maps serve, whatever ids and slots it has.
#[derive(Debug, Default, PartialEq)]
struct Served {
    frontends: BTreeMap<FrontendAddr, Frontend>,
    vips: BTreeMap<IpAddr, u32>,
    /// Also those that no list has: flows may still have them.
    backends: BTreeMap<(IpAddr, u16), usize>,
}

/// Flags, affinity, backends with their flags for packets from outside and of this node, and allowed sources.
type Frontend = (u32, u32, [Vec<(String, u8)>; 2], BTreeSet<IpNet>);

fn served(maps: &Actual) -> Served {
    let frontend = |(addr, value): (&FrontendAddr, &lb_common::abi::FrontendValue)| {
        let list = |range| {
            let backends =
                slots(range).map(|slot| &maps.backends[&(Family::of(addr.addr), maps.slots[&slot])]);
            backends.map(|it| (format!("{} {}", it.addr, it.port), it.flags)).collect::<Vec<_>>()
        };
        let ranges = maps.source_ranges.iter().filter(|(service, _)| *service == value.service_id);
        let ranges =
            ranges.map(|(_, net)| *net).filter(|net| Family::of(net.addr()) == Family::of(addr.addr));
        (
            *addr,
            (
                value.flags,
                value.affinity_secs,
                [list(value.external), list(value.internal)],
                ranges.collect(),
            ),
        )
    };
    let mut backends = BTreeMap::new();
    for backend in maps.backends.values().filter(|backend| backend.flags & backend_flags::ALIVE != 0) {
        *backends.entry((backend.addr, backend.port)).or_default() += 1;
    }
    Served { frontends: maps.frontends.iter().map(frontend).collect(), vips: maps.vips.clone(), backends }
}

/// Names what differs: all of it would be too much to read.
#[track_caller]
fn assert_same(now: &Served, fresh: &Served) {
    for addr in now.frontends.keys().chain(fresh.frontends.keys()) {
        assert_eq!(now.frontends.get(addr), fresh.frontends.get(addr), "{addr}");
    }
    assert_eq!((&now.vips, &now.backends), (&fresh.vips, &fresh.backends));
}

/// What the maps would serve had the table come all at once.
fn afresh(table: &ServiceTable) -> Served {
    let mut kernel = Kernel { maps: Actual::default(), room: Capacity::UNLIMITED };
    let mut planner = Planner::adopt(kernel.room, Actual::default(), table);
    assert_eq!(kernel.carry_out(planner.plan(table, &Changes::all(table))), 0);
    served(&kernel.maps)
}

/// A new agent finds what another left, which may be half of a plan; what it would write.
fn adopted(compiler: &Compiler, kernel: &Kernel) -> (Planner, Vec<Op>) {
    let table = compiler.table();
    let mut planner = Planner::adopt(kernel.room, kernel.maps.clone(), table);
    let mut changes = Changes::all(table);
    changes.merge(planner.leftovers(table));
    let (ops, _) = planner.plan(table, &changes);
    (planner, ops)
}

fn live(seed: u64, room: Capacity) -> usize {
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let mut scene = Scene::empty(&mut random);
    let config = scene.compile_config(Dialect::Ebpf);
    let mut compiler = Compiler::new(config.clone(), scene.node.clone());
    let mut kernel = Kernel { maps: Actual::default(), room };
    let mut planner = Planner::adopt(room, Actual::default(), compiler.table());
    let mut refused = 0;
    for _ in 0..EVENTS {
        match scene.happen(&mut random) {
            Step::Event(event) => compiler.apply(event),
            Step::Addresses(addresses) => compiler.set_addresses(addresses),
        }
        // Several events are often one change.
        if random.below(3) > 0 {
            let changes = compiler.compile();
            if random.below(8) == 0 {
                let (mut ops, _) = planner.plan(compiler.table(), &changes);
                // The next agent may be killed, too.
                for _ in 0..random.below(3) {
                    ops.truncate(random.below(ops.len() + 1));
                    kernel.carry_out((ops, Vec::new()));
                    (planner, ops) = adopted(&compiler, &kernel);
                }
                kernel.carry_out((ops, Vec::new()));
            } else {
                refused = refused.max(kernel.carry_out(planner.plan(compiler.table(), &changes)));
            }
        }
    }
    let changes = compiler.compile();
    kernel.carry_out(planner.plan(compiler.table(), &changes));

    let whole = compile(&scene.cluster, &scene.node, &config);
    let (now, fresh) = (compiler.table(), &whole.table);
    for (id, entry) in now.services.iter().chain(&fresh.services) {
        assert_eq!((now.services.get(id), fresh.services.get(id)), (Some(entry), Some(entry)), "{id:?}");
    }
    for (addr, frontend) in now.frontends.iter().chain(&fresh.frontends) {
        let both = (now.frontends.get(addr), fresh.frontends.get(addr));
        assert_eq!(both, (Some(frontend), Some(frontend)), "{addr}");
    }
    assert_eq!(now, fresh, "the table isn't what it would be from the start");
    let sorted =
        |warnings: Vec<&lb_core::model::Warning>| warnings.into_iter().cloned().collect::<BTreeSet<_>>();
    assert_eq!(sorted(compiler.warnings().collect()), sorted(whole.warnings.iter().collect()));

    // With room for all of it the maps hold all of it, and nothing else.
    kernel.room = Capacity::UNLIMITED;
    planner.extend(kernel.room);
    assert_eq!(kernel.carry_out(planner.plan(compiler.table(), &Changes::default())), 0);
    assert_same(&served(&kernel.maps), &afresh(compiler.table()));
    let (_, ops) = adopted(&compiler, &kernel);
    kernel.carry_out((ops, Vec::new()));
    assert_same(&served(&kernel.maps), &afresh(compiler.table()));
    refused
}

#[test]
fn whatever_happens_ends_as_if_it_had_begun_so() {
    (1..=CLUSTERS).for_each(|seed| assert_eq!(live(seed, Capacity::UNLIMITED), 0));
}

#[test]
fn where_there_is_no_room_every_write_is_safe_and_room_helps() {
    let refusing = (1..=CLUSTERS).filter(|seed| live(*seed, SMALL) > 0).count() as u64;
    assert!(refusing > CLUSTERS / 3, "only {refusing} clusters were too large");
}
