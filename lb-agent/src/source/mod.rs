//! Where the cluster's objects come from.

pub mod calls;
mod follow;
pub mod kubernetes;
pub mod manifests;
pub mod readable;
mod trouble;
mod watch;

use std::time::Duration;

use lb_core::model::{Event, ObjectName, Warning};
use notify::{
    EventKind,
    event::{AccessKind, AccessMode},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
};
use tracing::debug;

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

/// Ends a task with the one that began it.
pub struct AbortOnDrop(pub AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Something was written: reading is news to inotify, too, and would lead to reading again.
pub fn is_change(event: notify::Result<notify::Event>) -> bool {
    event.is_ok_and(|event| !event.kind.is_access() || event.kind == CLOSED_AFTER_WRITING)
}

const CLOSED_AFTER_WRITING: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));
/// An object that something is to be said about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum About {
    /// This node.
    ThisNode,
    /// A Service.
    Service(ObjectName),
}

/// What is to be put on an object as an Event, in kube-proxy's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The object.
    pub about: About,
    /// Somebody should look at it.
    pub warning: bool,
    /// `reason` of the Event.
    pub reason: &'static str,
    /// `action` of the Event.
    pub action: &'static str,
    /// What happened.
    pub note: String,
}

/// What comes out of [`Notices`].
#[derive(Debug)]
pub enum Noticed {
    /// To be published.
    Notice(Notice),
    /// To be answered once all before it is published.
    Flush(oneshot::Sender<()>),
}

/// Takes notices for a source that can publish them. A folder can't: there the log has to do.
#[derive(Clone, Debug)]
pub struct Notices(mpsc::Sender<Noticed>);

/// Notices that may wait for an API server that is away; what comes on top is dropped.
const NOTICES: usize = 64;
/// An API server may take so long to take the last of them.
const FLUSH: Duration = Duration::from_secs(2);

impl Notices {
    /// Both ends.
    pub fn channel() -> (Self, mpsc::Receiver<Noticed>) {
        let (sender, receiver) = mpsc::channel(NOTICES);
        (Self(sender), receiver)
    }

    /// Hands a notice in.
    pub fn send(&self, notice: Notice) {
        if let Err(error) = self.0.try_send(Noticed::Notice(notice)) {
            debug!(%error, "Event not published");
        }
    }

    /// Waits until all are published, if that is soon.
    pub async fn flush(&self) {
        let (flushed, done) = oneshot::channel();
        if self.0.try_send(Noticed::Flush(flushed)).is_ok() {
            let _ = tokio::time::timeout(FLUSH, done).await;
        }
    }
}

/// Where a source sends its reports; the agent ends when nobody listens.
pub type Reports = mpsc::Sender<Report>;

/// A source of objects: runs until the receiver is gone.
pub trait Source: Send + 'static {
    /// Watches, and reports every change.
    fn run(self, reports: Reports) -> impl Future<Output = anyhow::Result<()>> + Send;
}
