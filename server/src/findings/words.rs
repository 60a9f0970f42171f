//! Fields of clues that are always one of a few words.
//!
//! What must hold: every word that Tapio itself may say of such a field is listed. So a pattern that asks for another one is refused:
//! it could never match. Words of Kubernetes, systemd and the kernel are theirs, and not listed.

use tapio_wire::event::{EntityKind, Measure, Role};

use super::field::Field;
use super::text;
use crate::correlate::CurveShape;
use crate::correlate::clue::{ClueKind, LimitLevel, SenderClass};

/// The words that a field of a kind of clue may be; none where it may be anything.
pub(super) fn words(field: Field, kind: ClueKind) -> Vec<&'static str> {
    match (field, kind) {
        (Field::EntityKind | Field::SenderKind, _) => {
            EntityKind::ALL.into_iter().map(EntityKind::name).chain(["unknown"]).collect()
        }
        (Field::ProcessRole, _) => (0..=5).map(|role| text::role_name(Role::from_u8(role))).collect(),
        (Field::LimitLevel, _) => LimitLevel::ALL.into_iter().map(LimitLevel::name).collect(),
        (Field::Sender | Field::SentBy, _) => SenderClass::ALL.into_iter().map(SenderClass::name).collect(),
        (Field::Shape, _) => CurveShape::ALL.into_iter().map(CurveShape::name).collect(),
        (Field::Measure, _) => Measure::ALL.into_iter().map(Measure::name).collect(),
        (Field::Rcode, _) => (0..=16).map(text::rcode_name).collect(),
        (Field::Errno, _) => (1..=122).map(text::errno_name).collect(),
        (Field::Mostly, _) => vec!["anon", "page_cache", "shmem", "kernel_memory"],
        (Field::Type, _) => vec!["Normal", "Warning"],
        (Field::Role, _) => vec!["app", "init", "ephemeral"],
        (Field::Status, _) => vec!["false", "true", "unknown"],
        (Field::Change, _) => vec!["unknown", "made", "changed", "gone"],
        (Field::State, ClueKind::ContainerState) => vec!["unknown", "waiting", "running", "terminated"],
        (Field::What, ClueKind::Trouble) => TROUBLES.to_vec(),
        _ => Vec::new(),
    }
}

/// What collectors call what is wrong with something that lives.
const TROUBLES: [&str; 17] = [
    "throttled",
    "pids-at-limit",
    "memory-high",
    "descriptors-at-limit",
    "connections-dropped",
    "stopped",
    "blocked",
    "unkillable",
    "disk-full",
    "inodes-full",
    "disk-filling",
    "inodes-filling",
    "not-ready",
    "init-runs",
    "pending",
    "starting",
    "terminating",
];

/// Refuses a word that the field never is.
pub(super) fn check(field: Field, kind: ClueKind, word: &str) -> Result<(), String> {
    let mut words = words(field, kind);
    if words.is_empty() || words.contains(&word) {
        return Ok(());
    }
    words.sort_unstable();
    words.dedup();
    Err(format!("{} is never {word}: it is one of {}", field.name(), words.join(", ")))
}
