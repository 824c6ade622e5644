//! Which flows have lost their backend: netfilter's UDP flows whose next datagram has to choose anew ([`is_stale`]), and who
//! is still there at all ([`Backends`]).
//!
//! A datagram has no SYN by which a flow could begin again: what conntrack once translated, or let pass before there was
//! anything to translate to, goes on that way for as long as the client talks. kube-proxy forgets such flows after each
//! change (`pkg/proxy/conntrack/cleanup.go`), and so do we, but that a NodePort is one of the node's own addresses, and
//! that an address which several Services claim is its owner's.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::{
    model::{Family, Protocol},
    table::{Changes, FrontendAddr, ServiceEntry, ServicePortId, ServiceTable},
};

/// A UDP flow as conntrack knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpFlow {
    /// What the client sends to: destination of the original direction.
    pub dialled: SocketAddr,
    /// Who answers: source of the reply direction. Without translation it is what was dialled.
    pub answers: SocketAddr,
}

/// The flow dials a frontend that has serving endpoints, and none of them answers it.
///
/// Readiness, policies and hints don't count: a flow stays where it is as long as its endpoint serves. A service port that
/// nobody serves keeps its flows, because they would have nowhere to go. A mode that answers no NodePorts on 127.0.0.1
/// loses the entries of whatever else is at that port there, which costs their flows nothing: they were not translated.
pub fn is_stale(table: &ServiceTable, flow: &UdpFlow) -> bool {
    let dialled =
        FrontendAddr { addr: flow.dialled.ip(), port: flow.dialled.port(), protocol: Protocol::Udp };
    let owner = table.frontends.get(&dialled).and_then(|frontend| table.services.get(&frontend.service));
    owner.is_some_and(|service| {
        let answers = (flow.answers.ip(), flow.answers.port());
        !service.serving.is_empty() && service.serving.binary_search(&answers).is_err()
    })
}

/// Families in which flows may have become stale by these changes.
pub fn families(changes: &Changes) -> BTreeSet<Family> {
    let services = changes.services.iter().filter(|id| id.protocol == Protocol::Udp).map(|id| id.family);
    let frontends = changes.frontends.iter().filter(|addr| addr.protocol == Protocol::Udp);
    services.chain(frontends.map(|addr| Family::of(addr.addr))).collect()
}

/// Who can still be on the other end of a flow: for UDP every endpoint that serves or is chosen; for TCP every endpoint there is, because
/// connections outlast their endpoint's readiness.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backends {
    of: BTreeMap<ServicePortId, BTreeSet<SocketAddr>>,
    /// How many service ports have it.
    uses: BTreeMap<(Protocol, SocketAddr), usize>,
    /// Since when those that nobody has any more are missed, for [`MOVE`].
    missed: BTreeMap<(Protocol, SocketAddr), Instant>,
}

/// An endpoint that moves from one EndpointSlice to another is in neither for a moment; for so long it is not taken for gone.
pub const MOVE: Duration = Duration::from_secs(1);

impl Backends {
    /// Follows these changes of the table. Returns whether anybody is missed by them.
    pub fn update(&mut self, table: &ServiceTable, changes: &Changes, now: Instant) -> bool {
        self.missed.retain(|_, since| now.saturating_duration_since(*since) < MOVE);
        let mut touched = BTreeSet::new();
        for id in &changes.services {
            let alive = table.services.get(id).map(|entry| alive(id, entry)).unwrap_or_default();
            let before = self.of.remove(id).unwrap_or_default();
            for addr in alive.difference(&before) {
                *self.uses.entry((id.protocol, *addr)).or_default() += 1;
                self.missed.remove(&(id.protocol, *addr));
            }
            for addr in before.difference(&alive) {
                touched.insert((id.protocol, *addr));
                self.release((id.protocol, *addr));
            }
            if !alive.is_empty() {
                self.of.insert(id.clone(), alive);
            }
        }
        touched.retain(|backend| !self.uses.contains_key(backend));
        self.missed.extend(touched.iter().map(|backend| (*backend, now)));
        !touched.is_empty()
    }

    fn release(&mut self, backend: (Protocol, SocketAddr)) {
        let Some(uses) = self.uses.get_mut(&backend) else { return };
        *uses -= 1;
        if *uses == 0 {
            self.uses.remove(&backend);
        }
    }

    /// A flow of this protocol to this address may go on: the backend is there, or has been missed for less than [`MOVE`].
    pub fn may_be_there(&self, protocol: Protocol, addr: SocketAddr, now: Instant) -> bool {
        let backend = (protocol, addr);
        let missed = self.missed.get(&backend).map(|since| now.saturating_duration_since(*since));
        self.uses.contains_key(&backend) || missed.is_some_and(|missed| missed < MOVE)
    }
}

fn alive(id: &ServicePortId, entry: &ServiceEntry) -> BTreeSet<SocketAddr> {
    let more = if id.protocol == Protocol::Udp { &[][..] } else { &entry.not_serving };
    entry.in_use().chain(more.iter().copied()).map(SocketAddr::from).collect()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::{
        compile::{CompileConfig, Compiler, NodeView, compile},
        model::{Endpoint, EndpointSlice, Event, Service, SlicePort},
        snapshot::ClusterSnapshot,
        synthetic,
    };

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// Service `i`: 10.96.0.<i+1>:53, externalIP 198.51.100.1, NodePort 30053+i.
    fn dns(i: u32) -> Service {
        let mut service = synthetic::service(i);
        service.external_ips = vec![ip("198.51.100.1")];
        service.ports[0].protocol = Protocol::Udp;
        service.ports[0].port = 53;
        service.ports[0].node_port = 30053 + i as u16;
        service
    }

    /// Endpoints as `10.1.0.1 serving` or `10.1.0.1 down`, all at port 5353.
    fn endpoints(i: u32, texts: &[&str]) -> EndpointSlice {
        let endpoint = |text: &&str| {
            let (addr, state) = text.split_once(' ').expect("two words");
            let serving = state == "serving";
            Endpoint {
                addr: ip(addr),
                ready: false,
                serving,
                terminating: true,
                node: Some("elsewhere".into()),
                zone_hints: Vec::new(),
                node_hints: Vec::new(),
            }
        };
        EndpointSlice {
            ports: vec![SlicePort { name: "http".into(), protocol: Protocol::Udp, port: 5353 }],
            endpoints: texts.iter().map(endpoint).collect(),
            ..synthetic::slice(i, 0, 0)
        }
    }

    fn table(objects: Vec<(Service, EndpointSlice)>) -> ServiceTable {
        let mut cluster = ClusterSnapshot::default();
        for (service, slice) in objects {
            cluster.apply(Event::Service(service));
            cluster.apply(Event::EndpointSlice(slice));
        }
        let node =
            NodeView { name: "node-1".into(), addresses: vec![ip("192.0.2.1")], ..NodeView::default() };
        compile(&cluster, &node, &CompileConfig::default()).table
    }

    fn stale(table: &ServiceTable, dialled: &str, answers: &str) -> bool {
        let parse = |text: &str| text.parse().expect("an address and a port");
        is_stale(table, &UdpFlow { dialled: parse(dialled), answers: parse(answers) })
    }

    #[test]
    fn a_flow_is_stale_unless_a_serving_endpoint_answers_it() {
        let table = table(vec![(dns(0), endpoints(0, &["10.1.0.1 serving", "10.1.0.2 down"]))]);
        for dialled in ["10.96.0.1:53", "198.51.100.1:53", "192.0.2.1:30053", "127.0.0.1:30053"] {
            for (answers, wanted) in [
                ("10.1.0.1:5353", false),
                ("10.1.0.2:5353", true),
                ("10.1.0.1:5354", true),
                ("10.1.0.3:5353", true),
                // Let pass before anybody served.
                (dialled, true),
            ] {
                assert_eq!(stale(&table, dialled, answers), wanted, "{dialled} by {answers}");
            }
        }
    }

    #[test]
    fn what_is_no_frontend_is_left_alone() {
        let table = table(vec![(dns(0), endpoints(0, &["10.1.0.1 serving"]))]);
        // The NodePort's number elsewhere, other ports of its addresses, and an endpoint dialled by itself.
        for dialled in
            ["203.0.113.5:30053", "192.0.2.2:30053", "10.96.0.1:54", "10.96.0.2:53", "10.1.0.7:5353"]
        {
            assert!(!stale(&table, dialled, dialled), "{dialled}");
        }
    }

    #[test]
    fn nobody_serves_so_flows_stay() {
        let table = table(vec![(dns(0), endpoints(0, &["10.1.0.1 down"]))]);
        assert!(!stale(&table, "10.96.0.1:53", "10.1.0.1:5353"));
    }

    #[test]
    fn a_shared_address_is_its_owners() {
        for order in [[0, 1], [1, 0]] {
            let object = |i: u32| (dns(i), endpoints(i, &[&format!("10.1.0.{} serving", i + 1)]));
            // Service 0 is the older one.
            let table = table(order.map(object).into());
            assert!(!stale(&table, "198.51.100.1:53", "10.1.0.1:5353"), "{order:?}");
            assert!(stale(&table, "198.51.100.1:53", "10.1.0.2:5353"), "{order:?}");
            assert!(!stale(&table, "192.0.2.1:30054", "10.1.0.2:5353"), "{order:?}");
        }
    }

    #[test]
    fn other_protocols_are_left_alone() {
        let (mut service, slice) = (dns(0), endpoints(0, &["10.1.0.1 serving"]));
        service.ports[0].protocol = Protocol::Tcp;
        let table = table(vec![(service, slice)]);
        assert!(!stale(&table, "10.96.0.1:53", "10.1.0.9:5353"));
        assert_eq!(families(&Changes::all(&table)), BTreeSet::new());
    }

    #[test]
    fn families_are_those_of_what_changed_of_udp() {
        let all = Changes::all(&table(vec![(dns(0), endpoints(0, &["10.1.0.1 serving"]))]));
        assert_eq!(families(&all), BTreeSet::from([Family::V4]));
        let only_vips = Changes { services: BTreeSet::new(), frontends: BTreeSet::new(), ..all };
        assert_eq!(families(&only_vips), BTreeSet::new());
    }

    fn with_protocol(protocol: Protocol, texts: &[&str]) -> ServiceTable {
        let (mut service, mut slice) = (dns(0), endpoints(0, texts));
        service.ports[0].protocol = protocol;
        slice.ports[0].protocol = protocol;
        table(vec![(service, slice)])
    }

    #[test]
    fn a_connection_outlasts_readiness_and_a_datagram_does_not() {
        for (protocol, down_is_alive) in [(Protocol::Tcp, true), (Protocol::Udp, false)] {
            let mut backends = Backends::default();
            let at = |addr| SocketAddr::new(ip(addr), 5353);
            let (start, later) = (Instant::now(), Instant::now() + MOVE);
            let before = with_protocol(protocol, &["10.1.0.1 serving", "10.1.0.2 serving"]);
            assert!(!backends.update(&before, &Changes::all(&before), start), "nobody was known");
            let after = with_protocol(protocol, &["10.1.0.1 serving", "10.1.0.2 down"]);
            assert_eq!(backends.update(&after, &Changes::all(&after), start), !down_is_alive);
            assert!(backends.may_be_there(protocol, at("10.1.0.1"), later));
            assert_eq!(backends.may_be_there(protocol, at("10.1.0.2"), later), down_is_alive);
            let last = with_protocol(protocol, &["10.1.0.1 serving"]);
            assert_eq!(backends.update(&last, &Changes::all(&after), start), down_is_alive);
            assert!(!backends.may_be_there(protocol, at("10.1.0.2"), later));
            assert!(!backends.may_be_there(protocol, at("10.9.9.9"), start), "nobody has ever known it");
        }
    }

    #[test]
    fn who_is_chosen_is_there_even_if_it_does_not_serve() {
        let (mut service, mut slice) = (dns(0), endpoints(0, &["10.1.0.1 down"]));
        service.publish_not_ready = true;
        (slice.endpoints[0].ready, slice.endpoints[0].terminating) = (true, false);
        let table = table(vec![(service, slice)]);
        let (mut backends, start) = (Backends::default(), Instant::now());
        backends.update(&table, &Changes::all(&table), start);
        let at = SocketAddr::new(ip("10.1.0.1"), 5353);
        assert!(backends.may_be_there(Protocol::Udp, at, start + MOVE));
    }

    #[test]
    fn a_backend_that_moves_is_not_gone() {
        let at = SocketAddr::new(ip("10.1.0.2"), 5353);
        let both = with_protocol(Protocol::Tcp, &["10.1.0.1 serving", "10.1.0.2 serving"]);
        let one = with_protocol(Protocol::Tcp, &["10.1.0.1 serving"]);
        let start = Instant::now();
        let mut backends = Backends::default();
        backends.update(&both, &Changes::all(&both), start);
        // Whoever looks meanwhile, for the sake of another, spares it.
        let missed = start + 5 * MOVE;
        assert!(backends.update(&one, &Changes::all(&both), missed));
        let last = missed + MOVE - Duration::from_millis(1);
        assert!(backends.may_be_there(Protocol::Tcp, at, last));
        assert!(!backends.may_be_there(Protocol::Tcp, at, missed + MOVE));
        // It is there again, and missed again: its time begins anew.
        backends.update(&both, &Changes::all(&both), last);
        assert!(backends.may_be_there(Protocol::Tcp, at, last + 9 * MOVE));
        backends.update(&one, &Changes::all(&both), last);
        assert!(backends.may_be_there(Protocol::Tcp, at, last + MOVE / 2));
        // What is gone for good is not remembered.
        backends.update(&one, &Changes::default(), last + MOVE);
        assert!(backends.missed.is_empty());
    }

    #[test]
    fn whoever_follows_changes_knows_what_the_last_table_says() {
        let mut state = 0x2545_f491_4f6c_dd1du64;
        let mut random = |limit: u32| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u32 % limit
        };
        let node = NodeView { name: "node-1".into(), ..NodeView::default() };
        let mut compiler = Compiler::new(CompileConfig::default(), node);
        let mut followed = Backends::default();
        let (mut gone, start) = (0, Instant::now());
        for step in 0..500 {
            let i = random(4);
            compiler.apply(match random(5) {
                0 => Event::ServiceGone(dns(i).name),
                1 => Event::Service(dns(i)),
                // Services share addresses.
                _ => {
                    let states = ["serving", "down"].map(|state| format!("10.1.0.{} {state}", random(4)));
                    endpoints_event(i, &states[..random(3) as usize])
                }
            });
            let changes = compiler.compile();
            let before = followed.clone();
            let told = followed.update(compiler.table(), &changes, start);
            let mut fresh = Backends::default();
            fresh.update(compiler.table(), &Changes::all(compiler.table()), start);
            assert_eq!((&followed.of, &followed.uses), (&fresh.of, &fresh.uses), "step {step}");
            assert!(followed.missed.keys().all(|key| !fresh.uses.contains_key(key)), "step {step}");
            assert_eq!(told, before.uses.keys().any(|key| !fresh.uses.contains_key(key)), "step {step}");
            gone += u32::from(told);
        }
        assert!(gone > 50, "nobody ever goes: {gone}");
    }

    fn endpoints_event(i: u32, texts: &[String]) -> Event {
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        Event::EndpointSlice(endpoints(i, &texts))
    }
}
