//! The table: the answer of mode `ebpf`, then the differences.

use std::net::SocketAddr;

use lb_core::flow::Dialect::{self, Iptables, Ipvs, Nftables};

use super::{
    Expect::{self, Astray, Deny, Drop, Pass, Refuse},
    FlowCase,
    Seen::{self, Client, Node},
};
use crate::cluster::{node_ip, node_ip6};

/// The modes that are netfilter's.
const NETFILTER: &[Dialect] = &[Iptables, Nftables, Ipvs];

/// All rows.
pub fn cases() -> Vec<FlowCase> {
    let mut cases = Vec::new();
    for family in [V4, V6] {
        cases.extend(of_pods(&family));
        cases.extend(of_nodes(&family));
        cases.extend(from_outside(&family));
        cases.extend(of_external_policy_local(&family));
        cases.extend(of_endpoints(&family));
    }
    cases.extend(of_a_nodes_own_address());
    cases.extend(of_localhost());
    cases.extend(of_internal_policy_local());
    cases.extend(of_load_balancers());
    cases
}

/// Where a family's Services are dialled, by their number.
struct Family {
    v6: bool,
    node: fn(u8) -> String,
}

const V4: Family = Family { v6: false, node: node_ip };
const V6: Family = Family { v6: true, node: node_ip6 };

impl Family {
    fn cluster_ip(&self, number: u8) -> SocketAddr {
        at(&if self.v6 { format!("fd00:10:96::{number}") } else { format!("10.96.0.{number}") }, 80)
    }

    fn external_ip(&self, number: u8) -> SocketAddr {
        at(&if self.v6 { format!("2001:db8:ffff::{number}") } else { format!("198.51.100.{number}") }, 80)
    }

    fn node(&self, node: u8, port: u16) -> SocketAddr {
        at(&(self.node)(node), port)
    }

    fn node_port(&self, node: u8, number: u8) -> SocketAddr {
        self.node(node, 30070 + u16::from(number))
    }
}

fn at(addr: &str, port: u16) -> SocketAddr {
    SocketAddr::new(addr.parse().expect("an address"), port)
}

/// The same address at a port that nobody has.
fn unknown_port(of: SocketAddr) -> SocketAddr {
    SocketAddr::new(of.ip(), 81)
}

fn packet(what: &'static str, from: &'static str, target: SocketAddr, expect: Expect) -> FlowCase {
    FlowCase { what, from, by_socket: false, target, expect, instead: Vec::new() }
}

fn socket(what: &'static str, from: &'static str, target: SocketAddr, expect: Expect) -> FlowCase {
    FlowCase { by_socket: true, ..packet(what, from, target, expect) }
}

/// One question as socket call and as packet.
fn both(what: &'static str, from: &'static str, target: SocketAddr, expect: &Expect) -> [FlowCase; 2] {
    [socket(what, from, target, expect.clone()), packet(what, from, target, expect.clone())]
}

/// Both of `web`'s pods, which see the same.
fn any(seen: Seen) -> Expect {
    Expect::Serve(vec![("pod11", seen), ("pod21", seen)])
}

fn one(pod: &'static str, seen: Seen) -> Expect {
    Expect::Serve(vec![(pod, seen)])
}

/// From outside eBPF shows the client to backends of the node that takes it in, node 1 here, and to no others.
fn shown_on_node1() -> Expect {
    Expect::Serve(vec![("pod11", Client), ("pod21", Node(1))])
}

fn of_pods(family: &Family) -> Vec<FlowCase> {
    let vip = |number| family.cluster_ip(number);
    let ext = |number| family.external_ip(number);
    let mut cases = Vec::new();
    cases.extend(both("pod to service", "pod12", vip(10), &any(Client)));
    cases.extend(both("pod to backend on this node", "pod12", vip(11), &one("pod11", Client)));
    cases.extend(both("pod to backend on the other node", "pod12", vip(12), &one("pod21", Client)));
    cases.extend(both("with affinity", "pod12", vip(13), &any(Client)));
    cases.push(
        socket("pod to itself", "pod11", vip(11), one("pod11", Client))
            .but(NETFILTER, &one("pod11", Node(1))),
    );
    cases.push(packet("pod to itself", "pod11", vip(11), one("pod11", Node(1))));
    cases.push(packet("pod to itself by external IP", "pod11", ext(11), one("pod11", Node(1))));
    cases.extend(both("no endpoints", "pod12", vip(15), &Refuse));
    let unknown = both("unknown port of a ClusterIP", "pod12", unknown_port(vip(10)), &Refuse);
    cases.extend(unknown.map(|case| case.but(&[Iptables], &Pass(None))));
    let external = both("pod to external IP", "pod12", ext(12), &one("pod21", Client));
    cases.extend(external.map(|case| case.but(NETFILTER, &one("pod21", Node(1)))));
    let node_port = both("pod to node port", "pod12", family.node_port(1, 10), &any(Client));
    cases.extend(node_port.map(|case| case.but(NETFILTER, &any(Node(1)))));
    cases.push(packet("pod to another node's port", "pod12", family.node_port(2, 11), one("pod11", Node(2))));
    cases
}

fn of_nodes(family: &Family) -> Vec<FlowCase> {
    let ext = |number| family.external_ip(number);
    vec![
        socket("host to service", "node1", family.cluster_ip(10), any(Client)).but(NETFILTER, &any(Node(1))),
        socket("host to external IP", "node2", ext(12), one("pod21", Client))
            .but(NETFILTER, &one("pod21", Node(2))),
        socket("host to its own node port", "node1", family.node_port(1, 12), one("pod21", Client))
            .but(NETFILTER, &one("pod21", Node(1))),
        socket("host to ClusterIP without endpoints", "node1", family.cluster_ip(15), Refuse),
        // iptables' refusals don't stand where a node's own packets leave it.
        socket("host to external IP without endpoints", "node1", ext(15), Refuse)
            .but(&[Iptables], &Pass(None)),
        socket("host to node port without endpoints", "node1", family.node_port(1, 15), Refuse),
        socket("another port, from the other node", "node2", family.node(1, 9000), Pass(Some("node1"))),
    ]
}

fn from_outside(family: &Family) -> Vec<FlowCase> {
    let vip = |number| family.cluster_ip(number);
    let ext = |number| family.external_ip(number);
    vec![
        packet("outside to external IP", "client", ext(10), shown_on_node1()).but(NETFILTER, &any(Node(1))),
        packet("local backend sees the client", "client", ext(11), one("pod11", Client))
            .but(NETFILTER, &one("pod11", Node(1))),
        packet("remote backend sees the node", "client", ext(12), one("pod21", Node(1))),
        packet("node port, local", "client", family.node_port(1, 11), one("pod11", Client))
            .but(NETFILTER, &one("pod11", Node(1))),
        packet("node port, remote", "client", family.node_port(2, 11), one("pod11", Node(2))),
        packet("node port of node 2, local", "client", family.node_port(2, 12), one("pod21", Client))
            .but(NETFILTER, &one("pod21", Node(2))),
        packet("ClusterIP from outside, local", "client", vip(11), one("pod11", Client))
            .but(NETFILTER, &one("pod11", Node(1))),
        packet("ClusterIP from outside, remote", "client", vip(12), one("pod21", Node(1))),
        packet("external IP without endpoints", "client", ext(15), Refuse),
        packet("node port without endpoints", "client", family.node_port(1, 15), Refuse),
        packet("unknown port of an external IP", "client", unknown_port(ext(11)), Refuse)
            .but(&[Iptables, Nftables], &Pass(None)),
        packet("unknown port of a ClusterIP", "client", unknown_port(vip(11)), Refuse)
            .but(&[Iptables], &Pass(None)),
        packet("another port of a node", "client", family.node(1, 9000), Pass(Some("node1"))),
    ]
}

/// `local` has its one pod on node 1.
fn of_external_policy_local(family: &Family) -> Vec<FlowCase> {
    let ext = family.external_ip(14);
    let served = || one("pod11", Client);
    let mut cases = vec![
        packet("eTP Local keeps the client", "client", family.node_port(1, 14), served()),
        packet("eTP Local keeps the client, external IP", "client", ext, served()),
        // IPVS uses endpoints elsewhere then, whose replies don't come by here.
        packet("eTP Local without endpoint here", "client", family.node_port(2, 14), Drop)
            .but(&[Ipvs], &Astray(vec!["pod11"])),
        packet("eTP Local, the other node's port", "node2", family.node_port(1, 14), served()),
        socket("eTP Local, from the node", "node1", ext, served()).but(NETFILTER, &one("pod11", Node(1))),
        socket("eTP Local, from a node without endpoint", "node2", ext, served())
            .but(NETFILTER, &one("pod11", Node(2))),
    ];
    cases.extend(both("eTP Local, from a pod", "pod12", ext, &served()));
    cases.extend(both("eTP Local, from a pod without endpoint on its node", "pod22", ext, &served()));
    cases.push(packet("the same, by its node's port", "pod22", family.node_port(2, 14), served()));
    cases
}

/// Conditions and hints.
fn of_endpoints(family: &Family) -> Vec<FlowCase> {
    let vip = |number| family.cluster_ip(number);
    let mut cases = vec![
        packet("the last endpoint drains", "client", family.external_ip(18), one("pod11", Client))
            .but(NETFILTER, &one("pod11", Node(1))),
        packet("hinted, from outside", "client", family.external_ip(20), one("pod11", Client))
            .but(NETFILTER, &one("pod11", Node(1))),
    ];
    cases.extend(both("the last endpoint drains", "pod12", vip(18), &one("pod11", Client)));
    cases.extend(both("one drains, one is ready", "pod12", vip(19), &one("pod21", Client)));
    cases.extend(both("hinted to this node", "pod12", vip(20), &one("pod11", Client)));
    cases.extend(both("hinted to this node", "pod22", vip(20), &one("pod21", Client)));
    cases
}

/// Node 1's own address is an external IP of `web`. In IPVS it is not bound, only its service port is made local.
fn of_a_nodes_own_address() -> Vec<FlowCase> {
    let own = V4.node(1, 80);
    vec![
        packet("node's own address as external IP", "client", own, shown_on_node1())
            .but(NETFILTER, &any(Node(1))),
        socket("the same, from that node", "node1", own, any(Client)).but(NETFILTER, &any(Node(1))),
        socket("the same, from the other node", "node2", own, any(Client)).but(NETFILTER, &any(Node(2))),
        packet("the same, from a pod", "pod12", own, any(Client)).but(NETFILTER, &any(Node(1))),
        packet("the same, from a pod of the other node", "pod22", own, any(Client))
            .but(NETFILTER, &any(Node(2))),
    ]
}

fn of_localhost() -> Vec<FlowCase> {
    let localhost = at("127.0.0.1", 30080);
    vec![
        socket("localhost node port, host", "node1", localhost, any(Client))
            .but(&[Iptables], &any(Node(1)))
            .but(&[Nftables, Ipvs], &Pass(None)),
        socket("localhost node port, pod", "pod12", localhost, Pass(None)),
    ]
}

/// `local` has its one pod on node 1. In IPVS it serves where there is no endpoint, too.
fn of_internal_policy_local() -> Vec<FlowCase> {
    let vip = V4.cluster_ip(14);
    let mut cases = Vec::new();
    cases.extend(both("iTP Local", "pod12", vip, &one("pod11", Client)));
    cases.push(
        socket("iTP Local without endpoint here", "pod22", vip, Deny)
            .but(&[Iptables, Nftables], &Drop)
            .but(&[Ipvs], &one("pod11", Client)),
    );
    cases.push(
        packet("iTP Local without endpoint here", "pod22", vip, Drop).but(&[Ipvs], &one("pod11", Client)),
    );
    cases.push(
        socket("iTP Local without endpoint here", "node2", vip, Deny)
            .but(&[Iptables, Nftables], &Drop)
            .but(&[Ipvs], &one("pod11", Node(2))),
    );
    cases
}

/// Load-balancer IPs without NodePorts; 16 to 17 and 22 are for certain sources.
fn of_load_balancers() -> Vec<FlowCase> {
    let vip = |number| V4.external_ip(number);
    let mut cases = vec![
        packet("allowed source", "client", vip(16), shown_on_node1()).but(NETFILTER, &any(Node(1))),
        packet("source not allowed", "client", vip(17), Drop),
        socket("node not allowed", "node1", vip(17), Deny).but(NETFILTER, &Drop),
        socket("node allowed", "node1", vip(22), any(Client)).but(NETFILTER, &any(Node(1))),
        packet("LB IP with eTP Local", "client", vip(21), one("pod11", Client)),
        socket("LB IP with eTP Local, from a node without endpoint", "node2", vip(21), one("pod11", Client))
            .but(NETFILTER, &one("pod11", Node(2))),
    ];
    // A pod's socket call is let through and its packet is dropped.
    cases.extend(both("pod not allowed", "pod12", vip(16), &Drop));
    cases.extend(both("pod not allowed where nodes are", "pod12", vip(22), &Drop));
    cases.extend(both("LB IP with eTP Local, from a pod", "pod22", vip(21), &one("pod11", Client)));
    cases
}
