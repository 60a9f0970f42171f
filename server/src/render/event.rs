//! An archived event, for people and as JSON.
//!
//! What enters: an event of a checked frame, whose texts may be hostile. What leaves: the fields of its kind by name, and a
//! line made of them. Control characters are left to whoever prints.

use std::fmt::Write;
use std::net::Ipv6Addr;

use serde_json::Value;
use tapio_wire::event::{ArchivedBody, ArchivedCurve, ArchivedDetail, ArchivedEvent, FieldValue, Kind, NO_NAME};
use tapio_wire::program::units::{human_bytes, human_duration};
use tapio_wire::service::Event;
use tapio_wire::wait_status::{Ending, ending};

use super::layout::{Style, clean, padded};
use super::time::for_people;
use crate::findings::text;

/// The fields of an event's kind, the most informative first.
pub type Fields = Vec<(&'static str, Value)>;

fn address(address: [u8; 16]) -> Value {
    let address = Ipv6Addr::from(address);
    Value::from(address.to_ipv4_mapped().map_or_else(|| address.to_string(), |v4| v4.to_string()))
}

/// A field as it is declared. Names and entities that are not set are left out.
fn plain(body: &ArchivedBody, value: FieldValue) -> Value {
    match value {
        FieldValue::Unsigned(number) => Value::from(number),
        FieldValue::Signed(number) => Value::from(number),
        FieldValue::Flag(flag) => Value::from(flag),
        FieldValue::Name(name) => body.name(name).map_or(Value::Null, Value::from),
        FieldValue::Entity(0) | FieldValue::Parts => Value::Null,
        FieldValue::Entity(id) => Value::from(format!("{id:016x}")),
        FieldValue::Address(bytes) => address(bytes),
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

/// What a number stands for.
fn word(words: &[&'static str], number: u8) -> Value {
    Value::from(words.get(usize::from(number)).copied().unwrap_or("unknown"))
}

fn signal(number: u32) -> Fields {
    vec![("signal_name", Value::from(text::signal_name(number))), ("signal", Value::from(number))]
}

fn status(status: u32) -> Fields {
    match ending(status) {
        Ending::Exited(code) => vec![("exit_code", Value::from(code))],
        Ending::Killed(number) => signal(number),
    }
}

fn curve(curve: &ArchivedCurve) -> Fields {
    let memory: Vec<u64> = curve.points.iter().map(|point| u64::from(point.memory_kib.to_native()) << 10).collect();
    let cpu: Vec<u16> = curve.points.iter().map(|point| point.cpu_milli.to_native()).collect();
    let throttled: Vec<u8> = curve.points.iter().map(|point| point.throttled).collect();
    let seen = crate::correlate::curve_summary(curve);
    let of = |get: fn(&crate::correlate::CurveSummary) -> Value| seen.as_ref().map_or(Value::Null, get);
    vec![
        ("shape", of(|seen| Value::from(seen.shape.name()))),
        ("growth_per_hour_bytes", of(|seen| Value::from(seen.growth_per_hour))),
        ("first_bytes", of(|seen| Value::from(seen.first_bytes))),
        ("last_bytes", of(|seen| Value::from(seen.last_bytes))),
        ("peak_bytes", of(|seen| Value::from(seen.peak_bytes))),
        ("memory_bytes", Value::from(memory)),
        ("cpu_milli", Value::from(cpu)),
        ("throttled_percent", Value::from(throttled)),
    ]
}

/// Enough for the fields of most kinds.
const FIELDS: usize = 20;

/// Order of a kind's fields: these first, then the others as they are declared, but not the hidden ones.
struct Order {
    first: &'static [&'static str],
    hidden: &'static [&'static str],
}

fn order(kind: Kind) -> Order {
    let (first, hidden): (&[_], &[_]) = match kind {
        Kind::Exec => (&["comm", "path", "arguments"], &["role"]),
        Kind::Exit => (&["comm", "status", "parent_pid", "ns_pid", "ns_level", "start_time_ns"], &["role"]),
        Kind::Oom => (
            &[
                "comm",
                "limit_cgroup",
                "limit_bytes",
                "usage_bytes",
                "anon_rss_bytes",
                "file_rss_bytes",
                "shmem_rss_bytes",
                "total_vm_bytes",
                "limit_height",
                "oom_score_adj",
                "allocator_comm",
                "allocator_pid",
                "allocator_entity",
            ],
            &["ns_level", "role", "allocator_inside"],
        ),
        Kind::Signal => (
            &[
                "signal",
                "comm",
                "from_kernel",
                "sender_comm",
                "sender_pid",
                "sender_parent",
                "sender_entity",
                "code",
                "result",
            ],
            &["role", "over_cpu_limit", "repeats"],
        ),
        Kind::Tcp => (&["change", "source", "source_port", "destination", "destination_port", "active"], &[]),
        Kind::SyscallError => (&["syscall", "errno"], &[]),
        Kind::Dns => (&["name"], &[]),
        Kind::Fork => (&["comm"], &[]),
        Kind::SignalDelivered => (&["signal", "comm"], &[]),
        Kind::Histogram => (&["measure", "operation", "device", "max_ns", "total_ns"], &[]),
        Kind::PodState => (&["phase", "reason", "message", "is_ready", "is_scheduled", "is_gone"], &[]),
        Kind::ContainerState => (
            &[
                "container",
                "state",
                "reason",
                "message",
                "exit_code",
                "signal",
                "restart_count",
                "image",
                "is_last",
                "is_ready",
                "memory_limit_bytes",
                "cpu_limit_milli",
                "role",
            ],
            &[],
        ),
        Kind::KubeEvent => {
            (&["reason", "message", "kind", "namespace", "name", "field_path", "component", "count", "is_warning"], &[])
        }
        Kind::NodeCondition => (&["condition", "status"], &[]),
        Kind::Rollout => (&[], &["observed_generation"]),
        Kind::ConfigChange => (&[], &["used_by"]),
        Kind::Endpoints => (&[], &["cluster_addresses", "ports"]),
        Kind::UnitState => (&[], &["main_exited_ns"]),
        // Shown behind the user's id.
        Kind::Observation => (&[], &["process_entity"]),
        Kind::Conntrack => (&["is_full"], &[]),
        Kind::Trouble => (&["what", "place", "comm", "value", "limit", "is_over"], &[]),
        _ => (&[], &[]),
    };
    Order { first, hidden }
}

/// The fields of an event's kind, as its declaration in [`tapio_wire::event`] names them. `order` and `instead` say what differs.
pub fn event_fields(body: &ArchivedBody, event: &ArchivedEvent) -> Fields {
    let Order { first, hidden } = order(event.kind());
    let mut declared = Vec::with_capacity(FIELDS);
    event.each_field(&mut |name, value| {
        if !hidden.contains(&name) {
            let place = first.iter().position(|known| *known == name).unwrap_or(first.len());
            declared.push((place, name, value));
        }
    });
    declared.sort_by_key(|(place, ..)| *place);
    let mut fields = Fields::with_capacity(FIELDS);
    for (_, name, value) in declared {
        match instead(body, event, name, value) {
            Some(instead) => fields.extend(instead),
            None => fields.push((name, plain(body, value))),
        }
    }
    fields.retain(|(_, value)| !value.is_null());
    fields
}

/// What is shown instead of a field, where that is not its own name and value.
fn instead(body: &ArchivedBody, event: &ArchivedEvent, name: &str, value: FieldValue) -> Option<Fields> {
    use ArchivedDetail as Detail;
    let lasted_since = |from_ns: u64| lasted(from_ns, event.time_ns.to_native());
    Some(match (&event.body, name) {
        // Of some it is not known when they began.
        (Detail::Exit(e), "start_time_ns") => vec![("lived_ns", lasted_since(e.start_time_ns.to_native()))],
        (Detail::Exit(e), "status") => status(e.status.to_native()),
        (Detail::Signal(e), "signal") => signal(e.signal.to_native()),
        (Detail::Signal(e), "sender_parent") => {
            let parent = e.sender_parent.to_native().checked_sub(1);
            vec![("sender_parent", plain(body, FieldValue::Name(parent.unwrap_or(NO_NAME))))]
        }
        (Detail::SignalDelivered { signal: number, .. }, "signal") => signal(number.to_native()),
        (Detail::Tcp(e), "change") => vec![("change", tcp_change(e.change))],
        (Detail::Histogram(e), "measure") => vec![("measure", Value::from(e.measure.get().name()))],
        (Detail::Histogram(e), "counts") => {
            vec![("counts", e.counts.iter().map(|count| count.to_native()).collect())]
        }
        (Detail::ContainerState(e), "state") => {
            vec![("state", word(&["unknown", "waiting", "running", "terminated"], e.state))]
        }
        (Detail::NodeCondition(e), "status") => vec![("status", word(&["false", "true"], e.status))],
        (Detail::ConfigChange(e), "change") => {
            vec![("change", word(&["unknown", "made", "changed", "gone"], e.change))]
        }
        // An event has a kind of its own.
        (Detail::KubeEvent(_) | Detail::Rollout(_) | Detail::ConfigChange(_) | Detail::ObjectState(_), "kind") => {
            vec![("object", plain(body, value))]
        }
        (Detail::Endpoints(e), "backends") => {
            let ready = e.backends.iter().filter(|backend| backend.is_ready).count();
            vec![("backends", Value::from(e.backends.len())), ("ready", Value::from(ready))]
        }
        (Detail::Observation(e), "process_uid") => vec![
            ("process_uid", plain(body, value)),
            ("process_entity", plain(body, FieldValue::Entity(e.process_entity.to_native()))),
        ],
        (Detail::Gap(e), "from_ns") => {
            let lasted = lasted(e.from_ns.to_native(), e.until_ns.to_native());
            vec![("lasted_ns", lasted), ("from_ns", plain(body, value))]
        }
        // The kernel does not report it.
        (Detail::Conntrack(_), "dropped" | "early_dropped") if value == FieldValue::Unsigned(u64::MAX) => vec![],
        (Detail::Conntrack(e), "top_address") if e.looked_at.to_native() == 0 => vec![],
        (Detail::Trouble(e), "since_ns") => {
            vec![("since_ns", plain(body, value)), ("lasted_ns", lasted_since(e.since_ns.to_native()))]
        }
        (Detail::LogLines(e), "lines") => {
            vec![("lines", e.lines.iter().filter_map(|line| body.name(line.to_native())).collect())]
        }
        (Detail::Curve(e), "points") => curve(e),
        (Detail::CgroupUse(e), "members") => {
            let members = e.members.iter().map(|member| {
                let path = body.name(member.cgroup.to_native()).unwrap_or_default();
                format!("{path} {}", human_bytes(member.usage_bytes.to_native()))
            });
            vec![("members", members.collect())]
        }
        _ => return None,
    })
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
    let kind = padded(&clean(&event.kind), 16);
    format!(
        "{} {} {} {} {}{pid}\n",
        style.dim(&for_people(event.time_ns)),
        padded(&clean(node), 12),
        padded(&clean(name), 28),
        if is_lethal { style.bold(&kind) } else { kind },
        clean(&event.text),
    )
}

#[cfg(test)]
mod tests {
    use tapio_wire::frame::Frame;
    use tapio_wire::service::EntityRef;
    use unicode_width::UnicodeWidthStr;

    use super::*;

    #[test]
    fn events_of_wide_names_are_aligned() {
        let row = |name: &str| {
            let entity = EntityRef { name: name.into(), node: name.into(), ..EntityRef::default() };
            let event = Event { entity: Some(entity), kind: name.into(), text: "text".into(), ..Event::default() };
            event_row(Style { colour: false }, &event)
        };
        assert_eq!(row("日本").width(), row("web-").width());
    }

    #[test]
    fn the_order_names_no_field_that_is_not_declared() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../wire/tests/golden/fields-v3.bin");
        let frame = Frame::decode(&std::fs::read(path).expect("an event of every kind")).expect("sound");
        for event in frame.body().events.iter() {
            let mut declared = Vec::new();
            event.each_field(&mut |name, _| declared.push(name));
            let Order { first, hidden } = order(event.kind());
            for name in first.iter().chain(hidden) {
                assert!(declared.contains(name), "{} has no field {name}", event.kind().name());
            }
        }
    }

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
