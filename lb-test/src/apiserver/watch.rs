//! Watches: lines of JSON that come as things happen.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::header,
    response::{IntoResponse, Response},
};
use futures::stream;
use serde_json::json;
use tokio::{
    sync::{mpsc, watch as channel},
    time::{Instant, interval_at, timeout_at},
};

use super::{
    Blow, Conduct, Fault, Gone, Shared,
    answer::{Query, Scope, line, raw_line, refuse},
    lock,
    store::{Expired, Kind, WatchEvent, status},
};

/// kube-apiserver sends one a minute; tests don't wait that long.
const BOOKMARK_EVERY: Duration = Duration::from_secs(2);

/// kube-apiserver looks once a second which bookmarks are due: what happens until then comes before the one that ends
/// the initial events, deletions too (`cacher.go`, `cache_watcher.go: nextBookmarkTime`).
const INITIAL_END_AFTER: Duration = Duration::from_secs(1);

/// The shortest that kube-apiserver takes if the client names none (`--min-request-timeout`).
const DEFAULT_TIMEOUT_SECS: u64 = 1_800;

/// Lines on their way to a client that reads slowly.
const QUEUE: usize = 64;

struct Watch {
    shared: Arc<Shared>,
    scope: Scope,
    /// Everything up to here was sent.
    version: u64,
    bookmarks: bool,
    lines: mpsc::Sender<io::Result<Bytes>>,
}

/// Why a watch is over.
struct Over;

impl<T> From<mpsc::error::SendError<T>> for Over {
    fn from(_: mpsc::error::SendError<T>) -> Self {
        Self
    }
}

/// Starts a watch, or says why not.
pub fn start(shared: Arc<Shared>, scope: Scope, query: &Query) -> Response {
    let conduct = shared.conduct.borrow().clone();
    if let Some(message) = misasked(query, &conduct) {
        return refuse(422, "Invalid", message);
    }
    let asked: u64 = match query.get("resourceVersion") {
        "" => 0,
        text => match text.parse() {
            Ok(version) => version,
            Err(_) => return refuse(400, "BadRequest", "invalid resource version"),
        },
    };
    let all_first = query.is("sendInitialEvents") || asked == 0;
    let oldest = lock(&shared.store).changes(scope.kind, None, &scope.selector, asked).err();
    if let (Some(expired), false, Gone::Http) = (oldest, all_first, conduct.gone) {
        return refuse(410, "Expired", &too_old(asked, expired.oldest));
    }
    let limit = query.get("timeoutSeconds").parse().unwrap_or(DEFAULT_TIMEOUT_SECS);
    let (lines, sent) = mpsc::channel(QUEUE);
    let watch = Watch { shared, scope, version: asked, bookmarks: query.is("allowWatchBookmarks"), lines };
    let marked = query.is("sendInitialEvents");
    tokio::spawn(async move {
        let deadline = Instant::now() + Duration::from_secs(limit);
        let _ = timeout_at(deadline, watch.run(all_first, marked)).await;
    });
    let lines = stream::unfold(sent, |mut sent| async { sent.recv().await.map(|line| (line, sent)) });
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(lines)).into_response()
}

/// `ValidateListOptions` of kube-apiserver.
fn misasked(query: &Query, conduct: &Conduct) -> Option<&'static str> {
    let (initial, matching) = (query.get("sendInitialEvents"), query.get("resourceVersionMatch"));
    if !initial.is_empty() && conduct.no_watch_list {
        return Some(
            "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
        );
    }
    if initial.is_empty() && !matching.is_empty() {
        return Some(
            "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
        );
    }
    if !initial.is_empty() && matching != "NotOlderThan" {
        return Some(
            "resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
        );
    }
    None
}

fn too_old(asked: u64, oldest: u64) -> String {
    format!("too old resource version: {asked} ({oldest})")
}

impl Watch {
    async fn run(mut self, all_first: bool, marked: bool) -> Result<Infallible, Over> {
        // Before the first line: what happens from here on concerns this watch.
        let mut versions = self.shared.version.subscribe();
        let mut conducts = self.shared.conduct.subscribe();
        let blows = conducts.borrow_and_update().blows.0;
        if all_first {
            self.send_all().await?;
        }
        let mut ends_initial = marked;
        let first = if marked { INITIAL_END_AFTER } else { BOOKMARK_EVERY };
        let mut bookmark = interval_at(Instant::now() + first, BOOKMARK_EVERY);
        loop {
            versions.mark_unchanged();
            let changes = self.changes();
            // After they are read: what goes wrong before a change keeps the client from seeing it.
            self.obey(&mut conducts, blows).await?;
            self.send_changes(changes).await?;
            tokio::select! {
                _ = versions.changed() => {}
                _ = conducts.changed() => {}
                _ = bookmark.tick(), if self.bookmarks && !(ends_initial && is_half(&conducts)) => {
                    self.send_bookmark(std::mem::take(&mut ends_initial)).await?;
                }
                () = self.lines.closed() => return Err(Over),
            }
        }
    }

    /// Stands still, or ends, as the server's conduct wants it.
    async fn obey(&self, conducts: &mut channel::Receiver<Conduct>, blows: u64) -> Result<(), Over> {
        let _ = conducts.wait_for(|conduct| conduct.fault != Some(Fault::Hang)).await;
        let (away, (number, blow)) = {
            let conduct = conducts.borrow_and_update();
            (conduct.fault == Some(Fault::Away), conduct.blows)
        };
        let blow = blow.filter(|_| number != blows);
        if away || blow == Some(Blow::Close) {
            // The connection is being closed, and says nothing more until then.
            self.lines.closed().await;
            return Err(Over);
        }
        match blow {
            None | Some(Blow::Close) => Ok(()),
            Some(Blow::Garble) => {
                self.send("{\"type\":\"DELETED\",\"object\":?}\n".to_owned()).await?;
                Err(Over)
            }
            Some(Blow::Expire) => {
                let oldest = lock(&self.shared.store).version();
                self.expire(oldest).await
            }
            Some(Blow::CutMidLine) => {
                let whole = raw_line("MODIFIED", r#"{"kind":"Service","apiVersion":"v1","metadata":{}}"#);
                self.send(whole[..whole.len() / 2].to_owned()).await?;
                let cut = io::Error::new(io::ErrorKind::ConnectionReset, "cut on purpose");
                self.lines.send(Err(cut)).await?;
                Err(Over)
            }
        }
    }

    async fn expire(&self, oldest: u64) -> Result<(), Over> {
        let status = status(410, "Expired", &too_old(self.version, oldest));
        self.send(raw_line("ERROR", &status.to_string())).await?;
        Err(Over)
    }

    async fn send_all(&mut self) -> Result<(), Over> {
        let Scope { kind, namespace, selector } = &self.scope;
        let page = lock(&self.shared.store).page(*kind, namespace.as_deref(), selector, 0, None);
        let Ok(page) = page else { return Err(Over) };
        for object in &page.objects {
            self.send(line("ADDED", *kind, object)).await?;
        }
        self.version = page.version;
        Ok(())
    }

    /// What happened since the last line, and the version after it.
    fn changes(&self) -> (Result<Vec<WatchEvent>, Expired>, u64) {
        let Scope { kind, namespace, selector } = &self.scope;
        let store = lock(&self.shared.store);
        (store.changes(*kind, namespace.as_deref(), selector, self.version), store.version())
    }

    async fn send_changes(
        &mut self,
        (changes, version): (Result<Vec<WatchEvent>, Expired>, u64),
    ) -> Result<(), Over> {
        match changes {
            Err(expired) => self.expire(expired.oldest).await,
            Ok(events) => {
                for event in events {
                    self.send(line(event.what, self.scope.kind, &event.object)).await?;
                }
                self.version = self.version.max(version);
                Ok(())
            }
        }
    }

    async fn send_bookmark(&self, initial_end: bool) -> Result<(), Over> {
        // A watch from the future gets nothing until it has come, and no bookmarks either.
        if lock(&self.shared.store).version() < self.version {
            return Ok(());
        }
        let mut metadata = json!({"resourceVersion": self.version.to_string(), "creationTimestamp": null});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        self.send(raw_line("BOOKMARK", &bookmark(self.scope.kind, &metadata.to_string()))).await
    }

    async fn send(&self, text: String) -> Result<(), Over> {
        Ok(self.lines.send(Ok(Bytes::from(text))).await?)
    }
}

fn is_half(conducts: &channel::Receiver<Conduct>) -> bool {
    conducts.borrow().fault == Some(Fault::Half)
}

/// An object of this kind with nothing but metadata, as Go writes it.
fn bookmark(kind: Kind, metadata: &str) -> String {
    let rest = match kind {
        Kind::Service => r#","spec":{},"status":{"loadBalancer":{}}"#,
        Kind::EndpointSlice => r#","addressType":"","endpoints":null,"ports":null"#,
        Kind::Node => {
            r#","spec":{},"status":{"daemonEndpoints":{"kubeletEndpoint":{"Port":0}},"nodeInfo":{}}"#
        }
        Kind::ServiceCidr => r#","spec":{},"status":{}"#,
    };
    format!(
        r#"{{"kind":"{}","apiVersion":"{}","metadata":{metadata}{rest}}}"#,
        kind.name(),
        kind.api_version()
    )
}
