//! ipsets of the IPVS mode: what IPVS translates, by the reason for which netfilter has to know of it
//! (kube-proxy 1.36 `pkg/proxy/ipvs/ipset.go`).
//!
//! They are the record of what was programmed, too: a virtual server that no set names is somebody else's.

use std::fmt;

use crate::model::Family;

/// One of kube-proxy's sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Set {
    /// Endpoint, its port, and the endpoint again: packets that come back to where they were sent from.
    LoopBack,
    /// ClusterIPs with their ports.
    ClusterIp,
    /// externalIPs of policy Cluster with their ports.
    ExternalIp,
    /// externalIPs of policy Local with their ports.
    ExternalIpLocal,
    /// Load-balancer IPs with their ports.
    LoadBalancer,
    /// Those of policy Local.
    LoadBalancerLocal,
    /// Those with source ranges.
    LoadBalancerFirewall,
    /// Load-balancer IP, port and a source that may use it.
    LoadBalancerSourceIp,
    /// Load-balancer IP, port and a range of sources that may use it.
    LoadBalancerSourceCidr,
    /// NodePorts.
    NodePortTcp,
    /// NodePorts of policy Local.
    NodePortLocalTcp,
    /// NodePorts.
    NodePortUdp,
    /// NodePorts of policy Local.
    NodePortLocalUdp,
    /// NodePorts with the node's addresses.
    NodePortSctp,
    /// NodePorts of policy Local with the node's addresses.
    NodePortLocalSctp,
    /// Ports of health checks.
    HealthCheckNodePort,
    /// Addresses bound to the dummy device.
    Bound,
}

impl Set {
    /// All of them, in the order in which they are written.
    pub const ALL: [Self; 17] = [
        Self::LoopBack,
        Self::ClusterIp,
        Self::ExternalIp,
        Self::ExternalIpLocal,
        Self::LoadBalancer,
        Self::LoadBalancerLocal,
        Self::LoadBalancerFirewall,
        Self::LoadBalancerSourceIp,
        Self::LoadBalancerSourceCidr,
        Self::NodePortTcp,
        Self::NodePortLocalTcp,
        Self::NodePortUdp,
        Self::NodePortLocalUdp,
        Self::NodePortSctp,
        Self::NodePortLocalSctp,
        Self::HealthCheckNodePort,
        Self::Bound,
    ];

    const fn base_name(self) -> &'static str {
        match self {
            Self::LoopBack => "LOOP-BACK",
            Self::ClusterIp => "CLUSTER-IP",
            Self::ExternalIp => "EXTERNAL-IP",
            Self::ExternalIpLocal => "EXTERNAL-IP-LOCAL",
            Self::LoadBalancer => "LOAD-BALANCER",
            Self::LoadBalancerLocal => "LOAD-BALANCER-LOCAL",
            Self::LoadBalancerFirewall => "LOAD-BALANCER-FW",
            Self::LoadBalancerSourceIp => "LOAD-BALANCER-SOURCE-IP",
            Self::LoadBalancerSourceCidr => "LOAD-BALANCER-SOURCE-CIDR",
            Self::NodePortTcp => "NODE-PORT-TCP",
            Self::NodePortLocalTcp => "NODE-PORT-LOCAL-TCP",
            Self::NodePortUdp => "NODE-PORT-UDP",
            Self::NodePortLocalUdp => "NODE-PORT-LOCAL-UDP",
            Self::NodePortSctp => "NODE-PORT-SCTP-HASH",
            Self::NodePortLocalSctp => "NODE-PORT-LOCAL-SCTP-HASH",
            Self::HealthCheckNodePort => "HEALTH-CHECK-NODE-PORT",
            Self::Bound => "IPVS-IPS",
        }
    }

    /// Its name in the kernel, which has room for 31 characters.
    pub fn name(self, family: Family) -> String {
        let mut name = match family {
            Family::V4 => format!("KUBE-{}", self.base_name()),
            Family::V6 => format!("KUBE-6-{}", self.base_name()),
        };
        name.truncate(31);
        name
    }

    /// The set with this name.
    pub fn by_name(family: Family, name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|set| set.name(family) == name)
    }

    /// What its elements are made of, as ipset names it.
    pub const fn kind(self) -> &'static str {
        match self {
            Self::LoopBack | Self::LoadBalancerSourceIp => "hash:ip,port,ip",
            Self::LoadBalancerSourceCidr => "hash:ip,port,net",
            Self::NodePortTcp
            | Self::NodePortLocalTcp
            | Self::NodePortUdp
            | Self::NodePortLocalUdp
            | Self::HealthCheckNodePort => "bitmap:port",
            Self::Bound => "hash:ip",
            _ => "hash:ip,port",
        }
    }

    /// Which parts of a packet a rule compares with an element.
    pub const fn directions(self) -> &'static str {
        match self {
            Self::LoopBack | Self::LoadBalancerSourceIp | Self::LoadBalancerSourceCidr => "dst,dst,src",
            Self::NodePortTcp
            | Self::NodePortLocalTcp
            | Self::NodePortUdp
            | Self::NodePortLocalUdp
            | Self::HealthCheckNodePort
            | Self::Bound => "dst",
            _ => "dst,dst",
        }
    }

    /// For readers of rules; kube-proxy's words.
    pub const fn comment(self) -> &'static str {
        match self {
            Self::LoopBack => "Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose",
            Self::ClusterIp => "Kubernetes service cluster ip + port for masquerade purpose",
            Self::ExternalIp => "Kubernetes service external ip + port for masquerade and filter purpose",
            Self::ExternalIpLocal => "Kubernetes service external ip + port with externalTrafficPolicy=local",
            Self::LoadBalancer => "Kubernetes service lb portal",
            Self::LoadBalancerLocal => {
                "Kubernetes service load balancer ip + port with externalTrafficPolicy=local"
            }
            Self::LoadBalancerFirewall => {
                "Kubernetes service load balancer ip + port for load balancer with sourceRange"
            }
            Self::LoadBalancerSourceIp => {
                "Kubernetes service load balancer ip + port + source IP for packet filter purpose"
            }
            Self::LoadBalancerSourceCidr => {
                "Kubernetes service load balancer ip + port + source cidr for packet filter purpose"
            }
            Self::NodePortTcp => "Kubernetes nodeport TCP port for masquerade purpose",
            Self::NodePortLocalTcp => "Kubernetes nodeport TCP port with externalTrafficPolicy=local",
            Self::NodePortUdp => "Kubernetes nodeport UDP port for masquerade purpose",
            Self::NodePortLocalUdp => "Kubernetes nodeport UDP port with externalTrafficPolicy=local",
            Self::NodePortSctp => {
                "Kubernetes nodeport SCTP port for masquerade purpose with type 'hash ip:port'"
            }
            Self::NodePortLocalSctp => {
                "Kubernetes nodeport SCTP port with externalTrafficPolicy=local with type 'hash ip:port'"
            }
            Self::HealthCheckNodePort => "Kubernetes health check node port",
            Self::Bound => "Kubernetes service IPs bound to the dummy device",
        }
    }

    /// The line of `ipset restore` that makes it, unless it is there; with kube-proxy's sizes.
    pub fn create(self, family: Family) -> Create {
        Create(self, family)
    }
}

/// Prints as a line of `ipset restore`.
pub struct Create(Set, Family);

impl fmt::Display for Create {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(set, family) = self;
        write!(f, "create {} {} ", set.name(*family), set.kind())?;
        let of = match family {
            Family::V4 => "inet",
            Family::V6 => "inet6",
        };
        match set.kind() {
            "bitmap:port" => f.write_str("range 0-65535 -exist"),
            _ => write!(f, "family {of} hashsize 1024 maxelem 65536 -exist"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_are_found_again() {
        for family in [Family::V4, Family::V6] {
            for set in Set::ALL {
                assert!(set.name(family).len() <= 31);
                assert_eq!(Set::by_name(family, &set.name(family)), Some(set));
            }
        }
        assert_eq!(Set::LoadBalancerSourceCidr.name(Family::V6), "KUBE-6-LOAD-BALANCER-SOURCE-CID");
    }
}
