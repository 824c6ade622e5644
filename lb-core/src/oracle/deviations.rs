//! Where modes differ from kube-proxy's iptables mode, or it from them: one function for each question.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::{Client, Dialled, Oracle, Via, endpoints::Endpoints, is_dialable, served};
use crate::{
    flow::{Answer, Dialect, Flow, Origin},
    model::{Family, NodePortAddress, Protocol, Service, TrafficPolicy},
};

impl Oracle<'_> {
    /// The BPF programs know TCP and UDP only.
    pub(super) fn carries(&self, protocol: Protocol) -> bool {
        protocol != Protocol::Sctp || self.dialect != Dialect::Ebpf
    }

    /// eBPF knows where a packet comes from. netfilter, unless told pods' devices, knows addresses: pods are those in the
    /// cluster's range, of whichever node, and a gateway address in there is a pod's too.
    pub(super) fn client(&self, flow: &Flow) -> Client {
        match (self.dialect, flow.origin) {
            (Dialect::Ebpf, Origin::Pod | Origin::PodSocket) => Client::Pod,
            (Dialect::Ebpf, Origin::Node) => Client::Node,
            (Dialect::Ebpf, Origin::Outside) => Client::Outside,
            _ if self.is_taken_for_a_pod(flow) == Some(true) => Client::Pod,
            _ if self.is_own(flow.source) => Client::Node,
            _ => Client::Outside,
        }
    }

    /// iptables and eBPF answer NodePorts on 127.0.0.1 too, and iptables, unless told addresses, on every address
    /// that is local, so on all of 127.0.0.0/8; the others on no loopback address. ::1 is never one: a packet with
    /// that source could not leave (kube-proxy `isZeroCIDR` and the rules at the end of KUBE-SERVICES).
    pub(super) fn answers_node_ports(&self, addr: IpAddr) -> bool {
        let family = Family::of(addr);
        let says = |one: &&NodePortAddress| match one {
            NodePortAddress::Primary => self.primary(family).is_some(),
            NodePortAddress::Range(range) => Family::of(range.addr()) == family,
        };
        let said: Vec<&NodePortAddress> = self.policy.node_port_addresses.iter().filter(says).collect();
        let allowed = said.is_empty()
            || said.iter().any(|one| match one {
                NodePortAddress::Primary => self.primary(family) == Some(addr),
                NodePortAddress::Range(range) => range.contains(&addr),
            });
        let all = said.is_empty()
            || said.iter().any(|one| matches!(one, NodePortAddress::Range(range) if range.prefix_len() == 0));
        let localhost = match self.dialect {
            Dialect::Iptables if all => addr.is_ipv4() && addr.is_loopback(),
            Dialect::Iptables | Dialect::Ebpf => addr == Ipv4Addr::LOCALHOST,
            Dialect::Nftables | Dialect::Ipvs => false,
        };
        allowed && (self.node.addresses.contains(&addr) || localhost && self.policy.localhost_node_ports)
    }

    /// A port that no Service has, of an address that one does. eBPF and IPVS refuse it unless a node has the address;
    /// nftables refuses it at ClusterIPs; iptables knows nothing of it.
    pub(super) fn refuses_unknown_port(&self, flow: &Flow) -> bool {
        let is = |addrs: &dyn Fn(&Service) -> Vec<IpAddr>| {
            let serves = |service: &Service| service.ports.iter().any(|port| self.carries(port.protocol));
            let mut all =
                self.cluster.services().filter(|service| served(service, flow.dst) && serves(service));
            all.any(|service| addrs(service).contains(&flow.dst)) && is_dialable(flow.dst)
        };
        let any_vip = || {
            is(&|service| {
                [&service.cluster_ips[..], self.external_ips(service), &service.load_balancer_ips].concat()
            })
        };
        match self.dialect {
            Dialect::Ebpf | Dialect::Ipvs => {
                any_vip() && !self.is_a_nodes(flow.dst) && self.carries(flow.protocol)
            }
            Dialect::Nftables => is(&|service| service.cluster_ips.clone()) && !self.is_own(flow.dst),
            Dialect::Iptables => false,
        }
    }

    /// iptables refuses NodePorts for want of endpoints at every local address, also at those that don't answer them;
    /// but not in a family in which none does.
    pub(super) fn refused_node_port(&self, flow: &Flow) -> Option<Answer> {
        let of_family = |addr: IpAddr| Family::of(addr) == Family::of(flow.dst);
        let mut own = self.node.addresses.iter().copied().chain([Ipv4Addr::LOCALHOST.into()]);
        if self.dialect != Dialect::Iptables || !self.is_own(flow.dst) {
            return None;
        }
        // At an address that does answer them.
        let answering = own.find(|addr| of_family(*addr) && self.answers_node_ports(*addr))?;
        let there = Flow { dst: answering, ..*flow };
        let dialled = self.dialled(&there).filter(|dialled| dialled.via == Via::NodePort)?;
        // What nobody short-circuits is from outside.
        match self.serve(&there, Client::Outside, &dialled) {
            Answer::Serve(_) | Answer::Pass => None,
            refusal => Some(refusal),
        }
    }

    /// netfilter rules restrict sources only where there is an endpoint; eBPF always. IPVS has what comes in filtered
    /// before it looks for an endpoint, and what the node sends itself after that (`ip_vs_core.c` `ip_vs_ops4`).
    pub(super) fn asks_ranges_first(&self, flow: &Flow) -> bool {
        match self.dialect {
            Dialect::Ebpf => true,
            Dialect::Ipvs => flow.origin != Origin::Node,
            Dialect::Iptables | Dialect::Nftables => false,
        }
    }

    /// netfilter sees which source routing chose for a process of the node. A socket call has none yet, and in IPVS it
    /// is the VIP itself, which the node has: both ask whether a range covers an address of the node.
    pub(super) fn knows_node_by_address(&self, flow: &Flow) -> bool {
        flow.origin != Origin::Node || matches!(self.dialect, Dialect::Iptables | Dialect::Nftables)
    }

    /// iptables refuses for want of endpoints in INPUT and FORWARD (and, for ClusterIPs, OUTPUT): what the node itself
    /// sends to an external address that is elsewhere meets neither.
    pub(super) fn lets_refusals_out(&self, flow: &Flow, dialled: &Dialled<'_>) -> bool {
        self.dialect == Dialect::Iptables
            && flow.origin == Origin::Node
            && dialled.via != Via::ClusterIp
            && !self.is_own(flow.dst)
    }

    /// IPVS has one list of endpoints for an address, whoever dials.
    pub(super) fn holds_everybody_to_policy(&self) -> bool {
        self.dialect == Dialect::Ipvs
    }

    /// IPVS: policy Local without endpoints here uses those elsewhere (kube-proxy `ipvs/proxier.go` `syncEndpoint`), if
    /// the service port uses such at all: a ClusterIP of policy Local alone doesn't (`serviceport.go`
    /// `UsesClusterEndpoints`).
    pub(super) fn falls_back_to_cluster(&self, flow: &Flow, dialled: &Dialled<'_>) -> bool {
        let Dialled { service, port, .. } = dialled;
        let of_family = |addr: &IpAddr| Family::of(*addr) == Family::of(flow.dst);
        let external = self.external_ips(service).iter().chain(&service.load_balancer_ips);
        let from_outside =
            port.node_port != 0 || external.copied().any(|addr| of_family(&addr) && is_dialable(addr));
        self.dialect == Dialect::Ipvs && (service.internal_policy == TrafficPolicy::Cluster || from_outside)
    }

    /// Endpoints, but none that the policy lets this node use: kube-proxy drops, for they may come. An IPVS virtual server
    /// without destinations refuses, whatever the reason.
    pub(super) fn without_usable_endpoints(&self) -> Answer {
        if self.dialect == Dialect::Ipvs { Answer::Reject } else { Answer::Drop }
    }

    pub(super) fn is_masqueraded(
        &self,
        flow: &Flow,
        client: Client,
        dialled: &Dialled<'_>,
        endpoints: &Endpoints<'_>,
        backend: SocketAddr,
    ) -> bool {
        match self.dialect {
            Dialect::Ebpf => self.ebpf_masquerades(flow, dialled, endpoints, backend),
            // What the node takes in for itself is never on its way out, where sources are rewritten.
            _ if flow.origin != Origin::Node && endpoints.is_node(backend.ip()) => false,
            Dialect::Iptables | Dialect::Nftables => {
                self.kube_proxy_masquerades(flow, client, dialled, backend)
            }
            Dialect::Ipvs => self.ipvs_masquerades(flow, dialled, endpoints, backend),
        }
    }

    /// eBPF shows clients to backends wherever the reply comes back by itself: always to those of this node, always
    /// from pods of this node, and socket calls are no packets yet.
    fn ebpf_masquerades(
        &self,
        flow: &Flow,
        dialled: &Dialled<'_>,
        endpoints: &Endpoints<'_>,
        backend: SocketAddr,
    ) -> bool {
        let hairpin = backend.ip() == flow.source;
        let at_cluster_ip = dialled.via == Via::ClusterIp;
        // A node can't take in packets from its own address.
        let possible = !endpoints.is_node(backend.ip());
        match flow.origin {
            Origin::Node => false,
            Origin::PodSocket if !self.is_left_to_the_veth(flow, dialled) => false,
            Origin::PodSocket | Origin::Pod => {
                hairpin || at_cluster_ip && self.policy.masquerade_all && possible
            }
            Origin::Outside => {
                let shows = !at_cluster_ip && dialled.service.external_policy == TrafficPolicy::Local;
                !shows && possible && (self.policy.masquerade_all || !endpoints.here(&backend))
            }
        }
    }

    /// Where the pod's address matters, its socket call is let through and its packet is looked at.
    fn is_left_to_the_veth(&self, flow: &Flow, dialled: &Dialled<'_>) -> bool {
        let restricted = dialled.via == Via::LoadBalancer && !self.ranges(dialled.service, flow).is_empty();
        restricted || dialled.via == Via::ClusterIp && self.policy.masquerade_all
    }

    /// IPVS: as iptables, but policy Local masquerades only a node that dials an address that is bound: its source would be
    /// that address, which the endpoint's own node has, too. And without a range of pods a node that dials a
    /// ClusterIP is masqueraded all the same, because its source is that very address. Of those who dial themselves it
    /// knows this node's only (kube-proxy `ipvs/proxier.go`, KUBE-LOOP-BACK).
    fn ipvs_masquerades(
        &self,
        flow: &Flow,
        dialled: &Dialled<'_>,
        endpoints: &Endpoints<'_>,
        backend: SocketAddr,
    ) -> bool {
        let hairpin = backend.ip() == flow.source && endpoints.here(&backend);
        let from_vip = flow.origin == Origin::Node && self.is_taken_for_a_pod(flow).is_none();
        hairpin
            || match (dialled.via, dialled.service.external_policy) {
                (Via::ClusterIp, _) => {
                    self.policy.masquerade_all || self.is_known_not_to_be_a_pod(flow) || from_vip
                }
                (_, TrafficPolicy::Cluster) => true,
                (via, TrafficPolicy::Local) => via != Via::NodePort && flow.origin == Origin::Node,
            }
    }
}
