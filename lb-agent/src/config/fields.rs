//! What each field of a configuration file does here, for `config check` and for the warning about those that do
//! nothing.

use serde_json::Value;

/// What a field does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Here {
    /// This.
    Does(&'static str),
    /// Nothing, and why that is all right.
    Nothing(&'static str),
}

use Here::{Does, Nothing};

const WINDOWS: Here = Nothing("for Windows");
const NEITHER_LIMITED: Here = Nothing("a handful of watches needs no limit");
const SYNC_PERIOD: Here = Does(
    "time between two looks for what others took away, at least 1s; after twice as long without success /healthz says so",
);
const AT_ONCE: Here = Nothing("changes are watched; what others took away is looked for every syncPeriod");

/// All fields, in kube-proxy's order, then ours. Whatever lies below one of them belongs to it.
pub const FIELDS: &[(&str, Here)] = &[
    (
        "featureGates.AllowServiceExternalIPs",
        Does("externalIPs of Services are served; true if not given, as in Kubernetes 1.36"),
    ),
    ("featureGates", Nothing("what other gates would switch on is always on, or not there")),
    ("clientConnection.kubeconfig", Does("the API server and the credentials for it")),
    ("clientConnection.acceptContentTypes", Nothing("JSON is asked for")),
    ("clientConnection.contentType", Nothing("JSON is sent")),
    ("clientConnection.qps", NEITHER_LIMITED),
    ("clientConnection.burst", NEITHER_LIMITED),
    ("logging.format", Does("text, or json: one object a line")),
    ("logging.flushFrequency", Nothing("every line is written at once")),
    (
        "logging.verbosity",
        Does("from 4 on debug messages are logged, from 8 on all; --log says it by module"),
    ),
    ("logging.vmodule", Nothing("--log takes a level for each module")),
    ("logging.options", Nothing("lines are not buffered")),
    ("hostnameOverride", Does("this node's name in the cluster; the host name if not given")),
    (
        "bindAddress",
        Does("the node's primary address of its family, and whether the servers default to IPv6"),
    ),
    ("healthzBindAddress", Does("where /healthz and /livez are served")),
    ("metricsBindAddress", Does("where /metrics is served")),
    ("bindAddressHardFail", Nothing("a server that can't be started always ends the agent")),
    ("enableProfiling", Nothing("there is no /debug/pprof")),
    ("showHiddenMetricsForVersion", Nothing("no metric is hidden")),
    ("mode", Does("iptables, ipvs, nftables, ebpf; auto or nothing: the best that works on this node")),
    (
        "iptables.masqueradeBit",
        Does("the bit of the packet mark that asks for masquerading, in iptables and ipvs modes"),
    ),
    (
        "iptables.masqueradeAll",
        Does("all traffic to services is masqueraded, in ebpf, iptables and ipvs modes"),
    ),
    (
        "iptables.localhostNodePorts",
        Does("NodePorts answer on 127.0.0.1, in ebpf and iptables modes; iptables counts such connections"),
    ),
    (
        "iptables.snatNodeInternalIP",
        Nothing("MASQUERADE takes the address of the way out; ebpf takes the node's main one"),
    ),
    ("iptables.syncPeriod", SYNC_PERIOD),
    ("iptables.minSyncPeriod", Does("least time between two writes, in iptables mode")),
    ("ipvs.syncPeriod", SYNC_PERIOD),
    ("ipvs.minSyncPeriod", Does("least time between two writes, in ipvs mode")),
    ("ipvs.scheduler", Does("which destination a connection gets")),
    ("ipvs.excludeCIDRs", Nothing("virtual servers that are not the agent's are always left alone")),
    ("ipvs.strictARP", Does("ARP is answered for the asked device's own addresses only")),
    ("ipvs.tcpTimeout", Does("when an idle TCP connection is forgotten (ipvsadm --set)")),
    ("ipvs.tcpFinTimeout", Does("when a TCP connection is forgotten after a FIN (ipvsadm --set)")),
    ("ipvs.udpTimeout", Does("when a UDP flow is forgotten (ipvsadm --set)")),
    (
        "nftables.masqueradeBit",
        Does("the bit of the packet mark that asks for masquerading, in nftables mode"),
    ),
    ("nftables.masqueradeAll", Does("all traffic to services is masqueraded, in nftables mode")),
    ("nftables.syncPeriod", SYNC_PERIOD),
    ("nftables.minSyncPeriod", Does("least time between two writes, in nftables mode")),
    ("winkernel.networkName", WINDOWS),
    ("winkernel.sourceVip", WINDOWS),
    ("winkernel.enableDSR", WINDOWS),
    ("winkernel.rootHnsEndpointName", WINDOWS),
    ("winkernel.forwardHealthCheckVip", WINDOWS),
    (
        "detectLocalMode",
        Does(
            "how pods are told from others in netfilter modes: ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix; ebpf knows them by their devices",
        ),
    ),
    ("detectLocal.bridgeInterface", Does("the bridge that pods are on")),
    ("detectLocal.interfaceNamePrefix", Does("how the names of pods' devices begin")),
    ("clusterCIDR", Does("addresses of the cluster's pods, one range a family")),
    (
        "nodePortAddresses",
        Does(
            "node addresses that answer NodePorts: ranges, primary, localhost, all; nothing: primary in nftables mode, else all",
        ),
    ),
    ("oomScoreAdj", Does("how the kernel's OOM killer weighs the agent; -999 if not given")),
    (
        "conntrack.maxPerCore",
        Does(
            "net.netfilter.nf_conntrack_max for each CPU, with a hash table to suit; 0 leaves it. If neither this nor min is given, the maximum is raised only",
        ),
    ),
    ("conntrack.min", Does("net.netfilter.nf_conntrack_max at least")),
    (
        "conntrack.tcpEstablishedTimeout",
        Does("net.netfilter.nf_conntrack_tcp_timeout_established; 0 leaves it"),
    ),
    ("conntrack.tcpCloseWaitTimeout", Does("net.netfilter.nf_conntrack_tcp_timeout_close_wait; 0 leaves it")),
    (
        "conntrack.tcpBeLiberal",
        Does(
            "net.netfilter.nf_conntrack_tcp_be_liberal; iptables and ipvs modes then drop no INVALID packets",
        ),
    ),
    ("conntrack.udpTimeout", Does("net.netfilter.nf_conntrack_udp_timeout; 0 leaves it")),
    ("conntrack.udpStreamTimeout", Does("net.netfilter.nf_conntrack_udp_timeout_stream; 0 leaves it")),
    ("configSyncPeriod", AT_ONCE),
    ("portRange", Nothing("kube-proxy itself has no use for it since its userspace mode is gone")),
    ("windowsRunAsService", WINDOWS),
    ("lb.mode", Does("goes before mode, so that the file stays good for kube-proxy")),
    (
        "lb.minSyncPeriod",
        Does("least time between two writes, in modes whose own section names none; 5ms if not given"),
    ),
    ("lb.devices", Does("external devices; all that lead out of the node if not given")),
    ("lb.podDevices", Does("host sides of pods' veths; all veths if not given, none if empty")),
    ("lb.xdpMode", Does("where XDP is attached: auto, native, generic, off")),
    ("lb.tcMode", Does("how tc programs are attached: auto, tcx, clsact")),
    (
        "lb.cgroupRoot",
        Does("the cgroup v2 directory whose sockets are served; the mount's root if not given"),
    ),
    (
        "lb.flowsMax",
        Does("entries in each flow table that is not pinned yet; by the node's CPUs and memory if not given"),
    ),
    (
        "lb.mapEntriesMax",
        Does("maps of Services grow with the cluster, but none beyond so many entries; 4194304 if not given"),
    ),
    (
        "lb.legacyExternalIP",
        Does("modern, or \"1.20\": kube-proxy 1.20's rules for externalIPs, in iptables mode"),
    ),
    ("lb.replaceKubeProxy", Does("once this mode serves, what kube-proxy left in its modes is removed")),
    (
        "lb.onBackendGone",
        Does(
            "keep or reset: what becomes of TCP connections and connected UDP sockets whose backend is gone; reset in ebpf mode only: with mode auto they are kept where that takes another",
        ),
    ),
];

/// What the file gives: path, value and what that does; in the file's order. Unknown fields come with `None`.
pub fn given(document: &Value) -> Vec<(String, Value, Option<Here>)> {
    let mut given = Vec::new();
    collect("", document, &mut given);
    given
}

fn collect(path: &str, value: &Value, given: &mut Vec<(String, Value, Option<Here>)>) {
    let section = format!("{path}.");
    let is_section = path.is_empty() || FIELDS.iter().any(|(field, _)| field.starts_with(&section));
    match value {
        Value::Object(fields) if is_section => {
            for (name, value) in fields.iter().filter(|(name, _)| !(path.is_empty() && is_of_type(name))) {
                let path = if path.is_empty() { name.clone() } else { format!("{section}{name}") };
                collect(&path, value, given);
            }
        }
        _ => {
            let here = known(path).or_else(|| known(path.rsplit_once('.')?.0));
            let asks = if here.is_some() { !is_unset(path, value) } else { !value.is_null() };
            if asks {
                given.push((path.to_owned(), value.clone(), here));
            }
        }
    }
}

fn known(path: &str) -> Option<Here> {
    FIELDS.iter().find(|(field, _)| *field == path).map(|(_, here)| *here)
}

fn is_of_type(name: &str) -> bool {
    ["apiVersion", "kind", "metadata"].contains(&name)
}

/// A value that generated files give to all that is off.
pub fn asks_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => ["", "0", "0s"].contains(&text.as_str()),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(asks_nothing),
    }
}

/// As good as not given: null, an empty string, a duration of 0 where that doesn't stand for something.
fn is_unset(path: &str, value: &Value) -> bool {
    let zero = value == "0s" && !path.starts_with("conntrack.tcp");
    value.is_null() || value == "" || zero || value.as_object().is_some_and(serde_json::Map::is_empty)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::kube_proxy::KubeProxyConfiguration;

    /// Something that each field takes.
    fn sample(path: &str) -> Value {
        let name = path.rsplit('.').next().unwrap_or_default();
        match name {
            "AllowServiceExternalIPs" => json!(false),
            "options" => json!({ "json": { "infoBufferSize": "0" } }),
            "nodePortAddresses" | "excludeCIDRs" | "devices" | "podDevices" => json!(["10.0.0.0/8"]),
            "flushFrequency" => json!(5_000_000_000u64),
            "qps" => json!(2.0),
            "burst" | "verbosity" | "masqueradeBit" | "oomScoreAdj" | "maxPerCore" | "min" | "flowsMax"
            | "mapEntriesMax" => {
                json!(7)
            }
            "vmodule" => json!("a=1"),
            name if name.ends_with("Period") || name.ends_with("Timeout") => json!("1m30s"),
            name if [
                "bindAddressHardFail",
                "enableProfiling",
                "masqueradeAll",
                "localhostNodePorts",
                "snatNodeInternalIP",
                "strictARP",
                "enableDSR",
                "forwardHealthCheckVip",
                "tcpBeLiberal",
                "windowsRunAsService",
                "replaceKubeProxy",
            ]
            .contains(&name) =>
            {
                json!(true)
            }
            _ => json!("text"),
        }
    }

    fn set(document: &mut Value, path: &str, value: Value) {
        let place = path.split('.').fold(document, |place, name| &mut place[name]);
        *place = value;
    }

    #[test]
    fn every_field_is_known_to_both_sides() {
        let mut document = json!({});
        FIELDS.iter().filter(|(path, _)| *path != "featureGates").for_each(|(path, _)| {
            set(&mut document, path, sample(path));
        });
        document["featureGates"]["SomeGate"] = json!(true);
        let read: KubeProxyConfiguration = serde_json::from_value(document.clone()).expect("a configuration");
        let kept = given(&serde_json::to_value(&read).expect("JSON"));
        let kept: Vec<&str> = kept.iter().map(|(path, ..)| path.as_str()).collect();
        let gate = |path| if path == "featureGates" { "featureGates.SomeGate" } else { path };
        let all: Vec<&str> = FIELDS.iter().map(|(path, _)| gate(*path)).collect();
        assert_eq!(kept, all);
        assert!(given(&document).iter().all(|(_, _, here)| here.is_some()));
    }

    #[test]
    fn what_nobody_knows_is_told_apart() {
        let document = json!({ "kind": "KubeProxyConfiguration", "ipvs": { "shedule": "rr", "strictARP": null },
            "udpIdleTimeout": "0s", "mode": "", "conntrack": { "tcpCloseWaitTimeout": "0s", "udpTimeout": "0s" } });
        let shown: Vec<(String, bool)> =
            given(&document).into_iter().map(|(path, _, here)| (path, here.is_some())).collect();
        let expected =
            [("ipvs.shedule", false), ("udpIdleTimeout", false), ("conntrack.tcpCloseWaitTimeout", true)];
        assert_eq!(shown, expected.map(|(path, known)| (path.to_owned(), known)));
    }
}
