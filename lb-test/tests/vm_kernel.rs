//! What another kernel may refuse: every program loads, and packets find their way by the hook that the kernel has.

use std::{path::Path, process::Command, time::Duration};

use lb_test::{
    cluster::{Cluster, Cni, node_ip, pod_ip, program},
    in_vm, netns, until,
};

/// Here it is a module. The first test of a boot, by its name.
#[test]
fn conntrack_is_set_up_when_rules_have_loaded_it() {
    if !in_vm("conntrack_is_set_up_when_rules_have_loaded_it") {
        return;
    }
    let sysctl = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";
    assert!(!Path::new(sysctl).exists(), "conntrack is loaded already");
    let mut cluster = Cluster::new(Cni::Routed, 1).unwrap();
    cluster.apply_nodes().unwrap();
    cluster.configure("mode: nftables\nconntrack: {tcpCloseWaitTimeout: 77s}").unwrap();
    cluster.agent_options = vec!["--config".into(), cluster.config_file().display().to_string()];
    cluster.start_agents(&[1]).unwrap();
    let value = || netns::output(cluster.lab.command("node1", "cat").arg(sysctl)).unwrap_or_default();
    until("conntrack is set up", Duration::from_secs(10), || value().trim() == "77");
}

#[test]
fn every_program_loads() {
    if !in_vm("every_program_loads") {
        return;
    }
    // What the verifier needed is worth a look whenever a kernel is new.
    println!("{}", netns::output(&mut Command::new(program("verify"))).unwrap());
}

#[test]
fn packets_take_the_hook_that_the_kernel_has() {
    if !in_vm("packets_take_the_hook_that_the_kernel_has") {
        return;
    }
    let mut cluster = Cluster::new(Cni::Bridge, 1).unwrap();
    cluster.serve("pod21", 8080).unwrap();
    cluster.apply_nodes().unwrap();
    cluster.apply("services.yaml", &service()).unwrap();
    cluster.start_agents(&[1, 2]).unwrap();
    // From a socket, from a veth, from outside.
    for (from, served, target) in [
        ("pod11", Some(1), "10.96.0.10:80".to_owned()),
        ("pod11", None, "10.96.0.10:80".to_owned()),
        ("client", None, format!("{}:80", node_ip(1))),
    ] {
        let answer = cluster.tcp(from, served, &target).unwrap();
        assert_eq!(answer.id.as_deref(), Some("pod21"), "{from} {served:?} to {target}: {answer:?}");
    }
    let programs = cluster.lab.tc_programs("node1", "eth0").unwrap();
    if has_tcx() {
        assert_eq!(programs, ["tcx lb_netdev_in", "tcx lb_netdev_out"]);
    } else {
        assert_eq!(programs.len(), 2, "{programs:?}");
        assert!(programs.iter().all(|program| program.contains("clsact/")), "{programs:?}");
    }
}

/// TCX came with Linux 6.6.
fn has_tcx() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let mut number = || numbers.next().unwrap().unwrap();
    (number(), number()) >= (6, 6)
}

/// A service on the other node's pod, and a node's own address as its external IP.
fn service() -> String {
    format!(
        "kind: Service\nmetadata: {{name: web}}\nspec: {{clusterIP: 10.96.0.10, externalIPs: [{}], ports: [{{port: 80, targetPort: 8080}}]}}\n---\nkind: EndpointSlice\nmetadata: {{name: web-1, labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nports: [{{port: 8080, protocol: TCP}}]\nendpoints: [{{addresses: [{}], nodeName: node2, conditions: {{ready: true}}}}]\n",
        node_ip(1),
        pod_ip(2, 1)
    )
}
