//! A spool that is damaged on the disk: what is whole arrives, the rest is counted exactly, and nobody restarts anything.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::lab::{self, FedNode};
use crate::spool::{LIMIT, MIB, on_disk, options, start, wait_for_spool};
use tapio_perf::clock::wait_for;
use tapio_perf::load::ledger::{NodeLedger, SOURCE};
use tapio_perf::processes::{Server, ServerOptions, http};
use tapio_wire::event::{ArchivedDetail, Source};
use tapio_wire::frame::Header;
use tapio_wire::segment::{Found, RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, find_record, parse_segment_header};

/// Size of the spool; its segments are a quarter of it.
const SPOOL_BYTES: u64 = 48 * MIB;
const EVENTS_PER_SECOND: f64 = 60_000.0;

fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(dir).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "spool"));
    paths.sort();
    paths
}

/// Where each frame of a segment begins, and its header.
fn frames(path: &Path) -> Vec<(usize, Header)> {
    let bytes = fs::read(path).expect("readable");
    let number = parse_segment_header(&bytes).expect("a segment");
    let mut frames = Vec::new();
    let mut offset = SEGMENT_HEADER_BYTES;
    while let Some(rest) = bytes.get(offset..)
        && let Found::Record { bytes: frame, size, .. } = find_record(rest, number, offset as u64)
    {
        frames.push((offset + RECORD_HEADER_BYTES, Header::check(frame).expect("whole").0));
        offset += size;
    }
    frames
}

/// Events of memfd rings in a frame.
fn events(header: &Header) -> u64 {
    u64::from(header.source_events[Source::Shm as usize])
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).expect("readable");
    bytes[at] ^= 0x10;
    fs::write(path, bytes).expect("written");
}

/// Flips a bit in the payload of the last frame but one of the first segment, and deletes the second segment. How many events were
/// in there.
fn damage(dir: &Path) -> u64 {
    let segments = segments(dir);
    let first = frames(&segments[0]);
    let (at, header) = first[first.len() - 2];
    flip(&segments[0], at + 200);
    let lost: u64 = frames(&segments[1]).iter().map(|(_, header)| events(header)).sum();
    fs::remove_file(&segments[1]).expect("deleted");
    assert!(lost > 0 && events(&header) > 0);
    lost + events(&header)
}

fn wait_for_three_segments(node: &FedNode, dir: &Path) {
    wait_for("a third segment", LIMIT, |seen| {
        let segments = segments(dir);
        *seen = format!("{} segments", segments.len());
        // The third is being written to: the first two are whole.
        Ok((segments.len() >= 3).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", node.collector.output()));
}

fn metric(node: &FedNode, name: &str) -> u64 {
    let (_, text) = http::get(node.collector.port(), "/metrics").unwrap_or_else(|error| panic!("{error}"));
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
    value.unwrap_or_else(|| panic!("no {name} in:\n{text}")) as u64
}

const ENDED: &str = "tapio_collector_epochs_ended_total{reason=\"spool\"}";
/// What the collector's log says of each end.
const SAID: &str = "frames cannot be delivered";

fn assert_lost(ledger: &NodeLedger, lost: u64) {
    let mut losses: BTreeMap<_, _> = ledger.losses.clone();
    // A ring may overflow on a machine that is loaded by others; what a killed collector held is known exactly too.
    losses.remove("ring/full");
    losses.remove("collector/killed");
    assert_eq!(losses, BTreeMap::from([("outbox/malformed".to_owned(), lost)]), "{ledger}");
}

#[test]
fn a_spool_damaged_during_an_outage_loses_only_damage() {
    let _turn = lab::beside();
    let dir = tempfile::tempdir().expect("a folder");
    let mut server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let name = "spool-damaged";
    let mut node = FedNode::feed(start(&options(name, &server, dir.path(), SPOOL_BYTES)), EVENTS_PER_SECOND);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 10_000);
    assert_eq!(metric(&node, ENDED), 0);
    server.kill();
    wait_for_three_segments(&node, dir.path());
    let lost = damage(dir.path());
    server.restart().unwrap_or_else(|error| panic!("{error}"));
    wait_for("the spool to be empty", LIMIT, |seen| {
        *seen = format!("{} bytes, {} epochs ended", on_disk(dir.path()), metric(&node, ENDED));
        Ok((on_disk(dir.path()) == 0 && metric(&node, ENDED) == 2).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", node.collector.output()));
    node.collector.check_running().unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(node.collector.output().matches(SAID).count(), 2, "{}", node.collector.output());
    // What is emitted now arrives too.
    archived = node.archived(&server);
    node.wait_for_progress(&server, &mut archived, 50_000);
    let address = server.address();
    let folder = server.archive_dir().to_owned();
    let (ledger, states) = node.finish(&server);
    assert_lost(&ledger, lost);
    assert!(!ledger.losses.contains_key("collector/killed"), "{ledger}");
    assert_eq!(states, ["closed"; 3], "{ledger}");

    let ledger =
        Command::new(lab::program("tapioctl")).args(["--server", &address, "ledger"]).output().expect("it runs");
    let ledger = String::from_utf8_lossy(&ledger.stdout).into_owned();
    lab::assert_says(&ledger, &["outbox/malformed", SOURCE, "The ledger closes: no event is unexplained"]);
    let mut reported = 0;
    for frame in lab::archive::frames(&folder) {
        for event in frame.body().events.iter() {
            if let ArchivedDetail::Gap(gap) = &event.body
                && frame.body().names[gap.what.to_native() as usize] == "frames"
            {
                reported += u64::from(gap.found_gone.to_native());
            }
        }
    }
    assert_eq!(reported, lost, "it is reported as events too");
}

#[test]
fn a_killed_collectors_damaged_spool_loses_only_damaged_frames() {
    let _turn = lab::beside();
    let dir = tempfile::tempdir().expect("a folder");
    let mut server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let name = "spool-killed-damaged";
    let mut node = FedNode::feed(start(&options(name, &server, dir.path(), SPOOL_BYTES)), EVENTS_PER_SECOND);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 10_000);
    server.kill();
    wait_for_three_segments(&node, dir.path());
    node.collector.kill();
    let lost = damage(dir.path());
    server.restart().unwrap_or_else(|error| panic!("{error}"));
    node.collector.restart().unwrap_or_else(|error| panic!("{error}"));
    node.publish();
    wait_for("the epochs to end", LIMIT, |seen| {
        let ended = metric(&node, ENDED);
        *seen = format!("{ended} epochs ended");
        Ok((ended == 2).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", node.collector.output()));
    archived = node.archived(&server);
    node.wait_for_progress(&server, &mut archived, 50_000);
    let (ledger, states) = node.finish(&server);
    assert_lost(&ledger, lost);
    // The third went on where the damage ended, and has no last frame.
    assert_eq!(states, ["closed", "closed", "killed", "closed"], "{ledger}");
    assert_eq!(on_disk(dir.path()), 0, "all of it is acknowledged");
}

#[test]
fn a_collector_killed_after_its_epoch_ended_goes_on() {
    let _turn = lab::beside();
    let dir = tempfile::tempdir().expect("a folder");
    let options_of_server = ServerOptions {
        // The spool outlasts the look at the metric.
        extra_server: ", max_node_bytes_per_sec: 4MiB".into(),
        ..ServerOptions::default()
    };
    let mut server = Server::start(&options_of_server).unwrap_or_else(|error| panic!("{error}"));
    let name = "spool-ended-killed";
    let mut node = FedNode::feed(start(&options(name, &server, dir.path(), SPOOL_BYTES)), EVENTS_PER_SECOND / 4.0);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 10_000);
    server.kill();
    wait_for_spool(&node, dir.path(), 16 * MIB);
    // The first of 12 MiB is whole. Those at its start are in memory too.
    let first = segments(dir.path()).remove(0);
    let frames = frames(&first);
    let (at, header) = frames[frames.len() / 4];
    flip(&first, at + 200);
    server.restart().unwrap_or_else(|error| panic!("{error}"));
    wait_for("the epoch to end", LIMIT, |_| Ok((metric(&node, ENDED) == 1).then_some(())))
        .unwrap_or_else(|error| panic!("{error}\n{}", node.collector.output()));
    node.collector.kill();
    assert!(on_disk(dir.path()) > MIB, "it was killed with much on the disk");
    node.collector.restart().unwrap_or_else(|error| panic!("{error}"));
    node.publish();
    wait_for("the spool to be empty", LIMIT, |seen| {
        *seen = format!("{} bytes", on_disk(dir.path()));
        Ok((on_disk(dir.path()) == 0).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", node.collector.output()));
    archived = node.archived(&server);
    node.wait_for_progress(&server, &mut archived, 20_000);
    let (ledger, states) = node.finish(&server);
    assert_lost(&ledger, events(&header));
    assert_eq!(states, ["closed", "killed", "closed"], "{ledger}");
}
