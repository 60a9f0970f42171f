//! An archived event, for people and as JSON.
//!
//! What enters: an event of a checked frame, whose texts may be hostile. What leaves: the fields of its kind by name, and a
//! line made of them. Control characters are left to whoever prints.

use std::fmt::Write;
use std::net::Ipv6Addr;

use serde_json::Value;
use tapio_wire::event::{ArchivedBody, ArchivedDetail, ArchivedEvent};
use tapio_wire::program::units::{human_bytes, human_duration};
use tapio_wire::service::Event;

use super::layout::{Style, clean};
use super::time::for_people;
use crate::findings::text;

/// The fields of a kind, in their order. Names that are not set are left out.
macro_rules! fields {
    ($body:expr; $($key:literal: $value:expr),* $(,)?) => {{
        let mut map = Fields::new();
        $(put(&mut map, $key, $value.into_value($body));)*
        map
    }};
}

/// The fields of an event's kind, the most informative first.
pub type Fields = Vec<(&'static str, Value)>;

struct NameOf(rkyv::rend::u32_le);
struct Address([u8; 16]);

trait IntoValue {
    fn into_value(self, body: &ArchivedBody) -> Value;
}

impl IntoValue for NameOf {
    fn into_value(self, body: &ArchivedBody) -> Value {
        body.name(self.0.to_native()).map_or(Value::Null, Value::from)
    }
}

impl IntoValue for Address {
    fn into_value(self, _: &ArchivedBody) -> Value {
        let address = Ipv6Addr::from(self.0);
        Value::from(address.to_ipv4_mapped().map_or_else(|| address.to_string(), |v4| v4.to_string()))
    }
}

macro_rules! numbers {
    ($($type:ty),*) => {$(impl IntoValue for $type {
        fn into_value(self, _: &ArchivedBody) -> Value {
            Value::from(self.to_native())
        }
    })*};
}
numbers!(rkyv::rend::u16_le, rkyv::rend::u32_le, rkyv::rend::u64_le, rkyv::rend::i16_le, rkyv::rend::i32_le);

impl IntoValue for u8 {
    fn into_value(self, _: &ArchivedBody) -> Value {
        Value::from(self)
    }
}

impl IntoValue for bool {
    fn into_value(self, _: &ArchivedBody) -> Value {
        Value::from(self)
    }
}

impl IntoValue for Value {
    fn into_value(self, _: &ArchivedBody) -> Value {
        self
    }
}

fn put(fields: &mut Fields, key: &'static str, value: Value) {
    if !value.is_null() {
        fields.push((key, value));
    }
}

fn entity(id: rkyv::rend::u64_le) -> Value {
    match id.to_native() {
        0 => Value::Null,
        id => Value::from(format!("{id:016x}")),
    }
}

/// A number; the largest stands for "not reported".
fn known(number: rkyv::rend::u64_le) -> Value {
    match number.to_native() {
        u64::MAX => Value::Null,
        number => Value::from(number),
    }
}

/// How long it was from one moment since boot to another; 0 where the first is not known.
fn lasted(from_ns: u64, until_ns: u64) -> Value {
    Value::from(if from_ns == 0 { 0 } else { until_ns.saturating_sub(from_ns) })
}

/// Moments by the node's clock since its boot, which says nothing to people: how long it lasted is shown beside them. A moment
/// since 1970 may have the same name.
const SINCE_BOOT: [&str; 3] = ["since_ns", "from_ns", "until_ns"];
/// Nanoseconds: a moment since 1970 is later, a duration or a moment since boot is less.
const MOMENT_MIN: u64 = 1_000_000_000_000_000_000;

fn tcp_change(change: u8) -> Value {
    const CHANGES: [&str; 9] = [
        "established",
        "refused",
        "timed_out",
        "closed",
        "retransmitted",
        "syn_retransmitted",
        "reset_sent",
        "reset_received",
        "listen_queue_full",
    ];
    let name = usize::from(change).checked_sub(1).and_then(|index| CHANGES.get(index));
    name.map_or_else(|| Value::from(change), |&name| Value::from(name))
}

fn status(status: u32) -> Fields {
    match (status & 0x7f, status >> 8 & 0xff) {
        (0, code) => vec![("exit_code", Value::from(code))],
        (signal, _) => {
            vec![("signal_name", Value::from(text::signal_name(signal))), ("signal", Value::from(signal))]
        }
    }
}

/// The fields of an event's kind.
pub fn event_fields(body: &ArchivedBody, event: &ArchivedEvent) -> Fields {
    use ArchivedDetail as Detail;
    match &event.body {
        Detail::Exec(e) => fields!(body; "comm": NameOf(e.comm), "path": NameOf(e.path),
            "arguments": NameOf(e.arguments), "parent_pid": e.parent_pid, "ns_pid": e.ns_pid, "ns_level": e.ns_level),
        Detail::Exit(e) => {
            let mut map = fields!(body; "comm": NameOf(e.comm));
            map.extend(status(e.status.to_native()));
            map.extend(fields!(body; "parent_pid": e.parent_pid, "ns_pid": e.ns_pid, "ns_level": e.ns_level,
                // Of some it is not known when they began.
                "lived_ns": lasted(e.start_time_ns.to_native(), event.time_ns.to_native()),
                "oom_score_adj": e.oom_score_adj));
            map
        }
        Detail::Oom(e) => fields!(body; "comm": NameOf(e.comm), "limit_cgroup": NameOf(e.limit_cgroup),
            "limit_bytes": e.limit_bytes, "usage_bytes": e.usage_bytes, "anon_rss_bytes": e.anon_rss_bytes,
            "file_rss_bytes": e.file_rss_bytes, "shmem_rss_bytes": e.shmem_rss_bytes, "total_vm_bytes": e.total_vm_bytes,
            "limit_height": e.limit_height, "oom_score_adj": e.oom_score_adj, "allocator_comm": NameOf(e.allocator_comm),
            "allocator_pid": e.allocator_pid, "allocator_entity": entity(e.allocator_entity), "ns_pid": e.ns_pid),
        Detail::Signal(e) => fields!(body; "signal_name": Value::from(text::signal_name(e.signal.to_native())),
            "signal": e.signal, "comm": NameOf(e.comm), "from_kernel": e.from_kernel,
            "sender_comm": NameOf(e.sender_comm), "sender_pid": e.sender_pid, "sender_entity": entity(e.sender_entity),
            "code": e.code, "result": e.result, "ns_pid": e.ns_pid, "ns_level": e.ns_level),
        Detail::CgroupMade { path } | Detail::CgroupRemoved { path } => fields!(body; "path": NameOf(*path)),
        Detail::Tcp(e) => fields!(body; "change": tcp_change(e.change), "source": Address(e.source),
            "source_port": e.source_port, "destination": Address(e.destination),
            "destination_port": e.destination_port, "active": e.active, "duration_us": e.duration_us,
            "kib_sent": e.kib_sent, "kib_received": e.kib_received),
        Detail::Reclaim { stall_ns, pages, memcg } => {
            fields!(body; "stall_ns": *stall_ns, "pages": *pages, "memcg": *memcg)
        }
        Detail::BlockIo { latency_ns, bytes, device, error, operation } => fields!(body; "latency_ns": *latency_ns,
            "bytes": *bytes, "device": *device, "error": *error, "operation": *operation),
        Detail::SyscallError { count, syscall, errno } => {
            fields!(body; "syscall": *syscall, "errno": *errno, "count": *count)
        }
        Detail::Dns { latency_ns, name, query_type, rcode } => fields!(body; "name": NameOf(*name),
            "latency_ns": *latency_ns, "query_type": *query_type, "rcode": *rcode),
        Detail::RunQueue { wait_ns } => fields!(body; "wait_ns": *wait_ns),
        Detail::PacketDrop { count, reason, interface } => {
            fields!(body; "count": *count, "reason": NameOf(*reason), "interface": *interface)
        }
        Detail::Fork { parent_pid, ns_pid, ns_level, comm } => fields!(body; "comm": NameOf(*comm),
            "parent_pid": *parent_pid, "ns_pid": *ns_pid, "ns_level": *ns_level),
        Detail::SignalDelivered { signal, code, ns_pid, ns_level, comm } => fields!(body;
            "signal_name": Value::from(text::signal_name(signal.to_native())), "signal": *signal,
            "comm": NameOf(*comm), "code": *code, "ns_pid": *ns_pid, "ns_level": *ns_level),
        Detail::FileOpen { path, comm, flags } => {
            fields!(body; "path": NameOf(*path), "comm": NameOf(*comm), "flags": *flags)
        }
        Detail::Histogram(e) => {
            let counts: Vec<u32> = e.counts.iter().map(|count| count.to_native()).collect();
            fields!(body; "measure": Value::from(e.measure.get().name()), "operation": e.operation, "device": e.device,
                "max_ns": e.max_ns, "total_ns": e.total_ns, "interval_ns": e.interval_ns, "counts": Value::from(counts))
        }
        Detail::PodState(e) => fields!(body; "phase": NameOf(e.phase), "reason": NameOf(e.reason),
            "message": NameOf(e.message), "is_ready": e.is_ready, "is_scheduled": e.is_scheduled, "is_gone": e.is_gone,
            "deletion_ns": e.deletion_ns, "deletion_grace_s": e.deletion_grace_s, "qos": e.qos),
        Detail::ContainerState(e) => fields!(body; "container": NameOf(e.container),
            "state": Value::from(match e.state { 1 => "waiting", 2 => "running", 3 => "terminated", _ => "unknown" }),
            "reason": NameOf(e.reason), "message": NameOf(e.message), "exit_code": e.exit_code, "signal": e.signal,
            "restart_count": e.restart_count, "image": NameOf(e.image), "is_last": e.is_last, "is_ready": e.is_ready,
            "memory_limit_bytes": e.memory_limit_bytes, "cpu_limit_milli": e.cpu_limit_milli, "role": e.role,
            "started_ns": e.started_ns, "finished_ns": e.finished_ns),
        Detail::KubeEvent(e) => fields!(body; "reason": NameOf(e.reason), "message": NameOf(e.message),
            "object": NameOf(e.kind), "namespace": NameOf(e.namespace), "name": NameOf(e.name),
            "field_path": NameOf(e.field_path), "component": NameOf(e.component), "count": e.count,
            "is_warning": e.is_warning, "first_ns": e.first_ns, "last_ns": e.last_ns),
        Detail::NodeCondition(e) => fields!(body; "condition": NameOf(e.condition),
            "status": Value::from(match e.status { 0 => "false", 1 => "true", _ => "unknown" }),
            "reason": NameOf(e.reason), "message": NameOf(e.message), "since_ns": e.since_ns),
        Detail::Rollout(e) => fields!(body; "object": NameOf(e.kind), "namespace": NameOf(e.namespace),
            "name": NameOf(e.name), "images": NameOf(e.images), "images_before": NameOf(e.images_before),
            "reason": NameOf(e.reason), "message": NameOf(e.message), "generation": e.generation,
            "desired": e.desired, "updated": e.updated, "ready": e.ready, "unavailable": e.unavailable,
            "is_gone": e.is_gone),
        Detail::ConfigChange(e) => fields!(body; "object": NameOf(e.kind), "namespace": NameOf(e.namespace),
            "name": NameOf(e.name), "resource_version": NameOf(e.resource_version),
            "change": Value::from(match e.change { 1 => "made", 2 => "changed", 3 => "gone", _ => "unknown" })),
        Detail::Endpoints(e) => fields!(body; "namespace": NameOf(e.namespace), "service": NameOf(e.service),
            "backends": Value::from(e.backends.len()),
            "ready": Value::from(e.backends.iter().filter(|backend| backend.is_ready).count())),
        Detail::ObjectState(e) => fields!(body; "object": NameOf(e.kind), "namespace": NameOf(e.namespace),
            "name": NameOf(e.name), "state": NameOf(e.state), "reason": NameOf(e.reason), "message": NameOf(e.message),
            "current": e.current, "desired": e.desired, "is_gone": e.is_gone),
        Detail::UnitState(e) => fields!(body; "unit": NameOf(e.unit), "active_state": NameOf(e.active_state),
            "sub_state": NameOf(e.sub_state), "result": NameOf(e.result), "main_code": e.main_code,
            "main_status": e.main_status, "main_pid": e.main_pid, "restarts": e.restarts),
        Detail::UnitJob(e) => fields!(body; "unit": NameOf(e.unit), "result": NameOf(e.result)),
        Detail::Observation(e) => fields!(body; "cgroup": NameOf(e.cgroup), "memory_limit_bytes": e.memory_limit_bytes,
            "memory_usage_bytes": e.memory_usage_bytes, "memory_peak_bytes": e.memory_peak_bytes,
            "oom_kills": e.oom_kills, "limit_hits": e.limit_hits, "pids": e.pids, "pids_limit": e.pids_limit,
            "throttled": e.throttled, "throttled_us": e.throttled_us, "memory_pressure": e.memory_pressure,
            "process": e.process, "process_comm": NameOf(e.process_comm), "process_command": NameOf(e.process_command),
            "process_uid": e.process_uid, "process_entity": entity(e.process_entity)),
        Detail::Gap(e) => fields!(body; "what": NameOf(e.what), "reason": NameOf(e.reason),
            "lasted_ns": lasted(e.from_ns.to_native(), e.until_ns.to_native()), "from_ns": e.from_ns,
            "until_ns": e.until_ns, "found_gone": e.found_gone),
        Detail::Conntrack(e) => fields!(body; "is_full": e.is_full, "entries": e.entries, "entries_max": e.entries_max,
            "dropped": known(e.dropped), "early_dropped": known(e.early_dropped),
            "top_address": if e.looked_at.to_native() == 0 { Value::Null } else { Address(e.top_address).into_value(body) },
            "top_entries": e.top_entries, "looked_at": e.looked_at),
        Detail::Trouble(e) => fields!(body; "what": NameOf(e.what), "place": NameOf(e.place), "comm": NameOf(e.comm),
            "value": e.value, "limit": e.limit, "is_over": e.is_over, "since_ns": e.since_ns,
            "lasted_ns": lasted(e.since_ns.to_native(), event.time_ns.to_native())),
        Detail::LogLines(e) => {
            let lines = e.lines.iter().filter_map(|line| body.name(line.to_native()));
            fields!(body; "lines": Value::from(lines.collect::<Vec<_>>()))
        }
        Detail::Curve(e) => {
            let memory: Vec<u64> = e.points.iter().map(|point| u64::from(point.memory_kib.to_native()) << 10).collect();
            let cpu: Vec<u16> = e.points.iter().map(|point| point.cpu_milli.to_native()).collect();
            let throttled: Vec<u8> = e.points.iter().map(|point| point.throttled).collect();
            let seen = crate::correlate::curve_summary(e);
            let of = |get: fn(&crate::correlate::CurveSummary) -> Value| seen.as_ref().map_or(Value::Null, get);
            fields!(body; "cgroup": NameOf(e.cgroup), "limit_bytes": e.limit_bytes, "interval_ns": e.interval_ns,
                "shape": of(|seen| Value::from(seen.shape.name())),
                "growth_per_hour_bytes": of(|seen| Value::from(seen.growth_per_hour)),
                "first_bytes": of(|seen| Value::from(seen.first_bytes)),
                "last_bytes": of(|seen| Value::from(seen.last_bytes)),
                "peak_bytes": of(|seen| Value::from(seen.peak_bytes)),
                "memory_bytes": Value::from(memory), "cpu_milli": Value::from(cpu),
                "throttled_percent": Value::from(throttled))
        }
        Detail::CgroupUse(e) => {
            let members = e.members.iter().map(|member| {
                let path = body.name(member.cgroup.to_native()).unwrap_or_default();
                Value::from(format!("{path} {}", human_bytes(member.usage_bytes.to_native())))
            });
            fields!(body; "cgroup": NameOf(e.cgroup), "height": e.height, "usage_bytes": e.usage_bytes,
                "limit_bytes": e.limit_bytes, "anon_bytes": e.anon_bytes, "file_bytes": e.file_bytes,
                "shmem_bytes": e.shmem_bytes, "kernel_bytes": e.kernel_bytes, "window_ns": e.window_ns,
                "periods": e.periods, "throttled": e.throttled, "throttled_us": e.throttled_us,
                "limit_hits": e.limit_hits, "oom_kills": e.oom_kills, "members": Value::from(members.collect::<Vec<_>>()),
                "full_mount": NameOf(e.full_mount), "full_mount_bytes": e.full_mount_bytes)
        }
    }
}

/// Values of a list that a line shows.
const SHOWN_MAX: usize = 32;

/// The fields on one line: sizes and durations as people write them, nothing that is 0, false or empty.
pub fn event_text(fields: &Fields) -> String {
    let mut line = String::new();
    for (key, value) in fields {
        let shown = match value {
            Value::Bool(false) | Value::Null => continue,
            Value::Bool(true) => {
                let _ = write!(line, "{}{}", if line.is_empty() { "" } else { " " }, key.trim_start_matches("is_"));
                continue;
            }
            Value::Number(number) if number.as_u64() == Some(0) && *key != "exit_code" => continue,
            Value::Number(number) if SINCE_BOOT.contains(key) && number.as_u64().is_some_and(|ns| ns < MOMENT_MIN) => {
                continue;
            }
            Value::Number(number) => match number.as_u64() {
                Some(u64::MAX) => "unlimited".to_owned(),
                Some(bytes) if key.ends_with("bytes") => human_bytes(bytes),
                Some(ns) if key.ends_with("_ns") && ns < MOMENT_MIN => human_duration(ns),
                Some(ns) if key.ends_with("_ns") => super::rfc3339(ns),
                _ => number.to_string(),
            },
            Value::String(text) if text.is_empty() => continue,
            Value::String(text) => text.clone(),
            // Half an hour of samples is no line for people; JSON has them.
            Value::Array(values) if values.len() > SHOWN_MAX => format!("[{} values]", values.len()),
            other => other.to_string(),
        };
        let key = key.trim_end_matches("_bytes").trim_end_matches("_ns");
        let quote = if shown.contains(' ') { "\"" } else { "" };
        let _ = write!(line, "{}{key}={quote}{shown}{quote}", if line.is_empty() { "" } else { " " });
    }
    line
}

/// An event on one line of a list.
pub fn event_row(style: Style, event: &Event) -> String {
    let entity = event.entity.as_ref();
    let (name, node) = entity.map_or(("", ""), |entity| (entity.name.as_str(), entity.node.as_str()));
    let pid = if event.pid == 0 { String::new() } else { format!(" pid={}", event.pid) };
    let is_lethal = event.lane == "lethal";
    let kind = format!("{:<16}", clean(&event.kind));
    format!(
        "{} {:<12} {:<28} {} {}{pid}\n",
        style.dim(&for_people(event.time_ns)),
        clean(node),
        clean(name),
        if is_lethal { style.bold(&kind) } else { kind },
        clean(&event.text),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_since_1970_are_shown_those_since_boot_are_not() {
        let fields: Fields = vec![
            ("what", Value::from("stopped")),
            ("since_ns", Value::from(54_540_000_000_000_u64)),
            ("lasted_ns", Value::from(60_000_000_000_u64)),
        ];
        assert_eq!(event_text(&fields), "what=stopped lasted=\"60.0 s\"");
        let since: Fields = vec![("since_ns", Value::from(1_700_000_000_000_000_000_u64))];
        assert_eq!(event_text(&since), "since=2023-11-14T22:13:20.000000000Z");
        assert_eq!((lasted(0, 9), lasted(4, 9)), (Value::from(0), Value::from(5)));
    }
}
