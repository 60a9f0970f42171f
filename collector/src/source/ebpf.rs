//! The kernel source: drains the rings of the probes.
//!
//! What enters: records of the lethal ring, then of each CPU's bulk ring. What leaves: batches. What must hold: a
//! lethal record waits neither for a nap to end (the probes wake the reader for it) nor behind bulk records. No CPU's
//! bulk ring waits for ever behind another's. The kernel's counters are stated before the events that they count.

mod missed;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tapio_probes::record::{RECORD_BYTES_MAX, RecordKind};
use tapio_probes::{Aggregates, Controls, Counter, LoadConfig, Probes, RunTimes, Shares, counter_index};
use tapio_ringbuf::{CounterArray, Drained, Poller, Reader, WakeupFlag};
use tapio_wire::event::Lane;
use tapio_wire::ledger::{Reason, Stage};

use crate::base::books::SourceBooks;
use crate::base::clock::boottime_ns;
use crate::budget::nap::Nap;
use crate::intake::Intake;
use crate::intake::pass::Pass;
use crate::source::stop::Stop;

pub use self::missed::MissedRuns;

const LETHAL_TOKEN: u64 = 0;
/// How often the kernel is asked what it skipped.
const MISSED_INTERVAL: Duration = Duration::from_secs(10);
/// How often it is looked for cgroups that flood the lethal lane, while there are any.
const FLOODS_INTERVAL: Duration = Duration::from_secs(1);
/// How often the programs' counters are read while there is traffic: those of every CPU, in lines that other CPUs write to.
const COUNTERS_INTERVAL: Duration = Duration::from_millis(100);
const STOP_TOKEN: u64 = 1;
const BULK_TOKEN: u64 = 2;

/// Why the kernel source cannot run.
#[derive(Debug, thiserror::Error)]
pub enum EbpfError {
    #[error(transparent)]
    Probes(#[from] tapio_probes::Error),
    #[error("cannot read the probes' rings: {0}")]
    Ring(#[from] tapio_ringbuf::Error),
}

/// The loaded probes and their mapped rings.
pub struct EbpfSource {
    probes: Option<Probes>,
    lethal: Reader,
    /// Readers of the bulk rings, by CPU.
    bulk: Vec<Reader>,
    /// Index of the CPU whose ring comes first in the next pass.
    bulk_next: usize,
    wakeup: WakeupFlag,
    counters: CounterArray,
    cpus: usize,
    poller: Poller,
    nap: Nap,
    stop: Arc<Stop>,
    missed: Arc<MissedRuns>,
    missed_read: Instant,
    counters_read: Instant,
    emitted: u64,
    dropped: u64,
    sampled: u64,
    excluded: u64,
    limited: u64,
    /// Which cgroups are left out of the lethal lane, and how many were left out when it was last asked.
    shares: Shares,
    shares_read: (Instant, u64),
    /// How often the sums in the kernel are fetched.
    flush_interval: Duration,
    /// What is left of them once the probes are detached.
    rest: Option<Aggregates>,
    /// Records made of them; no counter of the kernel has them.
    aggregated: u64,
}

/// What a pass over the rings has brought.
struct Found {
    records: usize,
    /// True if there was no space for all of it.
    has_more: bool,
}

/// How full a ring is, as a share of its capacity.
fn fill(ring: &Reader) -> f64 {
    ring.pending_bytes() as f64 / ring.capacity_bytes() as f64
}

impl EbpfSource {
    /// Loads and attaches the probes.
    ///
    /// # Errors
    /// When not one of them can work here.
    pub fn load(
        config: &LoadConfig,
        linger: Duration,
        flush_interval: Duration,
        stop: Arc<Stop>,
    ) -> Result<Self, EbpfError> {
        let probes = Probes::load(config)?;
        let lethal = Reader::from_bpf_map(probes.lethal_ring(), probes.lethal_ring_bytes(), RECORD_BYTES_MAX)?;
        let wakeup = WakeupFlag::map(probes.control_map())?;
        let counters = CounterArray::map(probes.counters_map(), probes.counters_len())?;
        let shares = Shares::map(&probes)?;
        let bulk =
            probes.bulk_rings().map(|ring| Reader::from_bpf_map(ring, probes.bulk_ring_bytes(), RECORD_BYTES_MAX));
        let bulk = bulk.collect::<Result<Vec<_>, _>>()?;
        let poller = Poller::new()?;
        for ring in probes.bulk_rings() {
            poller.add_edge(ring, BULK_TOKEN)?;
        }
        // Reported once for each wakeup: rings that fill all the time would otherwise end every nap at its beginning.
        poller.add_edge(probes.lethal_ring(), LETHAL_TOKEN)?;
        {
            use std::os::fd::AsFd;
            poller.add(stop.eventfd().as_fd(), STOP_TOKEN)?;
        }
        let cpus = probes.possible_cpus();
        let missed = MissedRuns::new(probes.verdicts().iter().map(|verdict| verdict.program));
        Ok(Self {
            probes: Some(probes),
            lethal,
            bulk,
            bulk_next: 0,
            wakeup,
            counters,
            cpus,
            poller,
            nap: Nap::new(linger),
            stop,
            missed: Arc::new(missed),
            missed_read: Instant::now(),
            counters_read: Instant::now(),
            emitted: 0,
            dropped: 0,
            sampled: 0,
            excluded: 0,
            limited: 0,
            shares,
            shares_read: (Instant::now(), 0),
            flush_interval,
            rest: None,
            aggregated: 0,
        })
    }

    /// What became of each program.
    pub fn verdicts(&self) -> Vec<tapio_probes::Verdict> {
        self.probes.as_ref().map(|probes| probes.verdicts().to_vec()).unwrap_or_default()
    }

    /// What may be changed while it runs; [`None`] once it was asked to stop.
    pub fn controls(&self) -> Option<Arc<Controls>> {
        self.probes.as_ref().map(Probes::controls)
    }

    /// What the programs cost; [`None`] once it was asked to stop.
    pub fn run_times(&self) -> Option<RunTimes> {
        self.probes.as_ref().map(Probes::run_times)
    }

    /// What the kernel skipped.
    pub fn missed_runs(&self) -> Arc<MissedRuns> {
        Arc::clone(&self.missed)
    }

    /// Drains until asked to stop, then detaches the probes and drains what is left.
    ///
    /// # Errors
    /// When the ring breaks its layout, which the kernel does not do, or polling fails.
    pub fn run(mut self, mut intake: Intake) -> Result<(), EbpfError> {
        while !self.stop.is_set() {
            match self.pass(&mut intake, false)? {
                Found { has_more: false, .. } => self.sleep(&mut intake)?,
                Found { records: 0, .. } => self.wait_for_room(),
                _ => {}
            }
            if self.missed_read.elapsed() >= MISSED_INTERVAL
                && let Some(probes) = &self.probes
            {
                self.missed.read(probes);
                self.missed_read = Instant::now();
            }
        }
        if let Some(probes) = self.probes.take() {
            self.rest = Some(probes.detach());
            // A program that began before may still be at work, which takes it microseconds.
            std::thread::sleep(self.nap.shortest());
        }
        self.stop.eventfd().clear()?;
        loop {
            self.pass(&mut intake, true)?;
            if self.rings_are_empty() && self.rest.is_none() && intake.is_empty() {
                return Ok(());
            }
            if !intake.is_empty() {
                self.wait_for_room();
            }
        }
    }

    fn pass(&mut self, intake: &mut Intake, all: bool) -> Result<Found, EbpfError> {
        let before = intake.accepted();
        let mut pass = intake.begin();
        let fullest = [&self.lethal].into_iter().chain(&self.bulk).map(fill).fold(0.0, f64::max);
        let drained = match self.drain_rings(&mut pass) {
            Ok(drained) => drained,
            Err(error) => {
                // What was accepted before is not counted until it is stated as emitted.
                self.state_counters(pass.books());
                return Err(error);
            }
        };
        let Drained { records, discarded, more: has_more, .. } = drained;
        let fetched = self.fetch_sums(&mut pass) | self.emit_floods(&mut pass);
        if all || (self.counters_read.elapsed() >= COUNTERS_INTERVAL && (records > 0 || discarded > 0 || fetched)) {
            self.state_counters(pass.books());
        } else if records > 0 || discarded > 0 || fetched {
            self.state_emitted(pass.books());
        }
        match all {
            true => pass.finish_all(),
            false => pass.finish(),
        }
        self.nap.saw(Instant::now(), records, intake.accepted() - before, fullest);
        intake.expect(self.nap.events_per_second());
        Ok(Found { records, has_more })
    }

    fn drain_rings(&mut self, pass: &mut Pass<'_>) -> Result<Drained, EbpfError> {
        let mut all = self.lethal.drain(pass.room_of(Lane::Lethal), |record| pass.accept(record))?;
        for _ in 0..self.bulk.len() {
            // Filters may let fewer pass than were drained: the room is what is left in the batch.
            let room = pass.room_of(Lane::Bulk);
            if room == 0 {
                all.more |= self.bulk.iter().any(|ring| !ring.is_empty());
                break;
            }
            let ring = &mut self.bulk[self.bulk_next];
            if !ring.is_empty() {
                let drained = ring.drain(room, |record| pass.accept(record))?;
                all.records += drained.records;
                all.discarded += drained.discarded;
                all.more |= drained.more;
            }
            self.bulk_next = (self.bulk_next + 1) % self.bulk.len();
        }
        Ok(all)
    }

    /// Takes what the kernel has summed up, as far as there is room. The rings come first: their records are older.
    fn fetch_sums(&mut self, pass: &mut Pass<'_>) -> bool {
        let room = pass.room_of(Lane::Bulk);
        if room == 0 {
            return false;
        }
        let before = self.aggregated;
        let dns_timeout = pass.dns_timeout();
        let aggregated = &mut self.aggregated;
        let mut each = |record: &[u8]| {
            *aggregated += 1;
            pass.accept_fetched(record);
        };
        let fetched = match (&mut self.probes, &mut self.rest) {
            (Some(probes), _) => {
                let aggregates = probes.aggregates();
                aggregates.set_dns_timeout(dns_timeout);
                aggregates.flush(self.flush_interval, room, &mut each).map(|_| false)
            }
            (None, Some(rest)) => rest.flush_rest(room, &mut each).map(|count| count < room),
            (None, None) => Ok(false),
        };
        match fetched {
            Ok(false) => {}
            Ok(true) => self.rest = None,
            Err(error) => {
                tracing::warn!(%error, "cannot read the probes' sums");
                self.flush_interval = Duration::MAX;
                self.rest = None;
            }
        }
        self.aggregated > before
    }

    /// Emits an event for each cgroup whose records were dropped for its rate; looks about once a second.
    fn emit_floods(&mut self, pass: &mut Pass<'_>) -> bool {
        let (read, limited) = self.shares_read;
        let is_due = read.elapsed() >= FLOODS_INTERVAL && (self.limited > limited || self.shares.has_floods());
        let room = pass.room_of(Lane::Lethal);
        if !is_due || room == 0 {
            return false;
        }
        self.shares_read = (Instant::now(), self.limited);
        let before = self.aggregated;
        let aggregated = &mut self.aggregated;
        self.shares.read(boottime_ns(), room, |record| {
            *aggregated += 1;
            pass.accept_fetched(record);
        });
        self.aggregated > before
    }

    fn rings_are_empty(&self) -> bool {
        self.lethal.is_empty() && self.bulk.iter().all(Reader::is_empty)
    }

    /// States what was read at the least, so that nothing is ever archived before it was emitted.
    fn state_emitted(&mut self, books: &SourceBooks) {
        let consumed = self.lethal.consumed() + self.bulk.iter().map(Reader::consumed).sum::<u64>();
        self.emitted = self.emitted.max(consumed + self.dropped + self.sampled + self.excluded + self.limited);
        books.set_emitted(self.emitted + self.aggregated);
    }

    /// Publishes what was emitted, and what the kernel lost and left out.
    fn state_counters(&mut self, books: &SourceBooks) {
        self.counters_read = Instant::now();
        let (mut emitted, mut dropped, mut sampled, mut excluded, mut lethal_dropped) = (0, 0, 0, 0, 0);
        let mut limited = 0;
        for cpu in 0..self.cpus {
            for kind in RecordKind::ALL {
                let lost = self.counters.get(counter_index(cpu, kind, Counter::Dropped));
                dropped += lost;
                lethal_dropped += if kind.is_lethal() { lost } else { 0 };
                sampled += self.counters.get(counter_index(cpu, kind, Counter::Sampled));
                excluded += self.counters.get(counter_index(cpu, kind, Counter::Excluded));
                limited += self.counters.get(counter_index(cpu, kind, Counter::Limited));
                emitted += self.counters.get(counter_index(cpu, kind, Counter::Emitted));
            }
        }
        self.missed.set_lethal_dropped(lethal_dropped);
        let newly_sampled = sampled.saturating_sub(self.sampled);
        self.dropped = dropped.max(self.dropped);
        self.limited = limited.max(self.limited);
        self.sampled += newly_sampled;
        let newly_excluded = excluded.saturating_sub(self.excluded);
        self.excluded += newly_excluded;
        // A record is counted as emitted before it is counted as lost or can be read, so there are at least as many as those.
        self.emitted = emitted.max(self.emitted);
        self.state_emitted(books);
        books.set_dropped(Stage::Ring, Reason::Full, self.dropped);
        books.set_dropped(Stage::Ring, Reason::RateLimited, self.limited);
        // Added: the intake counts there what it leaves out itself.
        books.drop_events(Stage::Filter, Reason::Sampled, newly_sampled);
        books.drop_events(Stage::Filter, Reason::Excluded, newly_excluded);
    }

    /// Waits for space for what the ring holds. The packer makes some in a moment; the ring, which is readable all the time,
    /// cannot know when.
    fn wait_for_room(&self) {
        std::thread::sleep(self.nap.shortest());
    }

    fn sleep(&mut self, intake: &mut Intake) -> Result<(), EbpfError> {
        if let Some(nap) = self.nap.length(intake.missing(), intake.due(), !intake.is_empty()) {
            // Without asking for wakeups: a record that does not force one can wait this long, and while there is traffic the
            // probes are spared the wakeup's cost. What is urgent, and a ring that becomes a quarter full, ends it.
            intake.napped(nap);
            self.poller.wait(Some(nap)).map(|_| ())?;
            return Ok(());
        }
        intake.napped(Duration::ZERO);
        self.wakeup.set(true);
        // A record that was committed before its probe saw the flag is found here. A later one brings a wakeup, and so
        // does the end of one that is being written.
        let limit = if self.rings_are_empty() { intake.sleep_limit() } else { self.nap.shortest() };
        self.poller.wait(Some(limit)).map(|_| ())?;
        self.wakeup.set(false);
        // What was sampled away in the meantime left no record that would bring this about.
        if self.counters_read.elapsed() >= COUNTERS_INTERVAL {
            self.state_counters(intake.books());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
