//! The configuration as it holds on this node: what is given, and defaults where nothing is (kube-proxy:
//! `pkg/proxy/apis/config/v1alpha1/defaults.go`).

use std::{net::SocketAddr, time::Duration};

use clap::ValueEnum;
use serde_json::Value;

use super::{
    kube_proxy::KubeProxyConfiguration,
    settings::{EXTERNAL_IPS, Settings},
};
use crate::args::Mode;

/// For `/configz`. Fields without a value are left out.
pub fn in_force(given: &KubeProxyConfiguration, settings: &Settings, mode: Mode, node: &str) -> Value {
    let mut all = given.clone();
    if all.mode.as_deref().is_none_or(|mode| ["", "auto"].contains(&mode)) {
        all.mode = Some(mode.name().into());
    }
    fill(&mut all.hostname_override, node.into());
    fill(&mut all.bind_address, "0.0.0.0".into());
    let shown = |at: Option<SocketAddr>| Some(at.map(|at| at.to_string()).unwrap_or_default());
    (all.healthz_bind_address, all.metrics_bind_address) = (shown(settings.healthz), shown(settings.metrics));
    fill(&mut all.detect_local_mode, "ClusterCIDR".into());
    fill(&mut all.oom_score_adj, settings.oom_score_adj);
    fill(&mut all.logging.format, "text".into());
    fill(&mut all.logging.verbosity, 0);
    all.feature_gates.get_or_insert_default().entry(EXTERNAL_IPS.into()).or_insert(true);
    if mode == Mode::Nftables && all.node_port_addresses.as_ref().is_none_or(Vec::is_empty) {
        all.node_port_addresses = Some(vec!["primary".into()]);
    }
    fill_modes(&mut all, settings);
    fill_conntrack(&mut all);
    fill_lb(&mut all, settings, mode);
    let mut value = serde_json::to_value(&all).unwrap_or_default();
    leave_out_nulls(&mut value);
    value
}

fn fill<T>(field: &mut Option<T>, default: T) {
    field.get_or_insert(default);
}

fn fill_modes(all: &mut KubeProxyConfiguration, settings: &Settings) {
    let periods = |mode| [settings.sync_period(mode), settings.min_sync_period(mode)].map(duration);
    let bit = |mode| settings.rules(mode).masquerade_mark.trailing_zeros();

    let [period, least] = periods(Mode::Iptables).map(Some);
    (all.iptables.sync_period, all.iptables.min_sync_period) = (period, least);
    fill(&mut all.iptables.masquerade_bit, bit(Mode::Iptables));
    fill(&mut all.iptables.masquerade_all, false);
    fill(&mut all.iptables.localhost_node_ports, true);

    let [period, least] = periods(Mode::Ipvs).map(Some);
    (all.ipvs.sync_period, all.ipvs.min_sync_period) = (period, least);
    all.ipvs.scheduler = Some(settings.ipvs.scheduler.name().into());
    fill(&mut all.ipvs.strict_arp, false);
    for timeout in [&mut all.ipvs.tcp_timeout, &mut all.ipvs.tcp_fin_timeout, &mut all.ipvs.udp_timeout] {
        fill(timeout, duration(Duration::ZERO));
    }

    let [period, least] = periods(Mode::Nftables).map(Some);
    (all.nftables.sync_period, all.nftables.min_sync_period) = (period, least);
    fill(&mut all.nftables.masquerade_bit, bit(Mode::Nftables));
    fill(&mut all.nftables.masquerade_all, false);
}

fn fill_conntrack(all: &mut KubeProxyConfiguration) {
    let conntrack = &mut all.conntrack;
    fill(&mut conntrack.max_per_core, super::conntrack::MAX_PER_CORE);
    fill(&mut conntrack.min, super::conntrack::MAX_AT_LEAST);
    fill(&mut conntrack.tcp_established_timeout, duration(super::conntrack::TCP_ESTABLISHED));
    fill(&mut conntrack.tcp_close_wait_timeout, duration(super::conntrack::TCP_CLOSE_WAIT));
    fill(&mut conntrack.tcp_be_liberal, false);
}

fn fill_lb(all: &mut KubeProxyConfiguration, settings: &Settings, mode: Mode) {
    fn name(choice: impl ValueEnum) -> String {
        choice.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
    let lb = &mut all.lb;
    fill(&mut lb.min_sync_period, duration(settings.min_sync_period(Mode::Ebpf)));
    fill(&mut lb.map_entries_max, settings.map_entries_max);
    fill(&mut lb.replace_kube_proxy, settings.replace_kube_proxy);
    if mode == Mode::Ebpf {
        lb.xdp_mode = Some(name(settings.modes.xdp));
        lb.tc_mode = Some(name(settings.modes.tc));
    }
    lb.on_backend_gone = Some(name(settings.on_backend_gone));
}

fn duration(time: Duration) -> kube::core::Duration {
    time.into()
}

fn leave_out_nulls(value: &mut Value) {
    if let Value::Object(fields) = value {
        fields.retain(|_, value| !value.is_null());
        fields.values_mut().for_each(leave_out_nulls);
    }
}
