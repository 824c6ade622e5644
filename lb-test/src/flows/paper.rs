//! The table on paper: each row is asked of whatever answers a [`Flow`] on a node.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context, Result};
use lb_agent::source::manifests::Manifests;
use lb_core::{
    compile::{CompileConfig, NodeView, compile},
    flow::{Answer, Dialect, Flow, Origin, Source},
    model::{LocalDetector, Protocol},
    oracle::Policy,
    rules::iptables::Config,
    snapshot::ClusterSnapshot,
    table::ServiceTable,
};

use super::{CLUSTER_CIDR, Expect, FlowCase, Seen, cases, manifests};
use crate::cluster::{CLIENT, CLIENT6, node_ip, node_ip6, node_manifests, pod_ip, pod_ip6};

/// The cluster as objects.
pub struct Paper {
    /// All of them.
    pub cluster: ClusterSnapshot,
    /// What its agents are told.
    pub policy: Policy,
    /// Both nodes.
    pub nodes: [PaperNode; 2],
}

/// One node.
pub struct PaperNode {
    /// What it is.
    pub view: NodeView,
    /// What it serves.
    pub table: ServiceTable,
}

impl Paper {
    /// Reads the table's manifests; `dir` is made for them.
    pub fn load(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        for (file, text) in [("nodes.yaml", node_manifests()), ("services.yaml", manifests())] {
            fs::write(dir.join(file), text).with_context(|| format!("write {file}"))?;
        }
        let (events, warnings) = Manifests::new(dir.to_owned()).scan()?;
        for (file, warnings) in warnings {
            anyhow::ensure!(warnings.is_empty(), "{file}: {warnings:?}");
        }
        let mut cluster = ClusterSnapshot::default();
        events.into_iter().for_each(|event| drop(cluster.apply(event)));
        let pods = LocalDetector::Ranges(
            CLUSTER_CIDR.split(',').map(|range| range.parse().expect("a range")).collect(),
        );
        let nodes = [1, 2].map(|node| {
            let addresses = [node_ip(node), node_ip6(node)].map(|addr| parse(&addr)).to_vec();
            let view =
                NodeView { name: format!("node{node}").into(), zone: None, addresses, primary: Vec::new() };
            let table = compile(&cluster, &view, &CompileConfig::default()).table;
            PaperNode { view, table }
        });
        Ok(Self { cluster, policy: Policy { pods, ..Policy::default() }, nodes })
    }

    /// What the nodes' netfilter rules are made with.
    pub fn rules_config(&self) -> Config {
        Config { pods: self.policy.pods.clone(), ..Config::default() }
    }

    /// Asks every row in one mode, over TCP and UDP, and says which answers are wrong.
    pub fn failures(&self, dialect: Dialect, ask: impl Fn(&PaperNode, &Flow) -> Answer) -> Vec<String> {
        let mut failures = Vec::new();
        for case in cases() {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let (node, got) = self.follow(&case, protocol, &ask);
                let wanted = case.expect(dialect);
                if !is_met(wanted, node, &got) {
                    failures.push(format!(
                        "{dialect}: {case} {protocol}: wanted {wanted:?}, got {got} on node{node}"
                    ));
                }
            }
        }
        failures
    }

    /// From node to node until somebody handles it: what a node passes may be another node's to answer.
    fn follow(
        &self,
        case: &FlowCase,
        protocol: Protocol,
        ask: &impl Fn(&PaperNode, &Flow) -> Answer,
    ) -> (u8, Answer) {
        let v6 = case.target.is_ipv6();
        let (dst, port) = (case.target.ip(), case.target.port());
        let owner =
            [1, 2].into_iter().find(|node| self.nodes[usize::from(node - 1)].view.addresses.contains(&dst));
        let source = addr_of(case.from, v6, dst);
        let (node, origin) = match (node_of(case.from), case.from.starts_with("pod"), case.by_socket) {
            // What no node has is routed to node 1.
            (None, ..) => (owner.unwrap_or(1), Origin::Outside),
            (Some(node), true, true) => (node, Origin::PodSocket),
            (Some(node), true, false) => (node, Origin::Pod),
            (Some(node), false, _) => (node, Origin::Node),
        };
        let at = |node: u8| &self.nodes[usize::from(node - 1)];
        let flow = Flow { origin, source, dst, port, protocol };
        match (ask(at(node), &flow), owner) {
            (Answer::Pass, Some(owner)) if owner != node => {
                (owner, ask(at(owner), &Flow { origin: Origin::Outside, ..flow }))
            }
            (answer, _) => (node, answer),
        }
    }
}

fn is_met(wanted: &Expect, node: u8, got: &Answer) -> bool {
    let backend =
        |pod: &str, got: SocketAddr| SocketAddr::new(addr_of(pod, got.is_ipv6(), got.ip()), 8080) == got;
    match (wanted, got) {
        (Expect::Serve(wanted), Answer::Serve(got)) => {
            let meets = |(pod, seen): &(&str, Seen), (at, source): (&SocketAddr, &Source)| {
                let source = match source {
                    Source::Kept => Seen::Client,
                    Source::Masqueraded => Seen::Node(node),
                };
                backend(pod, *at) && *seen == source
            };
            wanted.len() == got.len() && wanted.iter().all(|one| got.iter().any(|other| meets(one, other)))
        }
        (Expect::Astray(wanted), Answer::Serve(got)) => {
            wanted.len() == got.len()
                && wanted
                    .iter()
                    .all(|pod| got.iter().any(|(at, source)| backend(pod, *at) && *source == Source::Kept))
        }
        (Expect::Refuse, Answer::Reject)
        | (Expect::Drop | Expect::Deny, Answer::Drop)
        | (Expect::Pass(_), Answer::Pass) => true,
        _ => false,
    }
}

/// The node that a namespace is, or is on.
pub(super) fn node_of(name: &str) -> Option<u8> {
    let number = name.strip_prefix("node").or_else(|| name.strip_prefix("pod"))?;
    number.get(..1)?.parse().ok()
}

/// The address of a namespace, as it talks to `dst`.
pub(super) fn addr_of(name: &str, v6: bool, dst: IpAddr) -> IpAddr {
    if dst.is_loopback() {
        return dst;
    }
    let text = match (node_of(name), name.strip_prefix("pod")) {
        (None, _) => if v6 { CLIENT6 } else { CLIENT }.to_owned(),
        (Some(node), None) => {
            if v6 {
                node_ip6(node)
            } else {
                node_ip(node)
            }
        }
        (Some(node), Some(number)) => {
            let pod = number[1..].parse().expect("a pod's name is its node's number and its own");
            if v6 { pod_ip6(node, pod) } else { pod_ip(node, pod) }
        }
    };
    parse(&text)
}

fn parse(text: &str) -> IpAddr {
    text.parse().expect("an address")
}
