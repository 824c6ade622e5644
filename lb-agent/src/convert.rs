//! Kubernetes objects → our model: the only code that sees what may be missing in them.
//!
//! A field that makes no sense becomes a warning; the rest of the object is used all the same.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::SystemTime,
};

use ipnet::IpNet;
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery, networking::v1 as networking},
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
    jiff::Timestamp,
};
use lb_core::model::{
    ContainerPort, Endpoint, EndpointSlice, Family, Node, ObjectName, Pod, Protocol, Service, ServiceCidr,
    ServicePort, ServiceType, SlicePort, TargetPort, TrafficPolicy, Warning,
};

/// A Service with this label is another proxy's.
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// An EndpointSlice with this label belongs to a headless Service.
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// When what an EndpointSlice follows changed (RFC 3339).
const TRIGGER_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// The cluster autoscaler is about to remove the Node (kube-proxy: `healthcheck/proxy_health.go`).
const GOING_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// Kubernetes' default for ClientIP affinity (`DefaultClientIPServiceAffinitySeconds`).
const DEFAULT_AFFINITY_SECS: u32 = 10_800;

/// Collects warnings about one object.
pub struct Noted<'a> {
    object: String,
    warnings: &'a mut Vec<Warning>,
}

impl<'a> Noted<'a> {
    fn new(kind: &str, name: &ObjectName, warnings: &'a mut Vec<Warning>) -> Self {
        Self { object: format!("{kind} {name}"), warnings }
    }

    fn warn(&mut self, field: impl Into<String>, problem: impl Into<String>) {
        self.warnings.push(Warning {
            object: self.object.clone(),
            field: field.into(),
            problem: problem.into(),
        });
    }
}

/// The name of an object; manifests may leave the namespace out.
pub fn name(meta: &ObjectMeta) -> ObjectName {
    ObjectName::new(meta.namespace.as_deref().unwrap_or("default"), meta.name.as_deref().unwrap_or_default())
}

fn label<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a String> {
    meta.labels.as_ref()?.get(key)
}

/// A Service, or `None` if it is none of ours: headless, ExternalName, or another proxy's.
pub fn service(object: &core::Service, warnings: &mut Vec<Warning>) -> Option<Service> {
    let name = name(&object.metadata);
    let mut noted = Noted::new("Service", &name, warnings);
    let spec = object.spec.as_ref()?;
    let cluster_ip = spec.cluster_ip.as_deref().unwrap_or_default();
    if label(&object.metadata, PROXY_NAME_LABEL).is_some()
        || spec.type_.as_deref() == Some("ExternalName")
        || cluster_ip == "None"
    {
        return None;
    }
    let cluster_ips = match &spec.cluster_ips {
        Some(ips) if !ips.is_empty() => ips.clone(),
        _ => Vec::from_iter((!cluster_ip.is_empty()).then(|| cluster_ip.to_owned())),
    };
    let ingress = object.status.as_ref().and_then(|status| status.load_balancer.as_ref()?.ingress.as_ref());
    let load_balancer_ips: Vec<String> = ingress
        .into_iter()
        .flatten()
        .filter(|ingress| ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"))
        .filter_map(|ingress| ingress.ip.clone())
        .collect();
    let source_ranges = spec.load_balancer_source_ranges.iter().flatten();
    Some(Service {
        uid: Arc::from(object.metadata.uid.as_deref().unwrap_or_default()),
        created_unix_secs: object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
        service_type: match spec.type_.as_deref() {
            Some("NodePort") => ServiceType::NodePort,
            Some("LoadBalancer") => ServiceType::LoadBalancer,
            _ => ServiceType::ClusterIp,
        },
        cluster_ips: addresses(&cluster_ips, "spec.clusterIPs", &mut noted),
        external_ips: addresses(
            spec.external_ips.as_deref().unwrap_or_default(),
            "spec.externalIPs",
            &mut noted,
        ),
        load_balancer_ips: addresses(&load_balancer_ips, "status.loadBalancer.ingress", &mut noted),
        source_ranges: source_ranges
            .enumerate()
            .filter_map(|(index, range)| {
                let parsed = network(range);
                if parsed.is_none() {
                    noted.warn(
                        format!("spec.loadBalancerSourceRanges[{index}]"),
                        format!(
                            "{range:?} is no CIDR; it is left out; if none is left, everybody may connect"
                        ),
                    );
                }
                parsed
            })
            .collect(),
        external_policy: policy(spec.external_traffic_policy.as_deref()),
        internal_policy: policy(spec.internal_traffic_policy.as_deref()),
        health_check_node_port: spec
            .health_check_node_port
            .and_then(|port| u16::try_from(port).ok())
            .unwrap_or_default(),
        affinity_secs: affinity(spec),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        selector: spec.selector.clone().unwrap_or_default(),
        ports: service_ports(spec, &mut noted),
        name,
    })
}

fn affinity(spec: &core::ServiceSpec) -> Option<u32> {
    (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        let secs = config.and_then(|config| config.timeout_seconds);
        secs.and_then(|secs| u32::try_from(secs).ok())
            .filter(|secs| *secs > 0)
            .unwrap_or(DEFAULT_AFFINITY_SECS)
    })
}

fn service_ports(spec: &core::ServiceSpec, noted: &mut Noted<'_>) -> Vec<ServicePort> {
    let mut ports = Vec::new();
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let Some(number) = port_number(port.port) else {
            noted.warn(field("port"), format!("{} is no port; it is not served", port.port));
            continue;
        };
        let Some(protocol) = protocol(port.protocol.as_deref()) else {
            noted.warn(field("protocol"), format!("{:?} is not known; it is not served", port.protocol));
            continue;
        };
        let node_port = port.node_port.filter(|number| *number != 0);
        if node_port.is_some_and(|number| port_number(number).is_none()) {
            noted.warn(
                field("nodePort"),
                format!("{} is no port; no NodePort is served", node_port.unwrap_or(0)),
            );
        }
        let target = match &port.target_port {
            None => TargetPort::Number(number),
            Some(IntOrString::Int(0)) => TargetPort::Number(number),
            Some(IntOrString::Int(target)) => match port_number(*target) {
                Some(target) => TargetPort::Number(target),
                None => {
                    noted.warn(field("targetPort"), format!("{target} is no port; {number} is used"));
                    TargetPort::Number(number)
                }
            },
            Some(IntOrString::String(name)) => match name.parse() {
                Ok(target) => TargetPort::Number(target),
                Err(_) => TargetPort::Name(Arc::from(name.as_str())),
            },
        };
        ports.push(ServicePort {
            name: Arc::from(port.name.as_deref().unwrap_or_default()),
            protocol,
            port: number,
            node_port: node_port.and_then(port_number).unwrap_or(0),
            target,
        });
    }
    ports
}

/// An EndpointSlice, or `None` if it belongs to no Service of ours or holds names.
pub fn endpoint_slice(
    object: &discovery::EndpointSlice,
    warnings: &mut Vec<Warning>,
) -> Option<EndpointSlice> {
    let name = name(&object.metadata);
    let mut noted = Noted::new("EndpointSlice", &name, warnings);
    let family = match object.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        _ => return None,
    };
    if label(&object.metadata, HEADLESS_LABEL).is_some() {
        return None;
    }
    let service = label(&object.metadata, SERVICE_NAME_LABEL)?;
    let mut ports = Vec::new();
    for (index, port) in object.ports.iter().flatten().enumerate() {
        // API servers put an empty name in; no name at all is a slice that none of them has seen.
        let Some(name) = port.name.as_deref().map(Arc::from) else {
            noted.warn(
                format!("ports[{index}].name"),
                "is not there, not even empty; the port is left out".to_owned(),
            );
            continue;
        };
        let number = port.port.and_then(port_number).zip(protocol(port.protocol.as_deref()));
        ports.extend(number.map(|(port, protocol)| SlicePort { name, protocol, port }));
    }
    let mut endpoints = Vec::new();
    for (index, endpoint) in object.endpoints.iter().flatten().enumerate() {
        // Only the first counts (kube-proxy `endpointslicecache.go`).
        let Some(first) = endpoint.addresses.first() else { continue };
        let Some(addr) = address(first).filter(|addr| Family::of(*addr) == family) else {
            noted.warn(
                format!("endpoints[{index}].addresses[0]"),
                format!("{first:?} is no {family} address; the endpoint is left out"),
            );
            continue;
        };
        if is_special(addr) {
            noted.warn(
                format!("endpoints[{index}].addresses[0]"),
                format!("{addr} is no address of an endpoint; it is left out"),
            );
            continue;
        }
        let conditions = endpoint.conditions.clone().unwrap_or_default();
        let hints = endpoint.hints.clone().unwrap_or_default();
        endpoints.push(Endpoint {
            addr,
            ready: conditions.ready.unwrap_or(true),
            serving: conditions.serving.unwrap_or(true),
            terminating: conditions.terminating.unwrap_or(false),
            node: endpoint.node_name.as_deref().map(Arc::from),
            zone_hints: hints.for_zones.iter().flatten().map(|zone| Arc::from(zone.name.as_str())).collect(),
            node_hints: hints.for_nodes.iter().flatten().map(|node| Arc::from(node.name.as_str())).collect(),
        });
    }
    let service = ObjectName::new(name.namespace.clone(), service.as_str());
    endpoints.shrink_to_fit();
    let triggered = triggered(&object.metadata);
    Some(EndpointSlice { service, family, ports, endpoints, triggered, name })
}

/// When the slice's Pod or Service changed, as the controller noted it.
fn triggered(meta: &ObjectMeta) -> Option<SystemTime> {
    let text = meta.annotations.as_ref()?.get(TRIGGER_ANNOTATION)?;
    Some(SystemTime::from(text.parse::<Timestamp>().ok()?))
}

/// What API servers refuse as an endpoint (`ValidateEndpointIP`): whoever could have one would reach listeners that
/// trust the node's loopback, or the metadata service of a cloud.
fn is_special(addr: IpAddr) -> bool {
    let link_local = match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    };
    link_local || addr.is_unspecified() || addr.is_loopback() || addr.is_multicast()
}

/// A Node.
pub fn node(object: &core::Node, warnings: &mut Vec<Warning>) -> Node {
    let name = object.metadata.name.clone().unwrap_or_default();
    let mut noted = Noted { object: format!("Node {name}"), warnings };
    let listed = object.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let of_type = |kind: &'static str| listed.clone().filter(move |address| address.type_ == kind);
    let texts: Vec<String> =
        of_type("InternalIP").chain(of_type("ExternalIP")).map(|address| address.address.clone()).collect();
    let pod_cidrs = object.spec.iter().flat_map(|spec| spec.pod_cidrs.iter().flatten());
    let mut taints = object.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    Node {
        addresses: addresses(&texts, "status.addresses", &mut noted),
        zone: label(&object.metadata, ZONE_LABEL).map(|zone| Arc::from(zone.as_str())),
        pod_cidrs: pod_cidrs.filter_map(|cidr| network(cidr)).collect(),
        eligible: object.metadata.deletion_timestamp.is_none()
            && taints.all(|taint| taint.key != GOING_TAINT),
        name: Arc::from(name),
    }
}

/// A ServiceCIDR.
pub fn service_cidr(object: &networking::ServiceCIDR, warnings: &mut Vec<Warning>) -> ServiceCidr {
    let name = object.metadata.name.clone().unwrap_or_default();
    let mut noted = Noted { object: format!("ServiceCIDR {name}"), warnings };
    let listed = object.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten());
    let cidrs = listed.enumerate().filter_map(|(index, text)| {
        let range = network(text).filter(|range| range.prefix_len() > 0);
        if range.is_none() {
            noted.warn(
                format!("spec.cidrs[{index}]"),
                format!("{text:?} is no range of ClusterIPs; it is not used"),
            );
        }
        range
    });
    ServiceCidr { cidrs: cidrs.collect(), name: Arc::from(name) }
}

/// A Pod of a manifest.
pub fn pod(object: &core::Pod, warnings: &mut Vec<Warning>) -> Pod {
    let name = name(&object.metadata);
    let mut noted = Noted::new("Pod", &name, warnings);
    let status = object.status.clone().unwrap_or_default();
    let mut ips: Vec<String> = status.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect();
    if ips.is_empty() {
        ips.extend(status.pod_ip.clone());
    }
    let ready = match &status.conditions {
        Some(conditions) if !conditions.is_empty() => {
            conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
        }
        _ => status.phase.as_deref().is_none_or(|phase| phase == "Running"),
    };
    let containers = object.spec.iter().flat_map(|spec| {
        // Restartable init containers (sidecars) have ports too.
        let sidecars = spec.init_containers.iter().flatten();
        let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
        spec.containers.iter().chain(sidecars)
    });
    let ports = containers.flat_map(|container| container.ports.iter().flatten()).filter_map(|port| {
        Some(ContainerPort {
            name: Arc::from(port.name.as_deref().unwrap_or_default()),
            protocol: protocol(port.protocol.as_deref())?,
            port: port_number(port.container_port)?,
        })
    });
    Pod {
        labels: object.metadata.labels.clone().unwrap_or_default(),
        ips: addresses(&ips, "status.podIPs", &mut noted),
        node: object.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).map(Arc::from),
        ready,
        terminating: object.metadata.deletion_timestamp.is_some(),
        ports: ports.collect(),
        name,
    }
}

fn policy(text: Option<&str>) -> TrafficPolicy {
    if text == Some("Local") { TrafficPolicy::Local } else { TrafficPolicy::Cluster }
}

fn protocol(text: Option<&str>) -> Option<Protocol> {
    match text {
        None | Some("TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number != 0)
}

fn addresses(texts: &[String], field: &str, noted: &mut Noted<'_>) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        match address(text) {
            Some(addr) => addresses.push(addr),
            None => {
                noted.warn(format!("{field}[{index}]"), format!("{text:?} is no IP address; it is left out"));
            }
        }
    }
    addresses
}

/// An address; IPv4 octets may have leading zeros, which are decimal, and IPv4 may be written as IPv6 (`k8s.io/utils/net`
/// `ParseIPSloppy`, Go: `IP.To4`).
fn address(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| sloppy_v4(text).map(IpAddr::V4)).map(|addr| addr.to_canonical())
}

fn sloppy_v4(text: &str) -> Option<Ipv4Addr> {
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let octets: Option<Vec<u8>> =
        text.split('.').map(|part| if digits(part) { part.parse().ok() } else { None }).collect();
    <[u8; 4]>::try_from(octets?).ok().map(Ipv4Addr::from)
}

fn network(text: &str) -> Option<IpNet> {
    let (addr, len) = text.trim().split_once('/')?;
    IpNet::new(address(addr)?, len.parse().ok()?).ok().map(|net| net.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert(yaml: &str) -> (Option<Service>, Vec<String>) {
        let mut warnings = Vec::new();
        let object = serde_yaml_ng::from_str(yaml).expect("a Service");
        let service = service(&object, &mut warnings);
        (service, warnings.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn services_of_others_are_left_out() {
        for spec in ["{clusterIP: None}", "{type: ExternalName, externalName: a.b}"] {
            assert_eq!(convert(&format!("{{metadata: {{name: a}}, spec: {spec}}}")).0, None, "{spec}");
        }
        let labelled = "{metadata: {name: a, labels: {service.kubernetes.io/service-proxy-name: x}}, spec: {clusterIP: 10.0.0.1}}";
        assert_eq!(convert(labelled).0, None);
    }

    #[test]
    fn bad_fields_are_named_and_the_rest_is_used() {
        let (service, warnings) = convert(
            "{metadata: {name: web}, spec: {clusterIP: 10.0.0.1, externalIPs: [nonsense, 192.0.2.010, '::ffff:192.0.2.11'], loadBalancerSourceRanges: [10.0.0.0, ' 10.1.0.0/16 '], ports: [{port: 80}, {port: 70000, name: b}]}}",
        );
        let service = service.expect("served");
        assert_eq!(
            service.external_ips,
            ["192.0.2.10", "192.0.2.11"].map(|ip| ip.parse::<IpAddr>().unwrap())
        );
        assert_eq!(service.source_ranges, ["10.1.0.0/16".parse::<IpNet>().unwrap()]);
        assert_eq!(service.ports.len(), 1);
        assert_eq!(
            warnings,
            [
                "Service default/web: spec.externalIPs[0]: \"nonsense\" is no IP address; it is left out",
                "Service default/web: spec.loadBalancerSourceRanges[0]: \"10.0.0.0\" is no CIDR; it is left out; if none is left, everybody may connect",
                "Service default/web: spec.ports[1].port: 70000 is no port; it is not served",
            ]
        );
    }

    #[test]
    fn affinity_has_kubernetes_default() {
        let affinity = |text: &str| {
            convert(&format!("{{metadata: {{name: a}}, spec: {{clusterIP: 10.0.0.1, {text}}}}}"))
                .0
                .unwrap()
                .affinity_secs
        };
        assert_eq!(affinity("sessionAffinity: None"), None);
        assert_eq!(affinity("sessionAffinity: ClientIP"), Some(10_800));
        assert_eq!(
            affinity("sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 7}}"),
            Some(7)
        );
    }

    #[test]
    fn ingress_counts_only_as_a_vip() {
        let (service, _) = convert(
            "{metadata: {name: a}, spec: {clusterIP: 10.0.0.1}, status: {loadBalancer: {ingress: [{ip: 192.0.2.1}, {ip: 192.0.2.2, ipMode: Proxy}, {hostname: h}, {ip: 192.0.2.3, ipMode: VIP}]}}}",
        );
        let ips: Vec<String> = service.unwrap().load_balancer_ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["192.0.2.1", "192.0.2.3"]);
    }

    #[test]
    fn missing_conditions_mean_ready() {
        let object = serde_yaml_ng::from_str(
            "{metadata: {name: s, labels: {kubernetes.io/service-name: web}}, addressType: IPv4, ports: [{name: http, port: 8080}, {name: x}], endpoints: [{addresses: [10.1.0.1, 10.1.0.2]}, {addresses: ['fd00::1']}]}",
        )
        .unwrap();
        let mut warnings = Vec::new();
        let slice = endpoint_slice(&object, &mut warnings).unwrap();
        assert_eq!((slice.ports.len(), slice.endpoints.len(), warnings.len()), (1, 1, 1));
        let endpoint = &slice.endpoints[0];
        assert!(endpoint.ready && endpoint.serving && !endpoint.terminating);
    }

    #[test]
    fn ports_without_even_an_empty_name_or_without_a_number_are_left_out() {
        let object = serde_yaml_ng::from_str(
            "{metadata: {name: s, labels: {kubernetes.io/service-name: web}}, addressType: IPv4, ports: [{port: 80}, {name: '', port: 8080}, {name: zero, port: 0}, {name: none}], endpoints: []}",
        )
        .unwrap();
        let mut warnings = Vec::new();
        let ports = endpoint_slice(&object, &mut warnings).unwrap().ports;
        assert_eq!(ports, [SlicePort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }]);
        let told: Vec<String> = warnings.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            ["EndpointSlice default/s: ports[0].name: is not there, not even empty; the port is left out"]
        );
    }

    #[test]
    fn endpoints_that_would_be_the_node_itself_are_left_out() {
        let object = serde_yaml_ng::from_str(
            "{metadata: {name: s, labels: {kubernetes.io/service-name: web}}, addressType: IPv4, endpoints: [{addresses: [127.0.0.1]}, {addresses: [0.0.0.0]}, {addresses: [169.254.169.254]}, {addresses: [224.0.0.1]}, {addresses: [10.1.0.1]}]}",
        )
        .unwrap();
        let mut warnings = Vec::new();
        let slice = endpoint_slice(&object, &mut warnings).unwrap();
        assert_eq!((slice.endpoints.len(), warnings.len()), (1, 4));
        assert_eq!(
            warnings[0].to_string(),
            "EndpointSlice default/s: endpoints[0].addresses[0]: 127.0.0.1 is no address of an endpoint; it is left out"
        );
    }

    #[test]
    fn a_node_that_goes_is_not_eligible() {
        for (text, eligible) in [
            ("metadata: {name: n}", true),
            (
                "metadata: {name: n}, spec: {taints: [{key: other, effect: NoSchedule}]}, status: {conditions: [{type: Ready, status: 'False'}]}",
                true,
            ),
            (
                "metadata: {name: n}, spec: {taints: [{key: other, effect: NoSchedule}, {key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]}",
                false,
            ),
            ("metadata: {name: n, deletionTimestamp: '2026-01-02T03:04:05Z'}", false),
        ] {
            let object = serde_yaml_ng::from_str(&format!("{{{text}}}")).unwrap();
            assert_eq!(node(&object, &mut Vec::new()).eligible, eligible, "{text}");
        }
    }

    #[test]
    fn a_slice_says_when_it_was_triggered() {
        let slice = |time: &str| {
            let text = format!(
                "{{metadata: {{name: s, labels: {{kubernetes.io/service-name: web}}, annotations: {{endpoints.kubernetes.io/last-change-trigger-time: '{time}'}}}}, addressType: IPv4, endpoints: []}}"
            );
            endpoint_slice(&serde_yaml_ng::from_str(&text).unwrap(), &mut Vec::new()).unwrap().triggered
        };
        let known = std::time::UNIX_EPOCH + std::time::Duration::from_millis(1_700_000_000_250);
        assert_eq!(slice("2023-11-14T22:13:20.25Z"), Some(known));
        assert_eq!(slice("yesterday"), None);
    }

    #[test]
    fn a_pod_with_ips_and_no_conditions_is_ready() {
        let object = serde_yaml_ng::from_str(
            "{metadata: {name: p}, spec: {containers: [{name: c, ports: [{containerPort: 80, name: web}]}]}, status: {podIP: 10.1.0.1}}",
        )
        .unwrap();
        let pod = pod(&object, &mut Vec::new());
        assert!(pod.ready);
        assert_eq!((pod.ips.len(), pod.ports.len()), (1, 1));
    }
}
