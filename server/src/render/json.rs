//! The JSON form: keys that do not change, times in RFC 3339, ids that exceed 53 bits as text.

use serde_json::{Value, json};
use tapio_wire::program::units::human_bytes;
use tapio_wire::service::{
    Death, EntityRef, EpochStatus, Event, Evidence, Finding, NodeStatus, RemoteRead, ServerStatus, Silence,
    SourceLedger, StatusResponse, Unanswered,
};

use super::deliveries::delivery;
use super::time::rfc3339;

fn entity(entity: Option<&EntityRef>) -> Value {
    entity.map_or(Value::Null, |entity| {
        json!({
            "id": format!("{:016x}", entity.id),
            "kind": entity.kind,
            "name": entity.name,
            "node": entity.node,
            "pod_uid": entity.pod_uid,
            "container_id": entity.container_id,
            "cgroup": entity.cgroup,
            "namespace": entity.namespace,
            "pod": entity.pod,
            "container": entity.container,
            "image": entity.image,
            "workload": entity.workload,
        })
    })
}

fn evidence(evidence: &Evidence) -> Value {
    json!({
        "id": evidence.id,
        "step": evidence.step,
        "time": rfc3339(evidence.time_ns),
        "kind": evidence.kind,
        "text": evidence.text,
        "entity": entity(evidence.entity.as_ref()),
        "pid": evidence.pid,
        "caused_by": evidence.caused_by,
    })
}

fn death(death: &Death) -> Value {
    json!({
        "pid": death.pid,
        "comm": death.comm,
        "exit_code": death.exit_code,
        "signal": death.signal,
        "signal_name": death.signal_name,
        "sender": death.sender.as_ref().map(|sender| json!({
            "pid": sender.pid,
            "comm": sender.comm,
            "entity": entity(sender.entity.as_ref()),
            "kernel": sender.kernel,
        })),
        "limit": death.limit.as_ref().map(|limit| json!({
            "cgroup": limit.cgroup,
            "limit_bytes": limit.limit_bytes,
            "usage_bytes": limit.usage_bytes,
            "hit": limit.hit,
        })),
        "label": death.label,
        "label_agrees": death.label_agrees,
        "verdict": death.verdict,
    })
}

/// A finding on one line.
pub fn finding_json(finding: &Finding) -> String {
    finding_value(finding).to_string()
}

/// An event of the archive.
pub fn event_value(event: &Event) -> Value {
    let mut value = json!({
        "id": event.id,
        "time": rfc3339(event.time_ns),
        "boottime_ns": event.boottime_ns,
        "kind": event.kind,
        "source": event.source,
        "lane": event.lane,
        "entity": entity(event.entity.as_ref()),
        "pid": event.pid,
        "text": event.text,
        "detail": serde_json::from_str(&event.detail_json).unwrap_or(Value::Null),
    });
    // An archive that is read without a server says nothing of it.
    if !event.cluster.is_empty() {
        value["cluster"] = event.cluster.as_str().into();
    }
    value
}

/// A finding.
pub fn finding_value(finding: &Finding) -> Value {
    let loss = finding.loss.unwrap_or_default();
    json!({
        "id": finding.id,
        "pattern": finding.pattern,
        "title": finding.title,
        "summary": finding.summary,
        "severity": finding.severity,
        "confidence": finding.confidence,
        "entity": entity(finding.entity.as_ref()),
        "started_at": rfc3339(finding.started_ns),
        "ended_at": rfc3339(finding.ended_ns),
        "evidence": finding.evidence.iter().map(evidence).collect::<Vec<_>>(),
        "loss": { "events": loss.events, "open_interval": loss.open_interval },
        "advice": finding.advice,
        "death": finding.death.as_ref().map(death),
        "count": finding.count,
        "possible": finding.possible,
        "missing_servers": finding.missing_servers,
        "cluster": finding.cluster,
        "ongoing": finding.ongoing,
        "resolved_at": (finding.resolved_ns > 0).then(|| rfc3339(finding.resolved_ns)),
        "consequences": finding.consequences.iter().map(|consequence| json!({
            "id": consequence.id,
            "pattern": consequence.pattern,
            "title": consequence.title,
            "entity": entity(consequence.entity.as_ref()),
            "started_at": rfc3339(consequence.started_ns),
        })).collect::<Vec<_>>(),
        "withdrawn": finding.withdrawn,
        "superseded_by": finding.superseded_by,
        "silence": finding.silence.as_ref().map(silence_value),
        "acknowledged": finding.acknowledged.as_ref().map(silence_value),
        "revision": finding.revision,
        "published_at": rfc3339(finding.published_ns),
        "last_boottime_ns": finding.last_boottime_ns,
    })
}

/// A silence or an acknowledgement.
pub fn silence_value(silence: &Silence) -> Value {
    json!({
        "id": silence.id,
        "pattern": silence.pattern,
        "namespace": silence.namespace,
        "workload": silence.workload,
        "finding": silence.finding,
        "since": rfc3339(silence.since_ns),
        "until": rfc3339(silence.until_ns),
        "reason": silence.reason,
        "by": silence.by,
        "ended_at": (silence.ended_ns > 0).then(|| rfc3339(silence.ended_ns)),
        "ended_by": silence.ended_by,
    })
}

fn source(source: &SourceLedger) -> Value {
    json!({
        "source": source.source,
        "emitted": source.emitted,
        "archived": source.archived,
        "held": source.held,
        "unexplained": source.unexplained,
        "inherited": source.inherited,
        "elsewhere": source.elsewhere,
        "dropped": source.dropped.iter().map(|loss| json!({
            "stage": loss.stage, "reason": loss.reason, "events": loss.events,
        })).collect::<Vec<_>>(),
    })
}

fn epoch(epoch: &EpochStatus) -> Value {
    json!({
        "epoch": format!("{:x}", epoch.epoch),
        "durable_seq": epoch.durable_seq,
        "state": epoch.state,
        "last_frame_at": rfc3339(epoch.last_frame_ns),
        "sources": epoch.sources.iter().map(source).collect::<Vec<_>>(),
    })
}

fn node(node: &NodeStatus) -> Value {
    json!({
        "node": node.node,
        "node_id": format!("{:016x}", node.node_id),
        "connected": node.connected,
        "server": node.server,
        "off": node.off.iter().map(|off| json!({"source": off.source, "reason": off.reason})).collect::<Vec<_>>(),
        "epochs": node.epochs.iter().map(epoch).collect::<Vec<_>>(),
    })
}

/// The status on one line.
pub fn status_json(status: &StatusResponse) -> String {
    status_value(status).to_string()
}

/// The status.
pub fn status_value(status: &StatusResponse) -> Value {
    let mut value = own_status_value(status);
    if let Value::Object(value) = &mut value {
        let server = |server: &ServerStatus| {
            json!({
                "server": server.server,
                "address": server.address,
                "ready": server.ready,
                "findings": server.findings,
                "revision": server.revision,
                "alone": server.alone,
                "leads": server.leads,
                "healing_ns": server.healing_ns,
                "log_trouble": server.log_trouble,
                "log_short_ns": server.log_short_ns,
            })
        };
        value.insert("servers".into(), status.servers.iter().map(server).collect());
        value.insert("incomplete".into(), incomplete_value(&status.incomplete));
    }
    value
}

/// Servers whose part is missing in an answer.
pub fn incomplete_value(incomplete: &[Unanswered]) -> Value {
    let server = |missing: &Unanswered| {
        json!({
            "server": missing.server,
            "reason": missing.reason,
            "since": if missing.since_ns == 0 { Value::Null } else { rfc3339(missing.since_ns).into() },
            "nodes": missing.nodes,
        })
    };
    incomplete.iter().map(server).collect()
}

/// What an answer took from a remote archive.
pub fn remote_value(read: &RemoteRead) -> Value {
    json!({ "read_bytes": read.read_bytes, "segments": read.segments, "archive_bytes": read.archive_bytes })
}

/// The same for people.
pub fn remote_read(read: &RemoteRead) -> String {
    let (came, all) = (human_bytes(read.read_bytes), human_bytes(read.archive_bytes));
    format!("Read {came} from archive.remote, which has {all} of that time in {} segments.", read.segments)
}

fn own_status_value(status: &StatusResponse) -> Value {
    json!({
        "ready": status.ready,
        "not_ready_reason": status.not_ready_reason,
        "revision": status.revision,
        "uptime_ns": status.uptime_ns,
        "events_correlated": status.events_correlated,
        "findings": status.findings,
        "unexplained_events": status.unexplained_events,
        "elsewhere": status.elsewhere.iter().map(|count| json!({
            "kind": count.kind, "source": count.source, "events": count.events,
        })).collect::<Vec<_>>(),
        "nodes": status.nodes.iter().map(node).collect::<Vec<_>>(),
        "deliveries": status.deliveries.iter().map(delivery).collect::<Vec<_>>(),
        "archive": status.archive.as_ref().map(|archive| json!({
            "disk": archive.disk,
            "segments": archive.segments,
            "bytes": archive.bytes,
            "frames": archive.frames,
            "events": archive.events,
            "lethal_events": archive.lethal_events,
            "duplicates": archive.duplicates,
            "quarantined": archive.quarantined,
        })),
        "events_by_kind": status.kinds.iter().map(|count| (count.kind.clone(), Value::from(count.events)))
            .collect::<serde_json::Map<_, _>>(),
        "shards": status.shards.iter().map(|shard| json!({
            "shard": shard.shard,
            "core": shard.core,
            "events": shard.events,
            "entities": shard.entities,
            "evicted": shard.evicted,
        })).collect::<Vec<_>>(),
    })
}
