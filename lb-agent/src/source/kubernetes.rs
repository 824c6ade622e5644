//! Objects from an API server.
//!
//! Each kind has a [watch](super::watch) of its own.

use std::{fmt::Debug, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioExecutor};
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery, networking::v1 as networking};
use kube::{
    Client, Config, Resource,
    client::{ClientBuilder, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::events::{Event as KubeEvent, EventType, Recorder, Reporter},
};
use lb_core::model::{Event, ObjectName, Warning};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tower::{BoxError, ServiceBuilder, timeout::TimeoutLayer};
use tower_http::decompression::DecompressionLayer;
use tracing::debug;

use super::{
    AbortOnDrop, About, Notice, Noticed, Report, Reports, Source,
    calls::{Calls, CallsOf},
    follow::Wanted,
    watch::{Told, watch},
};
use crate::convert;

/// The way to an API server.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// A kubeconfig file; else `$KUBECONFIG`, `~/.kube/config` or the pod's own service account.
    pub kubeconfig: Option<PathBuf>,
    /// A context of it.
    pub context: Option<String>,
    /// Its address, whatever the kubeconfig says.
    pub master: Option<String>,
}

/// The API server to watch.
pub struct Kubernetes {
    /// The way to it.
    pub access: Access,
    /// This node's name, for Events.
    pub node: Arc<str>,
    /// What is wrong with an object is put on it as an Event, too.
    pub events: bool,
    /// Where its answers are counted.
    pub calls: Calls,
    /// What else is to be put on objects.
    pub notices: mpsc::Receiver<Noticed>,
}

impl Kubernetes {
    async fn client(&self) -> Result<Client> {
        let Access { kubeconfig, context, master } = &self.access;
        let options = KubeConfigOptions { context: context.clone(), ..KubeConfigOptions::default() };
        let mut config = match kubeconfig {
            Some(path) => {
                let kubeconfig =
                    Kubeconfig::read_from(path).with_context(|| format!("read kubeconfig {}", path.display()))?;
                Config::from_custom_kubeconfig(kubeconfig, &options).await.context("use kubeconfig")?
            }
            None => Config::infer().await.context(
                "find an API server: neither a kubeconfig nor a service account; give --kubeconfig or --manifests",
            )?,
        };
        if let Some(master) = master {
            config.cluster_url = master.parse().with_context(|| format!("--master {master}"))?;
        }
        // The watches try again themselves, and say so.
        config.default_retry = false;
        let calls = self.calls.of(config.cluster_url.authority().map_or("", |host| host.as_str()));
        if config.proxy_url.is_some() {
            // Whether the proxy's peer still talks is the proxy's business.
            let builder = ClientBuilder::try_from(config).context("make an API client")?;
            let builder = builder.with_layer(&TimeoutLayer::new(ANSWER_LIMIT));
            return Ok(builder.with_layer(&calls).build());
        }
        attentive(&config, calls).context("make an API client")
    }
}

/// As kube makes it, but over sockets that ask whether a silent peer is still there: a watch may have nothing to say for
/// minutes, and a server that vanished, or a connection that a firewall forgot, says nothing either. (client-go asks by
/// HTTP/2 pings, with the same limits.)
fn attentive(config: &Config, calls: CallsOf) -> Result<Client> {
    let mut connector = HttpConnector::new();
    // TLS comes on top.
    connector.enforce_http(false);
    connector.set_connect_timeout(Some(ANSWER_LIMIT));
    connector.set_keepalive(Some(SILENCE));
    connector.set_keepalive_interval(Some(ASK_AGAIN));
    connector.set_keepalive_retries(Some(ASKS));
    // What was sent and not acknowledged keeps the kernel from asking.
    connector.set_tcp_user_timeout(Some(SILENCE + ASK_AGAIN * ASKS));
    let connector = config.rustls_https_connector_with_connector(connector)?;
    let service = ServiceBuilder::new()
        .layer(calls)
        .layer(TimeoutLayer::new(ANSWER_LIMIT))
        .layer(config.base_uri_layer())
        .layer(DecompressionLayer::new().gzip(!config.disable_compression))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(connector));
    Ok(Client::new(service, config.default_namespace.clone()))
}

/// After so long without a word the kernel asks for one, so many times at this distance (tcp(7): `TCP_KEEPIDLE`,
/// `TCP_KEEPINTVL`, `TCP_KEEPCNT`).
const SILENCE: Duration = Duration::from_secs(30);
const ASK_AGAIN: Duration = Duration::from_secs(5);
const ASKS: u32 = 3;

/// An answer must have begun after so long; kube itself waits for good. A watch's answer begins at once. A busy
/// kube-apiserver lets requests queue for a quarter of its `--request-timeout` of a minute.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A kind we watch.
pub trait Watched: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static {
    /// Its name.
    const KIND: &'static str;
    /// An API server without this kind will do.
    const OPTIONAL: bool = false;
    /// What the API server filters for us.
    const WANTED: Wanted = Wanted { labels: None, fields: None };
    /// `None`: none of ours, as if it didn't exist.
    fn event(&self, warnings: &mut Vec<Warning>) -> Option<Event>;
    /// It is gone.
    fn gone(name: ObjectName) -> Event;
}

impl Watched for core::Service {
    const KIND: &'static str = "Service";
    const WANTED: Wanted = Wanted {
        labels: Some("!service.kubernetes.io/service-proxy-name"),
        fields: Some("spec.clusterIP!=None"),
    };
    fn event(&self, warnings: &mut Vec<Warning>) -> Option<Event> {
        convert::service(self, warnings).filter(|service| !service.cluster_ips.is_empty()).map(Event::Service)
    }
    fn gone(name: ObjectName) -> Event {
        Event::ServiceGone(name)
    }
}

impl Watched for discovery::EndpointSlice {
    const KIND: &'static str = "EndpointSlice";
    const WANTED: Wanted = Wanted { labels: Some("!service.kubernetes.io/headless"), fields: None };
    fn event(&self, warnings: &mut Vec<Warning>) -> Option<Event> {
        convert::endpoint_slice(self, warnings).map(Event::EndpointSlice)
    }
    fn gone(name: ObjectName) -> Event {
        Event::EndpointSliceGone(name)
    }
}

impl Watched for core::Node {
    const KIND: &'static str = "Node";
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
        let publisher = tokio::spawn(publish_notices(recorder.clone(), self.node.clone(), self.notices));
        let _publisher = AbortOnDrop(publisher.abort_handle());
        let notes = recorder.map(publish);
        let (synced, mut all_synced) = mpsc::channel(4);
        let mut watches = tokio::task::JoinSet::new();
        let to = Told { client, notes, reports: reports.clone(), synced };
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

/// What is wrong with an object.
pub type Note = (core::ObjectReference, Vec<Warning>);

/// Notes that may wait for the API server to take them; more are dropped, for they are in the log as well.
const NOTES: usize = 256;

/// Puts notes on their objects as Events, beside the watches: nothing waits for that. The recorder folds repeats.
fn publish(recorder: Recorder) -> mpsc::Sender<Note> {
    let (notes, mut noted) = mpsc::channel::<Note>(NOTES);
    tokio::spawn(async move {
        while let Some((object, warnings)) = noted.recv().await {
            if let Err(error) = recorder.publish(&event_of(&warnings), &object).await {
                debug!(%error, "Event not published");
            }
        }
    });
    notes
}

/// Publishes notices as they come.
async fn publish_notices(recorder: Option<Recorder>, node: Arc<str>, mut notices: mpsc::Receiver<Noticed>) {
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

fn event_of(warnings: &[Warning]) -> KubeEvent {
    let note = warnings.iter().map(|warning| format!("{}: {}", warning.field, warning.problem));
    KubeEvent {
        type_: EventType::Warning,
        reason: "NotServed".into(),
        note: Some(note.collect::<Vec<_>>().join("; ")),
        action: "Resolve".into(),
        secondary: None,
    }
}
