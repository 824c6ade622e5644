//! The reference: who may serve a connection attempt, said as plainly as possible and straight from the objects.
//!
//! It shares nothing with `compile` or `rules` but types, so that it can disagree with them. kube-proxy's answer is the
//! rule; where a mode answers otherwise on purpose, that is one function of `deviations`. Slow: it looks at every Service
//! each time.

mod deviations;
mod endpoints;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::IpNet;

use self::endpoints::Endpoints;
use crate::{
    compile::NodeView,
    flow::{Answer, Dialect, Flow, Origin, Source},
    model::{Family, LocalDetector, NodePortAddress, Service, ServicePort, TrafficPolicy},
    snapshot::ClusterSnapshot,
};

/// What the operator chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Node addresses that answer NodePorts; empty is all.
    pub node_port_addresses: Vec<NodePortAddress>,
    /// Answer NodePorts on 127.0.0.1, where the mode can.
    pub localhost_node_ports: bool,
    /// Masquerade all traffic to ClusterIPs.
    pub masquerade_all: bool,
    /// Serve `spec.externalIPs`.
    pub external_ips: bool,
    /// How netfilter tells pods.
    pub pods: LocalDetector,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            node_port_addresses: Vec::new(),
            localhost_node_ports: true,
            masquerade_all: false,
            external_ips: true,
            pods: LocalDetector::NONE,
        }
    }
}

/// One node of a cluster in one mode.
#[derive(Clone, Copy, Debug)]
pub struct Oracle<'a> {
    /// The objects.
    pub cluster: &'a ClusterSnapshot,
    /// This node.
    pub node: &'a NodeView,
    /// The operator's choices.
    pub policy: &'a Policy,
    /// The mode.
    pub dialect: Dialect,
}

/// Which of a Service's addresses was dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Via {
    ClusterIp,
    LoadBalancer,
    ExternalIp,
    NodePort,
}

/// The service port behind what was dialled.
struct Dialled<'a> {
    service: &'a Service,
    port: &'a ServicePort,
    via: Via,
}

/// Who dials, as policies see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    Pod,
    Node,
    Outside,
}

impl Oracle<'_> {
    /// What becomes of the flow on this node.
    pub fn answer(&self, flow: &Flow) -> Answer {
        // A loopback address means the client's own network namespace: nobody else's packets get here.
        if flow.dst.is_loopback() && flow.origin != Origin::Node {
            return Answer::Pass;
        }
        match self.dialled(flow) {
            Some(dialled) => self.serve(flow, self.client(flow), &dialled),
            None if self.refuses_unknown_port(flow) => Answer::Reject,
            None => self.refused_node_port(flow).unwrap_or(Answer::Pass),
        }
    }

    /// Who may go on answering a flow that dialled this and has begun: whoever serves, by no policy. `None` if it is
    /// nobody's.
    pub fn may_answer(&self, flow: &Flow) -> Option<Vec<SocketAddr>> {
        let dialled = self.dialled(flow)?;
        let slices = self.cluster.slices(dialled.service);
        let family = Family::of(flow.dst);
        Some(Endpoints::of(dialled.port, family, &slices, self.node, self.zone()).serving())
    }

    /// Of Services that claim the same, the oldest has it; within one, ClusterIPs go before load-balancer IPs, and
    /// those before externalIPs: an address that is both keeps its source ranges.
    fn dialled(&self, flow: &Flow) -> Option<Dialled<'_>> {
        let mut services: Vec<&Service> = self.cluster.services().collect();
        services.sort_by_key(|service| (service.created_unix_secs, &service.name));
        services.into_iter().find_map(|service| {
            let ports = || service.ports.iter().filter(|port| port.protocol == flow.protocol);
            let by = |addrs: &[IpAddr], via| {
                let port = ports().find(|port| port.port == flow.port && addrs.contains(&flow.dst))?;
                Some(Dialled { service, port, via })
            };
            let by_node_port = || {
                let port =
                    ports().find(|port| port.node_port == flow.port && self.answers_node_ports(flow.dst))?;
                Some(Dialled { service, port, via: Via::NodePort })
            };
            if !self.carries(flow.protocol) || !served(service, flow.dst) {
                return None;
            }
            by(&service.cluster_ips, Via::ClusterIp)
                .or_else(|| by(&service.load_balancer_ips, Via::LoadBalancer))
                .or_else(|| by(self.external_ips(service), Via::ExternalIp))
                .filter(|_| is_dialable(flow.dst))
                .or_else(by_node_port)
        })
    }

    fn serve(&self, flow: &Flow, client: Client, dialled: &Dialled<'_>) -> Answer {
        let family = Family::of(flow.dst);
        let slices = self.cluster.slices(dialled.service);
        let endpoints = Endpoints::of(dialled.port, family, &slices, self.node, self.zone());
        if self.is_shut_out(flow, dialled) && (endpoints.any() || self.asks_ranges_first(flow)) {
            return Answer::Drop;
        }
        if !endpoints.any() {
            return if self.lets_refusals_out(flow, dialled) { Answer::Pass } else { Answer::Reject };
        }
        let mut list = match self.policy_for(client, dialled) {
            TrafficPolicy::Cluster => endpoints.cluster(),
            TrafficPolicy::Local => endpoints.local(),
        };
        if list.is_empty() && self.falls_back_to_cluster(flow, dialled) {
            list = endpoints.cluster();
        }
        if list.is_empty() {
            return self.without_usable_endpoints();
        }
        let source =
            |backend: SocketAddr| match self.is_masqueraded(flow, client, dialled, &endpoints, backend) {
                true => Source::Masqueraded,
                false => Source::Kept,
            };
        Answer::Serve(list.into_iter().map(|backend| (backend, source(backend))).collect())
    }

    /// internalTrafficPolicy is about ClusterIPs, externalTrafficPolicy about all other addresses; and that only for
    /// clients from outside: pods and the node itself are in the cluster already.
    fn policy_for(&self, client: Client, dialled: &Dialled<'_>) -> TrafficPolicy {
        match dialled.via {
            Via::ClusterIp => dialled.service.internal_policy,
            _ if client != Client::Outside && !self.holds_everybody_to_policy() => TrafficPolicy::Cluster,
            _ => dialled.service.external_policy,
        }
    }

    /// kube-proxy's rule. Whoever dials itself is masqueraded, else the reply would never come back through here;
    /// policy Local keeps the source; policy Cluster hides it, but ClusterIPs show pods.
    fn kube_proxy_masquerades(
        &self,
        flow: &Flow,
        client: Client,
        dialled: &Dialled<'_>,
        backend: SocketAddr,
    ) -> bool {
        let hairpin = backend.ip() == flow.source;
        let by_policy = match (dialled.via, dialled.service.external_policy) {
            (Via::ClusterIp, _) => self.policy.masquerade_all || self.is_known_not_to_be_a_pod(flow),
            (_, TrafficPolicy::Cluster) => true,
            (_, TrafficPolicy::Local) => client == Client::Node,
        };
        hairpin || by_policy
    }

    /// loadBalancerSourceRanges hold for load-balancer IPs alone, by family; a family without ranges is open.
    fn is_shut_out(&self, flow: &Flow, dialled: &Dialled<'_>) -> bool {
        let service = dialled.service;
        let ranges = self.ranges(service, flow);
        if dialled.via != Via::LoadBalancer || ranges.is_empty() {
            return false;
        }
        let covers = |addr: &IpAddr| ranges.iter().any(|range| range.contains(addr));
        let node_may = self.node.addresses.iter().any(covers);
        // A node that has the VIP itself dials it from that very address; if the VIP is another Service's it is no
        // VIP of this one.
        let from_vip = service.load_balancer_ips.contains(&flow.source)
            && self
                .dialled(&Flow { dst: flow.source, ..*flow })
                .is_some_and(|there| there.service.name == service.name && there.via == Via::LoadBalancer);
        match self.knows_node_by_address(flow) {
            true => !(covers(&flow.source) || node_may && from_vip),
            false => !node_may,
        }
    }

    /// Of the flow's family; a range of everything is as good as none (semantics of `loadBalancerSourceRanges` in
    /// kube-proxy `serviceport.go`).
    fn ranges<'a>(&self, service: &'a Service, flow: &Flow) -> Vec<&'a IpNet> {
        let family = Family::of(flow.dst);
        let ranges: Vec<&IpNet> =
            service.source_ranges.iter().filter(|range| Family::of(range.addr()) == family).collect();
        if ranges.iter().any(|range| range.prefix_len() == 0) { Vec::new() } else { ranges }
    }

    /// Where pods are not told apart nobody is known not to be one.
    fn is_known_not_to_be_a_pod(&self, flow: &Flow) -> bool {
        self.is_taken_for_a_pod(flow) == Some(false)
    }

    /// By netfilter; `None` if it can't tell.
    fn is_taken_for_a_pod(&self, flow: &Flow) -> Option<bool> {
        match &self.policy.pods {
            LocalDetector::Ranges(_) => {
                let range = self.policy.pods.range(Family::of(flow.source))?;
                Some(range.contains(&flow.source))
            }
            LocalDetector::Bridge(_) | LocalDetector::DevicePrefix(_) => {
                Some(matches!(flow.origin, Origin::Pod | Origin::PodSocket))
            }
        }
    }

    fn external_ips<'a>(&self, service: &'a Service) -> &'a [IpAddr] {
        if self.policy.external_ips { &service.external_ips } else { &[] }
    }

    /// The first address of its family in the Node object.
    fn primary(&self, family: Family) -> Option<IpAddr> {
        let node = self.cluster.node(&self.node.name)?;
        node.addresses.iter().copied().find(|addr| Family::of(*addr) == family)
    }

    fn is_own(&self, addr: IpAddr) -> bool {
        self.node.addresses.contains(&addr) || addr.is_loopback()
    }

    fn is_a_nodes(&self, addr: IpAddr) -> bool {
        self.is_own(addr) || self.cluster.is_node_address(addr)
    }

    fn zone(&self) -> Option<&str> {
        match self.cluster.node(&self.node.name) {
            Some(node) => node.zone.as_deref(),
            None => self.node.zone.as_deref(),
        }
    }
}

/// A Service is served in the families of its cluster IPs; one without any, as manifests may have, at whatever other
/// addresses it has.
fn served(service: &Service, dst: IpAddr) -> bool {
    let of_family = |addr: &IpAddr| Family::of(*addr) == Family::of(dst);
    service.cluster_ips.is_empty() || service.cluster_ips.iter().any(of_family)
}

/// An address that a client elsewhere could mean.
fn is_dialable(addr: IpAddr) -> bool {
    let link_local = match addr {
        IpAddr::V4(addr) => addr.is_link_local() || addr == Ipv4Addr::BROADCAST,
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    };
    !(link_local || addr.is_unspecified() || addr.is_loopback() || addr.is_multicast())
}
