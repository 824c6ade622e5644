//! The agent and an API server, over HTTP and TLS: what is served, whatever the server does.

use std::{
    fs,
    net::TcpListener,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use lb_test::{
    apiserver::{ApiServer, Blow, Fault, Gone, Kind, TOKEN, Verb},
    cluster::{CLIENT, finish, node_ip, node_manifests, pod_ip},
    netns, patience,
    world::{World, frontend, service, slice, whole},
};
use serde_json::{Value, json};

/// Asks the API server from a node; the answer's code, and its lines.
fn get(world: &World, token: &str, path: &str) -> (u16, Vec<Value>) {
    let header = format!("Authorization: Bearer {token}");
    let url = format!("https://{CLIENT}:6443{path}");
    let mut curl = world.cluster.lab.command("node1", "curl");
    curl.args(["-skN", "-m", "20", "-H", &header, "-w", "%{http_code}", &url]);
    let text = netns::output(&mut curl).unwrap();
    let (body, code) = text.split_at(text.len() - 3);
    let lines = serde_json::Deserializer::from_str(body).into_iter().collect::<Result<_, _>>();
    (code.parse().unwrap(), lines.unwrap())
}

#[test]
fn the_test_server_speaks_as_kube_apiserver_does() {
    let world = World::new();
    let services = "/api/v1/services";
    world.server.put(&(service(10, "") + &service(11, "labels: {a: b}") + &service(12, ""))).unwrap();
    let names = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().unwrap().iter();
        items.map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let ok = |path: &str| {
        let (code, lines) = get(&world, TOKEN, path);
        assert_eq!((code, lines.len()), (200, 1), "{path}: {lines:?}");
        lines.into_iter().next().unwrap()
    };
    let refused = |token: &str, path: &str, wanted: u16, reason: &str| {
        let (code, lines) = get(&world, token, path);
        let status = &lines[0];
        assert_eq!(
            (code, &status["kind"], &status["reason"]),
            (wanted, &json!("Status"), &json!(reason)),
            "{path}"
        );
    };

    let all = ok(services);
    assert_eq!((&all["kind"], &all["apiVersion"]), (&json!("ServiceList"), &json!("v1")));
    assert_eq!((names(&all).len(), &all["items"][0]["kind"]), (3, &Value::Null));
    assert_eq!(names(&ok(&format!("{services}?labelSelector=%21a&resourceVersion=0"))), ["s10", "s12"]);
    let page = ok(&format!("{services}?limit=2"));
    assert_eq!((names(&page).len(), &page["metadata"]["remainingItemCount"]), (2, &json!(1)));
    let rest = format!("{services}?limit=2&continue={}", page["metadata"]["continue"].as_str().unwrap());
    assert_eq!(names(&ok(&rest)), ["s12"]);

    // All first, the mark that ends them, and what matches no more.
    let version = all["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let initial =
        "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let (_, lines) = get(&world, TOKEN, &format!("{services}?{initial}&timeoutSeconds=2"));
    let what: Vec<&Value> = lines.iter().map(|line| &line["type"]).collect();
    assert_eq!(what, ["ADDED", "ADDED", "ADDED", "BOOKMARK"]);
    assert_eq!(lines[3]["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    assert_eq!(lines[0]["object"]["kind"], "Service");
    world.server.put(&service(10, "labels: {a: b}")).unwrap();
    let since = format!("watch=true&labelSelector=%21a&timeoutSeconds=1&resourceVersion={version}");
    let (_, lines) = get(&world, TOKEN, &format!("{services}?{since}"));
    assert_eq!((&lines[0]["type"], lines.len()), (&json!("DELETED"), 1));

    world.server.compact();
    refused(TOKEN, &rest, 410, "Expired");
    let (code, lines) = get(&world, TOKEN, &format!("{services}?{since}"));
    assert_eq!((code, &lines[0]["type"], &lines[0]["object"]["code"]), (200, &json!("ERROR"), &json!(410)));
    world.server.answer_gone_by(Gone::Http);
    refused(TOKEN, &format!("{services}?{since}"), 410, "Expired");
    world.server.without_watch_lists();
    refused(TOKEN, &format!("{services}?{initial}"), 422, "Invalid");
    refused("", services, 401, "Unauthorized");
    refused(TOKEN, "/apis/batch/v1/jobs", 404, "NotFound");
    refused(TOKEN, &format!("{services}?fieldSelector=spec.ports%3D1"), 400, "BadRequest");
    world.server.forbid(Kind::Node);
    refused(TOKEN, "/api/v1/nodes", 403, "Forbidden");
}

#[test]
fn changes_are_served_as_they_come() {
    let world = World::with(
        &(whole(10)
            + &whole(11)
            + "kind: Service\nmetadata: {name: headless}\nspec: {clusterIP: None, ports: [{port: 80}]}\n"),
    );
    assert_eq!(world.served().keys().collect::<Vec<_>>(), [&frontend(10), &frontend(11)]);
    assert_eq!(world.asked(10).as_deref(), Some("pod11"));

    world.server.put(&whole(12)).unwrap();
    world.until("a new Service", |served| {
        served.get(&frontend(12)).is_some_and(|backends| backends.len() == 1)
    });
    assert_eq!(world.asked(12).as_deref(), Some("pod11"));

    world.server.put(&slice(10, &[&pod_ip(2, 1)])).unwrap();
    let moved = [format!("{}:8080", pod_ip(2, 1))];
    world.until("another endpoint", |served| served[&frontend(10)] == moved);
    assert_eq!(world.asked(10).as_deref(), Some("pod21"));

    assert!(world.server.delete(Kind::Service, "default", "s11"));
    world.until("a deleted Service", |served| !served.contains_key(&frontend(11)));

    world.server.put(&service(12, "labels: {service.kubernetes.io/service-proxy-name: other}")).unwrap();
    world.until("a Service of another proxy", |served| !served.contains_key(&frontend(12)));
    world.server.put(&service(12, "")).unwrap();
    world.until("ours again", |served| served.contains_key(&frontend(12)));
    assert_eq!(world.asked(12).as_deref(), Some("pod11"));
    for kind in Kind::ALL {
        assert_eq!(
            (world.lists(kind), world.server.count(kind, Verb::List)),
            (1, 0),
            "{kind:?} was listed once"
        );
    }
}

/// kube-apiserver says up to a second late that a list which begins a watch is complete.
#[test]
fn what_goes_before_the_list_is_complete_is_not_served() {
    let mut world = World::new();
    world.server.put(&(whole(10) + &whole(11))).unwrap();
    world.cluster.launch_agent(1).unwrap();
    world.wait("the list", || world.server.count(Kind::Service, Verb::WatchList) == 1);
    world.server.delete(Kind::Service, "default", "s11");
    world
        .server
        .put(&(service(10, "labels: {service.kubernetes.io/service-proxy-name: other}") + &whole(12)))
        .unwrap();
    world.cluster.wait_until_healthy(1).unwrap();
    assert_eq!(world.served().keys().collect::<Vec<_>>(), [&frontend(12)]);
    assert_eq!(world.lists(Kind::Service), 1);
}

#[test]
fn lists_come_page_by_page_from_a_server_without_watch_lists() {
    let mut world = World::new();
    world.server.without_watch_lists();
    for number in 0..600 {
        let (name, address) =
            (format!("many-{number}"), format!("10.96.{}.{}", 1 + number / 200, 1 + number % 200));
        let spec = json!({"clusterIP": address, "ports": [{"name": "http", "port": 80}]});
        world.server.put_value(json!({"kind": "Service", "metadata": {"name": name}, "spec": spec})).unwrap();
    }
    world.start();
    assert_eq!(world.served().len(), 600);
    let asked = [Verb::WatchList, Verb::List, Verb::Page].map(|verb| world.server.count(Kind::Service, verb));
    assert_eq!(asked, [1, 1, 1]);
    world.server.delete(Kind::Service, "default", "many-599");
    world.until("a deleted Service", |served| served.len() == 599);
}

#[test]
fn the_kernel_serves_while_nobody_listens() {
    outage(Fault::Away);
}

#[test]
fn the_kernel_serves_while_the_api_server_hangs() {
    outage(Fault::Hang);
}

/// Packets vanish, as behind a load balancer that lost a server, or a firewall that lost its memory.
#[test]
fn a_server_that_vanished_without_a_word_is_noticed() {
    let world = World::with(&whole(10));
    let packets = |how: &str| {
        for (chain, port) in [("INPUT", "--dport"), ("OUTPUT", "--sport")] {
            let words = ["-w", how, chain, "-p", "tcp", port, "6443", "-j", "DROP"];
            netns::run(world.cluster.lab.command("client", "iptables").args(words)).unwrap();
        }
    };
    packets("-A");
    world.server.put(&whole(11)).unwrap();
    let vanished = Instant::now();
    world.until_logged("API server is away");
    assert!(vanished.elapsed() < patience(Duration::from_secs(60)), "after {:?}", vanished.elapsed());
    packets("-D");
    world.until("the change it could not tell of", |served| served.contains_key(&frontend(11)));
}

/// The server is away, things change, it comes back.
fn outage(fault: Fault) {
    let world = World::with(&(whole(10) + &whole(11)));
    world.server.fault(fault);
    world.server.strike(Blow::Close);
    world.server.delete(Kind::Service, "default", "s11");
    world.server.put(&(whole(12) + &slice(10, &[&pod_ip(2, 1)]))).unwrap();
    world.until_logged("API server is away");
    world.wait("no answer is counted as well", || world.answers("<error>") > 0);
    let served = world.served();
    assert_eq!(served.keys().collect::<Vec<_>>(), [&frontend(10), &frontend(11)]);
    assert_eq!(world.asked(10).as_deref(), Some("pod11"), "the last known state is served");
    world.server.heal();
    world.until("after the outage", |served| {
        served.contains_key(&frontend(12)) && !served.contains_key(&frontend(11))
    });
    world.wait("the moved endpoint", || world.asked(10).as_deref() == Some("pod21"));
    world.until_logged("API server is back");
}

#[test]
fn an_api_server_with_an_older_state_is_believed() {
    let world = World::with(&(whole(10) + &whole(11)));
    world.server.fault(Fault::Away);
    world.until_logged("API server is away");
    world.server.forget(50_000);
    world.server.put(&(node_manifests() + &whole(11) + &whole(12))).unwrap();
    world.server.heal();
    world.until("the older state", |served| {
        !served.contains_key(&frontend(10)) && served.contains_key(&frontend(12))
    });
    world.wait("its endpoints", || world.asked(12).as_deref() == Some("pod11"));
}

/// Bookmarks say how far a watch has come in which nothing happens. A server that starts fails before it answers.
#[test]
fn an_older_state_is_believed_though_it_is_newer_than_every_service() {
    let world = World::with(&(whole(10) + &whole(11)));
    for _ in 0..200 {
        world.server.put(&node_manifests()).unwrap();
    }
    world.server.put(&whole(12)).unwrap();
    world.until("the last change", |served| served.contains_key(&frontend(12)));
    world.server.delete(Kind::Service, "default", "s12");
    for _ in 0..200 {
        world.server.put(&node_manifests()).unwrap();
    }
    // Longer than the server lets watches wait for a bookmark.
    std::thread::sleep(Duration::from_secs(5));
    world.server.fault(Fault::Code(503));
    world.server.strike(Blow::Close);
    world.until_logged("API server fails");
    world.server.forget(100);
    world.server.put(&(node_manifests() + &whole(11) + &whole(13))).unwrap();
    world.server.heal();
    world.until("the older state", |served| {
        !served.contains_key(&frontend(10)) && served.contains_key(&frontend(13))
    });
}

#[test]
fn a_forgotten_history_means_a_new_list_and_no_gap() {
    for gone in [Gone::Event, Gone::Http] {
        let mut world = World::new();
        if gone == Gone::Http {
            world.server.without_watch_lists();
        }
        world.server.put(&(whole(10) + &whole(11))).unwrap();
        world.start();
        world.server.answer_gone_by(gone);
        world.server.fault(Fault::Away);
        world.server.delete(Kind::Service, "default", "s11");
        world.server.put(&whole(12)).unwrap();
        world.server.compact();
        while_never_gone(&world, || {
            world.server.heal();
            world.until(&format!("a new list, {gone:?}"), |served| {
                served.contains_key(&frontend(12)) && !served.contains_key(&frontend(11))
            });
        });
        assert!(world.lists(Kind::Service) > 1);
    }
}

#[test]
fn a_watch_that_expires_means_a_new_list_and_no_gap() {
    let world = World::with(&(whole(10) + &whole(11)));
    while_never_gone(&world, || {
        world.server.strike(Blow::Expire);
        world.server.put(&whole(12)).unwrap();
        world.until("after an ERROR of code 410", |served| served.contains_key(&frontend(12)));
    });
    assert_eq!(world.lists(Kind::Service), 2);
    assert!(!world.log().contains("API server is away"), "it is there, and answers");
}

/// Says that something is done when it goes.
struct Told<'a>(&'a AtomicBool);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Clients talk to Service 10, and its frontend is looked at, while something happens.
fn while_never_gone(world: &World, happens: impl FnOnce()) {
    let clients = ["load", "10.96.0.10:80", "--connections", "10", "--udp", "0", "--secs", "4"];
    let clients = world.cluster.spawn("pod12", None, &clients).unwrap();
    let done = AtomicBool::new(false);
    let looks = std::thread::scope(|scope| {
        let look = scope.spawn(|| {
            let mut looks = 0;
            while !done.load(Ordering::Relaxed) {
                assert!(world.serves(10), "the frontend vanished");
                looks += 1;
            }
            looks
        });
        // Also if it panics: the thread that looks is waited for.
        let told = Told(&done);
        happens();
        drop(told);
        look.join().expect("the frontend stays")
    });
    let report: Value = serde_json::from_str(&finish(clients).unwrap()).unwrap();
    println!("{looks} looks; {report}");
    for failure in ["resets", "timeouts", "wrong"] {
        assert_eq!(report[failure], 0, "{report}");
    }
    assert!(looks > 0 && report["requests"].as_u64().unwrap() > 0, "{report}");
}

#[test]
fn a_watch_cut_in_mid_line_goes_on_where_it_was() {
    let world = World::with(&whole(10));
    world.server.strike(Blow::CutMidLine);
    world.server.put(&whole(11)).unwrap();
    world.until("after half a line", |served| served.contains_key(&frontend(11)));
    assert_eq!(world.lists(Kind::Service), 1, "no second list");
}

#[test]
fn a_line_that_makes_no_sense_means_a_new_list() {
    let world = World::with(&whole(10));
    world.server.strike(Blow::Garble);
    world.wait("a new list", || world.lists(Kind::Service) == 2);
    world.server.put(&whole(11)).unwrap();
    world.until("after it", |served| served.contains_key(&frontend(11)));
}

#[test]
fn a_slow_api_server_is_waited_for() {
    let mut world = World::new();
    world.server.put(&whole(10)).unwrap();
    world.server.fault(Fault::Slow(Duration::from_secs(3)));
    world.start();
    assert!(world.serves(10));
    world.server.put(&whole(11)).unwrap();
    world.until("a change at a slow server", |served| served.contains_key(&frontend(11)));
    assert_eq!(world.lists(Kind::Service), 1, "slow is not away");
}

#[test]
fn half_a_list_is_not_waited_for() {
    let mut world = World::new();
    world.server.put(&whole(10)).unwrap();
    world.server.fault(Fault::Half);
    // What is half answered would be waited for.
    let heal = |world: &World| {
        world.server.fault(Fault::Away);
        world.server.heal();
    };
    world.cluster.launch_agent(1).unwrap();
    world.until_logged("the rest of the list doesn't come");
    world.until_logged("kind=Service reason=\"it never said that this was all\"");
    world.wait("a list instead", || world.server.count(Kind::Service, Verb::List) == 1);
    assert!(world.served().is_empty(), "half a list is not served");
    heal(&world);
    world.cluster.wait_until_healthy(1).unwrap();
    assert!(world.serves(10));
    assert_eq!(world.server.count(Kind::Service, Verb::WatchList), 1);

    // How far the server is, after it ended a watch, is asked by a list, too.
    world.server.fault(Fault::Half);
    world.server.strike(Blow::Close);
    world.wait("half an answer is given up", || world.server.count(Kind::Service, Verb::Peek) > 1);
    world.server.put(&whole(11)).unwrap();
    heal(&world);
    world.until("what changed meanwhile", |served| served.contains_key(&frontend(11)));
}

#[test]
fn an_api_server_that_fails_is_asked_again() {
    for code in [500, 429] {
        let mut world = World::new();
        world.server.put(&whole(10)).unwrap();
        world.server.fault(Fault::Code(code));
        world.cluster.launch_agent(1).unwrap();
        world.until_logged("API server fails");
        world.server.heal();
        world.cluster.wait_until_healthy(1).unwrap();
        assert!(world.serves(10));
        world.server.fault(Fault::Code(code));
        world.server.strike(Blow::Close);
        world.server.put(&whole(11)).unwrap();
        assert!(world.serves(10));
        world.server.heal();
        world.until(&format!("after {code}"), |served| served.contains_key(&frontend(11)));
        for code in [200, code] {
            assert!(world.answers(&code.to_string()) > 0, "they are counted as kube-proxy counts them");
        }
    }
}

#[test]
fn a_malformed_service_harms_no_other() {
    let bad = |number: u8| {
        format!(
            "kind: Service\nmetadata: {{name: s{number}}}\nspec: {{clusterIP: 10.96.0.{number}, ports: 'none'}}\n---\n"
        )
    };
    for watch_lists in [true, false] {
        let mut world = World::new();
        if !watch_lists {
            world.server.without_watch_lists();
        }
        world.server.put(&(bad(10) + &whole(11))).unwrap();
        world.start();
        one_malformed_service(&world, bad);
    }
}

fn one_malformed_service(world: &World, bad: impl Fn(u8) -> String) {
    assert_eq!(world.served().keys().collect::<Vec<_>>(), [&frontend(11)]);
    world.wait("an Event on it", || !world.notes_on("s10").is_empty());
    assert!(world.notes_on("s10")[0].contains("skipped"), "{:?}", world.notes_on("s10"));
    world.until_logged("Service default/s10");

    world.server.put(&(bad(11) + &whole(12))).unwrap();
    world.until("a good one beside it", |served| served.contains_key(&frontend(12)));
    world.wait("an Event on one that was good", || !world.notes_on("s11").is_empty());
    assert_eq!(world.asked(11).as_deref(), Some("pod11"), "its last good state is served");
    world.server.strike(Blow::Expire);
    world.server.put(&whole(13)).unwrap();
    world.until("after a new list", |served| served.contains_key(&frontend(13)));
    assert_eq!(world.asked(11).as_deref(), Some("pod11"), "also when it is listed again");

    world.server.put(&whole(10)).unwrap();
    world.until("mended", |served| served.contains_key(&frontend(10)));
    world.wait("its warning is over", || cleared(world, "s10"));
    assert!(!cleared(world, "s11"), "{}", world.log());
    world.server.fault(Fault::Away);
    world.server.delete(Kind::Service, "default", "s11");
    world.server.compact();
    world.server.heal();
    world.until("gone at last", |served| !served.contains_key(&frontend(11)));
    world.wait("what vanishes in a list takes its warning along", || cleared(world, "s11"));
}

fn cleared(world: &World, name: &str) -> bool {
    let object = format!("Service default/{name}");
    world.log().lines().any(|line| line.contains("warning cleared") && line.contains(&object))
}

#[test]
fn changes_within_the_least_time_between_two_writes_are_written_together() {
    let mut world = World::new();
    let file = world.cluster.lab.dir().join("config.yaml");
    let config = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nlb: {mode: ebpf, minSyncPeriod: 2s}\n";
    fs::write(&file, config).unwrap();
    world.cluster.agent_options = vec!["--config".into(), file.display().to_string()];
    world.server.put(&whole(10)).unwrap();
    world.start();
    let writes = || world.log().matches(" applied datapath=").count();
    let (before, begun) = (writes(), Instant::now());
    for number in 11..31 {
        world.server.put(&whole(number)).unwrap();
        std::thread::sleep(Duration::from_millis(200));
    }
    world.until("the last change", |served| served.contains_key(&frontend(30)));
    let (written, periods) = (writes() - before, begun.elapsed().as_secs() as usize / 2 + 2);
    assert!((1..=periods).contains(&written), "{written} times in {:?}", begun.elapsed());
    assert_eq!(world.served().len(), 21);
}

/// By kube-proxy's names where it has any.
#[test]
fn what_operators_must_know_is_an_event() {
    let mut world = World::new();
    world.cluster.agent_options = ["--map-entries-max", "256"].map(str::to_owned).into();
    let taken = world.cluster.lab.inside("node1", || Ok(TcpListener::bind(("0.0.0.0", 32_100))?)).unwrap();
    let checked = json!({
        "kind": "Service",
        "metadata": {"name": "checked"},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.9", "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 32_100, "ports": [{"name": "http", "port": 80, "nodePort": 30_100}],
        },
    });
    world.server.put_value(checked).unwrap();
    world.start();
    world.server.put_value(many_ports(20, 250)).unwrap();
    world.server.put_value(many_ports(21, 250)).unwrap();
    let of = |reason: &str| {
        let events = world.server.events();
        let found = events.iter().find(|event| event["reason"] == reason)?;
        let text = |field: &Value| field.as_str().unwrap_or_default().to_owned();
        let about = &found["regarding"];
        Some((text(&found["type"]), text(&about["kind"]), text(&about["name"]), text(&found["note"])))
    };
    for (reason, kind, about, name, note) in [
        ("Starting", "Normal", "Node", "node1", ""),
        ("FailedToStartServiceHealthcheck", "Warning", "Service", "checked", "32100"),
        ("NotServed", "Warning", "Service", "s21", "node1"),
    ] {
        world.wait(reason, || of(reason).is_some());
        let (found_kind, found_about, found_name, found_note) = of(reason).unwrap();
        assert_eq!((&*found_kind, &*found_about, &*found_name), (kind, about, name), "{found_note}");
        assert!(found_note.contains(note), "{reason}: {found_note}");
    }
    drop(taken);
}

#[test]
fn liars_are_served_as_far_as_it_makes_sense() {
    let mut world = World::new();
    let twin = "uid: 11111111-1111-4111-8111-111111111111";
    world.server.put(&(whole(9) + &service(10, twin) + &slice(10, &[&pod_ip(1, 1)]))).unwrap();
    world.server.put(&(service(11, twin) + &slice(11, &[&pod_ip(2, 1)]))).unwrap();
    world.server.put(&(service(12, "") + &slice(12, &[&node_ip(1)]))).unwrap();
    world.server.put(&(service(13, "") + &slice(13, &["0.0.0.0", "127.0.0.1", "224.0.0.1"]))).unwrap();
    world.server.put_value(many_ports(14, 100)).unwrap();
    world.start();
    let few = world.memory("VmRSS");
    assert_eq!(world.asked(10).as_deref(), Some("pod11"));
    assert_eq!(world.asked(11).as_deref(), Some("pod21"), "one uid, two Services");
    let served = world.served();
    assert_eq!(served[&frontend(12)], [format!("{}:8080", node_ip(1))]);
    let ports = served.keys().filter(|frontend| frontend.starts_with("10.96.0.14:")).count();
    assert_eq!(ports, 100);
    assert!(served[&frontend(13)].is_empty(), "addresses of nowhere: {:?}", served[&frontend(13)]);
    world.until_logged("127.0.0.1 is no address of an endpoint");

    world.server.put(&service(15, "")).unwrap();
    put_endpoints(&world.server, 15, 20_000);
    world
        .until("20 000 endpoints", |served| served.get(&frontend(15)).is_some_and(|all| all.len() == 20_000));
    assert_eq!(world.asked(9).as_deref(), Some("pod11"), "others are served beside it");
    let (many, peak) = (world.memory("VmRSS"), world.memory("VmHWM"));
    println!("agent: {few} KiB, with 20 000 endpoints {many} KiB, at most {peak} KiB");
    assert!(peak < 512 * 1024, "{peak} KiB");
}

fn many_ports(number: u8, count: u16) -> Value {
    let ports: Vec<Value> =
        (0..count).map(|port| json!({"name": format!("p{port}"), "port": 1000 + port})).collect();
    json!({
        "kind": "Service",
        "metadata": {"name": format!("s{number}")},
        "spec": {"clusterIP": format!("10.96.0.{number}"), "ports": ports},
    })
}

/// Slices of 100 endpoints, as the endpoint slice controller makes them.
fn put_endpoints(server: &ApiServer, number: u8, count: u32) {
    for index in 0..count / 100 {
        let endpoints: Vec<Value> = (0..100)
            .map(|endpoint| json!({"addresses": [std::net::Ipv4Addr::from(0x0a80_0000 + index * 256 + endpoint + 1)]}))
            .collect();
        let slice = json!({
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("s{number}-{index}"),
                "labels": {"kubernetes.io/service-name": format!("s{number}")},
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}],
            "endpoints": endpoints,
        });
        server.put_value(slice).unwrap();
    }
}

#[test]
fn service_cidrs_may_be_forbidden_or_unknown() {
    for forbidden in [true, false] {
        let mut world = World::new();
        world.server.put(&whole(10)).unwrap();
        if forbidden {
            world.server.forbid(Kind::ServiceCidr);
        } else {
            world.server.unlearn(Kind::ServiceCidr);
        }
        world.start();
        assert_eq!(world.asked(10).as_deref(), Some("pod11"));
        assert_eq!(world.log().contains("ClusterRole lacks"), forbidden);
        world.server.put(&whole(11)).unwrap();
        world.until("a change", |served| served.contains_key(&frontend(11)));
    }
}

/// The ConfigMap of a cluster made by kubeadm, its kubeconfig put in another place.
#[test]
fn kubeadms_configuration_works_unchanged() {
    let mut world = World::new();
    world.server.put(&whole(10)).unwrap();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../lb-agent/tests/config/kubeadm.yaml");
    world.cluster.agent_options = vec!["--config".into(), file.into()];
    world.start();
    assert!(world.serves(10), "{:?}", world.served());
    let curl = ["-s", "http://127.0.0.1:10249/configz"];
    let said = netns::output(world.cluster.lab.command("node1", "curl").args(curl)).unwrap();
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["kubeproxy.config.k8s.io"]["clusterCIDR"], "10.244.0.0/16");
}

#[test]
fn master_goes_before_the_kubeconfigs_address() {
    let mut world = World::new();
    world.server.put(&whole(10)).unwrap();
    let kubeconfig = world.cluster.kubeconfig.clone().expect("a kubeconfig");
    let server = format!("https://{CLIENT}:6443");
    let text = fs::read_to_string(&kubeconfig).unwrap();
    assert!(text.contains(&server), "{text}");
    fs::write(&kubeconfig, text.replace(&server, "https://192.0.2.77:1")).unwrap();
    world.cluster.agent_options = vec!["--master".into(), server];
    world.start();
    assert!(world.serves(10), "{:?}", world.served());
}

#[test]
fn a_forbidden_kind_is_named() {
    let mut world = World::new();
    world.server.put(&whole(10)).unwrap();
    world.server.forbid(Kind::EndpointSlice);
    world.cluster.launch_agent(1).unwrap();
    world.until_logged("ClusterRole");
    assert!(world.log().lines().any(|line| line.contains("ClusterRole") && line.contains("EndpointSlice")));
    assert!(world.served().is_empty(), "nothing is served before all is known");
    world.server.allow_all();
    world.cluster.wait_until_healthy(1).unwrap();
    assert_eq!(world.asked(10).as_deref(), Some("pod11"));
}

/// Nobody is to send to a node that has left the cluster, also if its agent began after that.
#[test]
fn an_agent_without_a_node_is_not_eligible() {
    let mut world = World::new();
    world.server.delete(Kind::Node, "", "node1");
    world.server.put(&whole(10)).unwrap();
    world.cluster.launch_agent(1).unwrap();
    let healthz = || {
        let url = "http://127.0.0.1:10256/healthz";
        let said = netns::output(world.cluster.lab.command("node1", "curl").args(["-s", url]));
        serde_json::from_str(&said.unwrap_or_default()).unwrap_or(Value::Null)
    };
    world.wait("it is programmed", || healthz()["healthy"] == true);
    assert_eq!(healthz()["nodeEligible"], false);
    assert_eq!(world.asked(10).as_deref(), Some("pod11"), "it serves");
    world.server.put(&node_manifests()).unwrap();
    world.wait("its Node comes", || healthz()["nodeEligible"] == true);
}

#[test]
fn who_is_not_let_in_is_told_the_way_out() {
    for (stranger, wanted, reason) in [
        (true, "kubeconfig with a valid token", "401 Unauthorized"),
        (false, "certificate-authority in", "invalid peer certificate"),
    ] {
        let mut world = World::new();
        let of = |server: &ApiServer| {
            if stranger { server.kubeconfig_of_a_stranger() } else { server.kubeconfig_of_another_ca() }
        };
        world.cluster.kubeconfig = Some(of(&world.server).unwrap());
        world.cluster.launch_agent(1).unwrap();
        world.until_logged(wanted);
        let said = world.log();
        let line = said.lines().find(|line| line.contains(wanted)).unwrap();
        assert!(line.contains("WARN") && line.contains(reason), "{line}");
    }
}
