//! The outage that this project starts from, on a kernel that has IPVS.

use lb_test::{
    cluster::{Answer, Cluster, Cni, node_ip, pod_ip},
    in_vm, netns,
};

/// kube-proxy's IPVS mode binds every external IP to a dummy device. If it is another node's address, each takes
/// itself for the other.
#[test]
fn ipvs_outage() {
    if !in_vm("ipvs_outage") {
        return;
    }
    let cluster = cluster();
    reaches_each_other(&cluster);

    as_kube_proxy_binds_it(&cluster);
    // The service itself is balanced: nobody notices by asking for it.
    assert_eq!(ask(&cluster, "node1", &node_ip(2), 80).id.as_deref(), Some("pod11"));
    // Every other port of node 2 is now node 1's own.
    assert_eq!(ask(&cluster, "node1", &node_ip(2), 9000).id.as_deref(), Some("node1"));
    assert_eq!(ask(&cluster, "pod12", &node_ip(2), 9000).id.as_deref(), Some("node1"));
    assert_eq!(ask(&cluster, "node1", &node_ip(2), 9001).error.as_deref(), Some("refused"));
    // And what node 2 sends is dropped: its source is a local address here, a martian.
    assert_eq!(ask(&cluster, "node2", &node_ip(1), 9000).error.as_deref(), Some("timeout"));

    let bound = format!("addr del {}/32 dev kube-ipvs0", node_ip(2));
    cluster.lab.ip("node1", &bound).unwrap();
    reaches_each_other(&cluster);
}

/// Two nodes with a server each, and a pod that serves.
fn cluster() -> Cluster {
    let mut cluster = Cluster::new(Cni::Routed, 2).unwrap();
    cluster.serve("pod11", 8080).unwrap();
    cluster.serve("node1", 9000).unwrap();
    cluster.serve("node2", 9000).unwrap();
    // Only node 2 has this one: who else refuses it was asked in its place.
    cluster.serve("node2", 9001).unwrap();
    cluster
}

/// What kube-proxy 1.20 sets up for a service with `externalIPs: [<node 2's address>]`, on node 1.
fn as_kube_proxy_binds_it(cluster: &Cluster) {
    let on_node1 = |words: &str| {
        let mut words = words.split_whitespace();
        let program = words.next().unwrap();
        netns::run(cluster.lab.command("node1", program).args(words)).unwrap();
    };
    netns::run(std::process::Command::new("modprobe").args(["-a", "dummy", "ip_vs", "ip_vs_rr", "xt_set"]))
        .unwrap();
    let (bound, pod) = (node_ip(2), pod_ip(1, 1));
    for (name, value) in [("vs.conntrack", "1"), ("conf.all.arp_ignore", "1"), ("conf.all.arp_announce", "2")]
    {
        cluster.lab.sysctl("node1", &format!("net.ipv4.{name}"), value).unwrap();
    }
    for words in [
        "ip link add kube-ipvs0 type dummy",
        &format!("ip addr add {bound}/32 dev kube-ipvs0"),
        "ipset create KUBE-EXTERNAL-IP hash:ip,port",
        &format!("ipset add KUBE-EXTERNAL-IP {bound},tcp:80"),
        "iptables -t nat -N KUBE-MARK-MASQ",
        "iptables -t nat -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
        "iptables -t nat -A PREROUTING -m set --match-set KUBE-EXTERNAL-IP dst,dst -j KUBE-MARK-MASQ",
        "iptables -t nat -A OUTPUT -m set --match-set KUBE-EXTERNAL-IP dst,dst -j KUBE-MARK-MASQ",
        "iptables -t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE",
        &format!("ipvsadm -A -t {bound}:80 -s rr"),
        &format!("ipvsadm -a -t {bound}:80 -r {pod}:8080 -m"),
    ] {
        on_node1(words);
    }
}

fn reaches_each_other(cluster: &Cluster) {
    assert_eq!(ask(cluster, "node1", &node_ip(2), 9000).id.as_deref(), Some("node2"));
    assert_eq!(ask(cluster, "node1", &node_ip(2), 9001).id.as_deref(), Some("node2"));
    assert_eq!(ask(cluster, "node2", &node_ip(1), 9000).id.as_deref(), Some("node1"));
    assert_eq!(ask(cluster, "pod12", &node_ip(2), 9000).id.as_deref(), Some("node2"));
}

fn ask(cluster: &Cluster, from: &str, addr: &str, port: u16) -> Answer {
    cluster.tcp(from, None, &format!("{addr}:{port}")).unwrap()
}
