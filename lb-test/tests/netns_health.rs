//! What looks at kube-proxy sees no difference: load balancers at `healthCheckNodePort` and `/healthz`, the kubelet at
//! `/livez`, Prometheus and people at the metrics port. Asked with curl, answered by real agents.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::TcpListener,
    os::unix::fs::symlink,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use lb_test::{
    cluster::{Cluster, Cni, node_ip, node_ip6, pod_ip, program},
    is_vm, netns, patience,
};
use serde_json::Value;

/// An answer as it came over the wire.
#[derive(Clone, Debug, Default)]
struct Said {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Said {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// Asks from a namespace; `None` if nobody listens.
fn ask(cluster: &Cluster, from: &str, url: &str) -> Option<Said> {
    let output = cluster.lab.command(from, "curl").args(["-s", "-i", "-m", "5", url]).output().unwrap();
    let code = output.status.code();
    // 7: the connection was refused.
    assert!(matches!(code, Some(0 | 7)), "curl {url} from {from}: {output:?}");
    if code == Some(7) {
        return None;
    }
    let text = String::from_utf8(output.stdout).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.map(|line| line.split_once(": ").unwrap());
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    Some(Said { status, headers, body: body.to_owned() })
}

/// Waits until something holds, and returns it.
fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + patience(limit);
    loop {
        match look() {
            Ok(seen) => return seen,
            Err(seen) if Instant::now() > deadline => {
                panic!("not within {limit:?}: {what}; last seen: {seen}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

const SOON: Duration = Duration::from_secs(10);

/// A Service whose load balancer asks on `32100 + number`, with an endpoint on a node.
struct Balanced {
    number: u8,
    node: u8,
    conditions: &'static str,
    policy: &'static str,
    port: u16,
}

const READY: &str = "ready: true, serving: true, terminating: false";
const DRAINING: &str = "ready: false, serving: true, terminating: true";

impl Balanced {
    fn new(number: u8, node: u8, conditions: &'static str) -> Self {
        Self { number, node, conditions, policy: "Local", port: 32100 + u16::from(number) }
    }

    fn name(&self) -> String {
        format!("web{}", self.number)
    }

    /// Where clients dial it.
    fn vip(&self) -> String {
        format!("198.51.100.{}:80", self.number)
    }

    fn manifest(&self) -> String {
        let Self { number, node, conditions, policy, port } = self;
        let (name, pod) = (self.name(), pod_ip(*node, 1));
        format!(
            "kind: Service\nmetadata: {{name: {name}}}\nspec: {{type: LoadBalancer, clusterIP: 10.96.0.{number}, externalTrafficPolicy: {policy}, healthCheckNodePort: {port}, ports: [{{name: http, port: 80, targetPort: 8080, nodePort: {}}}, {{name: more, port: 81, targetPort: 8080}}]}}\nstatus: {{loadBalancer: {{ingress: [{{ip: 198.51.100.{number}}}]}}}}\n---\nkind: EndpointSlice\nmetadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}, {{name: more, port: 8080}}]\nendpoints: [{{addresses: [{pod}], nodeName: node{node}, conditions: {{{conditions}}}}}]\n",
            30000 + u16::from(*number)
        )
    }

    fn apply(&self, cluster: &Cluster) {
        cluster.apply(&format!("{}.yaml", self.name()), &self.manifest()).unwrap();
    }

    /// Asks a node as its load balancer would.
    fn ask(&self, cluster: &Cluster, node: u8) -> Option<Said> {
        ask(cluster, "client", &format!("http://{}:{}/", node_ip(node), self.port))
    }

    /// Waits until this node's answer counts so many endpoints, and checks all of it.
    fn check(&self, cluster: &Cluster, node: u8, count: u64) -> Said {
        let said = until(&format!("{} on node{node} has {count}", self.name()), SOON, || {
            let said = self.ask(cluster, node).ok_or("refused")?;
            if said.json()["localEndpoints"] == count { Ok(said) } else { Err(format!("{said:?}")) }
        });
        self.check_fields(&said, count, true);
        said
    }

    fn check_fields(&self, said: &Said, count: u64, healthy: bool) {
        assert_eq!(said.status, if count > 0 && healthy { 200 } else { 503 }, "{said:?}");
        assert_eq!(said.header("content-type"), "application/json");
        assert_eq!(said.header("x-content-type-options"), "nosniff");
        assert_eq!(said.header("x-load-balancing-endpoint-weight"), count.to_string());
        assert_eq!(said.header("content-length"), said.body.len().to_string());
        assert!(said.header("date").ends_with(" GMT"), "{said:?}");
        assert_eq!(said.headers.len(), 5, "and no others: {said:?}");
        let name = self.name();
        assert_eq!(
            said.body,
            format!(
                "{{\n\t\"service\": {{\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"{name}\"\n\t}},\n\t\"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
            )
        );
    }
}

/// Two nodes with a pod each that serves on 8080; clients reach VIPs by way of node 1.
fn cluster(options: &[&str]) -> Cluster {
    let mut cluster = Cluster::new(Cni::Routed, 1).expect("a cluster of namespaces");
    cluster.agent_options = options.iter().map(ToString::to_string).collect();
    for pod in ["pod11", "pod21"] {
        cluster.serve(pod, 8080).expect("a server");
    }
    let route = format!("route add 198.51.100.0/24 via {}", node_ip(1));
    cluster.lab.ip("client", &route).expect("a route");
    cluster.apply_nodes().expect("nodes");
    cluster
}

const IPTABLES: &[&str] = &["--mode", "iptables", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];
const NFTABLES: &[&str] = &["--mode", "nftables", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];
/// For the test VM, whose kernel alone has it.
const IPVS: &[&str] = &["--mode", "ipvs", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];

#[test]
fn health_check_node_port_follows_the_endpoints_of_its_node() {
    let mut cluster = cluster(&[]);
    let mut web = Balanced::new(1, 1, READY);
    web.apply(&cluster);
    cluster.start_agents(&[1, 2]).unwrap();
    web.check(&cluster, 1, 1);
    web.check(&cluster, 2, 0);
    // All addresses of the node answer, any path.
    for (from, host) in [("client", format!("[{}]", node_ip6(1))), ("node1", "127.0.0.1".into())] {
        let said = ask(&cluster, from, &format!("http://{host}:{}/x?y=z", web.port)).expect("it listens");
        web.check_fields(&said, 1, true);
    }

    // Its pod moves to the other node.
    web.node = 2;
    web.apply(&cluster);
    web.check(&cluster, 1, 0);
    web.check(&cluster, 2, 1);

    // It gets another port: the old one is closed.
    let before = Balanced::new(1, 2, READY);
    web.port = 32150;
    web.apply(&cluster);
    web.check(&cluster, 2, 1);
    assert!(before.ask(&cluster, 2).is_none(), "the old port is closed");

    // The old port may be another Service's at once.
    let other = Balanced { port: before.port, ..Balanced::new(2, 1, READY) };
    other.apply(&cluster);
    other.check(&cluster, 1, 1);
    web.check(&cluster, 2, 1);
}

#[test]
fn health_check_node_port_answers_where_node_ports_do() {
    let mut cluster = cluster(&["--node-port-addresses", "192.0.2.0/24"]);
    let web = Balanced::new(1, 1, READY);
    web.apply(&cluster);
    cluster.start_agents(&[1]).unwrap();
    web.check(&cluster, 1, 1);
    for (from, host) in [("client", format!("[{}]", node_ip6(1))), ("node1", "127.0.0.1".into())] {
        assert!(ask(&cluster, from, &format!("http://{host}:{}/", web.port)).is_none(), "{host}");
    }
    // An address that the node gets later answers, too.
    cluster.lab.ip("node1", "addr add 192.0.2.111/24 dev eth0").unwrap();
    let url = format!("http://192.0.2.111:{}/", web.port);
    let said =
        until("the new address answers", SOON, || ask(&cluster, "client", &url).ok_or("refused".into()));
    web.check_fields(&said, 1, true);
}

#[test]
fn health_check_node_port_should_fail_with_only_terminating_endpoints() {
    for options in if is_vm() { &[IPVS][..] } else { &[&[], IPTABLES] } {
        let mut cluster = cluster(options);
        let mut web = Balanced::new(1, 1, READY);
        web.apply(&cluster);
        cluster.start_agents(&[1]).unwrap();
        web.check(&cluster, 1, 1);
        assert_eq!(
            cluster.tcp("client", None, &web.vip()).unwrap().id.as_deref(),
            Some("pod11"),
            "{options:?}"
        );

        web.conditions = DRAINING;
        web.apply(&cluster);
        web.check(&cluster, 1, 0);
        let answer = cluster.tcp("client", None, &web.vip()).unwrap();
        assert_eq!(answer.id.as_deref(), Some("pod11"), "the data path still serves: {answer:?}");
    }
}

#[test]
fn health_check_node_port_closes_with_policy_local() {
    let mut cluster = cluster(if is_vm() { IPVS } else { IPTABLES });
    let (mut web, other) = (Balanced::new(1, 1, READY), Balanced::new(2, 1, READY));
    web.apply(&cluster);
    other.apply(&cluster);
    cluster.start_agents(&[1]).unwrap();
    web.check(&cluster, 1, 1);
    let admits = |cluster: &Cluster, port: u16| {
        if is_vm() {
            let sets = netns::output(cluster.lab.command("node1", "ipset").arg("save")).unwrap();
            return sets.lines().any(|line| line == format!("add KUBE-HEALTH-CHECK-NODE-PORT {port}"));
        }
        let rules =
            netns::output(cluster.lab.command("node1", "iptables-save").args(["-t", "filter"])).unwrap();
        rules.lines().any(|rule| {
            rule.starts_with("-A KUBE-NODEPORTS") && rule.contains(&format!("--dport {port} -j ACCEPT"))
        })
    };
    assert!(admits(&cluster, web.port), "a firewall behind KUBE-NODEPORTS lets load balancers in");

    web.policy = "Cluster";
    web.apply(&cluster);
    until("the port is closed", SOON, || match web.ask(&cluster, 1) {
        None => Ok(()),
        Some(said) => Err(format!("{said:?}")),
    });
    assert!(!admits(&cluster, web.port));
    assert_eq!(cluster.tcp("client", None, &web.vip()).unwrap().id.as_deref(), Some("pod11"));
    other.check(&cluster, 1, 1);

    web.policy = "Local";
    web.apply(&cluster);
    web.check(&cluster, 1, 1);

    // The agent ends, the kernel goes on serving: no load balancer should send more.
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    assert!(web.ask(&cluster, 1).is_none());
    assert_eq!(cluster.tcp("client", None, &web.vip()).unwrap().id.as_deref(), Some("pod11"));
}

#[test]
fn health_check_node_port_that_somebody_else_has_is_named_and_tried_again() {
    let mut cluster = cluster(&[]);
    let (web, other) = (Balanced::new(1, 1, READY), Balanced::new(2, 1, READY));
    let taken = cluster.lab.inside("node1", || Ok(TcpListener::bind(("0.0.0.0", web.port))?)).unwrap();
    web.apply(&cluster);
    other.apply(&cluster);
    cluster.start_agents(&[1]).unwrap();
    other.check(&cluster, 1, 1);
    let complaints = |cluster: &Cluster| {
        let log = fs::read_to_string(cluster.agent_log(1)).unwrap();
        let lines = log.lines().filter(|line| line.contains("health check port can't be opened"));
        lines.map(ToString::to_string).collect::<Vec<_>>()
    };
    let line = until("the log names it", SOON, || complaints(&cluster).pop().ok_or("nothing".into()));
    for part in ["default/web1", "port=32101", &format!("(process {})", std::process::id())] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert_eq!(
        cluster.tcp("client", None, &web.vip()).unwrap().id.as_deref(),
        Some("pod11"),
        "served all the same"
    );
    // Long enough for two more tries.
    let tried = Instant::now();
    until("tries go on", Duration::from_secs(30), || match tried.elapsed() {
        elapsed if elapsed > Duration::from_secs(11) => Ok(()),
        _ => Err(String::new()),
    });
    assert_eq!(complaints(&cluster).len(), 1, "it is said once");
    drop(taken);
    let said =
        until("the port is opened", Duration::from_secs(20), || web.ask(&cluster, 1).ok_or("refused".into()));
    web.check_fields(&said, 1, true);
}

#[test]
fn a_dry_run_leaves_health_check_node_ports_to_who_serves_the_node() {
    let mut cluster = cluster(&[]);
    let web = Balanced::new(1, 1, READY);
    web.apply(&cluster);
    let mut dry = cluster.lab.command_in("node1", "dry", &program("lb-agent")).unwrap();
    dry.args(["run", "--dry-run", "--node-name", "node1"]).args(NFTABLES).arg("--manifests");
    dry.arg(cluster.manifests()).arg("--bpf-root").arg(cluster.lab.bpf_root("node1"));
    let child = dry.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    cluster.lab.adopt(child);
    let text = until("it compares", Duration::from_secs(30), || {
        let said = ask(&cluster, "node1", "http://127.0.0.1:10349/metrics").ok_or("refused")?;
        if said.body.contains("\nlb_dry_run_differences{") { Ok(said.body) } else { Err(said.body) }
    });
    assert!(value(&text, "lb_services") > 0.0);
    until("it is healthy", SOON, || match ask(&cluster, "node1", "http://127.0.0.1:10356/healthz") {
        Some(said) if said.status == 200 => Ok(()),
        said => Err(format!("{said:?}")),
    });
    assert!(web.ask(&cluster, 1).is_none(), "whoever serves the node has the port");
}

/// `/healthz` or `/livez` of node 1.
fn health(cluster: &Cluster, page: &str) -> Said {
    ask(cluster, "client", &format!("http://{}:10256/{page}", node_ip(1))).expect("the agent listens")
}

/// Checks all of an answer.
fn check_health(said: &Said, status: u16, eligible: Option<bool>, healthy: bool) {
    assert_eq!(said.status, status, "{said:?}");
    assert_eq!(said.header("content-type"), "application/json");
    assert_eq!(said.header("x-content-type-options"), "nosniff");
    let body = said.json();
    let keys: Vec<&str> = body.as_object().unwrap().keys().map(String::as_str).collect();
    let mut wanted = vec!["lastUpdated", "currentTime"];
    wanted.extend(eligible.map(|_| "nodeEligible"));
    wanted.extend(["healthy", "status"]);
    assert_eq!(keys.iter().filter(|key| **key != "reason").copied().collect::<Vec<_>>(), wanted, "{body}");
    assert_eq!(body.get("nodeEligible"), eligible.map(Value::Bool).as_ref());
    assert_eq!(body["healthy"], healthy, "{body}");
    assert_eq!(body["lastUpdated"] == body["currentTime"], status == 200, "{body}");
    for family in ["IPv4", "IPv6"] {
        assert_eq!(body["status"][family]["healthy"], healthy, "{body}");
        let updated = body["status"][family]["lastUpdated"].as_str().unwrap();
        assert!(updated.starts_with("20") && updated.ends_with('Z'), "{body}");
        assert!(updated <= body["currentTime"].as_str().unwrap(), "{body}");
    }
    assert_eq!(body["status"].as_object().unwrap().len(), 2);
}

#[test]
fn healthz_is_503_while_the_node_goes_and_livez_is_not() {
    let mut cluster = cluster(&[]);
    cluster.start_agents(&[1]).unwrap();
    let node = |more: &str| {
        format!(
            "kind: Node\nmetadata: {{name: node1{more}\nstatus: {{addresses: [{{type: InternalIP, address: {}}}]}}\n",
            node_ip(1)
        )
    };
    let taint = |key: &str| node(&format!("}}\nspec: {{taints: [{{key: {key}, effect: NoSchedule}}]}}"));
    for (what, manifest, eligible) in [
        ("as it was", node("}"), true),
        ("tainted otherwise", taint("node.kubernetes.io/not-ready"), true),
        ("the autoscaler removes it", taint("ToBeDeletedByClusterAutoscaler"), false),
        ("and doesn't", node("}"), true),
        ("being deleted", node(", deletionTimestamp: '2026-01-02T03:04:05Z'}"), false),
        ("back", node("}"), true),
        ("gone", "kind: Secret\nmetadata: {name: x}\n".into(), false),
        ("back again", node("}"), true),
    ] {
        cluster.apply("nodes.yaml", &manifest).unwrap();
        let said = until(what, SOON, || {
            let said = health(&cluster, "healthz");
            if said.json()["nodeEligible"] == eligible { Ok(said) } else { Err(format!("{said:?}")) }
        });
        check_health(&said, if eligible { 200 } else { 503 }, Some(eligible), true);
        assert_eq!(said.json().get("reason"), None);
        check_health(&health(&cluster, "livez"), 200, None, true);
    }
}

/// In mode nftables; in the test VM in mode ipvs.
#[test]
fn a_change_that_waits_too_long_makes_the_node_unhealthy() {
    let (mode, lost, others, failed_at) = if is_vm() {
        let others = [
            "ipset",
            "ip",
            "iptables",
            "iptables-save",
            "iptables-restore",
            "ip6tables",
            "ip6tables-save",
            "ip6tables-restore",
            "nsenter",
            "sh",
        ];
        (IPVS, "ipvsadm", others.to_vec(), "run ipvsadm")
    } else {
        (NFTABLES, "nft", vec!["nsenter", "sh"], "load IPv4 rules")
    };
    // Long enough to be looked at before two of them are over.
    let period = patience(Duration::from_secs(2));
    let sync_period = format!("{}s", period.as_secs());
    let options = [mode, &["--sync-period", &sync_period]].concat();
    let mut cluster = cluster(&options);
    // All other programs stay where they are found.
    let path = cluster.lab.dir().join("path");
    fs::create_dir_all(&path).unwrap();
    let which = |name: &str| {
        let found = netns::output(Command::new("which").arg(name)).unwrap();
        found.trim().to_owned()
    };
    for name in others.iter().chain([&lost]) {
        symlink(which(name), path.join(name)).unwrap();
    }
    cluster.agent_path = Some(path.clone());
    let (web, late) = (Balanced::new(1, 1, READY), Balanced::new(2, 1, READY));
    web.apply(&cluster);
    cluster.start_agents(&[1]).unwrap();
    web.check(&cluster, 1, 1);
    check_health(&health(&cluster, "healthz"), 200, Some(true), true);

    fs::remove_file(path.join(lost)).unwrap();
    late.apply(&cluster);
    let failed = Instant::now();
    let said = until("the failure is told", SOON, || {
        let said = health(&cluster, "healthz");
        if said.json().get("reason").is_some() { Ok(said) } else { Err(format!("{said:?}")) }
    });
    check_health(&said, 200, Some(true), true);
    let reason = said.json()["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains(failed_at) && reason.contains(&format!("no {lost} in $PATH")), "{reason}");

    until("it is late", SOON, || match health(&cluster, "healthz").status {
        503 => Ok(()),
        status => Err(status.to_string()),
    });
    let late_after = failed.elapsed();
    assert!(late_after >= period * 7 / 4, "two sync periods of {period:?}: {late_after:?}");
    check_health(&health(&cluster, "healthz"), 503, Some(true), false);
    check_health(&health(&cluster, "livez"), 503, None, false);
    web.check_fields(&web.ask(&cluster, 1).unwrap(), 1, false);
    assert!(late.ask(&cluster, 1).is_none(), "what is not programmed has no port yet");
    let page = metrics(&cluster);
    // kube-proxy counts no virtual servers that can't be had.
    let counted = if mode == IPVS {
        "lb_sync_errors_total"
    } else {
        "kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family=\"IPv4\"}"
    };
    assert!(value(&page, counted) >= 1.0, "{page}");
    assert!(value(&page, "kubeproxy_sync_proxy_rules_service_changes_pending") >= 1.0);
    assert!(value(&page, "kubeproxy_sync_proxy_rules_endpoint_changes_pending") >= 1.0);
    assert!(value(&page, "kubeproxy_proxy_healthz_total{code=\"503\"}") >= 2.0);
    assert!(value(&page, "kubeproxy_proxy_livez_total{code=\"503\"}") >= 1.0);

    symlink(which(lost), path.join(lost)).unwrap();
    until("it is healthy again", Duration::from_secs(30), || match health(&cluster, "livez").status {
        200 => Ok(()),
        status => Err(status.to_string()),
    });
    let said = health(&cluster, "healthz");
    check_health(&said, 200, Some(true), true);
    assert_eq!(said.json().get("reason"), None);
    late.check(&cluster, 1, 1);
    assert_eq!(value(&metrics(&cluster), "kubeproxy_sync_proxy_rules_service_changes_pending"), 0.0);
}

fn page(cluster: &Cluster, path: &str) -> Said {
    ask(cluster, "node1", &format!("http://127.0.0.1:10249/{path}")).expect("the agent listens")
}

fn metrics(cluster: &Cluster) -> String {
    let said = page(cluster, "metrics");
    assert_eq!((said.status, said.header("content-type")), (200, "text/plain; version=0.0.4; charset=utf-8"));
    said.body
}

/// The number on the line of a metric with its labels.
fn value(page: &str, metric: &str) -> f64 {
    let line = page.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{metric} is not there:\n{page}")).parse().unwrap()
}

/// kube-proxy's, whatever the mode: name, type, labels.
const OF_ALL: [(&str, &str, &[&str]); 16] = [
    ("kubeproxy_sync_proxy_rules_duration_seconds", "histogram", &["ip_family"]),
    ("kubeproxy_sync_full_proxy_rules_duration_seconds", "histogram", &["ip_family"]),
    ("kubeproxy_sync_partial_proxy_rules_duration_seconds", "histogram", &["ip_family"]),
    ("kubeproxy_sync_proxy_rules_last_timestamp_seconds", "gauge", &["ip_family"]),
    ("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", "gauge", &["ip_family"]),
    ("kubeproxy_network_programming_duration_seconds", "histogram", &["ip_family"]),
    ("kubeproxy_sync_proxy_rules_endpoint_changes_pending", "gauge", &[]),
    ("kubeproxy_sync_proxy_rules_endpoint_changes_total", "counter", &[]),
    ("kubeproxy_sync_proxy_rules_service_changes_pending", "gauge", &[]),
    ("kubeproxy_sync_proxy_rules_service_changes_total", "counter", &[]),
    ("kubeproxy_sync_proxy_rules_no_local_endpoints_total", "gauge", &["ip_family", "traffic_policy"]),
    ("kubeproxy_proxy_healthz_total", "counter", &["code"]),
    ("kubeproxy_proxy_livez_total", "counter", &["code"]),
    ("kubeproxy_conntrack_reconciler_sync_duration_seconds", "histogram", &["ip_family"]),
    ("kubeproxy_conntrack_reconciler_deleted_entries_total", "counter", &["ip_family"]),
    ("process_start_time_seconds", "gauge", &[]),
];
const OF_IPTABLES: [(&str, &str, &[&str]); 6] = [
    ("kubeproxy_sync_proxy_rules_iptables_total", "gauge", &["ip_family", "table"]),
    ("kubeproxy_sync_proxy_rules_iptables_last", "gauge", &["ip_family", "table"]),
    ("kubeproxy_sync_proxy_rules_iptables_restore_failures_total", "counter", &["ip_family"]),
    ("kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total", "counter", &["ip_family"]),
    ("kubeproxy_iptables_ct_state_invalid_dropped_packets_total", "counter", &[]),
    ("kubeproxy_iptables_localhost_nodeports_accepted_packets_total", "counter", &[]),
];
/// kube-proxy counts its rules in mode iptables only.
const OF_IPVS: [(&str, &str, &[&str]); 1] = [OF_IPTABLES[2]];
const OF_NFTABLES: [(&str, &str, &[&str]); 2] = [
    ("kubeproxy_sync_proxy_rules_nftables_sync_failures_total", "counter", &["ip_family"]),
    ("kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total", "counter", &["ip_family"]),
];
/// Ours, from before there were kube-proxy's.
const OURS: [(&str, &str); 8] = [
    ("lb_services", "gauge"),
    ("lb_frontends", "gauge"),
    ("lb_backends", "gauge"),
    ("lb_refused_service_ports", "gauge"),
    ("lb_syncs_total", "counter"),
    ("lb_sync_errors_total", "counter"),
    ("lb_sync_duration_seconds", "gauge"),
    ("lb_sync_last_timestamp_seconds", "gauge"),
];

/// Names of labels on any line of a metric, without `le`.
fn labels(page: &str, name: &str) -> BTreeSet<String> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    let of_metric = lines.filter_map(|line| {
        let (metric, rest) = line.split_once('{')?;
        let metric =
            ["_bucket", "_sum", "_count"].iter().find_map(|end| metric.strip_suffix(end)).unwrap_or(metric);
        (metric == name).then(|| rest.split('}').next().unwrap_or_default())
    });
    let names = of_metric.flat_map(|labels| labels.split(',')).filter_map(|label| label.split('=').next());
    names.filter(|label| *label != "le").map(ToString::to_string).collect()
}

#[test]
fn the_metrics_port_is_kube_proxys() {
    let mut cluster = cluster(&["--mode", "ebpf"]);
    let (web, far) = (Balanced::new(1, 1, READY), Balanced::new(2, 2, READY));
    web.apply(&cluster);
    far.apply(&cluster);
    let outside = [
        ("ebpf", &["--mode", "ebpf"][..], &[][..]),
        ("nftables", NFTABLES, &OF_NFTABLES[..]),
        ("iptables", IPTABLES, &OF_IPTABLES[..]),
    ];
    let inside = [("ipvs", IPVS, &OF_IPVS[..])];
    for (mode, options, more) in if is_vm() { &inside[..] } else { &outside } {
        cluster.agent_options = options.iter().map(ToString::to_string).collect();
        cluster.start_agents(&[1]).unwrap();
        let text = metrics(&cluster);
        for (name, kind, wanted) in OF_ALL.iter().chain(*more) {
            assert!(text.contains(&format!("\n# TYPE {name} {kind}\n")), "{mode}: {name} {kind}\n{text}");
            let wanted: BTreeSet<String> = wanted.iter().map(ToString::to_string).collect();
            assert_eq!(labels(&text, name), wanted, "{mode}: labels of {name}");
        }
        for (name, kind) in OURS {
            assert!(text.contains(&format!("\n# TYPE {name} {kind}\n")), "{mode}: {name} {kind}\n{text}");
        }
        let others = OF_NFTABLES.iter().chain(&OF_IPTABLES).filter(|row| !more.contains(row));
        for (name, ..) in others {
            assert!(!text.contains(name), "{mode} has no {name}");
        }
        assert_eq!(
            value(&text, "kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}"),
            1.0
        );
        assert_eq!(
            value(
                &text,
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"external\"}"
            ),
            2.0,
            "two ports of one Service"
        );
        if *mode == "iptables" {
            check_rule_counts(&cluster, &text);
        }
        check_pages(&cluster, mode);
        check_health(&health(&cluster, "healthz"), 200, Some(true), true);
        if *mode == "nftables" {
            // It answers /proxyMode as a kube-proxy would, and is not taken for one.
            let removals = cluster.agent(1, &["cleanup", "--dry-run"]).unwrap();
            assert!(removals.contains("delete table ip kube-proxy"), "{removals}");
        }
        cluster.stop_agent(1, libc::SIGTERM).unwrap();
    }
}

/// The counts are those of the kernel's rules in kube-proxy's chains.
fn check_rule_counts(cluster: &Cluster, text: &str) {
    for (family, program) in [("IPv4", "iptables-save"), ("IPv6", "ip6tables-save")] {
        for table in ["filter", "nat"] {
            let saved = netns::output(cluster.lab.command("node1", program).args(["-t", table])).unwrap();
            let rules = saved.lines().filter(|line| line.starts_with("-A KUBE-")).count() as f64;
            let labels = format!("{{ip_family=\"{family}\",table=\"{table}\"}}");
            let count =
                |name: &str| value(text, &format!("kubeproxy_sync_proxy_rules_iptables_{name}{labels}"));
            assert_eq!(count("total"), rules, "{labels}:\n{saved}");
            assert!(count("last") >= rules, "all were written: {labels}");
        }
    }
}

fn check_pages(cluster: &Cluster, mode: &str) {
    let said = page(cluster, "proxyMode");
    assert_eq!((said.status, said.body.as_str()), (200, mode));
    assert_eq!(said.header("content-type"), "text/plain; charset=utf-8");
    let said = page(cluster, "metrics/slis");
    assert_eq!((said.status, said.body.as_str()), (200, ""));
    let said = page(cluster, "configz");
    assert_eq!((said.status, said.header("content-type")), (200, "application/json"));
    let config = said.json();
    assert_eq!(config.as_object().unwrap().keys().collect::<Vec<_>>(), ["kubeproxy.config.k8s.io"]);
    assert!(config["kubeproxy.config.k8s.io"].is_object(), "{config}");
    let said = page(cluster, "healthz");
    assert_eq!((said.status, said.body.as_str()), (200, "ok"));
    assert!(page(cluster, "statusz").body.contains("\nkube-proxy statusz\n"));
    let flags = page(cluster, "flagz").body;
    assert!(flags.contains("\nkube-proxy flags\n") && flags.contains(&format!("\nmode={mode}\n")), "{flags}");
    assert_eq!(page(cluster, "debug/pprof/").status, 404);
}

#[test]
fn changes_are_counted_and_timed() {
    let mut cluster = cluster(&[]);
    let mut web = Balanced::new(1, 1, READY);
    web.apply(&cluster);
    cluster.start_agents(&[1]).unwrap();
    let before = metrics(&cluster);
    let programming = "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}";
    assert_eq!(value(&before, programming), 0.0, "what has no annotation is not timed");
    // The endpoint moves, as the controller noted a moment ago.
    web.node = 2;
    let mut date = Command::new("date");
    let stamp = netns::output(date.args(["-u", "+%Y-%m-%dT%H:%M:%S.%NZ"])).unwrap();
    let annotation = format!(
        "annotations: {{endpoints.kubernetes.io/last-change-trigger-time: '{}'}}, labels: {{kubernetes.io",
        stamp.trim()
    );
    let manifest = web.manifest().replace("labels: {kubernetes.io", &annotation);
    cluster.apply("web1.yaml", &manifest).unwrap();
    let after = until("it is timed", SOON, || {
        let text = metrics(&cluster);
        if value(&text, programming) == 1.0 { Ok(text) } else { Err(value(&text, programming).to_string()) }
    });
    for (metric, difference) in [
        ("kubeproxy_sync_proxy_rules_endpoint_changes_total", 1.0),
        ("kubeproxy_sync_proxy_rules_service_changes_total", 0.0),
        ("kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"}", 1.0),
        ("kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"}", 0.0),
        ("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv6\"}", 0.0),
        ("lb_syncs_total", 1.0),
    ] {
        assert_eq!(value(&after, metric) - value(&before, metric), difference, "{metric}");
    }
    let clock = |page: &str, name: &str| {
        value(page, &format!("kubeproxy_sync_proxy_rules_{name}_timestamp_seconds{{ip_family=\"IPv4\"}}"))
    };
    assert!(clock(&after, "last_queued") > clock(&before, "last"), "queued after the last sync");
    assert!(clock(&after, "last") >= clock(&after, "last_queued"), "and synced after that");
    assert_eq!(value(&after, "kubeproxy_sync_proxy_rules_endpoint_changes_pending"), 0.0);
}
