//! The intake: what every source does with what it gathers.
//!
//! What enters: records, borrowed from a ring, and observations. What leaves: batches of one lane, pushed to the
//! queues. What must hold: the source asks for [`Pass::room`] before it drains, so that each decoded event has a place.
//! A batch with an urgent event leaves with the pass that brought it. Each drop is counted by stage and reason.
//!
//! - `pass.rs`: the protocol: begin, accept or observe, finish
//! - `decode.rs`, `redact.rs`: records become events
//! - `identity.rs`: cgroups become entities
//! - `sampler.rs`, `allowance.rs`, and [`Filter`](crate::settings::live::Filter): what may be dropped of the bulk lane
//! - `counts.rs`: what was taken and dropped
//! - `requests.rs`: requests for evidence that fades

mod allowance;
pub mod counts;
pub mod decode;
pub mod identity;
pub mod pass;
pub mod redact;
pub mod requests;
mod sampler;
pub mod source_context;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tapio_probes::record::RecordKind;
use tapio_wire::event::{KINDS, Lane, Source};

use crate::base::books::SourceBooks;
use crate::intake::allowance::Allowance;
use crate::intake::counts::Drops;
use crate::intake::decode::{Batch, decode, header, lane, sender_start_time_ns};
use crate::intake::identity::Identity;
use crate::intake::pass::Pass;
use crate::intake::requests::Evidence;
use crate::intake::sampler::Sampler;
use crate::intake::source_context::SourceContext;
use crate::outbox::queue::Queues;

/// Events that justify a frame at a high rate: fewer would cost more for the frame than for themselves.
const FRAME_WORTH: usize = 256;
/// Events that justify a frame at a low rate, where the whole cost is in the frames: events wait as long as they may.
const QUIET_FRAME_WORTH: usize = 2048;
/// Events a second of a source from which on many come.
const MANY_PER_SECOND: f64 = 20_000.0;
/// How old the first of them must be: at high rates frames become fuller than that.
const FRAME_AGE: Duration = Duration::from_millis(5);

/// Filters, samples and queues the records of one source.
pub struct Intake {
    context: SourceContext,
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
    /// How long the source napped before this pass: records may be this much older than now.
    unseen: Duration,
    filter_version: u64,
    /// The share of bulk events to keep: as configured, and by the CPU budget where the probes do not do that.
    sampling_rate: f64,
    sampler: Sampler,
    allowance: Allowance,
    drops: Drops,
    kinds: [u32; KINDS],
    accepted: u64,
    events_per_second: f64,
    evidence: Option<Evidence>,
}

impl Intake {
    /// An intake for one source; `identity` is its table of cgroups.
    pub fn new(context: SourceContext, source: Source, identity: Identity) -> Self {
        let now = Instant::now();
        Self {
            allowance: Allowance::new(context.filter.events_per_second, now),
            lethal: Batch::redacting(Arc::clone(&context.redactor)),
            bulk: Batch::redacting(Arc::clone(&context.redactor)),
            context,
            source,
            identity,
            is_urgent: false,
            lethal_since: None,
            bulk_since: None,
            blocked_since: None,
            now,
            since: now,
            unseen: Duration::ZERO,
            filter_version: 0,
            sampling_rate: 1.0,
            sampler: Sampler::default(),
            drops: Drops::default(),
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
        self.context.books.source(self.source)
    }

    /// How many records of a lane may be accepted in one pass, for a source with a ring for each.
    pub fn room_of(&self, lane: Lane) -> usize {
        let batch = match lane {
            Lane::Lethal => &self.lethal,
            Lane::Bulk => &self.bulk,
        };
        self.context.batch_events().saturating_sub(batch.body.events.len())
    }

    /// Notes that the source naps for `nap` and nothing wakes it: the records of its next pass may have waited as
    /// long.
    pub fn napped(&mut self, nap: Duration) {
        self.unseen = nap;
    }

    /// Events still needed for an efficient frame, at least 1.
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
        worth.min(self.context.batch_events())
    }

    /// The current rate of events, a second. A frame is worth sending after fewer events when it is low.
    pub fn expect(&mut self, events_per_second: f64) {
        self.events_per_second = events_per_second;
    }

    /// Begins a pass: notes the time, and whether the stream is new.
    pub fn begin(&mut self) -> Pass<'_> {
        self.note_time();
        Pass::new(self)
    }

    fn note_time(&mut self) {
        self.now = Instant::now();
        self.since = self.now.checked_sub(self.unseen).unwrap_or(self.now);
        self.identity.tick();
        let described = &mut self.lethal.body.entities;
        let before = described.len();
        self.identity.describe_again(self.context.generation.load(Ordering::Relaxed), described);
        if described.len() > before {
            self.lethal_since.get_or_insert(self.now);
        }
        if let Some(filter) = self.context.live.newer(&mut self.filter_version) {
            self.context.filter = filter;
        }
        let keep_one_in = if self.source == Source::Ebpf { 1 } else { self.context.governed.sampling() };
        self.sampling_rate = self.context.filter.sampling_rate / f64::from(keep_one_in);
        self.allowance.refill(self.context.filter.events_per_second, self.now);
    }

    /// When a DNS query counts as unanswered.
    pub fn dns_timeout(&self) -> Duration {
        self.context.live.dns_timeout()
    }

    #[inline]
    fn take(&mut self, bytes: &[u8], is_fetched: bool) {
        let Ok((header, kind)) = header(bytes) else {
            self.drops.malformed += 1;
            return;
        };
        let (batch, since) = match lane(kind) {
            Lane::Lethal => (&mut self.lethal, &mut self.lethal_since),
            Lane::Bulk => {
                if self.identity.is_excluded(header.cgroup_id) {
                    self.drops.excluded += 1;
                    return;
                }
                if !self.passes(kind, is_fetched) {
                    return;
                }
                if self.bulk.body.events.len() >= self.context.batch_events() {
                    self.drops.no_room += 1;
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
            Err(_) => self.drops.malformed += 1,
        }
    }

    /// Counts the streams; on a new one every entity is to be described again.
    pub fn generation(&self) -> u64 {
        self.context.generation.load(Ordering::Relaxed)
    }

    /// Whether a bulk record passes the filter, the sampling and the allowance, in this order.
    #[inline]
    fn passes(&mut self, kind: RecordKind, is_fetched: bool) -> bool {
        let filter = &self.context.filter;
        if !filter.admits(kind) {
            self.drops.excluded += 1;
            return false;
        }
        let rate = match (is_fetched, kind) {
            (false, _) => self.sampling_rate,
            (true, RecordKind::Dns) => filter.sampling_rate / f64::from(self.context.governed.sampling()),
            (true, _) => 1.0,
        };
        if !self.sampler.keeps(rate) {
            self.drops.sampled += 1;
            return false;
        }
        if !self.allowance.take(filter.events_per_second) {
            self.drops.rate_limited += 1;
            return false;
        }
        true
    }

    /// Publishes the drops, then pushes each batch that is full, worth a frame, due, or urgent; both when `all` is set. A batch that
    /// finds no room stays.
    fn flush(&mut self, all: bool) {
        self.publish_counts();
        let context = &self.context;
        let is_full = |batch: &Batch| batch.body.events.len() >= context.batch_events();
        let patience =
            if self.held() >= self.worth() { FRAME_AGE.min(context.batch_timeout) } else { context.batch_timeout };
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
        if lethal && Self::push(&context.queues, Lane::Lethal, &mut self.lethal) {
            self.lethal_since = None;
            self.is_urgent = false;
            has_pushed = true;
        }
        if bulk && Self::push(&context.queues, Lane::Bulk, &mut self.bulk) {
            self.bulk_since = None;
            has_pushed = true;
        }
        if has_pushed {
            let is_quiet = self.events_per_second < MANY_PER_SECOND;
            let packer = context.packer.as_ref().filter(|_| is_quiet);
            if !packer.is_some_and(|packer| packer.pack_here()) {
                context.queues.wake_packer();
            }
        }
    }

    /// Ends a source that has said everything: hands on what is left. How long to wait before this is called again, [`None`]
    /// when nothing is left.
    pub fn hand_on(&mut self) -> Option<Duration> {
        self.begin().finish_all();
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
        self.drops.publish(self.context.books.source(self.source));
        self.context.identities.add(self.identity.take_outcomes());
        self.context.kinds.add(self.source, std::mem::replace(&mut self.kinds, [0; KINDS]));
    }

    /// How long the first event of the next batch may be left in its ring, or what is in a batch now.
    pub fn due(&self) -> Duration {
        if self.is_empty() { self.context.batch_timeout } else { self.sleep_limit() }
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
        oldest.map_or(IDLE, |since| self.context.batch_timeout.saturating_sub(since.elapsed()).clamp(NO_ROOM_NAP, IDLE))
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
mod tests;
