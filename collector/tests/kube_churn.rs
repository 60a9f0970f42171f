//! 80,000 pods that come and go: the source's memory does not follow them.

mod kube_api;

use axum::body::Bytes;
use kube_api::server::{Answer, ago, change, list};
use kube_api::{Rig, ended_pod, only_pods, pod};
use tapio_collector::intake::identity::directory::{CONTAINERS_MAX, PODS_MAX};
use tapio_wire::program::process;
use tokio::sync::mpsc;

const PODS: u64 = 80_000;
/// When everything that is bounded is full.
const FULL: u64 = 36_000;
/// Pods at the same time.
const LIVE: u64 = 100;
/// Pods between two looks at the memory after that.
const WINDOW: u64 = 2_000;
/// Maximum growth in most windows. A leak grows in each; a hash table that makes room for its removed keys grows once,
/// at a random moment. On a busy machine what waits may grow for a few windows, and stays as it is then.
const WINDOW_GROWTH_BYTES_MAX: i64 = 1 << 20;
const GROWTH_BYTES_MAX: i64 = 48 << 20;

fn resident_bytes() -> i64 {
    let bytes = process::resident_bytes() as i64;
    assert!(bytes > 0, "/proc is mounted");
    bytes
}

#[test]
fn memory_stays_flat_while_many_pods_come_and_go() {
    let (lines, live) = mpsc::unbounded_channel();
    let mut live = Some(live);
    let api = only_pods(move |asked| match asked.is_watch() {
        false => list(1, Vec::new()),
        true => live.take().map_or(Answer::Silent, Answer::Live),
    });
    let mut rig = Rig::start(&api, "node1");
    rig.count_only();
    let finished = ago(0);
    let mut resident = Vec::new();
    for number in 0..PODS {
        let version = 10 + number * 3;
        let mut text = change("ADDED", pod(number, version)).to_string();
        text.push('\n');
        text += &change("MODIFIED", ended_pod(number, version + 1, "Completed", 0, &finished)).to_string();
        text.push('\n');
        if let Some(old) = number.checked_sub(LIVE) {
            text += &change("DELETED", ended_pod(old, version + 2, "Completed", 0, &finished)).to_string();
            text.push('\n');
        }
        lines.send(Bytes::from(text)).expect("the watch is open");
        if number % LIVE == LIVE - 1 {
            // What waits to be sent must not become the memory that is measured. Each pod makes three events, its end one.
            let least = (number + 1) * 3 + (number + 1).saturating_sub(LIVE);
            rig.until("progress", |rig| rig.events >= least);
        }
        if number >= FULL && (number - FULL).is_multiple_of(WINDOW) {
            resident.push(resident_bytes());
        }
    }
    rig.until("every event", |rig| rig.events >= PODS * 3 + (PODS - LIVE));
    let (pods, containers) = rig.directory.len();
    assert!(pods <= PODS_MAX && containers <= CONTAINERS_MAX, "{pods} pods, {containers} containers");
    resident.push(resident_bytes());
    let mut windows: Vec<i64> = resident.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let all: i64 = windows.iter().sum();
    println!("resident: {} bytes after {FULL} pods, {all} more after {PODS}: {windows:?}", resident[0]);
    windows.sort_unstable();
    let median = windows[windows.len() / 2];
    assert!(median <= WINDOW_GROWTH_BYTES_MAX && all <= GROWTH_BYTES_MAX, "{all} bytes more: {windows:?}");
    rig.finish();
}
