//! The ipvs mode on a kernel that has IPVS: the outage that kube-proxy's brings about can't happen, connections end by
//! themselves, and what is somebody else's stays.

use std::time::Duration;

use lb_core::flow::Dialect;
use lb_test::{
    cluster::{Cluster, Cni, node_ip, node_ip6, pod_ip, pod_ip6},
    flows, in_vm,
    load::Load,
    netns, until,
};

const IPVS: [&str; 4] = ["--mode", "ipvs", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];
const NFTABLES: [&str; 4] = ["--mode", "nftables", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];

/// Two nodes whose service `web` has node 2's own addresses as externalIPs; its endpoints are these pods.
fn cluster(name: &str, pods: &[&str]) -> Option<Cluster> {
    let mut cluster = unstarted(name, pods)?;
    start(&mut cluster, &IPVS);
    Some(cluster)
}

/// The same before there are agents.
fn unstarted(name: &str, pods: &[&str]) -> Option<Cluster> {
    if !in_vm(name) {
        return None;
    }
    let mut cluster = Cluster::new(Cni::Routed, 2).expect("a cluster of namespaces");
    for host in ["pod11", "pod21"] {
        cluster.serve(host, 8080).expect("a server");
    }
    for host in ["node1", "node2"] {
        cluster.serve(host, 9000).expect("a server");
    }
    cluster.apply_nodes().unwrap();
    apply(&cluster, pods);
    Some(cluster)
}

fn apply(cluster: &Cluster, pods: &[&str]) {
    let endpoints = |family: &str, addr: fn(u8, u8) -> String| {
        let endpoint = |pod: &&str| {
            let node = if pod.starts_with("pod1") { 1 } else { 2 };
            format!("{{addresses: ['{}'], nodeName: node{node}}}", addr(node, 1))
        };
        let endpoints: Vec<String> = pods.iter().map(endpoint).collect();
        format!(
            "kind: EndpointSlice\nmetadata: {{name: web-{family}, labels: {{kubernetes.io/service-name: web}}}}\naddressType: {family}\nports: [{{name: http, port: 8080}}, {{name: dns, port: 8080, protocol: UDP}}]\nendpoints: [{}]\n---\n",
            endpoints.join(", ")
        )
    };
    let service = format!(
        "kind: Service\nmetadata: {{name: web}}\nspec: {{clusterIPs: [10.96.0.10, 'fd00:10:96::10'], externalIPs: [{}, '{}', 198.51.100.10], ports: [{{name: http, port: 80}}, {{name: dns, port: 80, protocol: UDP}}]}}\n---\n",
        node_ip(2),
        node_ip6(2)
    );
    cluster.apply("web.yaml", &(service + &endpoints("IPv4", pod_ip) + &endpoints("IPv6", pod_ip6))).unwrap();
}

fn start(cluster: &mut Cluster, options: &[&str]) {
    cluster.agent_options = options.iter().map(ToString::to_string).collect();
    cluster.start_agents(&[1, 2]).expect("agents");
}

fn on_node1(cluster: &Cluster, words: &str) -> String {
    let mut words = words.split(' ');
    let program = words.next().expect("a program");
    netns::output(cluster.lab.command("node1", program).args(words)).unwrap()
}

/// Who answers, or the error; `how` is tcp, udp or `udp --connected …`.
fn ask(cluster: &Cluster, from: &str, how: &[&str], target: &str) -> String {
    let args = [&how[..1], &[target, "--timeout-ms", "1500"], &how[1..]].concat();
    let answer = cluster.ask(from, None, &args).unwrap().pop().expect("one answer");
    answer.id.or(answer.error).unwrap_or_default()
}

const LIMIT: Duration = Duration::from_secs(20);

const TCP: &[&str] = &["tcp"];
const UDP: &[&str] = &["udp", "--connected"];
/// Three fragments.
const LONG_UDP: &[&str] = &["udp", "--connected", "--bytes", "4000"];

#[test]
fn every_path_with_ipvs() {
    if in_vm("every_path_with_ipvs") {
        flows::check_all(&flows::cluster(Cni::Routed, &IPVS), Dialect::Ipvs);
    }
}

#[test]
fn a_nodes_address_as_external_ip_cuts_nobody_off() {
    let Some(cluster) = cluster("a_nodes_address_as_external_ip_cuts_nobody_off", &["pod11"]) else { return };
    let both =
        |node: u8, port: u16| [format!("{}:{port}", node_ip(node)), format!("[{}]:{port}", node_ip6(node))];
    // All other ports lead to who has the address, both ways.
    for target in both(2, 9000) {
        for from in ["node1", "pod12", "client"] {
            for how in [TCP, UDP] {
                assert_eq!(ask(&cluster, from, how, &target), "node2", "{from} {how:?} {target}");
            }
        }
        assert_eq!(ask(&cluster, "node1", TCP, &target.replace("9000", "9001")), "refused", "by node 2");
    }
    for target in both(1, 9000) {
        for from in ["node2", "pod22", "client"] {
            assert_eq!(ask(&cluster, from, TCP, &target), "node1", "{from} {target}");
        }
    }
    // And the service's port to its endpoint, from everywhere, in fragments too.
    for target in both(2, 80) {
        for from in ["node1", "pod12", "node2", "pod22", "client"] {
            for how in [TCP, UDP, LONG_UDP] {
                // IPVS sees what a node itself sends before it is fragmented. IPv6 knows no way to allow that later, and
                // to its own address a node sends as much at once as loopback takes (`ip_vs_xmit.c`
                // `ensure_mtu_is_adequate`).
                let in_one_piece = from == "node2" || from == "node1" && target.starts_with('[');
                if in_one_piece && how == LONG_UDP {
                    continue;
                }
                assert_eq!(ask(&cluster, from, how, &target), "pod11", "{from} {how:?} {target}");
            }
        }
    }
    let bound = on_node1(&cluster, "ip addr show dev kube-ipvs0");
    assert!(bound.contains("198.51.100.10/32") && bound.contains("fd00:10:96::10/128"), "{bound}");
    assert!(!bound.contains("192.0.2.") && !bound.contains("2001:db8::1"), "{bound}");
}

#[test]
fn listeners_of_the_host_are_not_reached_through_vips() {
    let Some(cluster) = cluster("listeners_of_the_host_are_not_reached_through_vips", &["pod11"]) else {
        return;
    };
    cluster.lab.ip("client", &format!("route add 198.51.100.0/24 via {}", node_ip(1))).unwrap();
    for (from, target) in [
        ("client", "198.51.100.10:9000"),
        ("pod12", "10.96.0.10:9000"),
        ("node1", "10.96.0.10:9000"),
        ("pod12", "[fd00:10:96::10]:9000"),
    ] {
        let answer = ask(&cluster, from, TCP, target);
        assert!(["refused", "timeout"].contains(&&*answer), "{from} {target}: {answer}");
    }
    assert_eq!(ask(&cluster, "client", TCP, "198.51.100.10:80"), "pod11");
}

#[test]
fn connections_to_an_endpoint_that_is_gone_end_by_themselves() {
    let Some(cluster) =
        cluster("connections_to_an_endpoint_that_is_gone_end_by_themselves", &["pod11", "pod21"])
    else {
        return;
    };
    let load = ["load", "10.96.0.10:80", "--connections", "10", "--udp", "0", "--secs", "20", "--abort"];
    let running = cluster.spawn("pod12", None, &load).unwrap();
    std::thread::sleep(Duration::from_secs(5));
    apply(&cluster, &["pod21"]);
    let gone = format!("-r {}:8080 -m -w 0", pod_ip(1, 1));
    until("the endpoint takes no more", Duration::from_secs(20), || {
        on_node1(&cluster, "ipvsadm -Sn").contains(&gone)
    });
    for _ in 0..6 {
        assert_eq!(ask(&cluster, "pod12", TCP, "10.96.0.10:80"), "pod21");
    }
    let report: serde_json::Value =
        serde_json::from_str(&lb_test::cluster::finish(running).unwrap()).unwrap();
    for failure in ["resets", "timeouts", "wrong"] {
        assert_eq!(report[failure], 0, "{report}");
    }
    // Looked for every 30 s.
    until("the destination is gone", Duration::from_secs(90), || {
        !on_node1(&cluster, "ipvsadm -Sn").contains(&gone)
    });
}

#[test]
fn what_somebody_clears_comes_back_and_cleanup_takes_only_ours() {
    let name = "what_somebody_clears_comes_back_and_cleanup_takes_only_ours";
    let Some(mut cluster) = cluster(name, &["pod11", "pod21"]) else { return };
    on_node1(&cluster, "ipvsadm -C");
    on_node1(&cluster, "ip addr del 198.51.100.10/32 dev kube-ipvs0");
    until("all is back", Duration::from_secs(90), || {
        on_node1(&cluster, "ipvsadm -Sn").contains("-A -t 198.51.100.10:80")
            && on_node1(&cluster, "ip addr show dev kube-ipvs0").contains("198.51.100.10/32")
    });
    on_node1(&cluster, "ipvsadm -A -t 203.0.113.1:80 -s rr");
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    let said = cluster.agent(1, &["cleanup", "--dry-run"]).unwrap();
    assert!(said.contains("-D -t 10.96.0.10:80") && said.contains("link del kube-ipvs0"), "{said}");
    assert!(!said.contains("203.0.113.1"), "{said}");
    cluster.agent(1, &["cleanup"]).unwrap();
    assert_eq!(on_node1(&cluster, "ipvsadm -Sn").trim(), "-A -t 203.0.113.1:80 -s rr");
    let left = [
        on_node1(&cluster, "ip link show"),
        on_node1(&cluster, "ip rule"),
        on_node1(&cluster, "ipset list -n"),
        on_node1(&cluster, "iptables-save"),
    ]
    .concat();
    assert!(!left.contains("kube-ipvs0") && !left.contains("5050") && !left.contains("KUBE-"), "{left}");
}

#[test]
fn another_mode_takes_over_without_cutting_a_connection() {
    let name = "another_mode_takes_over_without_cutting_a_connection";
    let Some(mut cluster) = cluster(name, &["pod11", "pod21"]) else { return };
    for node in ["node1", "node2"] {
        netns::run(cluster.lab.command(node, "ipvsadm").args(["--set", "900", "1", "3"])).unwrap();
    }
    let target = format!("{}:80", node_ip(2));
    // They go on until the takeover is done, however long agents take to start.
    let loads = [("pod12", "10.96.0.10:80"), ("client", &target)].map(|(from, target)| {
        let clients = ["--connections", "20", "--udp", "2", "--abort"];
        Load::start(&cluster, (from, None), target, &clients).unwrap()
    });
    std::thread::sleep(Duration::from_secs(3));
    for node in [1, 2] {
        cluster.stop_agent(node, libc::SIGTERM).unwrap();
    }
    start(&mut cluster, &NFTABLES);
    until("connections keep their virtual servers", Duration::from_secs(20), || {
        on_node1(&cluster, "ipvsadm -Sn").contains("-w 0")
    });
    loads.into_iter().for_each(Load::stop_unharmed);
    until("the virtual servers are gone with their connections", Duration::from_secs(120), || {
        on_node1(&cluster, "ipvsadm -Sn").trim().is_empty()
            && !on_node1(&cluster, "ip link show").contains("kube-ipvs0")
    });
    assert!(ask(&cluster, "pod12", TCP, "10.96.0.10:80").starts_with("pod"));
}

#[test]
fn a_changed_file_takes_effect_under_open_connections() {
    let name = "a_changed_file_takes_effect_under_open_connections";
    let Some(mut cluster) = unstarted(name, &["pod11", "pod21"]) else { return };
    let configure = |cluster: &Cluster, fields: &str| {
        cluster
            .configure(&format!("mode: ipvs\nclusterCIDR: '10.244.0.0/16,fd00:10:244::/48'\n{fields}"))
            .unwrap();
    };
    configure(&cluster, "");
    let config = cluster.config_file().display().to_string();
    start(&mut cluster, &["--config", &config]);
    let target = format!("{}:80", node_ip(2));
    let load = |clients: &[&str]| {
        [("pod12", "10.96.0.10:80"), ("pod22", "[fd00:10:96::10]:80"), ("client", &target)]
            .map(|(from, target)| Load::start(&cluster, (from, None), target, clients).unwrap())
    };
    let open = load(&["--connections", "10", "--udp", "0", "--udp-streams", "3"]);
    // What clients of each node meet.
    let servers = || {
        ["node1", "node2"]
            .map(|node| netns::output(cluster.lab.command(node, "ipvsadm").arg("-Sn")).unwrap())
            .concat()
    };
    let all_are = |options: &str| {
        let servers = servers();
        let all = servers.lines().filter(|line| line.starts_with("-A "));
        let those = all.clone().filter(|line| line.ends_with(&format!(" -s {options}")));
        // Five addresses and two protocols on each node.
        all.count() == 20 && those.count() == 20
    };
    assert!(all_are("rr"), "{}", servers());
    let seen = || cluster.tcp("pod12", None, "10.96.0.10:80").unwrap().client.unwrap_or_default();
    assert_eq!(seen(), pod_ip(1, 2), "a pod is not masqueraded");

    // With flags of its own, and without them again. Whoever is new meanwhile may be refused: a virtual server has no
    // scheduler while the kernel changes it (`ip_vs_ctl.c` `ip_vs_edit_service`).
    for (scheduler, options) in [("mh", "mh -b mh-port"), ("lc", "lc")] {
        configure(&cluster, &format!("ipvs: {{scheduler: {scheduler}, tcpTimeout: 700s}}"));
        until("virtual servers have the new scheduler", LIMIT, || all_are(options));
    }
    assert!(on_node1(&cluster, "ipvsadm -l --timeout").contains(": 700 "));
    assert_eq!(seen(), pod_ip(1, 2));

    // Nothing else costs anybody anything, who is new or not.
    let new = load(&["--connections", "1", "--udp", "2"]);
    configure(&cluster, "ipvs: {scheduler: lc}\niptables: {masqueradeAll: true}");
    until("all is masqueraded", LIMIT, || seen() == node_ip(1));
    // What can't be used changes nothing.
    configure(&cluster, "ipvs: {scheduler: best}");
    let log = || std::fs::read_to_string(cluster.agent_log(1)).unwrap();
    until("the file is refused", LIMIT, || log().contains("is not a scheduler of IPVS: rr, wrr"));
    assert!(all_are("lc") && seen() == node_ip(1), "{}", servers());
    configure(&cluster, "ipvs: {scheduler: lc}");
    until("pods are not masqueraded any more", LIMIT, || seen() == pod_ip(1, 2));

    assert_eq!(log().matches("a new configuration").count(), 4, "{}", log());
    assert!(!log().contains("stopping"), "the same processes all the while");
    open.into_iter().chain(new).for_each(Load::stop_unharmed);
}

#[test]
fn an_endpoint_that_the_kernel_refuses_costs_no_other_its_place() {
    let name = "an_endpoint_that_the_kernel_refuses_costs_no_other_its_place";
    let Some(cluster) = cluster(name, &["pod11"]) else { return };
    let slice = |service: &str, addr: &str| {
        format!(
            "kind: EndpointSlice\nmetadata: {{name: {service}-more, labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints: [{{addresses: [{addr}], nodeName: node2}}]\n---\n"
        )
    };
    // The LAN's broadcast address is no destination (`ip_vs_ctl.c` `__ip_vs_add_dest`).
    cluster.apply("broadcast.yaml", &slice("web", "192.0.2.255")).unwrap();
    let log = || std::fs::read_to_string(cluster.agent_log(1)).unwrap();
    let named = "the kernel takes no destination 192.0.2.255:8080 of virtual server 10.96.0.10:80/TCP";
    until("the destination is named", Duration::from_secs(20), || log().contains(named));
    assert!(log().contains("default/web:http"), "{}", log());
    let late = "kind: Service\nmetadata: {name: late}\nspec: {clusterIP: 10.96.0.20, ports: [{name: http, port: 80}]}\n---\n";
    cluster.apply("late.yaml", &(late.to_owned() + &slice("late", &pod_ip(2, 1)))).unwrap();
    until("what comes later is served", Duration::from_secs(20), || {
        ask(&cluster, "pod12", TCP, "10.96.0.20:80") == "pod21"
    });
    assert_eq!(ask(&cluster, "pod12", TCP, "10.96.0.10:80"), "pod11");
    assert!(!on_node1(&cluster, "ipvsadm -Sn").contains("192.0.2.255"));
}

#[test]
fn the_kernel_takes_every_scheduler() {
    use lb_core::{
        compile::{CompileConfig, Compiler, NodeView},
        model::Family,
        rules::ipvs::{Phase, Scheduler, Servers},
        synthetic,
    };
    if !in_vm("the_kernel_takes_every_scheduler") {
        return;
    }
    let mut lab = netns::Lab::new().unwrap();
    lab.add_ns("host").unwrap();
    let mut compiler = Compiler::new(CompileConfig::default(), NodeView::default());
    synthetic::cluster(1, 2).for_each(|event| compiler.apply(event));
    compiler.compile();
    let file = lab.dir().join("servers");
    for scheduler in Scheduler::ALL {
        let transaction = Servers::all(compiler.table(), Family::V4, scheduler);
        let lines = transaction
            .phases()
            .filter(|(phase, _)| *phase == Phase::AddServers)
            .flat_map(|(_, lines)| lines);
        let text: String = lines.map(|line| line.text(|_| None) + "\n").collect();
        std::fs::write(&file, &text).unwrap();
        let restore = format!("ipvsadm -R < {}", file.display());
        netns::run(lab.command("host", "sh").args(["-c", &restore])).unwrap();
        let saved = netns::output(lab.command("host", "ipvsadm").arg("-Sn")).unwrap();
        assert_eq!(saved, text, "{scheduler:?}");
        netns::run(lab.command("host", "ipvsadm").arg("-C")).unwrap();
    }
}
