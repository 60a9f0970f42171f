//! What a server has archived, as text: the events of entities by the names that they were described with.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use tapio_wire::event::{ArchivedBody, ArchivedDetail, ArchivedEvent};
use tapio_wire::frame::Frame;
use tapio_wire::segment::{Found, SEGMENT_HEADER_BYTES, SegmentRecordKind, find_record, parse_segment_header};

/// Everything that was archived so far.
#[derive(Default)]
pub struct Archive {
    names: HashMap<u64, String>,
    events: Vec<(u64, String)>,
}

impl Archive {
    /// Reads every segment of a folder, in order.
    pub fn read(folder: &Path) -> Self {
        let mut archive = Self::default();
        let mut paths: Vec<_> = fs::read_dir(folder).expect("an archive").flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths.iter().filter(|path| path.to_string_lossy().contains(".segment")) {
            // One that was renamed in between is read at the next look.
            let Ok(bytes) = fs::read(path) else { continue };
            let Some(number) = parse_segment_header(&bytes) else { continue };
            let mut offset = SEGMENT_HEADER_BYTES;
            while let Found::Record { kind, bytes: record, size } = find_record(&bytes[offset..], number, offset as u64)
            {
                if kind == SegmentRecordKind::Frame
                    && let Ok(frame) = Frame::decode(record)
                {
                    archive.add(frame.body());
                }
                offset += size;
            }
        }
        archive
    }

    fn add(&mut self, body: &ArchivedBody) {
        for entity in body.entities.iter() {
            self.names.insert(entity.id.to_native(), entity.name.to_string());
        }
        self.events.extend(body.events.iter().map(|event| (event.entity.to_native(), text(body, event))));
    }

    /// The first event of a named entity whose text has all `parts`.
    pub fn find(&self, name: impl Fn(&str) -> bool, parts: &[&str]) -> Option<String> {
        self.texts(name).into_iter().find(|text| parts.iter().all(|part| text.contains(part))).map(str::to_owned)
    }

    /// All events of a named entity.
    pub fn texts(&self, name: impl Fn(&str) -> bool) -> Vec<&str> {
        let is_named = |entity: &u64| self.names.get(entity).is_some_and(|known| name(known));
        self.events.iter().filter(|(entity, _)| is_named(entity)).map(|(_, text)| &**text).collect()
    }
}

fn text(body: &ArchivedBody, event: &ArchivedEvent) -> String {
    let name = |index: u32| body.name(index).unwrap_or("");
    match &event.body {
        ArchivedDetail::ContainerState(state) => format!(
            "container_state state={} reason={} exit={} last={} image={}",
            state.state,
            name(state.reason.to_native()),
            state.exit_code.to_native(),
            state.is_last,
            name(state.image.to_native())
        ),
        ArchivedDetail::PodState(pod) => format!(
            "pod_state {} reason={} deleted={} gone={}",
            name(pod.phase.to_native()),
            name(pod.reason.to_native()),
            pod.deletion_ns.to_native() > 0,
            pod.is_gone
        ),
        ArchivedDetail::KubeEvent(event) => {
            format!("kube_event {} {}", name(event.reason.to_native()), name(event.message.to_native()))
        }
        ArchivedDetail::NodeCondition(condition) => {
            format!("node_condition {} status={}", name(condition.condition.to_native()), condition.status)
        }
        ArchivedDetail::Rollout(rollout) => format!(
            "rollout kind={} images={} before={} reason={}",
            name(rollout.kind.to_native()),
            name(rollout.images.to_native()),
            name(rollout.images_before.to_native()),
            name(rollout.reason.to_native())
        ),
        ArchivedDetail::Exit(exit) => {
            format!("exit status={} comm={}", exit.status.to_native(), name(exit.comm.to_native()))
        }
        ArchivedDetail::Signal(signal) => {
            format!("signal signal={} by={}", signal.signal.to_native(), name(signal.sender_comm.to_native()))
        }
        _ => event.kind().name().to_owned(),
    }
}
