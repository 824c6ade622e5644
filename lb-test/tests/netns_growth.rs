//! Maps of Services that become too small while real connections go on through them.

use std::{fmt::Write as _, fs, path::PathBuf, time::Duration};

use lb_common::abi::LAYOUT_VERSION;
use lb_test::{
    cluster::{Cluster, Cni, bpftool, node_ip, pod_ip},
    flows::cluster,
    load::Load,
    patience, until,
};
use serde_json::Value;

const TARGET: &str = "198.51.100.10:80";

/// So many Services, the first the oldest, each with so many endpoints, of which the last is real.
fn many(services: u32, endpoints: u32) -> String {
    let mut yaml = String::new();
    for i in 0..services {
        let (hour, minute, second) = (i / 3600, i / 60 % 60, i % 60);
        write!(
            yaml,
            "kind: Service\nmetadata: {{name: many-{i}, creationTimestamp: '2026-01-01T{hour:02}:{minute:02}:{second:02}Z'}}\nspec: {{clusterIP: {}, ports: [{{port: 80}}]}}\n---\nkind: EndpointSlice\nmetadata: {{name: many-{i}-a, labels: {{kubernetes.io/service-name: many-{i}}}}}\naddressType: IPv4\nports: [{{port: 8080}}]\nendpoints:\n",
            cluster_ip(i)
        )
        .unwrap();
        for e in 1..endpoints {
            writeln!(yaml, "- {{addresses: [10.245.{}.{e}]}}", i % 256).unwrap();
        }
        writeln!(yaml, "- {{addresses: [{}]}}\n---", pod_ip(2, 1)).unwrap();
    }
    yaml
}

fn cluster_ip(i: u32) -> String {
    format!("10.97.{}.{}", i / 250, i % 250 + 1)
}

fn pins(cluster: &Cluster) -> PathBuf {
    cluster.lab.bpf_root("node1").join(format!("v{LAYOUT_VERSION}"))
}

/// Entries that a map of node 1 has room for.
fn room(cluster: &Cluster, map: &str) -> u64 {
    let pin = pins(cluster).join(map);
    let shown = bpftool(&["-j", "map", "show", "pinned", &pin.display().to_string()]).unwrap();
    serde_json::from_str::<Value>(&shown).unwrap()["max_entries"].as_u64().unwrap()
}

/// Waits until node 1 serves the `i`-th of many Services.
fn wait_for(cluster: &Cluster, i: u32) {
    let target = format!("{}:80/TCP", cluster_ip(i));
    let serves = || cluster.agent(1, &["service", "list"]).unwrap().contains(&target);
    until(&target, patience(Duration::from_secs(60)), serves);
}

/// Connections that go on through all that happens, from outside, from a pod and from the node, and new ones all the time.
fn load(cluster: &Cluster) -> Vec<Load> {
    let ways = [("client", None, TARGET), ("pod12", None, TARGET), ("node1", Some(1), "10.96.0.10:80")];
    let clients = ["--connections", "50", "--udp", "10"];
    let loads = ways.map(|(from, served, target)| Load::start(cluster, (from, served), target, &clients));
    std::thread::sleep(Duration::from_secs(1));
    loads.into_iter().map(Result::unwrap).collect()
}

/// New connections from everywhere are served.
fn check_new(cluster: &Cluster) {
    let node_port = format!("{}:30080", node_ip(1));
    for (from, served, target) in [
        ("client", None, TARGET),
        ("client", None, &node_port as &str),
        ("client", None, "[2001:db8:ffff::10]:80"),
        ("pod12", None, "10.96.0.10:80"),
        ("pod12", Some(1), "10.96.0.10:80"),
        ("node1", Some(1), "10.96.0.10:80"),
    ] {
        for answer in cluster.ask(from, served, &["tcp", target, "--count", "10"]).unwrap() {
            assert!(answer.id.is_some(), "{from} to {target}: {answer:?}");
        }
    }
}

fn grow(options: &[&str], programs: impl Fn(&[String])) {
    let cluster = cluster(Cni::Bridge, options);
    let before = room(&cluster, "LB4_BACKENDS");
    assert!(before < 20_000, "{before}: as small as a small cluster needs");
    let loads = load(&cluster);
    cluster.apply("many.yaml", &many(5_000, 4)).unwrap();
    for i in [0, 2_500, 4_999] {
        wait_for(&cluster, i);
        // Most of its endpoints are nobody's: the real one is chosen sooner or later.
        let target = format!("{}:80", cluster_ip(i));
        let asks = ["tcp", &target, "--count", "20", "--timeout-ms", "200"];
        let answers = cluster.ask("pod12", Some(1), &asks).unwrap();
        assert!(answers.iter().any(|answer| answer.id.as_deref() == Some("pod21")), "{target}: {answers:?}");
    }
    check_new(&cluster);
    loads.into_iter().for_each(Load::stop_unharmed);
    for (map, least) in
        [("LB4_FRONTENDS", 5_000), ("LB4_VIPS", 5_000), ("LB4_BACKENDS", 20_000), ("SLOTS", 20_000)]
    {
        assert!(room(&cluster, map) >= least, "{map}: {}", room(&cluster, map));
    }
    let log = fs::read_to_string(cluster.agent_log(1)).unwrap();
    assert_eq!(log.matches("the maps have grown").count(), 1, "{log}");
    programs(&cluster.lab.tc_programs("node1", "eth0").unwrap());
    let pins = fs::read_dir(pins(&cluster)).unwrap();
    let names: Vec<String> =
        pins.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    assert!(!names.iter().any(|name| name.ends_with("_NEXT")), "{names:?}");
}

#[test]
fn maps_grow_while_they_serve() {
    grow(&[], |programs| assert_eq!(programs, ["tcx lb_netdev_in", "tcx lb_netdev_out"]));
}

#[test]
fn maps_grow_under_clsact_filters() {
    grow(&["--tc-mode", "clsact"], |programs| {
        assert!(programs.len() == 2 && programs.iter().all(|it| it.contains("clsact/")), "{programs:?}");
    });
}

/// An agent with room for more finds maps that are too small for the cluster, lets them grow and is killed on the way.
#[test]
fn an_agent_that_is_killed_while_maps_grow_leaves_a_node_that_serves() {
    let mut cluster = cluster(Cni::Bridge, &["--map-entries-max", "128"]);
    cluster.apply("many.yaml", &many(900, 1)).unwrap();
    wait_for(&cluster, 10);
    let loads = load(&cluster);
    let next = pins(&cluster).join("LB4_FRONTENDS_NEXT");
    let mut left_behind = 0;
    for round in 1..=3u32 {
        let entries = 128u32 << round;
        cluster.agent_options = vec!["--map-entries-max".into(), entries.to_string()];
        // From the first moment on, while the programs are being loaded, to when they are put in; the last may finish.
        for delay in [0, 150, 300, 450, 600] {
            cluster.stop_agent(1, libc::SIGKILL).unwrap();
            left_behind += u32::from(next.exists());
            cluster.launch_agent(1).unwrap();
            until("the maps are growing, or have grown", patience(Duration::from_secs(30)), || {
                next.exists() || room(&cluster, "LB4_FRONTENDS") == u64::from(entries)
            });
            std::thread::sleep(Duration::from_millis(delay));
        }
        cluster.wait_until_healthy(1).unwrap();
        assert_eq!(room(&cluster, "LB4_FRONTENDS"), u64::from(entries));
        check_new(&cluster);
    }
    wait_for(&cluster, 899);
    assert!(left_behind >= 3, "only {left_behind} agents were killed on the way");
    assert!(!next.exists());
    loads.into_iter().for_each(Load::stop_unharmed);
}

#[test]
fn where_maps_may_not_grow_the_newest_services_wait() {
    let cluster = cluster(Cni::Bridge, &["--map-entries-max", "256"]);
    let refused = || -> u64 {
        let page =
            cluster.lab.command("node1", "curl").args(["-s", "http://127.0.0.1:10249/metrics"]).output();
        let page = String::from_utf8(page.unwrap().stdout).unwrap();
        let line = page.lines().find_map(|line| line.strip_prefix("lb_refused_service_ports "));
        line.unwrap().parse().unwrap()
    };
    let serves =
        |i| cluster.agent(1, &["service", "list"]).unwrap().contains(&format!("{}:80/TCP", cluster_ip(i)));
    assert_eq!(refused(), 0);
    cluster.apply("many.yaml", &many(300, 1)).unwrap();
    until("the newest are refused", patience(Duration::from_secs(30)), || refused() > 0);
    let served: Vec<u32> = (0..300).filter(|i| serves(*i)).collect();
    let oldest = u64::try_from(served.len()).unwrap();
    assert_eq!(served, (0..served.len() as u32).collect::<Vec<_>>(), "the oldest are served");
    assert_eq!(refused(), 300 - oldest);
    assert!((50..256).contains(&oldest), "{oldest} are served");
    check_new(&cluster);
    let log = fs::read_to_string(cluster.agent_log(1)).unwrap();
    let said = log.lines().find(|line| line.contains("not served")).unwrap();
    assert!(said.contains("many-") && said.contains("--map-entries-max"), "{said}");

    // Room for all of them as soon as others go.
    cluster.apply("many.yaml", &many(100, 1)).unwrap();
    until("all are served", patience(Duration::from_secs(30)), || refused() == 0 && serves(99));
}
