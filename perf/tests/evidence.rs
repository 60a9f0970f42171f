//! Evidence that fades, from a real OOM kill through the real collector to the server's archive.

use std::time::Duration;

use crate::lab::Need::{Bpf, Cgroups};
use crate::lab::{archive, can_run, inject};
use tapio_perf::clock::wait_for;
use tapio_perf::processes::collector::Feed;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions};
use tapio_wire::event::{ArchivedDetail, ArchivedSource};

/// What an observation said.
#[derive(Debug)]
struct Observed {
    entity: u64,
    cgroup: String,
    limit_bytes: u64,
    usage_bytes: u64,
    peak_bytes: u64,
}

fn observed(server: &Server) -> (Vec<Observed>, Vec<(u64, u64)>) {
    let (mut observed, mut kills) = (Vec::new(), Vec::new());
    for frame in archive::frames(server.archive_dir()) {
        let body = frame.body();
        for event in body.events.iter() {
            match &event.body {
                ArchivedDetail::Observation(seen) => {
                    assert_eq!(event.source, ArchivedSource::Collector);
                    observed.push(Observed {
                        entity: event.entity.to_native(),
                        cgroup: body.name(seen.cgroup.to_native()).unwrap_or_default().to_owned(),
                        limit_bytes: seen.memory_limit_bytes.to_native(),
                        usage_bytes: seen.memory_usage_bytes.to_native(),
                        peak_bytes: seen.memory_peak_bytes.to_native(),
                    });
                }
                ArchivedDetail::Oom(_) => kills.push((u64::from(event.pid.to_native()), event.entity.to_native())),
                _ => {}
            }
        }
    }
    (observed, kills)
}

#[test]
fn an_oom_kill_archives_its_cgroups_limit_and_usage() {
    let _turn = crate::lab::alone();
    if !can_run("an_oom_kill_archives_its_cgroups_limit_and_usage", &[Cgroups, Bpf]) {
        return;
    }
    let server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let mut collector = Collector::start(&CollectorOptions {
        node: "evidence".into(),
        server: server.address(),
        feed: Feed::Ebpf,
        ..CollectorOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let injection = inject(&["oom"]);
    let number = |key: &str| injection[key].as_u64().unwrap_or_else(|| panic!("no {key} in {injection}"));
    let container = injection["container_id"].as_str().expect("a container");
    let is_of_victim = |seen: &Observed| seen.cgroup.contains(container);
    let what = format!("an observation of {container}");
    let found = wait_for(&what, Duration::from_secs(15), |saw| {
        let (seen, kills) = observed(&server);
        *saw = format!("{seen:?}");
        Ok(seen.into_iter().find(is_of_victim).map(|seen| (seen, kills)))
    });
    let (seen, kills) = found.unwrap_or_else(|error| panic!("{error}\n{}", collector.output()));
    assert_eq!(seen.limit_bytes, number("limit_bytes"), "{seen:?}");
    // The victim's memory is being given back while this is read; the peak stays.
    assert!(seen.peak_bytes > seen.limit_bytes / 10 * 9 && seen.usage_bytes <= seen.limit_bytes, "{seen:?}");
    assert!(seen.usage_bytes > 0, "{seen:?}");
    let of_kernel = kills.iter().find(|(pid, _)| *pid == number("pid"));
    assert_eq!(of_kernel.map(|(_, entity)| *entity), Some(seen.entity), "the entity is the kill's");
    collector.check_running().unwrap_or_else(|error| panic!("{error}"));
    let status = collector.stop().unwrap_or_else(|error| panic!("{error}"));
    assert!(status.is_some_and(|status| status.success()), "it drains: {status:?}\n{}", collector.output());
}
