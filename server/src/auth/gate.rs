//! The gate of the gRPC side: every request goes through it before its service sees it.

use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::http;
use tonic::Code;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tower::{Layer, Service};

use super::{Auth, Purpose, Record, Shown};

/// Name of the server that asks for somebody, in its request to another.
pub const ASKED_BY: &str = "tapio-asked-by";

/// Puts a [`Gate`] before a service.
#[derive(Clone, Debug)]
pub struct GateLayer(pub Arc<Auth>);

impl<S> Layer<S> for GateLayer {
    type Service = Gate<S>;

    fn layer(&self, inner: S) -> Gate<S> {
        Gate { auth: Arc::clone(&self.0), inner }
    }
}

/// Checks every gRPC request before its service sees it.
#[derive(Clone, Debug)]
pub struct Gate<S> {
    auth: Arc<Auth>,
    inner: S,
}

impl<S, B, R> Service<http::Request<B>> for Gate<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
    R: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        // The one that is ready is the one to call.
        let fresh = self.inner.clone();
        let mut inner = mem::replace(&mut self.inner, fresh);
        let auth = Arc::clone(&self.auth);
        Box::pin(async move {
            let began = Instant::now();
            let call = request.uri().path().to_owned();
            let purpose = Purpose::of_path(&call);
            let extensions = request.extensions();
            let tls = extensions.get::<TlsConnectInfo<TcpConnectInfo>>();
            let tcp = tls.map(TlsConnectInfo::get_ref).or_else(|| extensions.get::<TcpConnectInfo>());
            let peer = tcp.and_then(TcpConnectInfo::remote_addr);
            let certificates = tls.and_then(TlsConnectInfo::peer_certs);
            let asked_by = request.headers().get(ASKED_BY).and_then(|name| name.to_str().ok()).unwrap_or("").to_owned();
            let authorization = request.headers().get(http::header::AUTHORIZATION).cloned();
            let shown = Shown {
                authorization: authorization.as_ref().map(http::HeaderValue::as_bytes),
                certificate: certificates.as_ref().and_then(|chain| chain.first()),
                peer,
            };
            let admitted = auth.admit(purpose, shown).await;
            let mut record = Record {
                purpose,
                call: &call,
                peer,
                identity: "",
                asked_by: &asked_by,
                outcome: "ok",
                is_denied: false,
                took: began.elapsed(),
            };
            let caller = match admitted {
                Ok(caller) => Arc::new(caller),
                Err(denied) => {
                    let status = denied.status();
                    let outcome = format!("{:?}: {}", status.code(), denied.label());
                    auth.audit().record(&Record { outcome: &outcome, is_denied: true, ..record });
                    return Ok(status.into_http());
                }
            };
            request.extensions_mut().insert(Arc::clone(&caller));
            let response = inner.call(request).await?;
            // The ingest logs collectors' streams; health checks are not audited.
            if matches!(purpose, Purpose::Query | Purpose::Silence) {
                let code = response.headers().get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()));
                let outcome = code.filter(|code| *code != Code::Ok).map(|code| format!("{code:?}"));
                record.identity = &caller.identity;
                record.outcome = outcome.as_deref().unwrap_or("ok");
                record.took = began.elapsed();
                auth.audit().record(&record);
            }
            Ok(response)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::io::Read;

    use prometheus::Registry;

    use super::*;
    use crate::auth::AuthSection;

    #[tokio::test]
    async fn the_audit_log_names_the_server_that_asks() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let writer = Arc::new(file.reopen().expect("it opens"));
        let _until_dropped = tracing::subscriber::set_default(tracing_subscriber::fmt().with_writer(writer).finish());
        let auth = Auth::open(&AuthSection::default(), &Registry::new()).await.expect("nothing to read");
        let answer = |_: http::Request<()>| async { Ok::<_, Infallible>(http::Response::new(())) };
        let mut gate = GateLayer(Arc::new(auth)).layer(tower::service_fn(answer));
        for server in ["tapio-server-1", ""] {
            let request = http::Request::builder().uri("/tapio.v1.Query/Status");
            let request = if server.is_empty() { request } else { request.header(ASKED_BY, server) };
            gate.call(request.body(()).expect("a request")).await.expect("answered");
        }
        let mut text = String::new();
        file.reopen().expect("it opens").read_to_string(&mut text).expect("read");
        let lines: Vec<&str> = text.lines().filter(|line| line.contains("/tapio.v1.Query/Status")).collect();
        assert!(lines.len() == 2 && lines[0].contains("tapio-server-1"), "{text}");
        assert!(lines[0].contains("asked_by") && !lines[1].contains("asked_by"), "{text}");
    }
}
