//! Real sockets against real programs: every way to a service, in both families and with both ways of wiring pods.

use lb_core::flow::Dialect;
use lb_test::{
    cluster::{CLIENT, Cluster, Cni, node_ip, node_ip6, pod_ip, pod_ip6},
    flows::{CLUSTER_CIDR, check_all, cluster, manifests},
    load::Load,
};

#[test]
fn every_path_with_bridged_pods() {
    check_all(&cluster(Cni::Bridge, &[]), Dialect::Ebpf);
}

#[test]
fn every_path_with_routed_pods() {
    check_all(&cluster(Cni::Routed, &[]), Dialect::Ebpf);
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
            let child = cluster.spawn(from, *served, &["download", target, "--bytes", "30000000"]).unwrap();
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
    for pod in ["pod11", "pod21"] {
        let share = answers.iter().filter(|answer| answer.id.as_deref() == Some(pod)).count();
        assert!((5..=35).contains(&share), "without affinity both serve: {pod} had {share} of 40");
    }
}

#[test]
fn restarts_break_nothing() {
    let mut cluster = cluster(Cni::Bridge, &[]);
    let many = ["--connections", "200", "--udp", "20"];
    let few = ["--connections", "50", "--udp", "10"];
    let outside = Load::start(&cluster, ("client", None), "198.51.100.10:80", &many).unwrap();
    let inside = Load::start(&cluster, ("pod12", Some(1)), "10.96.0.10:80", &few).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(1));
    for round in 0..8 {
        let signal = if round % 2 == 0 { libc::SIGKILL } else { libc::SIGTERM };
        cluster.stop_agent(1, signal).unwrap();
        cluster.start_agent(1).unwrap();
    }
    [outside, inside].into_iter().for_each(Load::stop_unharmed);
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
    check_all(&cluster, Dialect::Ebpf);
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
    check_all(&cluster, Dialect::Ebpf);
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
    let cluster = cluster(Cni::Bridge, &["--mode", "auto"]);
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

#[test]
fn every_path_with_iptables() {
    let options = ["--mode", "iptables", "--cluster-cidr", CLUSTER_CIDR];
    check_all(&cluster(Cni::Routed, &options), Dialect::Iptables);
}

#[test]
fn every_path_with_nftables() {
    let options = ["--mode", "nftables", "--cluster-cidr", CLUSTER_CIDR];
    check_all(&cluster(Cni::Routed, &options), Dialect::Nftables);
}
