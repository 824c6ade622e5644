//! kube-proxy's configuration file: what it says is what the node does, also after it has changed.

use std::{collections::BTreeSet, fs, time::Duration};

use lb_test::{
    cluster::{Cluster, Cni, node_ip, node_ip6, pod_ip},
    is_vm,
    load::Load,
    netns, until,
};

/// One service with an endpoint on each node; agents read the configuration file.
fn cluster(cni: Cni, fields: &str) -> Cluster {
    let mut cluster = Cluster::new(cni, 2).expect("a cluster of namespaces");
    for host in ["pod11", "pod21"] {
        cluster.serve(host, 8080).expect("a server");
    }
    cluster.apply_nodes().unwrap();
    let endpoints =
        [1, 2].map(|node| format!("{{addresses: [{}], nodeName: node{node}}}", pod_ip(node, 1))).join(", ");
    let web = format!(
        "kind: Service\nmetadata: {{name: web}}\nspec: {{clusterIP: 10.96.0.10, type: NodePort, ports: [{{port: 80, nodePort: 30080}}]}}\n---\n\
         kind: EndpointSlice\nmetadata: {{name: web-1, labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nports: [{{port: 8080}}]\nendpoints: [{endpoints}]\n"
    );
    cluster.apply("web.yaml", &web).unwrap();
    cluster.configure(fields).unwrap();
    cluster.agent_options = vec!["--config".into(), cluster.config_file().display().to_string()];
    cluster.start_agents(&[1, 2]).expect("agents");
    cluster
}

fn on_node1(cluster: &Cluster, words: &str) -> String {
    let mut words = words.split(' ');
    let program = words.next().expect("a program");
    netns::output(cluster.lab.command("node1", program).args(words)).unwrap()
}

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn a_changed_file_takes_effect_without_a_restart() {
    let cluster = cluster(Cni::Routed, "mode: iptables\nclusterCIDR: 10.244.0.0/16\noomScoreAdj: 5");
    let log = || fs::read_to_string(cluster.agent_log(1)).unwrap();
    let oom_score =
        || fs::read_to_string(format!("/proc/{}/oom_score_adj", cluster.agent_pid(1).unwrap())).unwrap();
    let configz = |field: &str| {
        let url = "http://127.0.0.1:10249/configz";
        let said = netns::output(cluster.lab.command("node1", "curl").args(["-s", url])).unwrap();
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        said["kubeproxy.config.k8s.io"][field].clone()
    };
    assert_eq!((oom_score().trim(), configz("oomScoreAdj")), ("5", 5.into()));
    let clients = ["--connections", "10", "--udp", "0"];
    let load = Load::start(&cluster, ("pod12", None), "10.96.0.10:80", &clients).unwrap();
    let nat = || on_node1(&cluster, "iptables-save -t nat");
    let only_others = "! -s 10.244.0.0/16 -d 10.96.0.10/32";
    assert!(nat().contains(only_others), "{}", nat());

    cluster.configure("mode: iptables\nclusterCIDR: 10.244.0.0/16\niptables: {masqueradeAll: true}").unwrap();
    // Also in a cluster that is never at rest.
    let mut turns = 0;
    until("all is masqueraded", LIMIT, || {
        turns += 1;
        let other = format!(
            "kind: Service\nmetadata: {{name: other}}\nspec: {{clusterIP: 10.96.1.{turns}, ports: [{{port: 80}}]}}\n"
        );
        cluster.apply("other.yaml", &other).unwrap();
        nat().contains("KUBE-MARK-MASQ") && !nat().contains(only_others)
    });

    // What can't be used changes nothing.
    cluster.configure("mode: kernelspace").unwrap();
    let refused = "mode: \\\"kernelspace\\\" is not auto, ebpf, nftables, iptables or ipvs";
    until("the file is refused", LIMIT, || log().contains(refused));
    assert!(
        nat().contains("KUBE-MARK-MASQ") && cluster.tcp("pod12", None, "10.96.0.10:80").unwrap().id.is_some()
    );

    // Nor does what can't be begun with: no device has that address.
    cluster.configure("mode: iptables\nclusterCIDR: 10.244.0.0/16\nhealthzBindAddress: 203.0.113.1").unwrap();
    until("the last configuration holds", LIMIT, || {
        log().matches("the last one holds").count() == 2 && log().contains("listen on 203.0.113.1:10256")
    });
    let healthz = ["-sf", "http://127.0.0.1:10256/healthz"];
    until("it does as before", LIMIT, || {
        netns::output(cluster.lab.command("node1", "curl").args(healthz)).is_ok()
            && cluster.tcp("pod12", None, "10.96.0.10:80").unwrap().id.is_some()
    });
    assert_eq!(configz("healthzBindAddress"), "0.0.0.0:10256", "what holds is shown");
    assert_eq!(configz("oomScoreAdj"), -999);
    // It may become possible without a change of the file.
    cluster.lab.ip("node1", "addr add 203.0.113.1/32 dev lo").unwrap();
    until("it is begun with", 2 * LIMIT, || {
        let answers = |host: &str| {
            let url = format!("http://{host}:10256/healthz");
            netns::output(cluster.lab.command("node1", "curl").args(["-sf", "-m", "5", &url])).is_ok()
        };
        !answers("127.0.0.1") && answers("203.0.113.1")
    });
    assert_eq!(configz("healthzBindAddress"), "203.0.113.1:10256");
    assert_eq!(log().matches("is tried again").count(), 1, "{}", log());

    cluster
        .configure("mode: nftables\nclusterCIDR: 10.244.0.0/16\nconntrack: {tcpCloseWaitTimeout: 77s}")
        .unwrap();
    until("nftables serves in place of iptables", LIMIT, || {
        on_node1(&cluster, "nft list tables ip").contains("kube-proxy") && !nat().contains("KUBE-SVC-")
    });
    let timeout = on_node1(&cluster, "cat /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait");
    assert_eq!(timeout.trim(), "77");

    let before = log().len();
    assert!(!log().contains("DEBUG"), "{}", log());
    cluster.configure("lb: {mode: ebpf}\noomScoreAdj: 7\nlogging: {format: json, verbosity: 4}").unwrap();
    until("the programs serve", LIMIT, || {
        cluster.agent(1, &["service", "list"]).is_ok_and(|services| services.contains("10.96.0.10:80/TCP"))
    });
    assert_eq!((oom_score().trim(), configz("logging")["format"].as_str()), ("7", Some("json")));
    // The first lines are still of the time before.
    let lines: Vec<String> =
        log()[before..].lines().skip_while(|line| !line.starts_with('{')).map(str::to_owned).collect();
    assert!(lines.len() > 2 && lines.iter().all(|line| line.starts_with('{')), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("\"DEBUG\"")), "{lines:?}");
    // The same processes all the while, and no connection was cut.
    assert_eq!(log().matches("a new configuration").count(), 4, "{}", log());
    assert!(!log().contains("stopping"));
    load.stop_unharmed();
}

/// A Service goes while an agent that knew it ends and one that never did begins. Neither a change of the file nor a signal
/// waits for the next write.
#[test]
fn what_happens_while_an_agent_begins_anew_is_not_lost() {
    let first = "mode: iptables\nclusterCIDR: 10.244.0.0/16\nconntrack: {tcpBeLiberal: true}";
    let cluster = cluster(Cni::Routed, first);
    let filter = on_node1(&cluster, "iptables-save -t filter");
    assert!(filter.contains("KUBE-FORWARD") && !filter.contains("INVALID"), "{filter}");
    let balanced = "kind: Service\nmetadata: {name: balanced}\nspec: {clusterIP: 10.96.0.20, type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: 32100, ports: [{port: 80}]}\n";
    let asked = |host: &str| {
        let url = format!("http://{host}:32100/");
        let curl = ["-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", &url];
        let answer = cluster.lab.command("client", "curl").args(curl).output().unwrap();
        String::from_utf8(answer.stdout).unwrap()
    };
    let begun = || fs::read_to_string(cluster.agent_log(1)).unwrap().matches("a new configuration").count();
    let healthy = |host: &str| {
        let url = format!("http://{host}:10256/healthz");
        netns::output(cluster.lab.command("client", "curl").args(["-sf", "-m", "5", &url])).is_ok()
    };
    for turn in 1..=4 {
        cluster.apply("balanced.yaml", balanced).unwrap();
        for host in [node_ip(1), format!("[{}]", node_ip6(1))] {
            until(&format!("{host} is asked"), LIMIT, || asked(&host) == "503" && healthy(&host));
        }
        cluster
            .configure(&format!(
                "mode: iptables\nclusterCIDR: 10.244.0.0/16\niptables: {{masqueradeBit: {turn}}}"
            ))
            .unwrap();
        // Before the file is looked at, or while the agent begins anew.
        std::thread::sleep(Duration::from_millis(30 * turn));
        cluster.apply("balanced.yaml", "").unwrap();
        until("it has begun anew", LIMIT, || begun() == turn as usize);
        until("nobody is asked", LIMIT, || asked(&node_ip(1)) == "000");
        until("the node is well", LIMIT, || healthy(&node_ip(1)));
    }
    // A write is awaited that is an hour away; nobody waits for that.
    let slow = "mode: iptables\nclusterCIDR: 10.244.0.0/16\niptables: {minSyncPeriod: 1h, syncPeriod: 2h}";
    cluster.configure(slow).unwrap();
    until("it has begun anew", LIMIT, || begun() == 5 && healthy(&node_ip(1)));
    cluster.apply("balanced.yaml", balanced).unwrap();
    cluster.configure("mode: iptables\nclusterCIDR: 10.244.0.0/16").unwrap();
    until("what waited is written", LIMIT, || asked(&node_ip(1)) == "503");
    cluster.configure(slow).unwrap();
    until("it has begun anew", LIMIT, || begun() == 7 && healthy(&node_ip(1)));
    cluster.apply("balanced.yaml", "").unwrap();
    let pid = cluster.agent_pid(1).unwrap();
    // SAFETY: a plain system call; the child has not been waited for.
    unsafe { libc::kill(pid as i32, libc::SIGTERM) };
    until("it has ended", LIMIT, || {
        fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().is_empty()
    });
}

/// Whom the endpoint sees.
fn client_of(cluster: &Cluster, from: &str, target: &str) -> String {
    cluster.tcp(from, None, target).unwrap().client.unwrap_or_default()
}

/// Modes whose rules tell pods from others; in the test VM it is ipvs.
fn netfilter_modes() -> &'static [&'static str] {
    if is_vm() { &["ipvs"] } else { &["iptables", "nftables"] }
}

/// One of the first node's addresses, towards other nodes or towards its pods.
fn of_node1(client: &str) -> bool {
    [node_ip(1), "10.244.1.1".into()].contains(&client.to_owned())
}

/// Everybody the endpoints see in some connections.
fn clients_of(cluster: &Cluster, from: &str, target: &str) -> BTreeSet<String> {
    (0..16).map(|_| client_of(cluster, from, target)).collect()
}

#[test]
fn pods_are_told_by_their_nodes_ranges() {
    for mode in netfilter_modes() {
        let nodes = |range: &str| {
            let addresses = format!("addresses: [{{type: InternalIP, address: {}}}]", node_ip(1));
            format!(
                "kind: Node\nmetadata: {{name: node1}}\nspec: {{podCIDRs: [{range}]}}\nstatus: {{{addresses}}}\n"
            )
        };
        let cluster = cluster(Cni::Routed, &format!("mode: {mode}\ndetectLocalMode: NodeCIDR"));
        cluster.route_services_to_node1().unwrap();
        let pod = BTreeSet::from([pod_ip(1, 2)]);
        let seen = || clients_of(&cluster, "pod12", "10.96.0.10:80");
        let becomes = |what: &str, is_itself: bool| {
            until(&format!("{mode}: {what}"), LIMIT, || (seen() == pod) == is_itself);
        };
        assert_eq!(seen(), pod, "{mode}: without ranges nobody is known not to be a pod");
        cluster.apply("nodes.yaml", &nodes("10.244.1.0/24")).unwrap();
        until(&format!("{mode}: who is not of the range is masqueraded"), LIMIT, || {
            clients_of(&cluster, "client", "10.96.0.10:80").iter().all(|seen| of_node1(seen))
        });
        becomes("a pod of the range is itself", true);
        cluster.apply("nodes.yaml", &nodes("10.245.1.0/24")).unwrap();
        becomes("one outside of it is not", false);
        // The Node is deleted, then made anew without a range yet.
        cluster.apply("nodes.yaml", "").unwrap();
        let healthz = ["-s", "http://127.0.0.1:10256/healthz"];
        let healthz = || netns::output(cluster.lab.command("node1", "curl").args(healthz)).unwrap();
        until(&format!("{mode}: the Node is gone"), LIMIT, || healthz().contains("\"nodeEligible\":false"));
        assert!(!seen().contains(&pod_ip(1, 2)), "{mode}: what it said holds");
        cluster.apply("nodes.yaml", &nodes("")).unwrap();
        until(&format!("{mode}: the Node is back"), LIMIT, || healthz().contains("\"nodeEligible\":true"));
        assert!(!seen().contains(&pod_ip(1, 2)), "{mode}: what it said holds, for it says nothing else");
        cluster.apply("nodes.yaml", &nodes("10.244.1.0/24")).unwrap();
        becomes("a pod of the range is itself again", true);
    }
}

#[test]
fn pods_are_told_by_their_bridge_and_by_their_devices() {
    let forms = [
        "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}",
        "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: cn}",
    ];
    for (mode, fields) in netfilter_modes().iter().flat_map(|mode| forms.map(|fields| (mode, fields))) {
        let cluster = cluster(Cni::Bridge, &format!("mode: {mode}\n{fields}"));
        let of_pod = clients_of(&cluster, "pod12", "10.96.0.10:80");
        assert_eq!(of_pod, BTreeSet::from([pod_ip(1, 2)]), "{mode}: {fields}");
        // The node is none of its pods, and is masqueraded as whoever comes from outside.
        for (from, target) in
            [("node1", "10.96.0.10:80".to_owned()), ("client", format!("{}:30080", node_ip(1)))]
        {
            let seen = clients_of(&cluster, from, &target);
            assert!(seen.iter().all(|client| of_node1(client)), "{mode}: {fields}: {seen:?}");
        }
    }
}
