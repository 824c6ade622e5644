//! `run --dry-run`: a datapath that carries nothing out and says how far the kernel is from the table.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::Result;
use lb_core::{
    rules::iptables::Config as Rules,
    table::{Changes, ServiceTable},
};
use tracing::{info, warn};

use super::{Difference, Drift, Listing, compare, open};
use crate::{
    args::{Config, Mode},
    datapath::{ApplyReport, Datapath, DatapathError, ebpf::maps::Pins},
    serve::Health,
};

/// Compares, and tells [`Health`].
pub struct DryRun {
    mode: Mode,
    drift: Box<dyn Drift>,
    health: Arc<Health>,
    /// As of the last table.
    desired: Option<Listing>,
    told: BTreeSet<Difference>,
}

/// Who serves the node needs a moment for a change, and may come and go.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Differences that one look may log; a node that isn't served at all has thousands.
const LINES: usize = 20;

impl DryRun {
    /// Prepares a comparison.
    pub fn open(config: &Config, rules: &Rules, pins: &Pins, health: Arc<Health>) -> Result<Self> {
        let drift = open(config.mode, pins, rules, config.ipvs.scheduler)?;
        Ok(Self { mode: config.mode, drift, health, desired: None, told: BTreeSet::new() })
    }

    fn look(&mut self) -> Result<()> {
        let Some(desired) = &self.desired else { return Ok(()) };
        let now: BTreeSet<Difference> = compare(desired, &self.drift.actual()?).into_iter().collect();
        let new: Vec<&Difference> = now.difference(&self.told).collect();
        let gone: Vec<&Difference> = self.told.difference(&now).collect();
        for difference in new.iter().take(LINES) {
            warn!(mode = self.mode.name(), %difference, "the kernel differs");
        }
        for difference in gone.iter().take(LINES) {
            info!(mode = self.mode.name(), %difference, "no longer differs");
        }
        if !(new.is_empty() && gone.is_empty()) {
            info!(
                mode = self.mode.name(),
                differences = now.len(),
                new = new.len(),
                gone = gone.len(),
                "compared; lb-agent diff lists all differences"
            );
        }
        self.health.differs(self.mode.name(), now.len());
        self.told = now;
        Ok(())
    }
}

impl Datapath for DryRun {
    fn name(&self) -> &'static str {
        self.mode.name()
    }

    fn done(&self) -> &'static str {
        "dry run: nothing applied"
    }

    fn apply(&mut self, table: &ServiceTable, changes: &Changes) -> Result<ApplyReport, DatapathError> {
        let desired = self.drift.desired(table, changes);
        let compared = desired.and_then(|desired| {
            self.desired = Some(desired);
            self.look()
        });
        compared.map(|()| ApplyReport::default()).map_err(|error| DatapathError::Kernel {
            operation: "compare with the kernel's state of mode",
            object: self.mode.name().into(),
            source: error.into(),
        })
    }

    fn check_every(&self, _: Duration) -> Duration {
        LOOK_EVERY
    }

    fn is_intact(&mut self, _: &ServiceTable) -> bool {
        if let Err(error) = self.look() {
            warn!(error = %format!("{error:#}"), "the kernel's state can't be read; the last comparison stands");
        }
        true
    }
}
