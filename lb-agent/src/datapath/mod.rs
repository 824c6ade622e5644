//! A datapath carries a [`ServiceTable`] out; it decides nothing.

pub mod ebpf;
pub mod iptables;
pub mod ipvs;
pub mod nftables;
mod program;

use std::{fmt, time::Duration};

use lb_core::{
    model::Family,
    rules::iptables::Table,
    table::{Changes, ServiceTable},
};

/// Brings this node's kernel state to a table. Blocking; called from one dedicated thread, never concurrently.
pub trait Datapath: Send {
    /// Short name for logs and metrics, e.g. `ebpf`.
    fn name(&self) -> &'static str;

    /// Makes the kernel serve `table`. `changes` names the keys that may differ from the last successful call;
    /// the first call of a process gets [`Changes::all`] and also removes whatever an earlier agent left that
    /// `table` doesn't have. Idempotent and safe to retry: after an error the driver calls again with all
    /// changes since the last success.
    fn apply(&mut self, table: &ServiceTable, changes: &Changes) -> Result<ApplyReport, DatapathError>;

    /// What one `apply` has done, for the log.
    fn done(&self) -> &'static str {
        "applied"
    }

    /// How often to ask whether it is intact, where the configuration says `syncPeriod`.
    fn check_every(&self, sync_period: Duration) -> Duration {
        sync_period.max(CHECK_AT_MOST_EVERY)
    }

    /// Whether nobody has taken away what was applied; `table` is what was. Called every [`Datapath::check_every`]; after
    /// `false` the driver applies everything again.
    fn is_intact(&mut self, table: &ServiceTable) -> bool;
}

/// A datapath is not asked more often whether it is intact.
const CHECK_AT_MOST_EVERY: Duration = Duration::from_secs(1);

/// What one `apply` did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApplyReport {
    /// Map entries (or rules) written.
    pub upserts: usize,
    /// Map entries (or rules) deleted.
    pub deletes: usize,
    /// Service ports that could not be programmed (a full map, say) with the reason; all others work.
    pub refused: Vec<Refused>,
    /// Families whose unused rules could not be removed since the last call.
    pub cleanup_failures: Vec<Family>,
    /// iptables' rules by table.
    pub rules: Vec<RuleCount>,
}

/// How many rules of ours a table of iptables has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleCount {
    /// IP family.
    pub family: Family,
    /// Table.
    pub table: Table,
    /// All of them.
    pub total: usize,
    /// Those that were written.
    pub written: usize,
}

/// A service port that could not be programmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Which.
    pub service: lb_core::table::ServicePortId,
    /// Why, and what to do about it.
    pub reason: String,
}

/// Why a datapath could not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// A map operation failed.
    #[error("{operation} map {map}")]
    Map {
        /// `update`, `delete`, …
        operation: &'static str,
        /// Map name.
        map: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// One family's rules were not loaded.
    #[error("load {family} rules")]
    Rules {
        /// Which.
        family: Family,
        /// Only what changed was to be loaded, not all.
        partial: bool,
        /// The cause.
        source: Box<DatapathError>,
    },
    /// Anything else, with its object in the text.
    #[error("{operation} {object}")]
    Kernel {
        /// What was being done, e.g. `attach tc program to`.
        operation: &'static str,
        /// To what.
        object: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.service, self.reason)
    }
}
