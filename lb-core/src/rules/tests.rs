//! Rules against what kube-proxy's own tests expect, and incremental rewriting against writing everything.

#[path = "../../tests/agreement/history.rs"]
mod history;
#[path = "../../tests/agreement/random.rs"]
#[expect(dead_code, reason = "flows are the agreement's")]
mod random;

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{
    incremental::{Rules, Transaction},
    iptables::{Config, Table},
    names, nftables,
};
use crate::{
    compile::{CompileConfig, Compiler, NodeView},
    flow::Dialect,
    model::{Event, Family, LocalDetector, NodePortAddress, ObjectName, Protocol, ServiceCidr},
    synthetic,
    table::{Changes, ServicePortId, ServiceTable},
};
use history::Step;

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

/// The kernel takes 256 bytes with the zero that ends them (`NFT_NAME_MAXLEN`).
#[test]
fn names_that_are_too_long_for_nftables_are_cut() {
    let [namespace, name, port] = ["n", "s", "p"].map(|letter| letter.repeat(63));
    let long = id(&format!("{namespace}/{name}"), &port);
    let addr = "2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff".parse().unwrap();
    let (one, other) = (names::nft_endpoint(&long, addr, 65_534), names::nft_endpoint(&long, addr, 65_535));
    assert_eq!((one.len(), one.ends_with("...")), (240, true), "{one}");
    assert_ne!(one, other, "the hash is of all of it");
    let whole = names::nft_service(&long);
    assert!(whole.len() <= 240 && whole.ends_with(&port), "{whole}");
}

/// netfilter, as far as chains and their rules go.
#[derive(Clone, Debug, Default, PartialEq)]
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

impl Loaded {
    /// A chain with what it leads to, as far as that is service ports'.
    fn way(&self, chain: &str) -> Vec<(String, Option<&Vec<String>>)> {
        let rules = self.0.get(&format!("nat/{chain}"));
        let targets = rules.into_iter().flatten().filter_map(|rule| rule.split("-j ").nth(1));
        let next = targets.filter(|to| names::OF_SERVICES.iter().any(|prefix| to.starts_with(prefix)));
        let mut way = vec![(chain.to_owned(), rules)];
        next.for_each(|to| way.extend(self.way(to)));
        way
    }

    /// No rule leads nowhere.
    fn check_targets(&self) {
        for (chain, rules) in &self.0 {
            let table = chain.split('/').next().unwrap_or_default();
            let targets = rules.iter().filter_map(|rule| rule.split("-j KUBE-").nth(1));
            targets.for_each(|to| {
                assert!(self.0.contains_key(&format!("{table}/KUBE-{to}")), "{chain} to {to}");
            });
        }
    }
}

fn fresh(table: &ServiceTable) -> Loaded {
    let mut loaded = Loaded::default();
    let all = Rules::new(Family::V4, Config::default()).update(table, &Changes::all(table));
    loaded.restore(&all.to_string());
    loaded
}

/// Calls `check` with a table, and what changed since the last call, after each of many random changes.
pub(super) fn random_changes(mut check: impl FnMut(u32, &ServiceTable, &Changes)) {
    let view = NodeView { addresses: vec!["192.0.2.1".parse().unwrap()], ..NodeView::default() };
    let mut compiler = Compiler::new(CompileConfig::default(), view);
    // A linear congruential generator (Numerical Recipes): the same events at every run.
    let mut seed = 1u32;
    let mut random = |below: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 16) % below
    };
    let mut known = Changes::default();
    for step in 0..120u32 {
        match step % 14 {
            0 => compiler.apply(service_cidr(step % 4)),
            7 => compiler.apply(Event::ServiceCidrGone((step % 2).to_string().into())),
            _ => {}
        }
        let i = random(12);
        let mut service = synthetic::service(i);
        match random(6) {
            0 => compiler.apply(Event::ServiceGone(service.name)),
            1 => compiler.apply(Event::EndpointSliceGone(synthetic::slice(i, 1, 0).name)),
            2 | 3 => {
                service.affinity_secs = (random(3) == 0).then_some(60 + random(2));
                service.ports[0].node_port = if random(2) == 0 { 30_000 + random(3) as u16 } else { 0 };
                service.external_ips = (0..random(3)).map(|n| [198, 51, 100, n as u8].into()).collect();
                service.load_balancer_ips = (0..random(2)).map(|_| [198, 51, 100, 9].into()).collect();
                service.source_ranges = (0..random(3)).map(|n| ranges()[n as usize]).collect();
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
            check(step, compiler.table(), &std::mem::take(&mut known));
        }
    }
}

/// The same for clusters to which anything happens, each with a state of its own; `check` says where it is and how often
/// it was called.
pub(super) fn histories<S>(
    begin: impl Fn() -> S,
    mut check: impl FnMut(&mut S, (&str, usize), &ServiceTable, &Changes),
) {
    for seed in 1..=40 {
        let mut random = random::Random::new(seed);
        let mut scene = random::Scene::empty(&mut random);
        let mut compiler = Compiler::new(scene.compile_config(Dialect::Nftables), scene.node.clone());
        let (mut state, mut known, mut calls) = (begin(), Changes::default(), 0);
        for step in 0..60 {
            match scene.happen(&mut random) {
                Step::Event(event) => compiler.apply(event),
                Step::Addresses(addresses) => compiler.set_addresses(addresses),
            }
            known.merge(compiler.compile());
            if random.once_in(3) {
                let at = format!("history {seed}, step {step}");
                check(&mut state, (&at, calls), compiler.table(), &std::mem::take(&mut known));
                calls += 1;
            }
        }
    }
}

/// Two names, two ranges of which one contains the other.
fn service_cidr(i: u32) -> Event {
    let cidrs = vec![format!("10.96.0.0/{}", 12 + i).parse().unwrap(), "fd00:10:96::/112".parse().unwrap()];
    Event::ServiceCidr(ServiceCidr { name: (i % 2).to_string().into(), cidrs })
}

/// Two that overlap.
fn ranges() -> [IpNet; 2] {
    ["203.0.113.0/24", "203.0.113.64/26"].map(|range| range.parse().unwrap())
}

#[test]
fn rewriting_what_changed_ends_where_writing_everything_does() {
    let (mut rules, mut loaded) = (Rules::new(Family::V4, Config::default()), Loaded::default());
    random_changes(|step, table, changes| {
        loaded.restore(&rules.update(table, changes).to_string());
        assert_eq!(loaded, fresh(table), "step {step}");
        let names: BTreeSet<String> =
            rules.chains().iter().map(|(table, chain)| format!("{}/{chain}", table.name())).collect();
        assert_eq!(names, loaded.0.keys().cloned().collect());
        for table in Table::ALL {
            let of_table = format!("{}/", table.name());
            let chains = loaded.0.iter().filter(|(name, _)| name.starts_with(&of_table));
            assert_eq!(rules.count(table), chains.map(|(_, rules)| rules.len()).sum(), "{of_table}");
        }
    });
}

#[test]
fn endpoints_come_and_go_without_a_look_at_other_services() {
    let mut compiler = Compiler::new(CompileConfig::default(), NodeView::default());
    synthetic::cluster(20, 2).for_each(|event| compiler.apply(event));
    let changes = compiler.compile();
    // Which it looks for among all frontends.
    let addresses = vec![NodePortAddress::Range("0.0.0.0/1".parse().unwrap())];
    let config = Config { node_port_addresses: addresses, ..Config::default() };
    let mut rules = Rules::new(Family::V4, config);
    rules.update(compiler.table(), &changes);
    // As if they were others: whoever put all lines together again would find that they differ.
    rules.forget_shared();
    compiler.apply(Event::EndpointSlice(synthetic::slice(7, 3, 0)));
    let changes = compiler.compile();
    let text = rules.update(compiler.table(), &changes).to_string();
    assert!(text.contains(":KUBE-SVC-") && !text.contains("KUBE-SERVICES"), "{text}");
    compiler.apply(Event::ServiceGone(synthetic::service(7).name));
    let changes = compiler.compile();
    let text = rules.update(compiler.table(), &changes).to_string();
    assert!(text.contains(":KUBE-SERVICES - "), "{text}");
}

#[test]
fn whatever_happens_rewriting_what_changed_ends_where_writing_everything_does() {
    for family in [Family::V4, Family::V6] {
        let begin = || (Rules::new(family, Config::default()), Loaded::default());
        histories(begin, |(rules, loaded), (at, _), table, changes| {
            loaded.restore(&rules.update(table, changes).to_string());
            let mut fresh = Loaded::default();
            let all = Rules::new(family, Config::default()).update(table, &Changes::all(table));
            fresh.restore(&all.to_string());
            assert_eq!(*loaded, fresh, "{family}, {at}");
        });
    }
}

#[test]
fn rules_that_are_loaded_in_pieces_are_whole_at_every_moment() {
    let (mut rules, mut loaded) = (Rules::new(Family::V4, Config::default()), Loaded::default());
    let mut missing = vec![(Table::Mangle, names::OWNER.into()), (Table::Nat, names::MARK_MASQ.into())];
    let mut most = 0;
    random_changes(|step, table, changes| {
        let (before, after) = (loaded.clone(), fresh(table));
        let pieces = rules.update(table, changes).pieces(3, &std::mem::take(&mut missing));
        most = most.max(pieces.len());
        for (index, piece) in pieces.iter().enumerate() {
            loaded.restore(&piece.to_string());
            loaded.check_targets();
            if index + 1 == pieces.len() {
                assert_eq!(loaded, after, "step {step}");
                break;
            }
            for (key, rules) in &before.0 {
                let chain = key.split('/').nth(1).unwrap_or_default();
                if names::SHARED.contains(&chain) {
                    assert_eq!(loaded.0.get(key), Some(rules), "{key} before the last piece, step {step}");
                } else if after.0.contains_key(key) {
                    let way = loaded.way(chain);
                    assert!(way == before.way(chain) || way == after.way(chain), "{chain}, step {step}");
                }
            }
        }
    });
    assert!(most > 3, "{most} pieces at most");
}

/// A table of nftables.
#[derive(Debug, Default, PartialEq)]
struct NftLoaded {
    chains: BTreeMap<String, Vec<String>>,
    /// Sets and maps with their elements, by key without its comment.
    sets: BTreeMap<String, BTreeMap<String, String>>,
}

impl NftLoaded {
    /// What `nft -f` does with this text, as strictly as the kernel does.
    fn load(&mut self, text: &str) {
        for line in text.lines() {
            let words: Vec<&str> = line.splitn(6, ' ').collect();
            let (name, rest) =
                (words.get(4).copied().unwrap_or_default(), words.get(5).copied().unwrap_or_default());
            match (words[0], words[1]) {
                ("add" | "delete", "table") => *self = Self::default(),
                ("add", "chain") => drop(self.chains.entry(name.into()).or_default()),
                ("add", "set" | "map") => drop(self.sets.entry(name.into()).or_default()),
                ("flush", "chain") => self.chains.get_mut(name).unwrap_or_else(|| panic!("{line}")).clear(),
                ("add", "rule") => {
                    self.chains.get_mut(name).unwrap_or_else(|| panic!("{line}")).push(rest.into());
                }
                ("delete", "chain") => {
                    assert!(!self.uses(&format!("goto {name}")), "{line}: in use");
                    assert_eq!(self.chains.remove(name), Some(Vec::new()), "{line}");
                }
                ("delete", "set") => {
                    assert!(!self.uses(&format!("@{name}")), "{line}: in use");
                    assert!(self.sets.remove(name).is_some(), "{line}");
                }
                (verb, "element") => {
                    let inside = rest.trim_start_matches("{ ").trim_end_matches(" }");
                    let (key, verdict) = inside.split_once(" : ").unwrap_or((inside, ""));
                    let key = key.split(" comment ").next().unwrap().to_owned();
                    let set = self.sets.get_mut(name).unwrap_or_else(|| panic!("{line}"));
                    match verb {
                        "add" => assert_eq!(set.insert(key, verdict.into()), None, "{line}: there already"),
                        _ => assert!(set.remove(&key).is_some(), "{line}: not there"),
                    }
                }
                _ => panic!("{line}"),
            }
        }
        let lines = self.chains.values().flatten().chain(self.sets.values().flat_map(BTreeMap::values));
        for target in lines.flat_map(|line| line.split("goto ").skip(1)) {
            let target = target.split(' ').next().unwrap();
            assert!(self.chains.contains_key(target), "nothing at {target}");
        }
    }

    fn uses(&self, what: &str) -> bool {
        let lines = self.chains.values().flatten().chain(self.sets.values().flat_map(BTreeMap::values));
        lines.into_iter().any(|line| {
            line.split(" , ").any(|part| part.contains(&format!("{what} ")) || part.ends_with(what))
        })
    }
}

#[test]
fn nftables_too_end_where_writing_everything_does() {
    let config =
        Config { pods: LocalDetector::Ranges(vec!["10.0.0.0/8".parse().unwrap()]), ..Config::default() };
    let mut rules = nftables::Rules::new(Family::V4, config.clone());
    let mut loaded = NftLoaded::default();
    random_changes(|step, table, changes| {
        loaded.load(&rules.update(table, changes).to_string());
        if step % 2 == 0 {
            loaded.load(&rules.sweep().to_string());
            let mut fresh = NftLoaded::default();
            fresh.load(&nftables::Rules::all(table, Family::V4, &config).to_string());
            assert_eq!(loaded, fresh, "step {step}");
        }
    });
}

#[test]
fn whatever_happens_nftables_too_end_where_writing_everything_does() {
    for family in [Family::V4, Family::V6] {
        let begin = || (nftables::Rules::new(family, Config::default()), NftLoaded::default());
        histories(begin, |(rules, loaded), (at, number), table, changes| {
            loaded.load(&rules.update(table, changes).to_string());
            if number % 2 == 0 {
                loaded.load(&rules.sweep().to_string());
                let mut fresh = NftLoaded::default();
                fresh.load(&nftables::Rules::all(table, family, &Config::default()).to_string());
                assert_eq!(*loaded, fresh, "{family}, {at}");
            }
        });
    }
}

#[test]
fn one_endpoint_more_costs_nftables_the_same_at_any_scale() {
    let writes = |services| {
        let mut compiler = Compiler::new(CompileConfig::default(), NodeView::default());
        synthetic::cluster(services, 3).for_each(|event| compiler.apply(event));
        let mut rules = nftables::Rules::new(Family::V4, Config::default());
        let changes = compiler.compile();
        rules.update(compiler.table(), &changes);
        compiler.apply(Event::EndpointSlice(synthetic::slice(7, 3, 1)));
        let changes = compiler.compile();
        rules.update(compiler.table(), &changes).upserts()
    };
    // The service's choice, and two rules of the new endpoint.
    assert_eq!((writes(20), writes(2_000)), (3, 3));
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

/// Rules with counters in them from kube-proxy 1.36 `pkg/proxy/iptables/proxier_test.go` (TestOverallIPTablesRules).
#[test]
fn packets_are_counted_as_kube_proxy_counts_them() {
    let view = NodeView { addresses: vec!["192.0.2.1".parse().unwrap()], ..NodeView::default() };
    let mut compiler = Compiler::new(CompileConfig::default(), view);
    let mut service = synthetic::service(0);
    service.ports[0].node_port = 30_001;
    let port = names::of_service("KUBE-EXT-", &id(&service.name.to_string(), &service.ports[0].name));
    let comment = format!("{}:{}", service.name, service.ports[0].name);
    compiler.apply(Event::Service(service));
    compiler.apply(Event::EndpointSlice(synthetic::slice(0, 2, 0)));
    compiler.compile();
    let text = |family, config: &Config| Rules::all(compiler.table(), family, config).to_string();
    let counting = Config { accounting: true, ..Config::default() };
    let (plain, counted) = (text(Family::V4, &Config::default()), text(Family::V4, &counting));
    let more: Vec<&str> = counted.lines().filter(|line| !plain.lines().any(|other| other == *line)).collect();
    let node_port = format!("-A KUBE-NODEPORTS -m comment --comment {comment} -m tcp -p tcp");
    let localhost = format!(
        "{node_port} -d 127.0.0.0/8 --dport 30001 -m nfacct --nfacct-name localhost_nps_accepted_pkts -j {port}"
    );
    assert_eq!(
        more,
        [
            "-A KUBE-FORWARD -m conntrack --ctstate INVALID -m nfacct --nfacct-name ct_state_invalid_dropped_pkts -j DROP",
            &localhost,
        ]
    );
    let next = counted.lines().skip_while(|line| *line != localhost).nth(1);
    assert_eq!(next, Some(&*format!("{node_port} --dport 30001 -j {port}")), "whoever is counted is served");
    // Without NodePorts on 127.0.0.1, and in IPv6, there is nothing to count of them.
    let nowhere = Config { localhost_node_ports: false, ..counting.clone() };
    for text in [text(Family::V4, &nowhere), text(Family::V6, &counting)] {
        assert!(text.contains("ct_state_invalid") && !text.contains("localhost_nps"), "{text}");
    }
}
