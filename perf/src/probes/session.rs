//! Attached probes whose rings are drained by a thread, as a collector would, while a workload runs.
//!
//! In: which programs. Out: what they counted and what the kernel measured of them. Held: the programs and the thread; both end
//! when this is dropped.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tapio_probes::record::RECORD_BYTES_MAX;
use tapio_probes::{
    Counter, LoadConfig, PROGRAMS, Probes, ProgramInfo, ProgramState, RunTime, Tuning, Yardstick, counter_index,
};
use tapio_ringbuf::{CounterArray, Poller, Reader};
use tapio_wire::complain;

use crate::error::Error;

/// How long the reader sleeps between two looks, unless a probe wakes it: the collector's default.
const LINGER: Duration = Duration::from_millis(1);

/// What the reader does.
const READING: u8 = 0;
const RESTING: u8 = 1;
const STOPPED: u8 = 2;

/// The programs that run.
pub struct Session {
    probes: Probes,
    counters: CounterArray,
    reading: Reading,
}

/// The thread that reads the rings; it ends when this is dropped.
pub struct Reading {
    state: Arc<AtomicU8>,
    reader: Option<JoinHandle<Result<u64, tapio_ringbuf::Error>>>,
}

/// What the collector attaches when nothing is configured, except that this process is not left out.
fn by_default() -> LoadConfig {
    LoadConfig { own_pid: None, ..LoadConfig::default() }
}

/// Thresholds at which every event makes a record.
pub fn emit_all() -> Tuning {
    Tuning { block_io_slow_ns: 0, reclaim_burst_ns: 0, ..Tuning::default() }
}

impl Session {
    /// Attaches everything that is on by default.
    pub fn all() -> Result<Self, Error> {
        Self::start(&by_default())
    }

    /// Attaches one program, with the one that notes what it needs; `None` when this kernel cannot.
    pub fn only(program: &ProgramInfo) -> Result<Option<Self>, Error> {
        let before = program.name.strip_suffix("_end").map(|stem| format!("{stem}_begin"));
        let is_wanted = |name: &str| name == program.name || before.as_deref() == Some(name);
        let disabled =
            PROGRAMS.iter().filter(|other| !is_wanted(other.name)).map(|other| other.name.to_owned()).collect();
        let session = Self::start(&LoadConfig { disabled, ..by_default() })?;
        let is_attached = session
            .probes
            .verdicts()
            .iter()
            .any(|verdict| verdict.program == program.name && verdict.state == ProgramState::Attached);
        Ok(is_attached.then_some(session))
    }

    fn start(config: &LoadConfig) -> Result<Self, Error> {
        let probes = Probes::load(config).map_err(|error| Error::Invalid(error.to_string()))?;
        let ring = |error: tapio_ringbuf::Error| Error::Ring(error.to_string());
        let counters = CounterArray::map(probes.counters_map(), probes.counters_len()).map_err(ring)?;
        let lethal =
            Reader::from_bpf_map(probes.lethal_ring(), probes.lethal_ring_bytes(), RECORD_BYTES_MAX).map_err(ring)?;
        let mut readers = vec![lethal];
        let poller = Poller::new().map_err(ring)?;
        poller.add(probes.lethal_ring(), 0).map_err(ring)?;
        for (cpu, fd) in probes.bulk_rings().enumerate() {
            readers.push(Reader::from_bpf_map(fd, probes.bulk_ring_bytes(), RECORD_BYTES_MAX).map_err(ring)?);
            poller.add(fd, 1 + cpu as u64).map_err(ring)?;
        }
        Ok(Self { probes, counters, reading: Reading::start(readers, poller)? })
    }

    /// Takes the programs from their hooks, and lets the reader sleep: as if there were no probes, but they are quickly back.
    pub fn suspend(&mut self) -> Result<(), Error> {
        self.probes.suspend().map_err(|error| Error::Invalid(error.to_string()))?;
        self.reading.enter(RESTING);
        Ok(())
    }

    /// Undoes [`Self::suspend`].
    pub fn resume(&mut self) -> Result<(), Error> {
        self.reading.enter(READING);
        self.probes.resume().map_err(|error| Error::Invalid(error.to_string()))
    }

    /// Records that these programs have put into rings so far.
    pub fn records(&self, programs: &[&ProgramInfo]) -> u64 {
        let mut kinds: Vec<_> = programs.iter().flat_map(|program| program.produces).copied().collect();
        kinds.sort_by_key(|kind| *kind as u16);
        kinds.dedup();
        let mut records = 0u64;
        for cpu in 0..self.probes.possible_cpus() {
            for &kind in &kinds {
                let count = |counter| self.counters.get(counter_index(cpu, kind, counter));
                let lost = count(Counter::Dropped) + count(Counter::Sampled);
                records += count(Counter::Emitted).saturating_sub(lost);
            }
        }
        records
    }

    /// Changes thresholds and sampling.
    pub fn tune(&self, tuning: Tuning) -> Result<(), Error> {
        self.probes
            .controls()
            .set(tuning)
            .map_err(|source| Error::Io { what: "change the probes' thresholds".into(), source })
    }

    /// What the kernel measured of a program.
    pub fn run_time(&self, program: &ProgramInfo) -> RunTime {
        self.probes.run_time(program.name).unwrap_or_default()
    }
}

impl Reading {
    /// Reads what a program to compare with puts into its ring; [`None`] when it has none.
    pub fn of(yardstick: &Yardstick) -> Result<Option<Self>, Error> {
        let Some((ring, bytes)) = yardstick.ring() else { return Ok(None) };
        let failed = |error: tapio_ringbuf::Error| Error::Ring(error.to_string());
        let reader = Reader::from_bpf_map(ring, bytes, RECORD_BYTES_MAX).map_err(failed)?;
        let poller = Poller::new().map_err(failed)?;
        poller.add(ring, 0).map_err(failed)?;
        Self::start(vec![reader], poller).map(Some)
    }

    fn start(readers: Vec<Reader>, poller: Poller) -> Result<Self, Error> {
        let state = Arc::new(AtomicU8::new(READING));
        let seen = Arc::clone(&state);
        let reader = thread::Builder::new()
            .name("rings".into())
            .spawn(move || drain(readers, poller, &seen))
            .map_err(|source| Error::Io { what: "start the thread that reads the rings".into(), source })?;
        Ok(Self { state, reader: Some(reader) })
    }

    fn enter(&self, state: u8) {
        self.state.store(state, Ordering::Relaxed);
        if let Some(reader) = &self.reader {
            reader.thread().unpark();
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.enter(STOPPED);
        if let Some(reader) = self.reader.take()
            && !matches!(reader.join(), Ok(Ok(_)))
        {
            complain!("tapio-perf: the thread that reads the rings failed; records per second are too low");
        }
    }
}

fn drain(mut readers: Vec<Reader>, mut poller: Poller, state: &AtomicU8) -> Result<u64, tapio_ringbuf::Error> {
    let mut records = 0;
    let mut sum = 0u64;
    loop {
        match state.load(Ordering::Relaxed) {
            STOPPED => break,
            // What is in the rings by then is read later.
            RESTING => {
                thread::park();
                continue;
            }
            _ => {}
        }
        let before = records;
        for reader in &mut readers {
            let drained = reader.drain(4096, |record| sum = sum.wrapping_add(u64::from(record[0])))?;
            records += drained.records as u64;
        }
        if records == before {
            poller.wait(Some(LINGER))?;
        }
    }
    std::hint::black_box(sum);
    Ok(records)
}

/// Has the kernel measure run times while the descriptor is open.
pub fn count_run_time() -> Result<OwnedFd, Error> {
    tapio_probes::count_run_time()
        .map_err(|source| Error::Io { what: "have the kernel measure run times (root may)".into(), source })
}
