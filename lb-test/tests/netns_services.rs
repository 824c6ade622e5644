//! Real sockets against real programs: every way to a service, in both families and with both ways of wiring pods.

use std::sync::Mutex;

use lb_test::cluster::{Answer, CLIENT, CLIENT6, Cluster, Cni, node_ip, node_ip6, pod_ip, pod_ip6};

/// Web on pods 11 and 21 (one each node), `only1` on pod 11 alone, `far` on pod 21 alone, and services with policies.
fn manifests() -> String {
    let pod = |node: u8, number: u8| {
        format!(
            "kind: Pod\nmetadata: {{name: pod{node}{number}, labels: {{app: web, pod: pod{node}{number}}}}}\nspec: {{nodeName: node{node}, containers: [{{name: c, ports: [{{containerPort: 8080, name: http}}, {{containerPort: 8080, name: dns, protocol: UDP}}]}}]}}\nstatus: {{podIPs: [{{ip: {}}}, {{ip: '{}'}}]}}\n---\n",
            pod_ip(node, number),
            pod_ip6(node, number)
        )
    };
    let both = "ports: [{name: http, port: 80, targetPort: http, nodePort: NP}, {name: dns, port: 80, targetPort: dns, protocol: UDP, nodePort: NP}]";
    let service = |name: &str, ip: u8, selector: &str, node_port: u16, more: &str| {
        format!(
            "kind: Service\nmetadata: {{name: {name}}}\nspec: {{type: NodePort, clusterIPs: [10.96.0.{ip}, 'fd00:10:96::{ip}'], selector: {{{selector}}}, {}, {more}}}\n---\n",
            both.replace("NP", &node_port.to_string())
        )
    };
    [
        pod(1, 1),
        pod(2, 1),
        service("web", 10, "app: web", 30080, &format!("externalIPs: [{}, 198.51.100.10, '2001:db8:ffff::10']", node_ip(1))),
        service("near", 11, "pod: pod11", 30081, "externalIPs: [198.51.100.11, '2001:db8:ffff::11']"),
        service("far", 12, "pod: pod21", 30082, "externalIPs: [198.51.100.12, '2001:db8:ffff::12']"),
        service("sticky", 13, "app: web", 30083, "sessionAffinity: ClientIP"),
        service("local", 14, "pod: pod11", 30084, "externalTrafficPolicy: Local, internalTrafficPolicy: Local, externalIPs: [198.51.100.14]"),
        service("none", 15, "app: nobody", 30085, "externalIPs: [198.51.100.15]"),
        format!(
            "kind: Service\nmetadata: {{name: ranged}}\nspec: {{type: LoadBalancer, clusterIP: 10.96.0.16, selector: {{app: web}}, loadBalancerSourceRanges: [{CLIENT}/32], ports: [{{port: 80, targetPort: http}}]}}\nstatus: {{loadBalancer: {{ingress: [{{ip: 198.51.100.16}}]}}}}\n---\n"
        ),
        "kind: Service\nmetadata: {name: closed}\nspec: {type: LoadBalancer, clusterIP: 10.96.0.17, selector: {app: web}, loadBalancerSourceRanges: [203.0.113.0/24], ports: [{port: 80, targetPort: http}]}\nstatus: {loadBalancer: {ingress: [{ip: 198.51.100.17}]}}\n---\n".to_string(),
    ]
    .concat()
}

fn cluster(cni: Cni, options: &[&str]) -> Cluster {
    let mut cluster = Cluster::new(cni, 2).expect("a cluster of namespaces");
    cluster.agent_options = options.iter().map(ToString::to_string).collect();
    for host in ["pod11", "pod21"] {
        cluster.serve(host, 8080).expect("a server");
    }
    for node in ["node1", "node2"] {
        cluster.serve(node, 9000).expect("a server");
    }
    // Addresses that no node has are routed to node 1.
    cluster.lab.ip("client", &format!("route add 198.51.100.0/24 via {}", node_ip(1))).unwrap();
    cluster.lab.ip("client", &format!("-6 route add 2001:db8:ffff::/64 via {}", node_ip6(1))).unwrap();
    cluster.apply_nodes().unwrap();
    cluster.apply("services.yaml", &manifests()).unwrap();
    cluster.start_agents(&[1, 2]).expect("agents");
    if !options.contains(&"--mode") {
        cluster.wait_for(1, "10.96.0.10:80/TCP", 2).unwrap();
        cluster.wait_for(2, "10.96.0.10:80/TCP", 2).unwrap();
    }
    cluster
}

/// One question and what must come of it.
struct Row {
    what: &'static str,
    from: &'static str,
    /// In this node's cgroup tree: its socket calls are translated. Else its packets are.
    served: Option<u8>,
    target: String,
    /// The server, or the error.
    expect: Result<&'static [&'static str], &'static str>,
    /// The client's address as the server sees it.
    client: Option<String>,
    /// What kube-proxy's rules make of it where that differs on purpose.
    netfilter: Option<Difference>,
    /// What its nftables do that its iptables rules don't.
    nftables: Option<Difference>,
}

/// A deliberate difference between datapaths.
struct Difference {
    expect: Result<&'static [&'static str], &'static str>,
    client: Option<String>,
}

impl Row {
    /// kube-proxy's rules masquerade whatever policy Cluster takes in from anywhere but a ClusterIP.
    fn masqueraded(mut self, node: &str) -> Self {
        self.netfilter = Some(Difference { expect: self.expect, client: Some(node.to_owned()) });
        self
    }

    /// kube-proxy's rules don't know this packet; wherever it goes, nobody answers as the service.
    fn passed(mut self) -> Self {
        self.netfilter = Some(Difference { expect: Err(UNSERVED), client: None });
        self
    }

    /// kube-proxy's rules refuse with ICMP. Over a wire without delay the answer to a SYN is there before connect(2)
    /// lets go of the socket, and IPv6 sockets heed the next one only (`tcp_v6_err`).
    fn refused_by_icmp(mut self) -> Self {
        self.netfilter = Some(Difference { expect: Err(REFUSED_LATE), client: None });
        self
    }

    /// kube-proxy's rules drop in silence what a socket hook refuses.
    fn dropped(mut self) -> Self {
        self.netfilter = Some(Difference { expect: Err("timeout"), client: None });
        self
    }

    /// kube-proxy's nftables serve no NodePorts on loopback.
    fn not_on_loopback(mut self) -> Self {
        self.nftables = Some(Difference { expect: Err("refused"), client: None });
        self
    }

    /// The row as kube-proxy's rules serve it.
    fn with_rules(mut self, nftables: bool) -> Self {
        let special = self.nftables.take().filter(|_| nftables);
        if let Some(difference) = special.or(self.netfilter.take()) {
            self.expect = difference.expect;
            self.client = difference.client;
        }
        self
    }
}

/// Refused, but perhaps only at the first retransmission.
const REFUSED_LATE: &str = "refused late";

/// Any error at all.
const UNSERVED: &str = "unserved";

const ANY: &[&str] = &["pod11", "pod21"];

fn row(
    what: &'static str,
    from: &'static str,
    served: Option<u8>,
    target: impl Into<String>,
    expect: Result<&'static [&'static str], &'static str>,
    client: Option<&str>,
) -> Row {
    Row {
        what,
        from,
        served,
        target: target.into(),
        expect,
        client: client.map(str::to_owned),
        netfilter: None,
        nftables: None,
    }
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (v6, vip, ext, node, pod, client) in [
        (
            false,
            "10.96.0.",
            "198.51.100.",
            node_ip as fn(u8) -> String,
            pod_ip as fn(u8, u8) -> String,
            CLIENT,
        ),
        (true, "fd00:10:96::", "2001:db8:ffff::", node_ip6, pod_ip6, CLIENT6),
    ] {
        let at =
            |addr: &str, port: u16| if v6 { format!("[{addr}]:{port}") } else { format!("{addr}:{port}") };
        let vip = |n: u8| at(&format!("{vip}{n}"), 80);
        let ext = |n: u8| at(&format!("{ext}{n}"), 80);
        let np = |n: u8, port: u16| at(&node(n), port);
        // Sockets.
        rows.push(row("pod to service", "pod12", Some(1), vip(10), Ok(ANY), Some(&pod(1, 2))));
        rows.push(row(
            "pod to backend on this node",
            "pod12",
            Some(1),
            vip(11),
            Ok(&["pod11"]),
            Some(&pod(1, 2)),
        ));
        rows.push(row(
            "pod to backend on the other node",
            "pod12",
            Some(1),
            vip(12),
            Ok(&["pod21"]),
            Some(&pod(1, 2)),
        ));
        rows.push(row("pod to itself", "pod11", Some(1), vip(11), Ok(&["pod11"]), None));
        rows.push(row("host to service", "node1", Some(1), vip(10), Ok(ANY), None));
        rows.push(row("host to external IP", "node2", Some(2), ext(12), Ok(&["pod21"]), None));
        rows.push(row("pod to node port", "pod12", Some(1), np(1, 30080), Ok(ANY), None));
        rows.push(row("no endpoints", "pod12", Some(1), vip(15), Err("refused"), None).refused_by_icmp());
        rows.push(
            row("unknown port of a VIP", "pod12", Some(1), vip(10).replace("80", "81"), Err("refused"), None)
                .passed(),
        );
        // Packets of pods.
        rows.push(row("veth: pod to service", "pod12", None, vip(10), Ok(ANY), Some(&pod(1, 2))));
        rows.push(row(
            "veth: backend on this node",
            "pod12",
            None,
            vip(11),
            Ok(&["pod11"]),
            Some(&pod(1, 2)),
        ));
        rows.push(row(
            "veth: backend on the other node",
            "pod12",
            None,
            vip(12),
            Ok(&["pod21"]),
            Some(&pod(1, 2)),
        ));
        rows.push(row("veth: pod to itself", "pod11", None, vip(11), Ok(&["pod11"]), Some(&node(1))));
        rows.push(row("veth: no endpoints", "pod12", None, vip(15), Err("refused"), None).refused_by_icmp());
        rows.push(
            row("veth: unknown port", "pod12", None, vip(10).replace("80", "81"), Err("refused"), None)
                .passed(),
        );
        rows.push(
            row("veth: node port", "pod12", None, np(1, 30082), Ok(&["pod21"]), Some(&pod(1, 2)))
                .masqueraded(&node(1)),
        );
        // From outside.
        rows.push(row("outside to external IP", "client", None, ext(10), Ok(ANY), None));
        rows.push(
            row("local backend sees the client", "client", None, ext(11), Ok(&["pod11"]), Some(client))
                .masqueraded(&node(1)),
        );
        rows.push(row(
            "remote backend sees the node",
            "client",
            None,
            ext(12),
            Ok(&["pod21"]),
            Some(&node(1)),
        ));
        rows.push(
            row("node port, local", "client", None, np(1, 30081), Ok(&["pod11"]), Some(client))
                .masqueraded(&node(1)),
        );
        rows.push(row("node port, remote", "client", None, np(2, 30081), Ok(&["pod11"]), Some(&node(2))));
        rows.push(
            row("node port 2, local", "client", None, np(2, 30082), Ok(&["pod21"]), Some(client))
                .masqueraded(&node(2)),
        );
        rows.push(
            row("node port without endpoints", "client", None, np(1, 30085), Err("refused"), None)
                .refused_by_icmp(),
        );
        rows.push(
            row(
                "unknown port of a VIP, outside",
                "client",
                None,
                ext(11).replace("80", "81"),
                Err("refused"),
                None,
            )
            .passed(),
        );
        rows.push(row(
            "eTP Local keeps the client",
            "client",
            None,
            np(1, 30084),
            Ok(&["pod11"]),
            Some(client),
        ));
        rows.push(row("eTP Local without endpoint here", "client", None, np(2, 30084), Err("timeout"), None));
        rows.push(row("another port of a node", "client", None, np(1, 9000), Ok(&["node1"]), Some(client)));
        rows.push(row(
            "another port, from the other node",
            "node2",
            Some(2),
            np(1, 9000),
            Ok(&["node1"]),
            None,
        ));
    }
    let node1 = format!("{}:80", node_ip(1));
    rows.push(row("node's own address as external IP", "client", None, &*node1, Ok(ANY), None));
    rows.push(row("the same, from the other node", "node2", Some(2), &*node1, Ok(ANY), None));
    rows.push(
        row("the same, from a pod", "pod12", None, &*node1, Ok(ANY), Some(&pod_ip(1, 2)))
            .masqueraded(&node_ip(1)),
    );
    rows.push(
        row("localhost node port, host", "node1", Some(1), "127.0.0.1:30080", Ok(ANY), None)
            .not_on_loopback(),
    );
    rows.push(row("localhost node port, pod", "pod12", Some(1), "127.0.0.1:30080", Err("refused"), None));
    rows.push(row("iTP Local", "pod12", Some(1), "10.96.0.14:80", Ok(&["pod11"]), None));
    rows.push(
        row("iTP Local without endpoint here", "pod22", Some(2), "10.96.0.14:80", Err("denied"), None)
            .dropped(),
    );
    rows.push(row(
        "veth: iTP Local without endpoint here",
        "pod22",
        None,
        "10.96.0.14:80",
        Err("timeout"),
        None,
    ));
    rows.push(row("allowed source", "client", None, "198.51.100.16:80", Ok(ANY), None));
    rows.push(row("source not allowed", "client", None, "198.51.100.17:80", Err("timeout"), None));
    rows.push(row("veth: source not allowed", "pod12", None, "198.51.100.16:80", Err("timeout"), None));
    rows.push(row("ranges are met at the veth", "pod12", Some(1), "198.51.100.16:80", Err("timeout"), None));
    rows
}

/// Asks one row's question by one kind of socket and says what is wrong with the answer.
fn check(cluster: &Cluster, row: &Row, how: &[&str]) -> Option<String> {
    let late = row.expect == Err(REFUSED_LATE);
    let timeout = if late { "2500" } else { "1000" };
    let args = [&how[..1], &[&*row.target, "--timeout-ms", timeout], &how[1..]].concat();
    let answer = match cluster.ask(row.from, row.served, &args) {
        Ok(answers) => answers.into_iter().next().unwrap_or_default(),
        Err(error) => Answer { error: Some(format!("{error:#}")), ..Answer::default() },
    };
    let right = match &row.expect {
        Ok(servers) => {
            answer.id.as_deref().is_some_and(|id| servers.contains(&id))
                && row.client.as_ref().is_none_or(|client| answer.client.as_ref() == Some(client))
                && answer.peer.as_ref() == Some(&row.target)
        }
        // The kernel tells an unconnected UDP socket of no ICMP error (udp(7)): only a socket hook can.
        Err("refused") if how == ["udp"] => matches!(answer.error.as_deref(), Some("refused" | "timeout")),
        Err(REFUSED_LATE) if how == ["udp"] => matches!(answer.error.as_deref(), Some("refused" | "timeout")),
        Err(REFUSED_LATE) => answer.error.as_deref() == Some("refused"),
        Err(UNSERVED) => answer.error.is_some(),
        Err(error) => answer.error.as_deref() == Some(*error),
    };
    // A refusal is at once: it doesn't wait for a retransmission, unless it is netfilter's (`refused_by_icmp`).
    let by_icmp = late || row.expect == Err(UNSERVED);
    let prompt = by_icmp || answer.error.as_deref() != Some("refused") || answer.ms < 900;
    (!right || !prompt).then(|| {
        format!(
            "{}: {how:?} {} -> {}: wanted {:?} client {:?}, got {answer:?}",
            row.what, row.from, row.target, row.expect, row.client
        )
    })
}

/// A row by every kind of socket.
fn check_row(cluster: &Cluster, row: &Row) -> Vec<String> {
    let tcp_only = ["198.51.100.16", "198.51.100.17"].iter().any(|addr| row.target.starts_with(addr));
    let how: [&[&str]; 3] = [&["tcp"], &["udp"], &["udp", "--connected"]];
    let how = if tcp_only { &how[..1] } else { &how };
    how.iter().filter_map(|how| check(cluster, row, how)).collect()
}

fn next<T>(of: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    of.lock().unwrap().next()
}

fn check_all(cluster: &Cluster) {
    check_rows(cluster, rows());
}

fn check_rows(cluster: &Cluster, rows: Vec<Row>) {
    let (rows, failures) = (Mutex::new(rows.into_iter()), Mutex::new(Vec::new()));
    // Most of a row's time is waiting for what doesn't come.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(row) = next(&rows) {
                    let failed = check_row(cluster, &row);
                    failures.lock().unwrap().extend(failed);
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(
        failures.is_empty(),
        "{} rows fail:\n{failures:#?}\n{}",
        failures.len(),
        cluster.agent(1, &["status"]).unwrap_or_else(|error| error.to_string())
    );
}

#[test]
fn every_path_with_bridged_pods() {
    check_all(&cluster(Cni::Bridge, &[]));
}

#[test]
fn every_path_with_routed_pods() {
    check_all(&cluster(Cni::Routed, &[]));
}

#[test]
fn large_transfers_arrive_whole() {
    let cluster = cluster(Cni::Bridge, &[]);
    let targets = [
        ("client", None, format!("{}:80", node_ip(1))),
        ("client", None, "198.51.100.11:80".into()),
        ("client", None, "198.51.100.12:80".into()),
        ("client", None, "[2001:db8:ffff::11]:80".into()),
        ("client", None, "[2001:db8:ffff::12]:80".into()),
        ("pod12", None, "10.96.0.11:80".into()),
        ("pod12", None, "10.96.0.12:80".into()),
        ("pod12", None, "[fd00:10:96::12]:80".into()),
        ("pod11", None, "10.96.0.11:80".into()),
        ("pod12", Some(1), "10.96.0.12:80".into()),
    ];
    for offloads in [true, false] {
        for host in ["client", "node1", "node2", "pod11", "pod12", "pod21"] {
            cluster.lab.offloads(host, "eth0", offloads).unwrap();
        }
        for (from, served, target) in &targets {
            let child = cluster.spawn(from, *served, &["download", target, "--bytes", "100000000"]).unwrap();
            let result = lb_test::cluster::finish(child);
            assert!(result.is_ok(), "{from} -> {target}, offloads {offloads}: {result:?}");
        }
    }
}

#[test]
fn clients_with_affinity_keep_their_backend() {
    let cluster = cluster(Cni::Bridge, &[]);
    for (from, served, target) in [
        ("client", None, format!("{}:30083", node_ip(1))),
        ("client", None, format!("{}:30083", node_ip(2))),
        ("client", None, format!("[{}]:30083", node_ip6(1))),
        ("pod12", None, "10.96.0.13:80".into()),
        ("pod12", Some(1), "10.96.0.13:80".into()),
    ] {
        for how in ["tcp", "udp"] {
            let answers = cluster.ask(from, served, &[how, &target, "--count", "12"]).unwrap();
            assert!(
                answers.iter().all(|answer| answer.id.is_some() && answer.id == answers[0].id),
                "{from} {how} -> {target}: {answers:?}"
            );
        }
    }
    let answers =
        cluster.ask("client", None, &["tcp", &format!("{}:30080", node_ip(1)), "--count", "40"]).unwrap();
    for pod in ANY {
        let share = answers.iter().filter(|answer| answer.id.as_deref() == Some(pod)).count();
        assert!((5..=35).contains(&share), "without affinity both serve: {pod} had {share} of 40");
    }
}

#[test]
fn restarts_break_nothing() {
    let mut cluster = cluster(Cni::Bridge, &[]);
    let load = ["load", "198.51.100.10:80", "--connections", "200", "--udp", "20", "--secs", "25"];
    let outside = cluster.spawn("client", None, &load).unwrap();
    let inside = cluster
        .spawn(
            "pod12",
            Some(1),
            &["load", "10.96.0.10:80", "--connections", "50", "--udp", "10", "--secs", "25"],
        )
        .unwrap();
    std::thread::sleep(std::time::Duration::from_secs(1));
    for round in 0..20 {
        let signal = if round % 2 == 0 { libc::SIGKILL } else { libc::SIGTERM };
        cluster.stop_agent(1, signal).unwrap();
        cluster.start_agent(1).unwrap();
    }
    for child in [outside, inside] {
        let report: serde_json::Value =
            serde_json::from_str(&lb_test::cluster::finish(child).unwrap()).unwrap();
        println!("{report}");
        for failure in ["resets", "timeouts", "wrong", "udp_lost"] {
            assert_eq!(report[failure], 0, "{report}");
        }
        assert!(report["requests"].as_u64().unwrap() > 5_000, "{report}");
        assert!(report["udp_requests"].as_u64().unwrap() > 100, "{report}");
    }
    // An unchanged cluster is adopted without a write.
    let log = std::fs::read_to_string(cluster.agent_log(1)).unwrap();
    let last = log.lines().rfind(|line| line.contains("applied")).unwrap();
    assert!(last.contains("upserts=0") && last.contains("deletes=0"), "{last}");
}

#[test]
fn cleanup_removes_all_and_only_ours() {
    let mut cluster = cluster(Cni::Bridge, &[]);
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    let target = "10.96.0.10:80";
    assert!(cluster.tcp("pod12", None, target).unwrap().id.is_some(), "serves without an agent");
    let pins = cluster.lab.bpf_root("node1");
    cluster.agent(1, &["cleanup"]).unwrap();
    assert!(!pins.exists());
    assert!(cluster.lab.bpf_root("node2").exists(), "the other node's pins stay");
    assert_eq!(cluster.tcp("pod12", None, target).unwrap().id, None);
    assert!(cluster.tcp("pod22", None, target).unwrap().id.is_some(), "the other node serves on");
    for device in ["eth0", "veth11"] {
        assert_eq!(cluster.lab.tc_programs("node1", device).unwrap(), Vec::<String>::new());
    }
    assert_eq!(cluster.lab.tc_programs("node2", "eth0").unwrap(), ["tcx lb_netdev_in", "tcx lb_netdev_out"]);
    assert!(cluster.agent(1, &["service", "list"]).unwrap_err().to_string().contains("nothing is pinned"));
}

#[test]
fn changes_are_followed() {
    let mut cluster = cluster(Cni::Bridge, &[]);
    // A pod that comes later gets its programs by itself.
    cluster.lab.add_ns("late").unwrap();
    cluster.lab.veth(("node1", "vethlate"), ("late", "eth0")).unwrap();
    cluster.lab.ip("node1", "link set vethlate master cni0").unwrap();
    cluster.lab.ip("late", "addr add 10.244.1.77/24 dev eth0").unwrap();
    cluster.lab.ip("late", "route add default via 10.244.1.1").unwrap();
    let served = |cluster: &Cluster| cluster.tcp("late", None, "10.96.0.10:80").unwrap().id.is_some();
    assert!((0..20).any(|_| served(&cluster)), "a new veth is served");

    // A backend that goes is not chosen any more; UDP flows to it choose anew at once.
    cluster.serve("pod22", 8080).unwrap();
    let with = manifests()
        .replace("name: pod21, labels: {app: web, pod: pod21}", "name: pod22, labels: {app: web, pod: pod22}")
        .replace(&pod_ip(2, 1), &pod_ip(2, 2))
        .replace(&pod_ip6(2, 1), &pod_ip6(2, 2));
    cluster.apply("services.yaml", &with).unwrap();
    cluster.wait_for(1, "10.96.0.12:80/TCP", 0).unwrap();
    cluster.wait_for(2, "10.96.0.12:80/TCP", 0).unwrap();
    for _ in 0..20 {
        let answer = cluster.tcp("client", None, "198.51.100.10:80").unwrap();
        assert!(matches!(answer.id.as_deref(), Some("pod11" | "pod22")), "{answer:?}");
    }

    // A broken file changes nothing and is named.
    cluster.apply("services.yaml", "kind: Service\nmetadata: {name: x}\nspec: {ports: 7}\n").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(cluster.tcp("client", None, "198.51.100.10:80").unwrap().id.is_some());
    let log = std::fs::read_to_string(cluster.agent_log(1)).unwrap();
    assert!(log.contains("services.yaml") && log.contains("document 1, Service x, spec.ports"), "{log}");
}

#[test]
fn traced_packets_show_every_decision() {
    let cluster = cluster(Cni::Bridge, &["--trace-packets", "198.51.100.11:80/tcp"]);
    let answer = cluster.tcp("client", None, "198.51.100.11:80").unwrap();
    assert_eq!(answer.id.as_deref(), Some("pod11"));
    // Not traced: another address.
    cluster.tcp("client", None, "198.51.100.12:80").unwrap();
    let wanted = [
        &format!("packet {CLIENT}:") as &str,
        "> 198.51.100.11:80 protocol 6 tcp flags 2",
        "service port ",
        &format!(": {}:8080", pod_ip(1, 1)),
        &format!("flow opened: becomes {CLIENT}:"),
        "flow known: becomes ",
        "ended: hook netdev_ingress outcome to_local_backend",
    ];
    let mut log = String::new();
    for _ in 0..50 {
        log = std::fs::read_to_string(cluster.agent_log(1)).unwrap();
        if wanted.iter().all(|line| log.contains(line)) {
            assert!(!log.contains("198.51.100.12:80 protocol"), "traced what does not match:\n{log}");
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let missing: Vec<_> = wanted.iter().filter(|line| !log.contains(**line)).collect();
    panic!("not logged: {missing:?}\n{log}");
}

#[test]
fn every_path_with_clsact_filters() {
    let mut cluster = cluster(Cni::Bridge, &["--tc-mode", "clsact"]);
    check_all(&cluster);
    let clsact = |cluster: &Cluster| {
        let programs = cluster.lab.tc_programs("node1", "eth0").unwrap();
        programs.len() == 2 && programs.iter().all(|program| program.contains("clsact/"))
    };
    assert!(clsact(&cluster));
    cluster.stop_agent(1, libc::SIGKILL).unwrap();
    cluster.start_agent(1).unwrap();
    assert!(clsact(&cluster), "the old program's filter is gone");
    cluster.agent_options = vec!["--tc-mode".into(), "tcx".into()];
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    cluster.start_agent(1).unwrap();
    let programs = cluster.lab.tc_programs("node1", "eth0").unwrap();
    assert_eq!(programs, ["tcx lb_netdev_in", "tcx lb_netdev_out"]);
    assert!(cluster.tcp("client", None, "198.51.100.10:80").unwrap().id.is_some());
}

#[test]
fn an_agent_with_another_map_layout_takes_over() {
    let mut cluster = cluster(Cni::Bridge, &[]);
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    let pins = cluster.lab.bpf_root("node1");
    let mine = pins.join(format!("v{}", lb_common::abi::LAYOUT_VERSION));
    let old = pins.join("v900");
    std::fs::rename(&mine, &old).unwrap();
    let serves = |cluster: &Cluster| cluster.tcp("client", None, "198.51.100.10:80").unwrap().id.is_some();
    assert!(serves(&cluster), "the old version serves");
    cluster.start_agent(1).unwrap();
    cluster.wait_for(1, "10.96.0.10:80/TCP", 2).unwrap();
    for _ in 0..50 {
        if !old.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(!old.exists(), "the old version's pins are gone");
    assert!(serves(&cluster));
    let programs = cluster.lab.tc_programs("node1", "eth0").unwrap();
    assert_eq!(programs, ["tcx lb_netdev_in", "tcx lb_netdev_out"]);
}

#[test]
fn every_path_with_xdp_in_the_driver() {
    let mut cluster = cluster(Cni::Bridge, &["--xdp-mode", "native"]);
    like_a_wire(&mut cluster);
    check_all(&cluster);
    let status = cluster.agent(1, &["status"]).unwrap();
    let counted =
        |outcome: &str| status.lines().any(|line| line.starts_with("xdp ") && line.contains(outcome));
    for outcome in ["to_remote_backend", "reply", "refuse_no_endpoints", "refuse_unknown_port", "pass_to_tc"]
    {
        assert!(counted(outcome), "XDP counted no {outcome}:\n{status}");
    }
}

/// What a real network does for XDP: frames arrive with their checksums complete, and leave at once.
fn like_a_wire(cluster: &mut Cluster) {
    for host in ["client", "node1", "node2"] {
        cluster.lab.offloads(host, "eth0", false).unwrap();
        let port = format!("p-{host}");
        cluster.lab.offloads("lan", &port, false).unwrap();
        cluster.lab.take_xdp_frames("lan", &port).unwrap();
    }
    for pod in ["pod11", "pod12", "pod21", "pod22"] {
        cluster.lab.offloads(pod, "eth0", false).unwrap();
    }
}

#[test]
fn masquerade_all_shows_the_node_to_every_backend() {
    let cluster = cluster(Cni::Bridge, &["--masquerade-all"]);
    for (from, served, target) in [
        ("client", None, "198.51.100.11:80"),
        ("client", None, "198.51.100.12:80"),
        ("pod12", None, "10.96.0.11:80"),
        ("pod12", None, "10.96.0.12:80"),
        ("pod12", Some(1), "10.96.0.12:80"),
        ("pod11", Some(1), "10.96.0.11:80"),
    ] {
        let answer = cluster.tcp(from, served, target).unwrap();
        let client = answer.client.as_deref().and_then(|client| client.split(':').next());
        let node: &[&str] = &["192.0.2.11", "10.244.1.1"];
        assert!(client.is_some_and(|client| node.contains(&client)), "{from} to {target}: {answer:?}");
    }
}

#[test]
fn maps_are_readable_with_bpftool() {
    let cluster = cluster(Cni::Bridge, &[]);
    assert!(cluster.tcp("client", None, "198.51.100.10:80").unwrap().id.is_some());
    let dir = cluster.lab.bpf_root("node1").join(format!("v{}", lb_common::abi::LAYOUT_VERSION));
    for (map, fields) in [
        ("LB4_FRONTENDS", &["addr", "port", "proto", "service_id", "affinity_secs", "external"] as &[&str]),
        ("LB4_BACKENDS", &["addr", "port", "flags", "generation"]),
        ("LB4_FLOWS", &["saddr", "daddr", "sport", "backend_id", "next_hop", "macs"]),
        ("NODE", &["addr4", "snat_port_first", "routing_generation"]),
    ] {
        let path = dir.join(map);
        let dump =
            lb_test::cluster::bpftool(&["map", "dump", "pinned", &path.display().to_string()]).unwrap();
        for field in fields {
            assert!(dump.contains(&format!("\"{field}\":")), "{map} has no {field}:\n{dump:.2000}");
        }
    }
}

const NFTABLES: [&str; 4] = ["--mode", "nftables", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];
const IPTABLES: [&str; 4] = ["--mode", "iptables", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];

#[test]
fn every_path_with_iptables() {
    check_all_with_rules(&cluster(Cni::Routed, &IPTABLES), false);
}

#[test]
fn every_path_with_nftables() {
    check_all_with_rules(&cluster(Cni::Routed, &NFTABLES), true);
}

fn check_all_with_rules(cluster: &Cluster, nftables: bool) {
    for node in ["node1", "node2"] {
        // The kernel sends one peer a few ICMP errors a second only: fewer than the rows that are to be refused.
        cluster.lab.sysctl(node, "net.ipv4.icmp_ratelimit", "0").unwrap();
        cluster.lab.sysctl(node, "net.ipv6.icmp.ratelimit", "0").unwrap();
    }
    check_rows(cluster, rows().into_iter().map(|row| row.with_rules(nftables)).collect());
}
