//! Where the cluster's objects come from.

pub mod kubernetes;
pub mod manifests;
mod trouble;
mod watch;

use lb_core::model::{Event, Warning};
use notify::{
    EventKind,
    event::{AccessKind, AccessMode},
};
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

/// Something was written: reading is news to inotify, too, and would lead to reading again.
pub fn is_change(event: notify::Result<notify::Event>) -> bool {
    event.is_ok_and(|event| !event.kind.is_access() || event.kind == CLOSED_AFTER_WRITING)
}

const CLOSED_AFTER_WRITING: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));

/// Where a source sends its reports; the agent ends when nobody listens.
pub type Reports = mpsc::Sender<Report>;

/// A source of objects: runs until the receiver is gone.
pub trait Source: Send + 'static {
    /// Watches, and reports every change.
    fn run(self, reports: Reports) -> impl Future<Output = anyhow::Result<()>> + Send;
}
