//! Objects from an API server.
//!
//! Each kind has a watch of its own, with bookmarks and back-off. A relist deletes what vanished; an API server that
//! is away deletes nothing. Objects that don't deserialise are skipped, with a warning and an Event.

use std::{collections::BTreeSet, fmt::Debug, path::PathBuf, sync::Arc};

use anyhow::{Context, Result};
use futures::StreamExt;
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery, networking::v1 as networking};
use kube::{
    Api, Client, Config, Resource, ResourceExt,
    config::{KubeConfigOptions, Kubeconfig},
    core::DeserializeGuard,
    runtime::{
        WatchStreamExt,
        events::{Event as KubeEvent, EventType, Recorder, Reporter},
        watcher,
    },
};
use lb_core::model::{Event, ObjectName, Warning};
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, task::AbortHandle};
use tracing::{debug, warn};

use super::{About, Notice, Noticed, Report, Reports, Source};
use crate::convert;

/// The API server to watch.
pub struct Kubernetes {
    /// A kubeconfig file; else `$KUBECONFIG`, `~/.kube/config` or the pod's own service account.
    pub kubeconfig: Option<PathBuf>,
    /// A context of it.
    pub context: Option<String>,
    /// This node's name, for Events.
    pub node: Arc<str>,
    /// What is wrong with an object is put on it as an Event, too.
    pub events: bool,
    /// What else is to be put on objects.
    pub notices: mpsc::Receiver<Noticed>,
}

impl Kubernetes {
    async fn client(&self) -> Result<Client> {
        let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
        let config = match &self.kubeconfig {
            Some(path) => {
                let kubeconfig =
                    Kubeconfig::read_from(path).with_context(|| format!("read kubeconfig {}", path.display()))?;
                Config::from_custom_kubeconfig(kubeconfig, &options).await.context("use kubeconfig")?
            }
            None => Config::infer().await.context(
                "find an API server: neither a kubeconfig nor a service account; give --kubeconfig or --manifests",
            )?,
        };
        Client::try_from(config).context("make an API client")
    }
}

/// A kind we watch.
trait Watched: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static {
    const KIND: &'static str;
    /// An API server without this kind will do.
    const OPTIONAL: bool = false;
    /// What the API server filters for us.
    fn config() -> watcher::Config;
    /// `None`: none of ours, as if it didn't exist.
    fn event(&self, warnings: &mut Vec<Warning>) -> Option<Event>;
    fn gone(name: ObjectName) -> Event;
}

impl Watched for core::Service {
    const KIND: &'static str = "Service";
    fn config() -> watcher::Config {
        watcher::Config::default()
            .labels("!service.kubernetes.io/service-proxy-name")
            .fields("spec.clusterIP!=None")
    }
    fn event(&self, warnings: &mut Vec<Warning>) -> Option<Event> {
        convert::service(self, warnings).filter(|service| !service.cluster_ips.is_empty()).map(Event::Service)
    }
    fn gone(name: ObjectName) -> Event {
        Event::ServiceGone(name)
    }
}

impl Watched for discovery::EndpointSlice {
    const KIND: &'static str = "EndpointSlice";
    fn config() -> watcher::Config {
        watcher::Config::default().labels("!service.kubernetes.io/headless")
    }
    fn event(&self, warnings: &mut Vec<Warning>) -> Option<Event> {
        convert::endpoint_slice(self, warnings).map(Event::EndpointSlice)
    }
    fn gone(name: ObjectName) -> Event {
        Event::EndpointSliceGone(name)
    }
}

impl Watched for core::Node {
    const KIND: &'static str = "Node";
    fn config() -> watcher::Config {
        watcher::Config::default()
    }
    fn event(&self, warnings: &mut Vec<Warning>) -> Option<Event> {
        Some(Event::Node(convert::node(self, warnings)))
    }
    fn gone(name: ObjectName) -> Event {
        Event::NodeGone(name.name)
    }
}

impl Watched for networking::ServiceCIDR {
    const KIND: &'static str = "ServiceCIDR";
    /// Kubernetes 1.33 has it.
    const OPTIONAL: bool = true;
    fn config() -> watcher::Config {
        watcher::Config::default()
    }
    fn event(&self, warnings: &mut Vec<Warning>) -> Option<Event> {
        Some(Event::ServiceCidr(convert::service_cidr(self, warnings)))
    }
    fn gone(name: ObjectName) -> Event {
        Event::ServiceCidrGone(name.name)
    }
}

impl Source for Kubernetes {
    async fn run(self, reports: Reports) -> Result<()> {
        let client = self.client().await?;
        let reporter = Reporter { controller: "lb-agent".into(), instance: Some(self.node.to_string()) };
        let recorder = self.events.then(|| Recorder::new(client.clone(), reporter));
        let publisher = tokio::spawn(publish(recorder.clone(), self.node.clone(), self.notices));
        let _publisher = AbortOnDrop(publisher.abort_handle());
        let (synced, mut all_synced) = mpsc::channel(4);
        let mut watches = tokio::task::JoinSet::new();
        let to = Told { client, recorder, reports: reports.clone(), synced };
        watches.spawn(watch::<core::Service>(to.clone()));
        watches.spawn(watch::<discovery::EndpointSlice>(to.clone()));
        watches.spawn(watch::<networking::ServiceCIDR>(to.clone()));
        watches.spawn(watch::<core::Node>(to));
        for _ in 0..4 {
            if all_synced.recv().await.is_none() {
                break;
            }
        }
        reports.send(Report::Synced).await?;
        while let Some(ended) = watches.join_next().await {
            ended.context("a watch ended")??;
        }
        Ok(())
    }
}

/// What a watch needs, and whom it tells.
#[derive(Clone)]
struct Told {
    client: Client,
    recorder: Option<Recorder>,
    reports: Reports,
    /// Everything that exists has been reported.
    synced: mpsc::Sender<()>,
}

/// Watches one kind for good; an optional one ends if there is none.
async fn watch<K: Watched>(to: Told) -> Result<()> {
    let Told { client, recorder, reports, synced } = to;
    let api: Api<DeserializeGuard<K>> = Api::all(client);
    let mut stream = watcher(api, K::config()).default_backoff().boxed();
    let mut known: BTreeSet<ObjectName> = BTreeSet::new();
    let mut listed: BTreeSet<ObjectName> = BTreeSet::new();
    let mut first = Some(synced);
    let mut away = false;
    while let Some(event) = stream.next().await {
        let mut events = Vec::new();
        let event = match event {
            Ok(event) => event,
            Err(error) if K::OPTIONAL && refusal(&error) == Some(NOT_FOUND) => {
                debug!(kind = K::KIND, "this API server has no such kind");
                if let Some(synced) = first.take() {
                    synced.send(()).await?;
                }
                return Ok(());
            }
            Err(error) => {
                if K::OPTIONAL
                    && refusal(&error) == Some(FORBIDDEN)
                    && let Some(synced) = first.take()
                {
                    warn!(kind = K::KIND, "the ClusterRole lacks list and watch of them; it works without");
                    synced.send(()).await?;
                } else if !away {
                    warn!(kind = K::KIND, %error, "the API server is away; the kernel keeps its state");
                }
                away = true;
                continue;
            }
        };
        if away {
            warn!(kind = K::KIND, "the API server is back");
            away = false;
        }
        let done = matches!(event, watcher::Event::InitDone);
        match event {
            watcher::Event::Init => listed.clear(),
            watcher::Event::InitApply(object) => {
                let name = name_of(&object);
                listed.insert(name.clone());
                take(object, name, &mut known, &mut events, &recorder, &reports).await?;
            }
            watcher::Event::InitDone => {
                let vanished: Vec<ObjectName> = known.difference(&listed).cloned().collect();
                known.retain(|name| listed.contains(name));
                events.extend(vanished.into_iter().map(K::gone));
            }
            watcher::Event::Apply(object) => {
                let name = name_of(&object);
                take(object, name, &mut known, &mut events, &recorder, &reports).await?;
            }
            watcher::Event::Delete(object) => {
                let name = name_of(&object);
                if known.remove(&name) {
                    reports.send(Report::Warnings(origin::<K>(&name), Vec::new())).await?;
                    events.push(K::gone(name));
                }
            }
        }
        if !events.is_empty() {
            reports.send(Report::Changed(events)).await?;
        }
        if done && let Some(synced) = first.take() {
            synced.send(()).await?;
        }
    }
    Ok(())
}

/// HTTP.
const FORBIDDEN: u16 = 403;
const NOT_FOUND: u16 = 404;

/// The code with which an API server refused to list or watch.
fn refusal(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => Some(status.code),
        _ => None,
    }
}

fn origin<K: Watched>(name: &ObjectName) -> String {
    format!("{} {name}", K::KIND)
}

fn name_of<K: Watched>(object: &DeserializeGuard<K>) -> ObjectName {
    let meta = match &object.0 {
        Ok(object) => object.meta(),
        Err(invalid) => &invalid.metadata,
    };
    ObjectName::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

/// Takes an object in; one that can't be read keeps what was known of it.
async fn take<K: Watched>(
    object: DeserializeGuard<K>,
    name: ObjectName,
    known: &mut BTreeSet<ObjectName>,
    events: &mut Vec<Event>,
    recorder: &Option<Recorder>,
    reports: &Reports,
) -> Result<()> {
    let mut warnings = Vec::new();
    match object.0 {
        Ok(object) => {
            debug!(kind = K::KIND, name = object.name_any(), "seen");
            match object.event(&mut warnings) {
                Some(event) => {
                    known.insert(name.clone());
                    events.push(event);
                }
                None if known.remove(&name) => events.push(K::gone(name.clone())),
                None => {}
            }
            if !warnings.is_empty() {
                tell(recorder, &object.object_ref(&()), &warnings).await;
            }
        }
        Err(invalid) => {
            warnings.push(Warning {
                object: origin::<K>(&name),
                field: "object".into(),
                problem: format!("{}; it is skipped", invalid.error),
            });
            let mut reference = k8s_openapi::api::core::v1::ObjectReference {
                api_version: Some(K::api_version(&()).into_owned()),
                kind: Some(K::KIND.into()),
                ..Default::default()
            };
            reference.name = invalid.metadata.name.clone();
            reference.namespace = invalid.metadata.namespace.clone();
            reference.uid = invalid.metadata.uid.clone();
            tell(recorder, &reference, &warnings).await;
        }
    }
    reports.send(Report::Warnings(origin::<K>(&name), warnings)).await?;
    Ok(())
}

/// Ends a task with the one that began it.
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Publishes notices as they come.
async fn publish(recorder: Option<Recorder>, node: Arc<str>, mut notices: mpsc::Receiver<Noticed>) {
    while let Some(noticed) = notices.recv().await {
        match (noticed, &recorder) {
            (Noticed::Flush(flushed), _) => drop(flushed.send(())),
            (Noticed::Notice(notice), Some(recorder)) => {
                if let Err(error) = recorder.publish(&event(&notice), &reference(&notice.about, &node)).await
                {
                    debug!(%error, "Event not published");
                }
            }
            (Noticed::Notice(_), None) => {}
        }
    }
}

fn event(notice: &Notice) -> KubeEvent {
    KubeEvent {
        type_: if notice.warning { EventType::Warning } else { EventType::Normal },
        reason: notice.reason.into(),
        note: (!notice.note.is_empty()).then(|| notice.note.clone()),
        action: notice.action.into(),
        secondary: None,
    }
}

/// With kube-proxy's uids, which are names: by them `kubectl describe node` finds Events.
fn reference(about: &About, node: &str) -> core::ObjectReference {
    let (kind, namespace, name, uid) = match about {
        About::ThisNode => ("Node", None, node.to_owned(), node.to_owned()),
        About::Service(name) => {
            ("Service", Some(name.namespace.to_string()), name.name.to_string(), name.to_string())
        }
    };
    core::ObjectReference {
        api_version: Some("v1".into()),
        kind: Some(kind.into()),
        namespace,
        name: Some(name),
        uid: Some(uid),
        ..Default::default()
    }
}

/// Puts the warnings on the object as an Event; the recorder folds repeats.
async fn tell(recorder: &Option<Recorder>, object: &core::ObjectReference, warnings: &[Warning]) {
    let Some(recorder) = recorder else { return };
    let note = warnings.iter().map(|warning| format!("{}: {}", warning.field, warning.problem));
    let event = KubeEvent {
        type_: EventType::Warning,
        reason: "NotServed".into(),
        note: Some(note.collect::<Vec<_>>().join("; ")),
        action: "Resolve".into(),
        secondary: None,
    };
    if let Err(error) = recorder.publish(&event, object).await {
        debug!(%error, "Event not published");
    }
}
