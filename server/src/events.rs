//! Events out of the archive, chosen by the names that people use.
//!
//! What enters: a directory and a [`Choice`]. What leaves: events as the query service shows them. What must hold: an event that
//! matches is not left out. What one request reads and keeps is bounded, and the answer says when a bound cut it short.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::ControlFlow;
use std::path::PathBuf;

use foldhash::fast::RandomState;
use serde_json::{Map, Value};
use tapio_wire::event::{EntityKind, Kind};
use tapio_wire::frame::Frame;
use tapio_wire::service::{EntityRef, Event, Unanswered};

use crate::archive::damage::Damage;
use crate::archive::index::{Described, kind_mask, realtime_ns};
use crate::archive::reader::{Effort, ReadError, Reader, Selection};
use crate::render;

/// The least that distinguishes one pod from others.
const UID_PREFIX_MIN: usize = 8;
/// Events that one request brings at most.
pub const EVENTS_MAX: u32 = 1_000_000;
/// Events that one request brings unless it says how many.
pub const EVENTS_DEFAULT: u32 = 1000;
/// Events that are kept to find the last ones.
pub const NEWEST_MAX: u32 = 50_000;
/// Bytes of frames that one request of a client reads at most.
pub const READ_BYTES_MAX: u64 = 4 << 30;
/// How far before and after the wanted time descriptions are searched: they are repeated every minute.
const DESCRIBED_MARGIN_NS: u64 = 130 * 1_000_000_000;
const DESCRIBED_MAX: usize = 500_000;

/// Selects events. An empty field selects all.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    pub since_ns: u64,
    /// `None` for no end.
    pub until_ns: Option<u64>,
    pub node: String,
    pub namespace: String,
    /// A pod's name, `NAMESPACE/NAME`, uid or the beginning of it.
    pub pod: String,
    /// Workload, its pods and their containers, as `Deployment/web`.
    pub workload: String,
    /// A name or a part of it, an id, or the beginning of a container's id.
    pub entity: String,
    pub kinds: Vec<Kind>,
    /// 0 for no limit.
    pub limit: u64,
    /// The last ones instead of the first ones.
    pub newest: bool,
    /// 0 for no limit.
    pub read_bytes_max: u64,
    /// Whether a remote archive is read for what this disk does not have.
    pub reads_remote: bool,
    /// Whether the answer ends by saying how much of it was read.
    pub tells_remote: bool,
}

impl Choice {
    /// Whether it names something by a name that a description gives.
    pub fn is_named(&self) -> bool {
        [&self.namespace, &self.pod, &self.workload, &self.entity].iter().any(|name| !name.is_empty())
    }
}

/// Why there are no events.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("no node is called {name}; known are: {known}")]
    Node { name: String, known: String },
    #[error("nothing is called {wanted} in that time: widen it, or list what there is without the filter")]
    Nothing { wanted: String },
}

/// What a request came to.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub effort: Effort,
    pub events: u64,
    /// More matches, or may match: a bound was reached.
    pub is_cut: bool,
    /// Why the remote archive, or a part of it, was not read where it was wanted.
    pub unread: Option<String>,
    /// What was read of the remote archive; `None` where all was on this disk.
    pub remote: Option<crate::remote::Read>,
}

/// Damaged stretches that an answer names.
const DAMAGES_NAMED_MAX: usize = 5;

impl Outcome {
    /// Returns what was left out: by damage, or with the remote archive.
    pub fn incomplete(&self) -> Option<Unanswered> {
        let unread = self.unread.as_ref().map(|error| format!("archive.remote was not read, or not whole: {error}"));
        let reasons: Vec<_> = self.damaged().into_iter().chain(unread).collect();
        (!reasons.is_empty()).then(|| Unanswered { reason: reasons.join("; "), ..Unanswered::default() })
    }

    fn damaged(&self) -> Option<String> {
        let (damages, undecodable) = (&self.effort.damages, self.effort.undecodable);
        if damages.is_empty() && undecodable == 0 {
            return None;
        }
        let mut parts: Vec<_> = damages.iter().take(DAMAGES_NAMED_MAX).map(Damage::to_string).collect();
        if damages.len() > DAMAGES_NAMED_MAX {
            parts.push(format!("{} more damaged stretches", damages.len() - DAMAGES_NAMED_MAX));
        }
        if undecodable > 0 {
            parts.push(format!("{undecodable} frames cannot be decoded"));
        }
        Some(format!("the archive is damaged, the rest of it was read: {}", parts.join("; ")))
    }
}

/// The kind that a name means.
pub fn kind_named(name: &str) -> Option<Kind> {
    Kind::ALL.into_iter().find(|kind| kind.name() == name)
}

/// How many events are sent to a client that asks for `limit`. Zero, and more than the bound, are refused.
///
/// # Errors
/// How many there may be.
pub fn within_limit(limit: u32, is_newest: bool) -> Result<u64, String> {
    let (most, whose) = if is_newest { (NEWEST_MAX, "of the newest events") } else { (EVENTS_MAX, "of events") };
    match limit {
        limit if (1..=most).contains(&limit) => Ok(limit.into()),
        limit => Err(format!("limit {limit} {whose} is not from 1 to {most}: narrow what you ask for")),
    }
}

/// The kinds that names mean, separated by commas or not.
pub fn kinds_named<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Vec<Kind>, String> {
    let names = names.into_iter().flat_map(|names| names.split(','));
    names
        .map(|name| {
            kind_named(name).ok_or_else(|| {
                let known: Vec<_> = Kind::ALL.iter().map(|kind| kind.name()).collect();
                format!("\"{name}\" is no kind of event; the kinds are {}", known.join(", "))
            })
        })
        .collect()
}

/// What is known of names.
#[derive(Default)]
struct Catalog {
    nodes: HashMap<u64, std::sync::Arc<str>, RandomState>,
    described: HashMap<(u64, u64), Described, RandomState>,
}

impl Catalog {
    fn learn(&mut self, described: Described) {
        if self.described.len() < DESCRIBED_MAX || self.described.contains_key(&(described.node, described.id)) {
            self.described.insert((described.node, described.id), described);
        }
    }

    fn learn_frame(&mut self, frame: &Frame) {
        for entity in frame.body().entities.iter() {
            self.learn(Described::of(frame.header().node, entity));
        }
    }

    fn node_name(&self, node: u64) -> String {
        self.nodes.get(&node).map_or_else(|| format!("{node:016x}"), |name| name.to_string())
    }

    fn entity(&self, node: u64, id: u64) -> EntityRef {
        let node_name = self.node_name(node);
        let unknown = || EntityRef {
            id,
            kind: "unknown".into(),
            name: format!("entity {id:016x}"),
            node: node_name.clone(),
            ..EntityRef::default()
        };
        self.described.get(&(node, id)).map_or_else(unknown, |known| EntityRef {
            id,
            kind: known.kind.map_or("unknown", EntityKind::name).into(),
            name: known.name.clone(),
            node: node_name.clone(),
            pod_uid: known.pod_uid.clone(),
            container_id: known.container_id.clone(),
            cgroup: known.cgroup.clone(),
            namespace: known.namespace.clone(),
            pod: known.pod.clone(),
            container: known.container.clone(),
            workload: known.workload.clone(),
            ..EntityRef::default()
        })
    }

    /// The entities that a choice names, and those that belong to them.
    fn matching(&self, choice: &Choice) -> HashSet<(u64, u64), RandomState> {
        let mut found: HashSet<(u64, u64), RandomState> = HashSet::default();
        for (&key, described) in &self.described {
            if is_meant(described, choice) {
                found.insert(key);
            }
        }
        if !choice.pod.is_empty() || !choice.namespace.is_empty() || !choice.workload.is_empty() {
            let children = self.described.values().filter(|child| found.contains(&(child.node, child.parent)));
            let children: Vec<_> = children.map(|child| (child.node, child.id)).collect();
            found.extend(children);
        }
        found
    }
}

/// The entities of a namespace or of a pod of it, and those that belong to them, as all of an archive describes them.
///
/// # Errors
/// When the archive cannot be read.
pub fn entities_of(
    reader: &Reader,
    namespace: &str,
    pod: Option<&str>,
) -> Result<HashSet<(u64, u64), RandomState>, ReadError> {
    let (namespace, pod) = (namespace.to_owned(), pod.unwrap_or_default().to_owned());
    let choice = Choice { namespace, pod, ..Choice::default() };
    let mut found: HashSet<(u64, u64), RandomState> = HashSet::default();
    let mut learn = |described: Described| {
        if is_meant(&described, &choice) {
            found.insert((described.node, described.id));
        }
    };
    reader.described(0, u64::MAX, &mut learn)?;
    let mut children = Vec::new();
    reader.described(0, u64::MAX, &mut |described| {
        if described.parent != 0 && found.contains(&(described.node, described.parent)) {
            children.push((described.node, described.id));
        }
    })?;
    found.extend(children);
    Ok(found)
}

/// The id that 16 hexadecimal digits are.
fn id_of(entity: &str) -> Option<u64> {
    (entity.len() == 16).then(|| u64::from_str_radix(entity, 16).ok()).flatten()
}

fn is_meant(described: &Described, choice: &Choice) -> bool {
    let mut path = described.name.split('/');
    let (first, second) = (path.next().unwrap_or_default(), path.next().unwrap_or_default());
    let has_path = matches!(described.kind, Some(EntityKind::Pod | EntityKind::Container)) && !second.is_empty();
    let namespace = match described.namespace.as_str() {
        "" if has_path => first,
        known => known,
    };
    let pod = match described.pod.as_str() {
        "" if has_path => second,
        known => known,
    };
    let (wanted_namespace, wanted_pod) = match choice.pod.split_once('/') {
        Some((namespace, pod)) => (namespace, pod),
        None => (choice.namespace.as_str(), choice.pod.as_str()),
    };
    if !wanted_namespace.is_empty() && namespace != wanted_namespace {
        return false;
    }
    if !choice.workload.is_empty() && described.workload != choice.workload {
        return false;
    }
    if !wanted_pod.is_empty() {
        let is_pod = pod == wanted_pod
            || is_uid_of(wanted_pod, &described.pod_uid)
            || (described.kind == Some(EntityKind::Pod) && described.name == wanted_pod);
        if !is_pod {
            return false;
        }
    }
    let entity = choice.entity.as_str();
    entity.is_empty()
        || described.name.contains(entity)
        || (entity.len() >= 6 && described.container_id.starts_with(entity))
        || format!("{:016x}", described.id) == entity
}

/// Calls `each` with the chosen events, in the order of the archive.
///
/// # Errors
/// [`EventsError`] when the archive cannot be read, or nothing has the wanted name.
pub fn select(
    dir: impl Into<PathBuf>,
    choice: &Choice,
    each: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<Outcome, EventsError> {
    select_from(&Reader::new(dir), choice, each)
}

/// Like [`select`], from a reader.
///
/// # Errors
/// As [`select`].
pub fn select_from(
    reader: &Reader,
    choice: &Choice,
    each: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<Outcome, EventsError> {
    match select_named(reader, choice, each) {
        // What has the name may have been described in what is lost only.
        Err(unknown @ (EventsError::Node { .. } | EventsError::Nothing { .. })) => {
            let until_ns = choice.until_ns.unwrap_or(u64::MAX);
            let damages = reader.gaps(&Selection { since_ns: choice.since_ns, until_ns, ..Selection::default() })?;
            if damages.is_empty() {
                return Err(unknown);
            }
            Ok(Outcome { effort: Effort { damages, ..Effort::default() }, ..Outcome::default() })
        }
        outcome => outcome,
    }
}

fn select_named(
    reader: &Reader,
    choice: &Choice,
    each: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<Outcome, EventsError> {
    let mut catalog = Catalog { nodes: reader.node_names()?, ..Catalog::default() };
    let until_ns = choice.until_ns.unwrap_or(u64::MAX);
    let from_ns = choice.since_ns.saturating_sub(DESCRIBED_MARGIN_NS);
    reader
        .described(from_ns, until_ns.saturating_add(DESCRIBED_MARGIN_NS), &mut |described| catalog.learn(described))?;
    let mut wanted = selection(&catalog, choice, until_ns)?;
    let mut outcome = Outcome::default();
    if choice.newest && choice.read_bytes_max > 0 && reader.is_one() {
        // The bound must cut off the oldest, not the newest.
        let mut bytes = 0;
        for segment in reader.segments()?.iter().rev() {
            bytes += segment.bytes;
            if bytes > choice.read_bytes_max && wanted.first_segment > 0 {
                outcome.is_cut = true;
                break;
            }
            wanted.first_segment = segment.number;
        }
    }
    let mut newest: VecDeque<Event> = VecDeque::new();
    let keep = if choice.newest { choice.limit.clamp(1, u64::from(NEWEST_MAX)) as usize } else { 0 };
    let mut read_bytes = 0;
    outcome.effort = reader.frames(&wanted, &mut |frame| {
        catalog.learn_frame(frame);
        read_bytes += u64::from(frame.header().payload_bytes);
        if !choice.newest && choice.read_bytes_max > 0 && read_bytes > choice.read_bytes_max {
            outcome.is_cut = true;
            return ControlFlow::Break(());
        }
        each_event(frame, &wanted, &catalog, &mut |event| {
            if choice.newest {
                if newest.len() == keep {
                    newest.pop_front();
                    outcome.is_cut = true;
                }
                newest.push_back(event);
                return ControlFlow::Continue(());
            }
            if choice.limit > 0 && outcome.events >= choice.limit {
                outcome.is_cut = true;
                return ControlFlow::Break(());
            }
            outcome.events += 1;
            each(event)
        })
    })?;
    for event in newest {
        outcome.events += 1;
        if each(event).is_break() {
            break;
        }
    }
    Ok(outcome)
}

/// What a choice by names selects, by the ids that the archive has for them.
fn selection(catalog: &Catalog, choice: &Choice, until_ns: u64) -> Result<Selection, EventsError> {
    let mut wanted = Selection { since_ns: choice.since_ns, until_ns, ..Selection::default() };
    if !choice.kinds.is_empty() {
        wanted.kinds = kind_mask(choice.kinds.iter().copied());
    }
    if !choice.node.is_empty() {
        wanted.nodes = Some(HashSet::from_iter([node_named(catalog, &choice.node)?]));
    }
    if choice.is_named() {
        let mut entities = catalog.matching(choice);
        let only_entity = [&choice.pod, &choice.namespace, &choice.workload].iter().all(|name| name.is_empty());
        if let Some(id) = id_of(&choice.entity).filter(|_| only_entity) {
            // An id needs no description.
            entities.extend(catalog.nodes.keys().map(|&node| (node, id)));
        }
        if entities.is_empty() {
            let parts = [
                ("namespace", &choice.namespace),
                ("pod", &choice.pod),
                ("workload", &choice.workload),
                ("entity", &choice.entity),
            ];
            let parts = parts.iter().filter(|(_, value)| !value.is_empty());
            let wanted: Vec<_> = parts.map(|(what, value)| format!("{what} {value}")).collect();
            return Err(EventsError::Nothing { wanted: wanted.join(", ") });
        }
        wanted.entities = Some(entities);
    }
    Ok(wanted)
}

fn node_named(catalog: &Catalog, name: &str) -> Result<u64, EventsError> {
    let mut nodes = catalog.nodes.iter();
    let found = nodes.find(|(id, known)| &***known == name || format!("{id:016x}") == name);
    found.map(|(&id, _)| id).ok_or_else(|| {
        let mut known: Vec<_> = catalog.nodes.values().map(|name| name.to_string()).collect();
        known.sort();
        known.truncate(20);
        EventsError::Node { name: name.to_owned(), known: known.join(", ") }
    })
}

fn each_event(
    frame: &Frame,
    wanted: &Selection,
    catalog: &Catalog,
    each: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> ControlFlow<()> {
    let (header, body) = (frame.header(), frame.body());
    for (index, event) in body.events.iter().enumerate() {
        let kind = event.kind();
        if wanted.kinds & (1 << kind as u32) == 0 {
            continue;
        }
        let entity = event.entity.to_native();
        if wanted.entities.as_ref().is_some_and(|entities| !entities.contains(&(header.node, entity))) {
            continue;
        }
        let boottime_ns = event.time_ns.to_native();
        let time_ns = realtime_ns(header, boottime_ns);
        if time_ns < wanted.since_ns || time_ns > wanted.until_ns {
            continue;
        }
        let fields = render::event_fields(body, event);
        let text = render::event_text(&fields);
        let detail: Map<String, Value> = fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        each(Event {
            id: format!("{:x}:{:x}:{}:{index}", header.node, header.epoch, header.seq),
            time_ns,
            boottime_ns,
            kind: kind.name().into(),
            source: event.source.get().name().into(),
            lane: kind.lane().name().into(),
            entity: Some(catalog.entity(header.node, entity)),
            pid: event.pid.to_native(),
            text,
            detail_json: Value::Object(detail).to_string(),
            cluster: String::new(),
            incomplete: Vec::new(),
            remote: None,
        })?;
    }
    ControlFlow::Continue(())
}

/// Whether `wanted` is this uid or the beginning of one: eight digits, as `kubectl` and cgroups show them.
pub(crate) fn is_uid_of(wanted: &str, uid: &str) -> bool {
    wanted == uid
        || (wanted.len() >= UID_PREFIX_MIN && wanted.contains(|c: char| c.is_ascii_digit()) && is_hex(wanted) && {
            let mut digits = uid.chars().filter(|&c| c != '-');
            wanted.chars().filter(|&c| c != '-').all(|c| digits.next() == Some(c))
        })
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::is_uid_of;

    #[test]
    fn a_uid_prefix_matches_with_or_without_dashes_names_exactly() {
        let uid = "3e85c211-bc0b-4842-8977-13a03203c69d";
        for wanted in [uid, "3e85c211", "3e85c211-bc0b", "3e85c211bc0b4842897713a03203c69d"] {
            assert!(is_uid_of(wanted, uid), "{wanted}");
        }
        for wanted in ["", "3e85", "3e85c212", "eater-12", "3e85c211-bc0b-4842-8977-13a03203c69d0"] {
            assert!(!is_uid_of(wanted, uid), "{wanted}");
        }
        assert!(!is_uid_of("deadbeef", ""), "a uid that is not known");
    }
}
