//! Endpoints derived from Pods, for manifests without EndpointSlices: what the endpointslice controller would write
//! (`pkg/controller/endpointslice` and `staging/src/k8s.io/endpointslice`).

use crate::model::{
    Endpoint, EndpointSlice, Family, ObjectName, Pod, Service, ServicePort, SlicePort, TargetPort,
};

/// Does the Service's selector choose the Pod? A Service without selector chooses none.
pub(crate) fn selects(service: &Service, pod: &Pod) -> bool {
    service.name.namespace == pod.name.namespace
        && !service.selector.is_empty()
        && service.selector.iter().all(|(key, value)| pod.labels.get(key) == Some(value))
}

/// One slice for each Pod, family and port: a named target port may be another number in each Pod.
pub(crate) fn slices<'a>(service: &Service, pods: impl Iterator<Item = &'a Pod>) -> Vec<EndpointSlice> {
    let mut slices = Vec::new();
    for pod in pods.filter(|pod| selects(service, pod)) {
        let ports: Vec<SlicePort> = service.ports.iter().filter_map(|port| target(port, pod)).collect();
        for addr in &pod.ips {
            let endpoint = Endpoint {
                addr: *addr,
                ready: (pod.ready && !pod.terminating) || service.publish_not_ready,
                serving: pod.ready,
                terminating: pod.terminating,
                node: pod.node.clone(),
                zone_hints: Vec::new(),
                node_hints: Vec::new(),
            };
            slices.push(EndpointSlice {
                triggered: None,
                name: ObjectName::new(pod.name.namespace.clone(), format!("{}-{addr}", pod.name.name)),
                service: service.name.clone(),
                family: Family::of(*addr),
                ports: ports.clone(),
                endpoints: vec![endpoint],
            });
        }
    }
    slices
}

/// The Pod's port behind a service port; none if the Pod doesn't declare the name.
fn target(port: &ServicePort, pod: &Pod) -> Option<SlicePort> {
    let number = match &port.target {
        TargetPort::Number(number) => *number,
        TargetPort::Name(name) => {
            pod.ports
                .iter()
                .find(|declared| declared.name == *name && declared.protocol == port.protocol)?
                .port
        }
    };
    Some(SlicePort { name: port.name.clone(), protocol: port.protocol, port: number })
}
