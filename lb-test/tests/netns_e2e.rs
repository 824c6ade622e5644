//! Cases of Kubernetes' e2e suite (`test/e2e/network/service.go`, `loadbalancer.go`, `traffic_distribution.go`,
//! `dual_stack.go`, `no_snat.go`, `kube_proxy.go`), by their names there. `docs/e2e.md` lists all.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use lb_test::{
    cluster::{CLIENT, Cluster, node_ip, pod_ip},
    e2e::{HTTP, INSIDE, answers, cluster, expect, http, nodes, on, service, slices},
    load::Load,
    netns, until,
};

/// A case: its name, and what it does to a cluster.
type Case = (&'static str, fn(&mut Cluster));

macro_rules! cases {
    ($($case:ident),* $(,)?) => { &[$((stringify!($case), $case as fn(&mut Cluster))),*] };
}

/// One cluster for all of them; whichever fail are named. `E2E` in the environment picks those whose names hold it.
fn run(cases: &[Case]) {
    let wanted = std::env::var("E2E").unwrap_or_default();
    let mut cluster = cluster();
    let mut failed = Vec::new();
    for (name, case) in cases.iter().filter(|(name, _)| name.contains(&wanted)) {
        let begun = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| case(&mut cluster)));
        println!(
            "{name}: {}, {:.1} s",
            if result.is_ok() { "ok" } else { "FAILED" },
            begun.elapsed().as_secs_f32()
        );
        failed.extend(result.is_err().then_some(*name));
        apply(&cluster, "");
        nodes(&cluster, "");
    }
    assert!(failed.is_empty(), "failed: {}", failed.join(", "));
}

#[test]
fn services() {
    run(cases![
        should_serve_a_basic_endpoint_from_pods,
        should_serve_multiport_endpoints_from_pods,
        should_be_updated_after_adding_or_deleting_ports,
        should_be_able_to_up_and_down_services,
        should_work_after_the_service_has_been_recreated,
        should_serve_endpoints_on_same_port_and_different_protocols,
        should_resolve_named_target_ports_to_each_endpoints_own,
        should_serve_endpoints_of_restartable_init_containers,
        should_create_endpoints_for_unready_pods,
        should_be_rejected_when_no_endpoints_exist_and_for_evicted_pods,
        should_implement_service_kubernetes_io_service_proxy_name,
        should_implement_service_kubernetes_io_headless,
    ]);
}

#[test]
fn addresses() {
    run(cases![
        should_be_able_to_create_a_functioning_node_port_service,
        should_be_possible_to_connect_to_a_service_via_external_ip_when_the_external_ip_is_not_assigned_to_a_node,
        should_be_able_to_update_service_type_to_node_port_listening_on_same_port_number_but_different_protocols,
        should_be_able_to_change_the_type_among_external_name_cluster_ip_and_node_port,
        should_be_able_to_reach_dual_stack_services_by_both_families,
        should_allow_creating_load_balancer_service_without_node_port_and_change_its_source_ranges,
    ]);
}

#[test]
fn clients() {
    run(cases![
        should_preserve_source_pod_ip_for_traffic_thru_service_cluster_ip,
        should_allow_pods_to_hairpin_back_to_themselves_through_services,
        should_be_able_to_send_traffic_between_pods_without_snat,
        should_be_able_to_switch_session_affinity_for_service_with_type_cluster_ip_and_node_port,
        should_have_session_affinity_timeout_work_for_service_with_type_cluster_ip_and_node_port,
        should_have_session_affinity_work_for_load_balancer_service_with_local_and_cluster,
    ]);
}

#[test]
fn policies() {
    run(cases![
        should_respect_internal_traffic_policy_local,
        should_preserve_client_ip_and_keep_to_local_endpoints_with_external_traffic_policy_local,
        should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints_with_internal_traffic_policy_cluster,
        should_fallback_to_local_terminating_endpoints_when_there_are_no_ready_endpoints_with_internal_traffic_policy_local,
        should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints_with_external_traffic_policy_cluster,
        should_fallback_to_local_terminating_endpoints_when_there_are_no_ready_endpoints_with_external_traffic_policy_local,
        should_route_traffic_to_an_endpoint_in_the_same_zone_or_node_with_fallback,
    ]);
}

#[test]
fn disruptions() {
    run(cases![
        should_set_tcp_close_wait_timeout,
        should_work_after_restarting_kube_proxy,
        should_not_have_connectivity_disruption_during_rolling_update,
    ]);
}

const OUTSIDE: [(&str, Option<u8>); 1] = [("client", None)];

fn apply(cluster: &Cluster, text: &str) {
    cluster.apply("e2e.yaml", text).unwrap();
}

fn node_port(node: u8, port: u16) -> String {
    format!("{}:{port}", node_ip(node))
}

/// Whom the endpoint sees.
fn client_of(cluster: &Cluster, (from, served): (&str, Option<u8>), target: &str) -> String {
    cluster.tcp(from, served, target).unwrap().client.unwrap_or_default()
}

fn should_serve_a_basic_endpoint_from_pods(cluster: &mut Cluster) {
    let endpoints =
        |endpoints: &[&str]| apply(cluster, &(service("web", 10, HTTP) + &http("web", endpoints)));
    for who in [&[][..], &["pod11"], &["pod11", "pod21"], &["pod21"], &[]] {
        endpoints(who);
        let wanted = if who.is_empty() { &["refused"] } else { who };
        expect(cluster, INSIDE, "10.96.0.10:80", wanted);
        expect(cluster, OUTSIDE, "10.96.0.10:80", wanted);
    }
}

fn should_serve_multiport_endpoints_from_pods(cluster: &mut Cluster) {
    let ports = "ports: [{name: portname1, port: 80, targetPort: 8080}, {name: portname2, port: 81, targetPort: 8081}]";
    let slice = |name: &str, port: u16, pod: &str| {
        slices("web", &format!("{{name: {name}, port: {port}}}"), &[pod])
            .replace("web-", &format!("web-{name}-"))
    };
    let (first, second) = (slice("portname1", 8080, "pod11"), slice("portname2", 8081, "pod21"));
    apply(cluster, &(service("web", 10, ports) + &first + &second));
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11"]);
    expect(cluster, INSIDE, "10.96.0.10:81", &["pod21"]);
    apply(cluster, &(service("web", 10, ports) + &second));
    expect(cluster, INSIDE, "10.96.0.10:80", &["refused"]);
    expect(cluster, INSIDE, "10.96.0.10:81", &["pod21"]);
}

fn should_be_updated_after_adding_or_deleting_ports(cluster: &mut Cluster) {
    let web = |ports: &str, of_slices: &str| {
        apply(cluster, &(service("web", 10, ports) + &slices("web", of_slices, &["pod11", "pod21"])));
    };
    web("ports: [{name: http, port: 80}]", "{name: http, port: 8080}");
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11", "pod21"]);
    web(
        "ports: [{name: http, port: 80}, {name: alt, port: 81}]",
        "{name: http, port: 8080}, {name: alt, port: 8081}",
    );
    expect(cluster, INSIDE, "10.96.0.10:81", &["pod11", "pod21"]);
    web("ports: [{name: alt, port: 81}]", "{name: alt, port: 8081}");
    // iptables knows nothing of ports that are gone: node 2's clients are answered by nobody.
    expect(cluster, on(1), "10.96.0.10:80", &["refused"]);
    expect(cluster, INSIDE, "10.96.0.10:81", &["pod11", "pod21"]);
    let gone = answers(cluster, ("pod22", None), "tcp", "10.96.0.10:80");
    assert!(gone.iter().all(|answer| !answer.starts_with("pod")), "{gone:?}");
}

fn should_preserve_source_pod_ip_for_traffic_thru_service_cluster_ip(cluster: &mut Cluster) {
    for endpoint in ["pod11", "pod21"] {
        apply(cluster, &(service("web", 10, HTTP) + &http("web", &[endpoint])));
        for (client, addr) in [
            (("pod12", None), pod_ip(1, 2)),
            (("pod12", Some(1)), pod_ip(1, 2)),
            (("pod22", None), pod_ip(2, 2)),
        ] {
            expect(cluster, [client], "10.96.0.10:80", &[endpoint]);
            assert_eq!(client_of(cluster, client, "10.96.0.10:80"), addr, "{client:?} -> {endpoint}");
        }
    }
}

fn should_allow_pods_to_hairpin_back_to_themselves_through_services(cluster: &mut Cluster) {
    for endpoint in ["pod11", "pod21"] {
        apply(cluster, &(service("web", 10, HTTP) + &http("web", &[endpoint])));
        let served = (endpoint == "pod11").then_some(1);
        expect(cluster, [(endpoint, None), (endpoint, served)], "10.96.0.10:80", &[endpoint]);
    }
}

fn should_be_able_to_up_and_down_services(cluster: &mut Cluster) {
    let one = service("up-down-1", 11, HTTP) + &http("up-down-1", &["pod11", "pod21"]);
    let two = service("up-down-2", 12, HTTP) + &http("up-down-2", &["pod12", "pod22"]);
    let three = service("up-down-3", 13, HTTP) + &http("up-down-3", &["pod11", "pod22"]);
    apply(cluster, &(one + &two));
    expect(cluster, INSIDE, "10.96.0.11:80", &["pod11", "pod21"]);
    expect(cluster, INSIDE, "10.96.0.12:80", &["pod12", "pod22"]);
    apply(cluster, &two);
    until("service 1 is down", Duration::from_secs(10), || {
        INSIDE.into_iter().all(|client| {
            answers(cluster, client, "tcp", "10.96.0.11:80").iter().all(|answer| !answer.starts_with("pod"))
        })
    });
    expect(cluster, INSIDE, "10.96.0.12:80", &["pod12", "pod22"]);
    apply(cluster, &(two + &three));
    expect(cluster, INSIDE, "10.96.0.12:80", &["pod12", "pod22"]);
    expect(cluster, INSIDE, "10.96.0.13:80", &["pod11", "pod22"]);
}

fn should_work_after_the_service_has_been_recreated(cluster: &mut Cluster) {
    let web = service(
        "web",
        10,
        &format!("type: NodePort, {}", HTTP.replace("port: 80,", "port: 80, nodePort: 30080,")),
    );
    let endpoints = http("web", &["pod11", "pod21"]);
    let targets = ["10.96.0.10:80".to_owned(), node_port(1, 30080), node_port(2, 30080)];
    for round in 0..2 {
        apply(cluster, &(web.clone() + &endpoints));
        targets.iter().for_each(|target| expect(cluster, INSIDE, target, &["pod11", "pod21"]));
        if round == 0 {
            apply(cluster, &endpoints);
            until("the service is gone", Duration::from_secs(10), || {
                let seen = answers(cluster, ("client", None), "tcp", &targets[2]);
                seen.iter().all(|answer| !answer.starts_with("pod"))
            });
        }
    }
}

fn should_work_after_restarting_kube_proxy(cluster: &mut Cluster) {
    let one = service("restart-proxy-1", 11, HTTP) + &http("restart-proxy-1", &["pod11", "pod21"]);
    apply(cluster, &one);
    expect(cluster, INSIDE, "10.96.0.11:80", &["pod11", "pod21"]);
    for (node, mode) in [(1, "ebpf"), (2, "iptables")] {
        cluster.stop_agent(node, libc::SIGKILL).unwrap();
        // While nobody watches all is served as before.
        expect(cluster, on(node), "10.96.0.11:80", &["pod11", "pod21"]);
        let options = ["--mode", mode, "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"];
        cluster.agent_options = options.map(str::to_owned).to_vec();
        cluster.start_agent(node).unwrap();
        expect(cluster, on(node), "10.96.0.11:80", &["pod11", "pod21"]);
    }
    apply(cluster, &(one + &service("restart-proxy-2", 12, HTTP) + &http("restart-proxy-2", &["pod12"])));
    expect(cluster, INSIDE, "10.96.0.12:80", &["pod12"]);
}

fn should_be_able_to_create_a_functioning_node_port_service(cluster: &mut Cluster) {
    let ports = "type: NodePort, ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080}]";
    apply(cluster, &(service("web", 10, ports) + &http("web", &["pod11", "pod21"])));
    for node in [1, 2] {
        expect(cluster, INSIDE, &node_port(node, 30080), &["pod11", "pod21"]);
        expect(cluster, OUTSIDE, &node_port(node, 30080), &["pod11", "pod21"]);
    }
    for host in [("node1", Some(1)), ("node2", None)] {
        expect(cluster, [host], "127.0.0.1:30080", &["pod11", "pod21"]);
    }
}

fn should_be_possible_to_connect_to_a_service_via_external_ip_when_the_external_ip_is_not_assigned_to_a_node(
    cluster: &mut Cluster,
) {
    let fields = format!("externalIPs: [198.51.100.10, '2001:db8:ffff::10'], {HTTP}");
    apply(cluster, &(service("web", 10, &fields) + &http("web", &["pod11", "pod21"])));
    for target in ["198.51.100.10:80", "[2001:db8:ffff::10]:80"] {
        expect(cluster, INSIDE, target, &["pod11", "pod21"]);
        expect(cluster, OUTSIDE, target, &["pod11", "pod21"]);
    }
}

fn should_be_able_to_update_service_type_to_node_port_listening_on_same_port_number_but_different_protocols(
    cluster: &mut Cluster,
) {
    let tcp = "{name: tcp-port, port: 80, targetPort: 8080, nodePort: 30080}";
    let udp = "{name: udp-port, port: 80, targetPort: 8080, protocol: UDP, nodePort: 30080}";
    let endpoints = slices(
        "web",
        "{name: tcp-port, port: 8080}, {name: udp-port, port: 8080, protocol: UDP}",
        &["pod11", "pod21"],
    );
    apply(cluster, &(service("web", 10, "ports: [{name: tcp-port, port: 80}]") + &endpoints));
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11", "pod21"]);
    apply(cluster, &(service("web", 10, &format!("type: NodePort, ports: [{tcp}, {udp}]")) + &endpoints));
    for target in ["10.96.0.10:80".to_owned(), node_port(1, 30080), node_port(2, 30080)] {
        expect(cluster, INSIDE, &target, &["pod11", "pod21"]);
        for client in INSIDE.into_iter().chain(OUTSIDE) {
            until(&format!("{client:?} -> UDP {target}"), Duration::from_secs(10), || {
                answers(cluster, client, "udp", &target).iter().map(String::as_str).eq(["pod11", "pod21"])
            });
        }
    }
}

fn should_be_able_to_change_the_type_among_external_name_cluster_ip_and_node_port(cluster: &mut Cluster) {
    let endpoints = http("web", &["pod11", "pod21"]);
    let external_name =
        "kind: Service\nmetadata: {name: web}\nspec: {type: ExternalName, externalName: example.com}\n---\n";
    let node_ports = "type: NodePort, ports: [{name: http, port: 80, nodePort: 30080}]";
    let silent = |target: &str| {
        until(&format!("nobody serves {target}"), Duration::from_secs(10), || {
            let seen = answers(cluster, ("pod12", None), "tcp", target);
            seen.iter().all(|answer| !answer.starts_with("pod"))
        });
    };
    apply(cluster, &(external_name.to_owned() + &endpoints));
    silent("10.96.0.10:80");
    apply(cluster, &(service("web", 10, HTTP) + &endpoints));
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11", "pod21"]);
    apply(cluster, &(external_name.to_owned() + &endpoints));
    silent("10.96.0.10:80");
    apply(cluster, &(service("web", 10, node_ports) + &endpoints));
    expect(cluster, INSIDE, &node_port(2, 30080), &["pod11", "pod21"]);
    apply(cluster, &(service("web", 10, HTTP) + &endpoints));
    silent(&node_port(2, 30080));
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11", "pod21"]);
    apply(cluster, &(external_name.to_owned() + &endpoints));
    silent("10.96.0.10:80");
}

fn should_create_endpoints_for_unready_pods(cluster: &mut Cluster) {
    let pod = format!(
        "kind: Pod\nmetadata: {{name: pod11, labels: {{app: web}}}}\nspec: {{nodeName: node1, containers: [{{name: c}}]}}\nstatus: {{conditions: [{{type: Ready, status: 'False'}}], podIPs: [{{ip: {}}}]}}\n---\n",
        pod_ip(1, 1)
    );
    let web = |publish: bool| {
        let fields = format!("publishNotReadyAddresses: {publish}, selector: {{app: web}}, {HTTP}");
        apply(cluster, &(pod.clone() + &service("web", 10, &fields)));
    };
    web(true);
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11"]);
    web(false);
    expect(cluster, INSIDE, "10.96.0.10:80", &["refused"]);
    web(true);
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11"]);
}

fn should_serve_endpoints_of_restartable_init_containers(cluster: &mut Cluster) {
    let pod = |ready: &str, restart_policy: &str| {
        let sidecar = format!("{{name: s, {restart_policy}ports: [{{name: web, containerPort: 8080}}]}}");
        format!(
            "kind: Pod\nmetadata: {{name: pod11, labels: {{app: web}}}}\nspec: {{nodeName: node1, initContainers: [{sidecar}], containers: [{{name: c}}]}}\nstatus: {{conditions: [{{type: Ready, status: '{ready}'}}], podIPs: [{{ip: {}}}]}}\n---\n",
            pod_ip(1, 1)
        )
    };
    let fields = "selector: {app: web}, ports: [{name: http, port: 80, targetPort: web}]";
    let web = |pod: String| apply(cluster, &(pod + &service("web", 10, fields)));
    web(pod("False", "restartPolicy: Always, "));
    expect(cluster, INSIDE, "10.96.0.10:80", &["refused"]);
    web(pod("True", "restartPolicy: Always, "));
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11"]);
    // One that runs and ends serves nobody.
    web(pod("True", ""));
    expect(cluster, INSIDE, "10.96.0.10:80", &["refused"]);
}

/// With affinity for so many seconds, or without.
fn affine(cluster: &Cluster, secs: Option<u32>) {
    let affinity = secs.map_or("sessionAffinity: None".to_owned(), |secs| {
        format!("sessionAffinity: ClientIP, sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {secs}}}}}")
    });
    let fields = format!("type: NodePort, {affinity}, ports: [{{name: http, port: 80, nodePort: 30080}}]");
    apply(cluster, &(service("web", 10, &fields) + &http("web", &["pod11", "pod21"])));
}

/// All of a client's connections come to one endpoint.
fn keeps_to_one(cluster: &Cluster, client: (&'static str, Option<u8>), target: &str) {
    until(&format!("{client:?} -> {target}: one endpoint"), Duration::from_secs(10), || {
        let seen = answers(cluster, client, "tcp", target);
        seen.len() == 1 && seen.iter().all(|answer| answer.starts_with("pod"))
    });
}

fn should_be_able_to_switch_session_affinity_for_service_with_type_cluster_ip_and_node_port(
    cluster: &mut Cluster,
) {
    let targets = ["10.96.0.10:80".to_owned(), node_port(1, 30080), node_port(2, 30080)];
    for secs in [None, Some(100), None] {
        affine(cluster, secs);
        for target in &targets {
            for client in INSIDE.into_iter().chain(OUTSIDE) {
                match secs {
                    Some(_) => keeps_to_one(cluster, client, target),
                    None => expect(cluster, [client], target, &["pod11", "pod21"]),
                }
            }
        }
    }
}

fn should_have_session_affinity_timeout_work_for_service_with_type_cluster_ip_and_node_port(
    cluster: &mut Cluster,
) {
    affine(cluster, Some(1));
    for (client, target) in [
        (("pod12", None), "10.96.0.10:80".to_owned()),
        (("pod22", None), "10.96.0.10:80".into()),
        (("client", None), node_port(2, 30080)),
    ] {
        keeps_to_one(cluster, client, &target);
        let first = answers(cluster, client, "tcp", &target);
        // Each time it has slept long enough its next endpoint is a matter of chance.
        let mut tries = 0;
        until("another endpoint after the timeout", Duration::from_secs(90), || {
            tries += 1;
            std::thread::sleep(Duration::from_millis(2200));
            answers(cluster, client, "tcp", &target) != first
        });
        println!("{client:?} -> {target}: after {tries} tries");
    }
}

fn should_have_session_affinity_work_for_load_balancer_service_with_local_and_cluster(cluster: &mut Cluster) {
    let status = "status: {loadBalancer: {ingress: [{ip: 198.51.100.10}]}}\n---\n";
    for (policy, endpoints) in [("Local", &["pod11", "pod12"][..]), ("Cluster", &["pod11", "pod12", "pod21"])]
    {
        for affinity in ["None", "ClientIP"] {
            let fields = format!(
                "type: LoadBalancer, externalTrafficPolicy: {policy}, sessionAffinity: {affinity}, {HTTP}"
            );
            let service = service("web", 10, &fields).replace("---\n", status);
            apply(cluster, &(service + &http("web", &["pod11", "pod12", "pod21"])));
            // They come by way of node 1.
            match affinity {
                "None" => expect(cluster, OUTSIDE, "198.51.100.10:80", endpoints),
                _ => keeps_to_one(cluster, OUTSIDE[0], "198.51.100.10:80"),
            }
        }
    }
}

fn should_implement_service_kubernetes_io_service_proxy_name(cluster: &mut Cluster) {
    let labelled = service("web", 10, HTTP)
        .replace("{name: web}", "{name: web, labels: {service.kubernetes.io/service-proxy-name: foo-bar}}");
    let endpoints = http("web", &["pod11", "pod21"]);
    let other = service("other", 11, HTTP) + &http("other", &["pod12"]);
    for served in [false, true, false] {
        let web = if served { service("web", 10, HTTP) } else { labelled.clone() };
        apply(cluster, &(web + &endpoints + &other));
        for client in INSIDE {
            if served {
                expect(cluster, [client], "10.96.0.10:80", &["pod11", "pod21"]);
            } else {
                until(&format!("{client:?}: not ours"), Duration::from_secs(10), || {
                    let seen = answers(cluster, client, "tcp", "10.96.0.10:80");
                    seen.iter().all(|answer| !answer.starts_with("pod"))
                });
            }
            expect(cluster, [client], "10.96.0.11:80", &["pod12"]);
        }
    }
}

fn should_implement_service_kubernetes_io_headless(cluster: &mut Cluster) {
    let endpoints = http("web", &["pod11", "pod21"]);
    let headless = endpoints.replace("labels: {", "labels: {service.kubernetes.io/headless: '', ");
    for labelled in [true, false, true] {
        let endpoints = if labelled { &headless } else { &endpoints };
        apply(cluster, &(service("web", 10, HTTP) + endpoints));
        expect(cluster, INSIDE, "10.96.0.10:80", if labelled { &["refused"] } else { &["pod11", "pod21"] });
    }
}

fn should_be_rejected_when_no_endpoints_exist_and_for_evicted_pods(cluster: &mut Cluster) {
    let fields =
        "type: NodePort, externalIPs: [198.51.100.10], ports: [{name: http, port: 80, nodePort: 30080}]";
    // An evicted pod's endpoint is neither ready nor serving.
    for endpoints in [&[][..], &["pod11 ready: false, serving: false, terminating: false"]] {
        apply(cluster, &(service("web", 10, fields) + &http("web", endpoints)));
        for target in
            ["10.96.0.10:80".to_owned(), "198.51.100.10:80".into(), node_port(1, 30080), node_port(2, 30080)]
        {
            // kube-proxy's rules ask about external addresses on the way in and through, not on the way out of a node
            // (KUBE-EXTERNAL-SERVICES in `iptables/proxier.go`).
            let asked =
                INSIDE.into_iter().filter(|(host, _)| *host != "node2" || !target.starts_with("198.51"));
            expect(cluster, asked, &target, &["refused"]);
            expect(cluster, OUTSIDE, &target, &["refused"]);
        }
    }
}

fn should_respect_internal_traffic_policy_local(cluster: &mut Cluster) {
    let fields = format!("internalTrafficPolicy: Local, {HTTP}");
    for (here, endpoint) in [(1, "pod11"), (2, "pod21")] {
        apply(cluster, &(service("web", 10, &fields) + &http("web", &[endpoint])));
        expect(cluster, on(here), "10.96.0.10:80", &[endpoint]);
        for client in on(3 - here) {
            // Packets are dropped, a socket that BPF programs see gets its error at once.
            let error = if client.1.is_some() { "denied" } else { "timeout" };
            expect(cluster, [client], "10.96.0.10:80", &[error]);
        }
    }
    // The endpoint is a pod in its node's own network.
    let host_network = slices("web", "{name: http, port: 9000}", &["node1"]);
    apply(cluster, &(service("web", 10, &fields) + &host_network));
    expect(cluster, on(1), "10.96.0.10:80", &["node1"]);
    expect(cluster, [("pod22", None)], "10.96.0.10:80", &["timeout"]);
}

fn should_preserve_client_ip_and_keep_to_local_endpoints_with_external_traffic_policy_local(
    cluster: &mut Cluster,
) {
    let fields =
        "type: NodePort, externalTrafficPolicy: Local, ports: [{name: http, port: 80, nodePort: 30080}]";
    for (here, endpoint) in [(1, "pod11"), (2, "pod21")] {
        apply(cluster, &(service("web", 10, fields) + &http("web", &[endpoint])));
        expect(cluster, OUTSIDE, &node_port(here, 30080), &[endpoint]);
        assert_eq!(client_of(cluster, ("client", None), &node_port(here, 30080)), CLIENT);
        expect(cluster, OUTSIDE, &node_port(3 - here, 30080), &["timeout"]);
        // Clients in the cluster are served by any endpoint at their own node's address.
        for node in [1, 2] {
            expect(cluster, on(node), &node_port(node, 30080), &[endpoint]);
        }
    }
}

const TERMINATING: &str = "ready: false, serving: true, terminating: true";

fn should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints_with_internal_traffic_policy_cluster(
    cluster: &mut Cluster,
) {
    let web = |endpoints: &[&str]| apply(cluster, &(service("web", 10, HTTP) + &http("web", endpoints)));
    let terminating = |pod: &str| format!("{pod} {TERMINATING}");
    web(&["pod11", &terminating("pod21")]);
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11"]);
    web(&[&terminating("pod11"), &terminating("pod21")]);
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11", "pod21"]);
    web(&["pod11 ready: false, serving: false, terminating: true", &terminating("pod21")]);
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod21"]);
}

fn should_fallback_to_local_terminating_endpoints_when_there_are_no_ready_endpoints_with_internal_traffic_policy_local(
    cluster: &mut Cluster,
) {
    let fields = format!("internalTrafficPolicy: Local, {HTTP}");
    let web = |endpoints: &[&str]| apply(cluster, &(service("web", 10, &fields) + &http("web", endpoints)));
    let terminating = |pod: &str| format!("{pod} {TERMINATING}");
    web(&[&terminating("pod11"), "pod21"]);
    expect(cluster, on(1), "10.96.0.10:80", &["pod11"]);
    expect(cluster, on(2), "10.96.0.10:80", &["pod21"]);
    web(&[&terminating("pod11"), &terminating("pod21")]);
    expect(cluster, on(1), "10.96.0.10:80", &["pod11"]);
    expect(cluster, on(2), "10.96.0.10:80", &["pod21"]);
}

fn should_fallback_to_terminating_endpoints_when_there_are_no_ready_endpoints_with_external_traffic_policy_cluster(
    cluster: &mut Cluster,
) {
    let fields = "type: NodePort, ports: [{name: http, port: 80, nodePort: 30080}]";
    let web = |endpoints: &[&str]| apply(cluster, &(service("web", 10, fields) + &http("web", endpoints)));
    let terminating = |pod: &str| format!("{pod} {TERMINATING}");
    for (endpoints, who) in [
        ([terminating("pod11"), "pod21".into()], &["pod21"][..]),
        ([terminating("pod11"), terminating("pod21")], &["pod11", "pod21"]),
    ] {
        web(&endpoints.each_ref().map(String::as_str));
        for node in [1, 2] {
            expect(cluster, OUTSIDE, &node_port(node, 30080), who);
            expect(cluster, INSIDE, &node_port(node, 30080), who);
        }
    }
}

fn should_fallback_to_local_terminating_endpoints_when_there_are_no_ready_endpoints_with_external_traffic_policy_local(
    cluster: &mut Cluster,
) {
    let fields =
        "type: NodePort, externalTrafficPolicy: Local, ports: [{name: http, port: 80, nodePort: 30080}]";
    let web = |endpoints: &[&str]| apply(cluster, &(service("web", 10, fields) + &http("web", endpoints)));
    let terminating = |pod: &str| format!("{pod} {TERMINATING}");
    web(&[&terminating("pod11"), "pod12", "pod21"]);
    expect(cluster, OUTSIDE, &node_port(1, 30080), &["pod12"]);
    web(&[&terminating("pod11"), &terminating("pod21")]);
    for (node, pod) in [(1, "pod11"), (2, "pod21")] {
        expect(cluster, OUTSIDE, &node_port(node, 30080), &[pod]);
        assert_eq!(client_of(cluster, ("client", None), &node_port(node, 30080)), CLIENT);
    }
}

fn should_serve_endpoints_on_same_port_and_different_protocols(cluster: &mut Cluster) {
    let (tcp, udp) = ("{name: tcp, port: 80}", "{name: udp, port: 80, protocol: UDP}");
    let web = |ports: &str| {
        let endpoints =
            slices("web", "{name: tcp, port: 8080}, {name: udp, port: 8080, protocol: UDP}", &["pod11"]);
        apply(cluster, &(service("web", 10, &format!("ports: [{ports}]")) + &endpoints));
    };
    let over_udp = |wanted: &str| {
        for client in INSIDE {
            until(&format!("{client:?} over UDP: {wanted}"), Duration::from_secs(10), || {
                answers(cluster, client, "udp", "10.96.0.10:80").iter().any(|answer| answer == wanted)
            });
        }
    };
    web(&format!("{tcp}, {udp}"));
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11"]);
    over_udp("pod11");
    web(tcp);
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11"]);
    until("UDP is no longer served", Duration::from_secs(10), || {
        !answers(cluster, ("pod12", None), "udp", "10.96.0.10:80").contains("pod11")
            && !answers(cluster, ("pod22", None), "udp", "10.96.0.10:80").contains("pod11")
    });
    web(&format!("{tcp}, {udp}"));
    over_udp("pod11");
}

fn should_resolve_named_target_ports_to_each_endpoints_own(cluster: &mut Cluster) {
    let slice = |name: &str, port: u16, pod: &str| {
        slices("web", &format!("{{name: http, port: {port}}}"), &[pod])
            .replace("web-", &format!("web-{name}-"))
    };
    apply(cluster, &(service("web", 10, HTTP) + &slice("a", 8080, "pod11") + &slice("b", 8081, "pod21")));
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11", "pod21"]);
}

fn should_allow_creating_load_balancer_service_without_node_port_and_change_its_source_ranges(
    cluster: &mut Cluster,
) {
    let web = |ranges: &str| {
        let status = "status: {loadBalancer: {ingress: [{ip: 198.51.100.10, ipMode: VIP}]}}\n---\n";
        let fields = format!("type: LoadBalancer, allocateLoadBalancerNodePorts: false, {ranges}{HTTP}");
        let service = service("web", 10, &fields).replace("---\n", status);
        apply(cluster, &(service + &http("web", &["pod11", "pod21"])));
    };
    web("");
    expect(cluster, OUTSIDE, "198.51.100.10:80", &["pod11", "pod21"]);
    expect(cluster, INSIDE, "198.51.100.10:80", &["pod11", "pod21"]);
    web(&format!("loadBalancerSourceRanges: [{}/32], ", pod_ip(1, 2)));
    expect(cluster, OUTSIDE, "198.51.100.10:80", &["timeout"]);
    expect(cluster, [("pod12", None)], "198.51.100.10:80", &["pod11", "pod21"]);
    expect(cluster, [("pod22", None)], "198.51.100.10:80", &["timeout"]);
    web(&format!("loadBalancerSourceRanges: [{CLIENT}/32], "));
    expect(cluster, OUTSIDE, "198.51.100.10:80", &["pod11", "pod21"]);
    expect(cluster, [("pod12", None)], "198.51.100.10:80", &["timeout"]);
    web("");
    expect(cluster, [("pod12", None), ("pod22", None)], "198.51.100.10:80", &["pod11", "pod21"]);
}

fn should_not_have_connectivity_disruption_during_rolling_update(cluster: &mut Cluster) {
    for (number, policy) in [(11, "Cluster"), (12, "Local")] {
        let fields = format!(
            "type: NodePort, externalTrafficPolicy: {policy}, ports: [{{name: http, port: 80, nodePort: 300{number}}}]"
        );
        let web = |endpoints: &[&str]| {
            apply(cluster, &(service("web", number, &fields) + &http("web", endpoints)));
        };
        web(&["pod11", "pod21"]);
        let targets = [1, 2].map(|node| node_port(node, 30000 + u16::from(number)));
        expect(
            cluster,
            OUTSIDE,
            &targets[0],
            if policy == "Local" { &["pod11"] } else { &["pod11", "pod21"] },
        );
        let clients = ["--connections", "10", "--udp", "0"];
        let start = |target: &String| Load::start(cluster, ("client", None), target, &clients).unwrap();
        let loads = targets.each_ref().map(start);
        let terminating = |pod: &str| format!("{pod} {TERMINATING}");
        for endpoints in [
            [&["pod11".to_owned(), "pod12".into(), "pod21".into(), "pod22".into()][..]].concat(),
            [terminating("pod11"), "pod12".into(), terminating("pod21"), "pod22".into()].to_vec(),
            ["pod12".to_owned(), "pod22".into()].to_vec(),
            ["pod11".to_owned(), terminating("pod12"), "pod21".into(), terminating("pod22")].to_vec(),
        ] {
            std::thread::sleep(Duration::from_millis(1500));
            web(&endpoints.iter().map(String::as_str).collect::<Vec<_>>());
        }
        // Servers don't end here: whoever was connected stays so.
        loads.into_iter().for_each(Load::stop_unharmed);
    }
}

fn should_route_traffic_to_an_endpoint_in_the_same_zone_or_node_with_fallback(cluster: &mut Cluster) {
    nodes(cluster, "topology.kubernetes.io/zone: zone{node}");
    let hinted = |hints: fn(&str) -> String| {
        let endpoints = ["pod11", "pod21"].map(|pod| format!("{pod} hints:{}", hints(&pod[3..4])));
        apply(cluster, &(service("web", 10, HTTP) + &http("web", &endpoints.each_ref().map(String::as_str))));
    };
    // PreferClose and PreferSameZone.
    hinted(|node| format!("{{forZones: [{{name: zone{node}}}]}}"));
    expect(cluster, on(1), "10.96.0.10:80", &["pod11"]);
    expect(cluster, on(2), "10.96.0.10:80", &["pod21"]);
    // PreferSameNode goes before zones.
    hinted(|node| format!("{{forZones: [{{name: zone1}}], forNodes: [{{name: node{node}}}]}}"));
    expect(cluster, on(1), "10.96.0.10:80", &["pod11"]);
    expect(cluster, on(2), "10.96.0.10:80", &["pod21"]);
    // Nobody is left without: no hint names zone 2, or not all endpoints have one.
    hinted(|_| "{forZones: [{name: zone1}]}".into());
    expect(cluster, on(1), "10.96.0.10:80", &["pod11", "pod21"]);
    expect(cluster, on(2), "10.96.0.10:80", &["pod11", "pod21"]);
    let some = ["pod11 hints:{forZones: [{name: zone1}]}", "pod21"];
    apply(cluster, &(service("web", 10, HTTP) + &http("web", &some)));
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11", "pod21"]);
}

fn should_be_able_to_reach_dual_stack_services_by_both_families(cluster: &mut Cluster) {
    let ports = "type: NodePort, ports: [{name: http, port: 80, nodePort: 30080}]";
    apply(cluster, &(service("web", 10, ports) + &http("web", &["pod11", "pod21"])));
    for target in [
        "10.96.0.10:80",
        "[fd00:10:96::10]:80",
        "192.0.2.11:30080",
        "[2001:db8::11]:30080",
        "[2001:db8::12]:30080",
    ] {
        expect(cluster, INSIDE, target, &["pod11", "pod21"]);
        expect(cluster, OUTSIDE, target, &["pod11", "pod21"]);
    }
    // To one family and back.
    let single = service("web", 10, HTTP).replace(", 'fd00:10:96::10'", "");
    apply(cluster, &(single + &http("web", &["pod11", "pod21"])));
    expect(cluster, INSIDE, "10.96.0.10:80", &["pod11", "pod21"]);
    until("IPv6 is gone", Duration::from_secs(10), || {
        INSIDE.into_iter().all(|client| {
            answers(cluster, client, "tcp", "[fd00:10:96::10]:80")
                .iter()
                .all(|answer| !answer.starts_with("pod"))
        })
    });
}

fn should_be_able_to_send_traffic_between_pods_without_snat(cluster: &mut Cluster) {
    for ((node, pod), (to_node, to_pod)) in
        [((1, 2), (1, 1)), ((1, 2), (2, 1)), ((2, 2), (1, 1)), ((2, 2), (2, 1))]
    {
        let target = format!("{}:8080", pod_ip(to_node, to_pod));
        let from: &'static str = if node == 1 { "pod12" } else { "pod22" };
        assert_eq!(client_of(cluster, (from, None), &target), pod_ip(node, pod), "{from} -> {target}");
    }
}

fn should_set_tcp_close_wait_timeout(cluster: &mut Cluster) {
    for node in ["node1", "node2"] {
        let path = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";
        let secs = netns::output(cluster.lab.command(node, "cat").arg(path)).unwrap();
        assert_eq!(secs.trim(), "3600", "{node}: {}", fs::read_to_string(cluster.agent_log(1)).unwrap());
    }
}
