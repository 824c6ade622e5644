//! One kind at an API server, as one stream: everything that exists, then what happens to it.
//!
//! As client-go's reflector does it (`client-go/tools/cache/reflector.go`): what exists comes as the beginning of a watch
//! (`WatchList`) where the server can do that, else page by page. kube's watcher does the same but drops deletions that come
//! before the bookmark which ends such a beginning; kube-apiserver sends that bookmark up to a second late, and what was
//! deleted meanwhile would be served for ever.

use std::{fmt::Debug, mem, ops::RangeInclusive, pin::Pin, time::Duration, vec};

use futures::{Stream, StreamExt};
use kube::{
    Api, Error, Resource, Result,
    api::{ListParams, WatchEvent, WatchParams},
};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};
use tracing::info;

use super::{kubernetes::ANSWER_LIMIT, readable::Readable};

/// What the API server says of a kind.
#[derive(Debug)]
pub enum Said<K> {
    /// Everything that exists comes, from here on.
    Begin,
    /// This exists, now in this form.
    Object(Readable<K>),
    /// This exists no more.
    Deleted(Readable<K>),
    /// That was everything; what comes now are changes.
    Complete,
    /// The API server answers, and has what is known.
    Back,
}

/// Which objects of a kind are wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// By their labels.
    pub labels: Option<&'static str>,
    /// By their fields.
    pub fields: Option<&'static str>,
}

/// Objects a page, as client-go's pager asks for.
const PAGE: u32 = 500;

/// A watch ends after so many seconds, and goes on as another: not at all nodes at once, though all agents began together.
const WATCH_SECS: RangeInclusive<u32> = 145..=290;

/// One that ends sooner was ended by something that happened to the server, or on the way to it.
const SHORTEST: Duration = Duration::from_secs(*WATCH_SECS.start() as u64);

/// A server that does not keep to that is given up.
const LONGEST: Duration = Duration::from_secs(*WATCH_SECS.end() as u64 + 5);

/// A watch that ends sooner than that, and without a word, is a failure (client-go: `VeryShortWatchError`).
const VERY_SHORT: Duration = Duration::from_secs(1);

type Events<K> = Pin<Box<dyn Stream<Item = Result<WatchEvent<Readable<K>>>> + Send>>;

/// Where one stands.
enum State<K> {
    /// Nothing is known.
    Nothing,
    /// Pages come; the first, or what comes after a token.
    Pages { next: Option<String> },
    /// Objects of a page, and which page is next, or the version of all.
    Page { objects: vec::IntoIter<Readable<K>>, next: Option<String>, version: String },
    /// A watch that begins with everything is to be asked for.
    Unstreamed,
    /// It tells everything.
    Streaming { events: Events<K> },
    /// Everything up to this version is known, but does the server know it, too?
    Doubted { version: String },
    /// It does.
    Known { version: String },
    /// And changes come.
    Watching { version: String, events: Events<K>, began: Instant, silent: bool },
}

/// Follows one kind for good.
pub struct Follow<K> {
    api: Api<Readable<K>>,
    wanted: Wanted,
    state: State<K>,
    /// The server can begin a watch with everything, as far as is known.
    streams: bool,
    /// It has begun one so.
    streaming: bool,
}

impl<K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static> Follow<K> {
    /// Begins with everything.
    pub fn new(api: Api<Readable<K>>, wanted: Wanted) -> Self {
        Self { api, wanted, state: State::Nothing, streams: true, streaming: false }
    }

    /// Everything that exists did not come in time. A server that doesn't know `WatchList` and says nothing of it would
    /// never end it.
    pub fn late(&mut self) {
        if self.streaming {
            self.list_instead("it never said that this was all");
        }
        self.state = State::Nothing;
    }

    /// What comes next. After an error it goes on where that makes sense: from the version that is known, or from nothing.
    /// One that is dropped halfway goes on from nothing.
    pub async fn next(&mut self) -> Result<Said<K>> {
        loop {
            let state = mem::replace(&mut self.state, State::Nothing);
            if let Some(said) = self.step(state).await? {
                return Ok(said);
            }
        }
    }

    async fn step(&mut self, state: State<K>) -> Result<Option<Said<K>>> {
        match state {
            State::Nothing => {
                self.streaming = false;
                self.state = if self.streams { State::Unstreamed } else { State::Pages { next: None } };
                Ok(Some(Said::Begin))
            }
            State::Pages { next } => self.page(next).await,
            State::Page { mut objects, next, version } => {
                let object = objects.next();
                self.state = match (&object, next) {
                    (Some(_), next) => State::Page { objects, next, version },
                    (None, next @ Some(_)) => State::Pages { next },
                    (None, None) => {
                        self.state = State::Known { version };
                        return Ok(Some(Said::Complete));
                    }
                };
                Ok(object.map(Said::Object))
            }
            State::Unstreamed => self.stream().await,
            State::Streaming { events } => self.streamed(events).await,
            State::Doubted { version } => self.compare(version).await,
            State::Known { version } => self.watch(version).await,
            State::Watching { version, events, began, silent } => {
                self.watched(version, events, began, silent).await
            }
        }
    }

    async fn page(&mut self, next: Option<String>) -> Result<Option<Said<K>>> {
        let mut params = ListParams { continue_token: next, ..ListParams::default().limit(PAGE) };
        params.label_selector = self.wanted.labels.map(Into::into);
        params.field_selector = self.wanted.fields.map(Into::into);
        let page = self.api.list(&params).await?;
        let some = |text: Option<String>| text.filter(|text| !text.is_empty());
        let (next, version) = (some(page.metadata.continue_), some(page.metadata.resource_version));
        let version = version.ok_or_else(|| failure("a list without resourceVersion"))?;
        self.state = State::Page { objects: page.items.into_iter(), next, version };
        Ok(None)
    }

    async fn stream(&mut self) -> Result<Option<Said<K>>> {
        // No version: as new as the moment of asking.
        match self.api.watch(&self.params().initial_events(), "").await {
            Ok(events) => {
                self.streaming = true;
                self.state = State::Streaming { events: events.boxed() };
            }
            Err(Error::Api(status)) if matches!(status.code, 400 | 422) => {
                self.list_instead(&status.message);
                self.state = State::Pages { next: None };
            }
            Err(error) => return Err(error),
        }
        Ok(None)
    }

    /// Changes may already be among what tells everything, deletions too. If it fails halfway lists are tried, as client-go
    /// does: what passes watches on may not pass on this one.
    async fn streamed(&mut self, mut events: Events<K>) -> Result<Option<Said<K>>> {
        let event = events.next().await.ok_or_else(|| failure("the watch ended before everything came"));
        let event = event.flatten().inspect_err(|error| self.list_instead(&error.to_string()))?;
        let said = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => Some(Said::Object(object)),
            WatchEvent::Deleted(object) => Some(Said::Deleted(object)),
            WatchEvent::Bookmark(mark) if mark.metadata.annotations.contains_key(INITIAL_END) => {
                self.state = watching(mark.metadata.resource_version, events);
                return Ok(Some(Said::Complete));
            }
            WatchEvent::Bookmark(_) => None,
            WatchEvent::Error(status) => {
                self.list_instead(&status.message);
                return Err(Error::Api(status));
            }
        };
        self.state = State::Streaming { events };
        Ok(said)
    }

    /// Asks the server how far it is. One with an older state than is known, as of a backup, would let a watch wait until
    /// its versions have caught up: all is told anew.
    async fn compare(&mut self, version: String) -> Result<Option<Said<K>>> {
        let one = ListParams::default().limit(1);
        let answer = timeout(ANSWER_LIMIT, self.api.list(&one)).await.unwrap_or_else(|_| Err(cut_off()));
        let answer = answer.map_err(|error| self.go_on(version.clone(), error))?;
        let number = |version: &str| version.parse().unwrap_or(0u64);
        if number(answer.metadata.resource_version.as_deref().unwrap_or_default()) < number(&version) {
            info!(kind = %K::kind(&()), "the API server has an older state; everything is listed again");
            self.state = State::Nothing;
        } else {
            self.state = State::Known { version };
        }
        Ok(Some(Said::Back))
    }

    async fn watch(&mut self, version: String) -> Result<Option<Said<K>>> {
        match self.api.watch(&self.params(), &version).await {
            Ok(events) => self.state = watching(version, events.boxed()),
            Err(error) => return Err(self.go_on(version, error)),
        }
        Ok(None)
    }

    async fn watched(
        &mut self,
        version: String,
        mut events: Events<K>,
        began: Instant,
        silent: bool,
    ) -> Result<Option<Said<K>>> {
        let event = match timeout(LONGEST.saturating_sub(began.elapsed()), events.next()).await {
            Ok(Some(event)) => event,
            Ok(None) if silent && began.elapsed() < VERY_SHORT => {
                return Err(self.go_on(version, failure("the watch ended at once")));
            }
            Ok(None) if began.elapsed() < SHORTEST => {
                self.state = State::Doubted { version };
                return Ok(None);
            }
            Ok(None) | Err(_) => {
                self.state = State::Known { version };
                return Ok(None);
            }
        };
        let (said, version) = match event {
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                let version = version_of(&object)?;
                (Some(Said::Object(object)), version)
            }
            Ok(WatchEvent::Deleted(object)) => {
                let version = version_of(&object)?;
                (Some(Said::Deleted(object)), version)
            }
            Ok(WatchEvent::Bookmark(mark)) => (None, mark.metadata.resource_version),
            Ok(WatchEvent::Error(status)) => return Err(self.go_on(version, Error::Api(status))),
            // What it said is not known, and the next line's version is beyond it: all is told anew.
            Err(error @ Error::SerdeError(_)) => return Err(error),
            Err(error) => return Err(self.go_on(version, error)),
        };
        self.state = State::Watching { version, events, began, silent: false };
        Ok(said)
    }

    /// What is known holds, but if the server has forgotten that version.
    fn go_on(&mut self, version: String, error: Error) -> Error {
        if !matches!(&error, Error::Api(status) if status.code == 410) {
            self.state = State::Doubted { version };
        }
        error
    }

    fn params(&self) -> WatchParams {
        WatchParams {
            label_selector: self.wanted.labels.map(Into::into),
            field_selector: self.wanted.fields.map(Into::into),
            ..WatchParams::default().timeout(fastrand::u32(WATCH_SECS))
        }
    }

    fn list_instead(&mut self, reason: &str) {
        info!(kind = %K::kind(&()), reason, "lists come page by page from here on, not as the beginning of a watch (WatchList)");
        self.streams = false;
    }
}

fn watching<K>(version: String, events: Events<K>) -> State<K> {
    State::Watching { version, events, began: Instant::now(), silent: true }
}

/// Marks the bookmark after everything that existed (`meta/v1 InitialEventsAnnotationKey`).
const INITIAL_END: &str = "k8s.io/initial-events-end";

fn version_of<K: Resource>(object: &Readable<K>) -> Result<String> {
    let version = object.meta().resource_version.clone().filter(|version| !version.is_empty());
    version.ok_or_else(|| failure("an object without resourceVersion"))
}

/// An answer has begun and does not end.
pub fn cut_off() -> Error {
    failure("the rest of the list doesn't come")
}

fn failure(what: &'static str) -> Error {
    Error::Service(what.into())
}
