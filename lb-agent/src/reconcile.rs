//! Forgets netfilter's UDP flows that no longer go where the table says, after each change of something UDP.
//!
//! Only for modes in which netfilter translates: the BPF programs look at a flow's backend with each datagram.

use std::{
    collections::BTreeSet,
    io,
    time::{Duration, Instant},
};

use lb_common::net::PROTO_UDP;
use lb_core::{
    model::Family,
    reconcile::{self, UdpFlow},
    table::{Changes, ServiceTable},
};
use tracing::{info, warn};

use crate::{
    conntrack::{self, Conntrack, Entry},
    serve::Health,
};

/// What is still to be done.
#[derive(Default)]
pub struct Reconciler {
    /// Families whose flows have not been looked at since something changed.
    pending: BTreeSet<Family>,
    /// When to try again after a failure, and how long the wait was.
    retry: Option<(Instant, Duration)>,
}

/// Waits between tries: first and longest. Flows of a backend that is gone lose their datagrams meanwhile.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

impl Reconciler {
    /// These changes are in the kernel.
    pub fn note(&mut self, changes: &Changes) {
        self.pending.extend(reconcile::families(changes));
    }

    /// How long until something is to be done again; `None` if nothing is.
    pub fn due_in(&self) -> Option<Duration> {
        let wait = self.retry.map_or(Duration::ZERO, |(at, _)| at.saturating_duration_since(Instant::now()));
        (!self.pending.is_empty()).then_some(wait)
    }

    /// Forgets flows as `table` wants it, if it is time to. What fails is tried again.
    pub fn run(&mut self, table: &ServiceTable, health: &Health) {
        if self.due_in() != Some(Duration::ZERO) {
            return;
        }
        let wait = self.retry.take().map_or(RETRY.0, |(_, wait)| (wait * 2).min(RETRY.1));
        for family in std::mem::take(&mut self.pending) {
            let (started, mut flows) = (Instant::now(), 0);
            let done = forget_stale(table, family, &mut flows);
            if flows > 0 {
                info!(%family, flows, "UDP flows to backends that are gone choose anew");
            }
            if let Err(error) = done {
                warn!(%family, %error, "UDP flows to backends that are gone can't all be ended; trying again");
                self.pending.insert(family);
                self.retry = Some((Instant::now() + wait, wait));
            }
            health.conntrack_reconciled(family, started.elapsed(), flows);
        }
    }
}

/// Counts the flows it forgets, which may be some before it fails. What can be forgotten is, whatever else fails.
fn forget_stale(table: &ServiceTable, family: Family, forgotten: &mut u64) -> io::Result<()> {
    let mut conntrack = Conntrack::open()?;
    let stale = conntrack.find(family, |entry| is_stale(table, entry))?;
    let mut result = if stale.is_whole { Ok(()) } else { Err(conntrack::interrupted()) };
    for entry in &stale.entries {
        match conntrack.forget(&entry.orig) {
            Ok(()) => *forgotten += 1,
            Err(error) => result = Err(error),
        }
    }
    result
}

fn is_stale(table: &ServiceTable, entry: &Entry) -> bool {
    let flow = UdpFlow { dialled: entry.orig.dst, answers: entry.reply.src };
    entry.orig.proto == PROTO_UDP && reconcile::is_stale(table, &flow)
}
