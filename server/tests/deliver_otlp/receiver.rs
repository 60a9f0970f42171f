//! A receiver of OTLP that decodes what it is sent, over gRPC or HTTP.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{LogsService, LogsServiceServer};
use opentelemetry_proto::tonic::collector::logs::v1::{
    ExportLogsPartialSuccess, ExportLogsServiceRequest, ExportLogsServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use prost::Message as _;
use tapio_server::deliver::{Otlp, OtlpProtocol, OtlpSection};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Server, ServerTlsConfig};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::cluster_support::until;
use crate::deliver_chat::Delivering;

const PROTOBUF: &str = "application/x-protobuf";

/// What a receiver answers to one request.
#[derive(Clone, Debug)]
pub enum Reply {
    Take,
    /// It has it, and its answer is lost.
    TakeAndFail,
    /// It asks to come later, in so many seconds where it says that.
    Later(Option<u64>),
    /// It takes the request and not the record.
    Partial(&'static str),
    /// It says that the request is wrong.
    Invalid,
    /// An answer that breaks the rules.
    Garbage,
}

/// One request as it was decoded.
#[derive(Clone, Debug)]
pub struct Seen {
    pub at: Instant,
    pub was_taken: bool,
    pub headers: HeaderMap,
    pub request: ExportLogsServiceRequest,
}

impl Seen {
    pub fn record(&self) -> &LogRecord {
        let [logs] = &self.request.resource_logs[..] else { panic!("one resource: {self:#?}") };
        let [logs] = &logs.scope_logs[..] else { panic!("one scope: {self:#?}") };
        let [record] = &logs.log_records[..] else { panic!("one record: {self:#?}") };
        record
    }

    pub fn attributes(&self) -> BTreeMap<String, Value> {
        values(&self.record().attributes)
    }

    pub fn text(&self, key: &str) -> String {
        match self.attributes().remove(key) {
            Some(Value::StringValue(text)) => text,
            other => panic!("{key}: {other:?}"),
        }
    }

    pub fn revision(&self) -> i64 {
        match self.attributes().remove("tapio.finding.revision") {
            Some(Value::IntValue(revision)) => revision,
            other => panic!("the revision is {other:?}"),
        }
    }

    pub fn body(&self) -> &str {
        match self.record().body.as_ref().and_then(|body| body.value.as_ref()) {
            Some(Value::StringValue(text)) => text,
            other => panic!("the body is {other:?}"),
        }
    }
}

pub fn values(attributes: &[KeyValue]) -> BTreeMap<String, Value> {
    let pair = |pair: &KeyValue| (pair.key.clone(), pair.value.clone().and_then(|any| any.value).expect("a value"));
    let found: BTreeMap<String, Value> = attributes.iter().map(pair).collect();
    assert_eq!(found.len(), attributes.len(), "each key once: {attributes:#?}");
    found
}

#[derive(Clone, Default)]
struct Desk {
    replies: Arc<Mutex<VecDeque<Reply>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Desk {
    fn take(&self, headers: HeaderMap, request: ExportLogsServiceRequest) -> Reply {
        let reply = self.replies.lock().expect("no panic").pop_front().unwrap_or(Reply::Take);
        let was_taken = matches!(reply, Reply::Take | Reply::TakeAndFail);
        self.seen.lock().expect("no panic").push(Seen { at: Instant::now(), was_taken, headers, request });
        reply
    }
}

fn partial(reason: &str) -> ExportLogsServiceResponse {
    let partial = ExportLogsPartialSuccess { rejected_log_records: 1, error_message: reason.into() };
    ExportLogsServiceResponse { partial_success: Some(partial) }
}

#[tonic::async_trait]
impl LogsService for Desk {
    async fn export(
        &self,
        request: tonic::Request<ExportLogsServiceRequest>,
    ) -> Result<tonic::Response<ExportLogsServiceResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        match self.take(metadata.into_headers(), request) {
            Reply::Take => Ok(tonic::Response::new(ExportLogsServiceResponse::default())),
            Reply::Partial(reason) => Ok(tonic::Response::new(partial(reason))),
            Reply::TakeAndFail | Reply::Later(None) => Err(Status::unavailable("not now")),
            Reply::Later(Some(seconds)) => {
                let details = ErrorDetails::with_retry_info(Some(Duration::from_secs(seconds)));
                Err(Status::with_error_details(Code::ResourceExhausted, "too many", details))
            }
            Reply::Invalid => Err(Status::invalid_argument("no such field")),
            Reply::Garbage => {
                let mut headers = HeaderMap::new();
                headers.insert("grpc-status-details-bin", HeaderValue::from_static("***"));
                let metadata = tonic::metadata::MetadataMap::from_headers(headers);
                Err(Status::with_metadata(Code::Unavailable, "odd", metadata))
            }
        }
    }
}

async fn take_post(State(desk): State<Desk>, headers: HeaderMap, body: Bytes) -> Response {
    assert_eq!(headers[header::CONTENT_TYPE], PROTOBUF);
    let request = ExportLogsServiceRequest::decode(body).expect("protobuf");
    let protobuf =
        |status: StatusCode, body: Vec<u8>| (status, [(header::CONTENT_TYPE, PROTOBUF)], body).into_response();
    match desk.take(headers, request) {
        Reply::Take => protobuf(StatusCode::OK, Vec::new()),
        Reply::Partial(reason) => protobuf(StatusCode::OK, partial(reason).encode_to_vec()),
        Reply::TakeAndFail | Reply::Later(None) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Reply::Later(Some(seconds)) => {
            (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, seconds.to_string())]).into_response()
        }
        Reply::Invalid => {
            let status = tonic_types::pb::Status { message: "no such field".into(), ..Default::default() };
            protobuf(StatusCode::BAD_REQUEST, status.encode_to_vec())
        }
        Reply::Garbage => protobuf(StatusCode::BAD_GATEWAY, b"\xff\xff".to_vec()),
    }
}

/// A receiver on loopback; it ends with this.
pub struct Receiver {
    protocol: OtlpProtocol,
    tls: Option<ServerTlsConfig>,
    address: SocketAddr,
    desk: Desk,
    runtime: Option<Runtime>,
}

impl Receiver {
    pub fn start(protocol: OtlpProtocol, tls: Option<ServerTlsConfig>) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut receiver = Self { protocol, tls, address, desk: Desk::default(), runtime: None };
        receiver.begin();
        receiver
    }

    /// Listens, again at the same port.
    pub fn begin(&mut self) {
        let builder = &mut tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().expect("a runtime");
        let (address, desk, tls) = (self.address, self.desk.clone(), self.tls.clone());
        // Tests have a runtime of their own, in which nothing may block.
        let listener = std::net::TcpListener::bind(address).expect("a port");
        listener.set_nonblocking(true).expect("set");
        self.address = listener.local_addr().expect("it is bound");
        let listener = {
            let _entered = runtime.enter();
            TcpListener::from_std(listener).expect("a listener")
        };
        match self.protocol {
            OtlpProtocol::Grpc => drop(runtime.spawn(async move {
                let mut server = Server::builder();
                if let Some(tls) = tls {
                    server = server.tls_config(tls).expect("a good configuration");
                }
                let server = server.add_service(LogsServiceServer::new(desk));
                server.serve_with_incoming(TcpIncoming::from(listener)).await.expect("it serves");
            })),
            OtlpProtocol::Http => drop(runtime.spawn(async move {
                let router = Router::new().route("/v1/logs", post(take_post)).with_state(desk);
                axum::serve(listener, router).await.expect("it serves");
            })),
        }
        self.runtime = Some(runtime);
    }

    pub fn end(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        until("nobody listens", || std::net::TcpStream::connect(self.address).is_err().then_some(()));
    }

    pub fn will(&self, replies: &[Reply]) {
        self.desk.replies.lock().expect("no panic").extend(replies.iter().cloned());
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.desk.seen.lock().expect("no panic").clone()
    }

    pub fn section(&self) -> OtlpSection {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        OtlpSection { url: format!("{scheme}://{}", self.address), protocol: self.protocol, ..OtlpSection::default() }
    }

    pub fn delivering(&self) -> Delivering {
        Delivering::to(|_| Box::new(Otlp::new(&self.section(), "prod", "server-0").expect("a good section")))
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
