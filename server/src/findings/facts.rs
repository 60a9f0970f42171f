//! What a fact or a burst says, for people.
//!
//! What must hold: nothing is said that was not reported; what is missing is left out of the sentence.

use tapio_wire::program::units::{human_bytes, human_duration};

use super::text;
use crate::correlate::EntityInfo;
use crate::correlate::clue::{About, Burst, ClueKind, Fact, FactValue};

/// A trouble that lasts for less was reported when it began.
const REPORTED_AT_ONCE_NS: u64 = 1_000_000;

/// ` (message)`, or nothing.
fn because(fact: &Fact, field: &str) -> String {
    match fact.text(field) {
        "" => String::new(),
        text => format!(" ({text})"),
    }
}

fn object(fact: &Fact) -> String {
    let name = match (fact.text("object_namespace"), fact.text("object_name")) {
        ("", name) => name.to_owned(),
        (namespace, name) => format!("{namespace}/{name}"),
    };
    format!("{} {name}", fact.text("object_kind")).trim().to_owned()
}

/// What a fact says.
pub fn sentence(fact: &Fact, entity: &EntityInfo) -> String {
    let (reason, message) = (because(fact, "reason"), because(fact, "message"));
    match fact.kind {
        ClueKind::Delivered => {
            format!("{} reached {}", text::signal_name(fact.number("signal") as u32), fact.text("comm"))
        }
        ClueKind::PodState => format!("{entity} {}{reason}{message}", pod_state(fact)),
        ClueKind::ContainerState => {
            let code = if fact.text("state") == "terminated" {
                format!(" with code {}", fact.number("exit_code"))
            } else {
                String::new()
            };
            let restarts = text::count(fact.number("restart_count"), "restart");
            format!("kubelet says: {}{code}{reason}{message}, {restarts}", fact.text("state"))
        }
        ClueKind::KubeEvent => {
            let times = match fact.number("count") {
                0 | 1 => String::new(),
                count => format!(", said {count} times"),
            };
            let by = fact.text("component");
            let by = if by.is_empty() { "Kubernetes" } else { by };
            format!("{by} says {} of {}{message}{times}", fact.text("reason"), object(fact))
        }
        ClueKind::NodeCondition => {
            format!("the node's condition {} is {}{reason}{message}", fact.text("condition"), fact.text("status"))
        }
        ClueKind::Rollout => {
            let change = match (fact.text("images_before"), fact.text("images")) {
                ("", _) => String::new(),
                (before, images) => format!(" from {before} to {images}"),
            };
            let (ready, desired) = (fact.number("ready_replicas"), fact.number("desired"));
            format!("{} rolls out{change}: {ready} of {desired} ready{reason}{message}", object(fact))
        }
        ClueKind::ConfigChange => format!("{} was {}", object(fact), fact.text("change")),
        ClueKind::Endpoints => format!(
            "{} of {} of service {} are ready",
            fact.number("ready_backends"),
            text::count(fact.number("backends"), "backend"),
            object(fact)
        ),
        ClueKind::ObjectState => format!("{} is {}{reason}{message}", object(fact), fact.text("state")),
        ClueKind::UnitState => format!(
            "{} is {} ({}), result {}, {}",
            fact.text("unit"),
            fact.text("active_state"),
            fact.text("sub_state"),
            fact.text("result"),
            text::count(fact.number("restarts"), "restart")
        ),
        ClueKind::UnitJob => format!("the job of {} ended: {}", fact.text("unit"), fact.text("result")),
        ClueKind::Observation => observation(fact),
        ClueKind::Conntrack => conntrack(fact),
        ClueKind::CgroupUse => cgroup_use(fact),
        ClueKind::Trouble => trouble(fact),
        ClueKind::LogLines => format!("the last that it wrote: {}", fact.text("lines")),
        ClueKind::Curve => format!(
            "memory went from {} to {} within {}, at most {}: {}",
            human_bytes(fact.number("first")),
            human_bytes(fact.number("memory_usage")),
            human_duration(fact.number("lasted")),
            human_bytes(fact.number("memory_peak")),
            fact.text("shape")
        ),
        ClueKind::Gap if fact.text("reason").starts_with("flood") => {
            format!("{} of its process events were left out ({})", fact.number("found_gone"), fact.text("reason"))
        }
        // Of the node's collector: it could not deliver them.
        ClueKind::Gap if fact.text("what") == "frames" => {
            format!("{} events were lost on their way here: {}", fact.number("found_gone"), fact.text("reason"))
        }
        _ => format!("{} were not watched{reason} for {}", fact.text("what"), human_duration(fact.number("lasted"))),
    }
}

fn pod_state(fact: &Fact) -> String {
    if fact.is("gone") {
        "is gone".to_owned()
    } else if fact.is("deleting") {
        "is being deleted".to_owned()
    } else {
        format!("is {}, {}", fact.text("phase"), if fact.is("ready") { "ready" } else { "not ready" })
    }
}

fn observation(fact: &Fact) -> String {
    let mut parts = Vec::new();
    let bytes = |name| human_bytes(fact.number(name));
    if fact.get("memory_usage").is_some() {
        let limit =
            if fact.get("memory_limit").is_some() { format!(" of {}", bytes("memory_limit")) } else { String::new() };
        parts.push(format!("memory {}{limit}", bytes("memory_usage")));
    }
    if fact.get("memory_peak").is_some() {
        parts.push(format!("at most {}", bytes("memory_peak")));
    }
    if fact.number("limit_hits") > 0 {
        parts.push(format!("the limit was hit {}", text::count(fact.number("limit_hits"), "time")));
    }
    if fact.get("pids").is_some() {
        let limit =
            if fact.get("pids_limit").is_some() { format!(" of {}", fact.number("pids_limit")) } else { String::new() };
        parts.push(format!("{}{limit} processes", fact.number("pids")));
    }
    if fact.number("throttled") > 0 {
        let time = human_duration(fact.number("throttled_time"));
        parts.push(format!("throttled {} for {time}", text::count(fact.number("throttled"), "time")));
    }
    if fact.number("memory_pressure") > 0 {
        parts.push(format!("{} % of the time waiting for memory", fact.number("memory_pressure")));
    }
    if !fact.text("process_comm").is_empty() {
        let command = because(fact, "process_command");
        parts.push(format!("the other process is {}{command}", fact.text("process_comm")));
    }
    if parts.is_empty() { "nothing could be read".to_owned() } else { parts.join(", ") }
}

fn trouble(fact: &Fact) -> String {
    let lasted = human_duration(fact.number("lasted"));
    let is_over = fact.get("ended") == Some(&FactValue::Flag(true));
    let (who, place) = (fact.text("process_comm"), fact.text("place"));
    let of_pod = match fact.text("what") {
        "not-ready" => Some(format!("it runs and is not ready: {place}")),
        "init-runs" => Some(format!("init container {who} runs")),
        "pending" | "starting" => Some(format!("it has not started: {place}")),
        "terminating" => Some(format!("its time to end is over: {place}")),
        "stopped" => Some(format!("its first process {who} is stopped")),
        _ => None,
    };
    if let Some(text) = of_pod {
        return if is_over { format!("over after {lasted}: {text}") } else { format!("{text}, for {lasted}") };
    }
    let mut text = fact.text("what").to_owned();
    let (value, limit) = (fact.number("value"), fact.number("limit"));
    match fact.text("what") {
        // How many there are is read after one was refused, and some may be gone by then.
        "pids-at-limit" if is_over => {}
        "pids-at-limit" if limit > 0 => text += &format!(": one was refused; then {value} of {limit} were in use"),
        "memory-high" if limit > 0 => text += &format!(": {} of {}", human_bytes(value), human_bytes(limit)),
        "throttled" | "disk-full" | "inodes-full" | "disk-filling" | "inodes-filling" if limit > 0 => {
            text += &format!(": {value} %")
        }
        _ if limit > 0 => text += &format!(": {value} of {limit}"),
        _ if value > 0 => text += &format!(": {value}"),
        _ => {}
    }
    for (before, name) in [(" by ", "process_comm"), (" in ", "place")] {
        if !fact.text(name).is_empty() {
            text += &format!("{before}{}", fact.text(name));
        }
    }
    match is_over {
        true => format!("{text}, over after {lasted}"),
        // It is reported at once.
        false if fact.number("lasted") < REPORTED_AT_ONCE_NS => text,
        false => format!("{text}, for {lasted}"),
    }
}

fn cgroup_use(fact: &Fact) -> String {
    let mut parts = Vec::new();
    let names = [
        ("anon", "anonymous"),
        ("page_cache", "page cache"),
        ("shmem", "tmpfs and shared"),
        ("kernel_memory", "kernel"),
    ];
    let used: Vec<String> = names
        .into_iter()
        .filter(|(name, _)| fact.get(name).is_some())
        .map(|(name, what)| format!("{} {what}", human_bytes(fact.number(name))))
        .collect();
    if !used.is_empty() {
        parts.push(format!("memory of {}: {}", fact.text("limit_cgroup"), used.join(", ")));
    }
    if !fact.text("members").is_empty() {
        parts.push(format!("the biggest below it: {}", fact.text("members")));
    }
    if fact.number("throttled") > 0 {
        let (time, over) = (human_duration(fact.number("throttled_time")), human_duration(fact.number("over")));
        let times = text::count(fact.number("throttled"), "time");
        parts.push(format!("throttled {times} for {time} in the last {over}"));
    }
    if !fact.text("full_mount").is_empty() {
        parts.push(format!(
            "{} has no room left of {}",
            fact.text("full_mount"),
            human_bytes(fact.number("full_mount_size"))
        ));
    }
    if parts.is_empty() { "nothing could be read".to_owned() } else { parts.join("; ") }
}

fn conntrack(fact: &Fact) -> String {
    let (entries, entries_max) = (fact.number("entries"), fact.number("entries_max"));
    let room = if fact.is("full") { "is full" } else { "has room again" };
    let mut text = format!("the node's table of connections {room}: {entries} of {entries_max}");
    for (name, what) in [("dropped", "packets dropped"), ("early_dropped", "connections forgotten early")] {
        if fact.number(name) > 0 {
            text.push_str(&format!(", {} {what}", fact.number(name)));
        }
    }
    match (fact.text("talker"), fact.number("talker_share")) {
        ("", _) => {}
        (talker, share) => text.push_str(&format!("; {talker} has {share} % of them")),
    }
    text
}

/// What a burst says.
pub fn burst(burst: &Burst) -> String {
    let count = burst.count;
    let device = text::device(burst.about).map_or_else(String::new, |device| format!(" on device {device}"));
    let what = match (burst.kind, burst.about) {
        (ClueKind::ReclaimBurst, _) => "reclaims of memory at its own limit".to_owned(),
        (ClueKind::DirectReclaimBurst, _) => "reclaims of memory because the node ran short".to_owned(),
        (ClueKind::RefusedBurst, _) => format!("connections refused by {}", text::peer(burst)),
        (ClueKind::RetransmitBurst, _) => format!("retransmissions to {}", text::peer(burst)),
        (ClueKind::SynRetransmitBurst, _) => format!("attempts to connect to {} unanswered", text::peer(burst)),
        (ClueKind::SyscallErrorBurst, About::Errno { errno, .. }) => {
            format!("system calls failed with {}", text::errno_name(errno))
        }
        (ClueKind::SlowIoBurst, _) => format!("slow block I/Os{device}"),
        (ClueKind::IoErrorBurst, _) => format!("failed block I/Os{device}"),
        (ClueKind::PacketDropBurst, _) => match &burst.drop_reason {
            Some(reason) => format!("packets dropped ({reason})"),
            None => "packets dropped".to_owned(),
        },
        (ClueKind::DnsFailureBurst, About::Dns { rcode }) => {
            format!("DNS lookups failed ({})", text::rcode_name(rcode))
        }
        (ClueKind::SlowShare, About::Share { measure, total, .. }) => {
            let longest = human_duration(u64::from(burst.stall_us) * 1000);
            return format!("{count} of {total} were slow ({}{device}), the slowest took {longest}", measure.name());
        }
        _ => "long waits for a CPU".to_owned(),
    };
    let stall = match burst.stall_us {
        0 => String::new(),
        stall => format!(", {} of stall", human_duration(u64::from(stall) * 1000)),
    };
    let span = human_duration(u64::from(burst.span_ms.max(1)) * 1_000_000);
    format!("{count} {what} within {span}{stall}")
}
