//! Requests to the API server, counted as client-go counts them for kube-proxy
//! (`component-base/metrics/prometheus/restclient/metrics.go`): dashboards of kube-proxy show them.

use std::{
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::http::{Request, Response};
use futures::future::BoxFuture;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, core::Collector};
use tower::{Layer, Service};

/// Counts of requests, wherever clients make them.
#[derive(Clone, Debug)]
pub struct Calls {
    requests: IntCounterVec,
    seconds: HistogramVec,
}

/// Seconds until an answer begins.
const BUCKETS: [f64; 12] = [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0];

/// The code of a request without an answer.
const NO_ANSWER: &str = "<error>";

impl Default for Calls {
    fn default() -> Self {
        let requests = Opts::new(
            "rest_client_requests_total",
            "[ALPHA] Number of HTTP requests, partitioned by status code, method, and host.",
        );
        let seconds = HistogramOpts::new(
            "rest_client_request_duration_seconds",
            "[ALPHA] Request latency in seconds. Broken down by verb, and host.",
        );
        let correct = "names and labels are written correctly";
        Self {
            requests: IntCounterVec::new(requests, &["code", "host", "method"]).expect(correct),
            seconds: HistogramVec::new(seconds.buckets(BUCKETS.into()), &["host", "verb"]).expect(correct),
        }
    }
}

impl Calls {
    /// What is to be shown.
    pub fn metrics(&self) -> [Box<dyn Collector>; 2] {
        [Box::new(self.requests.clone()), Box::new(self.seconds.clone())]
    }

    /// Counts what a client asks this host.
    pub fn of(&self, host: &str) -> CallsOf {
        CallsOf { calls: self.clone(), host: host.to_owned() }
    }
}

/// Counts of requests to one host.
#[derive(Clone, Debug)]
pub struct CallsOf {
    calls: Calls,
    host: String,
}

impl CallsOf {
    fn count(&self, method: &str, code: &str, elapsed: Duration) {
        let Self { calls, host } = self;
        calls.requests.with_label_values(&[code, host, method]).inc();
        calls.seconds.with_label_values(&[host, method]).observe(elapsed.as_secs_f64());
    }
}

impl<S> Layer<S> for CallsOf {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, calls: self.clone() }
    }
}

/// A client whose requests are counted.
#[derive(Clone, Debug)]
pub struct Counted<S> {
    inner: S,
    calls: CallsOf,
}

impl<S, A, B> Service<Request<A>> for Counted<S>
where
    S: Service<Request<A>, Response = Response<B>, Future: Send + 'static>,
    S::Error: Send,
    B: Send,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<B>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let (calls, method, asked) = (self.calls.clone(), request.method().clone(), Instant::now());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            let code = answer.as_ref().map(Response::status);
            calls.count(
                method.as_str(),
                code.as_ref().map_or(NO_ANSWER, |code| code.as_str()),
                asked.elapsed(),
            );
            answer
        })
    }
}
