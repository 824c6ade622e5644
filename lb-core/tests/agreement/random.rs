//! Clusters and flows at random, the same for the same seed. They hold everything that has a rule of its own: both
//! families, all addresses a Service can have (nodes' own among them), policies, hints, every condition of endpoints,
//! Services that claim one address, pods on the node's network, and clients of every kind.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use lb_core::{
    compile::{CompileConfig, NodeView},
    flow::{Dialect, Flow, Origin},
    model::{
        Endpoint, EndpointSlice, Event, Family, LocalDetector, Node, NodePortAddress, ObjectName, Protocol,
        Service, ServicePort, ServiceType, SlicePort, TargetPort, TrafficPolicy,
    },
    oracle::Policy,
    rules::iptables,
    snapshot::ClusterSnapshot,
};

/// xorshift64: the same numbers at every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % limit
    }

    /// True once in so many times.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Each element once in so many times.
    pub fn some<T: Clone>(&mut self, n: usize, from: &[T]) -> Vec<T> {
        from.iter().filter(|_| self.once_in(n)).cloned().collect()
    }
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub fn net(text: &str) -> IpNet {
    text.parse().expect("a range")
}

/// This node's addresses, and where packets to nobody's address come from.
pub const OWN: [&str; 3] = ["192.0.2.11", "10.0.0.11", "2001:db8::11"];
/// The other node's.
pub const OTHER: [&str; 2] = ["192.0.2.12", "2001:db8::12"];
pub const PODS_HERE: [&str; 4] = ["10.244.1.11", "10.244.1.12", "fd00:10:244:1::11", "fd00:10:244:1::12"];
const PODS_THERE: [&str; 4] = ["10.244.2.11", "10.244.2.12", "fd00:10:244:2::11", "fd00:10:244:2::12"];
const CLIENTS: [&str; 3] = ["192.0.2.9", "203.0.113.5", "2001:db8::9"];
pub const EXTERNAL: [&str; 7] = [
    "198.51.100.1",
    "198.51.100.2",
    "192.0.2.11",
    "192.0.2.12",
    "2001:db8:ffff::1",
    "127.0.0.1",
    "169.254.0.1",
];
const LOAD_BALANCER: [&str; 5] =
    ["198.51.100.1", "198.51.100.3", "10.0.0.11", "192.0.2.12", "2001:db8:ffff::3"];
const SOURCE_RANGES: [&str; 5] =
    ["203.0.113.0/24", "192.0.2.0/24", "10.244.1.11/32", "2001:db8::/32", "0.0.0.0/0"];
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// A cluster as one of its nodes sees it, and what the operator of that node chose.
pub struct Scene {
    pub cluster: ClusterSnapshot,
    pub node: NodeView,
    pub policy: Policy,
}

impl Scene {
    pub fn random(random: &mut Random) -> Self {
        let mut cluster = ClusterSnapshot::default();
        for (name, addresses, zone) in [("node-1", &OWN[..], "a"), ("node-2", &OTHER[..], "b")] {
            cluster.apply(Event::Node(Node {
                name: name.into(),
                addresses: addresses.iter().map(|addr| ip(addr)).collect(),
                zone: (!random.once_in(6)).then(|| zone.into()),
                pod_cidrs: Vec::new(),
                eligible: true,
            }));
        }
        for i in 0..1 + random.below(3) {
            let service = service(i, random);
            for (family, number) in [(Family::V4, 0), (Family::V6, 0), (Family::V4, 1)] {
                if !random.once_in(4) {
                    cluster.apply(Event::EndpointSlice(slice(&service, family, number, random)));
                }
            }
            cluster.apply(Event::Service(service));
        }
        Self { cluster, ..Self::empty(random) }
    }

    /// The node and its operator's choices, before anything is known of the cluster.
    pub fn empty(random: &mut Random) -> Self {
        let node = NodeView {
            name: "node-1".into(),
            zone: None,
            addresses: OWN.iter().map(|addr| ip(addr)).collect(),
            primary: Vec::new(),
        };
        Self { cluster: ClusterSnapshot::default(), node, policy: policy(random) }
    }

    /// What the compiler takes of the policy, and of the datapath it works for.
    pub fn compile_config(&self, dialect: Dialect) -> CompileConfig {
        CompileConfig {
            node_port_addresses: self.policy.node_port_addresses.clone(),
            localhost_node_ports: self.policy.localhost_node_ports,
            node_ip: None,
            masquerade_all: self.policy.masquerade_all,
            external_ips: self.policy.external_ips,
            sctp: dialect != Dialect::Ebpf,
        }
    }

    /// What netfilter rules take of it.
    pub fn rules_config(&self) -> iptables::Config {
        iptables::Config {
            masquerade_all: self.policy.masquerade_all,
            pods: self.policy.pods.clone(),
            localhost_node_ports: self.policy.localhost_node_ports,
            node_port_addresses: self.policy.node_port_addresses.clone(),
            accounting: true,
            ..iptables::Config::default()
        }
    }

    /// Some client dials something: mostly what a Service has, now and then its neighbour.
    pub fn flow(&self, random: &mut Random) -> Flow {
        let services: Vec<&Service> = self.cluster.services().collect();
        let service = *random.pick(&services);
        let port = random.pick(&service.ports);
        let mut dsts = [&service.cluster_ips[..], &service.external_ips, &service.load_balancer_ips].concat();
        let own = OWN.map(ip);
        let to_node = dsts.is_empty() || random.once_in(3);
        if to_node {
            dsts = own.to_vec();
            dsts.extend(["127.0.0.1", "127.0.0.2", "::1", "192.0.2.12"].map(ip));
        }
        let dst = *random.pick(&dsts);
        let mut number = if to_node && port.node_port != 0 { port.node_port } else { port.port };
        if random.once_in(10) {
            number = *random.pick(&[7, 80, 443, 30_080]);
        }
        let protocol = if random.once_in(10) { *random.pick(&PROTOCOLS) } else { port.protocol };
        let origin = *random.pick(&[Origin::Outside, Origin::Pod, Origin::PodSocket, Origin::Node]);
        let sources = match origin {
            Origin::Outside => [&CLIENTS[..], &PODS_THERE, &OTHER].concat(),
            Origin::Pod | Origin::PodSocket => PODS_HERE.to_vec(),
            Origin::Node if dst.is_loopback() => vec!["127.0.0.1", "::1"],
            Origin::Node => OWN.to_vec(),
        };
        let of_family = |addr: &IpAddr| Family::of(*addr) == Family::of(dst);
        let sources: Vec<IpAddr> = sources.into_iter().map(ip).filter(of_family).collect();
        Flow { origin, source: *random.pick(&sources), dst, port: number, protocol }
    }

    /// Who answers a UDP flow: mostly somebody who may be an endpoint, else what was dialled.
    pub fn udp_answerer(&self, dialled: SocketAddr, random: &mut Random) -> SocketAddr {
        let of_family = |addr: &IpAddr| Family::of(*addr) == Family::of(dialled.ip());
        let pods = [PODS_HERE, PODS_THERE].concat().into_iter().map(ip).filter(of_family);
        match random.once_in(6) {
            true => dialled,
            false => {
                SocketAddr::new(*random.pick(&pods.collect::<Vec<_>>()), *random.pick(&[8080, 8080, 8443]))
            }
        }
    }
}

fn policy(random: &mut Random) -> Policy {
    let node_port_addresses: &[&[&str]] = &[
        &[],
        &[],
        &["primary"],
        &["192.0.2.0/24", "2001:db8::/32"],
        &["10.0.0.0/8", "127.0.0.0/8"],
        &["0.0.0.0/0", "2001:db8::99/128"],
    ];
    let address = |text: &&str| match *text {
        "primary" => NodePortAddress::Primary,
        range => NodePortAddress::Range(net(range)),
    };
    let cluster_cidrs: &[&[&str]] = &[
        &[],
        &["10.244.0.0/16", "fd00:10:244::/48"],
        &["10.244.0.0/16", "fd00:10:244::/48"],
        &["10.244.0.0/16"],
    ];
    let nets = |texts: &[&str]| texts.iter().map(|text| net(text)).collect();
    Policy {
        node_port_addresses: node_port_addresses[random.below(node_port_addresses.len())]
            .iter()
            .map(address)
            .collect(),
        localhost_node_ports: !random.once_in(4),
        masquerade_all: random.once_in(4),
        external_ips: !random.once_in(8),
        pods: match random.below(6) {
            0 => LocalDetector::Bridge("cni0".into()),
            1 => LocalDetector::DevicePrefix("veth".into()),
            _ => LocalDetector::Ranges(nets(cluster_cidrs[random.below(cluster_cidrs.len())])),
        },
    }
}

fn traffic_policy(random: &mut Random) -> TrafficPolicy {
    if random.once_in(3) { TrafficPolicy::Local } else { TrafficPolicy::Cluster }
}

/// The `i`-th Service.
pub fn service(i: usize, random: &mut Random) -> Service {
    let (v4, v6) = (ip(&format!("10.96.0.{}", i + 1)), ip(&format!("fd00:10:96::{}", i + 1)));
    let cluster_ips = [vec![v4], vec![v4, v6], vec![v4, v6], vec![v6], Vec::new()];
    let mut ports: Vec<ServicePort> = Vec::new();
    for (n, (name, protocol, port)) in [
        ("http", Protocol::Tcp, 80),
        ("dns", Protocol::Udp, 80),
        ("https", Protocol::Tcp, 443),
        ("s", Protocol::Sctp, 80),
    ]
    .into_iter()
    .enumerate()
    {
        if ports.is_empty() || random.once_in(3) {
            ports.push(ServicePort {
                name: name.into(),
                protocol,
                port,
                // The API server gives each number once.
                node_port: if random.once_in(2) { 30_080 + (i * 4 + n) as u16 } else { 0 },
                target: TargetPort::Number(8080),
            });
        }
    }
    Service {
        name: ObjectName::new("default", format!("svc-{i}")),
        uid: Arc::from(""),
        created_unix_secs: random.below(2) as i64,
        service_type: ServiceType::LoadBalancer,
        cluster_ips: cluster_ips[random.below(cluster_ips.len())].clone(),
        external_ips: random.some(4, &EXTERNAL.map(ip)),
        load_balancer_ips: random.some(4, &LOAD_BALANCER.map(ip)),
        source_ranges: random.some(5, &SOURCE_RANGES.map(net)),
        external_policy: traffic_policy(random),
        internal_policy: traffic_policy(random),
        health_check_node_port: 0,
        affinity_secs: random.once_in(4).then_some(60),
        publish_not_ready: false,
        selector: BTreeMap::new(),
        ports,
    }
}

/// Endpoints of one family: pods of both nodes, and pods on the nodes' own network.
pub fn slice(service: &Service, family: Family, number: usize, random: &mut Random) -> EndpointSlice {
    let hinted = random.below(4);
    let mut endpoints = Vec::new();
    let kind = random.below(3);
    for (addrs, node) in [
        (&PODS_HERE[..], "node-1"),
        (&OWN[..], "node-1"),
        (&PODS_THERE[..], "node-2"),
        (&OTHER[..], "node-2"),
    ] {
        // Some Services have endpoints on one of the nodes only.
        if kind == 1 && node == "node-1" || kind == 2 && node == "node-2" {
            continue;
        }
        for addr in addrs.iter().map(|addr| ip(addr)).filter(|addr| Family::of(*addr) == family) {
            if !random.once_in(3) {
                continue;
            }
            // Ready, ready though it goes or does not serve yet (publishNotReadyAddresses), draining, starting, gone.
            let conditions = [
                (true, true, false),
                (true, true, true),
                (true, false, false),
                (false, true, true),
                (false, false, false),
                (false, false, true),
            ];
            let (ready, serving, terminating) =
                if random.once_in(2) { conditions[0] } else { *random.pick(&conditions) };
            let hints = |random: &mut Random, names: [&str; 2]| -> Vec<Arc<str>> {
                let hints = random.some(2, &names.map(Arc::from));
                // Hints count only if all have them.
                if hints.is_empty() && !random.once_in(6) {
                    vec![Arc::from(*random.pick(&names))]
                } else {
                    hints
                }
            };
            endpoints.push(Endpoint {
                addr,
                ready,
                serving,
                terminating,
                node: Some(node.into()),
                zone_hints: if hinted & 1 != 0 { hints(random, ["a", "b"]) } else { Vec::new() },
                node_hints: if hinted & 2 != 0 { hints(random, ["node-1", "node-2"]) } else { Vec::new() },
            });
        }
    }
    let ports = service.ports.iter().map(|port| SlicePort {
        name: port.name.clone(),
        protocol: port.protocol,
        port: 8000 + port.port,
    });
    EndpointSlice {
        triggered: None,
        name: ObjectName::new("default", format!("{}-{family}-{number}", service.name.name)),
        service: service.name.clone(),
        family,
        ports: ports.collect(),
        endpoints,
    }
}
