//! Facts about resolution, each a small cluster and the table it must give.

use expect_test::{Expect, expect};

use super::*;
use crate::{
    model::{
        ContainerPort, Endpoint, EndpointSlice, Family, Node, Pod, Protocol, Service, ServiceCidr,
        ServicePort, ServiceType, SlicePort, TargetPort, TrafficPolicy,
    },
    snapshot::ClusterSnapshot,
    synthetic,
    table::{BackendList, Traffic},
};

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn service(name: &str, cluster_ip: &str) -> Service {
    let mut service = synthetic::service(0);
    service.name = ObjectName::new("default", name);
    service.cluster_ips = vec![ip(cluster_ip)];
    service.selector = BTreeMap::from([("app".into(), name.into())]);
    service
}

/// An endpoint such as `10.1.0.1 node-1 ready`; the last word is any of ready, draining, starting, gone.
fn endpoint(text: &str) -> Endpoint {
    let words: Vec<&str> = text.split(' ').collect();
    let (ready, serving, terminating) = match words[2] {
        "ready" => (true, true, false),
        "draining" => (false, true, true),
        "starting" => (false, false, false),
        _ => (false, false, true),
    };
    Endpoint {
        addr: ip(words[0]),
        ready,
        serving,
        terminating,
        node: Some(words[1].into()),
        zone_hints: Vec::new(),
        node_hints: Vec::new(),
    }
}

fn slice(service: &str, endpoints: &[&str]) -> EndpointSlice {
    let endpoints: Vec<Endpoint> = endpoints.iter().map(|text| endpoint(text)).collect();
    EndpointSlice {
        triggered: None,
        name: ObjectName::new("default", format!("{service}-1")),
        service: ObjectName::new("default", service),
        family: endpoints.first().map_or(Family::V4, |endpoint| Family::of(endpoint.addr)),
        ports: vec![SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints,
    }
}

fn node_view() -> NodeView {
    NodeView {
        name: "node-1".into(),
        zone: Some("a".into()),
        addresses: vec![ip("192.0.2.1")],
        primary: Vec::new(),
    }
}

fn compiled(events: Vec<Event>) -> Compiled {
    let mut snapshot = ClusterSnapshot::default();
    events.into_iter().for_each(|event| drop(snapshot.apply(event)));
    compile(
        &snapshot,
        &node_view(),
        &CompileConfig { localhost_node_ports: false, ..CompileConfig::default() },
    )
}

fn check(events: Vec<Event>, expected: Expect) {
    let compiled = compiled(events);
    let warnings: String = compiled.warnings.iter().map(|warning| format!("warning {warning}\n")).collect();
    expected.assert_eq(&format!("{}{warnings}", compiled.table));
}

const TWO: &[&str] = &["10.1.0.1 node-1 ready", "10.2.0.1 node-2 ready"];

#[test]
fn a_cluster_ip_uses_all_ready_endpoints() {
    let endpoints = &[
        "10.1.0.1 node-1 ready",
        "10.2.0.1 node-2 ready",
        "10.3.0.1 node-3 starting",
        "10.4.0.1 node-3 draining",
    ];
    check(
        vec![Event::Service(service("web", "10.96.0.1")), Event::EndpointSlice(slice("web", endpoints))],
        expect![[r#"
            service default/web:http TCP IPv4
              backend 10.1.0.1:8080 cluster-list here
              backend 10.2.0.1:8080 cluster-list
            frontend 10.96.0.1:80/TCP             ClusterIP    default/web:http  external=cluster/drop/masq-remote internal=cluster/drop/keep
        "#]],
    );
}

#[test]
fn no_endpoint_at_all_is_refused() {
    check(
        vec![Event::Service(service("web", "10.96.0.1"))],
        expect![[r#"
        service default/web:http TCP IPv4
        frontend 10.96.0.1:80/TCP             ClusterIP    default/web:http  external=cluster/reject/masq-remote internal=cluster/reject/keep
    "#]],
    );
}

#[test]
fn draining_endpoints_serve_when_no_ready_one_is_left() {
    let endpoints = &["10.1.0.1 node-1 draining", "10.2.0.1 node-2 gone", "10.3.0.1 node-3 starting"];
    check(
        vec![Event::Service(service("web", "10.96.0.1")), Event::EndpointSlice(slice("web", endpoints))],
        expect![[r#"
            service default/web:http TCP IPv4
              backend 10.1.0.1:8080 cluster-list here terminating
            frontend 10.96.0.1:80/TCP             ClusterIP    default/web:http  external=cluster/drop/masq-remote internal=cluster/drop/keep
        "#]],
    );
}

#[test]
fn internal_policy_local_drops_where_no_endpoint_is() {
    let mut web = service("web", "10.96.0.1");
    web.internal_policy = TrafficPolicy::Local;
    check(
        vec![Event::Service(web), Event::EndpointSlice(slice("web", &["10.2.0.1 node-2 ready"]))],
        expect![[r#"
            service default/web:http TCP IPv4
            frontend 10.96.0.1:80/TCP             ClusterIP    default/web:http  external=local/drop/masq-remote internal=local/drop/keep
        "#]],
    );
}

#[test]
fn external_policy_local_keeps_the_client_and_spares_this_nodes_own() {
    let mut web = service("web", "10.96.0.1");
    web.external_policy = TrafficPolicy::Local;
    web.external_ips = vec![ip("198.51.100.1")];
    web.ports[0].node_port = 30080;
    check(
        vec![Event::Service(web), Event::EndpointSlice(slice("web", TWO))],
        expect![[r#"
        service default/web:http TCP IPv4
          backend 10.1.0.1:8080 cluster-list local-list here
          backend 10.2.0.1:8080 cluster-list
        frontend 10.96.0.1:80/TCP             ClusterIP    default/web:http  external=cluster/drop/masq-remote internal=cluster/drop/keep
        frontend 192.0.2.1:30080/TCP          NodePort     default/web:http  external=local/drop/keep internal=cluster/drop/keep node-address
        frontend 198.51.100.1:80/TCP          ExternalIP   default/web:http  external=local/drop/keep internal=cluster/drop/keep
    "#]],
    );
}

#[test]
fn a_nodes_own_address_as_external_ip_is_a_node_address() {
    let mut web = service("web", "10.96.0.1");
    web.external_ips = vec![ip("192.0.2.1"), ip("192.0.2.2"), ip("198.51.100.1")];
    let node = Node {
        name: "node-2".into(),
        addresses: vec![ip("192.0.2.2")],
        zone: None,
        pod_cidrs: Vec::new(),
        eligible: true,
    };
    check(
        vec![Event::Node(node), Event::Service(web)],
        expect![[r#"
        service default/web:http TCP IPv4
        frontend 10.96.0.1:80/TCP             ClusterIP    default/web:http  external=cluster/reject/masq-remote internal=cluster/reject/keep
        frontend 192.0.2.1:80/TCP             ExternalIP   default/web:http  external=cluster/reject/masq-remote internal=cluster/reject/keep node-address
        frontend 192.0.2.2:80/TCP             ExternalIP   default/web:http  external=cluster/reject/masq-remote internal=cluster/reject/keep node-address
        frontend 198.51.100.1:80/TCP          ExternalIP   default/web:http  external=cluster/reject/masq-remote internal=cluster/reject/keep
    "#]],
    );
}

#[test]
fn addresses_nobody_can_mean_are_named() {
    let mut web = service("web", "10.96.0.1");
    web.external_ips = ["0.0.0.0", "127.0.0.1", "224.0.0.1", "169.254.0.1", "2001:db8::1"].map(ip).to_vec();
    check(
        vec![Event::Service(web)],
        expect![[r#"
        service default/web:http TCP IPv4
        frontend 10.96.0.1:80/TCP             ClusterIP    default/web:http  external=cluster/reject/masq-remote internal=cluster/reject/keep
        warning Service default/web: spec.externalIPs: 0.0.0.0 is the unspecified address; it is not served
        warning Service default/web: spec.externalIPs: 127.0.0.1 is a loopback address; it is not served
        warning Service default/web: spec.externalIPs: 224.0.0.1 is a multicast address; it is not served
        warning Service default/web: spec.externalIPs: 169.254.0.1 is a link-local or broadcast address; it is not served
        warning Service default/web: spec.externalIPs: the Service has no IPv6 cluster IP; 2001:db8::1 is not served
    "#]],
    );
}

#[test]
fn external_ips_are_served_if_their_feature_gate_lets_them() {
    let mut web = service("web", "10.96.0.1");
    web.external_ips = vec![ip("198.51.100.1")];
    web.load_balancer_ips = vec![ip("198.51.100.2")];
    let mut snapshot = ClusterSnapshot::default();
    snapshot.apply(Event::Service(web));
    let config = CompileConfig { external_ips: false, ..CompileConfig::default() };
    let Compiled { table, warnings } = compile(&snapshot, &node_view(), &config);
    let served: Vec<IpAddr> = table.frontends.keys().map(|frontend| frontend.addr).collect();
    assert_eq!(served, [ip("10.96.0.1"), ip("198.51.100.2")]);
    let told: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    let gate = "not served: the feature gate AllowServiceExternalIPs is off";
    assert_eq!(told, [format!("Service default/web: spec.externalIPs: {gate}")]);
}

#[test]
fn source_ranges_restrict_load_balancer_addresses_alone() {
    let mut web = service("web", "10.96.0.1");
    web.load_balancer_ips = vec![ip("198.51.100.1")];
    web.external_ips = vec![ip("198.51.100.2")];
    web.source_ranges = vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
    check(
        vec![Event::Service(web)],
        expect![[r#"
        service default/web:http TCP IPv4
        frontend 10.96.0.1:80/TCP             ClusterIP    default/web:http  external=cluster/reject/masq-remote internal=cluster/reject/keep
        frontend 198.51.100.1:80/TCP          LoadBalancer default/web:http  external=cluster/reject/masq-remote internal=cluster/reject/keep sources=192.0.2.0/24+host
        frontend 198.51.100.2:80/TCP          ExternalIP   default/web:http  external=cluster/reject/masq-remote internal=cluster/reject/keep
    "#]],
    );
}

#[test]
fn a_range_of_everything_is_no_restriction() {
    let mut web = service("web", "10.96.0.1");
    web.load_balancer_ips = vec![ip("198.51.100.1")];
    let ranges = ["192.0.2.0/24", "0.0.0.0/0"];
    web.source_ranges = ranges.map(|range| range.parse().unwrap()).to_vec();
    let table = compiled(vec![Event::Service(web)]).table.to_string();
    assert!(table.contains("198.51.100.1:80") && !table.contains("sources="), "{table}");
}

#[test]
fn the_older_service_has_the_frontend() {
    let mut old = service("old", "10.96.0.1");
    old.external_ips = vec![ip("198.51.100.1")];
    old.created_unix_secs = 5;
    let mut new = service("a-new", "10.96.0.2");
    new.external_ips = vec![ip("198.51.100.1")];
    new.created_unix_secs = 6;
    check(
        vec![Event::Service(new), Event::Service(old)],
        expect![[r#"
        service default/a-new:http TCP IPv4
        service default/old:http TCP IPv4
        frontend 10.96.0.1:80/TCP             ClusterIP    default/old:http  external=cluster/reject/masq-remote internal=cluster/reject/keep
        frontend 10.96.0.2:80/TCP             ClusterIP    default/a-new:http  external=cluster/reject/masq-remote internal=cluster/reject/keep
        frontend 198.51.100.1:80/TCP          ExternalIP   default/old:http  external=cluster/reject/masq-remote internal=cluster/reject/keep
        warning Service default/a-new: spec: 198.51.100.1:80/TCP belongs to the older Service default/old; here it is not served
    "#]],
    );
}

#[test]
fn both_families_have_their_own_backends() {
    let mut web = service("web", "10.96.0.1");
    web.cluster_ips.push(ip("fd00::1"));
    web.affinity_secs = Some(10);
    let mut six = slice("web", &["fd00:1::1 node-1 ready"]);
    six.name = ObjectName::new("default", "web-6");
    check(
        vec![Event::Service(web), Event::EndpointSlice(slice("web", TWO)), Event::EndpointSlice(six)],
        expect![[r#"
            service default/web:http TCP IPv4 affinity=10s
              backend 10.1.0.1:8080 cluster-list here
              backend 10.2.0.1:8080 cluster-list
            service default/web:http TCP IPv6 affinity=10s
              backend [fd00:1::1]:8080 cluster-list here
            frontend 10.96.0.1:80/TCP             ClusterIP    default/web:http  external=cluster/drop/masq-remote internal=cluster/drop/keep
            frontend [fd00::1]:80/TCP             ClusterIP    default/web:http  external=cluster/drop/masq-remote internal=cluster/drop/keep
        "#]],
    );
}

#[test]
fn sctp_is_left_out_by_name() {
    let mut web = service("web", "10.96.0.1");
    web.ports[0].protocol = Protocol::Sctp;
    check(
        vec![Event::Service(web)],
        expect![[r#"
        warning Service default/web: spec.ports[0].protocol: SCTP is not served; the Service's other ports are
    "#]],
    );
}

#[test]
fn sctp_is_served_where_a_datapath_can() {
    let mut web = service("web", "10.96.0.1");
    web.ports[0].protocol = Protocol::Sctp;
    let mut cluster = ClusterSnapshot::default();
    cluster.apply(Event::Service(web));
    let config = CompileConfig { sctp: true, ..CompileConfig::default() };
    let compiled = compile(&cluster, &NodeView::default(), &config);
    assert_eq!(compiled.warnings, []);
    let frontends: Vec<String> = compiled.table.frontends.keys().map(ToString::to_string).collect();
    assert_eq!(frontends, ["10.96.0.1:80/SCTP"]);
}

#[test]
fn ranges_of_cluster_ips_come_and_go() {
    let mut compiler = Compiler::new(CompileConfig::default(), NodeView::default());
    let range = |name: &str, cidr: &str| {
        Event::ServiceCidr(ServiceCidr { name: name.into(), cidrs: vec![cidr.parse().unwrap()] })
    };
    compiler.compile();
    compiler.apply(range("a", "10.96.0.0/16"));
    compiler.apply(range("b", "10.96.0.0/16"));
    assert!(compiler.compile().service_cidrs);
    assert_eq!(compiler.table().to_string(), "service-cidr 10.96.0.0/16\n");
    compiler.apply(Event::ServiceCidrGone("a".into()));
    assert!(compiler.compile().is_empty(), "the other object has the same range");
    compiler.apply(Event::ServiceCidrGone("b".into()));
    assert!(compiler.compile().service_cidrs);
    assert_eq!(compiler.table().to_string(), "");
}

fn hinted(hints: &[(&str, &str)]) -> EndpointSlice {
    let mut slice = slice("web", TWO);
    for (endpoint, (zone, node)) in slice.endpoints.iter_mut().zip(hints) {
        endpoint.zone_hints = Vec::from_iter((!zone.is_empty()).then(|| Arc::from(*zone)));
        endpoint.node_hints = Vec::from_iter((!node.is_empty()).then(|| Arc::from(*node)));
    }
    slice
}

#[test]
fn hints_hold_only_if_all_have_them_and_one_is_ours() {
    type Hints = [(&'static str, &'static str); 2];
    let rows: [(Hints, &[&str]); 6] = [
        ([("a", ""), ("b", "")], &["10.1.0.1"]),
        ([("b", ""), ("a", "")], &["10.2.0.1"]),
        ([("b", ""), ("c", "")], &["10.1.0.1", "10.2.0.1"]),
        ([("a", ""), ("", "")], &["10.1.0.1", "10.2.0.1"]),
        ([("b", "node-2"), ("a", "node-1")], &["10.2.0.1"]),
        ([("a", "node-2"), ("b", "node-3")], &["10.1.0.1"]),
    ];
    for (hints, expected) in rows {
        let events = vec![Event::Service(service("web", "10.96.0.1")), Event::EndpointSlice(hinted(&hints))];
        let table = compiled(events).table;
        let entry = table.services.values().next().expect("one service port");
        let addrs: Vec<String> = entry.cluster.iter().map(|backend| backend.addr.to_string()).collect();
        assert_eq!(addrs, expected, "{hints:?}");
    }
}

#[test]
fn of_two_slices_with_one_endpoint_the_live_one_counts() {
    let mut second = slice("web", &["10.1.0.1 node-1 ready"]);
    second.name = ObjectName::new("default", "web-2");
    let first = slice("web", &["10.1.0.1 node-1 draining"]);
    for slices in [[first.clone(), second.clone()], [second, first]] {
        let mut events = vec![Event::Service(service("web", "10.96.0.1"))];
        events.extend(slices.map(Event::EndpointSlice));
        let table = compiled(events).table;
        let entry = table.services.values().next().unwrap();
        assert!(entry.cluster.len() == 1 && !entry.cluster[0].terminating);
    }
}

#[test]
fn node_ports_answer_on_the_allowed_addresses() {
    let mut web = service("web", "10.96.0.1");
    web.ports[0].node_port = 30080;
    let mut snapshot = ClusterSnapshot::default();
    snapshot.apply(Event::Service(web));
    let view = NodeView { addresses: vec![ip("192.0.2.1"), ip("10.0.0.1"), ip("fd00::1")], ..node_view() };
    let rows: [(&[&str], &[&str]); 6] = [
        (&[], &["10.0.0.1", "127.0.0.1", "192.0.2.1"]),
        (&["192.0.2.0/24"], &["192.0.2.1"]),
        (&["127.0.0.0/8", "10.0.0.0/8"], &["10.0.0.1", "127.0.0.1"]),
        (&["fd00::/64"], &["10.0.0.1", "127.0.0.1", "192.0.2.1"]),
        (&["primary"], &["10.0.0.1"]),
        (&["primary", "192.0.2.1/32"], &["10.0.0.1", "192.0.2.1"]),
    ];
    snapshot.apply(Event::Node(Node {
        name: "node-1".into(),
        addresses: vec![ip("fd00::1"), ip("10.0.0.1"), ip("192.0.2.1")],
        zone: None,
        pod_cidrs: Vec::new(),
        eligible: true,
    }));
    let address = |text: &&str| match *text {
        "primary" => NodePortAddress::Primary,
        range => NodePortAddress::Range(range.parse().unwrap()),
    };
    for (ranges, expected) in rows {
        let config = CompileConfig {
            node_port_addresses: ranges.iter().map(address).collect(),
            ..CompileConfig::default()
        };
        let table = compile(&snapshot, &view, &config).table;
        let at: Vec<String> = table
            .frontends
            .keys()
            .filter(|addr| addr.port == 30080)
            .map(|addr| addr.addr.to_string())
            .collect();
        assert_eq!(at, expected, "{ranges:?}");
    }
}

#[test]
fn load_balancers_are_told_of_ready_endpoints_here_alone() {
    let mut web = service("web", "10.96.0.1");
    web.service_type = ServiceType::LoadBalancer;
    web.external_policy = TrafficPolicy::Local;
    web.health_check_node_port = 32000;
    web.load_balancer_ips = vec![ip("198.51.100.1")];
    let told = |service: &Service, endpoints: &[&str]| {
        // A second port of the same endpoints doesn't count twice.
        let mut slice = slice("web", endpoints);
        slice.ports.push(SlicePort { name: "dns".into(), protocol: Protocol::Udp, port: 53 });
        let table = compiled(vec![Event::Service(service.clone()), Event::EndpointSlice(slice)]).table;
        let local = table.frontends.values().any(|frontend| {
            frontend.external.list == BackendList::Local
                && !table.services[&frontend.service].local.is_empty()
        });
        let check = table.health_checks.get(&service.name).map(|check| (check.port, check.local_endpoints));
        (check, local, table.without_local.get(&(Family::V4, Traffic::External)).copied())
    };
    let here = ["10.1.0.1 node-1 ready", "10.1.0.2 node-1 ready", "10.1.0.3 node-1 draining"];
    assert_eq!(told(&web, &here), (Some((32000, 2)), true, None));
    assert_eq!(told(&web, &["10.2.0.1 node-2 ready"]), (Some((32000, 0)), false, Some(1)));
    assert_eq!(told(&web, &[]), (Some((32000, 0)), false, None), "nobody is elsewhere either");
    let mut inside = web.clone();
    (inside.internal_policy, inside.external_policy) = (TrafficPolicy::Local, TrafficPolicy::Cluster);
    let elsewhere = slice("web", &["10.2.0.1 node-2 ready"]);
    let table = compiled(vec![Event::Service(inside), Event::EndpointSlice(elsewhere)]).table;
    assert_eq!(table.without_local, BTreeMap::from([((Family::V4, Traffic::Internal), 1)]));
    assert_eq!(told(&web, &["10.1.0.3 node-1 draining"]), (Some((32000, 0)), true, None), "still served");
    for change in [
        (|web| web.external_policy = TrafficPolicy::Cluster) as fn(&mut Service),
        |web| web.service_type = ServiceType::NodePort,
        |web| web.health_check_node_port = 0,
    ] {
        let mut other = web.clone();
        change(&mut other);
        assert_eq!(told(&other, &here).0, None);
    }
}

#[test]
fn health_checks_answer_where_node_ports_do() {
    let mut web = service("web", "10.96.0.1");
    web.service_type = ServiceType::LoadBalancer;
    web.external_policy = TrafficPolicy::Local;
    web.health_check_node_port = 32000;
    let node =
        NodeView { addresses: vec![ip("192.0.2.1"), ip("10.9.0.1"), ip("2001:db8::1")], ..node_view() };
    let answers = |web: &Service, ranges: &[&str]| {
        let mut snapshot = ClusterSnapshot::default();
        snapshot.apply(Event::Service(web.clone()));
        let ranges =
            ranges.iter().map(|range| NodePortAddress::Range(range.parse().expect("a range"))).collect();
        let config = CompileConfig { node_port_addresses: ranges, ..CompileConfig::default() };
        compile(&snapshot, &node, &config).table.health_checks[&web.name].addresses.clone()
    };
    assert_eq!(answers(&web, &[]), None);
    assert_eq!(answers(&web, &["192.0.2.0/24", "2001:db8::/64"]), Some(BTreeSet::from([ip("192.0.2.1")])));
    assert_eq!(answers(&web, &["203.0.113.0/24"]), Some(BTreeSet::new()));
    // All addresses are one server, whether they are said or not, and those that come later are among them.
    assert_eq!(answers(&web, &["0.0.0.0/0"]), None);
    assert_eq!(answers(&web, &["192.0.2.0/24", "0.0.0.0/0"]), None);
    assert_eq!(answers(&web, &["2001:db8::/64"]), None);
    web.cluster_ips.push(ip("fd00:96::1"));
    let both = BTreeSet::from([ip("192.0.2.1"), ip("2001:db8::1")]);
    assert_eq!(answers(&web, &["192.0.2.0/24", "2001:db8::/64"]), Some(both));
    assert_eq!(answers(&web, &["192.0.2.0/24", "::/0"]), None);
}

#[test]
fn masquerade_all_masquerades_all_but_policy_local() {
    let mut web = service("web", "10.96.0.1");
    web.external_ips = vec![ip("198.51.100.1")];
    let mut snapshot = ClusterSnapshot::default();
    snapshot.apply(Event::Service(web));
    let config = CompileConfig { masquerade_all: true, ..CompileConfig::default() };
    let text = compile(&snapshot, &node_view(), &config).table.to_string();
    assert_eq!(text.matches("external=cluster/reject/masq-always").count(), 2, "{text}");
    assert_eq!(text.matches("internal=cluster/reject/masq-always").count(), 1, "{text}");
}

fn pod(name: &str, addr: &str, port_name: &str, port: u16) -> Pod {
    Pod {
        name: ObjectName::new("default", name),
        labels: BTreeMap::from([("app".into(), "web".into())]),
        ips: vec![ip(addr)],
        node: Some("node-1".into()),
        ready: true,
        terminating: false,
        ports: vec![ContainerPort { name: port_name.into(), protocol: Protocol::Tcp, port }],
    }
}

#[test]
fn named_target_ports_are_each_pods_own() {
    let mut web = service("web", "10.96.0.1");
    web.ports[0].target = TargetPort::Name("www".into());
    let events = vec![
        Event::Service(web),
        Event::Pod(pod("a", "10.1.0.1", "www", 8080)),
        Event::Pod(pod("b", "10.1.0.2", "www", 9090)),
        Event::Pod(pod("c", "10.1.0.3", "other", 80)),
    ];
    check(
        events,
        expect![[r#"
        service default/web:http TCP IPv4
          backend 10.1.0.1:8080 cluster-list here
          backend 10.1.0.2:9090 cluster-list here
        frontend 10.96.0.1:80/TCP             ClusterIP    default/web:http  external=cluster/drop/masq-remote internal=cluster/drop/keep
    "#]],
    );
}

#[test]
fn incremental_compiles_end_equal_to_a_fresh_one() {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |limit: u32| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u32 % limit
    };
    let mut compiler = Compiler::new(CompileConfig::default(), node_view());
    let mut mirror = ServiceTable::default();
    for step in 0..400 {
        let i = random(6);
        let event = match random(7) {
            0 => Event::ServiceGone(synthetic::service(i).name),
            1 => Event::EndpointSliceGone(synthetic::slice(i, 1, 0).name),
            2 => {
                let mut slice = synthetic::slice(i, 1 + random(4), random(3));
                let port = &mut slice.ports[0];
                (port.name, port.protocol) = name_and_protocol(&mut random);
                Event::EndpointSlice(slice)
            }
            3 => Event::Node(Node {
                name: format!("node-{i}").into(),
                addresses: vec![ip(&format!("192.0.2.{}", random(4)))],
                zone: None,
                pod_cidrs: Vec::new(),
                eligible: true,
            }),
            _ => {
                let mut service = synthetic::service(i);
                service.created_unix_secs = i64::from(random(3));
                service.external_ips = vec![ip(&format!("192.0.2.{}", random(4)))];
                service.ports[0] =
                    ServicePort { node_port: 30000 + random(3) as u16, ..service.ports[0].clone() };
                // The same number under another name, and a name that changes its protocol.
                let port = &mut service.ports[0];
                (port.name, port.protocol) = name_and_protocol(&mut random);
                service.service_type = ServiceType::LoadBalancer;
                for policy in [&mut service.external_policy, &mut service.internal_policy] {
                    *policy = [TrafficPolicy::Cluster, TrafficPolicy::Local][random(2) as usize];
                }
                service.health_check_node_port = 32000 * random(2) as u16;
                Event::Service(service)
            }
        };
        compiler.apply(event);
        if random(3) == 0 {
            continue;
        }
        let changes = compiler.compile();
        let fresh = compile(compiler.snapshot(), &node_view(), &CompileConfig::default());
        assert_eq!(compiler.table(), &fresh.table, "step {step}");
        carry(&mut mirror, compiler.table(), &changes);
        assert_eq!(&mirror, compiler.table(), "step {step}: the changes named don't cover the difference");
    }
}

fn name_and_protocol(random: &mut impl FnMut(u32) -> u32) -> (Arc<str>, Protocol) {
    let name = ["http", "web"][random(2) as usize].into();
    (name, [Protocol::Tcp, Protocol::Tcp, Protocol::Udp][random(3) as usize])
}

/// What a datapath does: looks only at the keys it is told.
fn carry(mirror: &mut ServiceTable, table: &ServiceTable, changes: &Changes) {
    fn copy<K: Ord + Clone, V: Clone>(to: &mut BTreeMap<K, V>, from: &BTreeMap<K, V>, keys: &BTreeSet<K>) {
        for key in keys {
            match from.get(key) {
                Some(value) => drop(to.insert(key.clone(), value.clone())),
                None => drop(to.remove(key)),
            }
        }
    }
    copy(&mut mirror.services, &table.services, &changes.services);
    copy(&mut mirror.frontends, &table.frontends, &changes.frontends);
    copy(&mut mirror.vips, &table.vips, &changes.vips);
    copy(&mut mirror.health_checks, &table.health_checks, &changes.health_checks);
    if !changes.is_empty() {
        mirror.endpoints = table.endpoints;
        mirror.without_local.clone_from(&table.without_local);
    }
}

/// A Node of this name that says so of itself.
fn node(name: &str, zone: Option<&str>, addresses: &[&str], pod_cidrs: &[&str]) -> Event {
    Event::Node(Node {
        name: name.into(),
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        zone: zone.map(Into::into),
        pod_cidrs: pod_cidrs.iter().map(|text| text.parse().expect("a range")).collect(),
        eligible: true,
    })
}

#[test]
fn what_its_node_said_outlives_the_object() {
    let addresses = vec![ip("192.0.2.1"), ip("192.0.2.9")];
    let view = NodeView { name: "node-1".into(), addresses, ..NodeView::default() };
    let config =
        CompileConfig { node_port_addresses: vec![NodePortAddress::Primary], ..CompileConfig::default() };
    let mut compiler = Compiler::new(config, view);
    let mut web = service("web", "10.96.0.1");
    web.service_type = ServiceType::NodePort;
    web.ports[0].node_port = 30080;
    let hints = hinted(&[("a", ""), ("b", "")]);
    compiler.apply(Event::Service(web));
    compiler.apply(Event::EndpointSlice(hints));
    compiler.apply(node("node-1", Some("a"), &["192.0.2.1"], &["10.244.1.0/24"]));
    compiler.compile();
    let before = compiler.table().clone();
    assert!(before.vips.contains_key(&ip("192.0.2.1")), "a NodePort at its primary address\n{before}");

    compiler.apply(Event::NodeGone("node-1".into()));
    assert!(compiler.compile().is_empty(), "deleted\n{}", compiler.table());
    compiler.apply(node("node-1", Some("a"), &[], &[]));
    assert!(compiler.compile().is_empty(), "made anew\n{}", compiler.table());
    assert_eq!(compiler.table(), &before);
    let ranges = compiler.node().map(|node| node.pod_cidrs.clone());
    assert_eq!(ranges, Some(vec!["10.244.1.0/24".parse().expect("a range")]));

    compiler.apply(node("node-1", Some("b"), &["192.0.2.9"], &[]));
    compiler.compile();
    assert_ne!(compiler.table(), &before, "and changes with what it says");
    assert!(compiler.table().vips.contains_key(&ip("192.0.2.9")));
}

#[test]
fn another_node_changes_what_its_addresses_are_and_no_more() {
    let mut compiler = Compiler::new(CompileConfig::default(), node_view());
    let mut web = service("web", "10.96.0.1");
    web.external_ips = vec![ip("198.51.100.7")];
    compiler.apply(Event::Service(web));
    compiler.apply(Event::Service(service("api", "10.96.0.2")));
    compiler.compile();
    let mut step = |event: Event| {
        compiler.apply(event);
        let changes = compiler.compile();
        let kind = compiler.table().vips[&ip("198.51.100.7")];
        (changes.vips.into_iter().collect::<Vec<_>>(), changes.services.len() + changes.frontends.len(), kind)
    };
    let vip = vec![ip("198.51.100.7")];
    assert_eq!(step(node("node-2", None, &["192.0.2.2"], &[])), (vec![], 0, VipKind::Vip));
    let taken = node("node-2", None, &["192.0.2.2", "198.51.100.7"], &[]);
    assert_eq!(step(taken.clone()), (vip.clone(), 0, VipKind::NodeAddress));
    assert_eq!(step(taken), (vec![], 0, VipKind::NodeAddress));
    let shared = node("node-3", None, &["198.51.100.7"], &[]);
    assert_eq!(step(shared), (vec![], 0, VipKind::NodeAddress));
    assert_eq!(step(Event::NodeGone("node-2".into())), (vec![], 0, VipKind::NodeAddress));
    assert_eq!(step(Event::NodeGone("node-3".into())), (vip, 0, VipKind::Vip));
}
