//! Whole frames through the shipped programs: every path, both families, and what must not be touched.

use std::net::SocketAddr;

use lb_agent::{
    conntrack::Tuple,
    datapath::ebpf::{drain, foreign::Foreign, gone},
};
use lb_common::outcome::Outcome::{self, *};
use lb_core::{
    model::{
        Endpoint, EndpointSlice, Event, Family, ObjectName, Protocol, Service, ServicePort, SlicePort,
        TrafficPolicy,
    },
    synthetic,
};
use lb_test::{
    object::{CLIENT_MAC, NODE_MAC, Node, OTHER_MAC, Ran, Run, source_of},
    packet::{Frame, L4, hex, syn, tcp, udp},
};

const RST: u8 = 4;
const ACK: u8 = 16;
const FIN: u8 = 1;
const SYN: u8 = 2;

/// One family's addresses.
struct World {
    v6: bool,
    client: &'static str,
    node: &'static str,
    /// Pods on this node and on the other.
    here: &'static str,
    far: &'static str,
    /// External IPs of `near`, `remote`, `none`, `elsewhere`, `ranged`, `sticky`.
    vip: fn(u8) -> String,
    cluster_ip: fn(u8) -> String,
}

const V4: World = World {
    v6: false,
    client: "192.0.2.9",
    node: "192.0.2.11",
    here: "10.244.1.11",
    far: "10.244.2.11",
    vip: |n| format!("198.51.100.{n}"),
    cluster_ip: |n| format!("10.96.0.{n}"),
};
const V6: World = World {
    v6: true,
    client: "2001:db8::9",
    node: "2001:db8::11",
    here: "fd00:10:244:1::11",
    far: "fd00:10:244:2::11",
    vip: |n| format!("2001:db8:ffff::{n}"),
    cluster_ip: |n| format!("fd00:10:96::{n}"),
};

impl World {
    fn at(&self, addr: &str, port: u16) -> String {
        if self.v6 { format!("[{addr}]:{port}") } else { format!("{addr}:{port}") }
    }
    fn vip(&self, n: u8) -> String {
        self.at(&(self.vip)(n), 80)
    }
    fn client(&self, port: u16) -> String {
        self.at(self.client, port)
    }
    fn pod(&self, port: u16) -> String {
        self.at(self.here, port)
    }
    fn sock(&self, addr: &str, port: u16) -> SocketAddr {
        self.at(addr, port).parse().unwrap()
    }
}

/// Services by number; all on port 80, TCP and UDP, backends on 8080.
const NEAR: u8 = 1;
const REMOTE: u8 = 2;
const NONE: u8 = 3;
const ELSEWHERE: u8 = 4;
const RANGED: u8 = 5;
const STICKY: u8 = 6;

fn service(world: &World, n: u8) -> Service {
    let port = |protocol| ServicePort { protocol, ..synthetic::service(0).ports[0].clone() };
    Service {
        name: name(world, n),
        cluster_ips: vec![(world.cluster_ip)(n).parse().unwrap()],
        external_ips: if n == RANGED { vec![] } else { vec![(world.vip)(n).parse().unwrap()] },
        load_balancer_ips: if n == RANGED { vec![(world.vip)(n).parse().unwrap()] } else { vec![] },
        source_ranges: vec![if world.v6 { "2001:db8::/112" } else { "192.0.2.0/28" }.parse().unwrap()],
        external_policy: if n == ELSEWHERE { TrafficPolicy::Local } else { TrafficPolicy::Cluster },
        affinity_secs: (n == STICKY).then_some(60),
        ports: vec![port(Protocol::Tcp), port(Protocol::Udp)],
        ..synthetic::service(0)
    }
}

fn name(world: &World, n: u8) -> ObjectName {
    ObjectName::new(if world.v6 { "six" } else { "four" }, format!("svc{n}"))
}

fn slice(world: &World, n: u8) -> EndpointSlice {
    let endpoint = |addr: &str, node: &str| Endpoint {
        addr: addr.parse().unwrap(),
        ready: true,
        serving: true,
        terminating: false,
        node: Some(node.into()),
        zone_hints: Vec::new(),
        node_hints: Vec::new(),
    };
    let endpoints = match n {
        NEAR => vec![endpoint(world.here, "node-1")],
        NONE => vec![],
        STICKY => (1..=8)
            .map(|i| {
                endpoint(
                    &world.far.replace("2.11", &format!("2.{i}")).replace("2::11", &format!("2::{i}")),
                    "node-2",
                )
            })
            .collect(),
        _ => vec![endpoint(world.far, "node-2")],
    };
    let port = |protocol| SlicePort { name: "http".into(), protocol, port: 8080 };
    EndpointSlice {
        triggered: None,
        name: name(world, n),
        service: name(world, n),
        family: if world.v6 { Family::V6 } else { Family::V4 },
        ports: vec![port(Protocol::Tcp), port(Protocol::Udp)],
        endpoints,
    }
}

fn node() -> Node {
    let mut node = Node::new().expect("a node (root is needed)");
    let mut events = Vec::new();
    for world in [V4, V6] {
        for n in NEAR..=STICKY {
            events.push(Event::Service(service(&world, n)));
            events.push(Event::EndpointSlice(slice(&world, n)));
        }
    }
    let mut own = service(&V4, REMOTE);
    own.name = ObjectName::new("four", "own");
    own.cluster_ips = vec!["10.96.0.99".parse().unwrap()];
    own.external_ips = vec![V4.node.parse().unwrap()];
    events.push(Event::Service(own));
    node.apply(events).expect("programmed");
    node
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Drop,
    Pass,
    Send,
}

/// Runs a frame; whole frame, verdict and all counters must be as said.
#[track_caller]
fn expect(node: &mut Node, run: Run, frame: &[u8], verdict: Verdict, out: &[u8], outcome: Outcome) {
    let ran = node.run(run, frame).unwrap();
    check(run, &ran, verdict, out, outcome);
}

#[track_caller]
fn check(run: Run, ran: &Ran, verdict: Verdict, out: &[u8], outcome: Outcome) {
    let (drop, pass, send) = run.verdicts();
    let wanted = match verdict {
        Verdict::Drop => drop,
        Verdict::Pass => pass,
        Verdict::Send => send,
    };
    assert_eq!(ran.counted, [(run.hook(), outcome, 1)], "{run:?}: counters");
    assert_eq!(ran.verdict, wanted, "{run:?}: verdict, wanted {verdict:?}");
    assert!(ran.frame == out, "{run:?}: frame\n{}\nwanted\n{}", hex(&ran.frame), hex(out));
}

/// A frame from the client to the node.
fn inbound(frame: Frame) -> Frame {
    frame.macs(CLIENT_MAC, NODE_MAC)
}

fn opening(world: &World, protocol: u8, port: u16, to: &str) -> Frame {
    inbound(if protocol == 6 { syn(&world.client(port), to) } else { udp(&world.client(port), to) })
}

fn following(world: &World, protocol: u8, port: u16, to: &str) -> Frame {
    inbound(if protocol == 6 { tcp(&world.client(port), to, ACK) } else { udp(&world.client(port), to) })
}

#[test]
fn a_remote_backend_is_masqueraded_and_its_reply_comes_back() {
    let mut node = node();
    for world in [V4, V6] {
        for (run, port) in [(Run::Xdp, 4001), (Run::NetdevIn, 4002)] {
            for protocol in [6, 17] {
                let to = world.vip(REMOTE);
                let first = opening(&world, protocol, port, &to);
                let ran = node.run(run, &first.build()).unwrap();
                let masqueraded = source_of(&ran.frame);
                assert_eq!(masqueraded.ip(), world.sock(world.node, 1).ip());
                assert!((1024..30000).contains(&masqueraded.port()), "{masqueraded}");
                let backend = world.sock(world.far, 8080);
                let there = |frame: &Frame| {
                    frame.clone().between(masqueraded, backend).macs(NODE_MAC, OTHER_MAC).ttl(62)
                };
                check(run, &ran, Verdict::Send, &there(&first).build(), ToRemoteBackend);

                // The same flow keeps its port, by either program.
                for again in [Run::Xdp, Run::NetdevIn] {
                    let next = following(&world, protocol, port, &to);
                    expect(
                        &mut node,
                        again,
                        &next.build(),
                        Verdict::Send,
                        &there(&next).build(),
                        ToRemoteBackend,
                    );

                    let (from, client) = (world.at(world.far, 8080), world.sock(world.client, port));
                    let to_node = world.at(world.node, masqueraded.port());
                    let reply = if protocol == 6 { tcp(&from, &to_node, ACK) } else { udp(&from, &to_node) };
                    let reply = reply.macs(OTHER_MAC, NODE_MAC);
                    let back =
                        reply.clone().between(to.parse().unwrap(), client).macs(NODE_MAC, CLIENT_MAC).ttl(62);
                    expect(&mut node, again, &reply.build(), Verdict::Send, &back.build(), Reply);
                }
            }
        }
    }
}

#[test]
fn a_backend_here_sees_the_client() {
    let mut node = node();
    for world in [V4, V6] {
        for protocol in [6, 17] {
            let to = world.vip(NEAR);
            let first = opening(&world, protocol, 4001, &to);
            expect(&mut node, Run::Xdp, &first.build(), Verdict::Pass, &first.build(), PassToTc);
            let (client, backend) = (world.sock(world.client, 4001), world.sock(world.here, 8080));
            for frame in [first, following(&world, protocol, 4001, &to)] {
                let delivered = frame.clone().between(client, backend);
                expect(
                    &mut node,
                    Run::NetdevIn,
                    &frame.build(),
                    Verdict::Pass,
                    &delivered.build(),
                    ToLocalBackend,
                );
            }
            let (from, client_text) = (world.pod(8080), world.client(4001));
            let reply = if protocol == 6 { tcp(&from, &client_text, ACK) } else { udp(&from, &client_text) };
            let back = reply.clone().between(to.parse().unwrap(), client);
            expect(&mut node, Run::NetdevOut, &reply.build(), Verdict::Pass, &back.build(), Reply);
            // The same reply is nobody's business where it leaves the pod.
            expect(&mut node, Run::PodIn, &reply.build(), Verdict::Pass, &reply.build(), PassNotOurs);
        }
    }
}

#[test]
fn pods_keep_their_address_and_turn_around_to_themselves() {
    let mut node = node();
    for world in [V4, V6] {
        for protocol in [6, 17] {
            let open = |to: &str| {
                let from = world.pod(5001);
                inbound(if protocol == 6 { syn(&from, to) } else { udp(&from, to) })
            };
            let to = world.at(&(world.cluster_ip)(REMOTE), 80);
            let (pod, far) = (world.sock(world.here, 5001), world.sock(world.far, 8080));
            let first = open(&to);
            expect(
                &mut node,
                Run::PodIn,
                &first.build(),
                Verdict::Pass,
                &first.clone().between(pod, far).build(),
                FromPod,
            );
            let (from, back_to) = (world.at(world.far, 8080), world.pod(5001));
            let reply = if protocol == 6 { tcp(&from, &back_to, ACK) } else { udp(&from, &back_to) };
            let back = reply.clone().between(to.parse().unwrap(), pod);
            expect(&mut node, Run::PodOut, &reply.build(), Verdict::Pass, &back.build(), Reply);

            let to = world.at(&(world.cluster_ip)(NEAR), 80);
            let first = open(&to);
            let ran = node.run(Run::PodIn, &first.build()).unwrap();
            let masqueraded = source_of(&ran.frame);
            assert_eq!(masqueraded.ip(), world.sock(world.node, 1).ip());
            let turned =
                first.clone().between(masqueraded, world.sock(world.here, 8080)).macs(NODE_MAC, CLIENT_MAC);
            check(Run::PodIn, &ran, Verdict::Send, &turned.build(), Hairpin);
            let (from, to_node) = (world.pod(8080), world.at(world.node, masqueraded.port()));
            let reply = inbound(if protocol == 6 { tcp(&from, &to_node, ACK) } else { udp(&from, &to_node) });
            let back = reply.clone().between(to.parse().unwrap(), pod).macs(NODE_MAC, CLIENT_MAC);
            expect(&mut node, Run::PodIn, &reply.build(), Verdict::Send, &back.build(), Reply);
        }
    }
}

/// One pod's port, towards a service and its backend.
struct Port<'a> {
    node: &'a mut Node,
    world: &'a World,
    port: u16,
}

impl Port<'_> {
    fn addr(&self) -> String {
        self.world.pod(self.port)
    }

    fn service(&self) -> String {
        self.world.at(&(self.world.cluster_ip)(REMOTE), 80)
    }

    fn backend(&self) -> String {
        self.world.at(self.world.far, 8080)
    }

    #[track_caller]
    fn dials_service(&mut self, flags: u8) {
        let frame = inbound(tcp(&self.addr(), &self.service(), flags));
        let there = frame.clone().between(self.addr().parse().unwrap(), self.backend().parse().unwrap());
        expect(self.node, Run::PodIn, &frame.build(), Verdict::Pass, &there.build(), FromPod);
    }

    #[track_caller]
    fn dials_backend(&mut self, flags: u8) {
        let frame = inbound(tcp(&self.addr(), &self.backend(), flags)).build();
        expect(self.node, Run::PodIn, &frame, Verdict::Pass, &frame, PassNotOurs);
    }

    /// What the backend sends; translated if the pod talks to the service.
    #[track_caller]
    fn backend_sends(&mut self, flags: u8, translated: bool) {
        let frame = inbound(tcp(&self.backend(), &self.addr(), flags));
        let (back, outcome) = match translated {
            true => {
                (frame.clone().between(self.service().parse().unwrap(), self.addr().parse().unwrap()), Reply)
            }
            false => (frame.clone(), PassNotOurs),
        };
        expect(self.node, Run::PodOut, &frame.build(), Verdict::Pass, &back.build(), outcome);
    }

    #[track_caller]
    fn talks_to_service(&mut self) {
        self.dials_service(SYN);
        // The backend's answer may be lost on its way and come again.
        (0..2).for_each(|_| self.backend_sends(SYN | ACK, true));
        self.dials_service(ACK);
        self.backend_sends(ACK, true);
    }
}

#[test]
fn a_direct_connection_from_a_port_that_a_service_saw_before_is_left_alone() {
    let mut node = node();
    for world in [&V4, &V6] {
        // The connection to the service was closed, was not, or its client forgot it and dials the service again.
        for (port, closed) in [(5001, true), (5002, false)] {
            let mut port = Port { node: &mut node, world, port };
            port.talks_to_service();
            if closed {
                port.dials_service(FIN | ACK);
                port.backend_sends(FIN | ACK, true);
                port.dials_service(ACK);
            }
            port.talks_to_service();
            port.dials_backend(SYN);
            port.backend_sends(SYN | ACK, false);
            port.dials_backend(ACK);
            port.backend_sends(ACK, false);
            // And the service once more.
            port.talks_to_service();
        }
    }
}

#[test]
fn direct_datagrams_from_a_port_that_a_service_saw_before_are_left_alone() {
    let mut node = node();
    for world in [&V4, &V6] {
        let (pod, service) = (world.pod(5003), world.at(&(world.cluster_ip)(REMOTE), 80));
        let backend = world.at(world.far, 8080);
        let sock = |addr: &str| addr.parse().unwrap();
        for _ in 0..2 {
            let asked = inbound(udp(&pod, &service));
            let there = asked.clone().between(sock(&pod), sock(&backend)).build();
            let answered = inbound(udp(&backend, &pod));
            let back = answered.clone().between(sock(&service), sock(&pod)).build();
            for _ in 0..2 {
                expect(&mut node, Run::PodIn, &asked.build(), Verdict::Pass, &there, FromPod);
                expect(&mut node, Run::PodOut, &answered.build(), Verdict::Pass, &back, Reply);
            }
            // Another socket of that port asks the backend itself.
            let direct = inbound(udp(&pod, &backend)).build();
            for _ in 0..2 {
                expect(&mut node, Run::PodIn, &direct, Verdict::Pass, &direct, PassNotOurs);
                let answer = answered.build();
                expect(&mut node, Run::PodOut, &answer, Verdict::Pass, &answer, PassNotOurs);
            }
        }
    }
}

#[test]
fn refusals_are_answered() {
    let mut node = node();
    for world in [V4, V6] {
        for run in [Run::Xdp, Run::NetdevIn, Run::PodIn] {
            for (to, outcome) in [
                (world.vip(NONE), RefuseNoEndpoints),
                (world.at(&(world.vip)(NEAR), 81), RefuseUnknownPort),
                (world.at(&(world.cluster_ip)(NEAR), 81), RefuseUnknownPort),
            ] {
                let first = inbound(syn(&world.client(4001), &to));
                expect(&mut node, run, &first.build(), Verdict::Send, &first.refusal().build(), outcome);
                let question = inbound(udp(&world.client(4001), &to));
                expect(&mut node, run, &question.build(), Verdict::Send, &question.unreachable(), outcome);
            }
        }
    }
}

#[test]
fn connections_whose_backend_is_gone_are_reset() {
    let mut node = node();
    for world in [V4, V6] {
        for (run, port) in [(Run::Xdp, 4001), (Run::NetdevIn, 4002)] {
            let to = world.vip(REMOTE);
            let ran = node.run(run, &opening(&world, 6, port, &to).build()).unwrap();
            let masqueraded = source_of(&ran.frame);
            assert_eq!(gone::mark(node.pins(), |_| true).unwrap(), 0);
            let segment = following(&world, 6, port, &to);
            assert_eq!(node.run(run, &segment.build()).unwrap().counted[0].1, ToRemoteBackend);
            assert_eq!(gone::mark(node.pins(), |_| false).unwrap(), 1);
            assert_eq!(gone::mark(node.pins(), |_| false).unwrap(), 0, "both are marked already");
            let reset = segment.reset().build();
            expect(&mut node, run, &segment.build(), Verdict::Send, &reset, RefuseBackendGone);
            let backend = inbound(tcp(&world.at(world.far, 8080), &masqueraded.to_string(), ACK));
            let reset = backend.reset().build();
            expect(&mut node, run, &backend.build(), Verdict::Send, &reset, RefuseBackendGone);
            // Nobody answers a reset with a reset.
            let reset = inbound(tcp(&world.client(port), &to, RST)).build();
            expect(&mut node, run, &reset, Verdict::Drop, &reset, DropUnanswered);
        }
    }
}

#[test]
fn what_policy_forbids_is_dropped_in_silence() {
    let mut node = node();
    for world in [V4, V6] {
        for run in [Run::Xdp, Run::NetdevIn] {
            let frame = opening(&world, 6, 4001, &world.vip(ELSEWHERE)).build();
            expect(&mut node, run, &frame, Verdict::Drop, &frame, DropNoLocalEndpoints);
            let outsider = if world.v6 { "[2001:db8:9::1]:4001" } else { "203.0.113.1:4001" };
            let frame = inbound(syn(outsider, &world.vip(RANGED))).build();
            expect(&mut node, run, &frame, Verdict::Drop, &frame, DropSourceRange);
            let frame = opening(&world, 6, 4001, &world.vip(REMOTE)).ttl(1).build();
            expect(&mut node, run, &frame, Verdict::Drop, &frame, DropTtl);
        }
        // An allowed source gets through.
        let ran = node.run(Run::NetdevIn, &opening(&world, 6, 4001, &world.vip(RANGED)).build()).unwrap();
        assert_eq!(ran.counted[0].1, ToRemoteBackend);
    }
}

#[test]
fn everything_else_is_untouched() {
    let mut node = node();
    let mut rows: Vec<(&str, Vec<u8>, Outcome)> = Vec::new();
    for world in [V4, V6] {
        let vip = world.vip(REMOTE);
        rows.push(("no VIP", opening(&world, 6, 4001, &world.at(world.far, 80)).build(), PassNotOurs));
        rows.push(("mid-stream", following(&world, 6, 4444, &vip).build(), PassMidStream));
        rows.push(("reset of nothing", inbound(tcp(&world.client(4444), &vip, RST)).build(), PassMidStream));
        if !world.v6 {
            // This node's address is somebody's external IP, too: port 80 alone is.
            for (port, protocol) in [(22, 6), (6443, 6), (53, 17)] {
                let frame = opening(&world, protocol, 4001, &world.at(world.node, port)).build();
                rows.push(("a node's own port", frame, PassNodeAddress));
            }
        }
        let good = opening(&world, 6, 4001, &vip).build();
        let mut frame = good.clone();
        frame.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
        rows.push(("VLAN", frame, PassNotIp));
        let mut frame = good.clone();
        frame[12..14].copy_from_slice(&[0x08, 0x06]);
        rows.push(("ARP", frame, PassNotIp));
        let mut frame = good.clone();
        frame[14] = 0x55;
        rows.push(("wrong version", frame, PassMalformed));
        let l4 = if world.v6 { 54 } else { 34 };
        let mut frame = good.clone();
        frame[l4 + 12] = 0x40;
        rows.push(("TCP header of four words", frame, PassMalformed));
        let mut frame = good.clone();
        frame[if world.v6 { 20 } else { 23 }] = 132;
        rows.push(("SCTP", frame, PassNotL4));
        if world.v6 {
            let mut fragment = inbound(udp(&world.client(4001), &vip));
            fragment.options = [&[44][..], &[17, 0, 0, 1, 0, 0, 0, 7]].concat();
            rows.push(("fragment", fragment.build(), PassFragment));
        } else {
            for (what, bits) in [("first fragment", [0x20, 0x00]), ("later fragment", [0x00, 0xb9])] {
                let mut frame = good.clone();
                frame[20..22].copy_from_slice(&bits);
                rows.push((what, frame, PassFragment));
            }
            let mut frame = good.clone();
            frame[14] = 0x44;
            rows.push(("IPv4 header of four words", frame, PassMalformed));
            let mut frame = good.clone();
            frame[16..18].copy_from_slice(&[0, 19]);
            rows.push(("total length below the header's", frame, PassMalformed));
        }
    }
    for (what, frame, outcome) in rows {
        for run in [Run::Xdp, Run::NetdevIn, Run::PodIn] {
            let ran = node.run(run, &frame).unwrap();
            eprintln!("{what} {run:?}");
            check(run, &ran, Verdict::Pass, &frame, outcome);
        }
    }
}

#[test]
fn a_frame_cut_anywhere_is_never_rewritten_wrongly() {
    let mut node = node();
    for world in [V4, V6] {
        for protocol in [6, 17] {
            let whole = opening(&world, protocol, 4001, &world.vip(REMOTE)).build();
            let headers = if world.v6 { 54 } else { 34 } + if protocol == 6 { 20 } else { 8 };
            for run in [Run::Xdp, Run::NetdevIn, Run::PodIn] {
                for len in 14..headers {
                    // The kernel takes no shorter skb in a test than an Ethernet header and a byte or so.
                    let Ok(ran) = node.run(run, &whole[..len]) else { continue };
                    assert!(ran.frame == whole[..len], "{run:?}, {len} bytes: changed\n{}", hex(&ran.frame));
                    assert_eq!(ran.verdict, run.verdicts().1, "{run:?}, {len} bytes");
                    assert_eq!(ran.counted.len(), 1, "{run:?}, {len} bytes: {:?}", ran.counted);
                }
            }
        }
    }
}

#[test]
fn options_and_extension_headers_are_stepped_over() {
    let mut node = node();
    let mut port = 4100;
    for (world, options) in [
        (V4, vec![1; 4]),
        (V4, vec![1; 40]),
        (V6, [&[0][..], &[6, 0, 1, 4, 0, 0, 0, 0]].concat()),
        (V6, [&[0][..], &[60, 0, 1, 4, 0, 0, 0, 0], &[6, 1], &[1; 14]].concat()),
    ] {
        for run in [Run::Xdp, Run::NetdevIn] {
            port += 1;
            let mut first = opening(&world, 6, port, &world.vip(REMOTE));
            first.options.clone_from(&options);
            let ran = node.run(run, &first.build()).unwrap();
            let at = if world.v6 { 54 + options.len() - 1 } else { 34 + options.len() };
            let source = u16::from_be_bytes([ran.frame[at], ran.frame[at + 1]]);
            let (node_addr, backend) = (world.sock(world.node, source), world.sock(world.far, 8080));
            let there = first.clone().between(node_addr, backend).macs(NODE_MAC, OTHER_MAC).ttl(62);
            check(run, &ran, Verdict::Send, &there.build(), ToRemoteBackend);
        }
    }
}

#[test]
fn udp_without_checksum_stays_without() {
    let mut node = node();
    for run in [Run::Xdp, Run::NetdevIn] {
        let mut first = opening(&V4, 17, 4200, &V4.vip(REMOTE));
        first.l4 = L4::Udp { no_checksum: true };
        let ran = node.run(run, &first.build()).unwrap();
        let there =
            first.between(source_of(&ran.frame), V4.sock(V4.far, 8080)).macs(NODE_MAC, OTHER_MAC).ttl(62);
        check(run, &ran, Verdict::Send, &there.build(), ToRemoteBackend);
    }
}

#[test]
fn ports_used_up_are_a_named_drop_and_closed_flows_reopen() {
    let mut node = node();
    node.snat_ports(2000, 2).unwrap();
    let mut used = Vec::new();
    for port in [4301, 4302] {
        let ran = node.run(Run::NetdevIn, &opening(&V4, 6, port, &V4.vip(REMOTE)).build()).unwrap();
        assert_eq!(ran.counted[0].1, ToRemoteBackend);
        used.push(source_of(&ran.frame).port());
    }
    used.sort_unstable();
    assert_eq!(used, [2000, 2001]);
    let third = opening(&V4, 6, 4303, &V4.vip(REMOTE)).build();
    expect(&mut node, Run::NetdevIn, &third, Verdict::Drop, &third, DropSnatPorts);
    // Another backend's ports are its own.
    let ran = node.run(Run::NetdevIn, &opening(&V4, 17, 4303, &V4.vip(REMOTE)).build()).unwrap();
    assert_eq!(ran.counted[0].1, ToRemoteBackend);
    // A client that closed may open again, with its own port.
    node.run(Run::NetdevIn, &inbound(tcp(&V4.client(4301), &V4.vip(REMOTE), FIN | ACK)).build()).unwrap();
    node.run(Run::NetdevIn, &inbound(tcp(&V4.client(4301), &V4.vip(REMOTE), RST)).build()).unwrap();
    let ran = node.run(Run::NetdevIn, &opening(&V4, 6, 4301, &V4.vip(REMOTE)).build()).unwrap();
    assert_eq!(ran.counted[0].1, ToRemoteBackend);
}

#[test]
fn affinity_holds_over_connections_and_ends_with_its_backend() {
    let mut node = node();
    for world in [V4, V6] {
        let backend_of = |ran: &Ran| if world.v6 { ran.frame[53] } else { ran.frame[33] };
        let mut seen = Vec::new();
        for port in 4400..4420 {
            let ran = node.run(Run::NetdevIn, &opening(&world, 6, port, &world.vip(STICKY)).build()).unwrap();
            seen.push(backend_of(&ran));
        }
        assert!(seen.iter().all(|backend| *backend == seen[0]), "{seen:?}");
        let mut without = slice(&world, STICKY);
        without.endpoints.retain(|endpoint| {
            endpoint.addr
                != world
                    .sock(
                        &world
                            .far
                            .replace("2.11", &format!("2.{}", seen[0]))
                            .replace("2::11", &format!("2::{}", seen[0])),
                        1,
                    )
                    .ip()
        });
        assert_eq!(without.endpoints.len(), 7);
        node.apply([Event::EndpointSlice(without)]).unwrap();
        let ran = node.run(Run::NetdevIn, &opening(&world, 6, 4450, &world.vip(STICKY)).build()).unwrap();
        assert_ne!(backend_of(&ran), seen[0]);
    }
}

#[test]
fn a_backend_that_goes_loses_its_udp_flows_and_keeps_its_tcp_ones() {
    let mut node = node();
    let mut moved = slice(&V4, REMOTE);
    moved.endpoints[0].addr = "10.244.2.99".parse().unwrap();
    for protocol in [6, 17] {
        node.run(Run::NetdevIn, &opening(&V4, protocol, 4500, &V4.vip(REMOTE)).build()).unwrap();
    }
    node.apply([Event::EndpointSlice(moved)]).unwrap();
    for (protocol, backend) in [(6, 11), (17, 99)] {
        let ran = node.run(Run::NetdevIn, &following(&V4, protocol, 4500, &V4.vip(REMOTE)).build()).unwrap();
        assert_eq!((ran.counted[0].1, ran.frame[33]), (ToRemoteBackend, backend), "protocol {protocol}");
    }
}

/// Another mode serves: known flows go on in both directions, nothing is opened, answered or refused.
#[test]
fn what_drains_carries_on_what_it_knows_and_nothing_else() {
    let mut node = node();
    for world in [V4, V6] {
        for protocol in [6, 17] {
            let known = opening(&world, protocol, 4001, &world.vip(REMOTE));
            let masqueraded = source_of(&node.run(Run::NetdevIn, &known.build()).unwrap().frame);
            drain::set(node.pins(), true).unwrap();
            let next = following(&world, protocol, 4001, &world.vip(REMOTE));
            let there = next
                .clone()
                .between(masqueraded, world.sock(world.far, 8080))
                .macs(NODE_MAC, OTHER_MAC)
                .ttl(62);
            expect(&mut node, Run::NetdevIn, &next.build(), Verdict::Send, &there.build(), ToRemoteBackend);
            for (n, run) in
                [(REMOTE, Run::Xdp), (NEAR, Run::NetdevIn), (NONE, Run::NetdevIn), (NEAR, Run::PodIn)]
            {
                let new = opening(&world, protocol, 4002, &world.vip(n)).build();
                expect(&mut node, run, &new, Verdict::Pass, &new, PassDraining);
            }
            let unknown = opening(&world, protocol, 4002, &world.at(&(world.vip)(NEAR), 81)).build();
            expect(&mut node, Run::NetdevIn, &unknown, Verdict::Pass, &unknown, PassDraining);
            drain::set(node.pins(), false).unwrap();
            let ran = node.run(Run::NetdevIn, &opening(&world, protocol, 4002, &world.vip(REMOTE)).build());
            assert_eq!(ran.unwrap().counted, [(Run::NetdevIn.hook(), ToRemoteBackend, 1)]);
        }
    }
}

/// What netfilter translates: its datagrams pass, and no new flow gets a port whose replies are netfilter's.
#[test]
fn flows_of_netfilter_are_left_alone() {
    let mut node = node();
    node.snat_ports(2000, 2).unwrap();
    let tuple = |src: SocketAddr, dst: SocketAddr, proto| Tuple { src, dst, proto };
    for world in [V4, V6] {
        let vip = world.vip(REMOTE);
        let (client, backend) = (world.sock(world.client, 4001), world.sock(world.far, 8080));
        let mut foreign = Foreign::open(node.pins()).unwrap();
        foreign.mark(&tuple(client, vip.parse().unwrap(), 17)).unwrap();
        let datagram = opening(&world, 17, 4001, &vip).build();
        for run in [Run::Xdp, Run::NetdevIn, Run::PodIn] {
            expect(&mut node, run, &datagram, Verdict::Pass, &datagram, PassForeign);
        }
        for protocol in [6, 17] {
            foreign.mark(&tuple(backend, world.sock(world.node, 2000), protocol)).unwrap();
            let ran = node.run(Run::NetdevIn, &opening(&world, protocol, 4002, &vip).build()).unwrap();
            assert_eq!(source_of(&ran.frame).port(), 2001);
            let refused = opening(&world, protocol, 4003, &vip).build();
            expect(&mut node, Run::NetdevIn, &refused, Verdict::Drop, &refused, DropSnatPorts);
            foreign.unmark(&tuple(backend, world.sock(world.node, 2000), protocol));
            let ran = node.run(Run::NetdevIn, &refused).unwrap();
            assert_eq!(source_of(&ran.frame).port(), 2000);
        }
        foreign.unmark(&tuple(client, vip.parse().unwrap(), 17));
    }
}
