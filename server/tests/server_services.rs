//! The whole server: what its gRPC side offers besides its own services.

use tapio_server::config::Config;
use tapio_server::pipeline::Pipeline;
use tapio_wire::service::ListEventsRequest;
use tapio_wire::service::query_client::QueryClient;
use tokio_stream::StreamExt;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_reflection_and_events_are_served() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = Config::default();
    config.server.address = [127, 0, 0, 1].into();
    config.server.port = 0;
    config.metrics.prometheus_port = 0;
    config.archive.dir = dir.path().to_owned();
    let pipeline = Pipeline::start(&config).await.expect("the server starts");
    let url = format!("http://{}", pipeline.grpc_address);
    let channel = Channel::from_shared(url).expect("a URL").connect().await.expect("it listens");

    let mut health = HealthClient::new(channel.clone());
    for service in ["", "tapio.v1.Ingest", "tapio.v1.Query"] {
        // A task of its own reports the states, so the answer may take a moment: watch, do not ask once.
        let watched = health.watch(HealthCheckRequest { service: service.into() }).await.expect("it is watched");
        let mut states = watched.into_inner();
        loop {
            let state = states.next().await.expect("the stream goes on").expect("no error");
            if state.status == i32::from(ServingStatus::Serving) {
                break;
            }
        }
    }

    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices("*".into())),
    };
    let mut reflection = ServerReflectionClient::new(channel.clone());
    let answer = reflection.server_reflection_info(tokio_stream::once(request)).await.expect("it is served");
    let first = answer.into_inner().next().await.expect("one answer").expect("no error");
    let Some(MessageResponse::ListServicesResponse(services)) = first.message_response else {
        panic!("{first:?}");
    };
    let names: Vec<_> = services.service.into_iter().map(|service| service.name).collect();
    for service in ["tapio.v1.Ingest", "tapio.v1.Query", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|name| name == service), "{service} of {names:?}");
    }

    let mut query = QueryClient::new(channel);
    let mut events = query.list_events(ListEventsRequest::default()).await.expect("it is served").into_inner();
    assert!(events.message().await.expect("no error").is_none(), "nothing was archived yet");
    let request = ListEventsRequest { kinds: vec!["nonsense".into()], ..ListEventsRequest::default() };
    let refused = query.list_events(request).await.expect_err("there is no such kind");
    assert!(refused.message().contains("the kinds are"), "{refused}");
    drop((query, health, reflection));
    pipeline.shutdown().await.expect("it ends well");
}
