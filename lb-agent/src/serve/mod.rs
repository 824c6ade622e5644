//! What others ask this node over HTTP, answered as kube-proxy 1.36 does: load balancers and the kubelet for its
//! [`health`], load balancers for the endpoints of a Service ([`node_ports`]), Prometheus and people on the
//! [`pages`] of the metrics port.

pub mod health;
mod holder;
mod listen;
pub mod metrics;
pub mod node_ports;
mod pages;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use axum::{
    Router,
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::Response,
    routing::any,
};
use tokio::{sync::oneshot, task::JoinHandle};

pub use self::health::Health;
use crate::{
    args::Config,
    datapath::ebpf::maps::Pins,
    source::{About, Notice, Notices},
};

/// All servers of an agent; they end when dropped.
pub struct Servers {
    servers: Vec<Server>,
    /// Opens and closes health check ports.
    node_ports: Option<JoinHandle<()>>,
}

impl Servers {
    /// Stops listening, and waits for it: another agent can have the ports then.
    pub async fn stop(mut self) {
        if let Some(task) = self.node_ports.take() {
            task.abort();
            // The ports it had open are closed as it ends.
            let _ = task.await;
        }
        for server in self.servers.drain(..) {
            server.stop().await;
        }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        if let Some(task) = &self.node_ports {
            task.abort();
        }
    }
}

/// Starts all servers of `config`; in a dry run no health check ports, which are for who serves the node.
pub async fn start(config: &Config, health: Arc<Health>, pins: Pins, notices: Notices) -> Result<Servers> {
    let healthz = Router::new()
        .route("/healthz", any(health::healthz))
        .route("/livez", any(health::livez))
        .with_state(health.clone());
    let failure = "FailedToStartProxierHealthcheck";
    let mut servers = Vec::new();
    if let Some(at) = config.settings.healthz {
        servers.push(open(at, "--healthz-bind-address", healthz, failure, &notices).await?);
    }
    let pages = pages::router(health.clone(), pins);
    let failure = "FailedToStartMetricServer";
    if let Some(at) = config.settings.metrics {
        servers.push(open(at, "--metrics-bind-address", pages, failure, &notices).await?);
    }
    notices.send(Notice {
        about: About::ThisNode,
        warning: false,
        reason: "Starting",
        action: "StartKubeProxy",
        note: String::new(),
    });
    let node_ports = (!config.dry_run).then(|| tokio::spawn(node_ports::run(health, notices)));
    Ok(Servers { servers, node_ports })
}

/// Opens a server that the agent can't be without.
async fn open(
    addr: SocketAddr,
    option: &str,
    router: Router,
    reason: &'static str,
    notices: &Notices,
) -> Result<Server> {
    let server = Server::open(addr, router)
        .with_context(|| format!("listen on {addr}: is another proxy running? choose another with {option}"));
    if let Err(error) = &server {
        let note = format!("{error:#}");
        let (about, action) = (About::ThisNode, "StartKubeProxy");
        notices.send(Notice { about, warning: true, reason, action, note });
        notices.flush().await;
    }
    server
}

/// One listener; it closes when dropped.
struct Server {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// Answers that are on their way may take so long after the end.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

impl Server {
    fn open(addr: SocketAddr, router: Router) -> io::Result<Self> {
        let listener = listen::listen(addr)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            let serve = axum::serve(listener, router).with_graceful_shutdown(async move {
                let _ = stopped.await;
            });
            let _ = serve.await;
        });
        Ok(Self { stop, task })
    }

    async fn stop(self) {
        let Self { stop, mut task } = self;
        drop(stop);
        if tokio::time::timeout(LAST_ANSWERS, &mut task).await.is_err() {
            task.abort();
        }
    }
}

/// An answer with the headers that all of kube-proxy's have.
fn answer(status: StatusCode, content_type: &'static str, body: String) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use tokio::net::TcpListener;

    use super::*;
    use crate::source::Noticed;

    fn router() -> Router {
        Router::new().route("/", any(async || answer(StatusCode::OK, TEXT, "here".into())))
    }

    /// A port of the loopback device that is free.
    async fn free() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_told() {
        let holder = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = holder.local_addr().unwrap();
        let (notices, mut noticed) = Notices::channel();
        let publisher = tokio::spawn(async move {
            let mut said = Vec::new();
            while let Some(noticed) = noticed.recv().await {
                match noticed {
                    Noticed::Notice(notice) => said.push(notice),
                    Noticed::Flush(flushed) => flushed.send(()).unwrap(),
                }
            }
            said
        });
        let reason = "FailedToStartProxierHealthcheck";
        let error = open(addr, "--healthz-bind-address", router(), reason, &notices).await.err().unwrap();
        let text = format!("{error:#}");
        assert!(text.contains(&addr.to_string()) && text.contains("--healthz-bind-address"), "{text}");
        drop(notices);
        let about = About::ThisNode;
        let told = Notice { about, warning: true, reason, action: "StartKubeProxy", note: text };
        assert_eq!(publisher.await.unwrap(), [told]);
    }

    #[tokio::test]
    async fn a_stopped_server_leaves_its_port_and_its_clients() {
        let addr = free().await;
        let server = Server::open(addr, router()).unwrap();
        // A client that keeps its connection.
        let client = tokio::task::spawn_blocking(move || {
            let mut stream = std::net::TcpStream::connect(addr).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            let mut answer = [0; 1024];
            let length = stream.read(&mut answer).unwrap();
            assert!(answer[..length].starts_with(b"HTTP/1.1 200 OK\r\n"));
            stream
        });
        let mut stream = client.await.unwrap();
        server.stop().await;
        let again = Server::open(addr, router()).expect("the port is free");
        let rest = tokio::task::spawn_blocking(move || stream.read(&mut [0; 16]).unwrap()).await.unwrap();
        assert_eq!(rest, 0, "the connection is closed");
        again.stop().await;
    }
}
