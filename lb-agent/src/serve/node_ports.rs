//! `healthCheckNodePort`: a server for each Service whose load balancer asks which nodes have endpoints of it
//! (kube-proxy: `healthcheck/service_health.go`).

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{Router, extract::State, http::StatusCode, response::Response};
use futures::future::join_all;
use lb_core::{model::ObjectName, table::HealthCheck};
use tracing::{info, warn};

use super::{Health, JSON, Server, answer, health::Checks, holder};
use crate::source::{About, Notice, Notices};

/// How often a port that somebody else has is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// It carries the count of endpoints, for load balancers that weigh nodes by it.
const WEIGHT: &str = "x-load-balancing-endpoint-weight";

/// Where a Service's health is asked for: port and addresses, `None` is all.
type Place = (u16, Option<BTreeSet<IpAddr>>);

/// Servers that are open, and those that could not be.
struct NodePorts {
    health: Arc<Health>,
    notices: Notices,
    open: BTreeMap<ObjectName, (Place, Vec<Server>)>,
    /// What was said of each.
    failed: BTreeMap<ObjectName, String>,
}

/// Follows the Services until it is aborted.
pub async fn run(health: Arc<Health>, notices: Notices) {
    let mut checks = health.checks();
    let mut ports = NodePorts { health, notices, open: BTreeMap::new(), failed: BTreeMap::new() };
    loop {
        let wanted = checks.borrow_and_update().clone();
        ports.follow(&wanted).await;
        tokio::select! {
            changed = checks.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if !ports.failed.is_empty() => {}
        }
    }
}

impl NodePorts {
    /// Closes what is not wanted any more first: a port may have moved from one Service to another.
    async fn follow(&mut self, wanted: &Checks) {
        let place = |name: &ObjectName| wanted.get(name).map(place);
        let gone: Vec<ObjectName> = self
            .open
            .iter()
            .filter(|(name, (at, _))| place(name).as_ref() != Some(at))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            if let Some(((port, _), servers)) = self.open.remove(&name) {
                info!(service = %name, port, "health check port closed");
                join_all(servers.into_iter().map(Server::stop)).await;
            }
        }
        self.failed.retain(|name, _| wanted.contains_key(name));
        for (name, check) in
            wanted.iter().filter(|(name, _)| !self.open.contains_key(*name)).collect::<Vec<_>>()
        {
            self.open(name, check).await;
        }
    }

    async fn open(&mut self, name: &ObjectName, check: &HealthCheck) {
        match listen(name, check, &self.health) {
            Ok(servers) => {
                info!(service = %name, port = check.port, "health check port open");
                self.failed.remove(name);
                self.open.insert(name.clone(), (place(check), servers));
            }
            Err((addr, error)) => self.complain(name, check.port, addr, &error).await,
        }
    }

    /// Says it once, not at each try.
    async fn complain(&mut self, name: &ObjectName, port: u16, addr: IpAddr, error: &io::Error) {
        // It looks at every process.
        let holder = tokio::task::spawn_blocking(move || holder::of(port)).await.ok().flatten();
        let text = format!("{port} {addr} {error} {holder:?}");
        if self.failed.insert(name.clone(), text.clone()) == Some(text) {
            return;
        }
        warn!(
            service = %name,
            port,
            %addr,
            %error,
            holder = holder.as_deref().unwrap_or("unknown"),
            "the Service's health check port can't be opened: load balancers take this node for one without endpoints; trying again"
        );
        let by = holder.map(|holder| format!("; {holder} has it")).unwrap_or_default();
        let node = self.health.node();
        let notice = Notice {
            about: About::Service(name.clone()),
            warning: true,
            reason: "FailedToStartServiceHealthcheck",
            action: "Listen",
            note: format!("node {node} failed to start healthcheck \"{name}\" on port {port}: {error}{by}"),
        };
        self.notices.send(notice);
    }
}

fn place(check: &HealthCheck) -> Place {
    (check.port, check.addresses.clone())
}

/// Listens on all addresses or on none.
fn listen(
    name: &ObjectName,
    check: &HealthCheck,
    health: &Arc<Health>,
) -> Result<Vec<Server>, (IpAddr, io::Error)> {
    let everywhere = || BTreeSet::from([Ipv4Addr::UNSPECIFIED.into()]);
    let open = |addr: IpAddr| {
        let router = Router::new().fallback(page).with_state((name.clone(), health.clone()));
        Server::open(SocketAddr::new(addr, check.port), router).map_err(|error| (addr, error))
    };
    check.addresses.clone().unwrap_or_else(everywhere).into_iter().map(open).collect()
}

/// 200 if load balancers may send the Service's traffic here. Any path and method will do.
async fn page(State((name, health)): State<(ObjectName, Arc<Health>)>) -> Response {
    said(&name, health.local_endpoints(&name), health.follows())
}

fn said(name: &ObjectName, count: usize, healthy: bool) -> Response {
    let status = if count > 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": {:?},\n\t\t\"name\": {:?}\n\t}},\n\t\"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": {healthy}\n}}",
        &*name.namespace, &*name.name
    );
    let mut response = answer(status, JSON, body);
    response.headers_mut().insert(WEIGHT, count.into());
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn load_balancers_read_status_weight_and_body() {
        let name = ObjectName::new("shop", "web");
        for (count, healthy, status) in [(2, true, 200), (0, true, 503), (2, false, 503), (0, false, 503)] {
            let response = said(&name, count, healthy);
            let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
            assert_eq!(response.status().as_u16(), status, "{count} {healthy}");
            assert_eq!(header("content-type"), "application/json");
            assert_eq!(header("x-content-type-options"), "nosniff");
            assert_eq!(header("x-load-balancing-endpoint-weight"), count.to_string());
            let body = axum::body::to_bytes(response.into_body(), 4096).await.unwrap();
            let text = format!(
                "{{\n\t\"service\": {{\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t}},\n\t\"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
            );
            assert_eq!(String::from_utf8_lossy(&body), text);
        }
    }
}
