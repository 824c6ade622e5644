//! Objects, their history, and what clients may ask of both.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
    sync::Arc,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::selector::Selector;

/// A kind that is listed and watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `v1`.
    Service,
    /// `discovery.k8s.io/v1`.
    EndpointSlice,
    /// `v1`.
    Node,
    /// `networking.k8s.io/v1`.
    ServiceCidr,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 4] = [Self::Service, Self::EndpointSlice, Self::Node, Self::ServiceCidr];

    /// As `kind:` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }

    /// As `apiVersion:` spells it.
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Service | Self::Node => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::ServiceCidr => "networking.k8s.io/v1",
        }
    }

    /// As paths spell it.
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::Node => "nodes",
            Self::ServiceCidr => "servicecidrs",
        }
    }

    /// Does it live in namespaces?
    pub const fn is_namespaced(self) -> bool {
        matches!(self, Self::Service | Self::EndpointSlice)
    }
}

/// An object as it was at one moment.
#[derive(Debug)]
pub struct Object {
    /// Without `kind` and `apiVersion`.
    pub value: Value,
    /// The same as JSON, as lists show it.
    pub text: String,
}

impl Object {
    fn new(value: Value) -> Arc<Self> {
        Arc::new(Self { text: value.to_string(), value })
    }

    /// As watches show it: lists leave out what all their items have in common.
    pub fn typed(&self, kind: Kind) -> String {
        let rest = &self.text[1..];
        let comma = if rest == "}" { "" } else { "," };
        format!(r#"{{"kind":"{}","apiVersion":"{}"{comma}{rest}"#, kind.name(), kind.api_version())
    }

    fn at(&self, version: u64) -> Arc<Self> {
        let mut value = self.value.clone();
        value["metadata"]["resourceVersion"] = version.to_string().into();
        Self::new(value)
    }
}

type Key = (Kind, String, String);

type Objects<'a> = dyn Iterator<Item = (&'a Key, &'a Arc<Object>)> + 'a;

struct Change {
    version: u64,
    key: Key,
    before: Option<Arc<Object>>,
    after: Option<Arc<Object>>,
}

/// The asked-for version is no longer (or not yet) known.
#[derive(Debug, PartialEq, Eq)]
pub struct Expired {
    /// The oldest version a watch may start after.
    pub oldest: u64,
}

/// One page of a list.
pub struct Page {
    /// What it shows.
    pub objects: Vec<Arc<Object>>,
    /// The version all pages of this list show.
    pub version: u64,
    /// Where the next page goes on.
    pub next: Option<Cursor>,
    /// Objects on later pages; at least one if there are any, with a selector.
    pub remaining: usize,
}

/// Where a list goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// The version of the first page.
    pub version: u64,
    /// After this namespace and name.
    pub after: (String, String),
}

/// One event of a watch.
#[derive(Debug)]
pub struct WatchEvent {
    /// `ADDED`, `MODIFIED`, `DELETED`.
    pub what: &'static str,
    /// The object; a deleted one in its last state.
    pub object: Arc<Object>,
}

/// What the API server keeps.
pub struct Store {
    objects: BTreeMap<Key, Arc<Object>>,
    history: VecDeque<Change>,
    version: u64,
    /// All changes up to this one are forgotten.
    oldest: u64,
    uids: u64,
}

/// Changes that are kept; an API server keeps those of some minutes.
const HISTORY: usize = 200_000;

/// No list starts at one in a cluster that has lived.
const FIRST_VERSION: u64 = 100_000;

impl Default for Store {
    fn default() -> Self {
        Self {
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            version: FIRST_VERSION,
            oldest: FIRST_VERSION,
            uids: 0,
        }
    }
}

impl Store {
    /// Creates or replaces an object; what an API server fills in is filled in, unless it is there.
    pub fn put(&mut self, mut value: Value) -> Result<()> {
        let kind =
            value["kind"].as_str().and_then(|name| Kind::ALL.into_iter().find(|kind| kind.name() == name));
        let kind = kind.with_context(|| format!("no kind of ours: {}", value["kind"]))?;
        let name = value["metadata"]["name"].as_str().context("an object has a name")?.to_owned();
        let namespace = if kind.is_namespaced() {
            value["metadata"]["namespace"].as_str().unwrap_or("default").to_owned()
        } else {
            String::new()
        };
        let fields = value.as_object_mut().context("an object")?;
        fields.remove("kind");
        fields.remove("apiVersion");
        let key = (kind, namespace, name);
        self.fill_in(&key, &mut value);
        self.change(key, Some(Object::new(value)));
        Ok(())
    }

    fn fill_in(&mut self, key: &Key, value: &mut Value) {
        let before = self.objects.get(key).map(|object| object.value["metadata"].clone()).unwrap_or_default();
        let metadata = &mut value["metadata"];
        if !key.1.is_empty() {
            metadata["namespace"] = key.1.clone().into();
        }
        if metadata["uid"].is_null() {
            self.uids += 1;
            let fresh = format!("00000000-0000-4000-8000-{:012x}", self.uids).into();
            metadata["uid"] = before.get("uid").cloned().unwrap_or(fresh);
        }
        if metadata["creationTimestamp"].is_null() {
            let fresh = "2026-01-01T00:00:00Z".into();
            metadata["creationTimestamp"] = before.get("creationTimestamp").cloned().unwrap_or(fresh);
        }
        metadata["resourceVersion"] = (self.version + 1).to_string().into();
    }

    /// Removes an object; was there one?
    pub fn delete(&mut self, kind: Kind, namespace: &str, name: &str) -> bool {
        let key = (kind, namespace.to_owned(), name.to_owned());
        let there = self.objects.contains_key(&key);
        if there {
            self.change(key, None);
        }
        there
    }

    fn change(&mut self, key: Key, after: Option<Arc<Object>>) {
        self.version += 1;
        let before = match &after {
            Some(object) => self.objects.insert(key.clone(), object.clone()),
            None => self.objects.remove(&key),
        };
        self.history.push_back(Change { version: self.version, key, before, after });
        if self.history.len() > HISTORY {
            self.oldest = self.history.pop_front().map_or(self.oldest, |change| change.version);
        }
    }

    /// The version of the last change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Forgets how it came to be so.
    pub fn compact(&mut self) {
        self.history.clear();
        self.oldest = self.version;
    }

    /// Becomes empty, and starts again so many versions lower, like a cluster restored from an old backup.
    pub fn forget(&mut self, versions: u64) {
        let version = self.version - versions;
        *self = Self { version, oldest: version, uids: self.uids, ..Self::default() };
    }

    /// A page of a list, as of the version at which the list began.
    pub fn page(
        &self,
        kind: Kind,
        namespace: Option<&str>,
        selector: &Selector,
        limit: usize,
        cursor: Option<Cursor>,
    ) -> Result<Page, Expired> {
        let version = cursor.as_ref().map_or(self.version, |cursor| cursor.version);
        let (after_namespace, after_name) = cursor.map(|cursor| cursor.after).unwrap_or_default();
        let after = (kind, after_namespace, after_name);
        let objects = self.as_of(version, &after)?;
        let mut left = objects.filter(|(key, object)| {
            namespace.is_none_or(|namespace| key.1 == namespace) && selector.matches(&object.value)
        });
        let limit = if limit == 0 { usize::MAX } else { limit };
        let shown: Vec<_> = left.by_ref().take(limit).collect();
        // With a selector a server doesn't count them either.
        let remaining = if selector.is_empty() { left.count() } else { left.take(1).count() };
        let last = shown.last().map(|(key, _)| (key.1.clone(), key.2.clone()));
        Ok(Page {
            objects: shown.into_iter().map(|(_, object)| object.clone()).collect(),
            version,
            next: last.filter(|_| remaining > 0).map(|after| Cursor { version, after }),
            remaining,
        })
    }

    /// The objects of a kind after a key, as they were, by undoing what came later.
    fn as_of<'a>(&'a self, version: u64, after: &'a Key) -> Result<Box<Objects<'a>>, Expired> {
        if version < self.oldest || version > self.version {
            return Err(Expired { oldest: self.oldest });
        }
        let of_kind = |(key, _): &(&Key, &Arc<Object>)| key.0 == after.0;
        let now = self.objects.range((Bound::Excluded(after), Bound::Unbounded)).take_while(of_kind);
        let later = self.history.iter().rev().take_while(|change| change.version > version);
        let mut later = later.filter(|change| change.key.0 == after.0 && change.key > *after).peekable();
        if later.peek().is_none() {
            return Ok(Box::new(now));
        }
        let mut objects: BTreeMap<&Key, &Arc<Object>> = now.collect();
        for change in later {
            match &change.before {
                Some(before) => objects.insert(&change.key, before),
                None => objects.remove(&change.key),
            };
        }
        Ok(Box::new(objects.into_iter()))
    }

    /// What a watch sees after a version. One of the future sees nothing until it has come.
    pub fn changes(
        &self,
        kind: Kind,
        namespace: Option<&str>,
        selector: &Selector,
        after: u64,
    ) -> Result<Vec<WatchEvent>, Expired> {
        if after < self.oldest {
            return Err(Expired { oldest: self.oldest });
        }
        let start = self.history.partition_point(|change| change.version <= after);
        let changes = self.history.range(start..).filter(|change| {
            change.key.0 == kind && namespace.is_none_or(|namespace| change.key.1 == namespace)
        });
        Ok(changes.filter_map(|change| watch_event(change, selector)).collect())
    }
}

/// What a change looks like through a selector.
fn watch_event(change: &Change, selector: &Selector) -> Option<WatchEvent> {
    let seen = |object: &Option<Arc<Object>>| object.clone().filter(|object| selector.matches(&object.value));
    let (what, object) = match (seen(&change.before), seen(&change.after)) {
        (None, None) => return None,
        (None, Some(after)) => ("ADDED", after),
        (Some(_), Some(after)) => ("MODIFIED", after),
        (Some(before), None) => ("DELETED", before.at(change.version)),
    };
    Some(WatchEvent { what, object })
}

/// A `Status` that says why not.
pub fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, labels: Value) -> Value {
        json!({"kind": "Service", "metadata": {"name": name, "labels": labels}, "spec": {}})
    }

    fn unlabelled() -> Selector {
        Selector::parse(Kind::Service, "!hidden", "").expect("known")
    }

    #[test]
    fn a_watch_sees_what_its_selector_sees() {
        let mut store = Store::default();
        let start = store.version();
        for labels in [json!({}), json!({"a": "b"}), json!({"hidden": ""}), json!({"hidden": "x"}), json!({})]
        {
            store.put(service("web", labels)).unwrap();
        }
        store.delete(Kind::Service, "default", "web");
        let events = store.changes(Kind::Service, None, &unlabelled(), start).unwrap();
        let what: Vec<&str> = events.iter().map(|event| event.what).collect();
        assert_eq!(what, ["ADDED", "MODIFIED", "DELETED", "ADDED", "DELETED"]);
        assert_eq!(events[2].object.value["metadata"]["resourceVersion"], (start + 3).to_string());
        assert!(store.changes(Kind::Node, None, &Selector::default(), start).unwrap().is_empty());
    }

    #[test]
    fn pages_show_one_moment_until_it_is_forgotten() {
        let mut store = Store::default();
        for name in ["a", "b", "c"] {
            store.put(service(name, json!({}))).unwrap();
        }
        let first = store.page(Kind::Service, None, &unlabelled(), 2, None).unwrap();
        assert_eq!((first.objects.len(), first.remaining), (2, 1));
        store.delete(Kind::Service, "default", "c");
        store.put(service("d", json!({}))).unwrap();
        let rest = store.page(Kind::Service, None, &unlabelled(), 2, first.next.clone()).unwrap();
        let names: Vec<&Value> =
            rest.objects.iter().map(|object| &object.value["metadata"]["name"]).collect();
        assert_eq!((names, rest.version), (vec![&json!("c")], first.version));
        store.compact();
        let gone = store.page(Kind::Service, None, &unlabelled(), 2, first.next);
        assert_eq!(gone.err(), Some(Expired { oldest: store.version() }));
        assert!(store.changes(Kind::Service, None, &unlabelled(), first.version).is_err());
    }
}
