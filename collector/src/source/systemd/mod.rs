//! The systemd source: unit changes and jobs, from the system bus.
//!
//! What enters: signals of `org.freedesktop.systemd1` and answers to a bounded number of questions. What leaves:
//! `UnitState`, `UnitJob` and `Gap` events. What must hold: a unit's event has the same entity as kernel events of the
//! unit's cgroup. An interval in which changes may have been missed is declared. State for units, signals and jobs is
//! bounded.
//!
//! - `counts.rs`: what is counted
//! - `name.rs`: names of units, objects and cgroups, and what is left out
//! - `units.rs`: the table of units and what of their changes matters
//! - `words.rs`: words of states and results, by number
//! - `session.rs`: one connection to the bus

mod counts;
mod name;
mod session;
mod units;
mod words;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tapio_wire::event::{Detail, EntityId, Event, Gap, Lane, Source, UnitJob, UnitState};
use tapio_wire::program::backoff::Backoff;
use tapio_wire::program::token_bucket::TokenBucket;
use tokio::sync::watch;
use zbus::Connection;

use crate::base::clock::boottime_ns;
use crate::base::status::Status;
use crate::intake::Intake;
use crate::intake::pass::Pass;
use crate::settings::config::SystemdSection;
pub use counts::SystemdCounts;
use name::Selection;
pub use name::Skip;
use session::{End, Session};
use units::{UnitReport, Units};

const DESTINATION: &str = "org.freedesktop.systemd1";
/// How long connecting, or an answer, may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// Jobs reported at once, and then a second.
const JOBS_BURST: u32 = 100;
const JOBS_PER_SECOND: f64 = 20.0;

/// Why the systemd source cannot run.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    #[error(
        "no system bus at {address}: {error}; mount the host's /run/dbus, set collectors.systemd.bus, or take systemd out of \
         collector.enabled_collectors"
    )]
    Bus { address: String, error: Box<zbus::Error> },
    #[error("the bus at {address} has no systemd: {error}")]
    NoSystemd { address: String, error: Box<zbus::Error> },
}

/// Reads unit changes and jobs from the system bus.
pub struct SystemdSource {
    bus: Option<String>,
    selection: Selection,
    node: EntityId,
    connection: Connection,
    status: Status,
    counts: Arc<SystemdCounts>,
}

fn address(bus: Option<&str>) -> String {
    let set = || std::env::var("DBUS_SYSTEM_BUS_ADDRESS").ok().filter(|address| !address.is_empty());
    bus.map(str::to_owned).or_else(set).unwrap_or_else(|| "unix:path=/run/dbus/system_bus_socket".into())
}

async fn connect(bus: Option<&str>) -> zbus::Result<Connection> {
    let builder = zbus::connection::Builder::address(address(bus).as_str()).method_timeout(ANSWER_TIMEOUT);
    match tokio::time::timeout(ANSWER_TIMEOUT, builder.build()).await {
        Ok(built) => built,
        Err(_) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()),
    }
}

impl SystemdSource {
    /// Connects to the bus and finds systemd on it. `node` is the node's entity.
    ///
    /// # Errors
    /// When there is no bus, or no systemd on it.
    pub async fn connect(section: &SystemdSection, node: EntityId) -> Result<Self, SystemdError> {
        let bus = section.bus.clone();
        let place = address(bus.as_deref());
        let connection = match connect(bus.as_deref()).await {
            Ok(connection) => connection,
            Err(error) => return Err(SystemdError::Bus { address: place, error: Box::new(error) }),
        };
        if let Err(error) = session::owner(&connection).await {
            return Err(SystemdError::NoSystemd { address: place, error: Box::new(error) });
        }
        let (status, counts) = (Status::default(), Arc::default());
        Ok(Self { bus, selection: Selection::of(section), node, connection, status, counts })
    }

    /// What it waits for, for `/readyz`.
    pub fn status(&self) -> Status {
        self.status.clone()
    }

    /// Counters of the source.
    pub fn counts(&self) -> Arc<SystemdCounts> {
        Arc::clone(&self.counts)
    }

    /// Runs until `stop` is set, over as many connections as it takes.
    pub async fn run(self, intake: Intake, mut stop: watch::Receiver<bool>) {
        let mut units = Units::default();
        let mut reporter = Reporter::new(intake, self.selection, self.node, self.counts);
        let mut connection = Ok(self.connection);
        let mut backoff = Backoff::new(BACKOFF_MIN, BACKOFF_MAX);
        loop {
            let began = Instant::now();
            let end = match connection {
                Ok(connection) => match Session::begin(connection, &mut units, &mut reporter).await {
                    Ok(session) => {
                        self.status.runs();
                        session.run(&mut stop).await
                    }
                    Err(error) => End::Lost(format!("systemd is not on the bus: {error}")),
                },
                Err(error) => End::Lost(format!("no bus: {error}")),
            };
            let reason = match end {
                End::Stopped => break,
                End::Lost(reason) => reason,
            };
            if began.elapsed() > BACKOFF_MAX {
                // It was well for a while.
                backoff.reset();
            }
            if reporter.lost(&reason) {
                tracing::warn!(reason, "lost the connection to systemd");
            }
            self.status.waits_for(format!("waiting for the system bus: {reason}"));
            let wait = backoff.pause();
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                () = reporter.idle(wait) => {}
            }
            connection = connect(self.bus.as_deref()).await;
            reporter.counts.reconnects.fetch_add(1, Ordering::Relaxed);
        }
        reporter.finish(&mut units).await;
    }
}

/// Turns what is reported of units into events.
struct Reporter {
    intake: Intake,
    selection: Selection,
    node: EntityId,
    counts: Arc<SystemdCounts>,
    cgroup_prefix: String,
    counts_pids_apart: bool,
    /// Since when, and why, nothing is heard.
    lost: Option<(u64, String)>,
    has_listed: bool,
    pending: VecDeque<Pending>,
    jobs: TokenBucket,
}

enum Pending {
    Job { unit: String, cgroup: String, result: String, time_ns: u64 },
    Gap { reason: String, from_ns: u64, until_ns: u64, found_gone: u32 },
}

/// The source was asked to stop before there was room.
struct Stopped;

impl Reporter {
    fn new(intake: Intake, selection: Selection, node: EntityId, counts: Arc<SystemdCounts>) -> Self {
        Self {
            intake,
            selection,
            node,
            counts,
            cgroup_prefix: String::new(),
            counts_pids_apart: false,
            lost: None,
            has_listed: false,
            pending: VecDeque::new(),
            jobs: TokenBucket::new(JOBS_BURST, JOBS_PER_SECOND, Instant::now()),
        }
    }

    fn is_first(&self) -> bool {
        !self.has_listed
    }

    /// True when it was not lost before.
    fn lost(&mut self, reason: &str) -> bool {
        let is_new = self.lost.is_none();
        self.lost.get_or_insert_with(|| (boottime_ns(), reason.to_owned()));
        is_new
    }

    fn listed(&mut self, cgroup_prefix: String, counts_pids_apart: bool) {
        self.cgroup_prefix = cgroup_prefix;
        self.counts_pids_apart = counts_pids_apart;
        self.has_listed = true;
    }

    /// Changes are heard again, and a list has shown what is there now.
    fn resumed(&mut self, found_gone: usize) {
        if let Some((from_ns, reason)) = self.lost.take() {
            tracing::info!(reason, found_gone, "connected to systemd again");
            let found_gone = u32::try_from(found_gone).unwrap_or(u32::MAX);
            self.pending.push_back(Pending::Gap { reason, from_ns, until_ns: boottime_ns(), found_gone });
        }
    }

    fn job(&mut self, unit: &str, cgroup: String, result: &str, now: Instant) {
        if self.jobs.take(1, now).is_err() {
            self.counts.coalesced.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let (unit, result, time_ns) = (unit.to_owned(), result.to_owned(), boottime_ns());
        self.pending.push_back(Pending::Job { unit, cgroup, result, time_ns });
    }

    /// Takes everything that is to be reported to the intake, waiting for room where there is none.
    async fn report(&mut self, units: &mut Units, stop: &mut watch::Receiver<bool>) -> Result<(), Stopped> {
        self.counts.coalesced.fetch_add(units.take_coalesced(), Ordering::Relaxed);
        self.counts.units.store(units.len() as u64, Ordering::Relaxed);
        let mut pass = self.intake.begin();
        // Room first: what is taken out and then given up would be lost without a trace.
        while !self.pending.is_empty() {
            make_room(&mut pass, stop).await?;
            if let Some(pending) = self.pending.pop_front() {
                emit_pending(&mut pass, &pending, &self.cgroup_prefix, self.node);
            }
        }
        while units.has_report() {
            make_room(&mut pass, stop).await?;
            if let Some(report) = units.next_report() {
                emit(&mut pass, &report, &self.cgroup_prefix, self.counts_pids_apart);
            }
        }
        pass.finish();
        Ok(())
    }

    /// How long the caller may sleep before a batch is due; [`None`] while there is none.
    fn sleep_limit(&self) -> Option<Duration> {
        (!self.intake.is_empty()).then(|| self.intake.sleep_limit())
    }

    /// Waits, and sends what is due meanwhile.
    async fn idle(&mut self, wait: Duration) {
        let until = tokio::time::Instant::now() + wait;
        while tokio::time::Instant::now() < until {
            let due = self.sleep_limit().map(|limit| tokio::time::Instant::now() + limit);
            tokio::time::sleep_until(due.map_or(until, |due| due.min(until))).await;
            self.intake.begin().finish();
        }
    }

    /// Hands on what is left. As long as it takes: the pipeline bounds its shutdown as a whole.
    async fn finish(&mut self, units: &mut Units) {
        let (_never, mut stop) = watch::channel(false);
        if self.report(units, &mut stop).await.is_err() {
            return;
        }
        while let Some(pause) = self.intake.hand_on() {
            tokio::time::sleep(pause).await;
        }
    }
}

/// Waits until one more event finds room.
async fn make_room(pass: &mut Pass<'_>, stop: &mut watch::Receiver<bool>) -> Result<(), Stopped> {
    while pass.room_of(Lane::Lethal) == 0 {
        pass.make_room();
        if pass.room_of(Lane::Lethal) == 0 {
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return Err(Stopped),
                () = tokio::time::sleep(pass.sleep_limit()) => {}
            }
        }
    }
    Ok(())
}

fn emit(pass: &mut Pass<'_>, report: &UnitReport, cgroup_prefix: &str, counts_pids_apart: bool) {
    let now_ns = boottime_ns();
    let cgroup = format!("{cgroup_prefix}{}", report.cgroup);
    let pid = if counts_pids_apart { 0 } else { report.main_pid };
    // What was found in a list or merged may have happened long ago; then the event has the time at which it is emitted.
    let happened_ns = boottime_of_us(report.changed_us).filter(|at| now_ns.saturating_sub(*at) < 1_000_000_000);
    pass.observe(|batch, identity| Event {
        time_ns: happened_ns.unwrap_or(now_ns),
        entity: identity.resolve_path(&cgroup, Lane::Lethal, &mut batch.body.entities),
        pid,
        source: Source::Systemd,
        body: Detail::UnitState(Box::new(UnitState {
            unit: batch.text(&report.unit),
            active_state: batch.text(&report.active_state),
            sub_state: batch.text(&report.sub_state),
            result: batch.text(&report.result),
            main_code: report.main_code,
            main_status: report.main_status,
            main_pid: report.main_pid,
            restarts: report.restarts,
            main_exited_ns: boottime_of_us(report.main_exited_us).unwrap_or(0),
        })),
    });
}

fn emit_pending(pass: &mut Pass<'_>, pending: &Pending, prefix: &str, node: EntityId) {
    pass.observe(|batch, identity| match pending {
        Pending::Job { unit, cgroup, result, time_ns } => Event {
            time_ns: *time_ns,
            entity: identity.resolve_path(&format!("{prefix}{cgroup}"), Lane::Lethal, &mut batch.body.entities),
            pid: 0,
            source: Source::Systemd,
            body: Detail::UnitJob(Box::new(UnitJob { unit: batch.text(unit), result: batch.text(result) })),
        },
        Pending::Gap { reason, from_ns, until_ns, found_gone } => Event {
            time_ns: *until_ns,
            entity: node,
            pid: 0,
            source: Source::Systemd,
            body: Detail::Gap(Box::new(Gap {
                what: batch.text("units"),
                reason: batch.text(reason),
                from_ns: *from_ns,
                until_ns: *until_ns,
                found_gone: *found_gone,
            })),
        },
    });
}

/// `CLOCK_MONOTONIC` in microseconds as `CLOCK_BOOTTIME` in nanoseconds: they differ by the time spent suspended so
/// far. [`None`] for 0, which systemd sends for an unknown time, and for times to come.
fn boottime_of_us(monotonic_us: u64) -> Option<u64> {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now_ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
    let past_ns = now_ns.checked_sub(monotonic_us.checked_mul(1000)?)?;
    (monotonic_us > 0).then(|| boottime_ns().saturating_sub(past_ns))
}
