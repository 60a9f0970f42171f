//! Findings as log records of OTLP, over gRPC or HTTP: <https://opentelemetry.io/docs/specs/otlp/>.
//!
//! What enters: versions of findings. What leaves: one request with one record for each. What must hold: a record that was refused is
//! not sent again; what its receiver may take later is.
//!
//! ```text
//! gRPC   opentelemetry.proto.collector.logs.v1.LogsService/Export
//! HTTP   POST <url>/v1/logs   content-type: application/x-protobuf
//! ```

mod answer;
mod record;
mod section;

use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use hyper::Uri;
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_client::LogsServiceClient;
use prost::Message as _;
use tapio_wire::program::dial;
use tapio_wire::service::Finding;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataKey, MetadataValue};
use tonic::transport::Channel;

use self::answer::{PROTOBUF, of_answer, of_response, of_status};
use self::record::{Origin, request};
pub use self::section::{OtlpProtocol, OtlpSection};
use super::config::Address;
use super::receiver::{Client, Post, USER_AGENT, away};
use super::webhook::SinkConfigError;
use super::{Delivering, Delivery, Sink, SinkError, WhenSilenced};

/// Size of an answer at the most: it holds a number and a sentence.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Sends to one receiver.
pub struct Otlp {
    section: OtlpSection,
    address: Address,
    client: Client,
    origin: Origin,
    /// What the receiver said last of a record that it took.
    warning: Mutex<Option<String>>,
}

impl Otlp {
    /// Reads the TLS files; nobody is connected to.
    ///
    /// # Errors
    /// When the address or the TLS files cannot be used.
    pub fn new(section: &OtlpSection, cluster: &str, server: &str) -> Result<Self, SinkConfigError> {
        let url = |problem| SinkConfigError::Url { key: "deliver.otlp.url", problem };
        let tls = |source| SinkConfigError::Tls { key: "deliver.otlp.tls", source };
        let address = section.address().map_err(url)?;
        let client = Client::new("deliver.otlp", section.token_file.clone(), section.tls.clone()).map_err(tls)?;
        let origin = Origin { cluster: cluster.into(), server: server.into(), page_url: section.page_url.clone() };
        Ok(Self { section: section.clone(), address, client, origin, warning: Mutex::default() })
    }

    async fn send(&self, delivery: &Delivery) -> Result<(), SinkError> {
        let request = request(delivery, &self.origin);
        let warning = match self.section.protocol {
            OtlpProtocol::Grpc => self.export(request).await?,
            OtlpProtocol::Http => self.post(request).await?,
        };
        self.note(warning);
        Ok(())
    }

    /// Logs what the receiver says of records that it took, once while it says the same.
    fn note(&self, warning: Option<String>) {
        let mut last = self.warning.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(text) = warning.as_ref().filter(|_| *last != warning) {
            tracing::warn!(sink = self.name(), warning = text, "the receiver took the finding and warns");
        }
        *last = warning;
    }

    async fn post(&self, request: ExportLogsServiceRequest) -> Result<Option<String>, SinkError> {
        let headers: Vec<(&str, &str)> =
            self.section.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let post = Post {
            path: &self.address.path,
            content_type: PROTOBUF,
            body: request.encode_to_vec().into(),
            headers: &headers,
            answer_bytes_max: ANSWER_BYTES_MAX,
        };
        of_answer(&self.client.send(&self.address, &post).await?)
    }

    async fn export(&self, request: ExportLogsServiceRequest) -> Result<Option<String>, SinkError> {
        let mut request = Request::new(request);
        for (name, value) in &self.section.headers {
            let name: MetadataKey<Ascii> = name.parse().map_err(away)?;
            request.metadata_mut().insert(name, value.parse().map_err(away)?);
        }
        if let Some(authorization) = self.client.authorization()? {
            // The error would not say more, and the token is a secret.
            let wrong = |_| away("deliver.otlp.token_file holds characters that no header can hold");
            let mut value: MetadataValue<Ascii> = authorization.parse().map_err(wrong)?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        let client = LogsServiceClient::new(self.channel().await?);
        let mut client = client.max_decoding_message_size(ANSWER_BYTES_MAX);
        // tonic 0.14 panics at a `grpc-status-details-bin` that is no base64: that must not end this thread.
        let answer = AssertUnwindSafe(client.export(request)).catch_unwind().await;
        match answer.map_err(|_| away("the receiver's answer breaks the rules of gRPC"))? {
            Ok(response) => of_response(response.into_inner()),
            Err(status) => Err(of_status(&status)),
        }
    }

    /// A channel over a connection of its own. It ends with the delivery, so files of TLS that changed are used by the next one.
    async fn channel(&self) -> Result<Channel, SinkError> {
        let address = &self.address;
        let mut stream = Some(TokioIo::new(self.client.connect(address, b"h2").await?));
        let endpoint = dial::endpoint(&address.host, address.port, address.has_tls).map_err(away)?;
        let connector = tower::service_fn(move |_: Uri| {
            let stream = stream.take();
            async move { stream.ok_or_else(|| io::Error::other("the connection ended")) }
        });
        let endpoint = endpoint.user_agent(USER_AGENT).map_err(away)?;
        endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|error| away(format_args!("{error}: does the receiver speak gRPC there?")))
    }
}

impl Sink for Otlp {
    fn name(&self) -> &str {
        "otlp"
    }

    fn timeout(&self) -> Duration {
        self.section.timeout
    }

    fn wants(&self, finding: &Finding) -> bool {
        self.section.only.names(finding)
    }

    fn takes_unknown_withdrawals(&self) -> bool {
        true
    }

    fn when_silenced(&self) -> WhenSilenced {
        WhenSilenced::Record
    }

    fn deliver<'a>(&'a self, delivery: &'a Delivery) -> Delivering<'a> {
        Box::pin(self.send(delivery))
    }
}
