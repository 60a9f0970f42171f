//! The remote archive: what is closed is uploaded, and a folder or a real S3 server gives back the same.

use std::path::Path;
use std::time::Duration;

use crate::archive_support::*;
use crate::remote_support::*;
use serde_json::Value;
use tapio_server::archive::ArchiveConfig;
use tapio_server::remote::RemoteSection;

fn copied(cache: &Path, environment: &[(&str, String)], url: &str, to: &Path) {
    let (output, text) = command(cache, environment, &["archive", "copy", url, to.to_str().expect("UTF-8")]);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

/// The names and bytes of the segments in a directory.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let name = |path: &Path| path.file_name().expect("a name").to_string_lossy().into_owned();
    segments(dir).iter().map(|path| (name(path), std::fs::read(path).expect("readable"))).collect()
}

/// Uploads, ends, and reads all of it back by every command.
fn there_and_back(section: &RemoteSection, environment: &[(&str, String)]) {
    let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let uploaded = Uploaded::open(small(dir.path()), section);
    let mut frames = Frames::new("node-1", 1);
    let frames_sent = fill(&uploaded, &mut frames, 3);
    frames.events = 2;
    uploaded.wait_uploaded();
    assert_eq!(uploaded.metric("remote_uploaded_segments_total"), 3.0);
    // The open segment goes at the end.
    append_each(&uploaded.archive, &mut frames, 2);
    uploaded.end(GRACE);

    let url = section.url.as_str();
    let (output, text) = command(cache.path(), environment, &["archive", "verify", url]);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.starts_with("archive test/server-0/") && text.contains("4 segments, 4 of them indexed"), "{text}");
    let (_, text) = command(cache.path(), environment, &["archive", "stat", "--json", url]);
    let stat: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(stat["frames"], frames_sent + 2, "{text}");
    assert!(stat["archive"].as_str().expect("a name").starts_with("test/server-0/"), "{text}");
    // By now everything is here.
    let (output, text) = command(cache.path(), environment, &["archive", "cat", "--limit", "5", "--json", url]);
    assert_eq!(text.lines().count(), 5, "{text}");
    assert!(String::from_utf8_lossy(&output.stderr).contains(": 0 B of it fetched now"), "{output:?}");
    let (output, _) = command(cache.path(), environment, &["replay", url]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains(&format!("{} frames", frames_sent + 2)), "{said}");
    let to = cache.path().join("copy");
    copied(cache.path(), environment, url, &to);
    assert_eq!(contents(&to), contents(dir.path()), "bytes for bytes");
    // A server starts from it.
    let (archive, replayed) = open_and_replay(small(&to), ALL);
    assert_eq!(replayed.len() as u64, frames_sent + 2);
    archive.shutdown();
}

#[test]
fn segments_come_back_from_a_folder_byte_for_byte() {
    let remote = tempfile::tempdir().unwrap();
    there_and_back(&folder(remote.path()), &[]);
    let names = objects(remote.path());
    assert_eq!(names.len(), 8, "{names:?}");
    for pair in names.chunks(2) {
        let (segment, manifest) = (pair[0].rsplit_once('/').unwrap().1, pair[1].rsplit_once('/').unwrap().1);
        assert!(segment.ends_with(".segment") && manifest.ends_with(".json") && segment[..20] == manifest[..20]);
        let text = std::fs::read_to_string(remote.path().join(&pair[1])).expect("readable");
        let manifest: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(manifest["object"], segment);
        assert_eq!((&manifest["cluster"], &manifest["server"]), (&"test".into(), &"server-0".into()));
        assert_eq!(manifest["nodes"][0]["name"], "node-1");
        assert_eq!(manifest["nodes"][0]["events"], manifest["events"]);
    }
}

#[test]
fn segments_come_back_from_s3_byte_for_byte() {
    let Some(server) = S3::start() else { return };
    let keys = tempfile::tempdir().unwrap();
    there_and_back(&s3(server.port(), keys.path()), &s3_environment(server.port()));
}

#[test]
fn a_large_segment_is_uploaded_in_parts_within_its_rate() {
    let Some(server) = S3::start() else { return };
    let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let section = RemoteSection { max_bytes_per_sec: 16 << 20, ..s3(server.port(), cache.path()) };
    let config = ArchiveConfig { segment_bytes: 24 << 20, ..plain(dir.path()) };
    let uploaded = Uploaded::open(config, &section);
    let mut frames = Frames::new("node-1", 1);
    frames.events = 20 * EVENTS;
    let started = std::time::Instant::now();
    fill(&uploaded, &mut frames, 1);
    uploaded.wait_uploaded();
    uploaded.end(GRACE);
    let bytes: usize = contents(dir.path()).iter().map(|(_, bytes)| bytes.len()).sum();
    let least = Duration::from_secs_f64(bytes as f64 / f64::from(16 << 20)) - Duration::from_millis(500);
    assert!(bytes > 20 << 20 && started.elapsed() >= least, "{bytes} bytes in {:?}", started.elapsed());
    let to = cache.path().join("copy");
    copied(cache.path(), &s3_environment(server.port()), &section.url, &to);
    assert_eq!(contents(&to), contents(dir.path()));
}

#[test]
fn an_idle_open_segment_is_closed_and_uploaded() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let section = RemoteSection { every: Duration::from_secs(1), ..folder(remote.path()) };
    let uploaded = Uploaded::open(small(dir.path()), &section);
    // What holds nothing stays open.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(objects(remote.path()).len(), 0);
    append_each(&uploaded.archive, &mut Frames::new("node-1", 1), 1);
    wait_until("it is uploaded", || objects(remote.path()).len() == 2);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!((objects(remote.path()).len(), segments(dir.path()).len()), (2, 2));
    uploaded.end(GRACE);
}

#[test]
fn a_restart_resumes_and_uploads_nothing_twice() {
    let (dir, remote) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let section = folder(remote.path());
    let mut frames = Frames::new("node-1", 1);
    let uploaded = Uploaded::open(small(dir.path()), &section);
    fill(&uploaded, &mut frames, 2);
    uploaded.wait_uploaded();
    uploaded.end(GRACE);
    let names = objects(remote.path());
    // An upload that was interrupted before its manifest.
    let manifest = names.iter().rfind(|name| name.ends_with(".json")).expect("one");
    std::fs::remove_file(remote.path().join(manifest)).expect("removed");
    let uploaded = Uploaded::open(small(dir.path()), &section);
    fill(&uploaded, &mut frames, 1);
    uploaded.wait_uploaded();
    let all = objects(remote.path());
    assert!(names.iter().all(|name| all.contains(name)), "{names:?} {all:?}");
    assert_eq!(all.len() % 2, 0, "{all:?}");
    let manifests = |names: &[String]| names.iter().filter(|name| name.ends_with(".json")).count();
    let fresh = uploaded.metric("remote_uploaded_segments_total") as usize;
    assert_eq!(fresh, manifests(&all) - (manifests(&names) - 1), "{names:?} {all:?}");
    uploaded.end(GRACE);
}

#[test]
fn servers_that_share_a_remote_never_overwrite_other_contents() {
    let (dir, remote, cache) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let section = folder(remote.path());
    let dirs = ["a", "b", "c"].map(|name| dir.path().join(name));
    let mut all = 0;
    for (number, dir) in dirs.iter().enumerate() {
        std::fs::create_dir(dir).expect("made");
        if number == 2 {
            // A disk that was set back to what another server had: its name, its life, and its numbers again.
            std::fs::copy(dirs[1].join("remote.life"), dir.join("remote.life")).expect("copied");
        }
        let uploaded = Uploaded::of(["one", "two", "two"][number], small(dir), &section);
        let mut frames = Frames::new(["node-1", "node-2", "node-3"][number], 1);
        all += fill(&uploaded, &mut frames, 2);
        uploaded.wait_uploaded();
        assert_eq!(uploaded.metric("remote_collisions_total"), if number == 2 { 1.0 } else { 0.0 });
        uploaded.end(GRACE);
    }
    let url = section.url.as_str();
    let (output, text) = command(cache.path(), &[], &["archive", "verify", url]);
    assert!(output.status.success(), "{text}");
    assert_eq!(text.matches("archive test/one/").count(), 1, "{text}");
    assert_eq!(text.matches("archive test/two/").count(), 2, "{text}");
    // One below it is that server's alone.
    let (_, text) = command(cache.path(), &[], &["archive", "verify", &format!("{url}/test/one")]);
    assert_eq!(text.matches("archive test/").count(), 1, "{text}");
    // Read together, each frame counts once and in order of time.
    let (output, text) = command(cache.path(), &[], &["archive", "cat", "--json", url]);
    assert!(output.status.success());
    assert_eq!(text.lines().count() as u64, all * EVENTS as u64);
    let to = cache.path().join("copies");
    copied(cache.path(), &[], url, &to);
    assert_eq!(std::fs::read_dir(&to).expect("there").count(), 3);
}

#[test]
fn retention_waits_for_uploads_and_counts_forced_deletions() {
    let (dir, remote, cache) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let section = RemoteSection { every: Duration::from_secs(3600), ..folder(&remote.path().join("mount")) };
    let config = ArchiveConfig { max_bytes: 1 << 20, max_age: Duration::from_secs(1), ..small(dir.path()) };
    let uploaded = Uploaded::open(config, &section);
    let mut frames = Frames::new("node-1", 1);
    fill(&uploaded, &mut frames, 3);
    // Older than max_age, and not there yet.
    std::thread::sleep(Duration::from_millis(2500));
    assert!(segments(dir.path()).len() >= 4);
    assert!(uploaded.metric("remote_failures_total") >= 1.0, "the folder is not there");
    assert_eq!(uploaded.metric("archive_deleted_segments_total"), 0.0);
    fill(&uploaded, &mut frames, 20);
    let lost = uploaded.metric("archive_unuploaded_segments_total");
    assert!(lost >= 3.0 && lost == uploaded.metric("archive_deleted_segments_total"), "{lost}");
    let events = uploaded.metric("archive_unuploaded_events_total");
    assert!(events >= lost * EVENTS as f64 && events % EVENTS as f64 == 0.0, "{events}");
    std::fs::create_dir(remote.path().join("mount")).expect("made");
    uploaded.wait_uploaded();
    // What is safe goes by its age.
    wait_until("it is deleted", || {
        append_each(&uploaded.archive, &mut frames, 1);
        uploaded.metric("archive_deleted_segments_total") > lost
    });
    assert_eq!(uploaded.metric("archive_unuploaded_segments_total"), lost);
    uploaded.end(GRACE);
    // The remote archive begins behind what was lost, and is whole from there.
    let (output, text) = command(cache.path(), &[], &["archive", "verify", &section.url]);
    assert!(output.status.success(), "{text}");
}
