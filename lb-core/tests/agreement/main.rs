//! The reference against what is compiled and rendered: random clusters, random flows, one answer.
//!
//! Whoever is wrong is corrected, by kube-proxy's sources and README's list of deliberate differences.
//!
//! `incremental` asks whether a table that follows a cluster is the one made anew.

mod history;
mod incremental;
mod random;

use std::net::SocketAddr;

use lb_core::{
    compile::compile,
    evaluate::evaluate,
    flow::{Answer, Dialect, Flow},
    model::{Family, Protocol},
    oracle::Oracle,
    reconcile::{UdpFlow, is_stale},
    rules::{nftables, trace},
    table::ServiceTable,
};
use random::{Random, Scene};

/// Clusters of each run, and flows in each.
const CLUSTERS: u64 = 1000;
const FLOWS: usize = 120;

/// How often each answer came: a generator that never gets anything refused tests nothing.
#[derive(Debug, Default)]
struct Seen {
    served: u32,
    masqueraded: u32,
    rejected: u32,
    dropped: u32,
    passed: u32,
}

impl Seen {
    fn count(&mut self, answer: &Answer) {
        use lb_core::flow::Source;
        match answer {
            Answer::Serve(backends) => {
                self.served += 1;
                self.masqueraded += u32::from(backends.values().any(|source| *source == Source::Masqueraded));
            }
            Answer::Reject => self.rejected += 1,
            Answer::Drop => self.dropped += 1,
            Answer::Pass => self.passed += 1,
        }
    }

    fn is_varied(&self) -> bool {
        [self.served, self.masqueraded, self.rejected, self.dropped, self.passed].iter().all(|n| *n > 1000)
    }
}

/// Asks `datapath` for a scene's answers and compares each with the reference's.
fn compare<D>(dialect: Dialect, make: impl Fn(&Scene, ServiceTable) -> D, ask: impl Fn(&D, &Flow) -> Answer) {
    let mut seen = Seen::default();
    for seed in 1..=CLUSTERS {
        let mut random = Random::new(seed);
        let scene = Scene::random(&mut random);
        let table = compile(&scene.cluster, &scene.node, &scene.compile_config(dialect)).table;
        let datapath = make(&scene, table.clone());
        let oracle = Oracle { cluster: &scene.cluster, node: &scene.node, policy: &scene.policy, dialect };
        for _ in 0..FLOWS {
            let flow = scene.flow(&mut random);
            let wanted = oracle.answer(&flow);
            let got = ask(&datapath, &flow);
            assert_eq!(
                wanted, got,
                "{dialect}, cluster {seed}: {flow}\n  reference: {wanted}\n  datapath:  {got}\n{:#?}\n{table}",
                scene.policy
            );
            seen.count(&wanted);
        }
    }
    assert!(seen.is_varied(), "{dialect}: the flows show too little: {seen:?}");
}

#[test]
fn tables_say_what_the_reference_says() {
    compare(Dialect::Ebpf, |_, table| table, evaluate);
}

#[test]
fn iptables_rules_do_what_the_reference_says() {
    compare(
        Dialect::Iptables,
        |scene, table| trace::Iptables::new(&table, &scene.node, &scene.rules_config()),
        |rules, flow| rules.trace(flow).unwrap_or_else(|error| panic!("{error}")),
    );
}

#[test]
fn nftables_rules_do_what_the_reference_says() {
    compare(
        Dialect::Nftables,
        |scene, table| {
            let config = scene.rules_config();
            let text = [Family::V4, Family::V6]
                .map(|family| nftables::Rules::all(&table, family, &config).to_string())
                .concat();
            trace::Nftables::read(&text, &scene.node).unwrap_or_else(|error| panic!("{error}"))
        },
        |rules, flow| rules.trace(flow).unwrap_or_else(|error| panic!("{error}")),
    );
}

#[test]
fn ipvs_with_its_rules_does_what_the_reference_says() {
    compare(
        Dialect::Ipvs,
        |scene, table| trace::Ipvs::new(&table, &scene.node, &scene.rules_config()),
        |servers, flow| servers.trace(flow).unwrap_or_else(|error| panic!("{error}")),
    );
}

#[test]
fn udp_flows_are_forgotten_that_the_reference_gives_to_others() {
    let (mut kept, mut forgotten, mut not_ours) = (0, 0, 0);
    for seed in 1..=CLUSTERS {
        let mut random = Random::new(seed);
        let scene = Scene::random(&mut random);
        // The table's own dialect: which loopback addresses answer NodePorts differs by mode.
        let dialect = Dialect::Ebpf;
        let table = compile(&scene.cluster, &scene.node, &scene.compile_config(dialect)).table;
        let oracle = Oracle { cluster: &scene.cluster, node: &scene.node, policy: &scene.policy, dialect };
        for _ in 0..FLOWS {
            let flow = Flow { protocol: Protocol::Udp, ..scene.flow(&mut random) };
            let dialled = SocketAddr::new(flow.dst, flow.port);
            let answers = scene.udp_answerer(dialled, &mut random);
            let may_answer = oracle.may_answer(&flow);
            let wanted = may_answer.as_ref().is_some_and(|list| !list.is_empty() && !list.contains(&answers));
            let got = is_stale(&table, &UdpFlow { dialled, answers });
            assert_eq!(wanted, got, "cluster {seed}: {dialled} by {answers}: {may_answer:?}\n{table}");
            match may_answer {
                None => not_ours += 1,
                Some(_) if wanted => forgotten += 1,
                Some(_) => kept += 1,
            }
        }
    }
    let seen = [kept, forgotten, not_ours];
    assert!(seen.iter().all(|n| *n > 1000), "the flows show too little: {seen:?}");
}
