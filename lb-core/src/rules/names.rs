//! Chain names as kube-proxy makes them, so that either finds the other's chains again
//! (kube-proxy 1.36 `pkg/proxy/iptables/proxier.go` `portProtoHash`, `servicePortEndpointChainName`).

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use data_encoding::BASE32;
use sha2::{Digest, Sha256};

use crate::{model::Protocol, table::ServicePortId};

/// Packets to clients' frontends.
pub const SERVICES: &str = "KUBE-SERVICES";
/// Refusals for frontends that are dialled from outside.
pub const EXTERNAL_SERVICES: &str = "KUBE-EXTERNAL-SERVICES";
/// Packets to addresses of this node.
pub const NODE_PORTS: &str = "KUBE-NODEPORTS";
/// Source rewriting.
pub const POSTROUTING: &str = "KUBE-POSTROUTING";
/// Marks a packet for source rewriting.
pub const MARK_MASQ: &str = "KUBE-MARK-MASQ";
/// What may be forwarded.
pub const FORWARD: &str = "KUBE-FORWARD";
/// Packets that no source range let through.
pub const PROXY_FIREWALL: &str = "KUBE-PROXY-FIREWALL";
/// Packets to load-balancer IPs, in IPVS mode.
pub const LOAD_BALANCER: &str = "KUBE-LOAD-BALANCER";
/// Packets to addresses of this node, in IPVS mode.
pub const NODE_PORT: &str = "KUBE-NODE-PORT";
/// Packets to load-balancer IPs with source ranges, in IPVS mode.
pub const SOURCE_RANGES_FIREWALL: &str = "KUBE-SOURCE-RANGES-FIREWALL";
/// Packets to VIPs that are delivered to this node, in IPVS mode.
pub const IPVS_FILTER: &str = "KUBE-IPVS-FILTER";
/// Packets of this node to load-balancer IPs, in IPVS mode.
pub const IPVS_OUT_FILTER: &str = "KUBE-IPVS-OUT-FILTER";
/// The kubelet's protection of 127.0.0.0/8, which both write.
pub const KUBELET_FIREWALL: &str = "KUBE-FIREWALL";
/// Empty; when it is gone, somebody has flushed the rules.
pub const CANARY: &str = "KUBE-PROXY-CANARY";

/// Empty; kube-proxy doesn't make it: the other chains are ours, not kube-proxy's.
pub const OWNER: &str = "LB-AGENT-OWNER";
/// Empty; kubelets make it: chains that they share with kube-proxy are in use.
pub const KUBELET_CANARY: &str = "KUBE-KUBELET-CANARY";

/// nfacct's counter of what conntrack calls INVALID and is dropped for it, in mode iptables.
pub const INVALID_DROPPED: &str = "ct_state_invalid_dropped_pkts";
/// nfacct's counter of what enters the chains of NodePorts by 127.0.0.0/8, in mode iptables.
pub const LOCALHOST_ACCEPTED: &str = "localhost_nps_accepted_pkts";
/// The counters that rules speak of.
pub const COUNTERS: [&str; 2] = [INVALID_DROPPED, LOCALHOST_ACCEPTED];

/// Chains that stand once, in whichever table.
pub const SHARED: [&str; 15] = [
    SERVICES,
    EXTERNAL_SERVICES,
    NODE_PORTS,
    POSTROUTING,
    MARK_MASQ,
    FORWARD,
    PROXY_FIREWALL,
    LOAD_BALANCER,
    NODE_PORT,
    SOURCE_RANGES_FIREWALL,
    IPVS_FILTER,
    IPVS_OUT_FILTER,
    KUBELET_FIREWALL,
    CANARY,
    OWNER,
];

/// Those that kubelets may have made, too.
pub const SHARED_WITH_KUBELET: [&str; 3] = [POSTROUTING, MARK_MASQ, KUBELET_FIREWALL];

/// Prefixes of the chains of one service port.
pub const OF_SERVICES: [&str; 5] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-"];

/// As netfilter spells it.
pub fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// `prefix` and the first 16 characters of base32(sha256(service port, protocol)).
pub fn of_service(prefix: &str, id: &ServicePortId) -> Arc<str> {
    hashed(prefix, &[&id.to_string(), protocol(id.protocol)])
}

/// The chain of one endpoint of a service port.
pub fn of_endpoint(id: &ServicePortId, addr: IpAddr, port: u16) -> Arc<str> {
    let endpoint = SocketAddr::new(addr, port).to_string();
    hashed("KUBE-SEP-", &[&id.to_string(), protocol(id.protocol), &endpoint])
}

fn hashed(prefix: &str, parts: &[&str]) -> Arc<str> {
    let mut sha = Sha256::new();
    parts.iter().for_each(|part| sha.update(part));
    let encoded = BASE32.encode(&sha.finalize());
    format!("{prefix}{}", &encoded[..16]).into()
}

/// A service port's name in chains of nftables: eight characters of base32(sha256(name)), then the name
/// (kube-proxy 1.36 `pkg/proxy/nftables/proxier.go` `servicePortChainNameBase`).
pub fn nft_service(id: &ServicePortId) -> String {
    nft_hashed(nft_port(id))
}

/// An endpoint's name in chains of nftables, which know no colons (`servicePortEndpointChainNameBase`).
pub fn nft_endpoint(id: &ServicePortId, addr: IpAddr, port: u16) -> String {
    let addr = addr.to_string().replace(':', ".");
    nft_hashed(format!("{}__{addr}/{port}", nft_port(id)))
}

fn nft_port(id: &ServicePortId) -> String {
    format!("{}/{}/{}", id.service, protocol(id.protocol), id.port)
}

/// The longest name that nftables takes is 256 bytes, of which a chain's prefix has up to 16 (`hashAndTruncate`).
const NFT_BASE_MAX: usize = 240;

fn nft_hashed(name: String) -> String {
    let mut hashed = format!("{}-{name}", &BASE32.encode(&Sha256::digest(&name))[..8]);
    if hashed.len() > NFT_BASE_MAX {
        // Names of objects are ASCII.
        hashed.truncate(hashed.floor_char_boundary(NFT_BASE_MAX - 3));
        hashed += "...";
    }
    hashed
}
