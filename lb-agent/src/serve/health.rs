//! `/healthz` and `/livez`, and what they tell of: kube-proxy's answers (`healthcheck/proxy_health.go`).
//!
//! A node is healthy unless a change has been waiting for longer than two sync periods. One rule is our own: `/healthz`
//! is not 200 before the node is programmed for the first time, where kube-proxy's is; `/livez` is, as kube-proxy's. Why
//! the last write failed stands in `reason`, which kube-proxy has not. Both families are programmed together and so have
//! one state.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant, SystemTime},
};

use axum::{extract::State as Shared, http::StatusCode, response::Response};
use k8s_openapi::jiff::Timestamp;
use lb_core::{
    model::{Event, Family, ObjectName},
    table::{Changes, HealthCheck, ServiceTable},
};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;

use super::{JSON, answer, metrics::Metrics};
use crate::{
    args::Mode,
    datapath::{ApplyReport, DatapathError},
    retire::Left,
    source::calls::Calls,
};

/// Services whose load balancers ask this node.
pub type Checks = BTreeMap<ObjectName, HealthCheck>;

/// What the programming thread has achieved, for all who ask. It outlives a restart of the agent within its process.
pub struct Health {
    state: Mutex<State>,
    /// Numbers.
    pub(super) metrics: Metrics,
    checks: watch::Sender<Checks>,
    configz: Arc<RwLock<Value>>,
}

struct State {
    node: Arc<str>,
    mode: Mode,
    /// A change may wait for so long.
    limit: Duration,
    /// When the kernel last had all that was known.
    updated: Option<SystemTime>,
    /// The agent that runs has programmed all that it knew: from then on what waits is late some day.
    begun: bool,
    /// Since when the oldest change waits.
    waiting: Option<Instant>,
    eligible: bool,
    error: Option<String>,
    pending: Pending,
}

/// Changes that are not in the kernel yet.
#[derive(Default)]
struct Pending {
    services: BTreeSet<ObjectName>,
    endpoints: BTreeSet<ObjectName>,
    /// When what endpoints follow changed.
    triggers: Vec<(Family, SystemTime)>,
}

/// Triggers that are remembered while nothing can be programmed; later ones don't count.
const MOST_TRIGGERS: usize = 10_000;

/// kube-proxy's default `syncPeriod`.
pub const SYNC_PERIOD: Duration = Duration::from_secs(30);

impl Default for Health {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                node: Arc::from(""),
                mode: Mode::Ebpf,
                limit: 2 * SYNC_PERIOD,
                updated: None,
                begun: false,
                waiting: None,
                eligible: true,
                error: None,
                pending: Pending::default(),
            }),
            metrics: Metrics::default(),
            checks: watch::channel(Checks::new()).0,
            configz: Arc::new(RwLock::new(Value::Object(serde_json::Map::new()))),
        }
    }
}

impl Health {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An agent starts, maybe not the first of this process: this node, what serves it, and how often all is looked at.
    pub fn start(&self, node: Arc<str>, mode: Mode, sync_period: Duration) {
        let mut state = self.lock();
        (state.node, state.mode, state.limit) = (node, mode, 2 * sync_period);
        // The kernel has what the last one knew, however long it takes until this one knows as much.
        (state.begun, state.waiting) = (false, None);
        self.metrics.start();
    }

    /// Where answers of the API server are counted.
    pub fn calls(&self) -> Calls {
        self.metrics.calls.clone()
    }

    /// The cluster changed: the kernel has to follow.
    pub fn queued(&self, events: &[Event]) {
        let mut state = self.lock();
        for event in events {
            self.note(&mut state, event);
        }
        self.metrics.pending(state.pending.services.len(), state.pending.endpoints.len());
        state.queued();
        self.metrics.queued();
    }

    /// The cluster has no Node of this name: as if it were deleted.
    pub fn node_is_missing(&self) {
        self.lock().eligible = false;
    }

    /// Something else that the kernel has to follow changed.
    pub fn queued_anew(&self) {
        self.lock().queued();
        self.metrics.queued();
    }

    fn note(&self, state: &mut State, event: &Event) {
        match event {
            Event::Service(service) => self.note_service(state, &service.name),
            Event::ServiceGone(name) => self.note_service(state, name),
            Event::EndpointSlice(slice) => {
                self.metrics.endpoint_changes.inc();
                state.pending.endpoints.insert(slice.service.clone());
                // What changed before this process began was another's to program.
                let counts = |time: &SystemTime| *time > self.metrics.started;
                let room = state.pending.triggers.len() < MOST_TRIGGERS;
                if let Some(time) = slice.triggered.filter(counts).filter(|_| room) {
                    state.pending.triggers.push((slice.family, time));
                }
            }
            Event::EndpointSliceGone(slice) => {
                self.metrics.endpoint_changes.inc();
                state.pending.endpoints.insert(slice.clone());
            }
            Event::Node(node) if node.name == state.node => state.eligible = node.eligible,
            Event::NodeGone(name) if *name == state.node => state.eligible = false,
            _ => {}
        }
    }

    fn note_service(&self, state: &mut State, name: &ObjectName) {
        self.metrics.service_changes.inc();
        state.pending.services.insert(name.clone());
    }

    /// A table was programmed; `full`: all of it, not only what changed.
    pub fn applied(
        &self,
        table: &ServiceTable,
        changes: &Changes,
        report: &ApplyReport,
        elapsed: Duration,
        full: bool,
    ) {
        let triggers = self.settle().triggers;
        self.metrics.applied(table, report, elapsed, full);
        self.metrics.programmed(&triggers);
        self.checks.send_if_modified(|checks| {
            // Services may have gone while nobody noted it: this outlives a restart of the agent within its process.
            if full {
                let changed = *checks != table.health_checks;
                checks.clone_from(&table.health_checks);
                return changed;
            }
            let mut changed = false;
            for name in &changes.health_checks {
                let now = table.health_checks.get(name);
                changed |= checks.get(name) != now;
                match now {
                    Some(check) => checks.insert(name.clone(), check.clone()),
                    None => checks.remove(name),
                };
            }
            changed
        });
    }

    /// The kernel has all that is known already.
    pub fn unchanged(&self) {
        self.settle();
        self.metrics.unchanged();
    }

    fn settle(&self) -> Pending {
        let mut state = self.lock();
        (state.updated, state.waiting, state.error) = (Some(SystemTime::now()), None, None);
        state.begun = true;
        self.metrics.pending(0, 0);
        std::mem::take(&mut state.pending)
    }

    /// A table could not be programmed.
    pub fn failed(&self, error: &anyhow::Error) {
        let mut state = self.lock();
        state.error = Some(format!("{error:#}"));
        // Whatever it was that had to be written, it waits.
        state.wait();
        self.metrics.failed(state.mode, error.downcast_ref::<DatapathError>());
    }

    /// Entries of conntrack that lead UDP to endpoints that are gone were looked for, and so many deleted.
    pub fn conntrack_reconciled(&self, family: Family, elapsed: Duration, deleted: u64) {
        self.metrics.conntrack_reconciled(family, elapsed, deleted);
    }

    /// So many connections of other modes are carried on.
    pub fn draining(&self, left: &Left) {
        self.metrics.draining(left);
    }

    /// A dry run found so many differences.
    pub fn differs(&self, mode: &'static str, count: usize) {
        self.metrics.differs(mode, count);
    }

    /// The configuration in force, as `/configz` shows it under `kubeproxy.config.k8s.io`.
    pub fn set_configz(&self, config: Value) {
        *self.configz.write().unwrap_or_else(PoisonError::into_inner) = config;
    }

    /// Where [`Health::set_configz`] puts it.
    pub fn configz(&self) -> Arc<RwLock<Value>> {
        self.configz.clone()
    }

    /// Services whose load balancers ask this node, as of the last table.
    pub fn checks(&self) -> watch::Receiver<Checks> {
        self.checks.subscribe()
    }

    /// How many endpoints of a Service are ready on this node.
    pub(super) fn local_endpoints(&self, service: &ObjectName) -> usize {
        self.checks.borrow().get(service).map_or(0, |check| check.local_endpoints)
    }

    /// The kernel follows the cluster: kube-proxy's health without that of the Node.
    pub fn follows(&self) -> bool {
        self.lock().follows(Instant::now())
    }

    /// This node's name.
    pub fn node(&self) -> Arc<str> {
        self.lock().node.clone()
    }

    /// What serves this node.
    pub fn mode(&self) -> Mode {
        self.lock().mode
    }
}

impl State {
    fn queued(&mut self) {
        if self.begun {
            self.wait();
        }
    }

    fn wait(&mut self) {
        self.waiting.get_or_insert_with(Instant::now);
    }

    /// As kube-proxy: before the first success nothing is late.
    fn follows(&self, now: Instant) -> bool {
        self.updated.is_none() || self.waiting.is_none_or(|since| now.duration_since(since) < self.limit)
    }

    /// `eligible` is asked for in `/healthz` alone.
    fn page(&self, clock: (Instant, SystemTime), healthz: bool) -> (StatusCode, Page) {
        let (now, time) = clock;
        let follows = self.follows(now);
        let programmed = self.updated.is_some() || !healthz;
        let healthy = follows && programmed;
        let good = healthy && (self.eligible || !healthz);
        let status = |at| [Family::V4, Family::V6].map(|family| (family, status(at, follows)));
        let page = Page {
            // An answer of 200 is always up to date, so as not to alarm those who compare the two.
            last_updated: if good { timestamp(time) } else { self.updated.map_or_else(never, timestamp) },
            current_time: timestamp(time),
            node_eligible: healthz.then_some(self.eligible),
            healthy,
            status: self.updated.map(|at| status(at).into_iter().map(|(f, s)| (f.to_string(), s)).collect()),
            reason: match programmed {
                true => self.error.clone(),
                false => Some(self.error.clone().unwrap_or_else(|| WAITING.to_owned())),
            },
        };
        (if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, page)
    }
}

const WAITING: &str = "not programmed yet: waiting for the first full list of objects";

/// The body of both answers: kube-proxy's `ProxyHealth`, and why.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<BTreeMap<String, FamilyStatus>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyStatus {
    last_updated: String,
    healthy: bool,
}

fn status(at: SystemTime, healthy: bool) -> FamilyStatus {
    FamilyStatus { last_updated: timestamp(at), healthy }
}

/// RFC 3339, as Go prints a time.
fn timestamp(time: SystemTime) -> String {
    Timestamp::try_from(time).map_or_else(|_| never(), |time| time.to_string())
}

/// Go's zero time.
fn never() -> String {
    "0001-01-01T00:00:00Z".into()
}

/// 200 if load balancers may send to this node.
pub(super) async fn healthz(Shared(health): Shared<Arc<Health>>) -> Response {
    let (status, page) = health.lock().page((Instant::now(), SystemTime::now()), true);
    health.metrics.healthz.with_label_values(&[status.as_str()]).inc();
    answer(status, JSON, serde_json::json!(page).to_string())
}

/// 200 if the agent does what it can: what becomes of the Node is not its fault.
pub(super) async fn livez(Shared(health): Shared<Arc<Health>>) -> Response {
    let (status, page) = health.lock().page((Instant::now(), SystemTime::now()), false);
    health.metrics.livez.with_label_values(&[status.as_str()]).inc();
    answer(status, JSON, serde_json::json!(page).to_string())
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use lb_core::model::Node;

    use super::*;

    /// 2023-11-14, 22:13:20 UTC.
    fn epoch() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
    }

    /// Both answers of a node that was programmed 90 s ago, if `programmed`, where a change waits for so many seconds.
    fn check(programmed: bool, waiting: Option<u64>, prepare: fn(&Health), expected: Expect) {
        let health = Health::default();
        health.start("node-1".into(), Mode::Ebpf, SYNC_PERIOD);
        prepare(&health);
        let mut state = health.lock();
        let now = Instant::now() + Duration::from_secs(3600);
        state.updated = programmed.then(epoch);
        state.waiting = waiting.map(|secs| now - Duration::from_secs(secs));
        let clock = (now, epoch() + Duration::from_millis(90_500));
        let pages = [true, false].map(|healthz| {
            let (status, page) = state.page(clock, healthz);
            format!("{} {}\n", status.as_u16(), serde_json::json!(page))
        });
        expected.assert_eq(&pages.concat());
    }

    #[test]
    fn triggers_do_not_pile_up_while_nothing_can_be_programmed() {
        let health = Health::default();
        let mut slice = lb_core::synthetic::slice(1, 1, 0);
        slice.triggered = Some(SystemTime::now() + Duration::from_secs(60));
        let events = vec![Event::EndpointSlice(slice); MOST_TRIGGERS + 1];
        health.queued(&events);
        assert_eq!(health.lock().pending.triggers.len(), MOST_TRIGGERS);
        health.settle();
        health.queued(&events[..1]);
        assert_eq!(health.lock().pending.triggers.len(), 1, "programmed, there is room");
    }

    #[test]
    fn a_node_that_follows_is_healthy() {
        check(
            true,
            None,
            |_| {},
            expect![[r#"
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","nodeEligible":true,"healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}
        "#]],
        );
    }

    #[test]
    fn a_change_may_wait_for_two_periods() {
        check(
            true,
            Some(59),
            |_| {},
            expect![[r#"
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","nodeEligible":true,"healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}
        "#]],
        );
        check(
            true,
            Some(60),
            |_| {},
            expect![[r#"
            503 {"lastUpdated":"2023-11-14T22:13:20Z","currentTime":"2023-11-14T22:14:50.5Z","nodeEligible":true,"healthy":false,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":false},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":false}}}
            503 {"lastUpdated":"2023-11-14T22:13:20Z","currentTime":"2023-11-14T22:14:50.5Z","healthy":false,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":false},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":false}}}
        "#]],
        );
    }

    #[test]
    fn a_failed_write_says_why_at_once() {
        let fail = |health: &Health| health.failed(&anyhow::anyhow!("no nft in $PATH"));
        check(
            true,
            Some(5),
            fail,
            expect![[r#"
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","nodeEligible":true,"healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}},"reason":"no nft in $PATH"}
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}},"reason":"no nft in $PATH"}
        "#]],
        );
    }

    #[test]
    fn a_node_that_was_never_programmed_is_alive() {
        check(
            false,
            Some(3000),
            |_| {},
            expect![[r#"
            503 {"lastUpdated":"0001-01-01T00:00:00Z","currentTime":"2023-11-14T22:14:50.5Z","nodeEligible":true,"healthy":false,"reason":"not programmed yet: waiting for the first full list of objects"}
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","healthy":true}
        "#]],
        );
    }

    fn node(name: &str, eligible: bool) -> Event {
        let name = Arc::from(name);
        Event::Node(Node { name, addresses: Vec::new(), zone: None, pod_cidrs: Vec::new(), eligible })
    }

    #[test]
    fn a_node_that_goes_gets_nothing_new() {
        check(
            true,
            None,
            |health| health.queued(&[node("node-1", false)]),
            expect![[r#"
            503 {"lastUpdated":"2023-11-14T22:13:20Z","currentTime":"2023-11-14T22:14:50.5Z","nodeEligible":false,"healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}
        "#]],
        );
        check(
            true,
            None,
            |health| health.queued(&[Event::NodeGone("node-1".into())]),
            expect![[r#"
            503 {"lastUpdated":"2023-11-14T22:13:20Z","currentTime":"2023-11-14T22:14:50.5Z","nodeEligible":false,"healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}
        "#]],
        );
        let came_back = |health: &Health| health.queued(&[node("node-1", false), node("node-1", true)]);
        check(
            true,
            None,
            came_back,
            expect![[r#"
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","nodeEligible":true,"healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}
        "#]],
        );
        check(
            true,
            None,
            |health| health.queued(&[node("node-2", false)]),
            expect![[r#"
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","nodeEligible":true,"healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}
            200 {"lastUpdated":"2023-11-14T22:14:50.5Z","currentTime":"2023-11-14T22:14:50.5Z","healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}
        "#]],
        );
    }

    #[test]
    fn a_service_that_went_while_nobody_noted_it_is_not_asked_for() {
        let health = Health::default();
        let check = HealthCheck { port: 32_000, addresses: None, local_endpoints: 1 };
        let name = ObjectName::new("default", "web");
        let mut before = ServiceTable::default();
        before.health_checks.insert(name.clone(), check);
        let apply = |table: &ServiceTable, changes: &Changes, full| {
            health.applied(table, changes, &ApplyReport::default(), Duration::ZERO, full);
            health.checks().borrow().contains_key(&name)
        };
        assert!(apply(&before, &Changes::all(&before), true));
        // An agent that begins anew has never heard of it.
        let after = ServiceTable::default();
        assert!(!apply(&after, &Changes::all(&after), true));
        // Of what it follows it hears by name.
        assert!(apply(&before, &Changes::all(&before), false));
        assert!(!apply(&after, &Changes::all(&before), false));
    }

    #[test]
    fn an_agent_that_begins_anew_has_time_until_it_knows_all() {
        let health = Health::default();
        let (table, report) = (ServiceTable::default(), ApplyReport::default());
        let programmed = || health.applied(&table, &Changes::default(), &report, Duration::ZERO, true);
        let later = || Instant::now() + Duration::from_secs(3600);
        programmed();
        health.queued_anew();
        assert!(!health.lock().follows(later()), "an agent that serves has not");
        health.start("node-1".into(), Mode::Ebpf, SYNC_PERIOD);
        health.queued_anew();
        health.queued(&[node("node-1", true)]);
        assert!(health.lock().follows(later()));
        // But for one that can't.
        health.failed(&anyhow::anyhow!("busy"));
        assert!(!health.lock().follows(later()));
        programmed();
        health.queued_anew();
        assert!(!health.lock().follows(later()));
    }

    #[test]
    fn a_success_ends_the_waiting() {
        let health = Health::default();
        health.failed(&anyhow::anyhow!("busy"));
        let (table, report) = (ServiceTable::default(), ApplyReport::default());
        health.applied(&table, &Changes::default(), &report, Duration::ZERO, true);
        let state = health.lock();
        assert_eq!((state.waiting, &state.error), (None, &None));
        assert!(state.updated.is_some());
    }
}
