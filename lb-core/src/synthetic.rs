//! Clusters of any size, for benchmarks and tests.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use crate::model::{
    Endpoint, EndpointSlice, Event, Family, ObjectName, Protocol, Service, ServicePort, ServiceType,
    SlicePort, TargetPort, TrafficPolicy,
};

/// Events that make `services` Services (ClusterIP 10.96.0.1 and on, port 80) with `endpoints` ready endpoints each,
/// spread over 100 nodes.
pub fn cluster(services: u32, endpoints: u32) -> impl Iterator<Item = Event> {
    (0..services)
        .flat_map(move |i| [Event::Service(service(i)), Event::EndpointSlice(slice(i, endpoints, 0))])
}

/// The `i`-th Service.
pub fn service(i: u32) -> Service {
    Service {
        name: name(i),
        uid: Arc::from(""),
        created_unix_secs: i64::from(i),
        service_type: ServiceType::ClusterIp,
        cluster_ips: vec![IpAddr::V4(Ipv4Addr::from(0x0a60_0001 + i))],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        health_check_node_port: 0,
        affinity_secs: None,
        publish_not_ready: false,
        selector: BTreeMap::new(),
        ports: vec![ServicePort {
            name: Arc::from("http"),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: 0,
            target: TargetPort::Number(8080),
        }],
    }
}

/// The `i`-th Service's endpoints, of which the last has another address in each `version`.
pub fn slice(i: u32, endpoints: u32, version: u32) -> EndpointSlice {
    let endpoint = |e: u32| Endpoint {
        addr: IpAddr::V4(Ipv4Addr::from(
            0x0b00_0000 + i * endpoints + e + if e + 1 == endpoints { version << 22 } else { 0 },
        )),
        ready: true,
        serving: true,
        terminating: false,
        node: Some(Arc::from(format!("node-{}", (i + e) % 100))),
        zone_hints: Vec::new(),
        node_hints: Vec::new(),
    };
    EndpointSlice {
        triggered: None,
        name: ObjectName::new("default", format!("svc-{i}-slice")),
        service: name(i),
        family: Family::V4,
        ports: vec![SlicePort { name: Arc::from("http"), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: (0..endpoints).map(endpoint).collect(),
    }
}

fn name(i: u32) -> ObjectName {
    ObjectName::new("default", format!("svc-{i}"))
}
