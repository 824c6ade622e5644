//! The Kubernetes source against a server that speaks the API's list and watch over HTTP.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures::StreamExt as _;
use lb_agent::source::{
    About, Notice, Noticed, Notices, Report, Source,
    calls::Calls,
    kubernetes::{Access, Kubernetes},
};
use lb_core::model::{Event, ObjectName};
use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc, watch};

/// What the server holds and what it was asked.
struct Server {
    objects: Mutex<BTreeMap<&'static str, Vec<Value>>>,
    watches: broadcast::Sender<(&'static str, Value)>,
    /// Lists of this kind wait.
    held: watch::Sender<&'static str>,
    away: watch::Sender<bool>,
    /// Watches end as soon as they begin.
    hasty: AtomicBool,
    /// Lists of this kind are forbidden.
    forbidden: Mutex<&'static str>,
    version: Mutex<u64>,
    events: Mutex<Vec<Value>>,
    asked: Mutex<Vec<(&'static str, HashMap<String, String>)>>,
}

const KINDS: [(&str, &str, &str); 4] = [
    ("services", "v1", "Service"),
    ("endpointslices", "discovery.k8s.io/v1", "EndpointSlice"),
    ("nodes", "v1", "Node"),
    ("servicecidrs", "networking.k8s.io/v1", "ServiceCIDR"),
];

impl Server {
    /// A server without ServiceCIDRs, as before Kubernetes 1.33.
    async fn start(held: &'static str) -> (Arc<Self>, PathBuf) {
        Self::start_with(held, Router::new()).await
    }

    async fn start_with(held: &'static str, more: Router<Arc<Self>>) -> (Arc<Self>, PathBuf) {
        let server = Arc::new(Self {
            objects: Mutex::default(),
            watches: broadcast::channel(64).0,
            held: watch::channel(held).0,
            away: watch::channel(false).0,
            hasty: AtomicBool::default(),
            forbidden: Mutex::default(),
            version: Mutex::new(100),
            events: Mutex::default(),
            asked: Mutex::default(),
        });
        let app = Router::new()
            .route("/api/v1/{kind}", get(serve))
            .route("/apis/discovery.k8s.io/v1/{kind}", get(serve))
            .route("/apis/events.k8s.io/v1/namespaces/{namespace}/events", post(event))
            .merge(more)
            .with_state(server.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        let kubeconfig =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("lb-kubeconfig-{}", addr.port()));
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{ "name": "test", "cluster": { "server": format!("http://{addr}") } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
            "users": [{ "name": "test", "user": { "token": "secret" } }],
        });
        std::fs::write(&kubeconfig, text.to_string()).unwrap();
        (server, kubeconfig)
    }

    fn put(&self, kind: &'static str, mut object: Value) {
        let version = {
            let mut version = self.version.lock().unwrap();
            *version += 1;
            *version
        };
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let mut objects = self.objects.lock().unwrap();
        let objects = objects.entry(kind).or_default();
        let at = objects.iter().position(|known| known["metadata"]["name"] == object["metadata"]["name"]);
        let change = if at.is_some() { "MODIFIED" } else { "ADDED" };
        match at {
            Some(at) => objects[at] = object.clone(),
            None => objects.push(object.clone()),
        }
        let _ = self.watches.send((kind, json!({ "type": change, "object": object })));
    }

    /// How often a kind was watched.
    fn watched(&self, kind: &str) -> usize {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|(known, query)| *known == kind && query.contains_key("watch")).count()
    }

    /// Waits until a kind was watched so often.
    async fn wait_for_watch(&self, kind: &str, times: usize) {
        for _ in 0..3_000 {
            if self.watched(kind) >= times {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{kind} not watched {times} times");
    }

    /// Forgets an object without telling the watches, as if they had been cut off meanwhile.
    fn forget(&self, kind: &'static str, name: &str) {
        let mut objects = self.objects.lock().unwrap();
        objects.get_mut(kind).unwrap().retain(|object| object["metadata"]["name"] != name);
    }

    /// Ends the watches of a kind as etcd's compaction does.
    fn expire(&self, kind: &'static str) {
        let status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": "too old resource version", "reason": "Expired", "code": 410,
        });
        self.watches.send((kind, json!({ "type": "ERROR", "object": status }))).unwrap();
    }
}

async fn serve(
    State(server): State<Arc<Server>>,
    Path(kind): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let Some((kind, api, name)) = KINDS.into_iter().find(|(known, ..)| *known == kind) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    if *server.forbidden.lock().unwrap() == kind {
        let status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": "forbidden", "reason": "Forbidden", "code": 403,
        });
        return (StatusCode::FORBIDDEN, Json(status)).into_response();
    }
    if *server.away.borrow() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let (changes, mut away) = (server.watches.subscribe(), server.away.subscribe());
    if query.contains_key("sendInitialEvents") {
        let status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Invalid", "code": 422,
            "message": "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
        });
        return (StatusCode::UNPROCESSABLE_ENTITY, Json(status)).into_response();
    }
    server.asked.lock().unwrap().push((kind, query.clone()));
    if query.get("watch").is_some_and(|watch| watch == "true" || watch == "1") {
        if server.hasty.load(Ordering::Relaxed) {
            return Body::empty().into_response();
        }
        let lines = futures::stream::unfold(changes, move |mut changes| async move {
            loop {
                match changes.recv().await {
                    Ok((of, change)) if of == kind => return Some((format!("{change}\n"), changes)),
                    Ok(_) => {}
                    Err(_) => return None,
                }
            }
        });
        let cut = async move {
            let _ = away.wait_for(|away| *away).await;
        };
        return Body::from_stream(lines.take_until(cut).map(Ok::<_, std::io::Error>)).into_response();
    }
    let _ = server.held.subscribe().wait_for(|held| *held != kind).await;
    let items = server.objects.lock().unwrap().get(kind).cloned().unwrap_or_default();
    let version = server.version.lock().unwrap().to_string();
    Json(json!({
        "apiVersion": api, "kind": format!("{name}List"),
        "metadata": { "resourceVersion": version }, "items": items,
    }))
    .into_response()
}

async fn event(State(server): State<Arc<Server>>, Json(event): Json<Value>) -> Json<Value> {
    server.events.lock().unwrap().push(event.clone());
    Json(event)
}

fn service() -> Value {
    json!({
        "metadata": { "name": "web", "namespace": "shop", "uid": "u1" },
        "spec": { "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [{ "port": 80, "protocol": "TCP" }] },
    })
}

fn slice(addr: &str) -> Value {
    json!({
        "metadata": { "name": "web-1", "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4", "ports": [{ "name": "", "port": 8080, "protocol": "TCP" }],
        "endpoints": [{ "addresses": [addr], "conditions": { "ready": true } }],
    })
}

async fn next(reports: &mut mpsc::Receiver<Report>) -> Report {
    let wait = tokio::time::timeout(Duration::from_secs(30), reports.recv());
    wait.await.expect("a report within 30 s").expect("the source runs")
}

/// The events of the next report that has any.
async fn changed(reports: &mut mpsc::Receiver<Report>) -> Vec<Event> {
    loop {
        if let Report::Changed(events) = next(reports).await {
            return events;
        }
    }
}

fn addr_of(events: &[Event]) -> Option<String> {
    events.iter().find_map(|event| match event {
        Event::EndpointSlice(slice) => Some(slice.endpoints.first()?.addr.to_string()),
        _ => None,
    })
}

fn start(kubeconfig: PathBuf) -> mpsc::Receiver<Report> {
    start_with(kubeconfig, Notices::channel().1)
}

fn start_with(kubeconfig: PathBuf, notices: mpsc::Receiver<Noticed>) -> mpsc::Receiver<Report> {
    let (sender, reports) = mpsc::channel(64);
    let source = Kubernetes {
        access: Access { kubeconfig: Some(kubeconfig), ..Access::default() },
        node: "node1".into(),
        events: true,
        calls: Calls::default(),
        notices,
    };
    tokio::spawn(source.run(sender));
    reports
}

#[tokio::test]
async fn nothing_is_synced_before_every_list_and_bad_objects_are_named() {
    let (server, kubeconfig) = Server::start("nodes").await;
    server.put("services", service());
    server.put(
        "services",
        json!({ "metadata": { "name": "odd", "namespace": "shop", "uid": "u2" }, "spec": { "ports": "eighty" } }),
    );
    server.put("endpointslices", slice("10.244.0.5"));
    server.put("nodes", json!({ "metadata": { "name": "node1" } }));
    let mut reports = start(kubeconfig);
    let mut before = Vec::new();
    while let Ok(report) = tokio::time::timeout(Duration::from_secs(1), reports.recv()).await {
        before.push(report.expect("the source runs"));
    }
    assert!(!before.contains(&Report::Synced), "{before:?}");
    server.held.send_replace("");
    loop {
        match next(&mut reports).await {
            Report::Synced => break,
            report => before.push(report),
        }
    }
    let events: Vec<&Event> = before
        .iter()
        .flat_map(|report| match report {
            Report::Changed(events) => events.as_slice(),
            _ => &[],
        })
        .collect();
    let name = ObjectName::new("shop", "web");
    assert!(events.iter().any(|event| matches!(event, Event::Service(service) if service.name == name)));
    assert!(events.iter().any(|event| matches!(event, Event::EndpointSlice(slice) if slice.service == name)));
    assert!(events.iter().any(|event| matches!(event, Event::Node(node) if &*node.name == "node1")));
    assert_eq!(events.len(), 3, "the odd Service is skipped: {events:?}");
    let warned = before.iter().any(|report| match report {
        Report::Warnings(origin, warnings) => origin == "Service shop/odd" && !warnings.is_empty(),
        _ => false,
    });
    assert!(warned, "{before:?}");
    let posted = server.events.lock().unwrap().clone();
    assert_eq!(posted.len(), 1, "{posted:?}");
    assert_eq!(posted[0]["reason"], "NotServed");
    assert_eq!(posted[0]["regarding"]["name"], "odd");
    let asked = server.asked.lock().unwrap().clone();
    let of = |kind: &str| asked.iter().find(|(known, _)| *known == kind).unwrap().1.clone();
    assert_eq!(of("services")["labelSelector"], "!service.kubernetes.io/service-proxy-name");
    assert_eq!(of("services")["fieldSelector"], "spec.clusterIP!=None");
    assert_eq!(of("endpointslices")["labelSelector"], "!service.kubernetes.io/headless");
}

#[tokio::test]
async fn changes_expiry_and_absence_are_survived() {
    let (server, kubeconfig) = Server::start("").await;
    server.put("services", service());
    server.put("endpointslices", slice("10.244.0.5"));
    let mut reports = start(kubeconfig);
    while next(&mut reports).await != Report::Synced {}
    // The watch is asked for after the list.
    server.wait_for_watch("endpointslices", 1).await;
    server.put("endpointslices", slice("10.244.0.6"));
    assert_eq!(addr_of(&changed(&mut reports).await).as_deref(), Some("10.244.0.6"));

    // What vanished between two lists is gone; what stayed is reported again, or not at all.
    server.forget("endpointslices", "web-1");
    server.expire("endpointslices");
    let gone = Event::EndpointSliceGone(ObjectName::new("shop", "web-1"));
    assert_eq!(changed(&mut reports).await, std::slice::from_ref(&gone));

    server.wait_for_watch("endpointslices", 2).await;
    server.put("endpointslices", slice("10.244.0.7"));
    assert_eq!(addr_of(&changed(&mut reports).await).as_deref(), Some("10.244.0.7"));

    // Away for a while: nothing is taken back.
    server.away.send_replace(true);
    while let Ok(report) = tokio::time::timeout(Duration::from_secs(2), reports.recv()).await {
        let report = report.expect("the source runs");
        assert!(!matches!(report, Report::Changed(_)), "{report:?}");
    }
    // Back, with a history of its own.
    *server.version.lock().unwrap() = 5;
    server.away.send_replace(false);
    let watches = server.watched("endpointslices");
    server.put("endpointslices", slice("10.244.0.8"));
    server.wait_for_watch("endpointslices", watches + 1).await;
    // The watch began at a version that this server never had: it says so, and the list has the news.
    server.expire("endpointslices");
    loop {
        let events = changed(&mut reports).await;
        assert!(!events.contains(&gone));
        if addr_of(&events).as_deref() == Some("10.244.0.8") {
            break;
        }
    }
}

/// client-go: `VeryShortWatchError`.
#[tokio::test]
async fn a_server_that_ends_each_watch_at_once_is_not_asked_in_haste() {
    let (server, kubeconfig) = Server::start("").await;
    server.hasty.store(true, Ordering::Relaxed);
    server.put("endpointslices", slice("10.244.0.5"));
    let mut reports = start(kubeconfig);
    while next(&mut reports).await != Report::Synced {}
    server.wait_for_watch("endpointslices", 1).await;
    let first = Instant::now();
    server.wait_for_watch("endpointslices", 3).await;
    assert!(first.elapsed() > Duration::from_secs(2), "{:?}", first.elapsed());
    server.hasty.store(false, Ordering::Relaxed);
    server.wait_for_watch("endpointslices", server.watched("endpointslices") + 1).await;
    server.put("endpointslices", slice("10.244.0.6"));
    assert_eq!(addr_of(&changed(&mut reports).await).as_deref(), Some("10.244.0.6"));
}

#[tokio::test]
async fn ranges_of_cluster_ips_are_watched_where_there_are_any() {
    let route = || Router::new().route("/apis/networking.k8s.io/v1/{kind}", get(serve));
    let range = |cidr: &str| json!({ "metadata": { "name": "kubernetes" }, "spec": { "cidrs": [cidr] } });
    let (server, kubeconfig) = Server::start_with("", route()).await;
    server.put("servicecidrs", range("10.96.0.0/16"));
    let mut reports = start(kubeconfig);
    let events = changed(&mut reports).await;
    assert!(
        matches!(&events[..], [Event::ServiceCidr(range)] if range.cidrs == ["10.96.0.0/16".parse().unwrap()]),
        "{events:?}"
    );
    while next(&mut reports).await != Report::Synced {}

    // A role from before: the rest is served, and the lists are asked for again.
    let (server, kubeconfig) = Server::start_with("", route()).await;
    *server.forbidden.lock().unwrap() = "servicecidrs";
    server.put("servicecidrs", range("10.96.0.0/16"));
    let mut reports = start(kubeconfig);
    while next(&mut reports).await != Report::Synced {}
    *server.forbidden.lock().unwrap() = "";
    assert!(matches!(&changed(&mut reports).await[..], [Event::ServiceCidr(_)]));
}

#[tokio::test]
async fn notices_become_events_in_kube_proxys_words() {
    let (server, kubeconfig) = Server::start("services").await;
    let (notices, noticed) = Notices::channel();
    let notice = |about, warning, reason, note: &str| Notice {
        about,
        warning,
        reason,
        action: "Listen",
        note: note.into(),
    };
    notices.send(notice(About::ThisNode, false, "Starting", ""));
    let web = About::Service(ObjectName::new("shop", "web"));
    notices.send(notice(web, true, "FailedToStartServiceHealthcheck", "port 32000 is taken"));
    // Before the first list is complete.
    let _reports = start_with(kubeconfig, noticed);
    notices.flush().await;
    let posted = server.events.lock().unwrap().clone();
    let fields = |event: &Value| {
        ["/type", "/reason", "/action", "/note", "/regarding/kind", "/regarding/namespace", "/regarding/name"]
            .map(|path| event.pointer(path).and_then(Value::as_str).unwrap_or("-").to_owned())
    };
    assert_eq!(
        posted.iter().map(fields).collect::<Vec<_>>(),
        [
            ["Normal", "Starting", "Listen", "-", "Node", "-", "node1"],
            [
                "Warning",
                "FailedToStartServiceHealthcheck",
                "Listen",
                "port 32000 is taken",
                "Service",
                "shop",
                "web"
            ],
        ]
    );
}
