//! The command line, and what it means together with a configuration file.

use std::{ffi::OsString, path::Path};

use clap::CommandFactory;

use super::*;
use crate::config::{
    File,
    conntrack::{MAX_CONNECTIONS, Sysctl},
};

#[test]
fn the_command_line_is_consistent() {
    Args::command().debug_assert();
}

#[test]
fn packets_are_traced_in_bpf_programs_only() {
    for (mode, works) in [("ebpf", true), ("nftables", false), ("iptables", false), ("ipvs", false)] {
        let typed = ["lb-agent", "run", "--node-name", "n", "--trace-packets", "any", "--mode", mode];
        let Command::Run(options) = Args::parse_from(typed).command else { panic!("run was typed") };
        assert_eq!(options.resolve(&File::default(), Path::new("/sys/fs/bpf/lb")).is_ok(), works, "{mode}");
    }
}

#[test]
fn a_dry_run_has_ports_of_its_own() {
    for (more, ports) in [
        (&[][..], [10256, 10249]),
        (&["--dry-run"], [10356, 10349]),
        (&["--dry-run", "--metrics-bind-address", "127.0.0.1:1"], [10356, 1]),
    ] {
        let typed = ["lb-agent", "run", "--node-name", "n", "--mode", "ebpf"];
        let Command::Run(options) = Args::parse_from(typed.iter().chain(more)).command else {
            panic!("run was typed")
        };
        let config = options.resolve(&File::default(), Path::new("/sys/fs/bpf/lb")).unwrap();
        let pages = [config.settings.healthz, config.settings.metrics];
        assert_eq!(pages.map(|at| at.map_or(0, |at| at.port())), ports, "{more:?}");
    }
}

#[test]
fn cgroup2_is_found_beside_v1() {
    let mountinfo = "30 1 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
    assert_eq!(cgroup2_mount(mountinfo), Some(PathBuf::from("/sys/fs/cgroup/unified")));
    assert_eq!(cgroup2_mount(""), None);
}

fn run(typed: &[&str]) -> RunArgs {
    match Args::parse_from(command_line(typed.iter().map(OsString::from))).command {
        Command::Run(options) => *options,
        other => panic!("run was typed, not {other:?}"),
    }
}

#[test]
fn kube_proxys_command_line_is_understood() {
    let options = run(&[
        "/usr/local/bin/kube-proxy",
        "--hostname-override=node-1",
        "--proxy-mode=iptables",
        "--cluster-cidr=10.244.0.0/16,fd00:10:244::/48",
        "--masquerade-all=false",
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=2h22m",
        "--nodeport-addresses=primary,10.0.0.0/8",
        "--feature-gates=A=true,AllowServiceExternalIPs=false",
        "--profiling",
        "-v=5",
        "--master=https://192.0.2.1:6443",
    ]);
    assert_eq!(options.without_meaning(), ["--profiling"]);
    let config = options.resolve(&File::default(), Path::new("/sys/fs/bpf/lb")).unwrap();
    assert_eq!((config.mode, &*config.node_name), (Mode::Iptables, "node-1"));
    assert_eq!((config.compile.node_port_addresses.len(), config.compile.external_ips), (2, false));
    // Whoever called it that has no use for what kube-proxy left, unless they say so.
    assert!(
        config.replace_kube_proxy
            && !run(&["lb-agent", "run"])
                .configuration(&File::default())
                .lb
                .replace_kube_proxy
                .unwrap_or(false)
    );
    let kept = run(&["kube-proxy", "--replace-kube-proxy=false"]);
    assert_eq!(kept.configuration(&File::default()).lb.replace_kube_proxy, Some(false));
    assert!(
        config.settings.conntrack.contains(&Sysctl::exactly("nf_conntrack_tcp_timeout_established", 8520))
    );
    assert!(config.settings.conntrack.iter().all(|sysctl| sysctl.name != MAX_CONNECTIONS));
    // A subcommand of ours still works under that name.
    let words = ["kube-proxy", "probe"].map(OsString::from);
    assert_eq!(command_line(words.clone().into_iter()), words);
}

#[test]
fn options_go_before_the_file() {
    let file = File::parse(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs\nhostnameOverride: a\niptables: {masqueradeAll: true}\nlb: {flowsMax: 4096, podDevices: []}\n",
    )
    .unwrap();
    let resolve = |typed: &[&str]| {
        let typed = [&["lb-agent", "run"], typed].concat();
        run(&typed).resolve(&file, Path::new("/sys/fs/bpf/lb")).unwrap()
    };
    let config = resolve(&[]);
    assert_eq!((config.mode, &*config.node_name, config.compile.masquerade_all), (Mode::Ipvs, "a", true));
    assert_eq!((config.settings.flows_max, config.settings.devices.pods), (Some(4096), Some(Vec::new())));
    let config =
        resolve(&["--mode", "ebpf", "--node-name", "b", "--masquerade-all=false", "--pod-devices", "auto"]);
    assert_eq!((config.mode, &*config.node_name, config.compile.masquerade_all), (Mode::Ebpf, "b", false));
    assert_eq!((config.settings.flows_max, config.settings.devices.pods), (Some(4096), None));
}

/// Every option that kube-proxy 1.36 has on Linux (`cmd/kube-proxy/app/options.go`, `component-base/logs/api/v1`,
/// `component-base/version/verflag`), with a value.
const KUBE_PROXYS: [&str; 58] = [
    "--bind-address=192.0.2.1",
    "--bind-address-hard-fail=true",
    "--cleanup=false",
    "--cluster-cidr=10.244.0.0/16",
    "--config=/etc/kube-proxy.yaml",
    "--config-sync-period=15m0s",
    "--conntrack-max-per-core=32768",
    "--conntrack-min=131072",
    "--conntrack-tcp-be-liberal=false",
    "--conntrack-tcp-timeout-close-wait=1h0m0s",
    "--conntrack-tcp-timeout-established=24h0m0s",
    "--conntrack-udp-timeout=0s",
    "--conntrack-udp-timeout-stream=0s",
    "--detect-local-mode=ClusterCIDR",
    "--feature-gates=TopologyAwareHints=true",
    "--healthz-bind-address=0.0.0.0:10256",
    "--healthz-port=10256",
    "--hostname-override=node-1",
    "--init-only=false",
    "--iptables-localhost-nodeports=true",
    "--iptables-masquerade-bit=14",
    "--iptables-min-sync-period=1s",
    "--iptables-sync-period=30s",
    "--ipvs-exclude-cidrs=198.51.100.0/24",
    "--ipvs-min-sync-period=0s",
    "--ipvs-scheduler=rr",
    "--ipvs-strict-arp=false",
    "--ipvs-sync-period=30s",
    "--ipvs-tcp-timeout=0s",
    "--ipvs-tcpfin-timeout=0s",
    "--ipvs-udp-timeout=0s",
    "--kube-api-burst=10",
    "--kube-api-content-type=application/vnd.kubernetes.protobuf",
    "--kube-api-qps=5",
    "--kubeconfig=/etc/kubeconfig",
    "--log-flush-frequency=5s",
    "--log-json-info-buffer-size=0",
    "--log-json-split-stream=false",
    "--log-text-info-buffer-size=0",
    "--log-text-split-stream=false",
    "--logging-format=text",
    "--masquerade-all=false",
    "--master=https://192.0.2.1:6443",
    "--metrics-bind-address=127.0.0.1:10249",
    "--metrics-port=10249",
    "--nodeport-addresses=192.0.2.0/24",
    "--oom-score-adj=-999",
    "--pod-bridge-interface=cni0",
    "--pod-interface-name-prefix=veth",
    "--profiling=false",
    "--proxy-mode=iptables",
    "--show-hidden-metrics-for-version=1.35",
    "--v=2",
    "-v=2",
    "--version=false",
    "--vmodule=proxier=5",
    "--write-config-to=/tmp/config.yaml",
    // Twice: the last one counts.
    "--v=4",
];

#[test]
fn every_option_of_kube_proxy_is_taken() {
    let parsed = |words: &[&str]| Args::try_parse_from(command_line(words.iter().map(OsString::from)));
    for option in KUBE_PROXYS {
        let (name, value) = option.split_once('=').unwrap();
        let old = format!("{}={value}", name.replace('-', "_").replace("__", "--").replacen("_v", "-v", 1));
        for typed in [option, &old] {
            let parsed = parsed(&["kube-proxy", typed]);
            assert!(parsed.is_ok(), "{typed}: {}", parsed.unwrap_err());
        }
        if ["-v", "--version"].contains(&name) {
            continue;
        }
        // A template may leave a value empty.
        for typed in [vec![format!("{name}=")], vec![name.to_owned(), String::new()]] {
            let words: Vec<&str> =
                ["kube-proxy"].into_iter().chain(typed.iter().map(String::as_str)).collect();
            let parsed = parsed(&words);
            assert!(parsed.is_ok(), "{words:?}: {}", parsed.unwrap_err());
        }
    }
    assert!(parsed(&[&["kube-proxy"], &KUBE_PROXYS[..]].concat()).is_ok(), "all at once");
    let unknown = parsed(&["kube-proxy", "--cluster-cdir=10.244.0.0/16"]).unwrap_err().to_string();
    assert!(unknown.contains("--cluster-cidr"), "a mistyped one is named, and what may be meant: {unknown}");
}

#[test]
fn kube_proxy_is_asked_for_its_version() {
    for typed in [&["--version"][..], &["--version=raw"], &["--v=2", "--version=true"]] {
        let words = [&["/usr/local/bin/kube-proxy"], typed].concat();
        let asked = Args::try_parse_from(command_line(words.iter().map(OsString::from))).unwrap_err();
        assert_eq!(asked.kind(), clap::error::ErrorKind::DisplayVersion, "{typed:?}");
    }
}

#[test]
fn booleans_are_those_of_go() {
    let instead = |typed: &[&str]| run(&[&["kube-proxy"], typed].concat()).instead();
    assert_eq!(instead(&["--cleanup"]), Some(Instead::Cleanup));
    assert_eq!(instead(&["--cleanup=1"]), Some(Instead::Cleanup));
    assert_eq!(instead(&["--cleanup=false", "--init-only=True"]), Some(Instead::Init));
    assert_eq!(instead(&["--cleanup=F", "--init-only=0"]), None);
    assert_eq!(instead(&["--cleanup=true", "--cleanup=false"]), None, "the last one counts");
}

#[test]
fn pages_may_be_served_nowhere() {
    let pages = |typed: &[&str]| {
        let typed = [&["kube-proxy", "--proxy-mode=ebpf", "--hostname-override=n"], typed].concat();
        let settings = run(&typed).resolve(&File::default(), Path::new("/sys/fs/bpf/lb")).unwrap().settings;
        [settings.healthz, settings.metrics].map(|at| at.map_or("nowhere".into(), |at| at.to_string()))
    };
    let usual = ["0.0.0.0:10256", "127.0.0.1:10249"];
    assert_eq!(pages(&[]), usual);
    assert_eq!(pages(&["--healthz-bind-address=", "--metrics-bind-address", ""]), ["nowhere"; 2]);
    assert_eq!(pages(&["--healthz-port=0", "--metrics-port=99"]), ["nowhere", "127.0.0.1:99"]);
    let both = ["--healthz-port=1", "--healthz-bind-address=192.0.2.1:2"];
    assert_eq!(pages(&both), ["192.0.2.1:2", usual[1]]);
}

#[test]
fn a_nodes_name_is_written_small() {
    assert_eq!(node_name(Some(" Node-1\n".into())).unwrap(), "node-1");
    assert!(node_name(Some(" ".into())).is_err());
}

#[test]
fn where_the_agent_chose_the_mode_it_does_without_resets() {
    use OnBackendGone::{Keep, Reset};
    let of = |choice, taken| run::on_backend_gone(choice, taken, Reset).ok();
    assert_eq!(of(ModeChoice::Auto, Mode::Ebpf), Some(Reset));
    assert_eq!(of(ModeChoice::Auto, Mode::Iptables), Some(Keep));
    assert_eq!(of(ModeChoice::Fixed(Mode::Ebpf), Mode::Ebpf), Some(Reset));
    assert_eq!(of(ModeChoice::Fixed(Mode::Iptables), Mode::Iptables), None);
    let kept = run::on_backend_gone(ModeChoice::Fixed(Mode::Iptables), Mode::Iptables, Keep);
    assert_eq!(kept.ok(), Some(Keep));
}

#[test]
fn beside_a_file_kube_proxys_options_count_as_they_do_there() {
    let typed = [
        "--config=/etc/kube-proxy.yaml",
        "--proxy-mode=iptables",
        "--cluster-cidr",
        "10.0.0.0/8",
        "--profiling",
        "--masquerade_all=true",
        "--hostname-override=node-1",
        "-v=4",
        "--mode",
        "ebpf",
    ];
    let options = run(&[&["kube-proxy"], &typed[..]].concat());
    let ignored = ["--proxy-mode", "--cluster-cidr", "--profiling", "--masquerade-all"];
    assert_eq!(options.not_looked_at(), ignored);
    let configuration = options.configuration(&File::default());
    assert_eq!((configuration.iptables.masquerade_all, configuration.cluster_cidr), (None, None));
    assert_eq!(
        (configuration.hostname_override.as_deref(), configuration.logging.verbosity),
        (Some("node-1"), Some(4))
    );
    assert_eq!(configuration.lb.mode.as_deref(), Some("ebpf"), "options of ours count");
    // Without a file they do, and so they do under our own name.
    for words in [&[&["kube-proxy"], &typed[1..]].concat(), &[&["lb-agent", "run"], &typed[..]].concat()] {
        let options = run(words);
        assert!(options.not_looked_at().is_empty());
        let configuration = options.configuration(&File::default());
        assert_eq!(
            (configuration.iptables.masquerade_all, configuration.cluster_cidr.as_deref()),
            (Some(true), Some("10.0.0.0/8"))
        );
    }
}
