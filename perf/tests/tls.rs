//! TLS on the way from collector to server: who is let in, and certificates that change under running streams.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::lab::{FedNode, metric};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tapio_perf::clock::wait_for;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions, http};

const LIMIT: Duration = Duration::from_secs(20);

/// A CA and the files that it signed.
struct Authority {
    folder: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let ca = params.self_signed(&key).expect("a certificate");
        fs::write(folder.path().join("ca.pem"), ca.pem()).expect("written");
        Self { folder, issuer: Issuer::new(params, key) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes `NAME.pem` and `NAME.key`, valid until the end of a year.
    fn sign(&self, name: &str, until: i32) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec!["tapio-server".into()]).expect("a name");
        params.not_after = rcgen::date_time_ymd(until, 12, 31);
        let cert = params.signed_by(&key, &self.issuer).expect("signed");
        // Certificate and key change one after the other, as files do.
        fs::write(self.path(&format!("{name}.pem")), cert.pem()).expect("written");
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).expect("written");
    }
}

fn server_options(authority: &Authority, folder: &Path) -> ServerOptions {
    let dir = authority.folder.path().display();
    fs::write(folder.join("token"), "secret\n").expect("written");
    ServerOptions {
        extra_server: format!(
            ", tls_enabled: true, tls: {{cert: {dir}/server.pem, key: {dir}/server.key, client_ca: {dir}/ca.pem}}, \
             auth: {{token_file: {}/token}}",
            folder.display()
        ),
        ..ServerOptions::default()
    }
}

fn collector_options(server: &Server, authority: &Authority, token: &Path) -> CollectorOptions {
    let dir = authority.folder.path().display();
    CollectorOptions {
        node: "tls".into(),
        server: server.address(),
        extra_grpc: format!(
            ", tls_enabled: true, token_file: {}, tls: {{ca: {dir}/ca.pem, cert: {dir}/client.pem, key: {dir}/client.key, \
             server_name: tapio-server}}",
            token.display()
        ),
        ..CollectorOptions::default()
    }
}

fn wait_for_metric(what: &str, port: u16, name: &str, wanted: impl Fn(f64) -> bool) {
    wait_for(what, LIMIT, |seen| {
        let value = metric(port, name);
        *seen = format!("{name} is {value}");
        Ok(wanted(value).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn certificates_change_under_a_stream() {
    let _turn = crate::lab::beside();
    let authority = Authority::new();
    authority.sign("server", 2090);
    authority.sign("client", 2090);
    let folder = tempfile::tempdir().expect("a folder");
    let token = folder.path().join("token");
    let server = Server::start(&server_options(&authority, folder.path())).unwrap_or_else(|error| panic!("{error}"));
    let collector = Collector::start(&collector_options(&server, &authority, &token));
    let collector = collector.unwrap_or_else(|error| panic!("{error}\n{}", server.output()));
    let (port, streams) = (collector.port(), "tapio_collector_streams_total");
    let acked = "tapio_collector_events_shipped_total";
    let mut node = FedNode::feed(collector, 1_000.0);
    wait_for_metric("events", port, acked, |events| events > 0.0);

    // A new pair; half of it; an expired one: the stream stays up all the time.
    let (stale, expires) = ("tapio_server_tls_stale", "tapio_server_tls_expires_timestamp_seconds");
    let before = metric(server.http_port(), expires);
    authority.sign("server", 2091);
    wait_for_metric("the new pair", server.http_port(), expires, |at| at > before);
    fs::write(authority.path("server.pem"), "-----BEGIN CERTIFICATE-----\nMIIB").expect("written");
    wait_for_metric("the half pair to be noticed", server.http_port(), stale, |stale| stale == 1.0);
    authority.sign("server", 2020);
    let shipped = metric(port, acked);
    wait_for_metric("events", port, acked, |events| events > shipped);
    assert_eq!(metric(port, streams), 1.0, "{}", node.collector.output());
    assert!(metric(server.http_port(), expires) > before, "the last good pair is kept");

    // A peer that is slow in its handshake, and others who may not come in.
    let _slow = TcpStream::connect(server.address()).expect("it listens");
    for (what, options) in [
        (
            "without TLS",
            CollectorOptions { extra_grpc: String::new(), ..collector_options(&server, &authority, &token) },
        ),
        ("of another CA", {
            let other = Authority::new();
            other.sign("client", 2090);
            fs::copy(authority.path("ca.pem"), other.path("ca.pem")).expect("copied");
            let options = collector_options(&server, &other, &token);
            // Its files are read at the start and kept from then on.
            std::mem::forget(other);
            options
        }),
        ("with another token", {
            let wrong = folder.path().join("wrong");
            fs::write(&wrong, "guess").expect("written");
            collector_options(&server, &authority, &wrong)
        }),
    ] {
        let mut stranger =
            Collector::prepare(&CollectorOptions { node: "stranger".into(), ..options }).expect("prepared");
        stranger.spawn().expect("spawned");
        wait_for("the refusal", LIMIT, |seen| {
            *seen = stranger.output();
            Ok(seen.contains("cannot stream to the server").then_some(()))
        })
        .unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(metric(stranger.port(), "tapio_collector_connected"), 0.0, "{what}: {}", stranger.output());
        stranger.kill();
    }
    let emitted = node.stop_feeding();
    let status = node.collector.stop().expect("it ends").expect("it ran");
    assert!(status.success(), "{emitted}: {}", node.collector.output());
    assert_eq!(metric(server.http_port(), "tapio_ledger_unexplained_events"), 0.0);
}

#[test]
fn a_refused_collector_retries_rarely_and_ends_at_once() {
    let _turn = crate::lab::beside();
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    authority.sign("server", 2090);
    authority.sign("client", 2090);
    let server = Server::start(&server_options(&authority, folder.path())).unwrap_or_else(|error| panic!("{error}"));
    let wrong = folder.path().join("wrong");
    fs::write(&wrong, "guess").expect("written");
    let mut stranger = Collector::prepare(&collector_options(&server, &authority, &wrong)).expect("prepared");
    stranger.spawn().expect("spawned");
    let failures = "tapio_collector_stream_failures_total";
    wait_for("three refusals", LIMIT, |seen| {
        let Ok((200, text)) = http::get(stranger.port(), "/metrics") else { return Ok(None) };
        let refused = text.lines().find(|line| line.starts_with(failures) && line.contains("\"refused\""));
        *seen = refused.unwrap_or_default().to_owned();
        Ok(refused.is_some_and(|line| line.ends_with(" 3")).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", stranger.output()));
    let (status, ready) = http::get(stranger.port(), "/readyz").expect("it answers");
    assert!(status == 503 && ready.contains("the server refuses this collector"), "{status} {ready}");
    // After the third refusal in a row it waits for 8 s, give or take half of it.
    let third = Instant::now();
    while third.elapsed() < Duration::from_millis(1500) {
        assert_eq!(metric(stranger.port(), failures), 3.0, "{}", stranger.output());
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = stranger.output();
    assert_eq!(output.matches("refuses this collector").count(), 1, "said once: {output}");
    assert!(output.contains("grpc.token_file"), "and what to look at: {output}");
    let asked = Instant::now();
    let process = stranger.process().expect("it runs");
    process.signal(rustix::process::Signal::TERM);
    process.wait(Duration::from_secs(2)).expect("it ends within two seconds");
    println!("three refusals, then silence; it ended {:?} after SIGTERM", asked.elapsed());
}

/// A restart by kubelet would open the stream again, which the configuration forbids.
#[test]
fn a_collector_without_a_server_is_unready_and_healthy() {
    let _turn = crate::lab::beside();
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::new();
    authority.sign("server", 2090);
    authority.sign("client", 2090);
    let server = Server::start(&server_options(&authority, folder.path())).unwrap_or_else(|error| panic!("{error}"));
    let mut options = collector_options(&server, &authority, &folder.path().join("token"));
    options.extra_grpc.push_str(", reconnect_enabled: false");
    let collector = Collector::start(&options).unwrap_or_else(|error| panic!("{error}\n{}", server.output()));
    assert_eq!(http::get(collector.port(), "/healthz").expect("it answers"), (200, "ok\n".into()));
    drop(server);
    wait_for("the shipper to end", LIMIT, |seen| {
        *seen = collector.output();
        Ok(seen.contains("grpc.reconnect_enabled is false: nothing more is sent").then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let (status, ready) = http::get(collector.port(), "/readyz").expect("it answers");
    assert!(status == 503 && ready.contains("\"connected\":false"), "{status} {ready}");
    // The log line comes before the task's end: what it leaves behind is asked for until it must have ended.
    let said = Instant::now();
    while said.elapsed() < Duration::from_millis(500) {
        assert_eq!(http::get(collector.port(), "/healthz").expect("it answers"), (200, "ok\n".into()));
    }
}
