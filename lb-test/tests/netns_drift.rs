//! Differences between what a node should have and what it has: none after a start, named after somebody's change,
//! counted by a dry run.

use std::time::{Duration, Instant};

use lb_test::{
    cluster::{Cluster, Cni, bpftool, node_ip, pod_manifest, program},
    netns,
};

const PODS: &str = "10.244.0.0/16,fd00:10:244::/48";

/// A Service of every shape that rules differ for.
fn services() -> String {
    let service = |name: &str, ip: u8, more: &str| {
        format!(
            "kind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIPs: [10.96.0.{ip}, 'fd00:10:96::{ip}'], selector: {{app: {name}}}, ports: [{{port: 80, targetPort: 8080, nodePort: 300{ip}}}]{more}}}\n---\n"
        )
    };
    let balancer = ", type: LoadBalancer, externalTrafficPolicy: Local, loadBalancerSourceRanges: [192.0.2.0/24, 198.51.100.0/24]}\nstatus: {loadBalancer: {ingress: [{ip: 203.0.113.5}]}";
    let sticky = format!(", sessionAffinity: ClientIP, externalIPs: [{}]", node_ip(1));
    [
        pod_manifest(1, 1),
        pod_manifest(2, 1),
        service("web", 10, &sticky),
        service("web", 11, balancer).replace("{name: web}", "{name: balanced}"),
        service("empty", 12, ", type: NodePort"),
    ]
    .concat()
}

/// Two nodes, the first served in a mode.
fn cluster(mode: &str) -> Cluster {
    start(Cluster::new(Cni::Routed, 1).expect("a cluster of namespaces"), mode)
}

fn start(mut cluster: Cluster, mode: &str) -> Cluster {
    cluster.apply_nodes().unwrap();
    cluster.apply("services.yaml", &services()).unwrap();
    cluster.agent_options = ["--mode", mode, "--cluster-cidr", PODS].map(str::to_owned).into();
    cluster.start_agent(1).expect("an agent");
    cluster
}

/// What `diff` says of node1, and its exit code.
fn diff(cluster: &Cluster, options: &[&str]) -> (Option<i32>, String) {
    let output = cluster
        .lab
        .command("node1", &program("lb-agent"))
        .args(["diff", "--node-name", "node1", "--cluster-cidr", PODS, "--bpf-root"])
        .arg(cluster.lab.bpf_root("node1"))
        .args(options)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code(), text + &String::from_utf8_lossy(&output.stderr))
}

fn diff_of_manifests(cluster: &Cluster) -> (Option<i32>, String) {
    diff(cluster, &["--manifests", &cluster.manifests().display().to_string()])
}

fn agrees(cluster: &Cluster, mode: &str) {
    let (code, said) = diff_of_manifests(cluster);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains(&format!("mode {mode}: no differences")), "{said}");
}

fn differs(cluster: &Cluster, expected: &[&str]) {
    let (code, said) = diff_of_manifests(cluster);
    assert_eq!(code, Some(1), "{said}");
    for line in expected {
        assert!(said.lines().any(|said| said == *line), "no {line:?} in\n{said}");
    }
    let differences = said.lines().filter(|line| line.starts_with("missing") || line.starts_with("extra"));
    assert_eq!(differences.count(), expected.len(), "{said}");
}

fn restart(cluster: &mut Cluster) {
    cluster.stop_agent(1, libc::SIGTERM).unwrap();
    cluster.start_agent(1).unwrap();
}

fn on_node(cluster: &Cluster, program: &str, words: &str) {
    netns::run(cluster.lab.command("node1", program).args(words.split(' '))).unwrap();
}

#[test]
fn changed_maps_are_noticed() {
    let mut cluster = cluster("ebpf");
    agrees(&cluster, "ebpf");
    let map = cluster.lab.bpf_root("node1").join("v1/LB4_FRONTENDS").display().to_string();
    // 10.96.0.10:80/TCP, as FrontendKey has it.
    let key = "10 96 0 10 80 0 6 0";
    let words = ["map", "delete", "pinned", &map, "key"];
    bpftool(&words.into_iter().chain(key.split(' ')).collect::<Vec<_>>()).unwrap();
    let link = cluster.lab.bpf_root("node1").join("v1/links/cgroup-connect4").display().to_string();
    bpftool(&["link", "detach", "pinned", &link]).unwrap();
    differs(&cluster, &["missing: frontend 10.96.0.10:80/TCP", "extra: detached link cgroup-connect4"]);
    restart(&mut cluster);
    agrees(&cluster, "ebpf");
}

#[test]
fn changed_tables_are_noticed() {
    let mut cluster = cluster("nftables");
    agrees(&cluster, "nftables");
    on_node(&cluster, "nft", "delete element ip kube-proxy cluster-ips { 10.96.0.10 }");
    on_node(&cluster, "nft", "add element ip6 kube-proxy cluster-ips { fd00::1 }");
    on_node(&cluster, "nft", "insert rule ip kube-proxy services accept");
    differs(
        &cluster,
        &[
            "missing in ip set cluster-ips: 10.96.0.10",
            "extra in ip6 set cluster-ips: fd00::1",
            "extra in ip chain services: accept",
        ],
    );
    restart(&mut cluster);
    agrees(&cluster, "nftables");
    // The emptied chains that stay until the agent's next transaction are no difference.
    let all = services();
    let fewer: Vec<&str> = all.split("---\n").filter(|object| !object.contains("balanced")).collect();
    cluster.apply("services.yaml", &fewer.join("---\n")).unwrap();
    let table = |cluster: &Cluster| {
        netns::output(cluster.lab.command("node1", "nft").args(["list", "table", "ip", "kube-proxy"]))
            .unwrap()
    };
    until("the service is gone", || !table(&cluster).contains("30011"));
    assert!(table(&cluster).contains("/balanced/"));
    agrees(&cluster, "nftables");
}

#[test]
fn changed_rules_are_noticed() {
    for variant in ["nft", "legacy"] {
        let [v4, v6] = ["iptables", "ip6tables"].map(|program| format!("{program}-{variant}"));
        let cluster = Cluster::new(Cni::Routed, 1).expect("a cluster of namespaces");
        // The agent takes the variant that the machine's rules are in.
        on_node(&cluster, &v4, "-t nat -A POSTROUTING -s 203.0.113.1 -j ACCEPT");
        let mut cluster = start(cluster, "iptables");
        agrees(&cluster, "iptables");
        on_node(&cluster, &v4, "-t nat -F KUBE-MARK-MASQ");
        on_node(&cluster, &v6, "-t filter -A KUBE-FORWARD -j DROP");
        differs(
            &cluster,
            &[
                &format!("missing in {v4} -t nat chain KUBE-MARK-MASQ: -j MARK --set-xmark 0x4000/0x4000"),
                &format!("extra in {v6} -t filter chain KUBE-FORWARD: -j DROP"),
            ],
        );
        restart(&mut cluster);
        agrees(&cluster, "iptables");
    }
}

/// What a dry run on node1 counts now.
fn counted(cluster: &Cluster) -> Option<usize> {
    let page = ["-sf", "-m", "1", "http://127.0.0.1:10349/metrics"];
    let text = netns::output(cluster.lab.command("node1", "curl").args(page)).ok()?;
    let line = text.lines().find(|line| line.starts_with("lb_dry_run_differences{"))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// What the kernel holds of all modes, without counters.
fn kernel(cluster: &Cluster) -> String {
    let said = |program: &str, words: &[&str]| {
        netns::output(cluster.lab.command("node1", program).args(words)).unwrap()
    };
    let mut pins: Vec<String> = std::fs::read_dir(cluster.lab.bpf_root("node1"))
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path().display().to_string())
        .collect();
    pins.sort();
    let saved = said("iptables-legacy-save", &[]) + &said("iptables-nft-save", &[]);
    let rules: Vec<&str> = saved.lines().filter(|line| line.starts_with("-A")).collect();
    [pins.join("\n"), rules.join("\n"), said("nft", &["list", "tables"])].concat()
}

#[test]
fn a_dry_run_counts_and_touches_nothing() {
    for (mode, program, words) in [
        ("nftables", "nft", "delete element ip kube-proxy cluster-ips { 10.96.0.10 }"),
        ("iptables", "iptables", "-t nat -F KUBE-MARK-MASQ"),
        ("ebpf", "bpftool", "map delete pinned PIN key 10 96 0 10 80 0 6 0"),
    ] {
        let mut cluster = Cluster::new(Cni::Routed, 1).expect("a cluster of namespaces");
        cluster.apply_nodes().unwrap();
        cluster.apply("services.yaml", &services()).unwrap();
        let before = kernel(&cluster);
        let mut dry = cluster.lab.command_in("node1", "dry", &lb_test::cluster::program("lb-agent")).unwrap();
        dry.args(["run", "--dry-run", "--node-name", "node1", "--mode", mode, "--cluster-cidr", PODS])
            .arg("--manifests")
            .arg(cluster.manifests())
            .arg("--bpf-root")
            .arg(cluster.lab.bpf_root("node1"))
            .stderr(std::fs::File::create(cluster.lab.dir().join("dry.log")).unwrap());
        cluster.lab.adopt(dry.spawn().unwrap());
        until(&format!("{mode}: all is missing"), || counted(&cluster).is_some_and(|count| count > 10));
        assert_eq!(kernel(&cluster), before, "{mode}");
        let cluster = start(cluster, mode);
        until(&format!("{mode}: nothing is missing"), || counted(&cluster) == Some(0));
        let pin = cluster.lab.bpf_root("node1").join("v1/LB4_FRONTENDS").display().to_string();
        let words: Vec<&str> = words.split(' ').map(|word| if word == "PIN" { &pin } else { word }).collect();
        netns::run(cluster.lab.command("node1", program).args(words)).unwrap();
        until(&format!("{mode}: one is missing"), || counted(&cluster) == Some(1));
        // A change is followed while it is made.
        cluster.apply("services.yaml", &services().replace("30012", "30013")).unwrap();
        let log = cluster.lab.dir().join("dry.log");
        until(&format!("{mode}: the change is compared"), || {
            std::fs::read_to_string(&log).unwrap().matches("nothing applied").count() > 1
        });
        let mut cluster = cluster;
        restart(&mut cluster);
        until(&format!("{mode}: nothing is missing again"), || counted(&cluster) == Some(0));
    }
}

#[test]
fn a_probe_leaves_nothing_and_auto_takes_what_it_says() {
    let mut cluster = Cluster::new(Cni::Routed, 1).expect("a cluster of namespaces");
    cluster.apply_nodes().unwrap();
    let before = kernel(&cluster);
    let cgroup = cluster.lab.cgroup("base").display().to_string();
    let said = cluster.agent(1, &["probe", "-o", "json", "--cgroup-root", &cgroup]).unwrap();
    assert_eq!(kernel(&cluster), before);
    assert!(
        std::fs::read_dir(&cgroup).unwrap().all(|entry| !entry.unwrap().path().is_dir()),
        "a cgroup stays"
    );
    let report: serde_json::Value = serde_json::from_str(&said).unwrap();
    let found = |what: &str| {
        let mut rows = report["found"].as_array().into_iter().flatten();
        rows.find(|row| row["what"] == what).map(|row| row["found"].clone()).unwrap_or_default()
    };
    // Whatever these tests need is there.
    for what in ["programs", "tc", "socket-hooks", "nft", "nftables-rules", "iptables-rules"] {
        assert_eq!(found(what), "yes", "{what}: {said}");
    }
    assert_eq!(report["auto"], "ebpf", "{said}");
    cluster.agent_options = vec!["--mode".into(), "auto".into()];
    cluster.start_agent(1).unwrap();
    let log = std::fs::read_to_string(cluster.agent_log(1)).unwrap();
    assert!(log.contains("mode auto") && log.contains("nftables works"), "{log}");
    assert!(cluster.lab.bpf_root("node1").join("v1").is_dir());
}

#[test]
fn what_can_not_be_told_is_no_drift() {
    let cluster = Cluster::new(Cni::Routed, 1).expect("a cluster of namespaces");
    cluster.apply_nodes().unwrap();
    let (code, said) = diff_of_manifests(&cluster);
    assert!(code == Some(2) && said.contains("no mode serves this node"), "{said}");
    let (code, said) = diff(&cluster, &["--mode", "nftables", "--manifests", "/nowhere"]);
    assert!(code == Some(2) && said.contains("read folder /nowhere"), "{said}");
    let manifests = cluster.manifests().display().to_string();
    let (code, said) = diff(&cluster, &["--mode", "ebpf", "--manifests", &manifests]);
    assert!(code == Some(2) && said.contains("--bpf-root"), "{said}");
    // Nothing is loaded: all of it is missing.
    let (code, said) = diff(&cluster, &["--mode", "nftables", "--manifests", &manifests]);
    assert!(code == Some(1) && said.contains("missing: ip chain services\n"), "{said}");
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
