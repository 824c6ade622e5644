//! `KubeProxyConfiguration` of `kubeproxy.config.k8s.io/v1alpha1`, every field of 1.36
//! (`staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go`), and a section `lb` of ours.
//!
//! Nothing is filled in here: a field that isn't given, or is null, is `None`. Empty strings and durations of 0 mean the
//! same, as for kube-proxy.

use std::collections::BTreeMap;

use kube::core::Duration;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A configuration file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "`super::fields` says what each does here")]
pub struct KubeProxyConfiguration {
    pub feature_gates: Option<BTreeMap<String, bool>>,
    pub client_connection: ClientConnection,
    pub logging: Logging,
    pub hostname_override: Option<String>,
    pub bind_address: Option<String>,
    pub healthz_bind_address: Option<String>,
    pub metrics_bind_address: Option<String>,
    pub bind_address_hard_fail: Option<bool>,
    pub enable_profiling: Option<bool>,
    pub show_hidden_metrics_for_version: Option<String>,
    pub mode: Option<String>,
    pub iptables: Iptables,
    pub ipvs: Ipvs,
    pub nftables: Nftables,
    pub winkernel: Winkernel,
    pub detect_local_mode: Option<String>,
    pub detect_local: DetectLocal,
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: Option<String>,
    pub node_port_addresses: Option<Vec<String>>,
    pub oom_score_adj: Option<i32>,
    pub conntrack: Conntrack,
    pub config_sync_period: Option<Duration>,
    pub port_range: Option<String>,
    pub windows_run_as_service: Option<bool>,
    /// What kube-proxy knows nothing of.
    pub lb: Lb,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "`super::fields` says what each does here")]
pub struct ClientConnection {
    pub kubeconfig: Option<String>,
    pub accept_content_types: Option<String>,
    pub content_type: Option<String>,
    pub qps: Option<f32>,
    pub burst: Option<i32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "`super::fields` says what each does here")]
pub struct Logging {
    pub format: Option<String>,
    /// A number of nanoseconds, or a duration.
    pub flush_frequency: Option<Value>,
    pub verbosity: Option<u32>,
    pub vmodule: Option<Value>,
    pub options: Option<Value>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "`super::fields` says what each does here")]
pub struct Iptables {
    pub masquerade_bit: Option<u32>,
    pub masquerade_all: Option<bool>,
    pub localhost_node_ports: Option<bool>,
    #[serde(rename = "snatNodeInternalIP")]
    pub snat_node_internal_ip: Option<bool>,
    pub sync_period: Option<Duration>,
    pub min_sync_period: Option<Duration>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "`super::fields` says what each does here")]
pub struct Ipvs {
    pub sync_period: Option<Duration>,
    pub min_sync_period: Option<Duration>,
    pub scheduler: Option<String>,
    #[serde(rename = "excludeCIDRs")]
    pub exclude_cidrs: Option<Vec<String>>,
    #[serde(rename = "strictARP")]
    pub strict_arp: Option<bool>,
    pub tcp_timeout: Option<Duration>,
    pub tcp_fin_timeout: Option<Duration>,
    pub udp_timeout: Option<Duration>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "`super::fields` says what each does here")]
pub struct Nftables {
    pub masquerade_bit: Option<u32>,
    pub masquerade_all: Option<bool>,
    pub sync_period: Option<Duration>,
    pub min_sync_period: Option<Duration>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "`super::fields` says what each does here")]
pub struct Winkernel {
    pub network_name: Option<String>,
    pub source_vip: Option<String>,
    #[serde(rename = "enableDSR")]
    pub enable_dsr: Option<bool>,
    pub root_hns_endpoint_name: Option<String>,
    pub forward_health_check_vip: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "`super::fields` says what each does here")]
pub struct DetectLocal {
    pub bridge_interface: Option<String>,
    pub interface_name_prefix: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "`super::fields` says what each does here")]
pub struct Conntrack {
    pub max_per_core: Option<u32>,
    pub min: Option<u32>,
    pub tcp_established_timeout: Option<Duration>,
    pub tcp_close_wait_timeout: Option<Duration>,
    pub tcp_be_liberal: Option<bool>,
    pub udp_timeout: Option<Duration>,
    pub udp_stream_timeout: Option<Duration>,
}

/// Our own section. Options of `run` with these names say the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "`super::fields` says what each does")]
pub struct Lb {
    pub mode: Option<String>,
    pub min_sync_period: Option<Duration>,
    pub devices: Option<Vec<String>>,
    pub pod_devices: Option<Vec<String>>,
    pub xdp_mode: Option<String>,
    pub tc_mode: Option<String>,
    pub cgroup_root: Option<String>,
    pub flows_max: Option<u32>,
    pub map_entries_max: Option<u32>,
    #[serde(rename = "legacyExternalIP")]
    pub legacy_external_ip: Option<String>,
    pub replace_kube_proxy: Option<bool>,
    pub on_backend_gone: Option<String>,
}
