//! What the eBPF programs make of a flow, given a table: their stages (`lb-ebpf/src/pipeline.rs`, `sock.rs`) as plain
//! code, for tests and for whoever asks why.

use std::net::SocketAddr;

use crate::{
    flow::{Answer, Flow, Origin, Source},
    model::Protocol,
    table::{
        Backend, BackendList, Frontend, FrontendAddr, FrontendKind, Masquerade, NoBackends, Scope,
        ServiceTable, VipKind,
    },
};

/// The flow's end on the node whose table this is.
pub fn evaluate(table: &ServiceTable, flow: &Flow) -> Answer {
    let dialled = FrontendAddr { addr: flow.dst, port: flow.port, protocol: flow.protocol };
    if flow.protocol == Protocol::Sctp {
        return Answer::Pass;
    }
    let Some(frontend) = table.frontends.get(&dialled) else {
        return match table.vips.get(&flow.dst) {
            Some(VipKind::Vip) => Answer::Reject,
            Some(VipKind::NodeAddress | VipKind::OwnAddress) | None => Answer::Pass,
        };
    };
    if frontend.kind == FrontendKind::LocalhostNodePort && flow.origin != Origin::Node {
        return Answer::Pass;
    }
    if !source_may(frontend, flow) {
        return Answer::Drop;
    }
    let scope = if flow.origin == Origin::Outside { &frontend.external } else { &frontend.internal };
    let backends = table.services.get(&frontend.service).map_or(&[][..], |entry| match scope.list {
        BackendList::Cluster => &entry.cluster,
        BackendList::Local => &entry.local,
    });
    if backends.is_empty() {
        return match scope.none {
            NoBackends::Reject => Answer::Reject,
            NoBackends::Drop => Answer::Drop,
        };
    }
    let choices = backends
        .iter()
        .map(|backend| (SocketAddr::new(backend.addr, backend.port), source(flow, frontend, scope, backend)));
    Answer::Serve(choices.collect())
}

fn source_may(frontend: &Frontend, flow: &Flow) -> bool {
    match flow.origin {
        _ if frontend.source_ranges.is_empty() => true,
        Origin::Node => frontend.source_ranges_allow_host,
        _ => frontend.source_ranges.iter().any(|range| range.contains(&flow.source)),
    }
}

fn source(flow: &Flow, frontend: &Frontend, scope: &Scope, backend: &Backend) -> Source {
    let always = scope.masquerade == Masquerade::Always;
    let by_socket = match flow.origin {
        Origin::Node => true,
        Origin::PodSocket => frontend.source_ranges.is_empty() && !always,
        Origin::Pod | Origin::Outside => false,
    };
    let masqueraded = match flow.origin {
        _ if by_socket => false,
        Origin::Outside => {
            !backend.own_address && (always || scope.masquerade == Masquerade::Remote && !backend.local)
        }
        _ => backend.addr == flow.source || always && !backend.own_address,
    };
    if masqueraded { Source::Masqueraded } else { Source::Kept }
}
