//! Text that can't be followed is an error that says where.

use super::*;
use crate::compile::NodeView;

/// A table with one base chain of these lines; `NAME ` in front of a line is another chain.
fn read(lines: &[&str]) -> Result<Nftables, TraceError> {
    let mut text = String::from(
        "add table ip kube-proxy\nadd set ip kube-proxy some { type ipv4_addr ; }\nadd chain ip kube-proxy entry { type nat hook prerouting priority -100 ; }\nadd chain ip kube-proxy other\n",
    );
    lines.iter().for_each(|line| text.extend(["add rule ip kube-proxy ", line, "\n"]));
    Nftables::read(&text, &NodeView::default())
}

fn flow() -> Flow {
    let (source, dst) = ("192.0.2.9".parse().unwrap(), "10.96.0.1".parse().unwrap());
    Flow { origin: Origin::Outside, source, dst, port: 80, protocol: Protocol::Tcp }
}

#[test]
fn statements_that_we_do_not_write_are_not_guessed() {
    for line in [
        "entry tcp dport 80 drop",
        "entry ip daddr 10.96.0.1 queue",
        "entry mark set 1",
        "entry numgen random mod 2 vmap { 0 : drop }",
        "entry ip saddr 10.0.0.0/33 drop",
        "entry reject with tcp reset",
        "absent drop",
    ] {
        let error = read(&[line]).unwrap_err();
        let TraceError::Unreadable { line: named, .. } = &error else { panic!("{line}: {error}") };
        assert!(named.ends_with(line), "{error}");
    }
}

#[test]
fn leads_to_nowhere_and_circles_are_named() {
    let trace = |lines: &[&str]| read(lines).unwrap().trace(&flow());
    assert_eq!(trace(&["entry jump absent"]), Err(TraceError::NoChain("absent".into())));
    assert_eq!(trace(&["entry ip daddr @absent drop"]), Err(TraceError::NoSet("absent".into())));
    assert_eq!(
        trace(&["entry jump other", "other goto other"]),
        Err(TraceError::Circle("other".into())),
        "circles end"
    );
    let mixed = "entry numgen random mod 2 vmap { 0 : drop , 1 : goto reject-it }";
    let error = trace(&[mixed]).unwrap_err();
    assert_eq!(error, TraceError::NoChain("reject-it".into()));
}

#[test]
fn chance_must_not_decide_whether_a_flow_is_served() {
    let rules = read(&["entry numgen random mod 2 vmap { 0 : drop , 1 : return }"]).unwrap();
    assert!(matches!(rules.trace(&flow()), Err(TraceError::Ambiguous(..))));
}

#[test]
fn goto_does_not_come_back_and_jump_does() {
    let answer = |verb: &str| {
        let first = format!("entry {verb} other");
        read(&[&first, "entry drop", "other ip saddr 203.0.113.1 reject"]).unwrap().trace(&flow())
    };
    assert_eq!(answer("jump"), Ok(Answer::Drop));
    assert_eq!(answer("goto"), Ok(Answer::Pass));
}
