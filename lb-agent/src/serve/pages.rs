//! The metrics port: `/metrics`, and what else kube-proxy shows there (`cmd/kube-proxy/app/server.go` `serveMetrics`,
//! `component-base/zpages`). Profiles of a Go program there are none.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc, time::SystemTime};

use axum::{
    Router,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    middleware::map_response,
    response::Response,
    routing::any,
};
use k8s_openapi::jiff::{Timestamp, tz::TimeZone};
use serde_json::json;

use super::{Health, JSON, TEXT, answer};
use crate::{datapath::ebpf::maps::Pins, kube_proxy::NOT_KUBE_PROXY};

/// Group of kube-proxy's configuration.
const CONFIG_GROUP: &str = "kubeproxy.config.k8s.io";

#[derive(Clone)]
struct Shared {
    health: Arc<Health>,
    pins: Pins,
}

/// All pages of the metrics port.
pub(super) fn router(health: Arc<Health>, pins: Pins) -> Router {
    Router::new()
        .route("/metrics", any(metrics))
        // Nothing in kube-proxy reports to it (`component-base/metrics/prometheus/slis`).
        .route("/metrics/slis", any(async || answer(StatusCode::OK, METRICS, String::new())))
        .route("/healthz", any(async || answer(StatusCode::OK, TEXT, "ok".into())))
        .route("/proxyMode", any(proxy_mode))
        .route("/configz", any(configz))
        .route("/statusz", any(statusz))
        .route("/flagz", any(async || answer(StatusCode::OK, TEXT, flags(std::env::args().skip(1)))))
        // Else `cleanup` would take a running agent for a kube-proxy.
        .layer(map_response(async |mut response: Response| {
            response.headers_mut().insert(header::SERVER, HeaderValue::from_static(NOT_KUBE_PROXY));
            response
        }))
        .with_state(Shared { health, pins })
}

/// Prometheus's text format.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

async fn metrics(State(Shared { health, pins }): State<Shared>) -> Response {
    let text = health.metrics.text(health.mode(), &pins);
    answer(StatusCode::OK, METRICS, text)
}

async fn proxy_mode(State(shared): State<Shared>) -> Response {
    answer(StatusCode::OK, TEXT, shared.health.mode().name().into())
}

async fn configz(State(shared): State<Shared>) -> Response {
    let config = shared.health.configz();
    let config = config.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    answer(StatusCode::OK, JSON, json!({ CONFIG_GROUP: *config }).to_string())
}

const WARNING: &str = "Warning: This endpoint is not meant to be machine parseable, has no formatting compatibility guarantees and is for debugging purposes only.";

async fn statusz(State(shared): State<Shared>) -> Response {
    answer(StatusCode::OK, TEXT, status(shared.health.metrics.started, SystemTime::now()))
}

fn status(started: SystemTime, now: SystemTime) -> String {
    let up = now.duration_since(started).unwrap_or_default().as_secs();
    let date = Timestamp::try_from(started).unwrap_or_default().to_zoned(TimeZone::UTC);
    let date = date.strftime("%a %b %e %H:%M:%S UTC %Y");
    let up = format!("{} hr {:02} min {:02} sec", up / 3600, up / 60 % 60, up % 60);
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "\nkube-proxy statusz\n{WARNING}\n\nStarted: {date}\nUp: {up}\nBinary version: lb-agent {version}\n"
    )
}

/// What was typed, by name.
fn flags(typed: impl Iterator<Item = String>) -> String {
    let mut flags: BTreeMap<String, String> = BTreeMap::new();
    let mut last: Option<String> = None;
    for word in typed {
        if let Some(flag) = word.strip_prefix("--") {
            let (name, value) = flag.split_once('=').unwrap_or((flag, "true"));
            flags.insert(name.to_owned(), value.to_owned());
            last = (!flag.contains('=')).then(|| name.to_owned());
        } else if let Some(name) = last.take() {
            flags.insert(name, word);
        }
    }
    let mut text = format!("\nkube-proxy flags\n{WARNING}\n\n");
    for (name, value) in flags {
        let _ = writeln!(text, "{name}={value}");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn the_configuration_is_shown_under_its_group() {
        let health = Arc::new(Health::default());
        let shared = Shared { health: health.clone(), pins: Pins::new(std::path::Path::new("/nowhere")) };
        let shown = async || {
            let body = configz(State(shared.clone())).await.into_body();
            let body = axum::body::to_bytes(body, 4096).await.unwrap();
            serde_json::from_slice::<serde_json::Value>(&body).unwrap()
        };
        assert_eq!(shown().await, json!({ "kubeproxy.config.k8s.io": {} }));
        let config = json!({ "mode": "nftables", "iptables": { "syncPeriod": "30s" } });
        health.set_configz(config.clone());
        assert_eq!(shown().await, json!({ "kubeproxy.config.k8s.io": config }));
    }

    #[test]
    fn flags_are_those_that_were_typed() {
        let typed = "run --mode ebpf --dry-run --node-name=node-1 --cluster-cidr 10.0.0.0/8";
        let text = flags(typed.split(' ').map(str::to_owned));
        let expected = "\n\ncluster-cidr=10.0.0.0/8\ndry-run=true\nmode=ebpf\nnode-name=node-1\n";
        assert!(text.starts_with("\nkube-proxy flags\nWarning: ") && text.ends_with(expected), "{text}");
    }

    #[test]
    fn the_status_is_readable() {
        let started = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let text = status(started, started + Duration::from_secs(7_384));
        let expected =
            "\n\nStarted: Tue Nov 14 22:13:20 UTC 2023\nUp: 2 hr 03 min 04 sec\nBinary version: lb-agent ";
        assert!(text.starts_with("\nkube-proxy statusz\nWarning: ") && text.contains(expected), "{text}");
    }
}
