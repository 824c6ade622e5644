//! `/healthz`, `/livez` and `/metrics`.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use axum::{Json, Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use lb_core::{model::Family, table::ServiceTable};
use serde_json::json;
use tokio::task::JoinSet;

use crate::{
    datapath::ebpf::maps::{Pins, metrics},
    retire::Left,
};

/// What the programming thread has achieved.
#[derive(Default)]
pub struct Health(Mutex<Inner>);

#[derive(Clone, Default)]
struct Inner {
    last_sync: Option<SystemTime>,
    last_duration: Duration,
    syncs: u64,
    errors: u64,
    error: Option<String>,
    services: usize,
    frontends: usize,
    backends: usize,
    refused: usize,
    draining: Left,
    /// Of each family: how often conntrack was reconciled, how long that took, and how many entries it cost.
    reconciled: BTreeMap<Family, (u64, Duration, u64)>,
    /// Of a dry run: mode, and differences between its table and the kernel.
    differences: Option<(&'static str, usize)>,
}

impl Health {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A table was programmed.
    pub fn applied(&self, table: &ServiceTable, elapsed: Duration, refused: usize) {
        let mut inner = self.lock();
        inner.last_sync = Some(SystemTime::now());
        inner.last_duration = elapsed;
        inner.syncs += 1;
        inner.error = None;
        inner.services = table.services.len();
        inner.frontends = table.frontends.len();
        inner.backends = table.services.values().map(|entry| entry.serving.len()).sum();
        inner.refused = refused;
    }

    /// So many connections of other modes are carried on.
    pub fn draining(&self, left: Left) {
        self.lock().draining = left;
    }

    /// netfilter's flows of a family were reconciled with the table; so many were forgotten.
    pub fn reconciled(&self, family: Family, elapsed: Duration, deleted: u64) {
        let mut inner = self.lock();
        let (count, time, entries) = inner.reconciled.entry(family).or_default();
        *count += 1;
        *time += elapsed;
        *entries += deleted;
    }

    /// A dry run found so many differences.
    pub fn differs(&self, mode: &'static str, count: usize) {
        self.lock().differences = Some((mode, count));
    }

    /// A table could not be programmed.
    pub fn failed(&self, error: &str) {
        let mut inner = self.lock();
        inner.errors += 1;
        inner.error = Some(error.to_owned());
    }
}

#[derive(Clone)]
struct Shared {
    health: Arc<Health>,
    pins: Pins,
}

/// Starts both servers.
///
/// They end when what is returned is dropped.
pub async fn start(
    healthz: SocketAddr,
    metrics: SocketAddr,
    health: Arc<Health>,
    pins: Pins,
) -> Result<JoinSet<std::io::Result<()>>> {
    let mut servers = JoinSet::new();
    let shared = Shared { health, pins };
    let health_router = Router::new().route("/healthz", get(health_page)).route("/livez", get(live_page));
    serve(&mut servers, healthz, "--healthz-bind-address", health_router.with_state(shared.clone())).await?;
    let metrics_router = Router::new().route("/metrics", get(metrics_page)).with_state(shared);
    serve(&mut servers, metrics, "--metrics-bind-address", metrics_router).await?;
    Ok(servers)
}

async fn serve(
    servers: &mut JoinSet<std::io::Result<()>>,
    addr: SocketAddr,
    option: &str,
    router: Router,
) -> Result<()> {
    let listener = tokio::net::TcpListener::bind(addr).await.with_context(|| {
        format!("listen on {addr}: is another proxy running? choose another with {option}")
    })?;
    servers.spawn(async move { axum::serve(listener, router).await });
    Ok(())
}

/// 200 once this node is programmed, and as long as writes succeed.
async fn health_page(State(shared): State<Shared>) -> impl IntoResponse {
    let inner = shared.health.lock().clone();
    let reason = match (&inner.last_sync, &inner.error) {
        (_, Some(error)) => Some(error.clone()),
        (None, None) => Some("not programmed yet: waiting for the first full list of objects".to_owned()),
        (Some(_), None) => None,
    };
    let status = if reason.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (
        status,
        Json(
            json!({ "healthy": reason.is_none(), "reason": reason, "lastUpdated": unix_secs(inner.last_sync) }),
        ),
    )
}

/// 200 as long as the agent answers: a node that can't be programmed isn't helped by a restart.
async fn live_page() -> impl IntoResponse {
    (StatusCode::OK, Json(json!({ "alive": true })))
}

async fn metrics_page(State(shared): State<Shared>) -> String {
    let inner = shared.health.lock().clone();
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, value: f64| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    };
    metric("lb_services", "gauge", "Service ports served.", inner.services as f64);
    metric("lb_frontends", "gauge", "Frontends served.", inner.frontends as f64);
    metric("lb_backends", "gauge", "Backends of all service ports.", inner.backends as f64);
    metric(
        "lb_refused_service_ports",
        "gauge",
        "Service ports without a place in the maps.",
        inner.refused as f64,
    );
    metric("lb_syncs_total", "counter", "Tables programmed.", inner.syncs as f64);
    metric("lb_sync_errors_total", "counter", "Tables that could not be programmed.", inner.errors as f64);
    metric(
        "lb_sync_duration_seconds",
        "gauge",
        "Duration of the last sync.",
        inner.last_duration.as_secs_f64(),
    );
    metric(
        "lb_sync_last_timestamp_seconds",
        "gauge",
        "Unix time of the last sync.",
        unix_secs(inner.last_sync),
    );
    let _ = writeln!(
        text,
        "# HELP lb_draining_connections Connections of other modes that are carried on until they end.\n# TYPE lb_draining_connections gauge"
    );
    for (mode, connections) in &inner.draining {
        let _ = writeln!(text, "lb_draining_connections{{mode=\"{mode}\"}} {connections}");
    }
    reconciler_metrics(&mut text, &inner);
    if let Some((mode, count)) = inner.differences {
        let name = "lb_dry_run_differences";
        let _ =
            writeln!(text, "# HELP {name} Differences between what this node should have and what it has.");
        let _ = writeln!(text, "# TYPE {name} gauge\n{name}{{mode=\"{mode}\"}} {count}");
    }
    if let Ok(counters) = metrics(&shared.pins) {
        let _ = writeln!(
            text,
            "# HELP lb_packets_total Program runs by outcome.\n# TYPE lb_packets_total counter"
        );
        for (hook, outcome, count) in counters {
            let (hook, outcome) = (hook.as_str(), outcome.as_str());
            let _ = writeln!(text, "lb_packets_total{{hook=\"{hook}\",outcome=\"{outcome}\"}} {count}");
        }
    }
    text
}

/// Under kube-proxy's names.
fn reconciler_metrics(text: &mut String, inner: &Inner) {
    let prefix = "kubeproxy_conntrack_reconciler";
    if !inner.reconciled.is_empty() {
        let _ = writeln!(
            text,
            "# HELP {prefix}_sync_duration_seconds Duration of conntrack's reconciliation.\n# TYPE {prefix}_sync_duration_seconds histogram\n# HELP {prefix}_deleted_entries_total Entries deleted from conntrack.\n# TYPE {prefix}_deleted_entries_total counter"
        );
    }
    for (family, (count, time, entries)) in &inner.reconciled {
        let name = format!("{prefix}_sync_duration_seconds");
        let _ = writeln!(
            text,
            "{name}_bucket{{ip_family=\"{family}\",le=\"+Inf\"}} {count}\n{name}_sum{{ip_family=\"{family}\"}} {}\n{name}_count{{ip_family=\"{family}\"}} {count}\n{prefix}_deleted_entries_total{{ip_family=\"{family}\"}} {entries}",
            time.as_secs_f64()
        );
    }
}

fn unix_secs(time: Option<SystemTime>) -> f64 {
    time.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map_or(0.0, |since| since.as_secs_f64())
}
