//! Rules of netfilter: they come, are kept, change hands and go, and nobody else's are touched.

use std::{path::Path, time::Duration};

use lb_test::{
    cluster::{Cluster, Cni, finish, node_ip, pod_manifest},
    load::Load,
    netns,
};

const EBPF: [&str; 2] = ["--mode", "ebpf"];
const NFTABLES: [&str; 4] = ["--mode", "nftables", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];
const IPTABLES: [&str; 4] = ["--mode", "iptables", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];

fn service(name: &str, ip: u8, more: &str) -> String {
    format!(
        "kind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIPs: [10.96.0.{ip}, 'fd00:10:96::{ip}'], selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080}}]{more}}}\n---\n"
    )
}

/// One service on a pod of each node, served by agents with these options.
fn cluster(options: &[&str]) -> Cluster {
    let mut cluster = Cluster::new(Cni::Routed, 2).expect("a cluster of namespaces");
    for host in ["pod11", "pod21"] {
        cluster.serve(host, 8080).expect("a server");
    }
    cluster.apply_nodes().unwrap();
    let external = format!(", externalIPs: [{}]", node_ip(1));
    cluster
        .apply(
            "services.yaml",
            &[pod_manifest(1, 1), pod_manifest(2, 1), service("web", 10, &external)].concat(),
        )
        .unwrap();
    start(&mut cluster, options);
    cluster
}

/// Starts both nodes' agents.
fn start(cluster: &mut Cluster, options: &[&str]) {
    cluster.agent_options = options.iter().map(ToString::to_string).collect();
    cluster.start_agents(&[1, 2]).expect("agents");
}

/// Adds a service while agents run, and waits until it is served in both families.
fn add_service(cluster: &Cluster) {
    add_service_at(cluster, &["10.96.0.99:80", "[fd00:10:96::99]:80"]);
}

fn add_service_at(cluster: &Cluster, targets: &[&str]) {
    cluster.apply("more.yaml", &service("late", 99, "")).unwrap();
    for target in targets {
        until(target, || cluster.tcp("pod12", None, target).unwrap().id.is_some());
    }
}

fn until(what: &str, holds: impl FnMut() -> bool) {
    lb_test::until(what, Duration::from_secs(10), holds);
}

/// Whatever `render` prints, the programs take: the goldens are loaded as they stand.
#[test]
fn goldens_load() {
    let mut lab = netns::Lab::new().unwrap();
    lab.add_ns("host").unwrap();
    let file = lab.dir().join("rules");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lb-agent/tests/golden");
    for case in ["kube-proxy", "shapes", "sctp"] {
        let nft = golden.join(case).join("nftables.txt");
        // The second time in place of the first.
        for _ in 0..2 {
            netns::run(lab.command("host", "nft").arg("-f").arg(&nft)).unwrap();
        }
        let both = std::fs::read_to_string(golden.join(case).join("iptables.txt")).unwrap();
        let (v4, v6) = both.split_once("# IPv6\n").unwrap();
        for variant in ["nft", "legacy"] {
            for (program, rules) in [("iptables", v4), ("ip6tables", v6)] {
                std::fs::write(&file, rules).unwrap();
                let restore = format!("{program}-{variant}-restore");
                netns::run(lab.command("host", &restore).arg("--noflush").arg(&file)).unwrap();
            }
        }
    }
}

/// Rules that a machine's table nat holds, and the text they were counted in.
fn saved(cluster: &Cluster, program: &str) -> (usize, String) {
    let text = netns::output(&mut cluster.lab.command("node1", program)).unwrap();
    let nat = text.split("*nat\n").nth(1).unwrap_or_default().split("COMMIT").next().unwrap_or_default();
    (nat.lines().filter(|line| line.starts_with("-A ")).count(), text)
}

#[test]
fn iptables_rules_come_back_and_go() {
    let mut cluster = cluster(&IPTABLES);
    let iptables = |cluster: &Cluster, words: &str| {
        netns::run(cluster.lab.command("node1", "iptables").args(words.split(' '))).unwrap();
    };
    let (before, _) = saved(&cluster, "iptables-save");
    // Somebody flushes the rules, and the agent starts again: all is back, and what another service left is gone.
    iptables(&cluster, "-t nat -F");
    iptables(&cluster, "-t nat -N KUBE-SVC-LEFTOVER");
    iptables(&cluster, "-t nat -A POSTROUTING -s 203.0.113.1 -j ACCEPT");
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    cluster.start_agent(1).unwrap();
    let (again, text) = saved(&cluster, "iptables-save");
    assert_eq!(again, before + 1, "ours and the stranger's: {text}");
    assert!(!text.contains("LEFTOVER"), "{text}");
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    cluster.start_agent(1).unwrap();
    assert_eq!(saved(&cluster, "iptables-save").0, again, "a start doesn't double the ways to our chains");
    // A change of one service is followed, in both families.
    add_service(&cluster);
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    let said = cluster.agent(1, &["cleanup", "--dry-run"]).unwrap();
    assert!(said.contains("-X KUBE-SERVICES") && said.contains("-D POSTROUTING"), "{said}");
    assert_eq!(
        saved(&cluster, "iptables-save").0,
        again + 8,
        "a dry run touches nothing, and the new service is there"
    );
    cluster.agent(1, &["cleanup"]).unwrap();
    for (program, left) in [("iptables-save", 1), ("ip6tables-save", 0)] {
        let (rules, text) = saved(&cluster, program);
        assert!(!text.contains("KUBE-") && !text.contains("LB-AGENT"), "{text}");
        assert_eq!(rules, left, "{text}");
    }
}

#[test]
fn kube_proxys_rules_go_only_when_asked() {
    let cluster = Cluster::new(Cni::Routed, 1).expect("a cluster of namespaces");
    // Rules as kube-proxy leaves them: there is no mark that they are the agent's. The kubelet's stay.
    let rules = "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n-A PREROUTING -j KUBE-SERVICES\n-A POSTROUTING -j KUBE-POSTROUTING\nCOMMIT\n";
    let file = cluster.lab.dir().join("rules");
    std::fs::write(&file, rules).unwrap();
    netns::run(cluster.lab.command("node1", "iptables-restore").arg("--noflush").arg(&file)).unwrap();
    cluster.agent(1, &["cleanup"]).unwrap();
    assert_eq!(saved(&cluster, "iptables-save").0, 2);
    cluster.agent(1, &["cleanup", "--kube-proxy"]).unwrap();
    let (left, text) = saved(&cluster, "iptables-save");
    assert!(left == 1 && text.contains("KUBE-POSTROUTING") && !text.contains("KUBE-SERVICES"), "{text}");
}

#[test]
fn what_somebody_flushes_comes_back() {
    let mut cluster = cluster(&[&IPTABLES[..], &["--sync-period", "2s"]].concat());
    cluster.stop_agent(2, libc::SIGTERM).unwrap();
    let options = [&NFTABLES[..], &["--sync-period", "2s"]].concat();
    cluster.agent_options = options.into_iter().map(str::to_owned).collect();
    cluster.start_agent(2).unwrap();
    let served = |from| cluster.tcp(from, None, "10.96.0.10:80").unwrap().id.is_some();
    assert!(served("pod12") && served("pod22"));
    let flush = |node: &str, program: &str, words: &str| {
        netns::run(cluster.lab.command(node, program).args(words.split(' '))).unwrap();
    };
    let comes_back = || {
        // Looked for every 2 s, not every 30.
        lb_test::until("all is served again", Duration::from_secs(15), || served("pod12") && served("pod22"));
    };
    flush("node1", "iptables", "-t nat -F");
    flush("node2", "nft", "flush table ip kube-proxy");
    comes_back();
    flush("node2", "nft", "flush ruleset");
    comes_back();
}

/// More chains than go into one call of iptables-nft-restore; at a restart they are there already.
#[test]
fn many_services_are_loaded_in_pieces() {
    let mut cluster = cluster(&IPTABLES);
    let many: String = (1..=400u16)
        .map(|n| {
            let ip = format!("10.96.{}.{}", 1 + n / 200, 1 + n % 200);
            format!(
                "kind: Service\nmetadata: {{name: many-{n}}}\nspec: {{clusterIP: {ip}, selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080}}]}}\n---\n"
            )
        })
        .collect();
    cluster.apply("many.yaml", &many).unwrap();
    let answers = |cluster: &Cluster| {
        ["10.96.1.2:80", "10.96.2.200:80", "10.96.3.1:80"]
            .iter()
            .all(|target| cluster.tcp("pod12", None, target).unwrap().id.is_some())
    };
    lb_test::until("all are served", Duration::from_secs(30), || answers(&cluster));
    let rules = |cluster: &Cluster| {
        let words = ["-t", "nat"];
        let text = netns::output(cluster.lab.command("node1", "iptables-save").args(words)).unwrap();
        let rule = |line: &&str| line.starts_with("-A KUBE-");
        text.lines().filter(rule).map(str::to_owned).collect::<std::collections::BTreeSet<String>>()
    };
    let loaded = rules(&cluster);
    let dispatched = loaded.iter().filter(|rule| rule.starts_with("-A KUBE-SERVICES ")).count();
    assert!(dispatched > 400, "{dispatched}");
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    cluster.start_agent(1).unwrap();
    assert!(answers(&cluster));
    assert_eq!(rules(&cluster), loaded);
}

/// Over rules that serve, while connections go on and new ones are made.
#[test]
fn nobody_notices_that_rules_come_in_pieces() {
    let mut cluster = cluster(&IPTABLES);
    let load =
        Load::start(&cluster, ("pod12", None), "10.96.0.10:80", &["--connections", "20", "--udp", "0"])
            .unwrap();
    let many = |first_endpoint: u8| -> String {
        let endpoints = |i: u8| {
            (0..10).map(|n| format!("{{addresses: [10.245.{i}.{}]}}", first_endpoint + n)).collect::<Vec<_>>()
        };
        let slice = |i: u8| {
            format!(
                "kind: EndpointSlice\nmetadata: {{name: many{i}-1, labels: {{kubernetes.io/service-name: many{i}}}}}\naddressType: IPv4\nports: [{{port: 8080}}]\nendpoints: [{}]\n---\n",
                endpoints(i).join(", ")
            )
        };
        let many = |i: u8| {
            let service = format!(
                "kind: Service\nmetadata: {{name: many{i}}}\nspec: {{clusterIP: 10.96.1.{i}, ports: [{{port: 80, targetPort: 8080}}]}}\n---\n"
            );
            service + &slice(i)
        };
        (1..=120).map(many).collect()
    };
    let serves = |cluster: &Cluster, endpoint: u8| {
        assert!(cluster.tcp("pod12", None, "10.96.0.10:80").unwrap().id.is_some(), "a new connection");
        let (_, text) = saved(cluster, "iptables-save");
        text.matches(":KUBE-SEP-").count() > 1200 && text.contains(&format!("10.245.120.{endpoint}:8080"))
    };
    cluster.apply("many.yaml", &many(1)).unwrap();
    until("all are served", || serves(&cluster, 1));
    // Every chain of theirs changes, and then a new agent writes all again.
    cluster.apply("many.yaml", &many(101)).unwrap();
    until("all are served by others", || serves(&cluster, 101) && !serves(&cluster, 1));
    let dial = ["tcp", "10.96.0.10:80", "--count", "400"];
    let dialling = cluster.spawn("pod12", None, &dial).unwrap();
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    cluster.start_agent(1).unwrap();
    let answers = finish(dialling).unwrap();
    assert!(
        answers.lines().count() == 400 && !answers.contains("error"),
        "new connections meanwhile: {answers}"
    );
    load.stop_unharmed();
    let said = cluster
        .agent(
            1,
            &[
                "diff",
                "--node-name",
                "node1",
                "--manifests",
                &cluster.manifests().display().to_string(),
                "--cluster-cidr",
                IPTABLES[3],
            ],
        )
        .unwrap();
    assert!(said.contains("mode iptables: no differences"), "{said}");
    std::fs::remove_file(cluster.manifests().join("many.yaml")).unwrap();
    until("they are gone", || saved(&cluster, "iptables-save").1.matches(":KUBE-SEP-").count() == 2);
}

/// A change meanwhile does not hide it.
#[test]
fn what_somebody_flushes_comes_back_though_services_change() {
    for (options, program, words) in
        [(NFTABLES, "nft", "flush table ip kube-proxy"), (IPTABLES, "iptables", "-t nat -F")]
    {
        let cluster = cluster(&[&options[..], &["--sync-period", "3s"]].concat());
        netns::run(cluster.lab.command("node1", program).args(words.split(' '))).unwrap();
        add_service_at(&cluster, &["[fd00:10:96::99]:80"]);
        lb_test::until(&format!("{program}: all is served again"), Duration::from_secs(15), || {
            cluster.tcp("pod12", None, "10.96.0.10:80").unwrap().id.is_some()
        });
    }
}

fn tables(cluster: &Cluster) -> String {
    netns::output(cluster.lab.command("node1", "nft").args(["list", "tables"])).unwrap()
}

#[test]
fn nftables_come_back_and_go() {
    let mut cluster = cluster(&NFTABLES);
    let nft = |cluster: &Cluster, words: &str| {
        netns::run(cluster.lab.command("node1", "nft").args(words.split(' '))).unwrap();
    };
    nft(&cluster, "add table ip stranger");
    add_service(&cluster);
    std::fs::remove_file(cluster.manifests().join("more.yaml")).unwrap();
    until("the service is gone", || cluster.tcp("pod12", None, "10.96.0.99:80").unwrap().id.is_none());
    add_service(&cluster);
    // Somebody removes a table, and the agent starts again: all is back.
    nft(&cluster, "delete table ip kube-proxy");
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    assert!(cluster.tcp("pod12", None, "10.96.0.99:80").unwrap().id.is_none());
    cluster.start_agent(1).unwrap();
    assert!(cluster.tcp("pod12", None, "10.96.0.99:80").unwrap().id.is_some());
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    let said = cluster.agent(1, &["cleanup", "--dry-run"]).unwrap();
    assert!(said.contains("delete table ip6 kube-proxy"), "{said}");
    assert!(tables(&cluster).contains("table ip6 kube-proxy"));
    cluster.agent(1, &["cleanup"]).unwrap();
    assert_eq!(tables(&cluster).trim(), "table ip stranger");
    // A table that kube-proxy made goes only when asked.
    nft(&cluster, "add table ip kube-proxy");
    cluster.agent(1, &["cleanup"]).unwrap();
    assert!(tables(&cluster).contains("table ip kube-proxy"));
    cluster.agent(1, &["cleanup", "--kube-proxy"]).unwrap();
    assert_eq!(tables(&cluster).trim(), "table ip stranger");
}

/// An address of the ranges of ClusterIPs that is no Service's: packets to it don't leave the node.
/// 20 000 endpoints, and 100 ports: others are served beside them.
#[test]
fn one_service_may_be_as_large_as_a_cluster() {
    let endpoints = |slice: u32| {
        let addr = |endpoint| std::net::Ipv4Addr::from(0x0a80_0000 + slice * 256 + endpoint + 1);
        let all: Vec<String> =
            (0..100).map(|endpoint| format!("{{addresses: [{}]}}", addr(endpoint))).collect();
        format!(
            "kind: EndpointSlice\nmetadata: {{name: big-{slice}, labels: {{kubernetes.io/service-name: big}}}}\naddressType: IPv4\nports: [{{port: 8080}}]\nendpoints: [{}]\n---\n",
            all.join(", ")
        )
    };
    let ports: Vec<String> =
        (0..100).map(|port| format!("{{name: p{port}, port: {}}}", 1000 + port)).collect();
    let ports = format!(
        "kind: Service\nmetadata: {{name: ports}}\nspec: {{clusterIP: 10.96.0.14, ports: [{}]}}\n---\n",
        ports.join(", ")
    );
    let big =
        "kind: Service\nmetadata: {name: big}\nspec: {clusterIP: 10.96.0.15, ports: [{port: 80}]}\n---\n";
    let objects = ports + big + &(0..200).map(endpoints).collect::<String>();
    for (options, listed, target) in [
        (NFTABLES, ["nft", "list", "table", "ip", "kube-proxy"].as_slice(), "dnat to 10.128."),
        (IPTABLES, &["iptables-save", "-t", "nat"], "--to-destination 10.128."),
    ] {
        let cluster = cluster(&options);
        cluster.apply("big.yaml", &objects).unwrap();
        cluster.apply("more.yaml", &service("late", 99, "")).unwrap();
        lb_test::until("others are served", Duration::from_secs(120), || {
            cluster.tcp("pod12", None, "10.96.0.99:80").unwrap().id.is_some()
        });
        let list = || netns::output(cluster.lab.command("node1", listed[0]).args(&listed[1..])).unwrap();
        lb_test::until("all endpoints are in", Duration::from_secs(120), || {
            list().matches(target).count() == 20_000
        });
        // Each of the 100 ports is refused by a rule of its own: nobody serves them.
        let refused = cluster.tcp("pod12", None, "10.96.0.14:1099").unwrap();
        assert_eq!(refused.error.as_deref(), Some("refused"), "{refused:?}");
    }
}

/// What the kernel doesn't take of one Service would keep all others from being served.
#[test]
fn names_may_be_as_long_as_kubernetes_lets_them() {
    let [namespace, name, port] = ["n", "s", "p"].map(|letter| letter.repeat(63));
    let long = format!(
        "kind: Service\nmetadata: {{namespace: {namespace}, name: {name}}}\nspec: {{clusterIPs: [10.96.0.77, 'fd00:10:96::77'], externalIPs: [198.51.100.77], sessionAffinity: ClientIP, ports: [{{name: {port}, port: 65535}}]}}\n---\n\
         kind: EndpointSlice\nmetadata: {{namespace: {namespace}, name: a, labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv6\nports: [{{name: {port}, port: 65535}}]\nendpoints: [{{addresses: ['2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff']}}, {{addresses: ['2001:db8:aaaa:bbbb:cccc:dddd:eeee:fffe']}}]\n---\n"
    );
    for options in [&EBPF[..], &NFTABLES, &IPTABLES] {
        let cluster = cluster(options);
        cluster.apply("long.yaml", &long).unwrap();
        add_service(&cluster);
        let log = std::fs::read_to_string(cluster.agent_log(1)).unwrap();
        assert!(!log.contains("not programmed"), "{log}");
    }
}

#[test]
fn addresses_of_nobody_lead_nowhere() {
    let cluster = cluster(&NFTABLES);
    let error = |target: &str| cluster.tcp("pod12", None, target).unwrap().error;
    // The router of the LAN has the address, and refuses.
    cluster.lab.ip("lan", "addr add 10.96.0.77/32 dev br0").unwrap();
    cluster.lab.ip("lan", &format!("route add 10.244.1.0/24 via {}", node_ip(1))).unwrap();
    assert_eq!(error("10.96.0.77:80").as_deref(), Some("refused"));
    let ranges = "kind: ServiceCIDR\nmetadata: {name: kubernetes}\nspec: {cidrs: [10.96.0.0/16, 'fd00:10:96::/112']}\n";
    cluster.apply("ranges.yaml", ranges).unwrap();
    until("it is dropped", || error("10.96.0.77:80").as_deref() == Some("timeout"));
    assert_eq!(error("10.96.0.10:81").as_deref(), Some("refused"), "a ClusterIP's other ports still are");
    assert_eq!(error("10.96.0.10:80"), None);
    std::fs::remove_file(cluster.manifests().join("ranges.yaml")).unwrap();
    until("it is passed on", || error("10.96.0.77:80").as_deref() == Some("refused"));
}

#[test]
fn modes_replace_each_other() {
    let mut cluster = cluster(&EBPF);
    let left = |cluster: &Cluster| {
        let pinned = cluster.lab.bpf_root("node1").join("v1").is_dir();
        let rules = saved(cluster, "iptables-legacy-save").1 + &saved(cluster, "iptables-nft-save").1;
        let tables = netns::output(cluster.lab.command("node1", "nft").args(["list", "tables"])).unwrap();
        [pinned, rules.contains("KUBE-SERVICES"), tables.contains("kube-proxy")]
    };
    let served = |cluster: &Cluster| {
        for (from, target) in [("client", format!("{}:80", node_ip(1))), ("pod12", "10.96.0.10:80".into())] {
            let answer = cluster.tcp(from, None, &target).unwrap();
            assert!(answer.id.is_some(), "{from} -> {target}: {answer:?}");
        }
    };
    served(&cluster);
    for (options, expected) in [
        (&IPTABLES[..], [false, true, false]),
        (&NFTABLES, [false, false, true]),
        (&EBPF, [true, false, false]),
        (&NFTABLES, [false, false, true]),
        (&IPTABLES, [false, true, false]),
        (&EBPF, [true, false, false]),
    ] {
        for node in [1, 2] {
            cluster.stop_agent(node, libc::SIGTERM).unwrap();
        }
        start(&mut cluster, options);
        // BPF programs stay until their last connection has been closed for a while.
        lb_test::until(&format!("{options:?}: only its own is left"), Duration::from_secs(40), || {
            left(&cluster) == expected
        });
        served(&cluster);
    }
}
