//! One pass of a source over what it gathers: `begin`, then `accept` or `observe`, then `finish`.
//!
//! In: records and observations. Out: batches that are full, due or urgent, when the pass finishes. What must hold: a
//! source states what it emitted before it finishes a pass, so that nobody sees an event that is not counted. A pass
//! that is dropped without a finish hands nothing on; its events leave with the next pass.

use std::ops::Deref;
use std::time::Duration;

use tapio_wire::event::{Entity, Event, Lane};

use crate::intake::Intake;
use crate::intake::decode::{Batch, header};
use crate::intake::identity::Identity;

/// How long bulk may be without room before a ring that carries both lanes is drained at bulk's expense.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// A pass of a source, from [`Intake::begin`] to [`Pass::finish`].
#[must_use = "a pass that is not finished hands nothing on: call `finish`"]
pub struct Pass<'a> {
    intake: &'a mut Intake,
    is_finished: bool,
}

impl Deref for Pass<'_> {
    type Target = Intake;

    fn deref(&self) -> &Intake {
        self.intake
    }
}

impl Drop for Pass<'_> {
    /// What was dropped is counted; what was taken waits in its batch for the next pass.
    fn drop(&mut self) {
        if !self.is_finished {
            self.intake.publish_counts();
        }
    }
}

impl<'a> Pass<'a> {
    #[inline]
    pub(super) fn new(intake: &'a mut Intake) -> Self {
        Self { intake, is_finished: false }
    }

    /// How many records of a ring of both lanes may be accepted in this pass. While bulk has had no room for [`PATIENCE`], bulk records
    /// are taken and dropped, so that lethal ones in the same ring are reached.
    pub fn room(&mut self) -> usize {
        let (lethal, bulk) = (self.room_of(Lane::Lethal), self.room_of(Lane::Bulk));
        if bulk > 0 {
            self.intake.blocked_since = None;
            return lethal.min(bulk);
        }
        let now = self.intake.now;
        let blocked_since = *self.intake.blocked_since.get_or_insert(now);
        if now.duration_since(blocked_since) >= PATIENCE { lethal } else { 0 }
    }

    /// Fetches what a record will need that is accepted soon: a source that wakes finds its caches cold.
    #[inline]
    pub fn fetch(&self, bytes: &[u8]) {
        if let Ok((header, _)) = header(bytes) {
            self.intake.identity.fetch(header.cgroup_id);
        }
    }

    /// Takes one record. At most [`Pass::room`] of them in one pass.
    #[inline]
    pub fn accept(&mut self, bytes: &[u8]) {
        self.intake.take(bytes, false);
    }

    /// Takes one record that user space made from the probes' maps: sums, and queries without an answer. The probes
    /// could not sample these, and a sum, which stands for many events, is never sampled. Otherwise as
    /// [`Pass::accept`].
    pub fn accept_fetched(&mut self, bytes: &[u8]) {
        self.intake.take(bytes, true);
    }

    /// Takes one observation of the lethal lane from a source that has no ring, and counts it as emitted. `make` interns the
    /// event's names in the batch and resolves its entities. Only while [`Intake::room_of`] the lethal lane is not 0.
    pub fn observe(&mut self, make: impl FnOnce(&mut Batch, &mut Identity) -> Event) {
        let mut event = make(&mut self.intake.lethal, &mut self.intake.identity);
        event.source = self.intake.source;
        debug_assert_eq!(event.kind().lane(), Lane::Lethal);
        self.books().add_emitted(1);
        self.intake.kinds[event.kind() as usize] += 1;
        self.intake.is_urgent |= event.body.is_urgent();
        self.intake.lethal_since.get_or_insert(self.intake.now);
        self.intake.lethal.body.events.push(event);
    }

    /// Lets the source describe entities without an event of theirs; what it adds goes with the next lethal batch.
    pub fn describe(&mut self, describe: impl FnOnce(&mut Vec<Entity>)) {
        let before = self.intake.lethal.body.entities.len();
        describe(&mut self.intake.lethal.body.entities);
        if self.intake.lethal.body.entities.len() > before {
            self.intake.lethal_since.get_or_insert(self.intake.now);
        }
    }

    /// Hands on what is full, due or urgent, and goes on as a new pass.
    pub fn renew(&mut self) {
        self.intake.note_time();
        self.intake.flush(false);
    }

    /// Hands on everything, to make room, and goes on as a new pass.
    pub fn make_room(&mut self) {
        self.intake.note_time();
        self.intake.flush(true);
    }

    /// Ends the pass, after the source has stated what it emitted: publishes the drops, then pushes each batch that is full, worth a
    /// frame, due, or urgent. A batch that finds no room stays.
    pub fn finish(mut self) {
        self.is_finished = true;
        self.intake.flush(false);
    }

    /// Finishes the pass as [`Pass::finish`], and flushes every batch that is not empty.
    pub fn finish_all(mut self) {
        self.is_finished = true;
        self.intake.flush(true);
    }
}
