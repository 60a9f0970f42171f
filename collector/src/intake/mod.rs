//! The intake: what every ring source does with a record.
//!
//! What enters: records, borrowed from a ring. What leaves: batches of one lane, pushed to the queues. What must hold: the
//! source asks for [`Intake::room`] before it drains, so that no decoded event is ever without a place; a batch with an urgent
//! event leaves with the drain that brought it; everything that is dropped on the way is counted by stage and reason.

pub mod decode;
pub mod identity;
pub mod redact;
pub mod requests;
pub mod shared;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tapio_probes::record::Kind;
use tapio_wire::event::{Entity, Event, KINDS, Lane, Source};
use tapio_wire::ledger::{Reason, Stage};

use crate::base::books::SourceBooks;
use crate::intake::decode::{Batch, decode, header, lane, sender_start_time_ns};
use crate::intake::identity::Identity;
use crate::intake::requests::Evidence;
use crate::intake::shared::{Shared, severity};
use crate::outbox::queue::Queues;

/// How long bulk may be without room before a ring that carries both lanes is drained at bulk's expense.
const PATIENCE: Duration = Duration::from_secs(1);

/// Events that are worth a frame of their own where many come: fewer would cost more for the frame's way than for themselves.
const FRAME_WORTH: usize = 256;
/// The same where so few come that the whole cost is in the frames' ways: those wait for company as long as they may.
const QUIET_FRAME_WORTH: usize = 2048;
/// Events a second of a source from which on many come.
const MANY_PER_SECOND: f64 = 20_000.0;
/// How old the first of them must be: at high rates frames become fuller than that.
const FRAME_AGE: Duration = Duration::from_millis(5);

/// Filters, samples and queues the records of one source.
pub struct Intake {
    shared: Shared,
    source: Source,
    identity: Identity,
    lethal: Batch,
    bulk: Batch,
    /// Whether the lethal batch holds something that must not wait.
    is_urgent: bool,
    /// When the oldest event of each batch arrived.
    lethal_since: Option<Instant>,
    bulk_since: Option<Instant>,
    /// Since when the bulk batch is full and finds no room.
    blocked_since: Option<Instant>,
    now: Instant,
    /// Since when what this pass takes may have waited in a ring.
    since: Instant,
    /// How long the source did not look before this pass.
    unseen: Duration,
    sampled: f64,
    filter_version: u64,
    /// As configured, and by the CPU budget where the probes do not do that.
    sampling_rate: f64,
    /// Bulk events that may still pass in the present second.
    allowance: u64,
    allowance_since: Instant,
    malformed: u64,
    no_room: u64,
    excluded: u64,
    sampled_away: u64,
    rate_limited: u64,
    kinds: [u32; KINDS],
    accepted: u64,
    events_per_second: f64,
    evidence: Option<Evidence>,
}

impl Intake {
    /// An intake for one source; `identity` is its table of cgroups.
    pub fn new(shared: Shared, source: Source, identity: Identity) -> Self {
        let now = Instant::now();
        Self {
            allowance: shared.filter.events_per_second,
            lethal: Batch::redacting(Arc::clone(&shared.redactor)),
            bulk: Batch::redacting(Arc::clone(&shared.redactor)),
            shared,
            source,
            identity,
            is_urgent: false,
            lethal_since: None,
            bulk_since: None,
            blocked_since: None,
            now,
            since: now,
            unseen: Duration::ZERO,
            sampled: 0.0,
            filter_version: 0,
            sampling_rate: 1.0,
            allowance_since: now,
            malformed: 0,
            no_room: 0,
            excluded: 0,
            sampled_away: 0,
            rate_limited: 0,
            kinds: [0; KINDS],
            accepted: 0,
            events_per_second: 0.0,
            evidence: None,
        }
    }

    /// Asks for evidence that fades, with the records that call for it.
    pub fn with_evidence(mut self, evidence: Option<Evidence>) -> Self {
        self.evidence = evidence;
        self
    }

    /// The source's counters.
    pub fn books(&self) -> &SourceBooks {
        self.shared.books.source(self.source)
    }

    /// Starts a pass over a ring of both lanes and tells how many of its records may be accepted before the next
    /// [`Intake::flush`]. While bulk has had no room for [`PATIENCE`], bulk records are taken and dropped, so that lethal ones
    /// in the same ring are reached.
    pub fn room(&mut self) -> usize {
        self.begin();
        let (lethal, bulk) = (self.room_of(Lane::Lethal), self.room_of(Lane::Bulk));
        if bulk > 0 {
            self.blocked_since = None;
            return lethal.min(bulk);
        }
        let blocked_since = *self.blocked_since.get_or_insert(self.now);
        if self.now.duration_since(blocked_since) >= PATIENCE { lethal } else { 0 }
    }

    /// How many records of a lane may be accepted before the next [`Intake::flush`], for a source with a ring for each.
    pub fn room_of(&self, lane: Lane) -> usize {
        let batch = match lane {
            Lane::Lethal => &self.lethal,
            Lane::Bulk => &self.bulk,
        };
        self.shared.batch_events().saturating_sub(batch.body.events.len())
    }

    /// Notes that the source will not look for so long, and nobody will wake it: what it takes then may have waited as long.
    pub fn napped(&mut self, nap: Duration) {
        self.unseen = nap;
    }

    /// How many events more would make the batches worth their frames, at least 1.
    pub fn missing(&self) -> usize {
        self.worth().saturating_sub(self.held()).max(1)
    }

    /// Events that records became, so far.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    fn held(&self) -> usize {
        self.lethal.body.events.len() + self.bulk.body.events.len()
    }

    fn worth(&self) -> usize {
        let worth = if self.events_per_second >= MANY_PER_SECOND { FRAME_WORTH } else { QUIET_FRAME_WORTH };
        worth.min(self.shared.batch_events())
    }

    /// How many events come of late: what a frame is worth depends on it.
    pub fn expect(&mut self, events_per_second: f64) {
        self.events_per_second = events_per_second;
    }

    /// Starts a pass: notes the time, and whether the stream is new.
    pub fn begin(&mut self) {
        self.now = Instant::now();
        self.since = self.now.checked_sub(self.unseen).unwrap_or(self.now);
        self.identity.tick();
        self.identity.describe_again(self.shared.generation.load(Ordering::Relaxed));
        if let Some(filter) = self.shared.live.newer(&mut self.filter_version) {
            self.shared.filter = filter;
        }
        let keep_one_in = if self.source == Source::Ebpf { 1 } else { self.shared.governed.sampling() };
        self.sampling_rate = self.shared.filter.sampling_rate / f64::from(keep_one_in);
        if self.now.duration_since(self.allowance_since) >= Duration::from_secs(1) {
            self.allowance = self.shared.filter.events_per_second;
            self.allowance_since = self.now;
        }
    }

    /// Fetches what a record will need that is accepted soon: a source that wakes finds its caches cold.
    #[inline]
    pub fn fetch(&self, bytes: &[u8]) {
        if let Ok((header, _)) = header(bytes) {
            self.identity.fetch(header.cgroup_id);
        }
    }

    /// Takes one record. At most [`Intake::room`] of them between two flushes.
    #[inline]
    pub fn accept(&mut self, bytes: &[u8]) {
        self.take(bytes, false);
    }

    /// Takes one record that user space made of the probes' maps, which the probes could not sample: sums, each of which
    /// stands for many events and is never sampled away, and queries that nobody answered. Otherwise as [`Intake::accept`].
    pub fn accept_fetched(&mut self, bytes: &[u8]) {
        self.take(bytes, true);
    }

    /// When a DNS query counts as unanswered.
    pub fn dns_timeout(&self) -> Duration {
        self.shared.live.dns_timeout()
    }

    #[inline]
    fn take(&mut self, bytes: &[u8], is_fetched: bool) {
        let Ok((header, kind)) = header(bytes) else {
            self.malformed += 1;
            return;
        };
        let (batch, since) = match lane(kind) {
            Lane::Lethal => (&mut self.lethal, &mut self.lethal_since),
            Lane::Bulk => {
                if self.identity.is_excluded(header.cgroup_id) {
                    self.excluded += 1;
                    return;
                }
                if !self.passes(kind, is_fetched) {
                    return;
                }
                if self.bulk.body.events.len() >= self.shared.batch_events() {
                    self.no_room += 1;
                    return;
                }
                (&mut self.bulk, &mut self.bulk_since)
            }
        };
        match decode(bytes, &header, kind, self.source, &mut self.identity, batch) {
            Ok(is_urgent) => {
                since.get_or_insert(self.since);
                self.accepted += 1;
                if let Some(event) = batch.body.events.last() {
                    self.kinds[event.kind() as usize] += 1;
                    if let (true, Some(evidence)) = (is_urgent, &self.evidence) {
                        let sender_start_time_ns = sender_start_time_ns(bytes, kind);
                        evidence.ask(event, header.cgroup_id, sender_start_time_ns, &self.identity);
                    }
                }
                self.is_urgent |= is_urgent;
            }
            Err(_) => self.malformed += 1,
        }
    }

    /// Takes one observation of the lethal lane from a source that has no ring, and counts it as emitted. `make` interns the
    /// event's names in the batch and resolves its entities. Only while [`Intake::room_of`] the lethal lane is not 0.
    pub fn observe(&mut self, make: impl FnOnce(&mut Batch, &mut Identity) -> Event) {
        let mut event = make(&mut self.lethal, &mut self.identity);
        event.source = self.source;
        debug_assert_eq!(event.kind().lane(), Lane::Lethal);
        self.books().add_emitted(1);
        self.kinds[event.kind() as usize] += 1;
        self.is_urgent |= event.body.is_urgent();
        self.lethal_since.get_or_insert(self.now);
        self.lethal.body.events.push(event);
    }

    /// Lets the source describe entities without an event of theirs; what it adds goes with the next lethal batch.
    pub fn describe(&mut self, describe: impl FnOnce(&mut Vec<Entity>)) {
        let before = self.lethal.body.entities.len();
        describe(&mut self.lethal.body.entities);
        if self.lethal.body.entities.len() > before {
            self.lethal_since.get_or_insert(self.now);
        }
    }

    /// Counts the streams; on a new one every entity is to be described again.
    pub fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Relaxed)
    }

    #[inline]
    fn passes(&mut self, kind: Kind, is_fetched: bool) -> bool {
        let filter = &self.shared.filter;
        if severity(kind) < filter.min_severity {
            self.excluded += 1;
            return false;
        }
        let rate = match (is_fetched, kind) {
            (false, _) => self.sampling_rate,
            (true, Kind::Dns) => filter.sampling_rate / f64::from(self.shared.governed.sampling()),
            (true, _) => 1.0,
        };
        if rate < 1.0 {
            self.sampled += rate;
            if self.sampled < 1.0 {
                self.sampled_away += 1;
                return false;
            }
            self.sampled -= 1.0;
        }
        if filter.events_per_second > 0 {
            if self.allowance == 0 {
                self.rate_limited += 1;
                return false;
            }
            self.allowance -= 1;
        }
        true
    }

    /// Ends a pass, after the source has stated what it emitted: publishes the drops, then pushes each batch that is full,
    /// worth a frame, due, or urgent; both when `all` is set. A batch that finds no room stays.
    pub fn flush(&mut self, all: bool) {
        self.publish_counts();
        let shared = &self.shared;
        let is_full = |batch: &Batch| batch.body.events.len() >= shared.batch_events();
        let patience =
            if self.held() >= self.worth() { FRAME_AGE.min(shared.batch_timeout) } else { shared.batch_timeout };
        let is_due = |since: Option<Instant>| since.is_some_and(|since| self.now.duration_since(since) >= patience);
        // When one lane's batch is due the other's goes along: two frames at once cost fewer wakeups on the whole way than
        // each at its own time.
        let all = all || is_due(self.lethal_since) || is_due(self.bulk_since);
        let lethal = self.lethal_since.is_some() && (all || self.is_urgent || is_full(&self.lethal));
        // Bulk goes along with what is urgent when it would soon go by itself.
        let is_half_due = self.bulk_since.is_some_and(|since| self.now.duration_since(since) >= patience / 2);
        let bulk =
            self.bulk_since.is_some() && (all || is_full(&self.bulk) || (lethal && self.is_urgent && is_half_due));
        let mut has_pushed = false;
        if lethal && Self::push(&shared.queues, Lane::Lethal, &mut self.lethal) {
            self.lethal_since = None;
            self.is_urgent = false;
            has_pushed = true;
        }
        if bulk && Self::push(&shared.queues, Lane::Bulk, &mut self.bulk) {
            self.bulk_since = None;
            has_pushed = true;
        }
        if has_pushed {
            let is_quiet = self.events_per_second < MANY_PER_SECOND;
            let packer = shared.packer.as_ref().filter(|_| is_quiet);
            if !packer.is_some_and(|packer| packer.pack_here()) {
                shared.queues.wake_packer();
            }
        }
    }

    /// Ends a source that has said everything: hands on what is left. How long to wait before this is called again, [`None`]
    /// when nothing is left.
    pub fn hand_on(&mut self) -> Option<Duration> {
        self.begin();
        self.flush(true);
        (!self.is_empty()).then(|| self.sleep_limit())
    }

    fn push(queues: &Queues, lane: Lane, batch: &mut Batch) -> bool {
        if !queues.has_room(lane) {
            return false;
        }
        let body = batch.take(queues.empty_body());
        match queues.push(lane, body) {
            Ok(()) => true,
            Err(body) => {
                // Another source took the last place. The names keep their indices; new ones are appended.
                batch.put_back(body);
                false
            }
        }
    }

    fn publish_counts(&mut self) {
        let books = self.shared.books.source(self.source);
        for (stage, reason, count) in [
            (Stage::Decode, Reason::Malformed, &mut self.malformed),
            (Stage::Queue, Reason::Full, &mut self.no_room),
            (Stage::Filter, Reason::Excluded, &mut self.excluded),
            (Stage::Filter, Reason::Sampled, &mut self.sampled_away),
            (Stage::Filter, Reason::RateLimited, &mut self.rate_limited),
        ] {
            if *count > 0 {
                books.drop_events(stage, reason, std::mem::take(count));
            }
        }
        self.shared.identities.add(self.identity.take_outcomes());
        self.shared.kinds.add(self.source, std::mem::replace(&mut self.kinds, [0; KINDS]));
    }

    /// How long the first event of the next batch may be left in its ring, or what is in a batch now.
    pub fn due(&self) -> Duration {
        if self.is_empty() { self.shared.batch_timeout } else { self.sleep_limit() }
    }

    /// How long the source may sleep: until a batch is due.
    pub fn sleep_limit(&self) -> Duration {
        const IDLE: Duration = Duration::from_secs(1);
        const NO_ROOM_NAP: Duration = Duration::from_micros(500);
        let oldest = match (self.lethal_since, self.bulk_since) {
            (Some(lethal), Some(bulk)) => Some(lethal.min(bulk)),
            (lethal, bulk) => lethal.or(bulk),
        };
        // A batch that is overdue is here because it found no room: the packer needs a moment.
        oldest.map_or(IDLE, |since| self.shared.batch_timeout.saturating_sub(since.elapsed()).clamp(NO_ROOM_NAP, IDLE))
    }

    /// Whether nothing waits here.
    pub fn is_empty(&self) -> bool {
        self.lethal.body.events.is_empty() && self.bulk.body.events.is_empty()
    }

    /// The table of cgroups, for metrics.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }
}

#[cfg(test)]
mod tests {
    use tapio_probes::record;
    use zerocopy::{FromZeros, IntoBytes};

    use super::*;
    use crate::outbox::Room;
    use crate::settings::config::Config;
    use crate::settings::live::Filter;
    use crate::settings::severity::Severity;

    fn intake(batch_events: usize, queue_batches: usize) -> Intake {
        let mut config = Config::default();
        config.grpc.max_batch_size = batch_events;
        config.grpc.batch_timeout = Duration::from_secs(5);
        config.collector.max_events_per_sec = 0;
        let (queues, _parker) = Queues::new(queue_batches);
        Intake::new(Shared::for_config(&config, queues), Source::Shm, Identity::new(Vec::new()))
    }

    fn bulk() -> Vec<u8> {
        let mut record = record::RunQueue::new_zeroed();
        record.header.kind = Kind::RunQueue as u16;
        record.header.size = size_of_val(&record) as u16;
        record.as_bytes().to_vec()
    }

    fn exit(status: u32) -> Vec<u8> {
        let mut record = record::Exit::new_zeroed();
        record.header.kind = Kind::Exit as u16;
        record.header.size = size_of_val(&record) as u16;
        record.status = status;
        record.as_bytes().to_vec()
    }

    fn dropped(intake: &Intake, stage: Stage, reason: Reason) -> u64 {
        let ledger = intake.shared.books.snapshot(&Default::default());
        ledger.account(Source::Shm).dropped[stage as usize][reason as usize]
    }

    #[test]
    fn an_urgent_batch_leaves_at_once_and_a_healthy_end_waits() {
        let mut intake = intake(10, 4);
        intake.room();
        intake.accept(&exit(0));
        intake.flush(false);
        assert!(intake.shared.queues.pop(Room::Both).is_none());
        intake.accept(&exit(9));
        intake.flush(false);
        let (lane, body) = intake.shared.queues.pop(Room::Both).expect("it is urgent");
        assert_eq!((lane, body.events.len()), (Lane::Lethal, 2));
        assert!(intake.is_empty());
    }

    #[test]
    fn bulk_that_would_soon_go_by_itself_goes_along_with_what_is_urgent() {
        let mut intake = intake(10, 4);
        let mut lanes = |since: Duration| {
            intake.room();
            intake.accept(&bulk());
            intake.accept(&exit(9));
            intake.bulk_since = intake.now.checked_sub(since);
            intake.flush(false);
            std::iter::from_fn(|| intake.shared.queues.pop(Room::Both)).map(|(lane, _)| lane).collect::<Vec<_>>()
        };
        assert_eq!(lanes(Duration::from_secs(2)), [Lane::Lethal]);
        assert_eq!(lanes(Duration::from_secs(3)), [Lane::Lethal, Lane::Bulk], "more than half of its 5 s are over");
    }

    #[test]
    fn a_batch_worth_a_frame_leaves_when_it_is_a_little_old_and_a_nap_counts_as_age() {
        let mut intake = intake(1000, 4);
        assert_eq!(intake.missing(), 1000, "while few come, a full batch");
        intake.expect(MANY_PER_SECOND);
        intake.room();
        for _ in 0..FRAME_WORTH - 1 {
            intake.accept(&bulk());
        }
        assert_eq!(intake.missing(), 1);
        intake.napped(FRAME_AGE);
        intake.flush(false);
        assert!(!intake.is_empty(), "it came before the nap");
        intake.room();
        intake.accept(&bulk());
        intake.bulk_since = Some(intake.now);
        intake.flush(false);
        assert!(!intake.is_empty(), "the oldest has not waited");
        intake.bulk_since = None;
        intake.napped(FRAME_AGE);
        intake.room();
        intake.accept(&bulk());
        intake.flush(false);
        let (lane, body) = intake.shared.queues.pop(Room::Both).expect("it is worth a frame");
        assert_eq!((lane, body.events.len()), (Lane::Bulk, FRAME_WORTH + 1));
    }

    #[test]
    fn without_room_nothing_is_taken_and_after_a_while_bulk_yields_to_lethal() {
        let mut intake = intake(2, 1);
        for _ in 0..2 {
            assert_eq!(intake.room(), 2);
            intake.accept(&bulk());
            intake.accept(&bulk());
            intake.flush(false);
        }
        assert_eq!(intake.room(), 0, "one batch fills the queue, one waits here");
        assert_eq!(intake.room_of(Lane::Lethal), 2, "a lethal ring is drained all the same");
        intake.blocked_since = Some(Instant::now() - PATIENCE);
        assert_eq!(intake.room(), 2);
        intake.accept(&bulk());
        intake.accept(&exit(9));
        intake.flush(false);
        assert_eq!(dropped(&intake, Stage::Queue, Reason::Full), 1);
        let (lane, _) = intake.shared.queues.pop(Room::Lethal).expect("the lethal event got through");
        assert_eq!(lane, Lane::Lethal);
        intake.shared.queues.pop(Room::Both).expect("the batch that filled the queue");
        intake.flush(false);
        assert_eq!(intake.room(), 2, "there is room again, and nothing is dropped any more");
    }

    #[test]
    fn what_the_filters_drop_is_counted_by_reason_and_never_lethal() {
        let mut intake = intake(100, 4);
        intake.shared.filter = Filter { min_severity: Severity::Low, sampling_rate: 0.5, events_per_second: 3 };
        intake.allowance = 3;
        intake.room();
        for _ in 0..10 {
            intake.accept(&bulk());
            intake.accept(&exit(0));
        }
        intake.accept(&[0; 5]);
        intake.flush(true);
        let bodies: Vec<_> = std::iter::from_fn(|| intake.shared.queues.pop(Room::Both)).collect();
        let events =
            |of: Lane| bodies.iter().filter(|(lane, _)| *lane == of).map(|(_, body)| body.events.len()).sum::<usize>();
        assert_eq!((events(Lane::Lethal), events(Lane::Bulk)), (10, 3));
        assert_eq!(dropped(&intake, Stage::Filter, Reason::Sampled), 5);
        assert_eq!(dropped(&intake, Stage::Filter, Reason::RateLimited), 2);
        assert_eq!(dropped(&intake, Stage::Decode, Reason::Malformed), 1);
    }
}
