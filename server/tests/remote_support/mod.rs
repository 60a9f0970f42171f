//! What the tests of the remote archive share: an archive that is uploaded, a real S3 server, and what stands in its way.

#![allow(dead_code, reason = "every test uses its part of this module")]

mod azure;
mod gate;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

pub use azure::Azure;
pub use gate::{Fault, Gate};
use tapio_server::archive::offsite::Offsite;
use tapio_server::archive::{Archive, ArchiveConfig};
use tapio_server::remote::{Names, RemoteMetrics, RemoteSection, Uploader};

use crate::archive_support::{PATIENCE, append_each, open, plain, wait_until};
use crate::whole_server::sum;

/// Events of a frame, of which a few fill a small segment.
pub const EVENTS: usize = 1000;
/// How long an end may take in a test.
pub const GRACE: Duration = Duration::from_secs(20);

/// An archive whose closed segments are uploaded.
pub struct Uploaded {
    pub archive: Archive,
    pub offsite: Arc<Offsite>,
    uploader: Option<Uploader>,
    registry: prometheus::Registry,
}

impl Uploaded {
    pub fn open(config: ArchiveConfig, section: &RemoteSection) -> Self {
        Self::of("server-0", config, section)
    }

    pub fn of(server: &str, config: ArchiveConfig, section: &RemoteSection) -> Self {
        let offsite = Arc::new(Offsite::new(section.every));
        let archive = open(ArchiveConfig { offsite: Some(Arc::clone(&offsite)), ..config });
        let registry = prometheus::Registry::new();
        archive.metrics().register(&registry).expect("registered");
        let metrics = RemoteMetrics::register(&registry).expect("registered");
        let names = Names { cluster: "test".into(), server: server.into() };
        let uploader = Uploader::start(section, &names, &archive, Arc::clone(&offsite), metrics);
        let uploader = Some(uploader.unwrap_or_else(|error| panic!("{error}")));
        Self { archive, offsite, uploader, registry }
    }

    pub fn metric(&self, name: &str) -> f64 {
        let text = prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()).expect("text");
        sum(&text, &format!("tapio_server_{name}"), &[])
    }

    /// Waits until everything closed is uploaded.
    pub fn wait_uploaded(&self) {
        wait_until("everything is uploaded", || self.offsite.backlog().segments == 0);
    }

    /// Ends the server as SIGTERM does.
    pub fn end(mut self, grace: Duration) {
        self.archive.shutdown();
        self.uploader.take().expect("it runs").stop(grace);
    }
}

/// A folder remote.
pub fn folder(dir: &Path) -> RemoteSection {
    RemoteSection { url: format!("file://{}", dir.display()), ..RemoteSection::default() }
}

/// Small segments, of which a few frames fill one.
pub fn small(dir: &Path) -> ArchiveConfig {
    ArchiveConfig { segment_bytes: 64 << 10, ..plain(dir) }
}

/// Every file below a folder, by its path there, without leftovers of interrupted writes.
pub fn objects(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(at) = open.pop() {
        for entry in std::fs::read_dir(&at).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            if entry.is_dir() {
                open.push(entry);
            } else if !entry.to_string_lossy().contains('#') {
                found.push(entry.strip_prefix(dir).expect("below").to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    found
}

/// The server's command on a remote archive, with a cache of its own.
pub fn command(cache: &Path, environment: &[(&str, String)], arguments: &[&str]) -> (Output, String) {
    let output = crate::programs::server(arguments)
        .arg("--cache")
        .arg(cache)
        .envs(environment.iter().map(|(name, value)| (*name, value.as_str())))
        .output()
        .expect("it runs");
    let text = String::from_utf8(output.stdout.clone()).expect("UTF-8");
    (output, text)
}

/// A real S3 server (moto) on loopback with one bucket, `archive`; it ends with this.
pub struct S3 {
    port: u16,
    child: Child,
}

fn program() -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target folder").join("tools");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).chain([tools.join("moto/bin")]);
    places.find_map(|place| Some(place.join("moto_server")).filter(|program| program.is_file()))
}

impl S3 {
    /// Starts one. `None` where there is none and it is not required.
    pub fn start() -> Option<Self> {
        let Some(program) = program() else {
            assert!(
                std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"),
                "no moto_server: deploy/local/install.sh s3 installs it"
            );
            eprintln!("SKIP: no moto_server");
            return None;
        };
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
        // It ends with the thread that started it, however that ends.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("moto_server starts");
        let server = Self { port, child };
        wait_until("S3 listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let head = "PUT /archive HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n";
        stream.write_all(head.as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered");
        assert!(answer.contains(" 200 "), "{answer}");
        Some(server)
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An S3 remote at a port of this machine; the keys are in a file beside.
pub fn s3(port: u16, keys: &Path) -> RemoteSection {
    let file = keys.join("credentials");
    std::fs::write(&file, "[default]\naws_access_key_id = test\naws_secret_access_key = test\n").expect("written");
    RemoteSection {
        url: "s3://archive/tapio".into(),
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        allow_http: true,
        credentials_file: Some(file),
        ..RemoteSection::default()
    }
}

/// Returns the S3 settings for the command line.
pub fn s3_environment(port: u16) -> Vec<(&'static str, String)> {
    vec![
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
        ("AWS_ALLOW_HTTP", "true".into()),
        ("AWS_ACCESS_KEY_ID", "test".into()),
        ("AWS_SECRET_ACCESS_KEY", "test".into()),
    ]
}

/// Appends frames of many events until so many segments were closed.
pub fn fill(uploaded: &Uploaded, frames: &mut crate::archive_support::Frames, segments: u64) -> u64 {
    if frames.events == 1 {
        frames.events = EVENTS;
    }
    let first = uploaded.archive.stats().segments + uploaded.metric("archive_deleted_segments_total") as u64;
    let mut appended = 0;
    while uploaded.archive.stats().segments + (uploaded.metric("archive_deleted_segments_total") as u64)
        < first + segments
    {
        append_each(&uploaded.archive, frames, 1);
        appended += 1;
    }
    appended
}
