//! Events that nodes say were acknowledged, though not out of this archive, by what is known of who has them.
//!
//! A collector names what was acknowledged to it, and not by whom. So two things look alike to one server: another server took
//! the events, or this one had them on a disk that is gone. What is known:
//!
//! | kind             | known                                                                                       |
//! |------------------|---------------------------------------------------------------------------------------------|
//! | `empty_archive`  | the archive had no frame when this server started, a moment ago, and the epoch was new to it |
//! | `another_server` | the archive has a history of its own, or the epoch was here before                           |
//!
//! The first is an emptied or replaced disk, or a server that was just added: only a person can decide which. The second is a
//! node that moved; or this archive is a restored backup, which lacks what came after it.

use std::time::Duration;

use tapio_wire::event::Source;
use tapio_wire::service::ElsewhereCount;
use tokio::time::Instant;

/// How long after the start collectors may come back to a server: their longest back-off is 90 s, and names take time to change.
pub const FIRST_CONTACT: Duration = Duration::from_secs(600);

/// Name in status of the events elsewhere that the remote archive has.
pub const IN_REMOTE: &str = "in_remote";
/// Name in status of the events elsewhere that the remote archive lacks.
pub const NOT_IN_REMOTE: &str = "not_in_remote";

/// What is known of who has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElsewhereKind {
    AnotherServer,
    EmptyArchive,
}

impl ElsewhereKind {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 2] = [Self::AnotherServer, Self::EmptyArchive];

    /// The name that metrics and status use.
    pub fn name(self) -> &'static str {
        match self {
            Self::AnotherServer => "another_server",
            Self::EmptyArchive => "empty_archive",
        }
    }
}

/// Distinguishes the two.
#[derive(Clone, Copy, Debug)]
pub struct FirstContact {
    /// `None` when the archive had a frame when it was opened.
    until: Option<Instant>,
}

impl FirstContact {
    /// Starts with an archive that is opened now and has had `frames` frames in its life.
    pub fn new(frames: u64, within: Duration) -> Self {
        Self { until: (frames == 0).then(|| Instant::now() + within) }
    }

    /// Returns the kind of events of an epoch; `has_epoch` is true if the books have the epoch.
    pub fn kind(&self, has_epoch: bool) -> ElsewhereKind {
        match self.until {
            Some(until) if !has_epoch && Instant::now() < until => ElsewhereKind::EmptyArchive,
            _ => ElsewhereKind::AnotherServer,
        }
    }
}

/// Counts by source, for status: those that are not 0.
pub(super) fn counts(of: impl Fn(ElsewhereKind, Source) -> u64) -> Vec<ElsewhereCount> {
    let all = ElsewhereKind::ALL.into_iter().flat_map(|kind| Source::ALL.into_iter().map(move |source| (kind, source)));
    let counted = all.map(|(kind, source)| (kind, source, of(kind, source))).filter(|(.., events)| *events > 0);
    counted
        .map(|(kind, source, events)| ElsewhereCount {
            kind: kind.name().to_owned(),
            source: source.name().to_owned(),
            events,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_contact_needs_a_new_epoch_soon_after_empty_start() {
        let kind = |frames, within, has_epoch| FirstContact::new(frames, within).kind(has_epoch);
        assert_eq!(kind(0, FIRST_CONTACT, false), ElsewhereKind::EmptyArchive);
        assert_eq!(kind(0, FIRST_CONTACT, true), ElsewhereKind::AnotherServer);
        assert_eq!(kind(0, Duration::ZERO, false), ElsewhereKind::AnotherServer);
        assert_eq!(kind(1, FIRST_CONTACT, false), ElsewhereKind::AnotherServer);
    }
}
