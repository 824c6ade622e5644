//! Connections: certificates, the listening socket, and what faults do to both.

use std::{
    fs,
    net::{IpAddr, SocketAddr, TcpListener as StdListener},
    os::fd::AsRawFd,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use axum::Router;
use data_encoding::BASE64;
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, crypto::ring, pki_types::PrivateKeyDer},
};

use super::{Blow, Fault, Shared, answer};

/// A certificate authority, and what it signed for one address.
pub struct Authority {
    authority: rcgen::Certificate,
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Authority {
    /// A new one.
    pub fn new(address: IpAddr) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, "lb-test CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let authority_key = KeyPair::generate()?;
        let authority = params.self_signed(&authority_key)?;
        let issuer = Issuer::new(params, authority_key);
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec![address.to_string()])?.signed_by(&key, &issuer)?;
        Ok(Self { authority, certificate, key })
    }

    /// The authority's own certificate.
    pub fn certificate(&self) -> String {
        self.authority.pem()
    }

    /// The server's side of TLS.
    pub fn tls(&self) -> Result<TlsAcceptor> {
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).map_err(|error| anyhow!("{error}"))?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.der().clone()], key)?;
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

/// A kubeconfig; JSON is YAML.
pub fn kubeconfig(address: SocketAddr, authority: &str, token: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "agent"}}],
        "clusters": [{"name": "test", "cluster": {
            "server": format!("https://{address}"),
            "certificate-authority-data": BASE64.encode(authority.as_bytes()),
        }}],
        "users": [{"name": "agent", "user": {"token": token}}],
    })
}

/// Where and how to listen.
pub struct Listen {
    /// The network namespace.
    pub namespace: PathBuf,
    /// An address there.
    pub address: SocketAddr,
    /// With what certificate.
    pub tls: TlsAcceptor,
}

impl Listen {
    /// Opens the socket; it stays in its namespace, whoever takes connections from it.
    ///
    /// # Errors
    ///
    /// If the namespace is gone, or the port is taken.
    pub fn bind(&self) -> Result<StdListener> {
        let namespace = fs::File::open(&self.namespace).context("open the namespace")?;
        let address = self.address;
        let bound = thread::spawn(move || {
            // SAFETY: moves this thread alone, which ends here.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                bail!("enter the namespace: {}", std::io::Error::last_os_error());
            }
            // Sets SO_REUSEADDR: connections that were closed just now don't keep it.
            let listener = StdListener::bind(address).with_context(|| format!("listen on {address}"))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        bound.join().map_err(|_| anyhow!("the thread that listens panicked"))?
    }

    /// As it could once. A program that a test starts has a copy of the last listener until its `exec`.
    async fn bind_again(&self) -> StdListener {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.bind() {
                Ok(listener) => return listener,
                Err(error) => assert!(Instant::now() < deadline, "{error:#}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Takes connections for good; while the server is away there is no socket.
pub async fn serve(listen: Listen, first: StdListener, shared: Arc<Shared>) {
    let mut conduct = shared.conduct.subscribe();
    let mut first = Some(first);
    loop {
        let _ = conduct.wait_for(|conduct| conduct.fault != Some(Fault::Away)).await;
        let socket = match first.take() {
            Some(socket) => socket,
            None => listen.bind_again().await,
        };
        let listener = TcpListener::from_std(socket).expect("a listener");
        let mut away = shared.conduct.subscribe();
        let went_away = away.wait_for(|conduct| conduct.fault == Some(Fault::Away));
        tokio::select! {
            () = take(&listener, &listen.tls, &shared) => {}
            _ = went_away => {}
        }
    }
}

async fn take(listener: &TcpListener, tls: &TlsAcceptor, shared: &Arc<Shared>) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(one(stream, tls.clone(), shared.clone()));
        }
    }
}

/// Serves one connection until somebody closes it.
async fn one(stream: TcpStream, tls: TlsAcceptor, shared: Arc<Shared>) {
    let blows = shared.conduct.borrow().blows.0;
    let mut conduct = shared.conduct.subscribe();
    let closed = conduct.wait_for(|conduct| {
        let struck = conduct.blows.0 != blows && conduct.blows.1 == Some(Blow::Close);
        struck || conduct.fault == Some(Fault::Away)
    });
    let talk = async {
        let Ok(stream) = tls.accept(stream).await else { return };
        let router = Router::new().fallback(answer::answer).with_state(shared.clone());
        let service = TowerToHyperService::new(router);
        let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    };
    tokio::select! {
        () = talk => {}
        _ = closed => {}
    }
}
