//! On a real Kubernetes node: the manifests install Tapio, and it explains a kill. It is restarted and upgraded under
//! load without losing an event, and its removal leaves nothing behind.
//!
//! Runs only by `make test-kube`, which makes images of what was built here (`perf/lab/kube/images.sh`): today's build, and one
//! that speaks the next version of the wire (the feature `next-version` of `tapio-wire`).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use tapio_wire::frame::VERSION;

use crate::kube_node::frames::{self, Epochs};
use crate::kube_node::installed::{COLLECTOR, Pod, SERVER, Tapio};
use crate::kube_node::{Namespace, await_that, container, has_node, kubectl, pod, setting};
use serde_json::{Value, json};

/// Starts processes, opens connections that are refused, and has children killed: both lanes are busy.
const BUSY: &str =
    "while :; do busybox true; busybox nc -w 1 127.0.0.1 9 </dev/null; busybox sleep 9 & kill -9 $!; done";

#[test]
fn the_manifests_install_explain_upgrade_and_leave_nothing() {
    if !has_node("the_manifests_install_explain_upgrade_and_leave_nothing") {
        return;
    }
    let before = Traces::of_this_machine();
    let tapio = Tapio::install();
    tapio.rolled_out(SERVER);
    tapio.rolled_out(COLLECTOR);
    let namespace = Namespace::make("rollout");

    tapio.explains_a_kill(&namespace, "leak");
    let mut busy = container("busy", BUSY);
    busy["resources"] = json!({"limits": {"cpu": "300m"}});
    namespace.apply(vec![pod("load", "Always", busy)]);
    namespace.wait_running("pod/load");
    restarts_under_load_close_the_ledger(&tapio);
    upgrades_with_versions_apart(&tapio, &namespace);
    let ordinary = namespace.get("pod/load", "{.metadata.uid}");
    drop(namespace);
    leaves_nothing(tapio, &before, &ordinary);
}

fn restarts_under_load_close_the_ledger(tapio: &Tapio) {
    tapio.closed_ledger(1);
    tapio.restart(SERVER);
    tapio.closed_ledger(1);
    tapio.restart(COLLECTOR);
    // The epoch before the restart is closed, its successor open.
    let rows = tapio.closed_ledger(2);
    assert!(rows.iter().any(|row| row["state"] == "closed"), "{rows:?}");
    println!("after `kubectl rollout restart` of both, under load:");
    println!("{}", tapio.tapioctl(&["ledger"]).expect("a ledger"));
    archives_add_up(&[VERSION]);
}

/// Servers first, then collectors; and what becomes of collectors that are upgraded first.
fn upgrades_with_versions_apart(tapio: &Tapio, namespace: &Namespace) {
    tapio.set_image(SERVER, &setting("TAPIO_TEST_SERVER_IMAGE_NEXT"));
    tapio.rolled_out(SERVER);
    tapio.explains_a_kill(namespace, "skewed");
    tapio.closed_ledger(1);
    tapio.set_image(COLLECTOR, &setting("TAPIO_TEST_COLLECTOR_IMAGE_NEXT"));
    tapio.rolled_out(COLLECTOR);
    tapio.explains_a_kill(namespace, "upgraded");
    tapio.closed_ledger(2);
    archives_add_up(&[VERSION, VERSION + 1]);

    // The wrong order: a server that is one version behind refuses, says why, and nothing is lost in between.
    tapio.set_image(SERVER, &setting("TAPIO_TEST_SERVER_IMAGE"));
    tapio.rolled_out(SERVER);
    await_that("that the older server refuses the newer collector", |seen| {
        let collector = tapio.collectors().into_iter().next()?;
        let readiness: Value = serde_json::from_str(&collector.readiness()).ok()?;
        let log = collector.log();
        *seen = format!("{readiness}, {:?}", log.last());
        let is_logged = log
            .iter()
            .any(|line| line["error"].as_str().is_some_and(|error| error.contains("upgrade the servers first")));
        (readiness["ready"] == false && is_logged).then_some(())
    });
    tapio.set_image(SERVER, &setting("TAPIO_TEST_SERVER_IMAGE_NEXT"));
    tapio.rolled_out(SERVER);
    tapio.rolled_out(COLLECTOR);
    tapio.closed_ledger(1);
    println!("after an upgrade with versions apart, under load:");
    println!("{}", tapio.tapioctl(&["ledger"]).expect("a ledger"));
    archives_add_up(&[VERSION, VERSION + 1]);
}

/// Every frame that the collectors made is in one of the servers' volumes, and the events in them are all that was emitted but
/// what was declared lost.
fn archives_add_up(versions: &[u16]) {
    let Ok(volumes) = std::env::var("TAPIO_TEST_VOLUMES") else {
        println!("the servers' volumes are not on this machine: their archives are not compared");
        return;
    };
    let epochs: Epochs = await_that("that the servers' archives add up", |seen| {
        let epochs = frames::read(Path::new(&volumes));
        let problems = frames::problems(&epochs);
        *seen = problems.join("\n");
        (problems.is_empty() && !epochs.is_empty()).then_some(epochs)
    });
    let written: BTreeSet<u16> = epochs.values().flat_map(|epoch| &epoch.versions).copied().collect();
    assert_eq!(written, versions.iter().copied().collect());
    for ((_, id), epoch) in &epochs {
        let (emitted, archived, dropped) = epoch.sums();
        let state = if epoch.is_final { "closed" } else { "open" };
        println!(
            "all servers' archives, epoch {id:x}, {state}: {} frames, emitted {emitted}, archived {archived}, dropped {dropped}",
            epoch.seqs.len()
        );
    }
}

/// What an agent could leave on a node.
struct Traces {
    pinned: BTreeSet<PathBuf>,
}

impl Traces {
    fn of_this_machine() -> Self {
        Self { pinned: below(Path::new("/sys/fs/bpf")) }
    }
}

/// Paths below a folder.
fn below(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(below(&entry.path()));
        }
        found.insert(entry.path());
    }
    found
}

/// The numbers that a process's descriptors show for a key, as `prog_id`.
fn descriptors(pid: u32, key: &str) -> BTreeSet<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let texts = entries.filter_map(|entry| fs::read_to_string(entry.path()).ok());
    let numbers = |text: String| -> Vec<u32> {
        text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix(':')?.trim().parse().ok()).collect()
    };
    texts.flat_map(numbers).collect()
}

fn programs_and_maps() -> (BTreeSet<u32>, BTreeSet<u32>) {
    let programs = aya::programs::loaded_programs().filter_map(|program| Some(program.ok()?.id())).collect();
    let maps = aya::maps::loaded_maps().filter_map(|map| Some(map.ok()?.id())).collect();
    (programs, maps)
}

/// Where cgroups of both versions are mounted, kubelet (1.20 at least) makes a pod's folder in version 2 too, and forgets it there.
const FORGOTTEN: &str = "/sys/fs/cgroup/unified/";

/// `ordinary` is the uid of a pod that is gone and was not Tapio's: an empty folder that kubelet forgot of that one too is not ours.
fn leaves_nothing(tapio: Tapio, before: &Traces, ordinary: &str) {
    let pods: Vec<Pod> = tapio.pods("collector").into_iter().chain(tapio.pods("server")).collect();
    let pid = pods[0].pid().expect("the collector runs here");
    let (programs, maps) = (descriptors(pid, "prog_id"), descriptors(pid, "map_id"));
    let (loaded, _) = programs_and_maps();
    assert!(!programs.is_empty() && programs.is_subset(&loaded), "{programs:?}");
    println!("before uninstalling: {} programs, {} maps", programs.len(), maps.len());
    tapio.uninstall();

    let left_of = |uid: &str| {
        let is_of = |path: &Path| {
            let text = path.to_string_lossy();
            text.contains(uid) || text.contains(&uid.replace('-', "_"))
        };
        let cgroups: Vec<PathBuf> =
            below_folders(Path::new("/sys/fs/cgroup")).into_iter().filter(|path| is_of(path)).collect();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let mounts: Vec<String> = mounts.lines().filter(|line| line.contains(uid)).map(str::to_owned).collect();
        (cgroups, mounts)
    };
    // Kubelet takes its own time for the folders of a pod that is gone.
    await_that("that nothing is left", |seen| {
        let (loaded, made) = programs_and_maps();
        let programs: Vec<_> = programs.intersection(&loaded).collect();
        let maps: Vec<_> = maps.intersection(&made).collect();
        let of_ordinary = left_of(ordinary).0;
        let is_kubelets = |path: &PathBuf| {
            let is_empty = below_folders(path).is_empty()
                && fs::read_to_string(path.join("cgroup.procs")).is_ok_and(|processes| processes.is_empty());
            is_empty && path.starts_with(FORGOTTEN) && of_ordinary.iter().any(|path| path.starts_with(FORGOTTEN))
        };
        let mut left: Vec<_> = pods.iter().map(|pod| left_of(&pod.uid)).collect();
        for (cgroups, _) in &mut left {
            cgroups.retain(|path| !is_kubelets(path));
        }
        *seen = format!("programs {programs:?}, maps {maps:?}, cgroups and mounts {left:?}");
        let is_clean = left.iter().all(|(cgroups, mounts)| cgroups.is_empty() && mounts.is_empty());
        (programs.is_empty() && maps.is_empty() && is_clean).then_some(())
    });
    let pinned: Vec<_> = below(Path::new("/sys/fs/bpf")).difference(&before.pinned).cloned().collect();
    assert!(pinned.is_empty(), "pinned: {pinned:?}");
    for (kind, name) in [
        ("namespace", "tapio-system"),
        ("clusterrole", "tapio-collector"),
        ("clusterrolebinding", "tapio-collector"),
        ("clusterrole", "tapio-server"),
        ("clusterrolebinding", "tapio-server"),
        ("priorityclass", "tapio-server"),
        ("priorityclass", "tapio-collector"),
    ] {
        let left = kubectl(&["get", kind, name, "--ignore-not-found", "-o", "name"]).expect("an answer");
        assert_eq!(left, "", "{kind} {name}");
    }
    println!("after uninstalling: no program, map, pin, cgroup, mount or object of it");
}

/// Folders below a folder; cgroup file systems have files without number.
fn below_folders(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(below_folders(&entry.path()));
            found.push(entry.path());
        }
    }
    found
}
