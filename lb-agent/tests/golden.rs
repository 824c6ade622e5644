//! Folders of manifests and the tables they become on node1. `UPDATE_EXPECT=1 cargo test -p lb-agent --test golden`
//! writes the tables anew: read the difference before it is committed.

mod common;

use std::path::PathBuf;

use expect_test::expect_file;
use lb_agent::source::manifests::Manifests;

/// A folder of its own with the nodes beside the case's files.
fn folder(case: &str, purpose: &str) -> PathBuf {
    let dir = common::folder(&format!("{case}-{purpose}"));
    for entry in std::fs::read_dir(common::golden().join(case)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    dir
}

fn table(case: &str) -> String {
    let dir = folder(case, "table");
    let (events, of_files) = Manifests::new(dir.clone()).scan().unwrap();
    let mut compiler = common::compiler();
    events.into_iter().for_each(|event| compiler.apply(event));
    compiler.compile();
    let text = common::table(&compiler, of_files.iter().flat_map(|(_, warnings)| warnings));
    text.replace(&format!("{}/", dir.display()), "")
}

fn iptables(case: &str, options: &[&str]) -> String {
    render("iptables", case, options)
}

fn render(mode: &str, case: &str, options: &[&str]) -> String {
    common::render(mode, &folder(case, &format!("{mode}{}", options.concat())), options)
}

/// The rules that kube-proxy's own test expects; the expectation was compared with its text line by line.
#[test]
fn iptables_of_kube_proxys_own_test() {
    let rules = iptables("kube-proxy", &["--cluster-cidr", "10.0.0.0/8"]);
    expect_file!["golden/kube-proxy/iptables.txt"].assert_eq(&rules);
}

/// Forty-two shapes of Services. The rules follow kube-proxy 1.36 `pkg/proxy/iptables/proxier.go` `syncProxyRules`.
#[test]
fn iptables_of_every_shape() {
    expect_file!["golden/shapes/iptables.txt"]
        .assert_eq(&iptables("shapes", &["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"]));
}

#[test]
fn iptables_of_the_story_as_kube_proxy_1_20_wrote_them() {
    expect_file!["golden/story/iptables-1.20.txt"]
        .assert_eq(&iptables("story", &["--legacy-external-ip", "1.20"]));
}

/// The tables that kube-proxy's own test expects (`pkg/proxy/nftables/proxier_test.go` TestOverallNFTablesRules) for
/// the cluster of its iptables test: names, chains and elements are its own, but for affinity's timeout.
#[test]
fn nftables_of_kube_proxys_own_test() {
    let rules = render("nftables", "kube-proxy", &["--cluster-cidr", "10.0.0.0/8"]);
    expect_file!["golden/kube-proxy/nftables.txt"].assert_eq(&rules);
}

#[test]
fn nftables_of_every_shape() {
    let rules = render("nftables", "shapes", &["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"]);
    expect_file!["golden/shapes/nftables.txt"].assert_eq(&rules);
}

/// The BPF programs leave SCTP out by name; rules have it.
#[test]
fn sctp() {
    expect_file!["golden/sctp/table.txt"].assert_eq(&table("sctp"));
    expect_file!["golden/sctp/iptables.txt"].assert_eq(&iptables("sctp", &[]));
    expect_file!["golden/sctp/nftables.txt"].assert_eq(&render("nftables", "sctp", &[]));
}

#[test]
fn ranges_of_cluster_ips() {
    expect_file!["golden/service-cidrs/table.txt"].assert_eq(&table("service-cidrs"));
    let rules = render("nftables", "service-cidrs", &[]);
    let check: Vec<&str> = rules.lines().filter(|line| line.contains("cluster-ips-check ")).collect();
    expect_file!["golden/service-cidrs/cluster-ips-check.txt"].assert_eq(&(check.join("\n") + "\n"));
}

/// The sets, rules and virtual servers follow kube-proxy 1.36 `pkg/proxy/ipvs/proxier.go`, but for addresses of nodes,
/// which are not bound.
#[test]
fn ipvs_of_every_shape() {
    let rules = render("ipvs", "shapes", &["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"]);
    expect_file!["golden/shapes/ipvs.txt"].assert_eq(&rules);
}

#[test]
fn ipvs_of_the_story_binds_no_nodes_address() {
    let rules = render("ipvs", "story", &[]);
    expect_file!["golden/story/ipvs.txt"].assert_eq(&rules);
    assert!(!rules.contains("addr add 192.0.2."), "{rules}");
}

#[test]
fn the_story() {
    expect_file!["golden/story/table.txt"].assert_eq(&table("story"));
}

#[test]
fn every_type() {
    expect_file!["golden/every-type/table.txt"].assert_eq(&table("every-type"));
}

#[test]
fn policies() {
    expect_file!["golden/policies/table.txt"].assert_eq(&table("policies"));
}

#[test]
fn odd_objects() {
    expect_file!["golden/odd-objects/table.txt"].assert_eq(&table("odd-objects"));
}

/// All traffic to ClusterIPs is masqueraded, whatever the policy.
#[test]
fn masquerade_all() {
    for mode in ["ebpf", "iptables", "nftables", "ipvs"] {
        let options = ["--masquerade-all", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];
        let rules = render(mode, "policies", &options);
        expect_file![format!("golden/policies/masquerade-all-{mode}.txt")].assert_eq(&rules);
    }
}
