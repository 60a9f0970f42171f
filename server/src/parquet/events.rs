//! The table of events: each event a row, sorted.
//!
//! What enters: decoded frames. What leaves: row groups. What must hold: every event of a frame is in just one row, and what waits
//! in memory is bounded.

use std::collections::HashMap;
use std::net::Ipv6Addr;

use foldhash::fast::RandomState;
use tapio_wire::event::{ArchivedBody, ArchivedDetail, ArchivedEvent, FieldValue, KINDS, Kind, Role};
use tapio_wire::frame::{Frame, Header};
use tapio_wire::wait_status::{Ending, ending};

use super::names::Known;
use super::pages::ROWS_MAX;
use super::schema::EVENTS;
use super::table::{NONE, Partitions, Written};
use super::{ExportError, SegmentTables};
use crate::archive::index::realtime_ns;
use crate::render;

/// Rows of all hours that wait at most.
const WAITING_MAX: usize = 4 * ROWS_MAX;
/// A name of a frame that no event has asked for yet.
const UNASKED: u32 = u32::MAX - 1;

const TIME: usize = EVENTS.column("time");
const KIND: usize = EVENTS.column("kind");
const SOURCE: usize = EVENTS.column("source");
const NODE: usize = EVENTS.column("node");
const NAMESPACE: usize = EVENTS.column("namespace");
const WORKLOAD: usize = EVENTS.column("workload");
const POD: usize = EVENTS.column("pod");
const CONTAINER: usize = EVENTS.column("container");
const ENTITY: usize = EVENTS.column("entity");
const ENTITY_KIND: usize = EVENTS.column("entity_kind");
const PID: usize = EVENTS.column("pid");
const EXIT_CODE: usize = EVENTS.column("exit_code");
const SIGNAL: usize = EVENTS.column("signal");
const DETAIL: usize = EVENTS.column("detail");
const POD_UID: usize = EVENTS.column("pod_uid");
const CONTAINER_ID: usize = EVENTS.column("container_id");
const NODE_ID: usize = EVENTS.column("node_id");
const EPOCH: usize = EVENTS.column("epoch");
const SEQ: usize = EVENTS.column("seq");
const IDX: usize = EVENTS.column("idx");
const SEGMENT: usize = EVENTS.column("segment");

/// What a role's number means.
pub(super) fn role(number: u8) -> &'static str {
    match Role::from_u8(number) {
        Role::Unknown => "",
        Role::First => "first",
        Role::Member => "member",
        Role::Session => "session",
        Role::Sandbox => "sandbox",
        Role::Runtime => "runtime",
    }
}

/// How a field becomes cells.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Put {
    /// The field is in `detail`, in another table, or says nothing without the node at hand.
    Nowhere,
    Plain(usize),
    /// 0 stands for "none".
    NotZero(usize),
    /// A moment by the node's clock since its boot.
    SinceBoot(usize),
    /// A duration from that moment since boot to the event.
    Lasted(usize),
    Word(usize, &'static [&'static str]),
    Role(usize),
    /// A status as `wait(2)` reports it.
    Status,
    /// A value of a container that has ended.
    IfEnded(usize),
}

const CHANGES: &[&str] = &[
    "",
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

/// Where a kind's field goes; `None` for one that this version of the schema does not know.
fn put(kind: Kind, field: &str) -> Option<Put> {
    let column = |name: &str| EVENTS.columns.iter().position(|(known, _)| *known == name);
    let named = |name: &str| column(name).map(Put::Plain);
    match (kind, field) {
        (_, "ns_level") => Some(Put::Nowhere),
        // No column of version 1: the archive has it.
        (Kind::Signal, "sender_parent") => Some(Put::Nowhere),
        (_, "points" | "members" | "backends" | "used_by" | "cluster_addresses" | "ports" | "lines" | "counts") => {
            Some(Put::Nowhere)
        }
        (_, "measure") => Some(Put::Nowhere),
        (Kind::ContainerState, "role") => named("container_role"),
        (_, "role") => column("role").map(Put::Role),
        (Kind::Exit, "start_time_ns") => column("lived_ns").map(Put::Lasted),
        (Kind::Exit, "status") => Some(Put::Status),
        (Kind::Oom, "allocator_entity") => named("allocator"),
        (Kind::Signal, "sender_entity") => named("sender"),
        (Kind::Signal, "result") => column("result").map(|at| Put::Word(at, &["delivered", "ignored", "pending"])),
        (Kind::Tcp, "source") => named("source_address"),
        (Kind::Tcp, "destination") => named("destination_address"),
        (Kind::Tcp, "change") => column("change").map(|at| Put::Word(at, CHANGES)),
        (Kind::ConfigChange, "change") => column("change").map(|at| Put::Word(at, &["", "made", "changed", "gone"])),
        (Kind::Dns, "name") => named("dns_name"),
        (Kind::ContainerState, "container") => named("container_name"),
        (Kind::ContainerState, "state") => {
            column("state").map(|at| Put::Word(at, &["", "waiting", "running", "terminated"]))
        }
        (Kind::ContainerState, "exit_code" | "signal") => column(field).map(Put::IfEnded),
        (Kind::NodeCondition, "status") => column("state").map(|at| Put::Word(at, &["false", "true", "unknown"])),
        (Kind::NodeCondition, "since_ns") => column("since_at").map(Put::NotZero),
        (Kind::Trouble, "since_ns") => column("since_at").map(Put::SinceBoot),
        (Kind::Trouble, "limit") => named("limit_value"),
        (Kind::Observation, "process") => named("process_pid"),
        (Kind::Gap, "from_ns") => column("from_at").map(Put::SinceBoot),
        (Kind::Gap, "until_ns") => column("until_at").map(Put::SinceBoot),
        (_, "kind") => named("object_kind"),
        (_, "namespace") => named("object_namespace"),
        (_, "name") => named("object_name"),
        (_, "deletion_ns" | "started_ns" | "finished_ns" | "first_ns" | "last_ns" | "main_exited_ns") => {
            column(&field.replace("_ns", "_at")).map(Put::NotZero)
        }
        (_, "limit_bytes" | "memory_limit_bytes" | "cpu_limit_milli" | "pids_limit") => column(field).map(Put::NotZero),
        _ => named(field),
    }
}

/// Whether a kind has lists, which `detail` has.
fn has_detail(kind: Kind) -> bool {
    matches!(kind, Kind::ConfigChange | Kind::Endpoints | Kind::LogLines | Kind::CgroupUse | Kind::Histogram)
}

struct Row {
    time_ns: u64,
    /// Number of the event's frame.
    frame: u32,
    idx: u32,
    slot: u32,
    pid: u32,
    /// Index of the first of its `cells_count` cells.
    cells: u32,
    cells_count: u8,
    kind: u8,
    source: u8,
}

struct FrameOf {
    node: u32,
    node_id: u32,
    epoch: u32,
    seq: u64,
}

/// Rows of one hour that wait to be sorted.
#[derive(Default)]
struct Waiting {
    rows: Vec<Row>,
    cells: Vec<(u16, u64)>,
}

/// Collects events.
pub(super) struct Events {
    partitions: Partitions,
    waiting: HashMap<u64, Waiting, RandomState>,
    rows: usize,
    frames: Vec<FrameOf>,
    plans: [Option<Vec<Put>>; KINDS],
    /// The texts that the names of the frame at hand are.
    names: Vec<u32>,
    addresses: HashMap<[u8; 16], u32, RandomState>,
    pub events: u64,
}

impl Events {
    pub fn new() -> Result<Self, ExportError> {
        Ok(Self {
            partitions: Partitions::new(&EVENTS)?,
            waiting: HashMap::default(),
            rows: 0,
            frames: Vec::new(),
            plans: [const { None }; KINDS],
            names: Vec::new(),
            addresses: HashMap::default(),
            events: 0,
        })
    }

    /// Takes in the events of a frame, whose descriptions are known.
    pub fn frame(&mut self, shared: &mut SegmentTables, frame: &Frame) -> Result<(), ExportError> {
        let (header, body) = (frame.header(), frame.body());
        self.frames.push(FrameOf {
            node: shared.catalog.node_text(&mut shared.texts, header.node),
            node_id: shared.texts.number(&format!("{:x}", header.node)),
            epoch: shared.texts.number(&format!("{:x}", header.epoch)),
            seq: header.seq,
        });
        let frame_at = (self.frames.len() - 1) as u32;
        self.names.clear();
        self.names.resize(body.names.len(), UNASKED);
        let mut lately = (u64::MAX, 0);
        let mut open: Option<(u64, Waiting)> = None;
        for (idx, event) in body.events.iter().enumerate() {
            let time_ns = realtime_ns(header, event.time_ns.to_native());
            let hour = self.partitions.hour(time_ns);
            let entity = event.entity.to_native();
            if lately.0 != entity {
                lately = (entity, shared.catalog.slot(header.node, entity));
            }
            if open.as_ref().is_none_or(|(known, _)| *known != hour) {
                self.keep(open.take());
                open = Some((hour, self.waiting.remove(&hour).unwrap_or_default()));
            }
            let Some((_, waiting)) = &mut open else { continue };
            let cells = waiting.cells.len();
            let kind = event.kind();
            self.fields(shared, header, body, event, &mut waiting.cells);
            waiting.rows.push(Row {
                time_ns,
                frame: frame_at,
                idx: idx as u32,
                slot: lately.1,
                pid: event.pid.to_native(),
                cells: cells as u32,
                cells_count: (waiting.cells.len() - cells) as u8,
                kind: kind as u8,
                source: event.source.get() as u8,
            });
            self.rows += 1;
            if waiting.rows.len() >= ROWS_MAX {
                self.keep(open.take());
                self.flush(shared, hour)?;
            } else if self.rows >= WAITING_MAX {
                self.keep(open.take());
                let largest = self.waiting.iter().max_by_key(|(_, waiting)| waiting.rows.len());
                if let Some((&largest, _)) = largest {
                    self.flush(shared, largest)?;
                }
            }
        }
        self.keep(open);
        self.events += body.events.len() as u64;
        Ok(())
    }

    fn keep(&mut self, open: Option<(u64, Waiting)>) {
        self.waiting.extend(open);
    }

    fn fields(
        &mut self,
        shared: &mut SegmentTables,
        header: &Header,
        body: &ArchivedBody,
        event: &ArchivedEvent,
        cells: &mut Vec<(u16, u64)>,
    ) {
        let kind = event.kind();
        let plan = self.plans[kind as usize].get_or_insert_with(|| {
            let mut plan = Vec::new();
            event.each_field(&mut |field, _| plan.push(put(kind, field).unwrap_or(Put::Nowhere)));
            plan
        });
        let (names, addresses) = (&mut self.names, &mut self.addresses);
        let boottime_ns = event.time_ns.to_native();
        let mut at = 0;
        event.each_field(&mut |_, value| {
            let put = plan[at];
            at += 1;
            let (column, value) = match (put, value) {
                (Put::Nowhere, _) | (_, FieldValue::Parts) => return,
                (Put::NotZero(_), FieldValue::Unsigned(0)) => return,
                (Put::Plain(column) | Put::NotZero(column), FieldValue::Unsigned(value)) => {
                    match i64::try_from(value) {
                        Ok(_) => (column, value),
                        // Unlimited, or not known.
                        Err(_) => return,
                    }
                }
                (Put::Plain(column), FieldValue::Signed(value)) => (column, value as u64),
                (Put::Plain(column), FieldValue::Flag(flag)) => (column, flag.into()),
                (Put::Plain(column), value) => match text(shared, names, addresses, header.node, body, value) {
                    NONE => return,
                    number => (column, number.into()),
                },
                (Put::SinceBoot(_) | Put::Lasted(_), FieldValue::Unsigned(0)) => return,
                (Put::SinceBoot(column), FieldValue::Unsigned(ns)) => (column, realtime_ns(header, ns)),
                (Put::Lasted(column), FieldValue::Unsigned(from)) => (column, boottime_ns.saturating_sub(from)),
                (Put::Word(column, words), FieldValue::Unsigned(number)) => {
                    match shared.texts.number(words.get(number as usize).copied().unwrap_or("unknown")) {
                        NONE => return,
                        word => (column, word.into()),
                    }
                }
                (Put::Role(column), FieldValue::Unsigned(number)) => match shared.texts.number(role(number as u8)) {
                    NONE => return,
                    word => (column, word.into()),
                },
                (Put::Status, FieldValue::Unsigned(status)) => match ending(status as u32) {
                    Ending::Exited(code) => (EXIT_CODE, code.into()),
                    Ending::Killed(signal) => (SIGNAL, signal.into()),
                },
                (Put::IfEnded(column), FieldValue::Signed(value)) => match &event.body {
                    ArchivedDetail::ContainerState(state) if state.state == 3 => (column, value as u64),
                    _ => return,
                },
                _ => return,
            };
            cells.push((column as u16, value));
        });
        if has_detail(kind) {
            let fields: serde_json::Map<_, _> =
                render::event_fields(body, event).into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
            let number = shared.texts.number(&serde_json::Value::Object(fields).to_string());
            cells.push((DETAIL as u16, number.into()));
        }
    }

    /// Sorts the rows of an hour and writes them as a row group.
    fn flush(&mut self, shared: &mut SegmentTables, hour: u64) -> Result<(), ExportError> {
        let Some(mut waiting) = self.waiting.remove(&hour) else { return Ok(()) };
        self.rows -= waiting.rows.len();
        // Frames come nearly in order, so this is a merge of few runs.
        waiting.rows.sort_by_key(|row| row.time_ns);
        let kinds: Vec<u32> = Kind::ALL.iter().map(|kind| shared.texts.number(kind.name())).collect();
        let sources: Vec<u32> =
            tapio_wire::event::Source::ALL.iter().map(|source| shared.texts.number(source.name())).collect();
        let batch = self.partitions.batch(&shared.place, hour)?;
        for row in &waiting.rows {
            let frame = &self.frames[row.frame as usize];
            let known = shared.catalog.named(&mut shared.texts, row.slot);
            batch.row();
            batch.unsigned(TIME, row.time_ns);
            batch.text(KIND, kinds[usize::from(row.kind)]);
            batch.text(SOURCE, sources[usize::from(row.source)]);
            batch.text(NODE, frame.node);
            let Known { kind, name, namespace, workload, pod, container, pod_uid, container_id } = known;
            for (column, text) in [
                (NAMESPACE, namespace),
                (WORKLOAD, workload),
                (POD, pod),
                (CONTAINER, container),
                (ENTITY, name),
                (ENTITY_KIND, kind),
                (POD_UID, pod_uid),
                (CONTAINER_ID, container_id),
                (NODE_ID, frame.node_id),
                (EPOCH, frame.epoch),
                (SEGMENT, shared.segment),
            ] {
                batch.text(column, text);
            }
            if row.pid != 0 {
                batch.raw(PID, row.pid.into());
            }
            batch.unsigned(SEQ, frame.seq);
            batch.raw(IDX, row.idx.into());
            let cells = row.cells as usize..row.cells as usize + usize::from(row.cells_count);
            for &(column, value) in &waiting.cells[cells] {
                batch.raw(column.into(), value);
            }
        }
        self.partitions.flush(hour, &shared.texts, &mut shared.encoder)
    }

    /// Writes what waits, and ends the files.
    pub fn finish(mut self, shared: &mut SegmentTables) -> Result<Vec<Written>, ExportError> {
        for hour in self.waiting.keys().copied().collect::<Vec<_>>() {
            self.flush(shared, hour)?;
        }
        self.partitions.finish(&shared.place, &shared.texts, &mut shared.encoder)
    }
}

/// The number of the text that a name, an entity or an address is.
fn text(
    shared: &mut SegmentTables,
    names: &mut [u32],
    addresses: &mut HashMap<[u8; 16], u32, RandomState>,
    node: u64,
    body: &ArchivedBody,
    value: FieldValue,
) -> u32 {
    match value {
        FieldValue::Name(name) => {
            let Some(number) = names.get_mut(name as usize) else { return NONE };
            if *number == UNASKED {
                *number = shared.texts.number(body.name(name).unwrap_or_default());
            }
            *number
        }
        FieldValue::Entity(id) if id != 0 => {
            let slot = shared.catalog.slot(node, id);
            shared.catalog.named(&mut shared.texts, slot).name
        }
        FieldValue::Address(bytes) => *addresses.entry(bytes).or_insert_with(|| {
            let v6 = Ipv6Addr::from(bytes);
            shared.texts.number(&v6.to_ipv4_mapped().map_or_else(|| v6.to_string(), |v4| v4.to_string()))
        }),
        _ => NONE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_a_column_or_is_omitted_on_purpose() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../wire/tests/golden/fields-v3.bin");
        let frame = Frame::decode(&std::fs::read(path).expect("an event of every kind")).expect("sound");
        let mut kinds = 0_u64;
        for event in frame.body().events.iter() {
            kinds |= 1 << event.kind() as u32;
            event.each_field(&mut |field, _| {
                assert!(put(event.kind(), field).is_some(), "{} {field} has no column", event.kind().name());
            });
        }
        assert_eq!(kinds.count_ones() as usize, KINDS, "the file has every kind");
    }
}
