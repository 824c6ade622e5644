//! `/metrics`: kube-proxy 1.36's numbers under its names (`pkg/proxy/metrics/metrics.go`), and ours (`lb_*`).
//!
//! Each family and code is there from the start: what never happened is 0, not missing; missing are packets that the
//! kernel can't count in iptables mode. There is no `kubernetes_build_info`: alerts on mixed versions of a cluster would take
//! ours for one of Kubernetes.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use lb_core::{
    model::Family,
    rules::names,
    table::{ServiceTable, Traffic},
};
use prometheus::{
    Encoder as _, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, IntGaugeVec, Opts, Registry, TextEncoder, core::Collector, exponential_buckets, linear_buckets,
    process_collector::ProcessCollector,
};

use crate::{
    args::Mode,
    datapath::{
        ApplyReport, DatapathError, RuleCount,
        ebpf::maps::{self, Pins},
    },
    nfacct::Counters,
    retire::Left,
    source::calls::Calls,
};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Everything that is counted.
pub(super) struct Metrics {
    /// When counting began.
    pub(super) started: SystemTime,
    pub(super) healthz: IntCounterVec,
    pub(super) livez: IntCounterVec,
    pub(super) service_changes: IntCounter,
    pub(super) endpoint_changes: IntCounter,
    services_pending: IntGauge,
    endpoints_pending: IntGauge,
    sync: ByFamily<Histogram>,
    full_sync: ByFamily<Histogram>,
    partial_sync: ByFamily<Histogram>,
    last_sync: ByFamily<Gauge>,
    last_queued: ByFamily<Gauge>,
    programming: ByFamily<Histogram>,
    without_local: IntGaugeVec,
    conntrack_duration: ByFamily<Histogram>,
    conntrack_deleted: ByFamily<IntCounter>,
    pub(super) calls: Calls,
    restore_failures: ByFamily<IntCounter>,
    partial_restore_failures: ByFamily<IntCounter>,
    iptables_rules: IntGaugeVec,
    iptables_written: IntGaugeVec,
    /// By the names of nfacct's counters.
    iptables_packets: [(&'static str, IntCounterVec); 2],
    nftables_failures: ByFamily<IntCounter>,
    nftables_cleanup_failures: ByFamily<IntCounter>,
    ours: Ours,
    all: Registry,
    /// What only these modes have.
    of_iptables: Registry,
    of_ipvs: Registry,
    of_nftables: Registry,
    /// One answer at a time: counters of packets are set for it.
    answering: Mutex<()>,
}

/// What kube-proxy has no name for.
struct Ours {
    services: IntGauge,
    frontends: IntGauge,
    backends: IntGauge,
    refused: IntGauge,
    syncs: IntCounter,
    errors: IntCounter,
    duration: Gauge,
    last: Gauge,
    draining: IntGaugeVec,
    differences: IntGaugeVec,
    packets: IntCounterVec,
}

/// One number for each IP family.
struct ByFamily<T> {
    v4: T,
    v6: T,
}

impl<T> ByFamily<T> {
    fn new(of: impl Fn(&[&str]) -> T) -> Self {
        Self { v4: of(&[&Family::V4.to_string()]), v6: of(&[&Family::V6.to_string()]) }
    }

    fn of(&self, family: Family) -> &T {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    fn each(&self) -> [&T; 2] {
        [&self.v4, &self.v6]
    }
}

/// A place for metrics; names and labels are written once, here.
struct Place(Registry);

const BY_FAMILY: [&str; 1] = ["ip_family"];
const BY_TABLE: [&str; 2] = ["ip_family", "table"];

impl Place {
    fn put<C: Collector + Clone + 'static>(&self, metric: prometheus::Result<C>) -> C {
        let metric = metric.expect("names and labels are written correctly");
        self.0.register(Box::new(metric.clone())).expect("each name is given once");
        metric
    }

    fn histograms(&self, name: &str, help: &str, buckets: Vec<f64>) -> ByFamily<Histogram> {
        let options = HistogramOpts::new(name, alpha(help)).buckets(buckets);
        let metric = self.put(HistogramVec::new(options, &BY_FAMILY));
        ByFamily::new(|labels| metric.with_label_values(labels))
    }

    fn gauges(&self, name: &str, help: &str) -> ByFamily<Gauge> {
        let metric = self.put(GaugeVec::new(Opts::new(name, alpha(help)), &BY_FAMILY));
        ByFamily::new(|labels| metric.with_label_values(labels))
    }

    fn counters(&self, name: &str, help: &str) -> ByFamily<IntCounter> {
        let metric = self.put(IntCounterVec::new(Opts::new(name, alpha(help)), &BY_FAMILY));
        ByFamily::new(|labels| metric.with_label_values(labels))
    }

    /// Answers by their code, each from 0 on.
    fn answers(&self, name: &str, help: &str) -> IntCounterVec {
        let metric = self.put(IntCounterVec::new(Opts::new(name, alpha(help)), &["code"]));
        for code in ["200", "503"] {
            metric.with_label_values(&[code]);
        }
        metric
    }
}

/// Help as kube-proxy's, with how stable Kubernetes holds the metric.
fn alpha(help: &str) -> String {
    format!("[ALPHA] {help}")
}

/// Seconds of a sync.
fn sync_buckets() -> Vec<f64> {
    exponential_buckets(0.001, 2.0, 15).expect("a start, a factor and a count above 0")
}

/// Seconds from a Pod's change to the node's; kube-proxy's way of joining buckets begins with 0.
fn programming_buckets() -> Vec<f64> {
    let parts = [(0.25, 0.25, 2), (1.0, 1.0, 59), (60.0, 5.0, 12), (120.0, 30.0, 7)];
    let linear =
        |(start, width, count)| linear_buckets(start, width, count).expect("a width and a count above 0");
    std::iter::once(0.0).chain(parts.into_iter().flat_map(linear)).collect()
}

impl Default for Metrics {
    fn default() -> Self {
        let [all, iptables, ipvs, nftables] = std::array::from_fn(|_| Place(Registry::new()));
        let syncs = |name, help| all.histograms(name, help, sync_buckets());
        let count = |name, help| all.put(IntCounter::with_opts(Opts::new(name, alpha(help))));
        let pending = |name, help| all.put(IntGauge::with_opts(Opts::new(name, alpha(help))));
        let without_local = Opts::new(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            alpha("Number of services with a Local traffic policy and no endpoints"),
        );
        let (restore, restore_help) = (
            "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
            "Cumulative proxy iptables restore failures",
        );
        let restore_failures =
            IntCounterVec::new(Opts::new(restore, alpha(restore_help)), &BY_FAMILY).map(|metric| {
                ipvs.put(Ok(metric.clone()));
                iptables.put(Ok(metric))
            });
        let restore_failures = restore_failures.expect("names and labels are written correctly");
        let metrics = Self {
            started: SystemTime::now(),
            healthz: all.answers("kubeproxy_proxy_healthz_total", "Cumulative proxy healthz HTTP status"),
            livez: all.answers("kubeproxy_proxy_livez_total", "Cumulative proxy livez HTTP status"),
            service_changes: count(
                "kubeproxy_sync_proxy_rules_service_changes_total",
                "Cumulative proxy rules Service changes",
            ),
            endpoint_changes: count(
                "kubeproxy_sync_proxy_rules_endpoint_changes_total",
                "Cumulative proxy rules Endpoint changes",
            ),
            services_pending: pending(
                "kubeproxy_sync_proxy_rules_service_changes_pending",
                "Pending proxy rules Service changes",
            ),
            endpoints_pending: pending(
                "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
                "Pending proxy rules Endpoint changes",
            ),
            sync: syncs("kubeproxy_sync_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds"),
            full_sync: syncs(
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds for full resyncs",
            ),
            partial_sync: syncs(
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds for partial resyncs",
            ),
            last_sync: all.gauges(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "The last time proxy rules were successfully synced",
            ),
            last_queued: all.gauges(
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "The last time a sync of proxy rules was queued",
            ),
            programming: all.histograms(
                "kubeproxy_network_programming_duration_seconds",
                "In Cluster Network Programming Latency in seconds",
                programming_buckets(),
            ),
            without_local: all.put(IntGaugeVec::new(without_local, &["ip_family", "traffic_policy"])),
            conntrack_duration: syncs(
                "kubeproxy_conntrack_reconciler_sync_duration_seconds",
                "ReconcileConntrackFlowsLatency latency in seconds",
            ),
            conntrack_deleted: all.counters(
                "kubeproxy_conntrack_reconciler_deleted_entries_total",
                "Cumulative conntrack flows deleted by conntrack reconciler",
            ),
            restore_failures: ByFamily::new(|labels| restore_failures.with_label_values(labels)),
            partial_restore_failures: iptables.counters(
                "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
                "Cumulative proxy iptables partial restore failures",
            ),
            iptables_rules: iptables.put(IntGaugeVec::new(
                Opts::new(
                    "kubeproxy_sync_proxy_rules_iptables_total",
                    alpha("Total number of iptables rules owned by kube-proxy"),
                ),
                &BY_TABLE,
            )),
            iptables_written: iptables.put(IntGaugeVec::new(
                Opts::new(
                    "kubeproxy_sync_proxy_rules_iptables_last",
                    alpha("Number of iptables rules written by kube-proxy in last sync"),
                ),
                &BY_TABLE,
            )),
            iptables_packets: [
                (
                    names::INVALID_DROPPED,
                    "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
                    "packets dropped by iptables to work around conntrack problems",
                ),
                (
                    names::LOCALHOST_ACCEPTED,
                    "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
                    "Number of packets accepted on nodeports of loopback interface",
                ),
            ]
            .map(|(counter, name, help)| {
                (counter, iptables.put(IntCounterVec::new(Opts::new(name, alpha(help)), &[])))
            }),
            nftables_failures: nftables.counters(
                "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
                "Cumulative proxy nftables sync failures",
            ),
            nftables_cleanup_failures: nftables.counters(
                "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
                "Cumulative proxy nftables cleanup failures",
            ),
            calls: Calls::default(),
            ours: Ours::new(&all),
            all: all.0,
            of_iptables: iptables.0,
            of_ipvs: ipvs.0,
            of_nftables: nftables.0,
            answering: Mutex::default(),
        };
        let process: Box<dyn Collector> = Box::new(ProcessCollector::for_self());
        for collector in metrics.calls.metrics().into_iter().chain([process]) {
            metrics.all.register(collector).expect("each name is given once");
        }
        metrics.count_without_local(&ServiceTable::default());
        metrics
    }
}

impl Ours {
    fn new(all: &Place) -> Self {
        let gauge = |name, help| all.put(IntGauge::new(name, help));
        let build =
            Opts::new("lb_build_info", "This agent.").const_label("version", env!("CARGO_PKG_VERSION"));
        all.put(IntGauge::with_opts(build)).set(1);
        Self {
            services: gauge("lb_services", "Service ports served."),
            frontends: gauge("lb_frontends", "Frontends served."),
            backends: gauge("lb_backends", "Backends of all service ports."),
            refused: gauge("lb_refused_service_ports", "Service ports without a place in the maps."),
            syncs: all.put(IntCounter::new("lb_syncs_total", "Tables programmed.")),
            errors: all.put(IntCounter::new("lb_sync_errors_total", "Tables that could not be programmed.")),
            duration: all.put(Gauge::new("lb_sync_duration_seconds", "Duration of the last sync.")),
            last: all.put(Gauge::new("lb_sync_last_timestamp_seconds", "Unix time of the last sync.")),
            draining: all.put(IntGaugeVec::new(
                Opts::new(
                    "lb_draining_connections",
                    "Connections of other modes that are carried on until they end.",
                ),
                &["mode"],
            )),
            differences: all.put(IntGaugeVec::new(
                Opts::new(
                    "lb_dry_run_differences",
                    "Differences between what this node should have and what it has.",
                ),
                &["mode"],
            )),
            packets: all.put(IntCounterVec::new(
                Opts::new("lb_packets_total", "Program runs by outcome."),
                &["hook", "outcome"],
            )),
        }
    }
}

impl Metrics {
    /// An agent starts: what another of this process compared is past.
    pub(super) fn start(&self) {
        self.ours.differences.reset();
    }

    /// So many Services have changes that wait.
    pub(super) fn pending(&self, services: usize, endpoints: usize) {
        self.services_pending.set(services as i64);
        self.endpoints_pending.set(endpoints as i64);
    }

    /// A sync is due.
    pub(super) fn queued(&self) {
        self.last_queued.each().into_iter().for_each(|gauge| gauge.set(now()));
    }

    /// A table was programmed.
    pub(super) fn applied(&self, table: &ServiceTable, report: &ApplyReport, elapsed: Duration, full: bool) {
        let secs = elapsed.as_secs_f64();
        let kind = if full { &self.full_sync } else { &self.partial_sync };
        for histogram in self.sync.each().into_iter().chain(kind.each()) {
            histogram.observe(secs);
        }
        for family in &report.cleanup_failures {
            self.nftables_cleanup_failures.of(*family).inc();
        }
        for RuleCount { family, table, total, written } in &report.rules {
            let labels = [&family.to_string(), table.name()];
            self.iptables_rules.with_label_values(&labels).set(*total as i64);
            self.iptables_written.with_label_values(&labels).set(*written as i64);
        }
        self.unchanged();
        self.count_without_local(table);
        let ours = &self.ours;
        ours.services.set(table.services.len() as i64);
        ours.frontends.set(table.frontends.len() as i64);
        ours.backends.set(table.endpoints as i64);
        ours.refused.set(report.refused.len() as i64);
        ours.syncs.inc();
        ours.duration.set(secs);
        ours.last.set(now());
    }

    /// The kernel has all there is.
    pub(super) fn unchanged(&self) {
        self.last_sync.each().into_iter().for_each(|gauge| gauge.set(now()));
    }

    /// Endpoints are in the kernel whose Pods and Services changed then.
    pub(super) fn programmed(&self, changes: &[(Family, SystemTime)]) {
        for (family, at) in changes {
            if let Ok(elapsed) = at.elapsed() {
                self.programming.of(*family).observe(elapsed.as_secs_f64());
            }
        }
    }

    fn count_without_local(&self, table: &ServiceTable) {
        for family in FAMILIES {
            for (traffic, name) in [(Traffic::Internal, "internal"), (Traffic::External, "external")] {
                let count = table.without_local.get(&(family, traffic)).copied().unwrap_or(0);
                self.without_local.with_label_values(&[&family.to_string(), name]).set(count as i64);
            }
        }
    }

    /// A table could not be programmed; rules count as kube-proxy counts them.
    pub(super) fn failed(&self, mode: Mode, error: Option<&DatapathError>) {
        self.ours.errors.inc();
        let Some(DatapathError::Rules { family, partial, .. }) = error else { return };
        let counters = match mode {
            Mode::Ebpf => return,
            Mode::Nftables => &self.nftables_failures,
            Mode::Iptables if *partial => &self.partial_restore_failures,
            Mode::Iptables | Mode::Ipvs => &self.restore_failures,
        };
        counters.of(*family).inc();
    }

    /// Stale entries of conntrack were looked for.
    pub(super) fn conntrack_reconciled(&self, family: Family, elapsed: Duration, deleted: u64) {
        self.conntrack_duration.of(family).observe(elapsed.as_secs_f64());
        self.conntrack_deleted.of(family).inc_by(deleted);
    }

    /// Connections of other modes.
    pub(super) fn draining(&self, left: &Left) {
        self.ours.draining.reset();
        for (mode, connections) in left {
            self.ours.draining.with_label_values(&[*mode]).set(*connections as i64);
        }
    }

    /// Differences of a dry run.
    pub(super) fn differs(&self, mode: &'static str, count: usize) {
        self.ours.differences.with_label_values(&[mode]).set(count as i64);
    }

    /// All of it as Prometheus reads it.
    pub(super) fn text(&self, mode: Mode, pins: &Pins) -> String {
        let _one = self.answering.lock().unwrap_or_else(PoisonError::into_inner);
        self.count_packets(pins);
        if mode == Mode::Iptables {
            self.count_packets_of_rules();
        }
        let mut families = self.all.gather();
        families.extend(match mode {
            Mode::Ebpf => Vec::new(),
            Mode::Nftables => self.of_nftables.gather(),
            Mode::Iptables => self.of_iptables.gather(),
            Mode::Ipvs => self.of_ipvs.gather(),
        });
        families.sort_by(|a, b| a.name().cmp(b.name()));
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text).expect("names and values print into memory");
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The kernel counts; there is nothing to count without programs.
    fn count_packets(&self, pins: &Pins) {
        self.ours.packets.reset();
        for (hook, outcome, count) in maps::metrics(pins).unwrap_or_default() {
            self.ours.packets.with_label_values(&[hook.as_str(), outcome.as_str()]).inc_by(count);
        }
    }

    /// The kernel counts; where it can't, there is no number, as in kube-proxy.
    fn count_packets_of_rules(&self) {
        let mut counters = Counters::open().ok();
        for (counter, metric) in &self.iptables_packets {
            metric.reset();
            let packets = counters.as_mut().and_then(|counters| counters.packets(counter).ok().flatten());
            if let Some(packets) = packets {
                metric.with_label_values::<&str>(&[]).inc_by(packets);
            }
        }
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(metrics: &Metrics, mode: Mode) -> String {
        metrics.text(mode, &Pins::new(std::path::Path::new("/nowhere")))
    }

    #[test]
    fn buckets_are_kube_proxys() {
        let programming = programming_buckets();
        assert_eq!(programming.len(), 81);
        assert_eq!(programming[..4], [0.0, 0.25, 0.5, 1.0]);
        assert_eq!(programming[60..65], [58.0, 59.0, 60.0, 65.0, 70.0][..]);
        assert_eq!(programming[73..], [115.0, 120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0][..]);
        assert_eq!(sync_buckets().last(), Some(&16.384));
    }

    #[test]
    fn failures_are_counted_where_kube_proxy_counts_them() {
        let metrics = Metrics::default();
        let failed = |partial| DatapathError::Rules {
            family: Family::V6,
            partial,
            source: Box::new(DatapathError::Kernel {
                operation: "run",
                object: "x".into(),
                source: "y".into(),
            }),
        };
        metrics.failed(Mode::Iptables, Some(&failed(true)));
        metrics.failed(Mode::Iptables, Some(&failed(false)));
        metrics.failed(Mode::Nftables, Some(&failed(true)));
        metrics.failed(Mode::Ebpf, None);
        let (iptables, nftables) = (text(&metrics, Mode::Iptables), text(&metrics, Mode::Nftables));
        let line = |name: &str, family: &str, count: u8| {
            format!("\nkubeproxy_sync_proxy_rules_{name}_failures_total{{ip_family=\"{family}\"}} {count}\n")
        };
        for (name, page, others) in [
            ("iptables_restore", &iptables, &nftables),
            ("iptables_partial_restore", &iptables, &nftables),
            ("nftables_sync", &nftables, &iptables),
        ] {
            assert!(
                page.contains(&line(name, "IPv6", 1)) && page.contains(&line(name, "IPv4", 0)),
                "{name}\n{page}"
            );
            assert!(!others.contains(name), "{name} is not of that mode");
        }
        assert!(iptables.contains("\nlb_sync_errors_total 4\n"));
        assert!(text(&metrics, Mode::Ipvs).contains(&line("iptables_restore", "IPv6", 1)));
    }

    #[test]
    fn what_could_not_be_swept_is_counted() {
        let metrics = Metrics::default();
        let report = ApplyReport { cleanup_failures: vec![Family::V4], ..ApplyReport::default() };
        metrics.applied(&ServiceTable::default(), &report, Duration::ZERO, true);
        let page = text(&metrics, Mode::Nftables);
        let name = "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total";
        for line in
            [format!("\n{name}{{ip_family=\"IPv4\"}} 1\n"), format!("\n{name}{{ip_family=\"IPv6\"}} 0\n")]
        {
            assert!(page.contains(&line), "{line}{page}");
        }
    }

    #[test]
    fn a_reconciliation_of_conntrack_counts() {
        let metrics = Metrics::default();
        metrics.conntrack_reconciled(Family::V4, Duration::from_millis(3), 7);
        let page = text(&metrics, Mode::Ebpf);
        let name = "kubeproxy_conntrack_reconciler";
        for line in [
            format!("{name}_deleted_entries_total{{ip_family=\"IPv4\"}} 7\n"),
            format!("{name}_sync_duration_seconds_bucket{{ip_family=\"IPv4\",le=\"0.002\"}} 0\n"),
            format!("{name}_sync_duration_seconds_bucket{{ip_family=\"IPv4\",le=\"0.004\"}} 1\n"),
            format!("{name}_sync_duration_seconds_count{{ip_family=\"IPv6\"}} 0\n"),
        ] {
            assert!(page.contains(&line), "{line}{page}");
        }
    }
}
