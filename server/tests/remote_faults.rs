//! An object store that fails in every way that they do: nothing is lost, nothing half is taken for whole.

use std::path::Path;
use std::time::Duration;

use crate::archive_support::*;
use crate::remote_support::*;

/// Uploads through a gate with a fault, until the fault is over; then everything is there.
fn survives(fault: Fault, server: &S3) {
    let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let gate = Gate::start(server.port(), fault);
    let name = format!("{fault:?}").to_lowercase().replace(|letter: char| !letter.is_ascii_alphanumeric(), "");
    let uploaded = Uploaded::of(&name, small(dir.path()), &s3(gate.port, cache.path()));
    let mut frames = Frames::new("node-1", 1);
    // Acknowledgements do not wait for any of it.
    let sent = fill(&uploaded, &mut frames, 3);
    wait_until("the fault was met", || gate.met() >= 1);
    if !matches!(fault, Fault::Slow(_)) {
        wait_until("an attempt failed", || uploaded.metric("remote_failures_total") >= 1.0);
        assert!(uploaded.offsite.backlog().segments > 0);
    }
    gate.set(Fault::None);
    uploaded.wait_uploaded();
    uploaded.end(GRACE);
    is_whole(cache.path(), server, &name, sent);
}

fn is_whole(cache: &Path, server: &S3, name: &str, frames: u64) {
    let url = format!("s3://archive/tapio/test/{name}");
    let (output, text) = command(cache, &s3_environment(server.port()), &["archive", "verify", &url]);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains(&format!("{frames} frames")), "{text}");
}

#[test]
fn a_store_that_recovers_gets_every_segment() {
    let Some(server) = S3::start() else { return };
    let slow = Fault::Slow(Duration::from_millis(20));
    for fault in [Fault::Unreachable, Fault::Broken, Fault::Full, Fault::Half(20_000), slow] {
        survives(fault, &server);
    }
}

#[test]
fn an_end_without_the_store_is_bounded_and_uploads_resume() {
    let (dir, remote, cache) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let section = folder(&remote.path().join("mount"));
    let uploaded = Uploaded::open(small(dir.path()), &section);
    let mut frames = Frames::new("node-1", 1);
    let sent = fill(&uploaded, &mut frames, 3);
    let started = std::time::Instant::now();
    uploaded.end(Duration::from_secs(1));
    assert!((1.0..3.0).contains(&started.elapsed().as_secs_f64()), "{:?}", started.elapsed());
    std::fs::create_dir(remote.path().join("mount")).expect("made");
    let uploaded = Uploaded::open(small(dir.path()), &section);
    uploaded.wait_uploaded();
    uploaded.end(GRACE);
    let (output, text) = command(cache.path(), &[], &["archive", "verify", &section.url]);
    assert!(output.status.success() && text.contains(&format!("{sent} frames")), "{text}");
}

#[test]
fn a_truncated_or_foreign_object_is_reported_and_not_read() {
    let (dir, remote, cache) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let section = folder(remote.path());
    let uploaded = Uploaded::open(small(dir.path()), &section);
    fill(&uploaded, &mut Frames::new("node-1", 1), 3);
    uploaded.wait_uploaded();
    uploaded.end(GRACE);
    let names: Vec<_> = objects(remote.path()).into_iter().filter(|name| name.ends_with(".segment")).collect();
    let path = remote.path().join(&names[1]);
    let bytes = std::fs::read(&path).expect("readable");
    let verify = |what: &str| {
        let (output, _) = command(cache.path(), &[], &["archive", "verify", &section.url]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && said.contains(what), "{said}");
    };
    std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("written");
    verify("its manifest names");
    let mut other = bytes.clone();
    other[bytes.len() / 2] ^= 1;
    std::fs::write(&path, &other).expect("written");
    verify("another checksum");
    std::fs::write(&path, &bytes).expect("written");
    let (output, text) = command(cache.path(), &[], &["archive", "verify", &section.url]);
    assert!(output.status.success(), "{text}");
}
