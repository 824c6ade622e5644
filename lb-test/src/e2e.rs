//! What Kubernetes' e2e suite does to a cluster, with the cluster's controllers left out: tests write Services and the
//! EndpointSlices that controllers would make of them.
//!
//! Node 1 is served by BPF programs, node 2 by iptables rules: each test is about both.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Result;

use crate::{
    cluster::{Cluster, Cni, node_ip, node_ip6, pod_ip, pod_ip6},
    until,
};

/// Clients in the cluster: namespace, and the node in whose cgroup tree the process is.
pub const INSIDE: [(&str, Option<u8>); 5] =
    [("pod12", None), ("pod12", Some(1)), ("node1", Some(1)), ("pod22", None), ("node2", None)];

/// Those of one node: its number is the first in their names.
pub fn on(node: u8) -> impl Iterator<Item = (&'static str, Option<u8>)> {
    let number = node.to_string();
    let of_node = move |host: &str| host.trim_start_matches(char::is_alphabetic).starts_with(&number);
    INSIDE.into_iter().filter(move |(host, _)| of_node(host))
}

/// A change has to be in the kernel after so long; on a busy machine that is a lot.
const LIMIT: Duration = Duration::from_secs(15);

/// Connections of one look, in pieces: enough that each of two backends is seen but in one of 4000 looks, which are repeated.
const CONNECTIONS: [&str; 4] = ["1", "4", "4", "4"];

/// A cluster with four pods, of which servers answer at 8080 and 8081 by their pod's name, as both nodes do at 9000.
pub fn cluster() -> Cluster {
    let mut cluster = Cluster::new(Cni::Routed, 2).expect("a cluster of namespaces");
    for pod in ["pod11", "pod12", "pod21", "pod22"] {
        cluster.serve(pod, 8080).expect("a server");
    }
    for pod in ["pod11", "pod21"] {
        cluster.serve(pod, 8081).expect("a server");
    }
    for node in ["node1", "node2"] {
        cluster.serve(node, 9000).expect("a server");
    }
    cluster.route_services_to_node1().expect("routes");
    // Else the kernel refuses six connections of a client and then one a second (icmp(7), `icmp_ratelimit`).
    for node in ["node1", "node2"] {
        for sysctl in ["net.ipv4.icmp_ratelimit", "net.ipv6.icmp.ratelimit"] {
            cluster.lab.sysctl(node, sysctl, "0").expect("a sysctl");
        }
    }
    nodes(&cluster, "");
    for (node, mode) in [(1, "ebpf"), (2, "iptables")] {
        let options = ["--mode", mode, "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];
        cluster.agent_options = options.map(str::to_owned).to_vec();
        cluster.start_agent(node).expect("an agent");
    }
    cluster
}

/// Both Nodes, with labels in YAML: `{node}` stands for the node's number.
pub fn nodes(cluster: &Cluster, labels: &str) {
    let node = |node: u8| {
        format!(
            "kind: Node\nmetadata: {{name: node{node}, labels: {{{}}}}}\nstatus: {{addresses: [{{type: InternalIP, address: {}}}, {{type: InternalIP, address: '{}'}}]}}\n---\n",
            labels.replace("{node}", &node.to_string()),
            node_ip(node),
            node_ip6(node)
        )
    };
    cluster.apply("nodes.yaml", &(node(1) + &node(2))).expect("nodes");
}

/// One port by the name of http.
pub const HTTP: &str = "ports: [{name: http, port: 80, targetPort: 8080}]";

/// A Service whose ClusterIPs end with `number`, with more fields in YAML.
pub fn service(name: &str, number: u8, fields: &str) -> String {
    format!(
        "kind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIPs: [10.96.0.{number}, 'fd00:10:96::{number}'], {fields}}}\n---\n"
    )
}

/// `pod11`, `node2`, or one of them with conditions: `pod11 ready: false`.
fn endpoint(text: &str, family: &str) -> String {
    let (host, conditions) = text.split_once(' ').unwrap_or((text, ""));
    let digits: Vec<u8> = host.bytes().filter(u8::is_ascii_digit).map(|digit| digit - b'0').collect();
    let node = digits[0];
    let addr = match (digits.as_slice(), family) {
        ([_, pod], "IPv4") => pod_ip(node, *pod),
        ([_, pod], _) => pod_ip6(node, *pod),
        (_, "IPv4") => node_ip(node),
        _ => node_ip6(node),
    };
    let (conditions, hints) = conditions.split_once("hints:").unwrap_or((conditions, ""));
    let hints = if hints.is_empty() { String::new() } else { format!(", hints: {hints}") };
    format!("{{addresses: ['{addr}'], nodeName: node{node}, conditions: {{{conditions}}}{hints}}}")
}

/// The EndpointSlices of a Service, one a family; `ports` in YAML.
pub fn slices(service: &str, ports: &str, endpoints: &[&str]) -> String {
    let slice = |family: &str| {
        let endpoints: Vec<String> = endpoints.iter().map(|text| endpoint(text, family)).collect();
        format!(
            "kind: EndpointSlice\nmetadata: {{name: {service}-{}, labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: {family}\nports: [{ports}]\nendpoints: [{}]\n---\n",
            family.to_lowercase(),
            endpoints.join(", ")
        )
    };
    slice("IPv4") + &slice("IPv6")
}

/// Slices for [`HTTP`].
pub fn http(service: &str, endpoints: &[&str]) -> String {
    slices(service, "{name: http, port: 8080}", endpoints)
}

/// Who answers so many new connections, or what comes instead.
pub fn answers(
    cluster: &Cluster,
    (from, served): (&str, Option<u8>),
    how: &str,
    target: &str,
) -> BTreeSet<String> {
    let ask = |count: &str| -> Result<Vec<String>> {
        let answers = cluster.ask(from, served, &[how, target, "--count", count, "--timeout-ms", "700"])?;
        Ok(answers.into_iter().map(|answer| answer.id.or(answer.error).unwrap_or_default()).collect())
    };
    let mut seen = BTreeSet::new();
    for count in CONNECTIONS {
        seen.extend(ask(count).expect("answers"));
        // Nobody answers, maybe from now on: more of them would only wait longer.
        if seen.contains("timeout") || seen.contains("other") {
            break;
        }
    }
    seen
}

/// Waits until these clients get answers from all of `who`, and from nobody else.
pub fn expect(
    cluster: &Cluster,
    clients: impl IntoIterator<Item = (&'static str, Option<u8>)>,
    target: &str,
    who: &[&str],
) {
    let wanted: BTreeSet<String> = who.iter().map(ToString::to_string).collect();
    for client in clients {
        let mut seen = BTreeSet::new();
        let what = format!("{client:?} -> {target}: {wanted:?}");
        until(&what, LIMIT, || {
            seen = answers(cluster, client, "tcp", target);
            if seen != wanted {
                eprintln!("{client:?} -> {target}: {seen:?}, not yet {wanted:?}");
            }
            seen == wanted
        });
    }
}
