//! Writes what was read as events of the lethal lane.
//!
//! In: readings, samples, troubles, lines. Out: events in the intake, which must have room.

use std::time::{Duration, Instant};

use tapio_wire::event::{
    CgroupUse, Curve, Detail, EntityId, Event, Lane, LogLines, Member, NO_NAME, Observation, Source, Trouble,
};

use super::counters::Counters;
use super::full_mount::FullMount;
use super::lasting::{self, Whose};
use super::log::{LINE_BYTES_MAX, Said};
use super::read::{self, Reading};
use super::sender::Sender;
use super::watch::Samples;
use crate::base::clock::boottime_ns;
use crate::intake::decode::Batch;
use crate::intake::identity::Identity;
use crate::intake::pass::Pass;
use crate::intake::requests::Request;

/// Waits until one more event finds room.
pub fn wait_for_room(pass: &mut Pass<'_>) {
    while pass.room_of(Lane::Lethal) == 0 {
        pass.make_room();
        if pass.room_of(Lane::Lethal) == 0 {
            std::thread::sleep(pass.sleep_limit());
        }
    }
}

/// Emits what a cgroup and a signal's sender were like.
pub fn observation(pass: &mut Pass<'_>, request: &Request, reading: &Reading, process: Option<&Sender>) {
    pass.observe(|batch, _| Event {
        time_ns: boottime_ns(),
        entity: request.entity,
        pid: request.pid,
        source: Source::Collector,
        body: Detail::Observation(Box::new(Observation {
            cgroup: batch.text(&reading.path),
            memory_limit_bytes: reading.memory_limit_bytes,
            memory_usage_bytes: reading.memory_usage_bytes,
            memory_peak_bytes: reading.memory_peak_bytes,
            oom_kills: reading.oom_kills,
            limit_hits: reading.limit_hits,
            pids: reading.pids,
            pids_limit: reading.pids_limit,
            throttled: reading.throttled,
            throttled_us: reading.throttled_us,
            memory_pressure: reading.memory_pressure,
            process: process.map_or(0, |process| process.pid),
            process_comm: batch.text(process.map_or("", |process| &process.comm)),
            process_command: process.map_or(NO_NAME, |process| {
                let command = process.shown_command(|arguments| batch.redacted(arguments));
                batch.text(&command)
            }),
            process_entity: process.map_or(0, |_| request.sender_entity),
            process_uid: process.map_or(0, |process| process.uid),
        })),
    });
}

/// Emits what fills a cgroup, and how its counters moved.
pub fn cgroup_use(
    pass: &mut Pass<'_>,
    request: &Request,
    reading: &Reading,
    difference: Option<(Duration, Counters)>,
    with_members: bool,
    full_mount: Option<&FullMount>,
) {
    let members = if with_members { read::members(&reading.folder) } else { Vec::new() };
    let (window, moved) = difference.unwrap_or_default();
    pass.observe(|batch, identity| {
        let mut listed = Vec::with_capacity(members.len());
        for member in members {
            let path = format!("{}/{}", reading.path.trim_end_matches('/'), member.path);
            let entity = identity.resolve_path(&path, Lane::Lethal, &mut batch.body.entities);
            listed.push(Member {
                entity,
                cgroup: batch.text(&path),
                usage_bytes: member.usage_bytes,
                limit_bytes: member.limit_bytes,
                oom_score_adj: member.oom_score_adj,
            });
        }
        Event {
            time_ns: boottime_ns(),
            entity: request.entity,
            pid: request.pid,
            source: Source::Collector,
            body: Detail::CgroupUse(Box::new(CgroupUse {
                cgroup: batch.text(&reading.path),
                height: reading.height,
                usage_bytes: reading.memory_usage_bytes,
                limit_bytes: reading.memory_limit_bytes,
                anon_bytes: reading.memory.anon,
                file_bytes: reading.memory.file,
                shmem_bytes: reading.memory.shmem,
                kernel_bytes: reading.memory.kernel,
                window_ns: window.as_nanos() as u64,
                periods: moved.periods,
                throttled: moved.throttled,
                throttled_us: moved.throttled_us,
                limit_hits: moved.limit_hits,
                oom_kills: moved.oom_kills,
                members: listed,
                full_mount: batch.text(full_mount.map_or("", |mount| &mount.mount)),
                full_mount_bytes: full_mount.map_or(0, |mount| mount.size_bytes),
            })),
        }
    });
}

/// Emits how the use of a cgroup went.
pub fn curve(
    pass: &mut Pass<'_>,
    whose: impl FnOnce(&mut Batch, &mut Identity) -> (EntityId, u32),
    path: &str,
    samples: Samples,
) {
    pass.observe(|batch, identity| {
        let (entity, pid) = whose(batch, identity);
        let cgroup = batch.text(path);
        let interval_ns = samples.interval.as_nanos() as u64;
        let curve = Curve { cgroup, limit_bytes: samples.limit_bytes, interval_ns, points: samples.points };
        Event { time_ns: boottime_ns(), entity, pid, source: Source::Collector, body: Detail::Curve(Box::new(curve)) }
    });
}

/// Emits a trouble that begins, goes on, or is over; `node` is the entity of the node's own.
pub fn trouble(pass: &mut Pass<'_>, now: Instant, node: EntityId, trouble: &lasting::Trouble) {
    // One reading of the clock for both: what is reported at once has lasted for no time.
    let time_ns = boottime_ns();
    let since_ns = time_ns.saturating_sub(now.saturating_duration_since(trouble.since).as_nanos() as u64);
    pass.observe(|batch, identity| Event {
        time_ns,
        entity: match &trouble.whose {
            Whose::Cgroup(path) => identity.resolve_path(path, Lane::Lethal, &mut batch.body.entities),
            Whose::Node => node,
        },
        pid: trouble.pid,
        source: Source::Collector,
        body: Detail::Trouble(Box::new(Trouble {
            what: batch.text(trouble.what.name()),
            place: batch.text(&trouble.place),
            comm: batch.text(&trouble.comm),
            since_ns,
            value: trouble.value,
            limit: trouble.limit,
            is_over: trouble.is_over,
        })),
    });
}

/// Emits the last lines of a container.
pub fn log_lines(pass: &mut Pass<'_>, said: Said) {
    let Said { entity, pid, lines } = said;
    pass.observe(|batch, _| {
        let line = |line: String| {
            // Cut afterwards: half a secret is not recognised.
            let mut line = batch.redacted_text(&line);
            line.truncate(line.floor_char_boundary(LINE_BYTES_MAX));
            batch.text(&line)
        };
        let lines = lines.into_iter().map(line).collect();
        let body = Detail::LogLines(Box::new(LogLines { lines }));
        Event { time_ns: boottime_ns(), entity, pid, source: Source::Collector, body }
    });
}
