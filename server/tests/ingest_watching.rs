//! What a collector does not watch is part of the server's status.

use tapio_wire::service::query_client::QueryClient;
use tapio_wire::service::{ShipRequest, SourceOff, StatusRequest, Watching, ship_request, ship_response};
use tonic::transport::Channel;

use crate::whole_server::{LIMIT, Stream, Whole, hello};

async fn until_off(query: &mut QueryClient<Channel>, is_it: impl Fn(&[SourceOff]) -> bool) {
    let deadline = std::time::Instant::now() + LIMIT;
    loop {
        let status = query.status(StatusRequest::default()).await.expect("a status").into_inner();
        let off: Vec<SourceOff> = status.nodes.into_iter().flat_map(|node| node.off).collect();
        if is_it(&off) {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "it stays {off:?}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

async fn send(stream: &Stream, reason: &str, count: usize) {
    let one = SourceOff { source: "k8s".into(), reason: reason.into() };
    let watching = ship_request::Kind::Watching(Watching { off: vec![one; count] });
    stream.requests.send(ShipRequest { kind: Some(watching) }).await.expect("it is connected");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unwatched_sources_are_known_until_the_collectors_stream_ends() {
    let server = Whole::start(|_| {}).await;
    let channel = server.channel().await;
    let mut query = QueryClient::new(channel.clone());
    let mut stream = Stream::open(channel.clone(), "", hello("node-1", 1)).await.expect("it is taken");
    let welcome = stream.response().await.expect("a response");
    assert!(matches!(welcome, ship_response::Kind::Welcome(welcome) if welcome.takes_watching));
    send(&stream, "no cluster", 1).await;
    until_off(&mut query, |off| matches!(off, [one] if one.source == "k8s" && one.reason == "no cluster")).await;
    // What nobody could read is cut.
    send(&stream, &"\u{fc}".repeat(1_000), 100).await;
    until_off(&mut query, |off| off.len() == 16 && off.iter().all(|off| off.reason.len() == 512)).await;
    send(&stream, "", 0).await;
    until_off(&mut query, |off| off.is_empty()).await;
    send(&stream, "no cluster", 1).await;
    until_off(&mut query, |off| off.len() == 1).await;
    // A later stream, perhaps of an older collector, has not reported anything.
    let later = Stream::open(channel, "", hello("node-1", 2)).await.expect("it is taken");
    until_off(&mut query, |off| off.is_empty()).await;
    drop((later, stream, query));
    server.pipeline.shutdown().await.expect("it ends well");
}
