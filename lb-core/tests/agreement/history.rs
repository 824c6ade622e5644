//! What happens to a cluster, at random: its objects come, change, go and come again, in any order, and so do this node's
//! addresses. A slice may come before its Service, a Service's claims may become another's, an external address may
//! become a node's.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use lb_core::model::{
    ContainerPort, Event, Family, Node, ObjectName, Pod, Protocol, Service, ServiceCidr, TargetPort,
};

use super::random::{EXTERNAL, OTHER, OWN, PODS_HERE, Random, Scene, ip, net, service, slice};

/// Services of a history; of the last one endpoints are derived from Pods, as long as it has no slice.
const SERVICES: usize = 5;

/// One thing that happens.
#[derive(Clone, Debug)]
pub enum Step {
    /// To the cluster.
    Event(Event),
    /// This node has these addresses now.
    Addresses(Vec<IpAddr>),
}

impl Scene {
    /// The next thing that happens; the scene has it in.
    pub fn happen(&mut self, random: &mut Random) -> Step {
        let step = self.step(random);
        match &step {
            Step::Event(event) => {
                let seen = self.cluster.seen_by(&self.node.name, event.clone());
                seen.into_iter().for_each(|event| drop(self.cluster.apply(event)));
            }
            Step::Addresses(addresses) => self.node.addresses.clone_from(addresses),
        }
        step
    }

    fn step(&self, random: &mut Random) -> Step {
        let i = random.below(SERVICES);
        Step::Event(match random.below(22) {
            0..6 => match self.cluster.service(&name(i)) {
                Some(known) if random.once_in(3) => Event::Service(like(known, random)),
                _ => Event::Service(some_service(i, random)),
            },
            6..8 => Event::ServiceGone(name(i)),
            8..13 => {
                let (family, number) = which(random);
                let mut slice = slice(&some_service(i, random), family, number, random);
                if random.once_in(8) {
                    slice.service = name(random.below(SERVICES));
                }
                Event::EndpointSlice(slice)
            }
            13..16 => {
                let (family, number) = which(random);
                Event::EndpointSliceGone(ObjectName::new("default", format!("svc-{i}-{family}-{number}")))
            }
            16 => Event::Pod(pod(random)),
            17 => Event::PodGone(pod(random).name),
            18 => Event::Node(node(random)),
            19 => Event::NodeGone((*random.pick(&["node-1", "node-2", "node-3"])).into()),
            20 if random.once_in(2) => Event::ServiceCidr(ServiceCidr {
                name: "more".into(),
                cidrs: random.some(2, &["10.96.0.0/16", "fd00:10:96::/112"].map(net)),
            }),
            20 => Event::ServiceCidrGone("more".into()),
            _ => {
                return Step::Addresses(
                    random.some(2, &[&OWN[..], &EXTERNAL[..2]].concat()).into_iter().map(ip).collect(),
                );
            }
        })
    }
}

fn name(i: usize) -> ObjectName {
    ObjectName::new("default", format!("svc-{i}"))
}

/// Slices of a Service have few names, so that the same come again.
fn which(random: &mut Random) -> (Family, usize) {
    *random.pick(&[(Family::V4, 0), (Family::V6, 0), (Family::V4, 1)])
}

/// A Service of this name, now and then with another's addresses and NodePorts.
fn some_service(i: usize, random: &mut Random) -> Service {
    let like = if random.once_in(6) { random.below(SERVICES) } else { i };
    let mut service = service(like, random);
    service.name = name(i);
    service.health_check_node_port = if random.once_in(2) { 32_000 + i as u16 } else { 0 };
    service.publish_not_ready = random.once_in(3);
    if i + 1 == SERVICES {
        service.selector = BTreeMap::from([("app".into(), "pods".into())]);
        if let Some(port) = service.ports.first_mut().filter(|_| random.once_in(2)) {
            port.target = TargetPort::Name("named".into());
        }
    }
    service
}

/// The Service, made anew or with a little change.
fn like(known: &Service, random: &mut Random) -> Service {
    let mut service = known.clone();
    match random.below(4) {
        0 | 1 => service.created_unix_secs = random.below(3) as i64,
        2 => service.affinity_secs = random.once_in(2).then_some(10),
        _ => drop(service.external_ips.pop()),
    }
    service
}

fn pod(random: &mut Random) -> Pod {
    let i = random.below(2);
    let port = ContainerPort { name: "named".into(), protocol: Protocol::Tcp, port: 9000 + i as u16 };
    Pod {
        name: ObjectName::new("default", format!("pod-{i}")),
        labels: if random.once_in(4) {
            BTreeMap::new()
        } else {
            BTreeMap::from([("app".into(), "pods".into())])
        },
        ips: [PODS_HERE[i], PODS_HERE[2 + i]].map(ip).to_vec(),
        node: Some("node-1".into()),
        ready: !random.once_in(3),
        terminating: random.once_in(3),
        ports: if random.once_in(4) { Vec::new() } else { vec![port] },
    }
}

/// This node, another, and a third that takes addresses which may be Services'.
fn node(random: &mut Random) -> Node {
    let (name, addresses) =
        *random.pick(&[("node-1", &OWN[..]), ("node-2", &OTHER[..]), ("node-3", &EXTERNAL[..5])]);
    let zone = *random.pick(&[Some("a"), Some("b"), None]);
    Node {
        name: name.into(),
        addresses: random.some(2, addresses).into_iter().map(ip).collect(),
        zone: zone.map(Arc::from),
        pod_cidrs: random.some(2, &["10.244.1.0/24", "fd00:10:244:1::/64"].map(net)),
        eligible: !random.once_in(4),
    }
}
