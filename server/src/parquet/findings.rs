//! The table of findings.
//!
//! What enters: findings as the store or a replay has them. What leaves: a row for each, in the hour in which it ended. What must
//! hold: a finding that changed is a new row with a higher revision; readers take the latest.

use std::sync::Arc;

use tapio_wire::service::{EntityRef, Finding};

use super::schema::FINDINGS;
use super::table::{HOUR_NS, Partitions, Written};
use super::{ExportError, SegmentTables};

const fn at(name: &str) -> usize {
    FINDINGS.column(name)
}

/// Writes findings to files. Those of an hour are ended before the next: a store may have findings of any number of hours, and
/// open files are bounded.
pub(super) fn write(shared: &mut SegmentTables, found: &[Arc<Finding>]) -> Result<Vec<Written>, ExportError> {
    let mut sorted: Vec<&Finding> = found.iter().map(Arc::as_ref).collect();
    sorted.sort_by_key(|finding| finding.ended_ns / HOUR_NS);
    let mut files = Vec::new();
    for of_hour in sorted.chunk_by(|a, b| a.ended_ns / HOUR_NS == b.ended_ns / HOUR_NS) {
        let mut partitions = Partitions::new(&FINDINGS)?;
        for finding in of_hour {
            let hour = partitions.hour(finding.ended_ns);
            row(&mut partitions, shared, hour, finding)?;
            if partitions.batch(&shared.place, hour)?.is_full() {
                partitions.flush(hour, &shared.texts, &mut shared.encoder)?;
            }
        }
        files.extend(partitions.finish(&shared.place, &shared.texts, &mut shared.encoder)?);
    }
    Ok(files)
}

fn row(rows: &mut Partitions, shared: &mut SegmentTables, hour: u64, finding: &Finding) -> Result<(), ExportError> {
    let nothing = EntityRef::default();
    let entity = finding.entity.as_ref().unwrap_or(&nothing);
    let death = finding.death.as_ref();
    let limit = death.and_then(|death| death.limit.as_ref());
    let sender = death.and_then(|death| death.sender.as_ref());
    let sender_name = sender.map(|sender| match &sender.entity {
        _ if sender.kernel => "the kernel",
        Some(entity) if !entity.name.is_empty() => entity.name.as_str(),
        _ => sender.comm.as_str(),
    });
    let end = finding.evidence.iter().find(|piece| piece.kind == "exit");
    let evidence: Vec<_> = finding
        .evidence
        .iter()
        .map(|piece| serde_json::json!({ "id": piece.id, "step": piece.step, "kind": piece.kind, "text": piece.text }))
        .collect();
    let texts: Vec<(usize, u32)> = [
        (at("id"), finding.id.as_str()),
        (at("pattern"), &finding.pattern),
        (at("title"), &finding.title),
        (at("severity"), &finding.severity),
        (at("node"), &entity.node),
        (at("namespace"), &entity.namespace),
        (at("workload"), &entity.workload),
        (at("pod"), &entity.pod),
        (at("container"), &entity.container),
        (at("entity"), &entity.name),
        (at("entity_kind"), &entity.kind),
        (at("pod_uid"), &entity.pod_uid),
        (at("image"), &entity.image),
        (at("missing_servers"), &finding.missing_servers.join(", ")),
        (at("verdict"), death.map_or("", |death| &death.verdict)),
        (at("label"), death.map_or("", |death| &death.label)),
        (at("sender"), sender_name.unwrap_or_default()),
        (at("limit_cgroup"), limit.map_or("", |limit| &limit.cgroup)),
        (at("summary"), &finding.summary),
        (at("advice"), &finding.advice.join("\n")),
        (at("death_id"), end.map_or("", |piece| &piece.id)),
        (at("evidence"), &serde_json::Value::Array(evidence).to_string()),
        (at("superseded_by"), &finding.superseded_by),
    ]
    .into_iter()
    .map(|(column, text)| (column, shared.texts.number(text)))
    .collect();
    let batch = rows.batch(&shared.place, hour)?;
    batch.row();
    texts.into_iter().for_each(|(column, text)| batch.text(column, text));
    let loss = finding.loss.as_ref();
    for (column, value) in [
        (at("time"), Some(finding.ended_ns)),
        (at("started_at"), Some(finding.started_ns)),
        (at("published_at"), Some(finding.published_ns)),
        (at("revision"), Some(finding.revision.into())),
        (at("count"), Some(finding.count.into())),
        (at("lost_events"), Some(loss.map_or(0, |loss| loss.events))),
        (at("resolved_at"), Some(finding.resolved_ns).filter(|&ns| ns != 0)),
        (at("exit_code"), death.and_then(|death| death.exit_code).map(u64::from)),
        (at("signal"), death.and_then(|death| death.signal).map(u64::from)),
        (at("limit_bytes"), limit.map(|limit| limit.limit_bytes)),
        (at("consequences"), Some(finding.consequences.len() as u64)),
    ] {
        if let Some(value) = value {
            batch.unsigned(column, value);
        }
    }
    batch.number(at("confidence"), finding.confidence);
    for (column, flag) in [
        (at("possible"), Some(finding.possible)),
        (at("loss_is_open"), Some(loss.is_some_and(|loss| loss.open_interval))),
        (at("ongoing"), Some(finding.ongoing)),
        (at("label_agrees"), death.and_then(|death| death.label_agrees)),
        (at("withdrawn"), Some(finding.withdrawn)),
    ] {
        if let Some(flag) = flag {
            batch.flag(column, flag);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::parquet::Exporter;

    #[test]
    fn each_of_many_hours_has_its_own_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let hours: Vec<u64> = (0..120).collect();
        let ended = |hour| (500_000 + hour) * HOUR_NS;
        let found = hours.iter().map(|&hour| Arc::new(Finding { ended_ns: ended(hour), ..Finding::default() }));
        let found: Vec<_> = found.collect();
        let files = Exporter::new("c", "s").findings(&found, "n", dir.path()).expect("written");
        let paths: BTreeSet<&str> = files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!((files.len(), paths.len()), (120, 120));
        assert!(files.iter().all(|file| file.rows == 1));
    }
}
