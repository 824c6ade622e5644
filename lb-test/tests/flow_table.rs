//! The table of flows on paper: the reference, the compiled table and the rules give each row's answer. The same rows
//! are asked with real sockets in `netns_services.rs`.

use std::path::Path;

use lb_core::{
    evaluate::evaluate,
    flow::{Answer, Dialect, Flow},
    model::Family,
    oracle::Oracle,
    rules::{nftables, trace},
};
use lb_test::flows::{Paper, PaperNode};

fn paper(test: &str) -> Paper {
    Paper::load(&Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("flow-table-{test}"))).unwrap()
}

fn check(paper: &Paper, by: &str, dialect: Dialect, ask: impl Fn(&PaperNode, &Flow) -> Answer) {
    let failures = paper.failures(dialect, ask);
    assert!(failures.is_empty(), "{by}: {} answers are wrong:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn the_reference_gives_every_answer_in_every_mode() {
    let paper = paper("reference");
    for dialect in Dialect::ALL {
        check(&paper, "reference", dialect, |node, flow| {
            Oracle { cluster: &paper.cluster, node: &node.view, policy: &paper.policy, dialect }.answer(flow)
        });
    }
}

#[test]
fn the_compiled_table_gives_every_answer() {
    check(&paper("table"), "table", Dialect::Ebpf, |node, flow| evaluate(&node.table, flow));
}

#[test]
fn iptables_rules_give_every_answer() {
    let paper = paper("iptables");
    let config = paper.rules_config();
    check(&paper, "rules", Dialect::Iptables, |node, flow| {
        let rules = trace::Iptables::new(&node.table, &node.view, &config);
        rules.trace(flow).unwrap_or_else(|error| panic!("{error}"))
    });
}

#[test]
fn nftables_rules_give_every_answer() {
    let paper = paper("nftables");
    let config = paper.rules_config();
    check(&paper, "rules", Dialect::Nftables, |node, flow| {
        let text = [Family::V4, Family::V6]
            .map(|family| nftables::Rules::all(&node.table, family, &config).to_string())
            .concat();
        let rules = trace::Nftables::read(&text, &node.view);
        rules.and_then(|rules| rules.trace(flow)).unwrap_or_else(|error| panic!("{error}"))
    });
}

#[test]
fn ipvs_with_its_rules_gives_every_answer() {
    let paper = paper("ipvs");
    let config = paper.rules_config();
    check(&paper, "servers and rules", Dialect::Ipvs, |node, flow| {
        let servers = trace::Ipvs::new(&node.table, &node.view, &config);
        servers.trace(flow).unwrap_or_else(|error| panic!("{error}"))
    });
}
