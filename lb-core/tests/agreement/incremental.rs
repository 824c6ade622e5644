//! A compiler that follows a cluster has the table of one that sees it for the first time, whatever happened before.

use std::collections::BTreeMap;

use lb_core::{
    compile::{Compiled, Compiler, WarningChanges, compile},
    flow::Dialect,
    model::Warning,
    table::{Changes, ServiceTable},
};

use super::{
    history::Step,
    random::{Random, Scene},
};

/// Histories, and what happens in each.
const HISTORIES: u64 = 200;
const STEPS: usize = 80;

#[test]
fn a_table_kept_up_to_date_is_the_one_made_anew() {
    let (mut tables, mut warnings, mut collisions) = (0, 0, 0);
    for seed in 1..=HISTORIES {
        let mut random = Random::new(seed);
        let mut scene = Scene::empty(&mut random);
        let dialect = *random.pick(&[Dialect::Ebpf, Dialect::Nftables]);
        let config = scene.compile_config(dialect);
        let mut compiler = Compiler::new(config.clone(), scene.node.clone());
        let mut before = ServiceTable::default();
        let mut told = BTreeMap::new();
        let mut since = Vec::new();
        for number in 1..=STEPS {
            let step = scene.happen(&mut random);
            since.push(step.clone());
            match step {
                Step::Event(event) => compiler.apply(event),
                Step::Addresses(addresses) => compiler.set_addresses(addresses),
            }
            if number < STEPS && !random.once_in(4) {
                continue;
            }
            let changes = compiler.compile();
            let anew = compile(&scene.cluster, &scene.node, &config);
            let kept = Compiled {
                table: compiler.table().clone(),
                warnings: compiler.warnings().cloned().collect(),
            };
            let at = || format!("history {seed}, step {number}, since the last compile: {since:#?}");
            assert_eq!(kept.table, anew.table, "{}\nkept:\n{}\nanew:\n{}", at(), kept.table, anew.table);
            assert_eq!(kept.warnings, anew.warnings, "{}", at());
            tell(&mut told, compiler.news());
            assert_eq!(told, counted(&kept.warnings), "{}", at());
            let missing = unmentioned(&before, &kept.table, &changes);
            assert!(missing.is_empty(), "{}: no change of {missing:?}", at());
            tables += usize::from(kept.table != before);
            warnings += kept.warnings.len();
            collisions += kept.warnings.iter().filter(|warning| warning.problem.contains("older")).count();
            before = kept.table;
            since.clear();
        }
    }
    let seen = [tables, warnings, collisions];
    assert!(seen.iter().all(|n| *n > 1000), "the histories show too little: {seen:?}");
}

/// Carries what came and went into what somebody was told, each as often as it holds.
fn tell(told: &mut BTreeMap<Warning, isize>, news: &WarningChanges) {
    for (warnings, by) in [(&news.new, 1), (&news.gone, -1)] {
        warnings.iter().for_each(|warning| *told.entry(warning.clone()).or_default() += by);
    }
    told.retain(|_, count| *count != 0);
}

fn counted(warnings: &[Warning]) -> BTreeMap<Warning, isize> {
    let mut counts = BTreeMap::new();
    warnings.iter().for_each(|warning| *counts.entry(warning.clone()).or_default() += 1);
    counts
}

/// Keys that differ and that no change names: a datapath would never look at them.
fn unmentioned(before: &ServiceTable, after: &ServiceTable, changes: &Changes) -> Vec<String> {
    let mut missing = Vec::new();
    let services = before.services.keys().chain(after.services.keys());
    missing.extend(
        services
            .filter(|id| {
                before.services.get(*id) != after.services.get(*id) && !changes.services.contains(*id)
            })
            .map(|id| format!("service {id} {} {}", id.protocol, id.family)),
    );
    let frontends = before.frontends.keys().chain(after.frontends.keys());
    missing.extend(
        frontends
            .filter(|addr| before.frontends.get(*addr) != after.frontends.get(*addr))
            .filter(|addr| !changes.frontends.contains(*addr))
            .map(|addr| format!("frontend {addr}")),
    );
    let vips = before.vips.keys().chain(after.vips.keys());
    missing.extend(
        vips.filter(|addr| before.vips.get(*addr) != after.vips.get(*addr) && !changes.vips.contains(*addr))
            .map(|addr| format!("vip {addr}")),
    );
    let ranges = before.service_cidrs != after.service_cidrs && !changes.service_cidrs;
    missing.extend(ranges.then(|| "service CIDRs".to_owned()));
    let checks = before.health_checks.keys().chain(after.health_checks.keys());
    missing.extend(
        checks
            .filter(|name| before.health_checks.get(*name) != after.health_checks.get(*name))
            .filter(|name| !changes.health_checks.contains(*name))
            .map(|name| format!("health check {name}")),
    );
    missing
}
