//! The gRPC port.

use std::sync::Arc;

use tapio_wire::program::tls::{ServerFiles, Watched};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::{PipelineError, ToShards};
use crate::archive::ArchiveState;
use crate::auth::{Auth, GateLayer};
use crate::ingest::{self, IngestService};
use crate::query::{QueryService, SilencesService};
use crate::tls::{self, AcceptMetrics, TlsMetrics};
use crate::vitals::{Pulse, Vitals};
use tapio_wire::service::query_server::QueryServer;
use tapio_wire::service::silences_server::SilencesServer;

const INGEST_SERVICE: &str = "tapio.v1.Ingest";
const QUERY_SERVICE: &str = "tapio.v1.Query";
/// Connections beyond a quarter more than there may be streams: operators' tools, and collectors that are changing over.
const CONNECTIONS_EXTRA: usize = 256;

/// What answers at the port.
pub(super) struct Grpc {
    pub listener: TcpListener,
    pub tls: Option<Arc<Watched<ServerFiles>>>,
    pub auth: Arc<Auth>,
    pub streams_max: u32,
    pub metrics: (TlsMetrics, AcceptMetrics),
}

impl Grpc {
    /// Serves until `ended`. What the archive says of itself goes to `readiness`, and to those who ask for the server's health.
    pub fn serve(
        self,
        ingest: &IngestService<ToShards>,
        (query, silences): (QueryServer<QueryService>, SilencesServer<SilencesService>),
        archive: watch::Receiver<ArchiveState>,
        readiness: watch::Sender<ArchiveState>,
        vitals: &Vitals,
        ended: watch::Receiver<bool>,
    ) -> Result<JoinHandle<Result<(), tonic::transport::Error>>, PipelineError> {
        let (health_reporter, health) = tonic_health::server::health_reporter();
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tapio_wire::service::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        tokio::spawn(report_health(health_reporter, archive, readiness));
        let grpc = ingest::settings(Server::builder(), self.streams_max)
            .layer(GateLayer(self.auth))
            .add_service(ingest.server())
            .add_service(query)
            .add_service(silences)
            .add_service(health)
            .add_service(reflection);
        let connections_max = self.streams_max as usize * 5 / 4 + CONNECTIONS_EXTRA;
        let mut grpc_ended = ended.clone();
        let grpc_end = async move {
            // An error means that the other side is gone, which is an end too.
            let _ = grpc_ended.wait_for(|end| *end).await;
        };
        let pulse = Pulse::default();
        vitals.watch("grpc", pulse.sign());
        let (tls_metrics, accepts) = self.metrics;
        Ok(match self.tls {
            Some(tls) => {
                let incoming = tls::incoming(self.listener, tls, tls_metrics, accepts, connections_max, ended);
                let served = grpc.serve_with_incoming_shutdown(incoming, grpc_end);
                tokio::spawn(with_pulse(pulse, served))
            }
            None => {
                let incoming = tls::incoming_plain(self.listener, accepts, connections_max, ended);
                let served = grpc.serve_with_incoming_shutdown(incoming, grpc_end);
                tokio::spawn(with_pulse(pulse, served))
            }
        })
    }
}

/// Ends with the archive, which drops the sender.
async fn report_health(
    reporter: HealthReporter,
    mut archive: watch::Receiver<ArchiveState>,
    readiness: watch::Sender<ArchiveState>,
) {
    loop {
        let state = archive.borrow_and_update().clone();
        let serving = match state {
            ArchiveState::Ready => ServingStatus::Serving,
            ArchiveState::NotReady(_) => ServingStatus::NotServing,
        };
        // "" speaks for the whole server; collectors and operators' tools may ask for their own service.
        for service in ["", INGEST_SERVICE] {
            reporter.set_service_status(service, serving).await;
        }
        reporter.set_service_status(QUERY_SERVICE, ServingStatus::Serving).await;
        readiness.send_replace(state);
        if archive.changed().await.is_err() {
            return;
        }
    }
}

async fn with_pulse<T>(pulse: Pulse, work: impl Future<Output = T>) -> T {
    let outcome = work.await;
    drop(pulse);
    outcome
}
