//! `/healthz` and `/readyz` name a thread that has ended before its time.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::whole_server::{LIMIT, Whole, get};
use tapio_server::archive::ArchiveState;
use tapio_server::config::Config;
use tapio_server::correlate::{CorrelateConfig, Correlator, LossBook, LossView, Topology};
use tapio_server::findings::{Finder, FinderConfig, FindingStore, PatternSet};
use tapio_server::http::{self, Routes};
use tapio_server::vitals::{Pulse, Vitals};
use tapio_wire::service::query_client::QueryClient;
use tapio_wire::service::{ListEventsRequest, ListFindingsRequest, StatusRequest};
use tokio::sync::watch;
use tokio_stream::StreamExt;

#[tokio::test(flavor = "multi_thread")]
async fn a_panicking_thread_makes_a_healthy_server_unhealthy() {
    let whole = Whole::start(|_| {}).await;
    whole.until_metric("tapio_server_archive_ready", &[], |ready| ready == 1.0).await;
    assert_eq!(whole.get("/healthz", ""), (200, "ok\n".into()));
    assert_eq!(whole.get("/readyz", ""), (200, "ready\n".into()));
    whole.pipeline.shutdown().await.expect("it ends");

    let losses = Arc::new(LossBook::default());
    let topology = Arc::new(Topology::new(100));
    let view: Arc<dyn LossView> = Arc::clone(&losses) as Arc<dyn LossView>;
    let patterns = Arc::new(PatternSet::load(None).expect("the patterns"));
    let store = Arc::new(FindingStore::new(10));
    let finder =
        Finder::start(&FinderConfig::default(), patterns, Arc::clone(&topology), view, store).expect("started");
    let correlator = Correlator::start(&CorrelateConfig::default(), topology, losses, Arc::new(finder.bus()));
    let correlator = Arc::new(correlator.expect("started"));
    let (vitals, pulse) = (Arc::new(Vitals::default()), Pulse::default());
    vitals.watch("archive", pulse.sign());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (_ready, is_ready) = watch::channel(ArchiveState::Ready);
    let (_end, ended) = watch::channel(false);
    let metrics = Arc::new(OnceLock::new());
    tokio::spawn(http::serve(
        listener,
        metrics,
        is_ready,
        Arc::clone(&correlator),
        Arc::clone(&vitals),
        true,
        Routes::default(),
        ended,
    ));
    assert_eq!(get(address, "/healthz", "").0, 200);
    let thread = std::thread::Builder::new().name("archive".into()).spawn(move || {
        let _pulse = pulse;
        panic!("as a defect would");
    });
    assert!(thread.expect("started").join().is_err());
    for path in ["/healthz", "/readyz"] {
        let (status, body) = get(address, path, "");
        assert!(status == 503 && body.contains("ended before its time: archive"), "{path}: {status} {body}");
    }
    // Shards that take nothing any more are named as well.
    correlator.stop();
    let deadline = Instant::now() + LIMIT;
    while !get(address, "/healthz", "").1.contains("archive, correlate") {
        assert!(Instant::now() < deadline, "correlate is not named");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_a_log_names_the_others() {
    for wrong in ["", " ", "http://a", "a:b:1", "a:0", "a:99999", "a,b", ":1", "a:", "fd00::9"] {
        let mut config = Config::default();
        config.cluster.headless = Some(wrong.into());
        let error = config.validate("test").expect_err(wrong).to_string();
        assert!(error.contains("cluster.headless"), "{error}");
    }
    let whole = Whole::start(|config| config.cluster.headless = Some("192.0.2.7".into())).await;
    let other = format!("192.0.2.7:{}", whole.pipeline.grpc_address.port());
    let deadline = Instant::now() + LIMIT;
    while !whole.get("/readyz", "").1.contains(&other) {
        assert!(Instant::now() < deadline, "{:?}", whole.get("/readyz", ""));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(whole.get("/readyz", "").0, 200, "it does its work");
    let mut query = QueryClient::new(whole.channel().await);
    let status = query.status(StatusRequest::default()).await.expect("it answers").into_inner();
    let listed = query.list_findings(ListFindingsRequest::default()).await.expect("it answers").into_inner();
    let events = query.list_events(ListEventsRequest::default()).await.expect("it answers").into_inner();
    let last = events.collect::<Vec<_>>().await.pop().expect("a last one").expect("no error");
    for incomplete in [&status.incomplete, &listed.incomplete, &last.incomplete] {
        assert_eq!(incomplete.len(), 1, "{incomplete:?}");
        assert_eq!(incomplete[0].server, other);
        assert!(incomplete[0].reason.contains("set cluster.url"), "{incomplete:?}");
    }
}
