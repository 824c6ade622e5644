//! Options that decide what is served and how: a configuration file, and what goes before it.

use std::{net::IpAddr, path::PathBuf};

use anyhow::Result;
use clap::{
    Args as ClapArgs, ValueEnum,
    builder::{BoolishValueParser, PossibleValue, PossibleValuesParser, TypedValueParser},
};
use ipnet::IpNet;
use lb_core::rules::ipvs::Scheduler;

use crate::config::{self, File, kube_proxy::KubeProxyConfiguration, settings::Settings};

/// Options that decide what is served and how.
#[derive(ClapArgs, Clone, Debug)]
pub struct PolicyArgs {
    /// A KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1), which may have a section `lb`; `config check` explains
    /// it. Options go before it. `run` follows its changes.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Masquerade all traffic to services.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    masquerade_all: Option<bool>,
    /// Node addresses that answer NodePorts, separated by commas: CIDRs, primary, localhost, all. If not given, primary in
    /// nftables mode and all in the others.
    #[arg(long, alias = "node-port-addresses", value_delimiter = ',', value_name = "CIDR|primary|…")]
    nodeport_addresses: Option<Vec<String>>,
    /// Answer NodePorts on 127.0.0.1, in ebpf and iptables modes.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    iptables_localhost_nodeports: Option<bool>,
    /// The bit of the packet mark that asks for masquerading, in netfilter modes.
    #[arg(long, value_name = "0–31")]
    iptables_masquerade_bit: Option<u32>,
    /// How netfilter rules tell pods from others. The ebpf mode knows pods by their devices.
    #[arg(long)]
    detect_local_mode: Option<DetectLocalMode>,
    /// Addresses of the cluster's pods, one CIDR a family, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "CIDR")]
    cluster_cidr: Option<Vec<IpNet>>,
    /// The bridge that pods are on, with --detect-local-mode BridgeInterface.
    #[arg(long, value_name = "DEVICE")]
    pod_bridge_interface: Option<String>,
    /// How the names of pods' devices begin, with --detect-local-mode InterfaceNamePrefix.
    #[arg(long, value_name = "PREFIX")]
    pod_interface_name_prefix: Option<String>,
    /// The node's primary address of its family, whatever its Node object says.
    #[arg(long, value_name = "IP")]
    bind_address: Option<IpAddr>,
    /// Whose rules for externalIPs the iptables mode writes: today's, or kube-proxy 1.20's, which leave an address
    /// that is not this node's to the network when a bridged pod or this node dials it.
    #[arg(long)]
    legacy_external_ip: Option<LegacyExternalIp>,
    /// Which destination a connection gets in the ipvs mode.
    #[arg(long, value_parser = schedulers())]
    ipvs_scheduler: Option<Scheduler>,
}

/// Takes the names of [`Scheduler::ALL`].
fn schedulers() -> impl TypedValueParser<Value = Scheduler> {
    let named = |scheduler: Scheduler| PossibleValue::new(scheduler.name()).help(scheduler.explanation());
    PossibleValuesParser::new(Scheduler::ALL.map(named)).map(|name| {
        let named = Scheduler::ALL.into_iter().find(|scheduler| scheduler.name() == name);
        named.expect("clap takes only these names")
    })
}

/// kube-proxy `detectLocalMode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DetectLocalMode {
    /// By the addresses of the cluster's pods.
    #[value(name = "ClusterCIDR")]
    ClusterCidr,
    /// By the addresses of this node's pods, as its Node object has them.
    #[value(name = "NodeCIDR")]
    NodeCidr,
    /// By the bridge they come in from.
    #[value(name = "BridgeInterface")]
    BridgeInterface,
    /// By the beginning of their devices' names.
    #[value(name = "InterfaceNamePrefix")]
    InterfaceNamePrefix,
}

/// Rules for externalIPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LegacyExternalIp {
    /// kube-proxy 1.21 and later.
    Modern,
    /// kube-proxy 1.20.
    #[value(name = "1.20")]
    V1_20,
}

/// A value as it is typed.
pub(super) fn typed(value: impl ValueEnum) -> Option<String> {
    value.to_possible_value().map(|value| value.get_name().to_owned())
}

/// Puts what was typed into a field.
pub(super) fn put<T>(field: &mut Option<T>, typed: Option<T>) {
    if typed.is_some() {
        *field = typed;
    }
}

impl PolicyArgs {
    /// The file, or an empty one; options are not in it yet.
    pub fn file(&self) -> Result<File> {
        self.config.as_deref().map_or_else(|| Ok(File::default()), File::read)
    }

    /// What file and options mean together.
    pub fn settings(&self) -> Result<Settings> {
        let mut configuration = self.file()?.configuration;
        self.put_into(&mut configuration);
        config::settings(&configuration)
    }

    /// Puts the options that were typed into a configuration.
    pub fn put_into(&self, to: &mut KubeProxyConfiguration) {
        put(&mut to.iptables.masquerade_all, self.masquerade_all);
        put(&mut to.nftables.masquerade_all, self.masquerade_all);
        put(&mut to.node_port_addresses, self.nodeport_addresses.clone());
        put(&mut to.iptables.localhost_node_ports, self.iptables_localhost_nodeports);
        put(&mut to.iptables.masquerade_bit, self.iptables_masquerade_bit);
        put(&mut to.nftables.masquerade_bit, self.iptables_masquerade_bit);
        put(&mut to.detect_local_mode, self.detect_local_mode.and_then(typed));
        let ranges = self.cluster_cidr.as_ref();
        put(
            &mut to.cluster_cidr,
            ranges.map(|ranges| ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")),
        );
        put(&mut to.detect_local.bridge_interface, self.pod_bridge_interface.clone());
        put(&mut to.detect_local.interface_name_prefix, self.pod_interface_name_prefix.clone());
        put(&mut to.bind_address, self.bind_address.map(|addr| addr.to_string()));
        put(&mut to.lb.legacy_external_ip, self.legacy_external_ip.and_then(typed));
        put(&mut to.ipvs.scheduler, self.ipvs_scheduler.map(|scheduler| scheduler.name().to_owned()));
    }
}
