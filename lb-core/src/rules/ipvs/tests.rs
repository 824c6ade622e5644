//! Every change against writing everything, carried out by a kernel that is as strict as the real one.

use super::*;
use crate::{
    compile::{CompileConfig, Compiler, NodeView},
    model::{Event, Node},
    rules::tests::{histories, random_changes},
    synthetic,
};

/// What the programs would make of their input.
#[derive(Debug, Default, PartialEq)]
struct Kernel {
    elements: BTreeSet<String>,
    servers: BTreeMap<String, (String, BTreeMap<String, String>)>,
    links: BTreeSet<String>,
}

impl Kernel {
    fn carry_out(&mut self, transaction: &Transaction) {
        for (phase, lines) in transaction.phases() {
            for line in lines {
                let line = line.text(|_| None);
                let words: Vec<&str> = line.split(' ').collect();
                match phase {
                    Phase::AddElements | Phase::DeleteElements => self.element(&line, &words),
                    Phase::AddServers | Phase::DeleteServers => self.server(&line, &words),
                    Phase::Link | Phase::Unlink => self.link(&line, &words),
                }
            }
        }
    }

    fn element(&mut self, line: &str, words: &[&str]) {
        let element = format!("{} {}", words[1], words[2]);
        let done = match words[0] {
            "add" => self.elements.insert(element),
            _ => self.elements.remove(&element),
        };
        assert!(done, "{line}: nothing to do");
    }

    fn server(&mut self, line: &str, words: &[&str]) {
        let name = format!("{} {}", words[1], words[2]);
        let options = words[3..].join(" ");
        let Some((actual, destinations)) = self.servers.get_mut(&name) else {
            assert_eq!(words[0], "-A", "{line}: no such server");
            self.servers.insert(name, (options, BTreeMap::new()));
            return;
        };
        let destination = words.get(4).map(|word| (*word).to_owned()).unwrap_or_default();
        let weight = words.last().map(|word| (*word).to_owned()).unwrap_or_default();
        match words[0] {
            "-E" => *actual = options,
            "-D" => drop(self.servers.remove(&name)),
            "-a" => assert_eq!(destinations.insert(destination, weight), None, "{line}: there already"),
            "-e" => assert!(destinations.insert(destination, weight).is_some(), "{line}: not there"),
            "-d" => assert!(destinations.remove(&destination).is_some(), "{line}: not there"),
            _ => panic!("{line}: there already"),
        }
    }

    fn link(&mut self, line: &str, words: &[&str]) {
        let rest = words[2..].iter().take_while(|word| !["mtu", "nodad"].contains(word));
        let what = format!("{} {}", words[0], rest.copied().collect::<Vec<_>>().join(" "));
        let done = if words[1] == "del" { self.links.remove(&what) } else { self.links.insert(what) };
        assert!(done, "{line}: nothing to do");
    }

    /// Without destinations that only wait for their connections to end.
    fn settled(&self) -> Self {
        let mut servers = self.servers.clone();
        for (_, destinations) in servers.values_mut() {
            destinations.retain(|_, weight| weight != "0");
        }
        Self { elements: self.elements.clone(), links: self.links.clone(), servers }
    }
}

fn fresh(table: &ServiceTable) -> Kernel {
    let mut kernel = Kernel::default();
    kernel.carry_out(&Servers::all(table, Family::V4, Scheduler::Rr));
    kernel
}

#[test]
fn changes_end_where_writing_everything_does() {
    let (mut servers, mut kernel) = (Servers::new(Family::V4, Scheduler::Rr), Kernel::default());
    let mut drained = 0;
    random_changes(|step, table, changes| {
        kernel.carry_out(&servers.update(table, changes));
        drained += servers.draining();
        assert_eq!(kernel.settled(), fresh(table), "step {step}");
        if step % 3 == 0 {
            kernel.carry_out(&servers.sweep(|_, _| true));
            assert_eq!((servers.draining(), &kernel), (0, &fresh(table)), "step {step}");
        }
        // What is known is what is there: nothing would be written anew.
        let state = servers.state();
        assert!(Servers::new(Family::V4, Scheduler::Rr).replace(table, &state).phases().next().is_none());
    });
    assert!(drained > 0, "no destination ever drained");
}

#[test]
fn whatever_happens_changes_end_where_writing_everything_does() {
    for family in [Family::V4, Family::V6] {
        let begin = || (Servers::new(family, Scheduler::Rr), Kernel::default());
        histories(begin, |(servers, kernel), (at, number), table, changes| {
            kernel.carry_out(&servers.update(table, changes));
            let mut fresh = Kernel::default();
            fresh.carry_out(&Servers::all(table, family, Scheduler::Rr));
            assert_eq!(kernel.settled(), fresh, "{family}, {at}");
            if number % 3 == 0 {
                kernel.carry_out(&servers.sweep(|_, _| true));
                assert_eq!(*kernel, fresh, "{family}, {at}");
            }
        });
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn node(name: &str, addr: &str) -> Event {
    let addresses = vec![ip(addr)];
    Event::Node(Node { name: name.into(), addresses, zone: None, pod_cidrs: Vec::new(), eligible: true })
}

/// A service with these externalIPs, on a node that is 192.0.2.1.
fn with_external_ips(addrs: &[&str]) -> Compiler {
    let addresses = vec![ip("192.0.2.1")];
    let view = NodeView { name: "node-1".into(), addresses, ..NodeView::default() };
    let mut compiler = Compiler::new(CompileConfig::default(), view);
    let mut service = synthetic::service(1);
    service.external_ips = addrs.iter().map(|addr| ip(addr)).collect();
    compiler.apply(Event::Service(service));
    compiler.apply(Event::EndpointSlice(synthetic::slice(1, 2, 0)));
    compiler
}

#[test]
fn no_address_of_a_node_is_bound() {
    let mut compiler = with_external_ips(&["192.0.2.1", "192.0.2.2", "198.51.100.1"]);
    compiler.apply(node("node-2", "192.0.2.2"));
    let changes = compiler.compile();
    let mut servers = Servers::new(Family::V4, Scheduler::Rr);
    let first = servers.update(compiler.table(), &changes).to_string();
    assert!(first.contains("addr add 198.51.100.1/32 dev kube-ipvs0\n"), "{first}");
    assert!(!first.contains("addr add 192.0.2."), "{first}");
    assert!(first.contains("rule add pref 50 to 192.0.2.2 ipproto tcp dport 80 lookup 5050\n"), "{first}");
    assert!(
        !first.contains("rule add pref 50 to 192.0.2.1 "),
        "this node's own are local as they are: {first}"
    );

    // A node joins with an address that was free: it is let go at once, and its service port alone stays.
    compiler.apply(node("node-3", "198.51.100.1"));
    let changes = compiler.compile();
    let then = servers.update(compiler.table(), &changes).to_string();
    expect_test::expect![[r"
        # ip -4 -force -batch -
        route replace local 198.51.100.1 dev lo table 5050 mtu lock 1500
        rule add pref 50 to 198.51.100.1 ipproto tcp dport 80 lookup 5050
        # ip -4 -force -batch -
        addr del 198.51.100.1/32 dev kube-ipvs0
        # ipset restore
        del KUBE-IPVS-IPS 198.51.100.1 -exist
    "]]
    .assert_eq(&then);
}

#[test]
fn what_drains_takes_nothing_new_and_keeps_what_it_needs() {
    let mut compiler = with_external_ips(&["192.0.2.2", "198.51.100.1"]);
    compiler.apply(node("node-2", "192.0.2.2"));
    let changes = compiler.compile();
    let mut servers = Servers::new(Family::V4, Scheduler::Rr);
    servers.update(compiler.table(), &changes);
    let state = servers.state();
    let drained = state.drained(|server| server.addr == ip("192.0.2.2"));
    let text = Transaction::between(Family::V4, &state, &drained).to_string();
    expect_test::expect![[r"
        # ipvsadm -R
        -e -t 192.0.2.2:80 -r 11.0.0.2:8080 -m -w 0
        -e -t 192.0.2.2:80 -r 11.0.0.3:8080 -m -w 0
        # ip -4 -force -batch -
        addr del 10.96.0.2/32 dev kube-ipvs0
        addr del 198.51.100.1/32 dev kube-ipvs0
        # ipvsadm -R
        -D -t 10.96.0.2:80
        -D -t 198.51.100.1:80
    "]]
    .assert_eq(&text);
    let nothing = drained.drained(|_| false);
    assert!(nothing.servers.is_empty() && nothing.links.is_empty());
}

#[test]
fn an_endpoint_that_comes_back_takes_connections_again() {
    let mut compiler = with_external_ips(&[]);
    let mut servers = Servers::new(Family::V4, Scheduler::Rr);
    let changes = compiler.compile();
    servers.update(compiler.table(), &changes);
    let mut change = |compiler: &mut Compiler, endpoints| {
        compiler.apply(Event::EndpointSlice(synthetic::slice(1, endpoints, 0)));
        let changes = compiler.compile();
        servers.update(compiler.table(), &changes).to_string()
    };
    let gone = change(&mut compiler, 1);
    let back = change(&mut compiler, 2);
    let edits = |text: &str| -> Vec<String> {
        let edited = text.lines().filter(|line| line.starts_with("-e "));
        edited.map(|line| line.rsplit(' ').next().unwrap_or_default().to_owned()).collect()
    };
    assert!(edits(&gone).contains(&"0".to_owned()) && edits(&back).contains(&"1".to_owned()), "{gone}{back}");
    assert!(!gone.contains("-d ") && !back.contains("-d "), "TCP connections may end: {gone}{back}");
}

#[test]
fn one_endpoint_more_costs_the_same_at_any_scale() {
    let writes = |services| {
        let mut compiler = Compiler::new(CompileConfig::default(), NodeView::default());
        synthetic::cluster(services, 3).for_each(|event| compiler.apply(event));
        let mut servers = Servers::new(Family::V4, Scheduler::Rr);
        let changes = compiler.compile();
        servers.update(compiler.table(), &changes);
        compiler.apply(Event::EndpointSlice(synthetic::slice(7, 3, 1)));
        let changes = compiler.compile();
        servers.update(compiler.table(), &changes).upserts()
    };
    assert_eq!((writes(20), writes(2_000)), (2, 2));
}
