//! A Kubernetes API server for tests: real HTTP, TLS, lists and watches, and everything that may go wrong with them.
//!
//! It keeps Services, EndpointSlices, Nodes and ServiceCIDRs, and takes Events. What it answers is what
//! kube-apiserver 1.36 answers, as far as clients that list and watch can tell.

mod answer;
mod connect;
mod selector;
mod store;
mod watch;

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;
use tokio::{runtime::Runtime, sync::watch as channel};

use connect::{Authority, Listen};
use store::Store;

pub use store::Kind;

use crate::netns::Lab;

/// Who has it is let in.
pub const TOKEN: &str = "the-right-token";

/// What goes wrong, until [`ApiServer::heal`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nobody listens, and all connections are closed.
    Away,
    /// Connections are taken and requests read, but these get no answer, ever; watches stand still and go on later.
    Hang,
    /// Answers stop in the middle, and a watch that begins with all objects never says that this was all.
    Half,
    /// Every answer waits for so long.
    Slow(Duration),
    /// Every request gets this code.
    Code(u16),
}

/// What happens to the watches that are open now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// They end in the middle of a line.
    CutMidLine,
    /// They get a line that is no JSON, and end.
    Garble,
    /// They get an `ERROR` of code 410, and end.
    Expire,
    /// Their connections close.
    Close,
}

/// How the server answers a watch from before what it remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gone {
    /// As an `ERROR` event, like kube-apiserver with its watch cache.
    #[default]
    Event,
    /// By HTTP, like kube-apiserver without.
    Http,
}

/// A request that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Of which kind.
    pub kind: Kind,
    /// What for.
    pub verb: Verb,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// The first page of a list.
    List,
    /// One more page.
    Page,
    /// A list of one object, which only asks for the version.
    Peek,
    /// A watch from a version.
    Watch,
    /// A watch that begins with all objects.
    WatchList,
}

/// The server's behaviour, as tests set it.
#[derive(Clone, Debug, Default)]
struct Conduct {
    fault: Option<Fault>,
    /// Counts blows, so that each watch sees each once.
    blows: (u64, Option<Blow>),
    forbidden: BTreeSet<Kind>,
    unknown: BTreeSet<Kind>,
    gone: Gone,
    no_watch_list: bool,
}

struct Shared {
    store: Mutex<Store>,
    events: Mutex<Vec<Value>>,
    taken: Mutex<Vec<Taken>>,
    token: String,
    /// Tells watches that there is something to see.
    version: channel::Sender<u64>,
    conduct: channel::Sender<Conduct>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running API server; it ends when dropped.
pub struct ApiServer {
    shared: Arc<Shared>,
    authority: Authority,
    address: SocketAddr,
    dir: PathBuf,
    _runtime: Runtime,
}

impl ApiServer {
    /// Starts in a namespace of a lab, on one of its addresses.
    pub fn start(lab: &Lab, ns: &str, address: SocketAddr) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let shared = Arc::new(Shared {
            store: Mutex::default(),
            events: Mutex::default(),
            taken: Mutex::default(),
            token: TOKEN.into(),
            version: channel::Sender::new(0),
            conduct: channel::Sender::default(),
        });
        let authority = Authority::new(address.ip())?;
        let listen = Listen { namespace: lab.ns_path(ns), address, tls: authority.tls()? };
        let first = listen.bind()?;
        runtime.spawn(connect::serve(listen, first, shared.clone()));
        Ok(Self { shared, authority, address, dir: lab.dir(), _runtime: runtime })
    }

    /// A kubeconfig file to be let in with.
    pub fn kubeconfig(&self) -> Result<PathBuf> {
        self.write_kubeconfig("kubeconfig", &self.authority.certificate(), &self.shared.token)
    }

    /// One with a token that is not known here.
    pub fn kubeconfig_of_a_stranger(&self) -> Result<PathBuf> {
        self.write_kubeconfig("kubeconfig-stranger", &self.authority.certificate(), "another-token")
    }

    /// One with a certificate authority that did not sign this server's certificate.
    pub fn kubeconfig_of_another_ca(&self) -> Result<PathBuf> {
        let other = Authority::new(self.address.ip())?;
        self.write_kubeconfig("kubeconfig-other-ca", &other.certificate(), &self.shared.token)
    }

    fn write_kubeconfig(&self, file: &str, authority: &str, token: &str) -> Result<PathBuf> {
        let path = self.dir.join(file);
        let text = connect::kubeconfig(self.address, authority, token).to_string();
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// Creates or replaces objects, written as YAML documents.
    pub fn put(&self, yaml: &str) -> Result<()> {
        for document in serde_yaml_ng::Deserializer::from_str(yaml) {
            let value = Value::deserialize(document).context("an object in YAML")?;
            if !value.is_null() {
                self.put_value(value)?;
            }
        }
        Ok(())
    }

    /// Creates or replaces one object.
    pub fn put_value(&self, value: Value) -> Result<()> {
        self.change(|store| store.put(value))
    }

    /// Removes an object; was there one?
    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) -> bool {
        self.change(|store| store.delete(kind, namespace, name))
    }

    /// Forgets its history: what happened before can't be watched any more.
    pub fn compact(&self) {
        self.change(Store::compact);
    }

    /// Forgets all objects and counts from so many versions before, like a cluster restored from an old backup.
    pub fn forget(&self, versions: u64) {
        self.change(|store| store.forget(versions));
    }

    fn change<T>(&self, change: impl FnOnce(&mut Store) -> T) -> T {
        let mut store = lock(&self.shared.store);
        let result = change(&mut store);
        self.shared.version.send_replace(store.version());
        result
    }

    /// From now on this goes wrong.
    pub fn fault(&self, fault: Fault) {
        self.shared.conduct.send_modify(|conduct| conduct.fault = Some(fault));
    }

    /// Nothing goes wrong any more.
    pub fn heal(&self) {
        self.shared.conduct.send_modify(|conduct| conduct.fault = None);
    }

    /// Strikes the watches that are open now.
    pub fn strike(&self, blow: Blow) {
        self.shared.conduct.send_modify(|conduct| conduct.blows = (conduct.blows.0 + 1, Some(blow)));
    }

    /// Nobody may list or watch this kind.
    pub fn forbid(&self, kind: Kind) {
        self.shared.conduct.send_modify(|conduct| {
            conduct.forbidden.insert(kind);
        });
    }

    /// Everybody may list and watch all kinds again.
    pub fn allow_all(&self) {
        self.shared.conduct.send_modify(|conduct| conduct.forbidden.clear());
    }

    /// There is no such kind here.
    pub fn unlearn(&self, kind: Kind) {
        self.shared.conduct.send_modify(|conduct| {
            conduct.unknown.insert(kind);
        });
    }

    /// How to answer a watch from before what is remembered.
    pub fn answer_gone_by(&self, gone: Gone) {
        self.shared.conduct.send_modify(|conduct| conduct.gone = gone);
    }

    /// Watches can't begin with all objects, as before Kubernetes 1.32.
    pub fn without_watch_lists(&self) {
        self.shared.conduct.send_modify(|conduct| conduct.no_watch_list = true);
    }

    /// Events that clients put on objects, in their last state.
    pub fn events(&self) -> Vec<Value> {
        lock(&self.shared.events).clone()
    }

    /// How many requests for this were taken.
    pub fn count(&self, kind: Kind, verb: Verb) -> usize {
        let taken = Taken { kind, verb };
        lock(&self.shared.taken).iter().filter(|other| **other == taken).count()
    }
}
