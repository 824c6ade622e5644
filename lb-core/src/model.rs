//! The cluster in our own words: what the rest of the project knows of Services, endpoints, Nodes and Pods.
//!
//! Kubernetes types end at the agent's `convert` module; everything that can be missing there has been decided by
//! the time a value of this module exists (a Service without a namespace is impossible by type).
//!
//! Semantics follow kube-proxy 1.36 (`pkg/proxy/serviceport.go`, `endpointslicecache.go`).

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc, time::SystemTime};

use ipnet::IpNet;
use serde::Serialize;

/// Namespace and name of an object; `Display` is `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ObjectName {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name within the namespace.
    pub name: Arc<str>,
}

impl ObjectName {
    /// Builds a name from its two parts.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Layer-4 protocol of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Protocol {
    /// TCP, IP protocol 6.
    Tcp,
    /// UDP, IP protocol 17.
    Udp,
    /// SCTP, IP protocol 132.
    Sctp,
}

impl Protocol {
    /// IANA protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The protocol with this IANA number, if services can use it.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// IP family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// `spec.type` of a Service; ExternalName never gets this far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum ServiceType {
    /// Cluster-internal only (externalIPs still count).
    ClusterIp,
    /// Also on a port of every node.
    NodePort,
    /// Also on the load balancer's ingress addresses.
    LoadBalancer,
}

/// `internalTrafficPolicy` / `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum TrafficPolicy {
    /// Any endpoint of the cluster may serve.
    #[default]
    Cluster,
    /// Only endpoints on the node that got the packet may serve.
    Local,
}

/// A Service that has a cluster IP and is not an ExternalName.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Identity.
    pub name: ObjectName,
    /// `metadata.uid`, empty if unknown (manifests).
    pub uid: Arc<str>,
    /// `metadata.creationTimestamp`, Unix seconds; 0 if unknown. The older of two Services that claim one
    /// frontend gets it.
    pub created_unix_secs: i64,
    /// `spec.type`.
    pub service_type: ServiceType,
    /// `spec.clusterIPs` (or `clusterIP`), parsed.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`, parsed.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` whose `ipMode` is nil or VIP.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`; restricts load-balancer IPs only.
    pub source_ranges: Vec<IpNet>,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.healthCheckNodePort`, 0 for none; counts only for type LoadBalancer with policy Local.
    pub health_check_node_port: u16,
    /// ClientIP session affinity's timeout in seconds; `None` is no affinity.
    pub affinity_secs: Option<u32>,
    /// `spec.publishNotReadyAddresses`; used when endpoints are derived from Pods.
    pub publish_not_ready: bool,
    /// `spec.selector`; used when endpoints are derived from Pods.
    pub selector: BTreeMap<String, String>,
    /// Ports, in the object's order.
    pub ports: Vec<ServicePort>,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Port name, empty for the unnamed port of a single-port Service.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// The port clients dial, 1–65535.
    pub port: u16,
    /// The port on every node, 0 for none.
    pub node_port: u16,
    /// `targetPort`; used when endpoints are derived from Pods.
    pub target: TargetPort,
}

/// `targetPort` of a service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// A number.
    Number(u16),
    /// The name of a container port, resolved per Pod.
    Name(Arc<str>),
}

/// An EndpointSlice of one Service and family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Identity of the slice.
    pub name: ObjectName,
    /// The Service it belongs to (label `kubernetes.io/service-name`).
    pub service: ObjectName,
    /// `addressType`.
    pub family: Family,
    /// Ports; those without a number are left out.
    pub ports: Vec<SlicePort>,
    /// Endpoints, in the object's order.
    pub endpoints: Vec<Endpoint>,
    /// When what the slice follows (a Pod, the Service) changed: annotation
    /// `endpoints.kubernetes.io/last-change-trigger-time`.
    pub triggered: Option<SystemTime>,
}

/// One port of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Port name; matches the service port's name.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port number on the endpoints, 1–65535.
    pub port: u16,
}

/// One endpoint of a slice: its first address and its conditions with Kubernetes' defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// First address of the endpoint.
    pub addr: IpAddr,
    /// `conditions.ready`, nil = true.
    pub ready: bool,
    /// `conditions.serving`, nil = true.
    pub serving: bool,
    /// `conditions.terminating`, nil = false.
    pub terminating: bool,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `hints.forZones[].name`.
    pub zone_hints: Vec<Arc<str>>,
    /// `hints.forNodes[].name`.
    pub node_hints: Vec<Arc<str>>,
}

/// A Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// Internal and external IPs of `status.addresses`, in the object's order (internal first).
    pub addresses: Vec<IpAddr>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// It is neither being deleted nor tainted by the cluster autoscaler as about to be: load balancers may send to it.
    pub eligible: bool,
}

/// A Pod, as far as endpoints can be derived from it (manifests only; a cluster has EndpointSlices).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Identity.
    pub name: ObjectName,
    /// Labels, matched by Service selectors.
    pub labels: BTreeMap<String, String>,
    /// `status.podIPs`.
    pub ips: Vec<IpAddr>,
    /// `spec.nodeName`.
    pub node: Option<Arc<str>>,
    /// Condition Ready; a manifest Pod with IPs and no conditions counts as ready.
    pub ready: bool,
    /// `metadata.deletionTimestamp` is set.
    pub terminating: bool,
    /// Container ports, named or not.
    pub ports: Vec<ContainerPort>,
}

/// A declared container port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPort {
    /// Port name, empty if none.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Number, 1–65535.
    pub port: u16,
}

/// A range that ClusterIPs are allocated from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceCidr {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `spec.cidrs`, parsed.
    pub cidrs: Vec<IpNet>,
}

/// How netfilter's modes tell pods from others (kube-proxy `detectLocalMode`). eBPF knows pods by their devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalDetector {
    /// By their source: ranges of the cluster's pods or of this node's, of which the first of a family counts. In a family
    /// without one pods are not told apart.
    Ranges(Vec<IpNet>),
    /// Their packets come in from this bridge.
    Bridge(Arc<str>),
    /// Their packets come in from devices whose names begin so.
    DevicePrefix(Arc<str>),
}

impl LocalDetector {
    /// Pods are not told apart.
    pub const NONE: Self = Self::Ranges(Vec::new());

    /// The range of a family's pods, if that is what tells them.
    pub fn range(&self, family: Family) -> Option<IpNet> {
        match self {
            Self::Ranges(ranges) => ranges.iter().copied().find(|range| Family::of(range.addr()) == family),
            Self::Bridge(_) | Self::DevicePrefix(_) => None,
        }
    }
}

/// Node addresses that answer NodePorts (kube-proxy `nodePortAddresses`). In a family that none of them is of, all do
/// (kube-proxy `pkg/proxy/util/nodeport_addresses.go`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortAddress {
    /// The first address of each family in the Node object; nothing for a family of which it has none.
    Primary,
    /// Addresses in this range.
    Range(IpNet),
}

impl NodePortAddress {
    /// It says something about a family.
    pub fn is_of(&self, family: Family) -> bool {
        match self {
            Self::Primary => true,
            Self::Range(range) => Family::of(range.addr()) == family,
        }
    }

    /// Some addresses of a family answer NodePorts, others may not.
    pub fn select(all: &[Self], family: Family) -> bool {
        let mut of_family = all.iter().filter(|one| one.is_of(family)).peekable();
        of_family.peek().is_some()
            && of_family.all(|one| !matches!(one, Self::Range(range) if range.prefix_len() == 0))
    }
}

/// One change of the cluster, as every source reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A Service appeared or changed.
    Service(Service),
    /// A Service is gone, or no longer one that we serve.
    ServiceGone(ObjectName),
    /// An EndpointSlice appeared or changed.
    EndpointSlice(EndpointSlice),
    /// An EndpointSlice is gone.
    EndpointSliceGone(ObjectName),
    /// A Node appeared or changed.
    Node(Node),
    /// A Node is gone.
    NodeGone(Arc<str>),
    /// A ServiceCIDR appeared or changed.
    ServiceCidr(ServiceCidr),
    /// A ServiceCIDR is gone.
    ServiceCidrGone(Arc<str>),
    /// A Pod appeared or changed.
    Pod(Pod),
    /// A Pod is gone.
    PodGone(ObjectName),
}

/// Something about an object that a person should look at; the object's other parts are served all the same.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Warning {
    /// Kind and name, e.g. `Service default/web`.
    pub object: String,
    /// The field, e.g. `spec.externalIPs[0]`.
    pub field: String,
    /// What is wrong and what was done about it.
    pub problem: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.object, self.field, self.problem)
    }
}
