//! What became of a packet or a socket call: each program run counts exactly one outcome.
//!
//! Numbers are map indices and metric labels: never renumber, append.

macro_rules! outcomes {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $label:literal;)+) => {
        /// Why a program ended as it did.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Outcome { $($(#[doc = $doc])+ $name = $number,)+ }

        impl Outcome {
            /// All outcomes, by number.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The metric label.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }
        }
    };
}

outcomes! {
    /// Passed: not IPv4 or IPv6 (ARP, VLAN-tagged, …).
    PassNotIp = 0, "pass_not_ip";
    /// Passed: neither TCP nor UDP.
    PassNotL4 = 1, "pass_not_l4";
    /// Passed: the destination (or, leaving, the flow) is not ours.
    PassNotOurs = 2, "pass_not_ours";
    /// Passed: a header is truncated or contradicts itself; the stack will drop it.
    PassMalformed = 3, "pass_malformed";
    /// Passed: a fragment of a packet to a VIP; ports are not known.
    PassFragment = 4, "pass_fragment";
    /// Passed: a TCP segment in mid-stream for a VIP without flow entry; it may be another datapath's.
    PassMidStream = 5, "pass_mid_stream";
    /// Passed: a port of a node's own address that no Service claims.
    PassNodeAddress = 6, "pass_node_address";
    /// Left untouched for tc: XDP can't finish it, or a socket hook doesn't know the pod's address yet.
    PassToTc = 7, "pass_to_tc";
    /// Translated; the stack delivers it to a backend on this node.
    ToLocalBackend = 8, "to_local_backend";
    /// Translated, masqueraded and sent to a backend on another node.
    ToRemoteBackend = 9, "to_remote_backend";
    /// Translated on its way from a pod to a backend; the stack routes it.
    FromPod = 10, "from_pod";
    /// A pod reached itself through its Service: masqueraded and turned around.
    Hairpin = 11, "hairpin";
    /// A reply, translated back.
    Reply = 12, "reply";
    /// Refused: the Service has no endpoints.
    RefuseNoEndpoints = 13, "refuse_no_endpoints";
    /// Refused: a VIP that belongs to no node has no such port.
    RefuseUnknownPort = 14, "refuse_unknown_port";
    /// Dropped: no endpoint on this node and the traffic policy is Local.
    DropNoLocalEndpoints = 15, "drop_no_local_endpoints";
    /// Dropped: the source is not in `loadBalancerSourceRanges`.
    DropSourceRange = 16, "drop_source_range";
    /// Dropped: no free source port towards the backend.
    DropSnatPorts = 17, "drop_snat_ports";
    /// Dropped: the flow table refused the entry.
    DropFlowTable = 18, "drop_flow_table";
    /// Dropped: time to live (hop limit) ran out here.
    DropTtl = 19, "drop_ttl";
    /// Dropped: no route to the backend or client, or the packet exceeds the route's MTU.
    DropNoRoute = 20, "drop_no_route";
    /// Dropped: the node has no address to masquerade to in this family.
    DropNoNodeAddress = 21, "drop_no_node_address";
    /// Dropped: a refusal that cannot be answered (IP options, or no room in the frame).
    DropUnanswered = 22, "drop_unanswered";
    /// Dropped: the frame could not be rewritten.
    DropRewrite = 23, "drop_rewrite";
    /// A socket call's destination was translated.
    SockTranslated = 24, "sock_translated";
    /// A socket's peer or source was translated back.
    SockReply = 25, "sock_reply";
    /// Dropped: the chosen slot holds no live backend (between two writes of the agent).
    DropNoBackend = 26, "drop_no_backend";
    /// Passed: new, while this datapath only carries its flows to their end.
    PassDraining = 27, "pass_draining";
    /// Passed: a datagram of a flow that netfilter translated before this datapath served.
    PassForeign = 28, "pass_foreign";
    /// Refused: a connection whose backend is gone, where the agent was told to reset such.
    RefuseBackendGone = 29, "refuse_backend_gone";
}

/// Room for outcomes per hook in the `METRICS` map.
pub const OUTCOMES_PER_HOOK: u32 = 32;

const _: () = assert!(Outcome::ALL.len() <= OUTCOMES_PER_HOOK as usize);

/// Where a program runs; the `METRICS` index is `hook * OUTCOMES_PER_HOOK + outcome`.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// XDP on an external device.
    Xdp = 0,
    /// tc ingress of an external device.
    NetdevIngress = 1,
    /// tc egress of an external device.
    NetdevEgress = 2,
    /// tc ingress of a pod's veth: from the pod.
    PodIngress = 3,
    /// tc egress of a pod's veth: to the pod.
    PodEgress = 4,
    /// cgroup socket hooks.
    Socket = 5,
}

impl Hook {
    /// All hooks, by number.
    pub const ALL: &'static [Self] = &[
        Self::Xdp,
        Self::NetdevIngress,
        Self::NetdevEgress,
        Self::PodIngress,
        Self::PodEgress,
        Self::Socket,
    ];

    /// The metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::NetdevIngress => "netdev_ingress",
            Self::NetdevEgress => "netdev_egress",
            Self::PodIngress => "pod_ingress",
            Self::PodEgress => "pod_egress",
            Self::Socket => "socket",
        }
    }
}

/// Entries of the `METRICS` map.
pub const METRICS_LEN: u32 = Hook::ALL.len() as u32 * OUTCOMES_PER_HOOK;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_indices() {
        for (i, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, i);
        }
        for (i, hook) in Hook::ALL.iter().enumerate() {
            assert_eq!(*hook as usize, i);
        }
    }

    #[test]
    fn labels_are_unique() {
        for (i, a) in Outcome::ALL.iter().enumerate() {
            assert!(Outcome::ALL[i + 1..].iter().all(|b| a.as_str() != b.as_str()), "{}", a.as_str());
        }
    }
}
