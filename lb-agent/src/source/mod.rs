//! Where the cluster's objects come from.

pub mod kubernetes;
pub mod manifests;
mod trouble;
mod watch;

use lb_core::model::{Event, Warning};
use tokio::sync::mpsc;

/// What a source reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The cluster changed.
    Changed(Vec<Event>),
    /// Everything that exists has been reported: programming may begin.
    Synced,
    /// What is wrong with the objects of one origin (a file, an object), replacing what was said of it before.
    Warnings(String, Vec<Warning>),
}

/// Where a source sends its reports; the agent ends when nobody listens.
pub type Reports = mpsc::Sender<Report>;

/// A source of objects: runs until the receiver is gone.
pub trait Source: Send + 'static {
    /// Watches, and reports every change.
    fn run(self, reports: Reports) -> impl Future<Output = anyhow::Result<()>> + Send;
}
