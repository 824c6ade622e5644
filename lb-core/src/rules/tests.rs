//! Rules against what kube-proxy's own tests expect, and incremental rewriting against writing everything.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    incremental::{Rules, Transaction},
    iptables::Config,
    names,
};
use crate::{
    compile::{CompileConfig, Compiler, NodeView},
    model::{Event, Family, ObjectName, Protocol},
    synthetic,
    table::{Changes, ServicePortId, ServiceTable},
};

fn id(service: &str, port: &str) -> ServicePortId {
    let (namespace, name) = service.split_once('/').expect("namespace/name");
    let service = ObjectName::new(namespace, name);
    ServicePortId { service, port: port.into(), protocol: Protocol::Tcp, family: Family::V4 }
}

/// Names from kube-proxy 1.36 `pkg/proxy/iptables/proxier_test.go` (TestOverallIPTablesRules) and, the last, from a
/// cluster of kube-proxy 1.20.
#[test]
fn chains_are_named_as_kube_proxy_names_them() {
    for (service, port, hash) in [
        ("ns1/svc1", "p80", "XPGD46QRK7WJZT7O"),
        ("ns2/svc2", "p80", "GNZBNJ2PO5MGZ6GT"),
        ("ns3/svc3", "p80", "X27LE4BHSL4DOUIK"),
        ("ns4/svc4", "p80", "4SW47YFZTEDKD3PK"),
        ("ns5/svc5", "p80", "NUKIZ6OKUXPJNT4C"),
        ("default/nginx-service", "name-of-service-port", "IQGXNJVVP26VHMIN"),
    ] {
        assert_eq!(&*names::of_service("KUBE-SVC-", &id(service, port)), format!("KUBE-SVC-{hash}"));
    }
    let endpoint = names::of_endpoint(&id("ns1/svc1", "p80"), "10.180.0.1".parse().unwrap(), 80);
    assert_eq!(&*endpoint, "KUBE-SEP-SXIVWICOYRO3J4NJ");
}

/// netfilter, as far as chains and their rules go.
#[derive(Debug, Default, PartialEq)]
struct Loaded(BTreeMap<String, Vec<String>>);

impl Loaded {
    /// What `iptables-restore --noflush` does with this text.
    fn restore(&mut self, text: &str) {
        let mut table = "";
        for line in text.lines() {
            let mut words = line.splitn(3, ' ');
            let (verb, chain) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let key = |name: &str| format!("{table}/{name}");
            match verb {
                "COMMIT" => {}
                "-A" => {
                    let rules =
                        self.0.get_mut(&key(chain)).unwrap_or_else(|| panic!("{line}: no such chain"));
                    rules.push(words.next().unwrap_or_default().to_owned());
                }
                "-X" => {
                    let used = format!("-j {chain}");
                    let user =
                        self.0.iter().find(|(_, rules)| rules.iter().any(|rule| rule.ends_with(&used)));
                    assert_eq!(user, None, "{chain} is deleted while in use");
                    assert_eq!(self.0.remove(&key(chain)), Some(Vec::new()), "{line}: not an empty chain");
                }
                _ if verb.starts_with('*') => table = &line[1..],
                _ if verb.starts_with(':') => drop(self.0.insert(key(&verb[1..]), Vec::new())),
                _ => panic!("{line}"),
            }
        }
    }
}

fn fresh(table: &ServiceTable) -> Loaded {
    let mut loaded = Loaded::default();
    let all = Rules::new(Family::V4, Config::default()).update(table, &Changes::all(table));
    loaded.restore(&all.to_string());
    loaded
}

#[test]
fn rewriting_what_changed_ends_where_writing_everything_does() {
    let view = NodeView { addresses: vec!["192.0.2.1".parse().unwrap()], ..NodeView::default() };
    let mut compiler = Compiler::new(CompileConfig::default(), view);
    let (mut rules, mut loaded) = (Rules::new(Family::V4, Config::default()), Loaded::default());
    // A linear congruential generator (Numerical Recipes): the same events at every run.
    let mut seed = 1u32;
    let mut random = |below: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 16) % below
    };
    let mut known = Changes::default();
    for step in 0..120u32 {
        let i = random(12);
        let mut service = synthetic::service(i);
        match random(6) {
            0 => compiler.apply(Event::ServiceGone(service.name)),
            1 => compiler.apply(Event::EndpointSliceGone(synthetic::slice(i, 1, 0).name)),
            2 | 3 => {
                service.affinity_secs = (random(3) == 0).then_some(60);
                service.ports[0].node_port = if random(2) == 0 { 30_000 + random(3) as u16 } else { 0 };
                service.external_ips = (0..random(3)).map(|n| [198, 51, 100, n as u8].into()).collect();
                compiler.apply(Event::Service(service));
            }
            // Now and then across the bound from which endpoints have no comments.
            _ => compiler.apply(Event::EndpointSlice(synthetic::slice(
                i,
                1 + random(4) * random(200),
                step % 3,
            ))),
        }
        known.merge(compiler.compile());
        if random(3) > 0 {
            let transaction = rules.update(compiler.table(), &std::mem::take(&mut known));
            loaded.restore(&transaction.to_string());
            assert_eq!(loaded, fresh(compiler.table()), "step {step}");
            let names: BTreeSet<String> =
                rules.chains().iter().map(|(table, chain)| format!("{}/{chain}", table.name())).collect();
            assert_eq!(names, loaded.0.keys().cloned().collect());
        }
    }
}

#[test]
fn one_endpoint_more_rewrites_one_service() {
    let mut compiler = Compiler::new(CompileConfig::default(), NodeView::default());
    synthetic::cluster(50, 3).for_each(|event| compiler.apply(event));
    let changes = compiler.compile();
    let mut rules = Rules::new(Family::V4, Config::default());
    rules.update(compiler.table(), &changes);
    assert_eq!(rules.update(compiler.table(), &changes), Transaction::default(), "nothing is new");
    compiler.apply(Event::EndpointSlice(synthetic::slice(7, 4, 0)));
    let changes = compiler.compile();
    let transaction = rules.update(compiler.table(), &changes);
    // Slice 7 of 4 has other addresses than slice 7 of 3: four new endpoints of two rules, one chain of four.
    assert_eq!((transaction.upserts(), transaction.deletes()), (12, 3));
}
