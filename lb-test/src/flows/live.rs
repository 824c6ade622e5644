//! The table with real sockets.

use std::time::Duration;

use lb_core::flow::Dialect;

use super::{
    Expect, FlowCase, Seen, cases,
    paper::{addr_of, node_of},
};
use crate::{
    cluster::{Answer, Cluster, node_ip, node_ip6},
    patience,
};

/// Kinds of sockets that ask each row's question.
const SOCKETS: [&[&str]; 3] = [&["tcp"], &["udp"], &["udp", "--connected"]];

/// Rows that are asked at a time.
const ASKERS: usize = 6;

/// Asks every row's question with every kind of socket and fails with all that went wrong. The cluster is one of
/// [`super::cluster`], its agents in this mode.
pub fn check_all(cluster: &Cluster, dialect: Dialect) {
    if dialect != Dialect::Ebpf {
        for node in ["node1", "node2"] {
            // The kernel sends one peer a few ICMP errors a second only: fewer than the rows that are to be refused.
            cluster.lab.sysctl(node, "net.ipv4.icmp_ratelimit", "0").expect("a sysctl");
            cluster.lab.sysctl(node, "net.ipv6.icmp.ratelimit", "0").expect("a sysctl");
        }
    }
    let cases = cases();
    let ask_all = |cases: &[FlowCase]| -> Vec<String> {
        let asked = cases.iter().flat_map(|case| SOCKETS.iter().map(move |how| (case, how)));
        asked.filter_map(|(case, how)| ask(cluster, case, dialect, how)).collect()
    };
    // Most of the time is spent waiting for answers that don't come.
    let failures: Vec<String> = std::thread::scope(|scope| {
        let askers: Vec<_> =
            cases.chunks(cases.len().div_ceil(ASKERS)).map(|share| scope.spawn(|| ask_all(share))).collect();
        askers.into_iter().flat_map(|asker| asker.join().expect("an asker doesn't panic")).collect()
    });
    assert!(
        failures.is_empty(),
        "{dialect}: {} answers are wrong:\n{}\n{}",
        failures.len(),
        failures.join("\n"),
        cluster.agent(1, &["status"]).unwrap_or_else(|error| error.to_string())
    );
}

/// Asks one row's question by one kind of socket and says what is wrong with the answer.
fn ask(cluster: &Cluster, case: &FlowCase, dialect: Dialect, how: &[&str]) -> Option<String> {
    let wanted = case.expect(dialect);
    // netfilter refuses with ICMP. Over a wire without delay the answer to a SYN is there before connect(2) lets go of
    // the socket, and IPv6 sockets heed the next one only (`tcp_v6_err`).
    let late = *wanted == Expect::Refuse && dialect != Dialect::Ebpf;
    let timeout = if late { "2500" } else { "1000" };
    let target = case.target.to_string();
    let args = [&how[..1], &[&*target, "--timeout-ms", timeout], &how[1..]].concat();
    let served = node_of(case.from).filter(|_| case.by_socket);
    let answer = match cluster.ask(case.from, served, &args) {
        Ok(answers) => answers.into_iter().next().unwrap_or_default(),
        Err(error) => Answer { error: Some(format!("{error:#}")), ..Answer::default() },
    };
    // A refusal is at once: it doesn't wait for a retransmission.
    let prompt = late
        || answer.error.as_deref() != Some("refused")
        || Duration::from_millis(answer.ms) < patience(Duration::from_millis(900));
    (!prompt || !is_met(case, wanted, dialect, &answer, how))
        .then(|| format!("{dialect}: {case} by {how:?}: wanted {wanted:?}, got {answer:?}"))
}

fn is_met(case: &FlowCase, wanted: &Expect, dialect: Dialect, answer: &Answer, how: &[&str]) -> bool {
    let error = answer.error.as_deref();
    let udp = how[0] == "udp";
    // A datagram that netfilter throws away on its way out fails its call (`ip_send_skb`).
    let at_once = udp && case.from.starts_with("node") && dialect != Dialect::Ebpf && error == Some("denied");
    match wanted {
        Expect::Serve(backends) => {
            let seen = backends.iter().find(|(pod, _)| answer.id.as_deref() == Some(pod));
            answer.peer.as_ref() == Some(&case.target.to_string())
                && seen.is_some_and(|(_, seen)| sees(case, *seen, answer.client.as_deref()))
        }
        // The kernel tells an unconnected UDP socket of no ICMP error (udp(7)): only a socket hook can.
        Expect::Refuse if how == ["udp"] => matches!(error, Some("refused" | "timeout")) || at_once,
        Expect::Refuse => error == Some("refused") || at_once,
        Expect::Drop => error == Some("timeout") || at_once,
        Expect::Deny => error == Some("denied"),
        // An unconnected socket takes an answer from whoever sends one: from the endpoint itself, say.
        Expect::Astray(_) | Expect::Pass(None) => {
            error.is_some() || how == ["udp"] && answer.peer.as_ref() != Some(&case.target.to_string())
        }
        Expect::Pass(Some(id)) => {
            answer.id.as_deref() == Some(id) && sees(case, Seen::Client, answer.client.as_deref())
        }
    }
}

/// A node's own processes have whichever of its addresses routing gives them.
fn sees(case: &FlowCase, seen: Seen, client: Option<&str>) -> bool {
    let v6 = case.target.is_ipv6();
    let wanted = match seen {
        _ if case.from.starts_with("node") => return client.is_some(),
        Seen::Client => addr_of(case.from, v6, case.target.ip()).to_string(),
        Seen::Node(node) if v6 => node_ip6(node),
        Seen::Node(node) => node_ip(node),
    };
    client == Some(&wanted)
}
