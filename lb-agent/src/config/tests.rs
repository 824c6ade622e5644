//! Whole files, and what they mean.

use std::time::Duration;

use lb_core::model::{LocalDetector, NodePortAddress};

use super::*;
use crate::{
    args::{Mode, ModeChoice},
    config::{
        conntrack::{MAX_CONNECTIONS, Sysctl},
        settings::DetectLocal,
    },
};

const KUBEADM: &str = include_str!("../../tests/config/kubeadm.yaml");

fn file(fields: &str) -> File {
    File::parse(&format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{fields}\n")).expect("a file")
}

fn meaning(fields: &str) -> Settings {
    settings(&file(fields).configuration).expect("a configuration")
}

fn refusal(fields: &str) -> String {
    let text = format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{fields}\n");
    let read = File::parse(&text).and_then(|file| settings(&file.configuration));
    format!("{:#}", read.expect_err("a refusal"))
}

/// Where /healthz and /metrics are served.
fn pages(settings: &Settings) -> [String; 2] {
    [settings.healthz, settings.metrics].map(|at| at.map_or("nowhere".into(), |at| at.to_string()))
}

#[test]
fn kubeadms_file_is_used_as_it_is() {
    let file = File::parse(KUBEADM).expect("a file");
    assert_eq!(file.without_effect(), (Vec::new(), Vec::new()));
    let settings = settings(&file.configuration).expect("a configuration");
    assert_eq!(settings.mode, ModeChoice::Auto);
    assert_eq!(pages(&settings), ["0.0.0.0:10256", "127.0.0.1:10249"]);
    assert_eq!(settings.kubeconfig.as_deref(), Some(Path::new("/var/lib/kube-proxy/kubeconfig.conf")));
    let pods = LocalDetector::Ranges(vec!["10.244.0.0/16".parse().expect("a range")]);
    assert_eq!(settings.detect_local, DetectLocal::By(pods));
    assert_eq!((settings.oom_score_adj, settings.node_name.as_deref()), (-999, None));
    let timeouts: Vec<_> =
        settings.conntrack.iter().filter(|sysctl| sysctl.name != MAX_CONNECTIONS).collect();
    let established = Sysctl::exactly("nf_conntrack_tcp_timeout_established", 86_400);
    let close_wait = Sysctl::exactly("nf_conntrack_tcp_timeout_close_wait", 3600);
    assert_eq!(timeouts, [&established, &close_wait]);
    let raised_only = settings.conntrack.iter().find(|sysctl| sysctl.name == MAX_CONNECTIONS);
    assert!(raised_only.is_some_and(|sysctl| sysctl.at_least && sysctl.value >= 131_072), "{raised_only:?}");
    for mode in [Mode::Ebpf, Mode::Iptables, Mode::Ipvs, Mode::Nftables] {
        assert_eq!(settings.min_sync_period(mode), Duration::from_millis(5));
        assert_eq!(settings.sync_period(mode), Duration::from_secs(30));
        let primary = settings.compile(mode).node_port_addresses == [NodePortAddress::Primary];
        assert_eq!(primary, mode == Mode::Nftables, "{}", mode.name());
    }
}

#[test]
fn external_ips_have_a_feature_gate() {
    for (fields, served, without_effect) in [
        ("mode: ebpf", true, &[][..]),
        ("featureGates: {AllowServiceExternalIPs: true}", true, &[]),
        ("featureGates: {AllowServiceExternalIPs: false, SomeGate: true}", false, &["featureGates.SomeGate"]),
    ] {
        assert_eq!(meaning(fields).compile(Mode::Ebpf).external_ips, served, "{fields}");
        assert_eq!(file(fields).without_effect().0, without_effect, "{fields}");
    }
}

#[test]
fn each_field_means_what_it_means_to_kube_proxy() {
    let settings = meaning(
        "mode: ipvs\nlb: {mode: ebpf, minSyncPeriod: 20ms}\nbindAddress: 2001:db8::1\nhostnameOverride: ' Node-1 '\n\
         metricsBindAddress: '[::]'\nhealthzBindAddress: 10.0.0.1:99\n\
         iptables: {masqueradeAll: true, masqueradeBit: 3, minSyncPeriod: 1s}\nnftables: {syncPeriod: 1m0.5s}\n\
         conntrack: {tcpEstablishedTimeout: 0s, udpTimeout: 30s, tcpBeLiberal: true, maxPerCore: 1, min: 77}\n\
         nodePortAddresses: [localhost, 192.0.2.0/24]\ndetectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}",
    );
    assert_eq!(settings.mode, ModeChoice::Fixed(Mode::Ebpf));
    assert_eq!(settings.node_name.as_deref(), Some("node-1"));
    assert_eq!(pages(&settings), ["10.0.0.1:99", "[::]:10249"]);
    assert_eq!(settings.min_sync_period(Mode::Iptables), Duration::from_secs(1));
    assert_eq!(settings.min_sync_period(Mode::Ebpf), Duration::from_millis(20));
    assert_eq!(settings.sync_period(Mode::Nftables), Duration::from_millis(60_500));
    let (iptables, nftables) = (settings.rules(Mode::Iptables), settings.rules(Mode::Nftables));
    assert_eq!((iptables.masquerade_mark, iptables.masquerade_all, iptables.drop_invalid), (8, true, false));
    assert_eq!((nftables.masquerade_mark, nftables.masquerade_all), (1 << 14, false));
    assert_eq!(iptables.pods, LocalDetector::Bridge("cni0".into()));
    assert_eq!(settings.compile(Mode::Ebpf).node_port_addresses.len(), 3);
    assert_eq!(settings.compile(Mode::Ebpf).node_ip, "2001:db8::1".parse().ok());
    let of = |name: &str| {
        let exactly = settings.conntrack.iter().find(|sysctl| sysctl.name == name && !sysctl.at_least);
        exactly.map(|sysctl| sysctl.value)
    };
    assert_eq!(of("nf_conntrack_tcp_timeout_established"), None);
    assert_eq!((of("nf_conntrack_udp_timeout"), of("nf_conntrack_tcp_be_liberal")), (Some(30), Some(1)));
    assert_eq!(of(MAX_CONNECTIONS), Some(77));
    let by_node = meaning("detectLocalMode: NodeCIDR");
    let cidrs = ["10.244.1.0/24".parse().expect("a range")];
    assert_eq!(by_node.rules_of(Mode::Nftables, &cidrs).pods, LocalDetector::Ranges(cidrs.to_vec()));
    let v6 = meaning("bindAddress: '::'");
    assert_eq!(pages(&v6), ["[::]:10256", "[::1]:10249"]);
}

#[test]
fn all_that_is_wrong_is_named_at_once() {
    for (fields, says) in [
        ("mode: kernelspace", "mode: \"kernelspace\" is not auto, ebpf, nftables, iptables or ipvs"),
        (
            "mode: ipvs\nipvs: {scheduler: best}\noomScoreAdj: 2000",
            "ipvs.scheduler: \"best\" is not a scheduler of IPVS: rr, wrr, lc, wlc, lblc, lblcr, sh, dh, mh, sed, nq; oomScoreAdj: 2000 is not within -1000 and 1000",
        ),
        ("clusterCIDR: 10.0.0.0/8,11.0.0.0/8", "clusterCIDR: has more than one range of a family"),
        ("nodePortAddresses: [eth0]", "nodePortAddresses: \"eth0\" is not a CIDR, primary, localhost or all"),
        (
            "detectLocalMode: BridgeInterface",
            "detectLocal.bridgeInterface: \"\" is not the name of a device, which detectLocalMode asks for",
        ),
        (
            "iptables: {syncPeriod: 1s, minSyncPeriod: 2s}",
            "iptables.minSyncPeriod: must not be longer than syncPeriod",
        ),
        ("iptables: {masqueradeBit: 32}", "iptables.masqueradeBit: 32 is not within 0 and 31"),
        (
            "mode: nftables\nnftables: {syncPeriod: 1s, minSyncPeriod: 2s}",
            "nftables.minSyncPeriod: must not be longer than syncPeriod",
        ),
        ("conntrack: {tcpCloseWaitTimeout: -1s}", "conntrack.tcpCloseWaitTimeout: must not be negative"),
        (
            "conntrack: {udpTimeout: 10}",
            "conntrack.udpTimeout: invalid type: integer `10`, expected a string in Go",
        ),
        ("lb: {flowMax: 1}", "lb.flowMax: no such field; `lb-agent config check --all` lists all"),
    ] {
        assert!(
            refusal(fields).starts_with(says),
            "{fields}\n  said:   {}\n  wanted: {says}",
            refusal(fields)
        );
    }
    let other = File::parse("apiVersion: v1\nkind: ConfigMap\n").expect_err("another kind");
    assert!(other.to_string().contains("\"ConfigMap\""), "{other}");
}

#[test]
fn modes_that_are_not_asked_for_may_be_wrong() {
    let wrong = "ipvs: {scheduler: best, udpTimeout: -1s}\nnftables: {masqueradeBit: 32, syncPeriod: 1s, minSyncPeriod: 2s}";
    let of_ipvs =
        ["ipvs.scheduler: \"best\" is not a scheduler", "ipvs.udpTimeout: must not be negative"].as_slice();
    let of_nftables =
        ["nftables.masqueradeBit: 32 is not within 0 and 31", "nftables.minSyncPeriod: must not be"]
            .as_slice();
    for (mode, warned, refused) in [
        ("", [of_ipvs, of_nftables].concat(), &[][..]),
        ("mode: ebpf", [of_ipvs, of_nftables].concat(), &[]),
        ("mode: iptables", [of_ipvs, of_nftables].concat(), &[]),
        ("mode: nftables", Vec::new(), of_nftables),
        ("mode: ipvs", Vec::new(), of_ipvs),
    ] {
        let said = match Settings::of(&file(&format!("{mode}\n{wrong}")).configuration) {
            Ok(settings) => {
                // Its defaults hold.
                assert_eq!(settings.rules(Mode::Nftables).masquerade_mark, 1 << 14);
                assert_eq!(settings.min_sync_period(Mode::Nftables), Duration::from_millis(5));
                assert_eq!((settings.ipvs.scheduler.name(), settings.ipvs.timeouts.udp), ("rr", 0));
                assert!(refused.is_empty(), "{mode}");
                settings.not_looked_at
            }
            Err(problems) => {
                assert!(!refused.is_empty(), "{mode}: {problems:?}");
                problems
            }
        };
        let wanted = if refused.is_empty() { warned } else { refused.to_vec() };
        let said: Vec<String> = said.iter().map(ToString::to_string).collect();
        let fits = said.iter().zip(&wanted).all(|(said, wanted)| said.starts_with(wanted));
        assert!(said.len() == wanted.len() && fits, "{mode}: {said:?}");
    }
}

#[test]
fn all_that_is_in_force_is_shown() {
    let shown = |fields: &str, mode: Mode| {
        let given = file(fields).configuration;
        in_force::in_force(&given, &settings(&given).expect("a configuration"), mode, "node-1")
    };
    let by_default = shown("mode: ''", Mode::Nftables);
    for (path, value) in [
        ("mode", serde_json::json!("nftables")),
        ("hostnameOverride", "node-1".into()),
        ("bindAddress", "0.0.0.0".into()),
        ("healthzBindAddress", "0.0.0.0:10256".into()),
        ("metricsBindAddress", "127.0.0.1:10249".into()),
        ("nodePortAddresses", serde_json::json!(["primary"])),
        ("oomScoreAdj", (-999).into()),
        ("iptables.masqueradeBit", 14.into()),
        ("iptables.localhostNodePorts", true.into()),
        ("ipvs.scheduler", "rr".into()),
        ("nftables.syncPeriod", "30s".into()),
        ("nftables.minSyncPeriod", "5ms".into()),
        ("conntrack.maxPerCore", 32_768.into()),
        ("conntrack.tcpCloseWaitTimeout", "3600s".into()),
        ("featureGates.AllowServiceExternalIPs", true.into()),
        ("logging.format", "text".into()),
        ("lb.onBackendGone", "keep".into()),
    ] {
        let pointer = format!("/{}", path.replace('.', "/"));
        assert_eq!(by_default.pointer(&pointer), Some(&value), "{path}: {by_default:#}");
    }
    assert!(!by_default.to_string().contains("null"), "{by_default}");
    // What is given stays, and can be read again for the same.
    let given = "mode: ipvs\nipvs: {scheduler: mh, tcpTimeout: 90s}\nnftables: {masqueradeBit: 3}\n\
                 conntrack: {min: 1}\nhealthzBindAddress: '::1'\nlogging: {verbosity: 4}";
    let once = shown(given, Mode::Ipvs);
    let text = format!(
        "apiVersion: {API_VERSION}\nkind: {KIND}\n{}",
        serde_yaml_ng::to_string(&once).expect("YAML")
    );
    let read = File::parse(&text).expect("a file").configuration;
    assert_eq!((read.ipvs.scheduler.as_deref(), read.nftables.masquerade_bit), (Some("mh"), Some(3)));
    assert_eq!(read.healthz_bind_address.as_deref(), Some("[::1]:10256"));
    assert_eq!(
        once,
        in_force::in_force(&read, &settings(&read).expect("a configuration"), Mode::Ipvs, "node-1")
    );
}

#[test]
fn what_has_no_effect_is_named() {
    let file = file(
        "portRange: 1-2\nudpIdleTimeout: 250ms\nresourceContainer: ''\nbindAddressHardFail: true\nmode: ipvs",
    );
    let (nothing, unknown) = file.without_effect();
    assert_eq!(nothing, ["portRange", "bindAddressHardFail"]);
    assert_eq!(unknown, ["udpIdleTimeout"]);
}

#[test]
fn changes_are_named() {
    let (before, after) =
        (file("mode: ipvs\nipvs: {scheduler: rr}"), file("mode: iptables\nclusterCIDR: 10.0.0.0/8"));
    assert_eq!(before.differences(&after), ["mode", "clusterCIDR", "ipvs.scheduler"]);
    assert!(before.differences(&before).is_empty());
}

#[test]
fn what_is_written_is_read_again() {
    let path = std::env::temp_dir().join(format!("lb-config-{}", std::process::id()));
    let kubeadm = File::parse(KUBEADM).expect("a file").configuration;
    write(&kubeadm, &path).expect("written");
    let read = File::read(&path).expect("read again").configuration;
    fs::remove_file(&path).expect("removed");
    assert_eq!(read, kubeadm);
}
