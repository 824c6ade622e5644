//! Which endpoints may serve a service port here (kube-proxy `topology.go` `CategorizeEndpoints`).

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use crate::{
    compile::NodeView,
    model::{Endpoint, EndpointSlice, Family, ServicePort},
};

/// The endpoints of one service port in one family, each address and port once.
pub(super) struct Endpoints<'a> {
    all: BTreeMap<SocketAddr, &'a Endpoint>,
    node: &'a NodeView,
    zone: Option<&'a str>,
}

impl<'a> Endpoints<'a> {
    /// A slice's ports and a service's meet by name and protocol. One endpoint may stand in two slices while it
    /// moves: the one that isn't terminating counts.
    pub(super) fn of(
        port: &ServicePort,
        family: Family,
        slices: &'a [EndpointSlice],
        node: &'a NodeView,
        zone: Option<&'a str>,
    ) -> Self {
        let mut all: BTreeMap<SocketAddr, &Endpoint> = BTreeMap::new();
        for slice in slices.iter().filter(|slice| slice.family == family) {
            for slice_port in &slice.ports {
                if slice_port.name != port.name || slice_port.protocol != port.protocol {
                    continue;
                }
                for endpoint in slice.endpoints.iter().filter(|one| Family::of(one.addr) == family) {
                    let at = SocketAddr::new(endpoint.addr, slice_port.port);
                    let terminates_too = all.get(&at).is_none_or(|known| known.terminating);
                    if terminates_too && (!all.contains_key(&at) || !endpoint.terminating) {
                        all.insert(at, endpoint);
                    }
                }
            }
        }
        Self { all, node, zone }
    }

    /// Somebody could serve, here or elsewhere: else clients are told, rather than left waiting.
    pub(super) fn any(&self) -> bool {
        self.all.values().any(|endpoint| endpoint.ready || draining(endpoint))
    }

    /// For policy Cluster: those that are ready and that hints leave to this node; if nobody is ready anywhere, those
    /// that drain, wherever they are.
    pub(super) fn cluster(&self) -> Vec<SocketAddr> {
        let ready: Vec<(&SocketAddr, &&Endpoint)> = self.all.iter().filter(|(_, one)| one.ready).collect();
        let hinted_here =
            |hints: fn(&Endpoint) -> Vec<&str>, here: Option<&str>| -> Option<Vec<SocketAddr>> {
                let here = here?;
                if ready.iter().any(|(_, endpoint)| hints(endpoint).is_empty()) {
                    return None;
                }
                let ours: Vec<SocketAddr> = ready
                    .iter()
                    .filter(|(_, endpoint)| hints(endpoint).contains(&here))
                    .map(|(at, _)| **at)
                    .collect();
                (!ours.is_empty()).then_some(ours)
            };
        let of_node =
            hinted_here(|one| one.node_hints.iter().map(|hint| &**hint).collect(), Some(&self.node.name));
        let of_zone = || hinted_here(|one| one.zone_hints.iter().map(|hint| &**hint).collect(), self.zone);
        if let Some(ours) = of_node.or_else(of_zone) {
            return ours;
        }
        match ready.is_empty() {
            false => ready.into_iter().map(|(at, _)| *at).collect(),
            true => self.which(draining),
        }
    }

    /// For policy Local: those of this node that are ready, else those of it that drain. Hints don't count.
    pub(super) fn local(&self) -> Vec<SocketAddr> {
        let ready = self.which(|endpoint| endpoint.ready && self.is_here(endpoint));
        match ready.is_empty() {
            false => ready,
            true => self.which(|endpoint| draining(endpoint) && self.is_here(endpoint)),
        }
    }

    /// Those that serve, by no policy.
    pub(super) fn serving(&self) -> Vec<SocketAddr> {
        self.which(|endpoint| endpoint.serving)
    }

    /// The endpoint is on this node.
    pub(super) fn here(&self, at: &SocketAddr) -> bool {
        self.all.get(at).is_some_and(|endpoint| self.is_here(endpoint))
    }

    /// The endpoint is this node itself: a pod on its network.
    pub(super) fn is_node(&self, addr: IpAddr) -> bool {
        self.node.addresses.contains(&addr)
    }

    fn is_here(&self, endpoint: &Endpoint) -> bool {
        endpoint.node.as_deref() == Some(&*self.node.name)
    }

    fn which(&self, wanted: impl Fn(&Endpoint) -> bool) -> Vec<SocketAddr> {
        self.all.iter().filter(|(_, endpoint)| wanted(endpoint)).map(|(at, _)| *at).collect()
    }
}

fn draining(endpoint: &Endpoint) -> bool {
    endpoint.serving && endpoint.terminating
}
