//! Counts every program run's outcome, exactly once.

use lb_common::outcome::{Hook, OUTCOMES_PER_HOOK};

use crate::maps::METRICS;

/// Adds one to this hook's counter of the outcome with this number.
#[inline(always)]
pub fn record(hook: Hook, outcome: u32) {
    if let Some(counter) = METRICS.get_ptr_mut(hook as u32 * OUTCOMES_PER_HOOK + outcome) {
        // SAFETY: a per-CPU slot; programs of one CPU don't run at the same time as each other.
        unsafe { *counter += 1 };
    }
}
