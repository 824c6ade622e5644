use lb_core::{
    compile::{CompileConfig, Compiler, NodeView},
    model::{Event, Service, ServiceType},
    synthetic,
};

use super::*;

const CAPACITY: Capacity = Capacity::LEAST;

/// The maps, as a kernel would hold them.
#[derive(Clone, Default)]
struct Kernel {
    actual: Actual,
}

impl Kernel {
    fn write(&mut self, op: &Op) {
        self.actual.write(op);
    }

    /// No frontend points to a slot without a live backend of its own service.
    fn check(&self) {
        for (addr, value) in &self.actual.frontends {
            for range in [value.external, value.internal] {
                for slot in range.first..range.first + range.count {
                    let id = self
                        .actual
                        .slots
                        .get(&slot)
                        .unwrap_or_else(|| panic!("{addr}: slot {slot} is empty"));
                    let backend = self.actual.backends.get(&(Family::of(addr.addr), *id));
                    let backend = backend.unwrap_or_else(|| panic!("{addr}: backend {id} doesn't exist"));
                    assert!(backend.flags & backend_flags::ALIVE != 0, "{addr}: backend {id} is dead");
                    assert_eq!(
                        backend.service_id, value.service_id,
                        "{addr}: backend {id} is another service's"
                    );
                }
            }
        }
    }

    /// The addresses behind each frontend.
    fn served(&self) -> BTreeMap<FrontendAddr, Vec<IpAddr>> {
        let behind = |value: &FrontendValue| {
            let slots = value.internal.first..value.internal.first + value.internal.count;
            slots.map(|slot| self.actual.backends[&(Family::V4, self.actual.slots[&slot])].addr).collect()
        };
        self.actual.frontends.iter().map(|(addr, value)| (*addr, behind(value))).collect()
    }
}

fn compiler() -> Compiler {
    let mut compiler =
        Compiler::new(CompileConfig::default(), NodeView { name: "node-1".into(), ..NodeView::default() });
    synthetic::cluster(6, 4).for_each(|event| compiler.apply(event));
    compiler
}

/// A cluster, and a kernel that has all of it.
fn programmed() -> (Compiler, Kernel) {
    let mut compiler = compiler();
    let changes = compiler.compile();
    let mut kernel = Kernel::default();
    let (ops, _) =
        Planner::adopt(CAPACITY, Actual::default(), compiler.table()).plan(compiler.table(), &changes);
    ops.iter().for_each(|op| kernel.write(op));
    (compiler, kernel)
}

fn expected(table: &ServiceTable) -> BTreeMap<FrontendAddr, Vec<IpAddr>> {
    let behind =
        |frontend: &Frontend| table.services[&frontend.service].cluster.iter().map(|b| b.addr).collect();
    table.frontends.iter().map(|(addr, frontend)| (*addr, behind(frontend))).collect()
}

#[test]
fn every_prefix_of_every_plan_is_safe_and_its_end_is_the_table() {
    let mut compiler = compiler();
    let mut kernel = Kernel::default();
    let mut planner = Planner::adopt(CAPACITY, Actual::default(), compiler.table());
    for round in 0..40u32 {
        match round % 5 {
            0 => (0..6).for_each(|i| compiler.apply(Event::EndpointSlice(synthetic::slice(i, 4, round)))),
            1 => compiler.apply(Event::ServiceGone(synthetic::service(round % 6).name)),
            2 => (0..6).for_each(|i| compiler.apply(Event::Service(synthetic::service(i)))),
            3 => compiler.apply(Event::EndpointSlice(synthetic::slice(round % 6, 1 + round % 7, 0))),
            _ => compiler.apply(Event::EndpointSliceGone(synthetic::slice(round % 6, 1, 0).name)),
        }
        let changes = compiler.compile();
        let (ops, refused) = planner.plan(compiler.table(), &changes);
        assert_eq!(refused, []);
        for op in &ops {
            kernel.write(op);
            kernel.check();
        }
        assert_eq!(kernel.served(), expected(compiler.table()), "round {round}");
    }
}

#[test]
fn adopting_an_unchanged_cluster_writes_nothing() {
    let (compiler, kernel) = programmed();

    let mut again = Planner::adopt(CAPACITY, kernel.actual.clone(), compiler.table());
    let (ops, _) = again.plan(compiler.table(), &Changes::all(compiler.table()));
    assert_eq!(ops, []);
}

#[test]
fn what_vanished_while_no_agent_ran_is_removed() {
    let (mut compiler, mut kernel) = programmed();
    compiler.apply(Event::ServiceGone(synthetic::service(2).name));
    compiler.compile();

    let mut planner = Planner::adopt(CAPACITY, kernel.actual.clone(), compiler.table());
    let mut changes = Changes::all(compiler.table());
    changes.merge(planner.leftovers(compiler.table()));
    planner.plan(compiler.table(), &changes).0.iter().for_each(|op| {
        kernel.write(op);
        kernel.check();
    });
    assert_eq!(kernel.served(), expected(compiler.table()));
    assert_eq!(kernel.actual.vips.len(), 5);
    let alive = kernel.actual.backends.values().filter(|backend| backend.flags != 0).count();
    assert_eq!(alive, 5 * 4);
}

/// A cluster of `services` with four endpoints each, planned into maps of this size.
fn planned(services: u32, capacity: Capacity) -> (Compiler, Planner, Kernel, Vec<Refusal>) {
    let mut compiler = Compiler::new(CompileConfig::default(), NodeView::default());
    // Names and creation say the contrary of each other: service-0 is the newest.
    for i in 0..services {
        let created_unix_secs = i64::from(services - i);
        compiler.apply(Event::Service(Service { created_unix_secs, ..synthetic::service(i) }));
        compiler.apply(Event::EndpointSlice(synthetic::slice(i, 4, 0)));
    }
    let changes = compiler.compile();
    let mut planner = Planner::adopt(capacity, Actual::default(), compiler.table());
    let mut kernel = Kernel::default();
    let refused = carry_out(planner.plan(compiler.table(), &changes), &mut kernel, capacity);
    (compiler, planner, kernel, refused)
}

/// Every write on its own leaves the maps safe, and no map is over-full for a moment.
fn carry_out((ops, refused): (Vec<Op>, Vec<Refusal>), kernel: &mut Kernel, room: Capacity) -> Vec<Refusal> {
    for op in &ops {
        kernel.write(op);
        kernel.check();
        let actual = &kernel.actual;
        assert!(actual.frontends.len() <= room.frontends[0] as usize, "{op:?}: too many frontends");
        assert!(actual.vips.len() <= room.frontends[0] as usize, "{op:?}: too many VIPs");
        assert!(actual.source_ranges.len() <= room.source_ranges[0] as usize, "{op:?}: too many ranges");
        assert!(actual.backends.keys().all(|(_, id)| *id < room.backends[0]), "{op:?}: too many backends");
        assert!(actual.slots.keys().all(|slot| *slot < room.slots), "{op:?}: too many slots");
    }
    refused
}

fn names(refused: &[Refusal]) -> Vec<&str> {
    refused.iter().map(|refusal| &*refusal.service.service.name).collect()
}

#[test]
fn a_full_map_refuses_the_newest_and_keeps_the_rest() {
    for (small, full) in [
        (Capacity { backends: [4 * 4 + 2, 1], ..CAPACITY }, Full::Backends(Family::V4)),
        (Capacity { slots: 4 * 4 + 3, ..CAPACITY }, Full::Slots(4)),
        (Capacity { frontends: [4, 0], ..CAPACITY }, Full::Frontends(Family::V4)),
    ] {
        let (_, _, kernel, refused) = planned(6, small);
        assert_eq!(names(&refused), [&*synthetic::service(0).name.name, &*synthetic::service(1).name.name]);
        assert!(refused.iter().all(|refusal| refusal.full == full), "{refused:?}");
        assert_eq!(kernel.served().values().filter(|backends| backends.len() == 4).count(), 4, "{full}");
    }
}

#[test]
fn who_was_refused_is_served_as_soon_as_there_is_room() {
    let small = Capacity { backends: [4 * 4 + 1, 1], ..CAPACITY };
    let (mut compiler, mut planner, mut kernel, _) = planned(6, small);
    compiler.apply(Event::ServiceGone(synthetic::service(5).name));
    let changes = compiler.compile();
    let refused = carry_out(planner.plan(compiler.table(), &changes), &mut kernel, small);
    assert_eq!((refused.len(), planner.has_new_room()), (2, true));
    let refused = carry_out(planner.plan(compiler.table(), &Changes::default()), &mut kernel, small);
    assert_eq!((names(&refused), planner.has_new_room()), (vec![&*synthetic::service(0).name.name], false));

    let larger = Capacity { backends: [64, 1], ..small };
    planner.extend(larger);
    assert_eq!(carry_out(planner.plan(compiler.table(), &Changes::default()), &mut kernel, larger), []);
    assert_eq!(kernel.served(), expected(compiler.table()));
}

#[test]
fn a_service_that_is_served_takes_as_many_new_backends_as_there_is_room_for() {
    let small = Capacity { backends: [4 * 4 + 1, 1], ..CAPACITY };
    let (mut compiler, mut planner, mut kernel, _) = planned(4, small);
    // One of its four backends has another address now, whose place is free only when the old one is gone.
    compiler.apply(Event::EndpointSlice(synthetic::slice(2, 4, 1)));
    let changes = compiler.compile();
    let refused = carry_out(planner.plan(compiler.table(), &changes), &mut kernel, small);
    assert_eq!(names(&refused), [&*synthetic::service(2).name.name]);
    let served = kernel.served();
    assert_eq!(served.values().map(Vec::len).sum::<usize>(), 4 + 4 + 3 + 4);
    assert!(planner.has_new_room());
    assert_eq!(carry_out(planner.plan(compiler.table(), &Changes::default()), &mut kernel, small), []);
    assert_eq!(kernel.served(), expected(compiler.table()));
}

#[test]
fn no_map_is_over_full_while_others_take_the_place_of_what_goes() {
    let small = Capacity { frontends: [4, 0], ..CAPACITY };
    let (mut compiler, mut planner, mut kernel, refused) = planned(4, small);
    assert_eq!(refused, []);
    for i in 0..4 {
        compiler.apply(Event::ServiceGone(synthetic::service(i).name));
        compiler.apply(Event::Service(synthetic::service(10 + i)));
        compiler.apply(Event::EndpointSlice(synthetic::slice(10 + i, 4, 0)));
    }
    let changes = compiler.compile();
    assert_eq!(carry_out(planner.plan(compiler.table(), &changes), &mut kernel, small).len(), 4);
    assert_eq!(carry_out(planner.plan(compiler.table(), &Changes::default()), &mut kernel, small), []);
    assert_eq!(kernel.served(), expected(compiler.table()));
}

#[test]
fn a_frontend_whose_new_service_has_no_room_is_not_left_behind() {
    let small = Capacity { backends: [4 * 4 + 1, 1], ..CAPACITY };
    let (mut compiler, mut planner, mut kernel, _) = planned(4, small);
    // Another Service claims the address of one that goes.
    let heir = Service { cluster_ips: synthetic::service(2).cluster_ips, ..synthetic::service(9) };
    compiler.apply(Event::ServiceGone(synthetic::service(2).name));
    compiler.apply(Event::Service(heir));
    compiler.apply(Event::EndpointSlice(synthetic::slice(9, 4, 0)));
    let changes = compiler.compile();
    assert_eq!(carry_out(planner.plan(compiler.table(), &changes), &mut kernel, small).len(), 1);
    assert_eq!(kernel.served().len(), 3);
    assert_eq!(carry_out(planner.plan(compiler.table(), &Changes::default()), &mut kernel, small), []);
    assert_eq!(kernel.served(), expected(compiler.table()));
}

#[test]
fn source_ranges_have_room_for_all_of_a_service_or_none() {
    let small = Capacity { source_ranges: [3, 0], ..CAPACITY };
    let mut compiler = Compiler::new(CompileConfig::default(), NodeView::default());
    for i in 0..2 {
        let nets = [0, 1].map(|n| format!("203.0.{i}.{n}/32").parse().unwrap());
        compiler.apply(Event::Service(Service {
            service_type: ServiceType::LoadBalancer,
            load_balancer_ips: vec![format!("198.51.100.{i}").parse().unwrap()],
            source_ranges: nets.to_vec(),
            ..synthetic::service(i)
        }));
        compiler.apply(Event::EndpointSlice(synthetic::slice(i, 4, 0)));
    }
    let changes = compiler.compile();
    let mut planner = Planner::adopt(small, Actual::default(), compiler.table());
    let mut kernel = Kernel::default();
    let refused = carry_out(planner.plan(compiler.table(), &changes), &mut kernel, small);
    assert_eq!(names(&refused), [&*synthetic::service(1).name.name]);
    assert_eq!(refused[0].full, Full::SourceRanges(Family::V4));
    // Both ClusterIPs and one load balancer's address: the other would let everybody in.
    assert_eq!((kernel.actual.frontends.len(), kernel.actual.source_ranges.len()), (3, 2));
}
