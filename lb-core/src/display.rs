//! The golden text of a table: one fact a line, sorted and aligned. Tests, logs and debug pages print the same.

use std::fmt;

use crate::table::{
    Backend, BackendList, Frontend, Masquerade, NoBackends, Scope, ServiceEntry, ServiceTable, VipKind,
};

impl fmt::Display for ServiceTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (id, entry) in &self.services {
            write!(f, "service {id} {} {}", id.protocol, id.family)?;
            if let Some(secs) = entry.affinity_secs {
                write!(f, " affinity={secs}s")?;
            }
            writeln!(f)?;
            for backend in union(entry) {
                writeln!(f, "  backend {}", describe(entry, backend))?;
            }
        }
        for (addr, frontend) in &self.frontends {
            let service = &frontend.service;
            write!(f, "frontend {addr:<28} {:<12} {service}", frontend.kind)?;
            write!(f, "  external={} internal={}", Scoped(&frontend.external), Scoped(&frontend.internal))?;
            write_ranges(f, frontend)?;
            if matches!(self.vips.get(&addr.addr), Some(VipKind::NodeAddress | VipKind::OwnAddress)) {
                write!(f, " node-address")?;
            }
            writeln!(f)?;
        }
        self.service_cidrs.iter().try_for_each(|range| writeln!(f, "service-cidr {range}"))?;
        for (service, check) in &self.health_checks {
            writeln!(f, "health-check {service} port={} endpoints={}", check.port, check.local_endpoints)?;
        }
        Ok(())
    }
}

/// Backends of both lists, once each.
fn union(entry: &ServiceEntry) -> Vec<&Backend> {
    let mut all: Vec<&Backend> = entry.cluster.iter().chain(&entry.local).collect();
    all.sort();
    all.dedup();
    all
}

fn describe(entry: &ServiceEntry, backend: &Backend) -> String {
    let mut text = std::net::SocketAddr::new(backend.addr, backend.port).to_string();
    for (holds, word) in [
        (entry.cluster.contains(backend), " cluster-list"),
        (entry.local.contains(backend), " local-list"),
        (backend.local, " here"),
        (backend.terminating, " terminating"),
    ] {
        if holds {
            text.push_str(word);
        }
    }
    text
}

fn write_ranges(f: &mut fmt::Formatter<'_>, frontend: &Frontend) -> fmt::Result {
    if frontend.source_ranges.is_empty() {
        return Ok(());
    }
    let ranges: Vec<String> = frontend.source_ranges.iter().map(ToString::to_string).collect();
    write!(f, " sources={}", ranges.join(","))?;
    if frontend.source_ranges_allow_host { write!(f, "+host") } else { Ok(()) }
}

struct Scoped<'a>(&'a Scope);

impl fmt::Display for Scoped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = match self.0.list {
            BackendList::Cluster => "cluster",
            BackendList::Local => "local",
        };
        let none = match self.0.none {
            NoBackends::Reject => "reject",
            NoBackends::Drop => "drop",
        };
        let masquerade = match self.0.masquerade {
            Masquerade::Never => "keep",
            Masquerade::Remote => "masq-remote",
            Masquerade::Always => "masq-always",
        };
        write!(f, "{list}/{none}/{masquerade}")
    }
}
