//! Which frontends a Service has on this node, and how each scope of them is served (kube-proxy 1.36
//! `serviceport.go`, `iptables/proxier.go`).

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::IpNet;
use litemap::LiteMap;

use super::{CompileConfig, NodeView, endpoints};
use crate::{
    model::{EndpointSlice, Family, NodePortAddress, Protocol, Service, ServicePort, TrafficPolicy, Warning},
    table::{
        BackendList, Frontend, FrontendAddr, FrontendKind, HealthCheck, Masquerade, NoBackends, Scope,
        ServiceEntry, ServicePortId, Traffic,
    },
};

/// One Service, resolved on its own: claims on frontends, not yet weighed against other Services'.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Resolved {
    pub(super) entries: LiteMap<ServicePortId, ServiceEntry>,
    pub(super) frontends: LiteMap<FrontendAddr, Frontend>,
    pub(super) health_check: Option<HealthCheck>,
    /// One for each service port and policy that has endpoints elsewhere only.
    pub(super) without_local: Vec<(Family, Traffic)>,
    pub(super) warnings: Vec<Warning>,
}

impl Resolved {
    /// To be kept: there is one for each Service, and most have one port.
    pub(super) fn shrunk(mut self) -> Self {
        self.entries = without_spare_room(self.entries);
        self.frontends = without_spare_room(self.frontends);
        self
    }
}

fn without_spare_room<K: Ord, V>(map: LiteMap<K, V>) -> LiteMap<K, V> {
    let mut pairs = map.into_tuple_vec();
    pairs.shrink_to_fit();
    LiteMap::from_sorted_store_unchecked(pairs)
}

/// Resolves a Service.
pub(super) fn resolve(
    service: &Service,
    slices: &[EndpointSlice],
    node: &NodeView,
    config: &CompileConfig,
) -> Resolved {
    let mut resolved =
        Resolved { health_check: health_check(service, slices, node, config), ..Resolved::default() };
    let vips = vips(service, config, &mut resolved.warnings);
    let node_ports = config.node_port_addresses(node);
    for (index, port) in service.ports.iter().enumerate() {
        if port.protocol == Protocol::Sctp && !config.sctp {
            resolved.warnings.push(warning(
                service,
                format!("spec.ports[{index}].protocol"),
                "SCTP is not served; the Service's other ports are".into(),
            ));
            continue;
        }
        for family in families(service) {
            let of_family = |addr: &&(IpAddr, FrontendKind)| Family::of(addr.0) == family;
            let mut addrs: Vec<(IpAddr, u16, FrontendKind)> =
                vips.iter().filter(of_family).map(|(addr, kind)| (*addr, port.port, *kind)).collect();
            if port.node_port != 0 {
                addrs.extend(
                    node_ports.iter().filter(of_family).map(|(addr, kind)| (*addr, port.node_port, *kind)),
                );
            }
            if !addrs.is_empty() {
                resolve_port(service, port, family, &addrs, slices, node, config, &mut resolved);
            }
        }
    }
    resolved
}

/// What load balancers are told (kube-proxy: `healthcheck/service_health.go`).
fn health_check(
    service: &Service,
    slices: &[EndpointSlice],
    node: &NodeView,
    config: &CompileConfig,
) -> Option<HealthCheck> {
    let port = endpoints::health_check_node_port(service);
    // As in kube-proxy, one family whose addresses all answer is enough.
    let mut families = [Family::V4, Family::V6].into_iter().filter(|family| has_family(service, *family));
    let selected = families.all(|family| NodePortAddress::select(&config.node_port_addresses, family));
    (port != 0).then(|| HealthCheck {
        port,
        addresses: selected.then(|| {
            let answering = config.node_port_addresses(node).into_iter().map(|(addr, _)| addr);
            answering.filter(|addr| has_family(service, Family::of(*addr))).collect()
        }),
        local_endpoints: endpoints::ready_here(slices, node),
    })
}

#[expect(clippy::too_many_arguments, reason = "one service port in one family; called from one place")]
fn resolve_port(
    service: &Service,
    port: &ServicePort,
    family: Family,
    addrs: &[(IpAddr, u16, FrontendKind)],
    slices: &[EndpointSlice],
    node: &NodeView,
    config: &CompileConfig,
    resolved: &mut Resolved,
) {
    let id = ServicePortId {
        service: service.name.clone(),
        port: port.name.clone(),
        protocol: port.protocol,
        family,
    };
    let externally_accessible =
        port.node_port != 0 || addrs.iter().any(|(_, _, kind)| *kind != FrontendKind::ClusterIp);
    let found = endpoints::categorize(service, port, family, slices, node, externally_accessible);
    if found.has_any && found.entry.local.is_empty() {
        let external = externally_accessible && service.external_policy == TrafficPolicy::Local;
        let internal = service.internal_policy == TrafficPolicy::Local;
        let policies = [(internal, Traffic::Internal), (external, Traffic::External)];
        let local = policies.into_iter().filter(|(is_local, _)| *is_local);
        resolved.without_local.extend(local.map(|(_, traffic)| (family, traffic)));
    }
    let scope = |policy: TrafficPolicy, masquerade| Scope {
        list: match policy {
            TrafficPolicy::Cluster => BackendList::Cluster,
            TrafficPolicy::Local => BackendList::Local,
        },
        none: if found.has_any { NoBackends::Drop } else { NoBackends::Reject },
        masquerade,
    };
    let ranges: Arc<[IpNet]> = source_ranges(service, family);
    for (addr, number, kind) in addrs {
        let all = config.masquerade_all;
        let (external, internal) = match kind {
            FrontendKind::ClusterIp => (
                scope(service.internal_policy, if all { Masquerade::Always } else { Masquerade::Remote }),
                scope(service.internal_policy, if all { Masquerade::Always } else { Masquerade::Never }),
            ),
            _ => (
                match service.external_policy {
                    TrafficPolicy::Local => scope(TrafficPolicy::Local, Masquerade::Never),
                    TrafficPolicy::Cluster if all => scope(TrafficPolicy::Cluster, Masquerade::Always),
                    TrafficPolicy::Cluster => scope(TrafficPolicy::Cluster, Masquerade::Remote),
                },
                // This node's own clients are not cut off by eTP Local, and keep their address.
                scope(TrafficPolicy::Cluster, Masquerade::Never),
            ),
        };
        let source_ranges = if *kind == FrontendKind::LoadBalancer { ranges.clone() } else { Arc::new([]) };
        let allow_host =
            source_ranges.iter().any(|range| node.addresses.iter().any(|own| range.contains(own)));
        let frontend = Frontend {
            service: id.clone(),
            kind: *kind,
            external,
            internal,
            source_ranges_allow_host: allow_host,
            source_ranges,
        };
        // Of two ways to the same frontend the first kind listed wins: see `vips`.
        resolved
            .frontends
            .entry(FrontendAddr { addr: *addr, port: *number, protocol: port.protocol })
            .or_insert(frontend);
    }
    resolved.entries.insert(id, found.entry);
}

/// The Service's families are those of its cluster IPs (kube-proxy runs one proxier a family, and skips a Service
/// without cluster IP in it). A manifest may have none: then its other addresses decide.
fn families(service: &Service) -> Vec<Family> {
    let both = [Family::V4, Family::V6].into_iter();
    both.filter(|family| has_family(service, *family)).collect()
}

fn has_family(service: &Service, family: Family) -> bool {
    service.cluster_ips.is_empty() || service.cluster_ips.iter().any(|addr| Family::of(*addr) == family)
}

/// The Service's addresses, cluster IPs first, then load-balancer IPs, then external IPs, without those that no
/// client could mean.
fn vips(
    service: &Service,
    config: &CompileConfig,
    warnings: &mut Vec<Warning>,
) -> Vec<(IpAddr, FrontendKind)> {
    let external_ips = if config.external_ips { &service.external_ips[..] } else { &[] };
    if external_ips.len() < service.external_ips.len() {
        let problem = "not served: the feature gate AllowServiceExternalIPs is off";
        warnings.push(warning(service, "spec.externalIPs".into(), problem.into()));
    }
    let mut seen = BTreeSet::new();
    let mut vips = Vec::new();
    for (addrs, kind, field) in [
        (&service.cluster_ips[..], FrontendKind::ClusterIp, "spec.clusterIPs"),
        (&service.load_balancer_ips, FrontendKind::LoadBalancer, "status.loadBalancer.ingress"),
        (external_ips, FrontendKind::ExternalIp, "spec.externalIPs"),
    ] {
        for addr in addrs {
            match unusable(*addr) {
                Some(why) => warnings.push(warning(
                    service,
                    field.into(),
                    format!("{addr} is {why}; it is not served"),
                )),
                None if !has_family(service, Family::of(*addr)) => warnings.push(warning(
                    service,
                    field.into(),
                    format!("the Service has no {} cluster IP; {addr} is not served", Family::of(*addr)),
                )),
                None if seen.insert(*addr) => vips.push((*addr, kind)),
                None => {}
            }
        }
    }
    vips
}

/// Why nobody can dial this address from elsewhere.
fn unusable(addr: IpAddr) -> Option<&'static str> {
    let link_local = match addr {
        IpAddr::V4(addr) => addr.is_link_local() || addr.is_broadcast(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    };
    match addr {
        _ if addr.is_unspecified() => Some("the unspecified address"),
        _ if addr.is_loopback() => Some("a loopback address"),
        _ if addr.is_multicast() => Some("a multicast address"),
        _ if link_local => Some("a link-local or broadcast address"),
        _ => None,
    }
}

/// The ranges of one family; a Service whose ranges are all of the other family does not restrict this one
/// (kube-proxy filters per family), nor does one that lets the whole family in (`serviceport.go`, a range of `/0`).
fn source_ranges(service: &Service, family: Family) -> Arc<[IpNet]> {
    let of_family = |range: &&IpNet| Family::of(range.addr()) == family;
    let ranges: Arc<[IpNet]> = service.source_ranges.iter().filter(of_family).copied().collect();
    if ranges.iter().any(|range| range.prefix_len() == 0) { Arc::new([]) } else { ranges }
}

pub(super) fn warning(service: &Service, field: String, problem: String) -> Warning {
    Warning { object: format!("Service {}", service.name), field, problem }
}

impl CompileConfig {
    /// Where this node answers NodePorts.
    fn node_port_addresses(&self, node: &NodeView) -> Vec<(IpAddr, FrontendKind)> {
        let allowed = |addr: &IpAddr| {
            let covers = |one: &NodePortAddress| match one {
                NodePortAddress::Primary => node.primary.contains(addr),
                NodePortAddress::Range(range) => range.contains(addr),
            };
            let family = Family::of(*addr);
            let has_primary = node.primary.iter().any(|addr| Family::of(*addr) == family);
            let counts = |one: &&NodePortAddress| {
                one.is_of(family) && (has_primary || **one != NodePortAddress::Primary)
            };
            let mut said = self.node_port_addresses.iter().filter(counts).peekable();
            said.peek().is_none() || said.any(covers)
        };
        let mut addrs: Vec<_> = node
            .addresses
            .iter()
            .filter(|addr| allowed(addr))
            .map(|addr| (*addr, FrontendKind::NodePort))
            .collect();
        let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
        if self.localhost_node_ports && allowed(&localhost) {
            addrs.push((localhost, FrontendKind::LocalhostNodePort));
        }
        addrs
    }
}
