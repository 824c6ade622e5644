//! What becomes of flows when their backend goes: Kubernetes' e2e `conntrack.go`, in each mode, with a client that never
//! changes its source port. The old backend goes on answering whoever still asks it, so that nobody asks it by mistake.

use std::time::Duration;

use lb_test::{
    cluster::{CLIENT, Cluster, Cni, node_ip, node_ip6, pod_ip, pod_ip6},
    is_vm, netns,
    talk::Talk,
};

const CLUSTER_CIDR: &str = "10.244.0.0/16,fd00:10:244::/48";
const MODES: [&str; 3] = ["ebpf", "nftables", "iptables"];

/// The modes a test is for. In the test VM it is ipvs: that is slow, and the others are seen to outside.
fn modes<'a>(outside: &'a [&'a str]) -> &'a [&'a str] {
    if is_vm() { &["ipvs"] } else { outside }
}

const READY: &str = "ready: true, serving: true, terminating: false";
const UNREADY: &str = "ready: false, serving: false, terminating: false";
const DRAINING: &str = "ready: false, serving: true, terminating: true";

const CLUSTER_IP: &str = "10.96.0.53:53";
const CLUSTER_IP6: &str = "[fd00:10:96::53]:53";
const NODE_PORT: u16 = 30053;
/// Clients reach it by way of node 1.
const LOAD_BALANCER: &str = "198.51.100.53:53";

/// A pod that is an endpoint: node, number, conditions.
type Pod = (u8, u8, &'static str);

/// A cluster with servers on these pods, and agents of this mode.
fn cluster(mode: &str, servers: &[&str]) -> Cluster {
    cluster_with(mode, servers, &[])
}

fn cluster_with(mode: &str, servers: &[&str], options: &[&str]) -> Cluster {
    let mut cluster = Cluster::new(Cni::Routed, 3).expect("a cluster of namespaces");
    for pod in servers {
        cluster.serve(pod, 8080).expect("a server");
    }
    cluster.apply_nodes().unwrap();
    cluster.lab.ip("client", &format!("route add 198.51.100.0/24 via {}", node_ip(1))).unwrap();
    // A node that doesn't serve it yet knows a shorter way, which the client would take from then on.
    for device in ["all", "eth0"] {
        cluster.lab.sysctl("client", &format!("net.ipv4.conf.{device}.accept_redirects"), "0").unwrap();
    }
    let all = [&["--mode", mode, "--cluster-cidr", CLUSTER_CIDR], options].concat();
    cluster.agent_options = all.iter().map(ToString::to_string).collect();
    cluster.start_agents(&[1, 2]).expect("agents");
    cluster
}

/// The Service of all tests, over UDP and TCP, with these endpoints at this port.
fn apply(cluster: &Cluster, policy: &str, endpoints: &[Pod], port: u16) {
    let service = format!(
        "kind: Service\nmetadata: {{name: dns}}\nstatus: {{loadBalancer: {{ingress: [{{ip: 198.51.100.53}}]}}}}\nspec: {{type: LoadBalancer, clusterIPs: [10.96.0.53, 'fd00:10:96::53'], {policy} ports: [{{name: dns, port: 53, nodePort: {NODE_PORT}, protocol: UDP}}, {{name: tcp, port: 53, nodePort: {NODE_PORT}}}]}}\n"
    );
    let slice = |family: &str, addr: fn(u8, u8) -> String| {
        let endpoint = |(node, number, conditions): &Pod| {
            format!(
                "{{addresses: ['{}'], nodeName: node{node}, conditions: {{{conditions}}}}}",
                addr(*node, *number)
            )
        };
        let endpoints: Vec<String> = endpoints.iter().map(endpoint).collect();
        format!(
            "---\nkind: EndpointSlice\nmetadata: {{name: dns-{}, labels: {{kubernetes.io/service-name: dns}}}}\naddressType: {family}\nports: [{{name: dns, port: {port}, protocol: UDP}}, {{name: tcp, port: {port}}}]\nendpoints: [{}]\n",
            family.to_lowercase(),
            endpoints.join(", ")
        )
    };
    cluster.apply("dns.yaml", &[service, slice("IPv4", pod_ip), slice("IPv6", pod_ip6)].concat()).unwrap();
}

/// Where somebody asks from, whether socket hooks see it, and what is dialled.
type Client<'a> = (&'a str, Option<u8>, &'a str);

/// Each client with a source port of its own.
fn start(cluster: &Cluster, clients: &[Client<'_>]) -> Vec<Talk> {
    let talk = |((from, served, target), port): (&Client<'_>, u16)| {
        Talk::udp(cluster, (from, *served), target, port, &[]).unwrap()
    };
    clients.iter().zip(12345..).map(talk).collect()
}

/// Replaces the backend under clients that talk all the time.
fn cycle(mode: &str, policy: &str, clients: &[Client<'_>], [old, new]: [Pod; 2]) {
    let name = |(node, number, _): Pod| format!("pod{node}{number}");
    let cluster = cluster(mode, &[&name(old), &name(new)]);
    apply(&cluster, policy, &[old], 8080);
    let mut talks = start(&cluster, clients);
    for talk in &mut talks {
        talk.until_answered_by(&name(old)).unwrap_or_else(|error| panic!("{mode}: {error}"));
    }
    apply(&cluster, policy, &[new], 8080);
    for talk in &mut talks {
        talk.until_answered_by(&name(new)).unwrap_or_else(|error| panic!("{mode}: {error}"));
        talk.stays_with(&name(new), 10).unwrap_or_else(|error| panic!("{mode}: {error}"));
    }
}

#[test]
fn udp_goes_on_when_the_server_pod_cycles_for_a_cluster_ip() {
    for mode in modes(&MODES) {
        // By packets; and, where there are any, by socket hooks.
        let clients = [
            ("pod11", None, CLUSTER_IP),
            ("pod11", None, CLUSTER_IP6),
            ("pod21", None, CLUSTER_IP),
            ("pod11", Some(1), CLUSTER_IP),
            ("pod11", Some(1), CLUSTER_IP6),
        ];
        cycle(mode, "", &clients, [(2, 2, READY), (2, 3, READY)]);
    }
}

#[test]
fn udp_goes_on_when_the_server_pod_cycles_and_the_client_is_on_the_hosts_network() {
    for mode in modes(&MODES) {
        let clients = [("node1", Some(1), CLUSTER_IP), ("node1", Some(1), CLUSTER_IP6)];
        cycle(mode, "", &clients, [(2, 2, READY), (2, 3, READY)]);
    }
}

#[test]
fn udp_goes_on_when_the_server_pod_cycles_for_a_node_port() {
    for mode in modes(&MODES) {
        let here = format!("{}:{NODE_PORT}", node_ip(1));
        let here6 = format!("[{}]:{NODE_PORT}", node_ip6(1));
        let clients = [("client", None, &*here), ("client", None, &*here6)];
        cycle(mode, "", &clients, [(2, 2, READY), (2, 3, READY)]);
    }
}

#[test]
fn udp_goes_on_when_the_server_pod_cycles_for_a_load_balancer() {
    for mode in modes(&MODES) {
        let clients = [("client", None, LOAD_BALANCER), ("pod11", None, LOAD_BALANCER)];
        cycle(mode, "", &clients, [(2, 2, READY), (2, 3, READY)]);
    }
}

#[test]
fn udp_goes_on_when_the_server_pod_cycles_for_a_cluster_ip_with_internal_traffic_policy_local() {
    for mode in modes(&MODES) {
        let clients = [("pod11", None, CLUSTER_IP), ("pod11", Some(1), CLUSTER_IP6)];
        cycle(mode, "internalTrafficPolicy: Local,", &clients, [(1, 2, READY), (1, 3, READY)]);
    }
}

#[test]
fn udp_goes_on_when_initially_unready_endpoints_get_ready() {
    for mode in modes(&MODES) {
        let cluster = cluster(mode, &["pod22"]);
        // Begun before there is a Service: what knows nothing of it lets the flow pass.
        let here = format!("{}:{NODE_PORT}", node_ip(1));
        let clients = [
            ("pod11", None, CLUSTER_IP),
            ("pod11", Some(1), CLUSTER_IP6),
            ("node1", Some(1), CLUSTER_IP),
            ("client", None, &here),
        ];
        let mut talks = start(&cluster, &clients);
        for talk in &mut talks {
            talk.until(Duration::from_secs(5), |answer| answer.error.is_some()).unwrap();
        }
        apply(&cluster, "", &[(2, 2, UNREADY)], 8080);
        for talk in &mut talks {
            talk.until(Duration::from_secs(5), |answer| answer.error.is_some()).unwrap();
        }
        apply(&cluster, "", &[(2, 2, READY)], 8080);
        for talk in &mut talks {
            talk.until_answered_by("pod22").unwrap_or_else(|error| panic!("{mode}: {error}"));
            talk.stays_with("pod22", 10).unwrap_or_else(|error| panic!("{mode}: {error}"));
        }
    }
}

#[test]
fn udp_goes_on_when_the_target_port_changes() {
    for mode in modes(&MODES) {
        let mut cluster = cluster(mode, &["pod22"]);
        cluster.serve_as("pod22-9090", "pod22", 9090).unwrap();
        apply(&cluster, "", &[(2, 2, READY)], 8080);
        let here = format!("{}:{NODE_PORT}", node_ip(1));
        let clients = [("pod11", None, CLUSTER_IP), ("pod11", Some(1), CLUSTER_IP), ("client", None, &here)];
        let mut talks = start(&cluster, &clients);
        for talk in &mut talks {
            talk.until_answered_by("pod22").unwrap();
        }
        apply(&cluster, "", &[(2, 2, READY)], 9090);
        for talk in &mut talks {
            talk.until_answered_by("pod22-9090").unwrap_or_else(|error| panic!("{mode}: {error}"));
            talk.stays_with("pod22-9090", 10).unwrap_or_else(|error| panic!("{mode}: {error}"));
        }
    }
}

/// A node's conntrack entries of UDP flows from this port.
fn entries(cluster: &Cluster, node: &str, source_port: &str) -> String {
    let args = ["-L", "-p", "udp", "--orig-port-src", source_port];
    netns::output(cluster.lab.command(node, "conntrack").args(args)).unwrap()
}

fn nft(cluster: &Cluster, text: &str) {
    netns::run(cluster.lab.command("node1", "nft").arg(text)).unwrap();
}

/// kube-proxy takes the NodePort's number for enough.
#[test]
fn udp_to_a_foreign_host_at_a_node_ports_number_is_not_cut() {
    for mode in modes(&["nftables", "iptables"]) {
        let mut cluster = cluster(mode, &["pod22", "pod23"]);
        cluster.serve("client", NODE_PORT).unwrap();
        cluster.lab.ip("client", &format!("route add 10.244.1.0/24 via {}", node_ip(1))).unwrap();
        apply(&cluster, "", &[(2, 2, READY)], 8080);
        let (foreign, service) = (format!("{CLIENT}:{NODE_PORT}"), format!("{}:{NODE_PORT}", node_ip(1)));
        let mut foreign = Talk::udp(&cluster, ("pod11", None), &foreign, 12345, &[]).unwrap();
        let mut service = Talk::udp(&cluster, ("client", None), &service, 12346, &[]).unwrap();
        foreign.until_answered_by("client").unwrap();
        service.until_answered_by("pod22").unwrap();
        // A mark is lost with its entry.
        let rule =
            "chain before { type filter hook prerouting priority 0; udp sport 12345-12346 ct mark set 77; }";
        nft(&cluster, &format!("table ip marker {{ {rule}; }}"));
        for port in ["12345", "12346"] {
            until(|| entries(&cluster, "node1", port).contains("mark=77"));
        }
        nft(&cluster, "delete table ip marker");
        apply(&cluster, "", &[(2, 3, READY)], 8080);
        service.until_answered_by("pod23").unwrap_or_else(|error| panic!("{mode}: {error}"));
        foreign.stays_with("client", 10).unwrap_or_else(|error| panic!("{mode}: {error}"));
        assert!(entries(&cluster, "node1", "12345").contains("mark=77"), "{mode}: the foreign flow was cut");
        assert!(!entries(&cluster, "node1", "12346").contains("mark=77"), "{mode}");
    }
}

#[test]
fn what_conntrack_forgot_is_counted() {
    for mode in modes(&["nftables", "iptables"]) {
        let cluster = cluster(mode, &["pod22"]);
        // Begun before there is a Service, so that nobody but us can know that the flow has to choose anew: ipvs itself
        // forgets those of its own whose destination is gone.
        let mut talk = Talk::udp(&cluster, ("pod11", None), CLUSTER_IP, 12345, &[]).unwrap();
        talk.until(Duration::from_secs(5), |answer| answer.error.is_some()).unwrap();
        assert!(entries(&cluster, "node1", "12345").contains("dst=10.96.0.53"), "{mode}: no such flow");
        apply(&cluster, "", &[(2, 2, READY)], 8080);
        talk.until_answered_by("pod22").unwrap_or_else(|error| panic!("{mode}: {error}"));
        let curl = ["-s", "http://127.0.0.1:10249/metrics"];
        let metrics = || netns::output(cluster.lab.command("node1", "curl").args(curl)).unwrap();
        let deleted = "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"} 1\n";
        until(|| metrics().contains(deleted));
        let timed = "kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv4\"} ";
        let page = metrics();
        let count = page.lines().find_map(|line| line.strip_prefix(timed)?.parse::<u64>().ok());
        assert!(count.is_some_and(|count| count > 0), "{mode}: {page}");
    }
}

#[test]
fn tcp_to_a_terminating_backend_goes_on() {
    for mode in modes(&MODES) {
        let cluster = cluster(mode, &["pod22", "pod23"]);
        apply(&cluster, "", &[(2, 2, READY)], 8080);
        let node_port = format!("{}:{NODE_PORT}", node_ip(1));
        let clients =
            [("pod11", None, CLUSTER_IP), ("pod11", Some(1), CLUSTER_IP), ("client", None, &node_port)];
        let mut talks = clients.map(|(from, served, target)| {
            // Whoever is first may be so before the rules are there.
            until(|| cluster.tcp(from, served, target).unwrap().id.is_some());
            let mut talk = Talk::tcp(&cluster, (from, served), target, &[]).unwrap();
            talk.until_answered_by("pod22").unwrap_or_else(|error| panic!("{mode}: {error}"));
            talk
        });
        // Draining, and then gone: whoever is connected stays so.
        for endpoints in [&[(2, 2, DRAINING), (2, 3, READY)][..], &[(2, 3, READY)]] {
            apply(&cluster, "", endpoints, 8080);
            for (from, served, target) in clients {
                let new = || cluster.tcp(from, served, target).unwrap().id;
                until(|| new().as_deref() == Some("pod23"));
                assert_eq!(new().as_deref(), Some("pod23"), "{mode}: {from} to {target}");
            }
            for talk in &mut talks {
                talk.stays_with("pod22", 20).unwrap_or_else(|error| panic!("{mode}: {error}"));
            }
        }
    }
}

fn until(holds: impl Fn() -> bool) {
    lb_test::until("the cluster is as it should be", Duration::from_secs(10), holds);
}

/// A segment that conntrack calls invalid is not translated back: the client doesn't know its sender, and resets the
/// connection of the one who does.
#[test]
fn the_invalid_conntrack_state_bug_does_no_harm() {
    for mode in modes(&["ebpf", "iptables"]) {
        let cluster = cluster(mode, &["pod22"]);
        apply(&cluster, "", &[(2, 2, READY)], 8080);
        until(|| cluster.tcp("pod11", None, CLUSTER_IP).unwrap().id.is_some());
        let mut talk = Talk::tcp(&cluster, ("pod11", None), CLUSTER_IP, &["--stray-segment"]).unwrap();
        talk.stays_with("pod22", 20).unwrap_or_else(|error| panic!("{mode}: {error}"));
    }
}

/// The segment of the test above does break a connection that nobody protects.
#[test]
fn the_invalid_conntrack_state_bug_would_do_harm() {
    let cluster = cluster("iptables", &["pod22"]);
    apply(&cluster, "", &[(2, 2, READY)], 8080);
    until(|| cluster.tcp("pod11", None, CLUSTER_IP).unwrap().id.is_some());
    for node in ["node1", "node2"] {
        let iptables = |words: &str| {
            netns::output(cluster.lab.command(node, "iptables").args(words.split(' '))).unwrap()
        };
        assert!(iptables("-S KUBE-FORWARD 1").contains("--ctstate INVALID"));
        iptables("-D KUBE-FORWARD 1");
    }
    let mut talk = Talk::tcp(&cluster, ("pod11", None), CLUSTER_IP, &["--stray-segment"]).unwrap();
    talk.until_answered_by("pod22").unwrap();
    talk.until(Duration::from_secs(10), |answer| answer.error.is_some()).unwrap();
}

const RESET: &[&str] = &["--on-backend-gone", "reset"];

/// Whoever a node's hooks or programs connected to this NodePort, ClusterIP or externally.
fn connected_clients(node_port: &str) -> [Client<'_>; 5] {
    [
        // By packets, from a pod and from outside, and by socket hooks.
        ("pod11", None, CLUSTER_IP),
        ("client", None, node_port),
        ("pod11", Some(1), CLUSTER_IP),
        ("pod11", Some(1), CLUSTER_IP6),
        ("node1", Some(1), CLUSTER_IP),
    ]
}

#[test]
fn tcp_to_a_backend_that_is_gone_is_reset_if_told_so() {
    let node_port = format!("{}:{NODE_PORT}", node_ip(1));
    // On another node, and on the one that is dialled.
    for (old, new) in [((2, 2), (2, 3)), ((1, 2), (1, 3))] {
        let name = |(node, number): (u8, u8)| format!("pod{node}{number}");
        let cluster = cluster_with("ebpf", &[&name(old), &name(new)], RESET);
        let pod = |(node, number): (u8, u8), conditions| (node, number, conditions);
        apply(&cluster, "", &[pod(old, READY)], 8080);
        let mut talks = connected_clients(&node_port).map(|(from, served, target)| {
            until(|| cluster.tcp(from, served, target).unwrap().id.is_some());
            let mut talk = Talk::tcp(&cluster, (from, served), target, &[]).unwrap();
            talk.until_answered_by(&name(old)).unwrap();
            talk
        });
        // Not on its way out, and not while it is only unready.
        for conditions in [DRAINING, UNREADY] {
            apply(&cluster, "", &[pod(old, conditions), pod(new, READY)], 8080);
            until(|| cluster.tcp("pod11", None, CLUSTER_IP).unwrap().id.as_deref() == Some(&name(new)));
            for talk in &mut talks {
                talk.stays_with(&name(old), 100).unwrap();
            }
        }
        apply(&cluster, "", &[pod(new, READY)], 8080);
        for talk in &mut talks {
            let end = talk.until(Duration::from_secs(10), |answer| answer.error.is_some()).unwrap();
            assert!(matches!(end.error.as_deref(), Some("reset" | "aborted")), "{end:?}");
        }
        let status = cluster.agent(1, &["status"]).unwrap();
        assert!(status.contains("refuse_backend_gone"), "{status}");
    }
}

#[test]
fn connected_udp_sockets_get_an_error_when_their_backend_is_gone_if_told_so() {
    for (options, ends) in [(RESET, true), (&[], false)] {
        let cluster = cluster_with("ebpf", &["pod22", "pod23"], options);
        apply(&cluster, "", &[(2, 2, READY)], 8080);
        let clients =
            [("pod11", Some(1), CLUSTER_IP), ("pod11", Some(1), CLUSTER_IP6), ("node1", Some(1), CLUSTER_IP)];
        let mut talks = clients.map(|(from, served, target)| {
            until(|| cluster.tcp(from, served, target).unwrap().id.is_some());
            let port = if target == CLUSTER_IP { "12345" } else { "12346" };
            Talk::udp(&cluster, (from, served), target, port.parse().unwrap(), &["--connected"]).unwrap()
        });
        // Connected by a program of nobody's cgroup, straight to the backend: not ours to end.
        let mut other = Talk::udp(
            &cluster,
            ("pod12", Some(1)),
            &format!("{}:8080", pod_ip(2, 2)),
            12345,
            &["--connected"],
        )
        .unwrap();
        for talk in talks.iter_mut().chain([&mut other]) {
            talk.until_answered_by("pod22").unwrap();
        }
        apply(&cluster, "", &[(2, 3, READY)], 8080);
        until(|| cluster.tcp("pod11", None, CLUSTER_IP).unwrap().id.as_deref() == Some("pod23"));
        for talk in &mut talks {
            if ends {
                let end = talk.until(Duration::from_secs(10), |answer| answer.error.is_some()).unwrap();
                // Who waits is told; who sends finds that the socket has no peer any more.
                assert!(matches!(end.error.as_deref(), Some("aborted" | "unconnected")), "{end:?}");
            } else {
                // As with TCP, the choice is made once, when the socket connects.
                talk.stays_with("pod22", 100).unwrap();
            }
        }
        other.stays_with("pod22", 100).unwrap();
    }
}
