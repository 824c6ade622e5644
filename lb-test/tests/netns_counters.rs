//! What kube-proxy counts with nfacct in mode iptables: real packets, read at the metrics port.

use std::{fs, os::unix::fs::PermissionsExt};

use lb_agent::{datapath::iptables::counters, nfacct::Counters};
use lb_test::{
    cluster::{Cluster, Cni, node_ip, pod_manifest},
    netns,
    talk::Talk,
};

const IPTABLES: &[&str] = &["--mode", "iptables", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];
const EBPF: &[&str] = &["--mode", "ebpf"];
const INVALID: &str = "kubeproxy_iptables_ct_state_invalid_dropped_packets_total";
const LOCALHOST: &str = "kubeproxy_iptables_localhost_nodeports_accepted_packets_total";
const CLUSTER_IP: &str = "10.96.0.10:80";
const LOCAL: &str = "127.0.0.1:30080";

/// A pod on node 1 that is served by its agent, once that is started.
fn cluster() -> Cluster {
    let mut cluster = Cluster::new(Cni::Routed, 2).expect("a cluster of namespaces");
    cluster.serve("pod11", 8080).expect("a server");
    cluster.apply_nodes().unwrap();
    let service = "kind: Service\nmetadata: {name: web}\nspec: {type: NodePort, clusterIPs: [10.96.0.10, 'fd00:10:96::10'], selector: {app: web}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}\n";
    cluster.apply("services.yaml", &[&pod_manifest(1, 1), service].concat()).unwrap();
    cluster
}

fn start(cluster: &mut Cluster, options: &[&str]) {
    cluster.agent_options = options.iter().map(ToString::to_string).collect();
    cluster.start_agent(1).expect("an agent");
}

fn on_node(cluster: &Cluster, program: &str, words: &str) -> String {
    netns::output(cluster.lab.command("node1", program).args(words.split(' '))).unwrap()
}

/// The number of a metric; `None` if it isn't there.
fn count(cluster: &Cluster, metric: &str) -> Option<u64> {
    let page = on_node(cluster, "curl", "-s http://127.0.0.1:10249/metrics");
    let value = page.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
    let typed = page.contains(&format!("\n# TYPE {metric} counter\n"));
    assert_eq!(value.is_some(), typed, "{page}");
    value.map(|value| value.parse().unwrap())
}

/// Counters in node 1's namespace.
fn existing(cluster: &Cluster) -> usize {
    cluster.lab.inside("node1", || Ok(counters::existing().len())).unwrap()
}

fn answered(cluster: &Cluster, from: &str, target: &str) {
    assert_eq!(cluster.tcp(from, None, target).unwrap().id.as_deref(), Some("pod11"), "{from} to {target}");
}

#[test]
fn a_counter_comes_stays_and_goes() {
    let cluster = Cluster::new(Cni::Routed, 0).expect("a cluster of namespaces");
    let work = || {
        let mut counters = Counters::open()?;
        counters.make("some_pkts")?;
        counters.make("some_pkts")?;
        assert_eq!((counters.packets("some_pkts")?, counters.packets("others")?), (Some(0), None));
        assert!(counters.remove("some_pkts")?, "nobody uses it");
        assert!(counters.remove("some_pkts")?, "it is gone already");
        assert_eq!(counters.packets("some_pkts")?, None);
        Ok(())
    };
    cluster.lab.inside("node1", work).unwrap();
}

#[test]
fn packets_that_rules_meet_are_counted() {
    for variant in ["nft", "legacy"] {
        let mut cluster = cluster();
        // The agent takes the variant that the machine's rules are in.
        on_node(&cluster, &format!("iptables-{variant}"), "-t nat -A POSTROUTING -s 203.0.113.1 -j ACCEPT");
        start(&mut cluster, IPTABLES);
        let counts = |cluster: &Cluster| [INVALID, LOCALHOST].map(|metric| count(cluster, metric));
        assert_eq!(counts(&cluster), [Some(0), Some(0)], "{variant}");
        answered(&cluster, "pod12", CLUSTER_IP);
        answered(&cluster, "node1", &format!("{}:30080", node_ip(1)));
        assert_eq!(counts(&cluster), [Some(0), Some(0)], "{variant}: others' packets");

        for connection in 1..=3 {
            answered(&cluster, "node1", LOCAL);
            assert_eq!(counts(&cluster), [Some(0), Some(connection)], "{variant}: the first packet of each");
        }
        let mut talk = Talk::tcp(&cluster, ("pod12", None), CLUSTER_IP, &["--stray-segment"]).unwrap();
        talk.stays_with("pod11", 5).unwrap();
        assert_eq!(counts(&cluster), [Some(1), Some(3)], "{variant}: the stray segment");
        drop(talk);

        // Flushed rules come back, and a new agent goes on counting.
        on_node(&cluster, &format!("iptables-{variant}"), "-t filter -F");
        cluster.stop_agent(1, libc::SIGTERM).unwrap();
        cluster.start_agent(1).unwrap();
        answered(&cluster, "node1", LOCAL);
        assert_eq!(counts(&cluster), [Some(1), Some(4)], "{variant}");
        cluster.stop_agent(1, libc::SIGTERM).unwrap();

        let said = cluster.agent(1, &["cleanup", "--dry-run"]).unwrap();
        assert!(said.contains("delete ct_state_invalid_dropped_pkts"), "{said}");
        assert_eq!(existing(&cluster), 2, "{variant}: a dry run removes nothing");
        cluster.agent(1, &["cleanup"]).unwrap();
        assert_eq!(existing(&cluster), 0, "{variant}");
    }
}

#[test]
fn counters_go_with_the_rules_that_another_mode_replaces() {
    let mut cluster = cluster();
    start(&mut cluster, IPTABLES);
    assert_eq!(existing(&cluster), 2);
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    start(&mut cluster, EBPF);
    lb_test::until("they are gone", std::time::Duration::from_secs(10), || existing(&cluster) == 0);
    assert_eq!(count(&cluster, LOCALHOST), None, "what only iptables has");
}

#[test]
fn counters_that_somebody_elses_rules_use_stay() {
    let mut cluster = cluster();
    start(&mut cluster, IPTABLES);
    let strangers = "-A INPUT -m nfacct --nfacct-name localhost_nps_accepted_pkts";
    on_node(&cluster, "iptables", strangers);
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    cluster.agent(1, &["cleanup"]).unwrap();
    assert_eq!(existing(&cluster), 1);
}

#[test]
fn counters_come_back_with_rules_that_somebody_flushed() {
    let mut cluster = cluster();
    start(&mut cluster, &[IPTABLES, &["--sync-period", "2s"]].concat());
    answered(&cluster, "node1", LOCAL);
    assert_eq!(count(&cluster, LOCALHOST), Some(1));
    for program in ["iptables", "ip6tables"] {
        for table in ["filter", "nat"] {
            on_node(&cluster, program, &format!("-t {table} -F"));
        }
    }
    let remove = || {
        counters::remove_unused();
        Ok(())
    };
    cluster.lab.inside("node1", remove).unwrap();
    lb_test::until("all is served again", std::time::Duration::from_secs(15), || {
        cluster.tcp("node1", None, LOCAL).unwrap().id.is_some()
    });
    // One more, for an attempt may have come between the families.
    let before = count(&cluster, LOCALHOST).expect("it is there again");
    answered(&cluster, "node1", LOCAL);
    assert_eq!(count(&cluster, LOCALHOST), Some(before + 1));
}

/// An iptables without the extension, and so no way to load a rule that counts.
#[test]
fn rules_that_cannot_count_serve_all_the_same() {
    let mut cluster = cluster();
    let (programs, extensions) = (cluster.lab.dir().join("path"), cluster.lab.dir().join("xtables"));
    for dir in [&programs, &extensions] {
        fs::create_dir(dir).unwrap();
    }
    let all = fs::read_dir("/usr/lib/x86_64-linux-gnu/xtables").unwrap().map(|entry| entry.unwrap());
    for entry in all.filter(|entry| entry.file_name() != "libxt_nfacct.so") {
        std::os::unix::fs::symlink(entry.path(), extensions.join(entry.file_name())).unwrap();
    }
    for name in
        ["iptables", "ip6tables"].iter().flat_map(|name| ["", "-save", "-restore"].map(|part| (name, part)))
    {
        let (name, part) = name;
        let file = programs.join(format!("{name}{part}"));
        let dir = extensions.display();
        let script =
            format!("#!/bin/sh\nexport XTABLES_LIBDIR={dir}\nexec /usr/sbin/{name}-nft{part} \"$@\"\n");
        fs::write(&file, script).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    for program in ["/bin/sh", "/usr/bin/nsenter", "/usr/sbin/ip"] {
        let name = std::path::Path::new(program).file_name().unwrap();
        std::os::unix::fs::symlink(program, programs.join(name)).unwrap();
    }
    cluster.agent_path = Some(programs);
    start(&mut cluster, IPTABLES);
    answered(&cluster, "node1", LOCAL);
    assert_eq!([INVALID, LOCALHOST].map(|metric| count(&cluster, metric)), [None, None]);
    assert_eq!(existing(&cluster), 0);
    let rules = on_node(&cluster, "iptables-nft-save", "-t filter");
    assert!(rules.contains("-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP"), "{rules}");
    let log = fs::read_to_string(cluster.agent_log(1)).unwrap();
    assert_eq!(log.matches("no nfacct here").count(), 2, "once for each family: {log}");
}
