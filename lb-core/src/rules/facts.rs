//! What rules of either kind ask of a service port (kube-proxy `syncProxyRules`, before it writes anything).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::{
    model::{Family, Protocol},
    table::{
        Backend, BackendList, Changes, Frontend, FrontendAddr, FrontendKind, NoBackends, ServiceEntry,
        ServicePortId, ServiceTable,
    },
};

/// Whose frontends are whose, in one family, as of the last [`Owners::learn`].
#[derive(Debug, Default)]
pub(super) struct Owners {
    owners: BTreeMap<FrontendAddr, ServicePortId>,
    frontends: BTreeMap<ServicePortId, BTreeSet<FrontendAddr>>,
}

impl Owners {
    /// Follows the table, and says which service ports have to be written anew.
    pub(super) fn learn(
        &mut self,
        table: &ServiceTable,
        changes: &Changes,
        family: Family,
    ) -> BTreeSet<ServicePortId> {
        let services = changes.services.iter().filter(|id| id.family == family);
        let mut touched: BTreeSet<ServicePortId> = services.cloned().collect();
        for addr in changes.frontends.iter().filter(|addr| Family::of(addr.addr) == family) {
            if let Some(before) = self.owners.remove(addr) {
                if let Some(frontends) = self.frontends.get_mut(&before) {
                    frontends.remove(addr);
                    if frontends.is_empty() {
                        self.frontends.remove(&before);
                    }
                }
                touched.insert(before);
            }
            if let Some(frontend) = table.frontends.get(addr) {
                self.owners.insert(*addr, frontend.service.clone());
                self.frontends.entry(frontend.service.clone()).or_default().insert(*addr);
                touched.insert(frontend.service.clone());
            }
        }
        touched
    }

    /// The service ports with frontends on an address.
    pub(super) fn of_address(&self, addr: IpAddr) -> impl Iterator<Item = &ServicePortId> {
        let first = FrontendAddr { addr, port: 0, protocol: Protocol::Tcp };
        self.owners.range(first..).take_while(move |(frontend, _)| frontend.addr == addr).map(|(_, id)| id)
    }

    /// A service port's frontends.
    pub(super) fn frontends<'a>(
        &self,
        table: &'a ServiceTable,
        id: &ServicePortId,
    ) -> Vec<(FrontendAddr, &'a Frontend)> {
        let addrs = self.frontends.get(id).into_iter().flatten();
        addrs.filter_map(|addr| table.frontends.get(addr).map(|frontend| (*addr, frontend))).collect()
    }
}

/// One service port with its frontends.
pub(super) struct Facts<'a> {
    pub(super) id: &'a ServicePortId,
    pub(super) name: String,
    pub(super) entry: &'a ServiceEntry,
    pub(super) frontends: &'a [(FrontendAddr, &'a Frontend)],
    /// There are endpoints, if only ones that no policy may use here.
    pub(super) has_endpoints: bool,
}

impl<'a> Facts<'a> {
    pub(super) fn new(
        id: &'a ServicePortId,
        entry: &'a ServiceEntry,
        frontends: &'a [(FrontendAddr, &'a Frontend)],
    ) -> Self {
        let has_endpoints = frontends.iter().any(|(_, frontend)| frontend.external.none == NoBackends::Drop);
        Self { id, name: id.to_string(), entry, frontends, has_endpoints }
    }

    pub(super) fn of_kind(&self, kind: FrontendKind) -> impl Iterator<Item = (&FrontendAddr, &Frontend)> {
        let of_kind = move |entry: &&(FrontendAddr, &Frontend)| entry.1.kind == kind;
        self.frontends.iter().filter(of_kind).map(|(addr, frontend)| (addr, *frontend))
    }

    /// The policy of frontends that are dialled from outside; `None` if there are none.
    pub(super) fn external_list(&self) -> Option<BackendList> {
        let mut outside =
            self.frontends.iter().filter(|(_, frontend)| frontend.kind != FrontendKind::ClusterIp);
        outside.next().map(|(_, frontend)| frontend.external.list)
    }

    pub(super) fn backends(&self, list: BackendList) -> &[Backend] {
        match list {
            BackendList::Cluster => &self.entry.cluster,
            BackendList::Local => &self.entry.local,
        }
    }

    /// Whether packets from outside find an endpoint.
    pub(super) fn has_external_endpoints(&self) -> bool {
        self.external_list().is_some_and(|list| !self.backends(list).is_empty())
    }

    pub(super) fn has_load_balancer_ips(&self) -> bool {
        self.of_kind(FrontendKind::LoadBalancer).next().is_some()
    }

    pub(super) fn source_ranges(&self) -> &[IpNet] {
        self.of_kind(FrontendKind::LoadBalancer).next().map_or(&[], |(_, frontend)| &frontend.source_ranges)
    }

    pub(super) fn uses_firewall(&self) -> bool {
        self.has_endpoints && self.has_load_balancer_ips() && !self.source_ranges().is_empty()
    }
}
