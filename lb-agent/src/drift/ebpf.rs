//! The maps in words: frontends with their backends' addresses, whatever ids and slots they have.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use anyhow::Result;
use lb_common::abi::{SlotRange, backend_flags, frontend_flags as flag, vip_kind};
use lb_core::{
    model::Family,
    table::{Changes, FrontendAddr, ServiceTable},
};

use super::{Drift, Listing, Object};
use crate::datapath::ebpf::{
    apply::EbpfDatapath,
    attach,
    maps::Pins,
    plan::{Actual, PlannedBackend, Planner},
    sizes::Capacity,
};

/// The pinned maps, and those that a plan would write.
pub struct EbpfDrift {
    pins: Pins,
    /// As after all plans so far, from empty maps.
    planned: Actual,
    planner: Planner,
}

impl EbpfDrift {
    /// Looks at the pinned maps, if there are any.
    pub fn open(pins: &Pins) -> Result<Self> {
        let planner = Planner::adopt(Capacity::UNLIMITED, Actual::default(), &ServiceTable::default());
        Ok(Self { pins: pins.clone(), planned: Actual::default(), planner })
    }
}

/// The pinned maps. They are opened anew each time: an agent may come, or take over with another layout.
fn kernel(pins: &Pins) -> Result<Option<EbpfDatapath>> {
    Ok(if pins.dir().is_dir() { Some(EbpfDatapath::open(pins)?) } else { None })
}

impl Drift for EbpfDrift {
    fn desired(&mut self, table: &ServiceTable, changes: &Changes) -> Result<Listing> {
        let (ops, _) = self.planner.plan(table, changes);
        ops.iter().for_each(|op| self.planned.write(op));
        Ok(list(&self.planned))
    }

    fn actual(&mut self) -> Result<Listing> {
        let Some(kernel) = kernel(&self.pins)? else { return Ok(Listing::new()) };
        let actual = kernel.actual()?;
        let mut listing = list(&actual);
        for addr in actual.vips.keys() {
            if !kernel.is_looked_at(*addr)? {
                let vip = listing.entry(format!("vip {addr}")).or_default();
                vip.lines.push("packets to it are not looked at".into());
            }
        }
        let detached = attach::links(&self.pins).into_iter().filter(|(_, attached)| !attached);
        listing.extend(detached.map(|(link, _)| (format!("detached link {link}"), Object::default())));
        Ok(listing)
    }
}

fn list(actual: &Actual) -> Listing {
    let mut listing = Listing::new();
    let mut of_services: BTreeMap<(Family, u32), Vec<&PlannedBackend>> = BTreeMap::new();
    for ((family, _), backend) in &actual.backends {
        if backend.flags & backend_flags::ALIVE != 0 {
            of_services.entry((*family, backend.service_id)).or_default().push(backend);
        }
    }
    let mut services: BTreeSet<(Family, u32)> = BTreeSet::new();
    for (addr, value) in &actual.frontends {
        let service = (Family::of(addr.addr), value.service_id);
        services.insert(service);
        let mut lines = words(value.flags, &FRONTEND_WORDS);
        for (scope, range) in [("outside", value.external), ("this node", value.internal)] {
            lines.extend(slots(actual, *addr, range).into_iter().map(|it| format!("from {scope}: {it}")));
        }
        lines.extend(of_services.get(&service).into_iter().flatten().map(|backend| said(backend)));
        if value.affinity_secs != 0 {
            lines.push(format!("affinity {} s", value.affinity_secs));
        }
        if value.flags & flag::SOURCE_RANGES != 0 {
            let allowed = actual.source_ranges.iter().filter(|(service, _)| *service == value.service_id);
            lines.extend(allowed.map(|(_, net)| format!("allows {net}")));
        }
        listing.insert(format!("frontend {addr}"), Object { lines, ordered: false });
    }
    for (service, backends) in of_services {
        if !services.contains(&service) {
            let orphans = backends.into_iter().map(|backend| format!("{} of no frontend", said(backend)));
            listing.extend(orphans.map(|name| (name, Object::default())));
        }
    }
    for (service, net) in &actual.source_ranges {
        if !services.contains(&(Family::of(net.addr()), *service)) {
            listing.insert(format!("source range {net} of no frontend"), Object::default());
        }
    }
    for (addr, kind) in &actual.vips {
        let line = match *kind {
            vip_kind::NODE_ADDRESS => "unknown ports pass: a node's address",
            _ => "unknown ports are refused",
        };
        listing.insert(format!("vip {addr}"), Object { lines: vec![line.into()], ordered: false });
    }
    listing
}

fn said(backend: &PlannedBackend) -> String {
    let words = words(backend.flags.into(), &BACKEND_WORDS);
    format!("backend {} ({})", SocketAddr::new(backend.addr, backend.port), words.join(", "))
}

fn slots(actual: &Actual, addr: FrontendAddr, range: SlotRange) -> Vec<String> {
    let family = Family::of(addr.addr);
    let slots = range.first..range.first.saturating_add(range.count);
    slots
        .map(|slot| {
            let id = actual.slots.get(&slot).copied().unwrap_or_default();
            match actual.backends.get(&(family, id)) {
                Some(backend) if backend.flags & backend_flags::ALIVE != 0 => {
                    format!("backend {}", SocketAddr::new(backend.addr, backend.port))
                }
                _ => "a slot without a live backend".to_owned(),
            }
        })
        .collect()
}

const BACKEND_WORDS: [(u32, &str); 4] = [
    (backend_flags::IN_CLUSTER_LIST as u32, "policy Cluster"),
    (backend_flags::IN_LOCAL_LIST as u32, "policy Local"),
    (backend_flags::LOCAL as u32, "on this node"),
    (backend_flags::NODE_ADDRESS as u32, "in the host's network"),
];

const FRONTEND_WORDS: [(u32, &str); 10] = [
    (flag::EXTERNAL_NONE_DROPS, "from outside: dropped without a backend"),
    (flag::INTERNAL_NONE_DROPS, "from this node: dropped without a backend"),
    (flag::EXTERNAL_MASQ_REMOTE, "from outside: masqueraded to other nodes"),
    (flag::EXTERNAL_MASQ_ALWAYS, "from outside: masqueraded"),
    (flag::INTERNAL_MASQ_ALWAYS, "from this node: masqueraded"),
    (flag::EXTERNAL_LOCAL_LIST, "from outside: policy Local"),
    (flag::INTERNAL_LOCAL_LIST, "from this node: policy Local"),
    (flag::SOURCE_RANGES, "source ranges"),
    (flag::SOURCE_RANGES_ALLOW_HOST, "source ranges allow this node"),
    (flag::HOST_ONLY, "for this node's own processes"),
];

fn words(bits: u32, names: &[(u32, &str)]) -> Vec<String> {
    names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| (*name).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use lb_core::{
        compile::{CompileConfig, Compiler, NodeView},
        model::Event,
        synthetic,
    };

    use super::*;
    use crate::{datapath::ebpf::plan::Op, drift::compare};

    fn planned(compiler: &Compiler, planner: &mut Planner, maps: &mut Actual) {
        let (ops, _) = planner.plan(compiler.table(), &Changes::all(compiler.table()));
        ops.iter().for_each(|op| maps.write(op));
    }

    fn compiler() -> Compiler {
        let view = NodeView { name: "node-1".into(), ..NodeView::default() };
        let mut compiler = Compiler::new(CompileConfig::default(), view);
        synthetic::cluster(3, 2).for_each(|event| compiler.apply(event));
        compiler.compile();
        compiler
    }

    #[test]
    fn ids_and_slots_are_no_difference() {
        let mut compiler = compiler();
        let empty = Planner::adopt(Capacity::UNLIMITED, Actual::default(), &ServiceTable::default());
        let (mut fresh, mut fresh_planner) = (Actual::default(), empty);
        planned(&compiler, &mut fresh_planner, &mut fresh);
        // The same table by a detour, which takes other ids and slots.
        let mut planner = Planner::adopt(Capacity::UNLIMITED, Actual::default(), &ServiceTable::default());
        let mut maps = Actual::default();
        for version in [3, 2, 1, 0] {
            compiler.apply(Event::EndpointSlice(synthetic::slice(0, 2, version)));
            compiler.compile();
            planned(&compiler, &mut planner, &mut maps);
        }
        assert_ne!(fresh.slots, maps.slots);
        assert_eq!(compare(&list(&fresh), &list(&maps)), []);
    }

    #[test]
    fn what_somebody_changed_is_named() {
        let compiler = compiler();
        let mut planner = Planner::adopt(Capacity::UNLIMITED, Actual::default(), &ServiceTable::default());
        let mut maps = Actual::default();
        planned(&compiler, &mut planner, &mut maps);
        let desired = list(&maps);
        let frontends: Vec<FrontendAddr> = maps.frontends.keys().copied().collect();
        maps.write(&Op::DeleteFrontend(frontends[0]));
        if let Some(value) = maps.frontends.get_mut(&frontends[1]) {
            value.internal.count -= 1;
            value.affinity_secs = 7;
        }
        maps.write(&Op::DeleteVip(frontends[2].addr));
        let said: String = compare(&desired, &list(&maps)).iter().map(|it| format!("{it}\n")).collect();
        expect_test::expect![[r#"
            missing: frontend 10.96.0.1:80/TCP
            extra in frontend 10.96.0.2:80/TCP: affinity 7 s
            missing in frontend 10.96.0.2:80/TCP: from this node: backend 11.0.0.3:8080
            missing: vip 10.96.0.3
            extra: backend 11.0.0.0:8080 (policy Cluster) of no frontend
            extra: backend 11.0.0.1:8080 (policy Cluster, on this node) of no frontend
        "#]]
        .assert_eq(&said);
    }
}
