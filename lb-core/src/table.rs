//! `ServiceTable`: what this node serves, fully resolved. A datapath carries it out and decides nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use serde::Serialize;

use crate::model::{Family, ObjectName, Protocol};

/// Identity of one load-balanced thing: a service port in one IP family.
///
/// The port's *name* is identity, its number is data (kube-proxy `pkg/proxy/types.go` `ServicePortName`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ServicePortId {
    /// The Service.
    pub service: ObjectName,
    /// Port name, empty if unnamed.
    pub port: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// IP family of frontends and backends.
    pub family: Family,
}

impl fmt::Display for ServicePortId {
    /// `namespace/name:port`, without the colon if the port has no name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.port {
            "" => write!(f, "{}", self.service),
            port => write!(f, "{}:{port}", self.service),
        }
    }
}

/// What clients dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct FrontendAddr {
    /// Address.
    pub addr: IpAddr,
    /// Port, 1–65535.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl fmt::Display for FrontendAddr {
    /// `10.96.0.10:53/UDP`, `[fd00::1]:80/TCP`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}/{}", std::net::SocketAddr::new(self.addr, self.port), self.protocol);
        f.pad(&text)
    }
}

/// Where a frontend comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancer,
    /// A node address with `nodePort`.
    NodePort,
    /// 127.0.0.1 with `nodePort`: for processes in the host's network namespace only.
    LocalhostNodePort,
}

impl fmt::Display for FrontendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ClusterIp => "ClusterIP",
            Self::ExternalIp => "ExternalIP",
            Self::LoadBalancer => "LoadBalancer",
            Self::NodePort => "NodePort",
            Self::LocalhostNodePort => "NodePort@lo",
        })
    }
}

/// Which of a service port's two backend lists a scope uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum BackendList {
    /// [`ServiceEntry::cluster`].
    Cluster,
    /// [`ServiceEntry::local`].
    Local,
}

/// What happens to a new flow for which the chosen list is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum NoBackends {
    /// TCP RST, ICMP port unreachable, `ECONNREFUSED`: there is no endpoint anywhere.
    Reject,
    /// Silence: there are endpoints, but none that this policy may use here.
    Drop,
}

/// When the source is rewritten to an address of this node. A hairpin (backend = source) always is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Masquerade {
    /// Never: the backend sees the client.
    Never,
    /// If the backend is not on this node, so that the reply comes back through it.
    Remote,
    /// Always (`masqueradeAll`).
    Always,
}

/// How one scope of a frontend is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Scope {
    /// Which backends.
    pub list: BackendList,
    /// What if there are none.
    pub none: NoBackends,
    /// Source rewriting.
    pub masquerade: Masquerade,
}

/// One frontend: an address clients dial, and how each scope of it is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Frontend {
    /// The service port behind it.
    pub service: ServicePortId,
    /// Where it comes from.
    pub kind: FrontendKind,
    /// Packets that reach the node from outside.
    pub external: Scope,
    /// Packets of this node's pods and processes.
    pub internal: Scope,
    /// Sources that may use it; empty means all. Load-balancer frontends only.
    pub source_ranges: Arc<[IpNet]>,
    /// `source_ranges` is not empty and this node's own processes may use the frontend all the same, because a
    /// range covers an address of this node.
    pub source_ranges_allow_host: bool,
}

/// A backend: an endpoint this node may send to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Backend {
    /// Address.
    pub addr: IpAddr,
    /// Port, 1–65535.
    pub port: u16,
    /// The endpoint is on this node.
    pub local: bool,
    /// The address is one of this node's own: a host-network endpoint.
    pub own_address: bool,
    /// The endpoint is terminating; listed only when no ready one is left.
    pub terminating: bool,
}

/// One service port with its backends. Lists are sorted by address and port and free of duplicates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServiceEntry {
    /// `creationTimestamp` of the Service, seconds since 1970: where there is no room for all, the oldest are served.
    pub created_unix_secs: i64,
    /// ClientIP affinity timeout in seconds.
    pub affinity_secs: Option<u32>,
    /// TCP port on which this node tells load balancers of the Service's local endpoints; 0 for none.
    pub health_check_node_port: u16,
    /// Backends of policy Cluster (topology hints applied).
    pub cluster: Vec<Backend>,
    /// Backends of policy Local.
    pub local: Vec<Backend>,
    /// All endpoints this node may ever send to that are *serving*, whatever the policies say now: flows to
    /// these are kept, UDP flows to others re-select (kube-proxy `conntrack/cleanup.go`).
    pub serving: Vec<(IpAddr, u16)>,
    /// Endpoints that are there and don't serve (not ready, or on their way out): no backends, but connections to them
    /// may still come to their own end.
    pub not_serving: Vec<(IpAddr, u16)>,
}

impl ServiceEntry {
    /// Endpoints whose flows go on: those that serve, and those that are chosen though they don't, as with
    /// `publishNotReadyAddresses`. Some may come twice.
    pub fn in_use(&self) -> impl Iterator<Item = (IpAddr, u16)> {
        let chosen = self.cluster.iter().chain(&self.local).map(|backend| (backend.addr, backend.port));
        self.serving.iter().copied().chain(chosen)
    }
}

/// What an address is, for ports of it that no frontend claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum VipKind {
    /// A ClusterIP, or an external VIP that belongs to no node: unknown ports are refused.
    Vip,
    /// An address of another node (also if it is somebody's externalIP): unknown ports pass untouched, always.
    NodeAddress,
    /// An address of this node, likewise.
    OwnAddress,
}

/// Whose traffic a policy is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Traffic {
    /// `internalTrafficPolicy`.
    Internal,
    /// `externalTrafficPolicy`.
    External,
}

/// How this node tells load balancers of a Service's endpoints on it: `healthCheckNodePort`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HealthCheck {
    /// TCP port.
    pub port: u16,
    /// Addresses that answer; `None` is all.
    pub addresses: Option<BTreeSet<IpAddr>>,
    /// Endpoints on this node that are ready. Terminating ones don't count, though they may still serve: load balancers
    /// leave the node first.
    pub local_endpoints: usize,
}

/// What this node serves. Equal inputs give equal tables, and equal tables print alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceTable {
    /// Service ports that at least one frontend points to.
    pub services: BTreeMap<ServicePortId, ServiceEntry>,
    /// Frontends; each `service` is a key of `services`.
    pub frontends: BTreeMap<FrontendAddr, Frontend>,
    /// Addresses of frontends (NodePort ones included).
    pub vips: BTreeMap<IpAddr, VipKind>,
    /// Ranges that ClusterIPs are allocated from: an address of them that is nobody's leads nowhere.
    pub service_cidrs: BTreeSet<IpNet>,
    /// Services whose load balancers ask this node.
    pub health_checks: BTreeMap<ObjectName, HealthCheck>,
    /// How many endpoints serve, over all service ports.
    pub endpoints: usize,
    /// How many service ports have endpoints and a policy Local, and no endpoint here.
    pub without_local: BTreeMap<(Family, Traffic), usize>,
}

/// Which keys of a [`ServiceTable`] may differ from the table of the last call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Service ports added, changed or gone.
    pub services: BTreeSet<ServicePortId>,
    /// Frontends added, changed or gone.
    pub frontends: BTreeSet<FrontendAddr>,
    /// Addresses added, changed or gone.
    pub vips: BTreeSet<IpAddr>,
    /// The ranges of ClusterIPs changed.
    pub service_cidrs: bool,
    /// Services of which load balancers are told something else; no datapath looks at it.
    pub health_checks: BTreeSet<ObjectName>,
}

impl Changes {
    /// Nothing changed.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
            && self.frontends.is_empty()
            && self.vips.is_empty()
            && !self.service_cidrs
            && self.health_checks.is_empty()
    }

    /// Every key of `table`: what a datapath that knows nothing yet has to look at.
    pub fn all(table: &ServiceTable) -> Self {
        Self {
            services: table.services.keys().cloned().collect(),
            frontends: table.frontends.keys().copied().collect(),
            vips: table.vips.keys().copied().collect(),
            service_cidrs: true,
            health_checks: table.health_checks.keys().cloned().collect(),
        }
    }

    /// Adds the keys of `other`.
    pub fn merge(&mut self, other: Self) {
        self.services.extend(other.services);
        self.frontends.extend(other.frontends);
        self.vips.extend(other.vips);
        self.service_cidrs |= other.service_cidrs;
        self.health_checks.extend(other.health_checks);
    }
}
