//! The command line, and what it means together with a configuration file.

use clap::CommandFactory;

use super::*;
use crate::config::File;

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
        assert_eq!([config.settings.healthz.port(), config.settings.metrics.port()], ports, "{more:?}");
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
        "--feature-gates=A=true",
        "--profiling",
        "-v=5",
        "--master=https://192.0.2.1:6443",
    ]);
    assert_eq!(options.without_meaning(), ["--feature-gates", "--profiling"]);
    let config = options.resolve(&File::default(), Path::new("/sys/fs/bpf/lb")).unwrap();
    assert_eq!((config.mode, &*config.node_name), (Mode::Iptables, "node-1"));
    assert_eq!(config.compile.node_port_addresses.len(), 2);
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
    assert!(config.settings.conntrack.contains(&("nf_conntrack_tcp_timeout_established", 8520)));
    assert!(config.settings.conntrack.iter().all(|(sysctl, _)| *sysctl != "nf_conntrack_max"));
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
