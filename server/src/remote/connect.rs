//! HTTP for object stores over the hyper and rustls that the server has anyway.
//!
//! What enters: requests, signed and whole. What leaves: answers, as they come. What must hold: no request waits for ever,
//! whatever the other side does; bodies leave no faster than `archive.remote.max_bytes_per_sec`, repeated ones too; without
//! `allow_http` nothing travels in the clear.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::{Client, Error as ClientError, connect};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse, HttpResponseBody,
    HttpService,
};
use object_store::{ClientConfigKey, ClientOptions};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tapio_wire::program::token_bucket::TokenBucket;
use tokio::time::{Instant, Sleep, sleep_until};

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long an answer may take to begin, beside the time that the request's body takes at [`RATE_MIN`].
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
const RATE_MIN: u64 = 64 << 10;
/// How long an answer may pause.
const STALL_LIMIT: Duration = Duration::from_secs(30);
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// What may be sent at once after a quiet time, as time at the configured rate.
const BURST: Duration = Duration::from_millis(200);

/// How fast bodies may leave; all requests of a store share it.
#[derive(Debug)]
pub(super) struct Pace {
    bucket: Option<Mutex<TokenBucket>>,
    per_second: u64,
}

impl Pace {
    /// Limits the bytes a second; 0 for any.
    pub fn new(per_second: u64) -> Self {
        let bucket = |rate: u64| Mutex::new(TokenBucket::with_debt(rate as f64, BURST, std::time::Instant::now()));
        Self { bucket: (per_second > 0).then(|| bucket(per_second)), per_second }
    }

    /// Takes the bytes, or says when to try again.
    fn take(&self, bytes: u64) -> Result<(), Instant> {
        let Some(bucket) = &self.bucket else { return Ok(()) };
        let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.take(bytes, std::time::Instant::now()).map_err(Instant::from_std)
    }

    /// Waits until `bytes` may be sent.
    pub async fn wait(&self, bytes: u64) {
        while let Err(later) = self.take(bytes) {
            sleep_until(later).await;
        }
    }

    fn time_for(&self, bytes: u64) -> Duration {
        let rate = if self.per_second > 0 { self.per_second.min(RATE_MIN) } else { RATE_MIN };
        Duration::from_secs(bytes / rate)
    }
}

/// Makes HTTP clients for a store.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    pub ca: Option<PathBuf>,
    pub pace: Arc<Pace>,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let tls = tls(self.ca.as_deref())
            .map_err(|source| object_store::Error::Generic { store: "TLS", source: source.into() })?;
        let mut tcp = connect::HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_LIMIT));
        let https = hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(tls);
        // Of metadata services of the machine too, which have no other scheme.
        let may_be_clear = options.get_config_value(&ClientConfigKey::AllowHttp).as_deref() == Some("true");
        let https = if may_be_clear { https.https_or_http() } else { https.https_only() };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_LIMIT)
            .build(https.enable_http1().wrap_connector(tcp));
        Ok(HttpClient::new(Service { client, pace: Arc::clone(&self.pace) }))
    }
}

fn tls(ca: Option<&Path>) -> Result<ClientConfig, io::Error> {
    let roots = match ca {
        Some(path) => {
            let mut roots = RootCertStore::empty();
            let unusable = |error: &dyn std::fmt::Display| io::Error::other(format!("{}: {error}", path.display()));
            for certificate in CertificateDer::pem_file_iter(path).map_err(|error| unusable(&error))? {
                let certificate = certificate.map_err(|error| unusable(&error))?;
                roots.add(certificate).map_err(|error| unusable(&error))?;
            }
            if roots.is_empty() {
                return Err(unusable(&"it holds no certificate in PEM form"));
            }
            roots
        }
        // Without any, what is not `http://` is not trusted.
        None => machine_roots().unwrap_or_else(|_| RootCertStore::empty()),
    };
    trusting(roots).map_err(io::Error::other)
}

/// The CA certificates of this machine; where it has none, why.
pub fn machine_roots() -> Result<RootCertStore, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map_or_else(String::new, |error| format!(": {error}"));
        return Err(format!("this machine has no CA certificates{why}; name a ca, or install ca-certificates"));
    }
    Ok(roots)
}

/// TLS of a client that trusts these and shows no certificate.
pub fn trusting(roots: RootCertStore) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

#[derive(Debug)]
struct Service {
    client: Client<HttpsConnector<connect::HttpConnector>, Paced>,
    pace: Arc<Pace>,
}

#[async_trait::async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let limit = ANSWER_LIMIT + self.pace.time_for(request.body().content_length() as u64);
        let request = request.map(|body| Paced { body, pace: Arc::clone(&self.pace), next: None, wait: None });
        let answer = tokio::time::timeout(limit, self.client.request(request)).await;
        let answer = answer.map_err(|_| late("no answer came in time"))?.map_err(client_error)?;
        let limit = || Box::pin(sleep_until(Instant::now() + STALL_LIMIT));
        Ok(answer.map(|body| HttpResponseBody::new(Watched { body, limit: limit() })))
    }
}

fn late(what: &'static str) -> HttpError {
    HttpError::new(HttpErrorKind::Timeout, io::Error::new(io::ErrorKind::TimedOut, what))
}

fn client_error(error: ClientError) -> HttpError {
    let kind = if error.is_connect() { HttpErrorKind::Connect } else { HttpErrorKind::Interrupted };
    HttpError::new(kind, error)
}

/// A request's body, at the pace that is allowed.
struct Paced {
    body: HttpRequestBody,
    pace: Arc<Pace>,
    next: Option<Bytes>,
    wait: Option<Pin<Box<Sleep>>>,
}

impl Body for Paced {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        loop {
            if let Some(wait) = &mut self.wait {
                ready!(wait.as_mut().poll(context));
                self.wait = None;
            }
            if self.next.is_none() {
                match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                    Some(Ok(frame)) => match frame.into_data() {
                        Ok(data) => self.next = Some(data),
                        Err(frame) => return Poll::Ready(Some(Ok(frame))),
                    },
                    other => return Poll::Ready(other),
                }
            }
            let bytes = self.next.as_ref().map_or(0, Bytes::len) as u64;
            match self.pace.take(bytes) {
                Ok(()) => return Poll::Ready(self.next.take().map(|data| Ok(Frame::data(data)))),
                Err(later) => self.wait = Some(Box::pin(sleep_until(later))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.next.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.body.size_hint();
        let held = self.next.as_ref().map_or(0, Bytes::len) as u64;
        match rest.exact() {
            Some(exact) => SizeHint::with_exact(exact + held),
            None => rest,
        }
    }
}

/// An answer's body, which must not pause for too long.
struct Watched {
    body: Incoming,
    limit: Pin<Box<Sleep>>,
}

impl Body for Watched {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            self.limit.as_mut().reset(Instant::now() + STALL_LIMIT);
            let failed = |error| HttpError::new(HttpErrorKind::Interrupted, error);
            return Poll::Ready(frame.map(|frame| frame.map_err(failed)));
        }
        ready!(self.limit.as_mut().poll(context));
        Poll::Ready(Some(Err(late("the answer stopped in the middle"))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
