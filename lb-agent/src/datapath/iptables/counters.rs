//! What kube-proxy counts with nfacct in mode iptables (`pkg/proxy/metrics/metrics.go`): counters that the rules speak
//! of, made before them and removed after them.

use std::{io, thread, time::Duration};

use anyhow::{Context, Result};
use lb_core::rules::{
    iptables::Table,
    names::{COUNTERS, INVALID_DROPPED},
};
use tracing::debug;

use super::exec::Programs;
use crate::nfacct::Counters;

/// A chain for one rule, which nobody calls.
const TRIAL: &str = "LB-AGENT-TRY";

/// Makes the counters; what they have counted stays.
pub fn make() -> io::Result<()> {
    let mut counters = Counters::open()?;
    COUNTERS.iter().try_for_each(|name| counters.make(name))
}

/// Makes the counters, and fails where no rule can count in them.
pub fn prepare(programs: Programs) -> Result<()> {
    make().context("make nfacct's counters")?;
    try_rule(programs)
}

/// Loads a rule that counts, and takes it out again: only the kernel knows whether it has the match.
fn try_rule(programs: Programs) -> Result<()> {
    let text = |rest: String| format!("*{}\n:{TRIAL} - [0:0]\n{rest}\nCOMMIT\n", Table::Mangle.name());
    programs.restore(&text(format!("-A {TRIAL} -m nfacct --nfacct-name {INVALID_DROPPED}")))?;
    Ok(programs.restore(&text(format!("-X {TRIAL}")))?)
}

/// The counters that are there.
pub fn existing() -> Vec<&'static str> {
    let Ok(mut counters) = Counters::open() else { return Vec::new() };
    COUNTERS.into_iter().filter(|name| matches!(counters.packets(name), Ok(Some(_)))).collect()
}

/// Removes the counters that no rule uses. kube-proxy leaves its own for ever; whoever writes rules with them makes them
/// first, so that nobody lacks them.
pub fn remove_unused() {
    for name in existing() {
        match remove(name) {
            Ok(true) => {}
            Ok(false) => debug!(counter = name, "rules of somebody else still count in it"),
            Err(error) => debug!(counter = name, %error, "can't be removed"),
        }
    }
}

/// How often it is tried, and how long apart.
const TRIES: u32 = 10;
const APART: Duration = Duration::from_millis(20);

/// nf_tables lets go of what a rule used a moment after the rule is gone.
fn remove(name: &str) -> io::Result<bool> {
    let mut counters = Counters::open()?;
    for _ in 1..TRIES {
        if counters.remove(name)? {
            return Ok(true);
        }
        thread::sleep(APART);
    }
    counters.remove(name)
}
