//! Says a warning when it comes and when it has gone, once each however many sources have it.

use std::collections::BTreeMap;

use lb_core::{compile::WarningChanges, model::Warning};
use tracing::{info, warn};

/// Warnings that hold, and how many say each.
#[derive(Default)]
pub struct Told(BTreeMap<Warning, usize>);

impl Told {
    /// Logs what these changes begin and end; one that went and came is neither.
    pub fn change(&mut self, changes: &WarningChanges) {
        for warning in &changes.new {
            let count = self.0.entry(warning.clone()).or_default();
            *count += 1;
            if *count == 1 {
                warn!(object = %warning.object, field = %warning.field, problem = %warning.problem, "look at this");
            }
        }
        for warning in &changes.gone {
            let Some(count) = self.0.get_mut(warning) else { continue };
            *count -= 1;
            if *count == 0 {
                self.0.remove(warning);
                info!(object = %warning.object, field = %warning.field, "warning cleared");
            }
        }
    }
}
