use lb_core::{
    compile::{CompileConfig, Compiler, NodeView},
    model::Event,
    synthetic,
};

use super::*;

const CAPACITY: Capacity = Capacity { slots: 4096, backends4: 1024, backends6: 1024, frontends: 1024 };

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
    let mut compiler = compiler();
    let changes = compiler.compile();
    let mut kernel = Kernel::default();
    let (ops, _) =
        Planner::adopt(CAPACITY, Actual::default(), compiler.table()).plan(compiler.table(), &changes);
    ops.iter().for_each(|op| kernel.write(op));

    let mut again = Planner::adopt(CAPACITY, kernel.actual.clone(), compiler.table());
    let (ops, _) = again.plan(compiler.table(), &Changes::all(compiler.table()));
    assert_eq!(ops, []);
}

#[test]
fn what_vanished_while_no_agent_ran_is_removed() {
    let mut compiler = compiler();
    let changes = compiler.compile();
    let mut kernel = Kernel::default();
    let (ops, _) =
        Planner::adopt(CAPACITY, Actual::default(), compiler.table()).plan(compiler.table(), &changes);
    ops.iter().for_each(|op| kernel.write(op));
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

#[test]
fn a_full_map_refuses_the_newest_and_keeps_the_rest() {
    let mut compiler = compiler();
    let changes = compiler.compile();
    let mut kernel = Kernel::default();
    let small = Capacity { backends4: 4 * 4 + 1, ..CAPACITY };
    let mut planner = Planner::adopt(small, Actual::default(), compiler.table());
    let (ops, refused) = planner.plan(compiler.table(), &changes);
    ops.iter().for_each(|op| {
        kernel.write(op);
        kernel.check();
    });
    assert!(
        !refused.is_empty() && refused.iter().all(|refused| refused.reason.contains("17 backend places")),
        "{refused:?}"
    );
    assert_eq!(kernel.served().values().filter(|backends| backends.len() == 4).count(), 4);
}
