//! The cluster that the table is about.

use crate::cluster::{CLIENT, Cluster, Cni, node_ip, pod_ip, pod_ip6, pod_manifest};

/// Where pods' addresses lie, as `--cluster-cidr` takes it.
pub const CLUSTER_CIDR: &str = "10.244.0.0/16,fd00:10:244::/48";

/// Pods 11 and 21, one on each node, and Services: `web` on both, `near` on pod 11, `far` on pod 21, and one for each
/// policy. A Service's number ends its addresses and its NodePorts.
pub fn manifests() -> String {
    let selected = |number: u8, name: &str, selector: &str, more: &str| {
        service(number, name, &format!("selector: {{{selector}}}, {more}"))
    };
    [
        pod_manifest(1, 1),
        pod_manifest(2, 1),
        selected(
            10,
            "web",
            "app: web",
            &format!("externalIPs: [{}, 198.51.100.10, '2001:db8:ffff::10']", node_ip(1)),
        ),
        selected(11, "near", "pod: pod11", &external_ips(11)),
        selected(12, "far", "pod: pod21", &external_ips(12)),
        selected(13, "sticky", "app: web", "sessionAffinity: ClientIP"),
        selected(
            14,
            "local",
            "pod: pod11",
            &format!("externalTrafficPolicy: Local, internalTrafficPolicy: Local, {}", external_ips(14)),
        ),
        selected(15, "none", "app: nobody", &external_ips(15)),
        load_balanced(16, "ranged", &format!("loadBalancerSourceRanges: [{CLIENT}/32]")),
        load_balanced(17, "closed", "loadBalancerSourceRanges: [203.0.113.0/24]"),
        service(18, "draining", &external_ips(18)),
        slices("draining", [(1, DRAINING, ""), (2, GONE, "")]),
        service(19, "moving", ""),
        slices("moving", [(1, DRAINING, ""), (2, READY, "")]),
        service(20, "hinted", &external_ips(20)),
        slices("hinted", [(1, READY, "node1"), (2, READY, "node2")]),
        load_balanced(21, "balanced", "externalTrafficPolicy: Local"),
        // The client's and both nodes' addresses.
        load_balanced(22, "hosts", "loadBalancerSourceRanges: [192.0.2.8/29]"),
    ]
    .concat()
}

const PORTS: &str = "{name: http, port: 80, targetPort: http NODE}, {name: dns, port: 80, targetPort: dns, protocol: UDP NODE}";

fn external_ips(number: u8) -> String {
    format!("externalIPs: [198.51.100.{number}, '2001:db8:ffff::{number}']")
}

/// A Service with a NodePort and both families.
fn service(number: u8, name: &str, more: &str) -> String {
    let ports = PORTS.replace(" NODE", &format!(", nodePort: {}", 30070 + u16::from(number)));
    format!(
        "kind: Service\nmetadata: {{name: {name}}}\nspec: {{type: NodePort, clusterIPs: [10.96.0.{number}, 'fd00:10:96::{number}'], ports: [{ports}], {more}}}\n---\n"
    )
}

/// A load-balancer Service without NodePort, on pod 11 alone if its policy is Local.
fn load_balanced(number: u8, name: &str, more: &str) -> String {
    let ports = PORTS.replace(" NODE", "");
    let selector = if more.contains("Local") { "pod: pod11" } else { "app: web" };
    format!(
        "kind: Service\nmetadata: {{name: {name}}}\nspec: {{type: LoadBalancer, clusterIP: 10.96.0.{number}, selector: {{{selector}}}, ports: [{ports}], {more}}}\nstatus: {{loadBalancer: {{ingress: [{{ip: 198.51.100.{number}}}]}}}}\n---\n"
    )
}

const READY: &str = "ready: true, serving: true, terminating: false";
const DRAINING: &str = "ready: false, serving: true, terminating: true";
const GONE: &str = "ready: false, serving: false, terminating: true";

/// The first pod of each of these nodes as an endpoint: its conditions, and the node it is hinted to.
fn slices(service: &str, endpoints: [(u8, &str, &str); 2]) -> String {
    let slice = |family: &str, pod: fn(u8, u8) -> String| {
        let endpoint = |(node, conditions, hint): (u8, &str, &str)| {
            let hints = if hint.is_empty() {
                String::new()
            } else {
                format!(", hints: {{forNodes: [{{name: {hint}}}]}}")
            };
            format!(
                "{{addresses: ['{}'], nodeName: node{node}, conditions: {{{conditions}}}{hints}}}",
                pod(node, 1)
            )
        };
        format!(
            "kind: EndpointSlice\nmetadata: {{name: {service}-{}, labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: {family}\nports: [{{name: http, port: 8080}}, {{name: dns, port: 8080, protocol: UDP}}]\nendpoints: [{}]\n---\n",
            family.to_lowercase(),
            endpoints.map(endpoint).join(", ")
        )
    };
    slice("IPv4", pod_ip) + &slice("IPv6", pod_ip6)
}

/// The cluster of the table with real sockets, each node's agent started with these options.
pub fn cluster(cni: Cni, options: &[&str]) -> Cluster {
    let mut cluster = Cluster::new(cni, 2).expect("a cluster of namespaces");
    cluster.agent_options = options.iter().map(ToString::to_string).collect();
    for host in ["pod11", "pod21"] {
        cluster.serve(host, 8080).expect("a server");
    }
    for node in ["node1", "node2"] {
        cluster.serve(node, 9000).expect("a server");
    }
    cluster.route_services_to_node1().expect("routes");
    cluster.apply_nodes().expect("nodes");
    cluster.apply("services.yaml", &manifests()).expect("services");
    cluster.start_agents(&[1, 2]).expect("agents");
    if !options.contains(&"--mode") || options.contains(&"auto") {
        cluster.wait_for(1, "10.96.0.10:80/TCP", 2).expect("web is served");
        cluster.wait_for(2, "10.96.0.10:80/TCP", 2).expect("web is served");
    }
    cluster
}
