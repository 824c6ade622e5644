//! One kind, watched for good.
//!
//! A watch that breaks goes on where it was. A new list deletes what vanished; an API server that is away deletes
//! nothing. An object that can't be read is skipped, with a warning and an Event, and what was known of it holds.

use std::collections::BTreeSet;

use anyhow::Result;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Api, Client, Error, Resource,
    core::error_boundary::InvalidObject,
    runtime::{utils::Backoff, watcher::DefaultBackoff},
};
use lb_core::model::{ObjectName, Warning};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{
    Report, Reports,
    follow::{Follow, Said, cut_off},
    kubernetes::{ANSWER_LIMIT, Note, Watched},
    readable::Readable,
    trouble::{Trouble, reason},
};

/// What a watch needs, and whom it tells.
#[derive(Clone)]
pub struct Told {
    /// The API server.
    pub client: Client,
    /// Takes what shall be put on objects as Events.
    pub notes: Option<mpsc::Sender<Note>>,
    /// Takes changes and warnings.
    pub reports: Reports,
    /// Told once everything that exists has been reported.
    pub synced: mpsc::Sender<()>,
}

/// Watches one kind for good; an optional one ends if there is none.
pub async fn watch<K: Watched>(to: Told) -> Result<()> {
    let mut watch: Watch<K> = Watch::new(to);
    loop {
        match watch.next().await {
            Ok(said) => watch.take(said).await?,
            Err(error) => {
                if !watch.failed(error).await? {
                    return Ok(());
                }
            }
        }
    }
}

struct Watch<K> {
    follow: Follow<K>,
    to: Told,
    /// Whom to tell of the first complete list.
    first: Option<mpsc::Sender<()>>,
    /// Objects that were reported and not taken back.
    known: BTreeSet<ObjectName>,
    /// Objects with warnings.
    warned: BTreeSet<ObjectName>,
    /// A list is coming in.
    listing: bool,
    /// Objects of it.
    listed: BTreeSet<ObjectName>,
    trouble: Option<Trouble>,
    backoff: DefaultBackoff,
}

impl<K: Watched> Watch<K> {
    fn new(to: Told) -> Self {
        Self {
            follow: Follow::new(Api::all(to.client.clone()), K::WANTED),
            first: Some(to.synced.clone()),
            to,
            known: BTreeSet::new(),
            warned: BTreeSet::new(),
            listing: true,
            listed: BTreeSet::new(),
            trouble: None,
            backoff: DefaultBackoff::default(),
        }
    }

    /// A watch may be silent for long, a list that has begun may not.
    async fn next(&mut self) -> kube::Result<Said<K>> {
        if !self.listing {
            return self.follow.next().await;
        }
        let next = timeout(ANSWER_LIMIT, self.follow.next()).await;
        next.unwrap_or_else(|_| {
            self.follow.late();
            Err(cut_off())
        })
    }

    async fn take(&mut self, said: Said<K>) -> Result<()> {
        if !matches!(said, Said::Begin | Said::Back) {
            self.backoff.reset();
            self.is_back();
        }
        match said {
            // Who may list but not watch is not helped by an answer.
            Said::Back => {
                if matches!(self.trouble, Some(Trouble::Away | Trouble::Failing)) {
                    self.is_back();
                }
            }
            Said::Begin => {
                self.listing = true;
                self.listed.clear();
            }
            Said::Object(object) => {
                let name = name_of(&object);
                if self.listing {
                    self.listed.insert(name.clone());
                }
                self.object(object, name).await?;
            }
            Said::Deleted(object) => {
                let name = name_of(&object);
                self.listed.remove(&name);
                self.gone(name).await?;
            }
            Said::Complete => {
                self.listing = false;
                self.vanish().await?;
                self.all_reported().await?;
            }
        }
        Ok(())
    }

    /// Takes an object in; one that can't be read keeps what was known of it.
    async fn object(&mut self, object: Readable<K>, name: ObjectName) -> Result<()> {
        let mut warnings = Vec::new();
        match object.0 {
            Ok(object) => {
                debug!(kind = K::KIND, %name, "seen");
                let event = object.event(&mut warnings);
                self.note(&warnings, || object.object_ref(&()));
                match event {
                    Some(event) => {
                        self.known.insert(name.clone());
                        self.to.reports.send(Report::Changed(vec![event])).await?;
                    }
                    None => self.take_back(name.clone()).await?,
                }
            }
            Err(invalid) => {
                warnings.push(Warning {
                    object: origin::<K>(&name),
                    field: "object".into(),
                    problem: format!("{}; it is skipped", invalid.error),
                });
                self.note(&warnings, || reference::<K>(&invalid));
            }
        }
        self.warn(name, warnings).await
    }

    /// What was not in the list is gone.
    async fn vanish(&mut self) -> Result<()> {
        let before = self.known.union(&self.warned);
        let vanished: Vec<ObjectName> = before.filter(|name| !self.listed.contains(name)).cloned().collect();
        self.listed.clear();
        for name in vanished {
            self.gone(name).await?;
        }
        Ok(())
    }

    async fn gone(&mut self, name: ObjectName) -> Result<()> {
        self.take_back(name.clone()).await?;
        self.warn(name, Vec::new()).await
    }

    async fn take_back(&mut self, name: ObjectName) -> Result<()> {
        if self.known.remove(&name) {
            self.to.reports.send(Report::Changed(vec![K::gone(name)])).await?;
        }
        Ok(())
    }

    async fn warn(&mut self, name: ObjectName, warnings: Vec<Warning>) -> Result<()> {
        let origin = origin::<K>(&name);
        let told = if warnings.is_empty() { self.warned.remove(&name) } else { true };
        if !warnings.is_empty() {
            self.warned.insert(name);
        }
        if told {
            self.to.reports.send(Report::Warnings(origin, warnings)).await?;
        }
        Ok(())
    }

    /// Asks for an Event; if too many wait, the log must do.
    fn note(&self, warnings: &[Warning], object: impl FnOnce() -> ObjectReference) {
        if let Some(notes) = self.to.notes.as_ref().filter(|_| !warnings.is_empty()) {
            let _ = notes.try_send((object(), warnings.to_vec()));
        }
    }

    async fn all_reported(&mut self) -> Result<()> {
        if let Some(synced) = self.first.take() {
            synced.send(()).await?;
        }
        Ok(())
    }

    /// Says what is wrong and waits before the next try. `false`: there is nothing to watch.
    async fn failed(&mut self, error: Error) -> Result<bool> {
        let trouble = Trouble::of(&error);
        self.is_in(trouble, &error);
        if K::OPTIONAL && matches!(trouble, Trouble::Missing | Trouble::Forbidden) {
            self.all_reported().await?;
        }
        if K::OPTIONAL && trouble == Trouble::Missing {
            return Ok(false);
        }
        sleep(self.backoff.next().unwrap_or_default()).await;
        Ok(true)
    }

    /// Logs trouble that is new.
    fn is_in(&mut self, trouble: Trouble, error: &(dyn std::error::Error + 'static)) {
        let (kind, error) = (K::KIND, reason(error));
        match trouble {
            Trouble::Forgotten => return info!(kind, %error, "{}", trouble.advice()),
            Trouble::Missing if K::OPTIONAL => return debug!(kind, "{}", trouble.advice()),
            _ if self.trouble == Some(trouble) => return debug!(kind, %error, "still"),
            Trouble::Forbidden if K::OPTIONAL => {
                warn!(kind, "the ClusterRole lacks list and watch of them; it works without");
            }
            _ => warn!(kind, %error, "{}", trouble.advice()),
        }
        self.trouble = Some(trouble);
    }

    fn is_back(&mut self) {
        if self.trouble.take().is_some() {
            warn!(kind = K::KIND, "the API server is back");
        }
    }
}

fn origin<K: Watched>(name: &ObjectName) -> String {
    format!("{} {name}", K::KIND)
}

fn name_of<K: Watched>(object: &Readable<K>) -> ObjectName {
    let meta = object.meta();
    ObjectName::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

fn reference<K: Watched>(invalid: &InvalidObject) -> ObjectReference {
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::KIND.into()),
        name: invalid.metadata.name.clone(),
        namespace: invalid.metadata.namespace.clone(),
        uid: invalid.metadata.uid.clone(),
        ..ObjectReference::default()
    }
}
