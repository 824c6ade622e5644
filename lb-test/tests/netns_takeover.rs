//! Connections outlive a change of mode: the new one takes what is new, the old one carries its own to their end.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    time::Duration,
};

use lb_test::{
    cluster::{Cluster, Cni, finish, node_ip, node_ip6, pod_manifest},
    load::Load,
    netns, until,
};

const EBPF: &[&str] = &["--mode", "ebpf"];
const NFTABLES: &[&str] = &["--mode", "nftables", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];
const IPTABLES: &[&str] = &["--mode", "iptables", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];

/// One service on a pod of each node: a NodePort, and node 1's own addresses as externalIPs.
fn cluster(options: &[&str]) -> Cluster {
    let mut cluster = unstarted();
    start(&mut cluster, options);
    cluster
}

fn unstarted() -> Cluster {
    let mut cluster = Cluster::new(Cni::Routed, 2).expect("a cluster of namespaces");
    for host in ["pod11", "pod21"] {
        cluster.serve(host, 8080).expect("a server");
    }
    cluster.apply_nodes().unwrap();
    let ports = "ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080}, {name: dns, port: 80, targetPort: 8080, protocol: UDP, nodePort: 30080}]";
    let service = format!(
        "kind: Service\nmetadata: {{name: web}}\nspec: {{type: NodePort, clusterIPs: [10.96.0.10, 'fd00:10:96::10'], externalIPs: [{}, '{}'], selector: {{app: web}}, {ports}}}\n",
        node_ip(1),
        node_ip6(1)
    );
    cluster.apply("services.yaml", &[pod_manifest(1, 1), pod_manifest(2, 1), service].concat()).unwrap();
    cluster
}

fn start(cluster: &mut Cluster, options: &[&str]) {
    cluster.agent_options = options.iter().map(ToString::to_string).collect();
    cluster.start_agents(&[1, 2]).expect("agents");
}

fn change_mode(cluster: &mut Cluster, options: &[&str]) {
    for node in [1, 2] {
        cluster.stop_agent(node, libc::SIGTERM).unwrap();
    }
    start(cluster, options);
}

fn tables(cluster: &Cluster) -> String {
    netns::output(cluster.lab.command("node1", "nft").args(["list", "tables"])).unwrap()
}

#[test]
fn connections_outlive_every_change_of_mode() {
    let mut cluster = cluster(IPTABLES);
    let loads = [
        ("client", None, format!("{}:80", node_ip(1))),
        ("client", None, format!("[{}]:80", node_ip6(1))),
        ("client", None, format!("{}:30080", node_ip(2))),
        ("pod12", None, "10.96.0.10:80".to_owned()),
        ("pod22", None, "[fd00:10:96::10]:80".to_owned()),
        ("pod12", Some(1), "10.96.0.10:80".to_owned()),
    ];
    let running = loads.clone().map(|(from, served, target)| {
        let clients = ["--connections", "40", "--udp", "4", "--udp-streams", "6"];
        Load::start(&cluster, (from, served), &target, &clients).unwrap()
    });
    for options in [EBPF, NFTABLES, EBPF, IPTABLES] {
        std::thread::sleep(Duration::from_secs(2));
        change_mode(&mut cluster, options);
        // Connections that begin now are the new mode's, while all others still run.
        for (from, served, target) in &loads {
            let answer = cluster.tcp(from, *served, target).unwrap();
            assert!(answer.id.is_some(), "{options:?}: {from} -> {target}: {answer:?}");
        }
    }
    running.into_iter().for_each(Load::stop_unharmed);
}

#[test]
fn what_drains_is_gone_once_its_last_connection_has_ended() {
    let mut cluster = cluster(NFTABLES);
    let load = ["load", "10.96.0.10:80", "--connections", "5", "--udp", "0", "--secs", "14"];
    let first = cluster.spawn("pod12", None, &load).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    change_mode(&mut cluster, EBPF);
    until("the rules are gone and their connections are kept", Duration::from_secs(10), || {
        let tables = tables(&cluster);
        !tables.contains("kube-proxy") && tables.contains("lb-agent-drain")
    });
    let removed = cluster.agent(1, &["cleanup", "--dry-run"]).unwrap();
    assert!(removed.contains("delete table ip lb-agent-drain\n"), "{removed}");
    let second = cluster.spawn("pod12", None, &load).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    change_mode(&mut cluster, NFTABLES);
    let metrics = || {
        let curl = ["-s", "http://127.0.0.1:10249/metrics"];
        netns::output(cluster.lab.command("node1", "curl").args(curl)).unwrap()
    };
    until("draining is told", Duration::from_secs(10), || {
        metrics().contains("lb_draining_connections{mode=\"ebpf\"} 5")
    });
    assert!(cluster.agent(1, &["status"]).unwrap().starts_with("draining: "));
    for child in [first, second] {
        let report: serde_json::Value = serde_json::from_str(&finish(child).unwrap()).unwrap();
        assert_eq!(
            (&report["resets"], &report["timeouts"], &report["wrong"]),
            (&0.into(), &0.into(), &0.into())
        );
    }
    until("the programs are gone", Duration::from_secs(60), || {
        !cluster.lab.bpf_root("node1").exists() && !metrics().contains("mode=\"ebpf\"")
    });
}

/// Rules as kube-proxy leaves them: nothing says that they are the agent's.
fn as_kube_proxys(cluster: &mut Cluster, commands: &[&str]) {
    for node in ["node1", "node2"] {
        for command in commands {
            let (program, args) = command.split_once(' ').expect("a program and its arguments");
            netns::run(cluster.lab.command(node, program).args(args.split(' '))).unwrap();
        }
    }
}

#[test]
fn connections_outlive_kube_proxy() {
    let not_ours: [(&[&str], &[&str]); 2] = [
        (IPTABLES, &["iptables -t mangle -X LB-AGENT-OWNER", "ip6tables -t mangle -X LB-AGENT-OWNER"]),
        (
            NFTABLES,
            &[
                "nft delete chain ip kube-proxy lb-agent-owner",
                "nft delete chain ip6 kube-proxy lb-agent-owner",
            ],
        ),
    ];
    for (mode, commands) in not_ours {
        let mut cluster = cluster(mode);
        for node in [1, 2] {
            cluster.stop_agent(node, libc::SIGTERM).unwrap();
        }
        as_kube_proxys(&mut cluster, commands);
        let clients = ["--connections", "20", "--udp", "2", "--udp-streams", "5"];
        let load = Load::start(&cluster, ("pod12", None), "10.96.0.10:80", &clients).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        let rules = |cluster: &Cluster| {
            tables(cluster) + &netns::output(&mut cluster.lab.command("node1", "iptables-save")).unwrap()
        };
        // Without being told to, the agent leaves kube-proxy's rules alone.
        start(&mut cluster, EBPF);
        std::thread::sleep(Duration::from_secs(1));
        assert!(rules(&cluster).contains("kube-proxy") || rules(&cluster).contains("KUBE-SERVICES"));
        change_mode(&mut cluster, &[EBPF, &["--replace-kube-proxy"]].concat());
        until("kube-proxy's rules are gone", Duration::from_secs(10), || {
            let rules = rules(&cluster);
            !rules.contains("kube-proxy") && !rules.contains("KUBE-SERVICES")
        });
        load.stop_unharmed();
    }
}

/// A machine with iptables-legacy alone: there is no nft to keep its connections.
#[test]
fn connections_outlive_iptables_where_there_is_no_nft() {
    let mut cluster = unstarted();
    let path = cluster.lab.dir().join("path");
    std::fs::create_dir(&path).unwrap();
    for (name, program) in [("iptables", "xtables-legacy-multi"), ("ip6tables", "xtables-legacy-multi")] {
        for part in ["", "-save", "-restore"] {
            std::os::unix::fs::symlink(format!("/usr/sbin/{program}"), path.join(format!("{name}{part}")))
                .unwrap();
        }
    }
    for program in ["/bin/sh", "/usr/bin/nsenter", "/usr/sbin/ip"] {
        let name = std::path::Path::new(program).file_name().unwrap();
        std::os::unix::fs::symlink(program, path.join(name)).unwrap();
    }
    cluster.agent_path = Some(path);
    start(&mut cluster, IPTABLES);
    let clients = ["--connections", "10", "--udp", "2", "--udp-streams", "3"];
    let load = Load::start(&cluster, ("pod12", None), "10.96.0.10:80", &clients).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let nat = |cluster: &Cluster| {
        netns::output(cluster.lab.command("node1", "iptables-legacy-save").args(["-t", "nat"])).unwrap()
    };
    assert!(nat(&cluster).contains("KUBE-SERVICES"));
    change_mode(&mut cluster, EBPF);
    until("the rules are gone and their connections are kept", Duration::from_secs(10), || {
        let nat = nat(&cluster);
        !nat.contains("KUBE-SERVICES") && nat.contains("LB-AGENT-DRAIN")
    });
    load.stop_unharmed();
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    cluster.agent(1, &["cleanup"]).unwrap();
    assert!(!nat(&cluster).contains("LB-AGENT-DRAIN"));
}

#[test]
fn cleanup_can_wait_for_connections() {
    let mut cluster = cluster(EBPF);
    let load = ["load", "10.96.0.10:80", "--connections", "5", "--udp", "0", "--secs", "6"];
    let running = cluster.spawn("pod12", None, &load).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    cluster.agent(1, &["cleanup", "--drain"]).unwrap();
    assert!(!cluster.lab.bpf_root("node1").exists());
    let report: serde_json::Value = serde_json::from_str(&finish(running).unwrap()).unwrap();
    assert_eq!((&report["resets"], &report["timeouts"], &report["wrong"]), (&0.into(), &0.into(), &0.into()));
    assert!(report["requests"].as_u64().unwrap() > 300, "{report}");
}

/// A kube-proxy that comes back writes rules of the same names: what an agent wrote first is its own then.
#[test]
fn rules_that_kube_proxy_took_back_are_left() {
    let mut cluster = cluster(IPTABLES);
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    let rules =
        |cluster: &Cluster| netns::output(&mut cluster.lab.command("node1", "iptables-save")).unwrap();
    let metrics = cluster.lab.inside("node1", || Ok(TcpListener::bind("127.0.0.1:10249")?)).unwrap();
    let kube_proxy = std::thread::spawn(move || {
        let (mut asking, _) = metrics.accept().unwrap();
        let lines = BufReader::new(asking.try_clone().unwrap()).lines();
        assert_eq!(lines.map_while(Result::ok).next().unwrap(), "GET /proxyMode HTTP/1.0");
        asking.write_all(b"HTTP/1.0 200 OK\r\n\r\niptables").unwrap();
    });
    cluster.agent(1, &["cleanup"]).unwrap();
    assert!(rules(&cluster).contains("KUBE-SERVICES"));
    kube_proxy.join().unwrap();
    cluster.agent(1, &["cleanup"]).unwrap();
    assert!(!rules(&cluster).contains("KUBE-SERVICES"));
}
