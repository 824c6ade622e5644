//! Which endpoints may serve: readiness, termination, topology hints, locality (kube-proxy 1.36 `topology.go`
//! `CategorizeEndpoints`, `endpointslicecache.go`).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::NodeView;
use crate::{
    model::{Endpoint, EndpointSlice, Family, Service, ServicePort, ServiceType, TrafficPolicy},
    table::{Backend, ServiceEntry},
};

/// A service port's backends, and whether there is any endpoint at all.
pub(super) struct Categorized {
    pub(super) entry: ServiceEntry,
    pub(super) has_any: bool,
}

/// Sorts one service port's endpoints into lists.
pub(super) fn categorize(
    service: &Service,
    port: &ServicePort,
    family: Family,
    slices: &[EndpointSlice],
    node: &NodeView,
    externally_accessible: bool,
) -> Categorized {
    let endpoints = of_port(port, family, slices);
    let uses_cluster = service.internal_policy != TrafficPolicy::Local || externally_accessible;
    let uses_local = service.internal_policy == TrafficPolicy::Local
        || (service.external_policy == TrafficPolicy::Local && externally_accessible);
    let is_local = |endpoint: &Endpoint| endpoint.node.as_deref() == Some(&*node.name);
    let backend = |((addr, port), endpoint): (&(IpAddr, u16), &&Endpoint)| Backend {
        addr: *addr,
        port: *port,
        local: is_local(endpoint),
        own_address: node.addresses.contains(addr),
        terminating: endpoint.terminating,
    };
    let pick = |wanted: &dyn Fn(&Endpoint) -> bool| -> Vec<Backend> {
        endpoints.iter().filter(|(_, endpoint)| wanted(endpoint)).map(backend).collect()
    };
    let draining = |endpoint: &Endpoint| endpoint.serving && endpoint.terminating;

    let mut cluster = Vec::new();
    if uses_cluster {
        let mode = topology(endpoints.values().copied().filter(|endpoint| endpoint.ready), node);
        cluster = pick(&|endpoint| endpoint.ready && mode.allows(endpoint, node));
        if cluster.is_empty() {
            cluster = pick(&draining);
        }
    }
    let mut local = Vec::new();
    let mut has_any = !cluster.is_empty();
    if uses_local {
        local = pick(&|endpoint| endpoint.ready && is_local(endpoint));
        if local.is_empty() {
            local = pick(&|endpoint| draining(endpoint) && is_local(endpoint));
        }
        has_any |= endpoints.values().any(|endpoint| endpoint.ready || draining(endpoint));
    }
    let of = |serving| {
        let of = endpoints.iter().filter(move |(_, endpoint)| endpoint.serving == serving);
        of.map(|(key, _)| *key).collect()
    };
    let (serving, not_serving) = (of(true), of(false));
    let health_check_node_port = health_check_node_port(service);
    let (created_unix_secs, affinity_secs) = (service.created_unix_secs, service.affinity_secs);
    Categorized {
        entry: ServiceEntry {
            created_unix_secs,
            affinity_secs,
            health_check_node_port,
            cluster,
            local,
            serving,
            not_serving,
        },
        has_any,
    }
}

/// The port on which load balancers ask for a Service, 0 for none.
pub(super) fn health_check_node_port(service: &Service) -> u16 {
    match (service.service_type, service.external_policy) {
        (ServiceType::LoadBalancer, TrafficPolicy::Local) => service.health_check_node_port,
        _ => 0,
    }
}

/// How many ready endpoints a Service has on this node, whatever their ports. One with addresses of both families is in
/// slices of both, and counts once.
pub(super) fn ready_here(slices: &[EndpointSlice], node: &NodeView) -> usize {
    let of_family = |family: Family| {
        let endpoints = slices.iter().filter(|slice| slice.family == family && !slice.ports.is_empty());
        let ready = endpoints
            .flat_map(|slice| &slice.endpoints)
            .filter(|endpoint| endpoint.ready && endpoint.node.as_deref() == Some(&*node.name));
        ready.map(|endpoint| endpoint.addr).collect::<BTreeSet<IpAddr>>().len()
    };
    of_family(Family::V4).max(of_family(Family::V6))
}

/// The port's endpoints by address and port; of two with the same, one that isn't terminating wins.
fn of_port<'a>(
    port: &ServicePort,
    family: Family,
    slices: &'a [EndpointSlice],
) -> BTreeMap<(IpAddr, u16), &'a Endpoint> {
    let mut endpoints = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        let numbers = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
        for number in numbers.map(|port| port.port) {
            for endpoint in slice.endpoints.iter().filter(|endpoint| Family::of(endpoint.addr) == family) {
                let known = endpoints.entry((endpoint.addr, number)).or_insert(endpoint);
                if known.terminating && !endpoint.terminating {
                    *known = endpoint;
                }
            }
        }
    }
    endpoints
}

/// Which ready endpoints the EndpointSlice hints leave to this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Topology {
    Anywhere,
    SameZone,
    SameNode,
}

impl Topology {
    fn allows(self, endpoint: &Endpoint, node: &NodeView) -> bool {
        match self {
            Self::Anywhere => true,
            Self::SameNode => endpoint.node_hints.contains(&node.name),
            Self::SameZone => node.zone.as_ref().is_some_and(|zone| endpoint.zone_hints.contains(zone)),
        }
    }
}

/// A hint mode holds only if every ready endpoint has such hints and one of them names this node or zone.
fn topology<'a>(ready: impl Iterator<Item = &'a Endpoint> + Clone, node: &NodeView) -> Topology {
    for (mode, hinted) in [
        (Topology::SameNode, (|e| !e.node_hints.is_empty()) as fn(&Endpoint) -> bool),
        (Topology::SameZone, |e| !e.zone_hints.is_empty()),
    ] {
        if ready.clone().all(hinted) && ready.clone().any(|endpoint| mode.allows(endpoint, node)) {
            return mode;
        }
    }
    Topology::Anywhere
}
