//! The threads that write and read the log.
//!
//! `log-publisher` and `log-reader` have a runtime and a connection each, so that neither waits for the other, nor a collector for
//! any of them. `log-healer` goes through the archive for what a lost log had. `log-leader` keeps or waits for the lease of the server
//! that delivers outwards.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, IntCounter, IntGauge};
use tapio_wire::program::backoff;
use tokio::runtime;
use tokio::sync::watch;

use super::config::ClusterSection;
use super::leader::{Election, Leadership, Timing};
use super::link::Link;
use super::losses::{ClusterLosses, Other};
use super::outgoing::Outgoing;
use super::publisher::Publisher;
use super::reader::Reader;
use crate::correlate::{ClueBus, InProcessBus, LogUpdate, Message};
use crate::vitals::{Pulse, Sign, Vitals};

/// How long a start waits for the log before it goes on without.
const SETTLE_MAX: Duration = Duration::from_secs(30);

/// Between two attempts to go through an archive that could not be read.
const HEAL_RETRY: Duration = Duration::from_secs(10);

/// How often a server waits for frames that its archive does not have yet when it refills the log.
const DISK_WAITS_MAX: u32 = 8;

/// Sends the frames of the archive's last minutes through shards that publish to this bus, until it is asked to stop. Otherwise it
/// says why it could not.
pub type Healer = Box<dyn Fn(Arc<dyn ClueBus>, &dyn Fn() -> bool) -> Result<(), String> + Send>;

/// Owns the threads that write and read the log.
pub struct Cluster {
    outgoing: Arc<Outgoing>,
    losses: Arc<ClusterLosses>,
    link: Arc<Link>,
    leadership: Arc<Leadership>,
    end: watch::Sender<bool>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    signs: Vec<(&'static str, Sign)>,
    server: String,
}

impl Cluster {
    /// Starts writing and reading. `finder` is one that is driven by the log, with `losses`; messages are kept for `keep`. Other
    /// servers learn that this one answers at `address`.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(
        config: &ClusterSection,
        keep: Duration,
        address: &str,
        entries_max: usize,
        finder: &InProcessBus,
        losses: Arc<ClusterLosses>,
        healer: Healer,
    ) -> io::Result<Self> {
        Self::start_with(config, keep, Timing::default(), address, entries_max, finder, losses, healer)
    }

    #[allow(clippy::too_many_arguments, reason = "each is a part of the server")]
    /// Starts with leases of another length: see [`Self::start`].
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start_with(
        config: &ClusterSection,
        keep: Duration,
        timing: Timing,
        address: &str,
        entries_max: usize,
        finder: &InProcessBus,
        losses: Arc<ClusterLosses>,
        healer: Healer,
    ) -> io::Result<Self> {
        let outgoing = Arc::new(Outgoing::new(entries_max));
        let link = Arc::new(Link::default());
        let leadership = Arc::new(Leadership::shared(&config.server_name()));
        let (end, ended) = watch::channel(false);
        let mut started = Self {
            outgoing: Arc::clone(&outgoing),
            losses: Arc::clone(&losses),
            link: Arc::clone(&link),
            leadership: Arc::clone(&leadership),
            end,
            threads: Mutex::default(),
            signs: Vec::new(),
            server: config.server_name(),
        };
        let bus = Arc::clone(&outgoing);
        let publisher = Publisher::new(config, keep, address.to_owned(), outgoing, finder.clone(), Arc::clone(&link));
        started.spawn("log-publisher", publisher.run(ended.clone()))?;
        let reader = Reader::new(config, keep, finder.clone(), Arc::clone(&link));
        started.spawn("log-reader", reader.run(ended.clone()))?;
        let election = Election::new(config, keep, timing, leadership, Arc::clone(&link));
        started.spawn("log-leader", election.run(ended.clone()))?;
        let healing = (healer, timing.disk_wait, HEAL_RETRY);
        started.spawn("log-healer", heal(link, losses, finder.clone(), bus, healing, ended))?;
        Ok(started)
    }

    fn spawn(&mut self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
        let pulse = Pulse::default();
        self.signs.push((name, pulse.sign()));
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            runtime.block_on(work);
            drop(pulse);
        })?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// What the shards publish on.
    pub fn bus(&self) -> Arc<Outgoing> {
        Arc::clone(&self.outgoing)
    }

    /// How it stands.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Who of the servers leads.
    pub fn leadership(&self) -> &Arc<Leadership> {
        &self.leadership
    }

    /// Returns this server's name.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// The servers that say nothing.
    pub fn silent(&self) -> Vec<String> {
        self.losses.silent()
    }

    /// Servers whose messages this one could not read lately.
    pub fn unread(&self) -> Vec<String> {
        self.losses.unread_servers()
    }

    /// The other servers, as far as they are known.
    pub fn others(&self) -> Vec<Other> {
        self.losses.others(&self.server)
    }

    /// Servers that were given up: see [`ClusterLosses::gone`].
    pub fn gone(&self) -> Vec<Other> {
        self.losses.gone()
    }

    /// Watches the threads, and lets `/readyz` show what this server may not know.
    pub fn watch(&self, vitals: &Vitals) {
        let link = Arc::clone(&self.link);
        vitals.remark(move || link.doubt());
        for (name, sign) in &self.signs {
            vitals.watch(*name, sign.clone());
        }
    }

    /// Waits until the log was read to its end, or cannot be had.
    pub async fn settle(&self) {
        if tokio::time::timeout(SETTLE_MAX, self.link.settled()).await.is_err() {
            tracing::warn!("still reading the servers' log: publishing the archive's last minutes meanwhile");
        }
    }

    /// Frames come out of the archive from now on: what the log has already is not published again.
    pub fn begin_replay(&self) {
        self.outgoing.begin_replay(self.losses.coverage());
    }

    /// Waits until all of it is published, and takes frames from collectors from then on.
    pub fn end_replay(&self) {
        self.outgoing.wait_passed();
        self.outgoing.end_replay();
    }

    /// Publishes what is left and that this server ends, and ends the threads. Reading the archive ends with the
    /// publisher.
    pub fn stop(&self) {
        self.end.send_replace(true);
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the log has failed");
            }
        }
    }

    /// Stops publishing, as if the server were killed: for tests.
    #[doc(hidden)]
    pub fn freeze(&self) {
        self.link.frozen.store(true, Ordering::Release);
    }

    /// Registers its metrics.
    ///
    /// # Errors
    /// When one of the names is taken.
    pub fn register(&self, registry: &prometheus::Registry) -> Result<(), prometheus::Error> {
        let (link, leadership) = (Arc::clone(&self.link), Arc::clone(&self.leadership));
        let metrics = ClusterMetrics::new(link, leadership, Arc::clone(&self.outgoing), Arc::clone(&self.losses))?;
        registry.register(Box::new(metrics))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Goes through the archive whenever that is asked for, once the log was read: then it is known what it lacks.
async fn heal(
    link: Arc<Link>,
    losses: Arc<ClusterLosses>,
    finder: InProcessBus,
    outgoing: Arc<Outgoing>,
    (healer, disk_wait, retry): (Healer, Duration, Duration),
    mut ended: watch::Receiver<bool>,
) {
    let mut waits_for_disk = 0;
    loop {
        tokio::select! {
            () = link.heal.notified() => {}
            _ = ended.wait_for(|is| *is) => return,
        }
        // Before the log is read: a later request may be about another log than the one that is known here.
        if !link.take_healing() {
            continue;
        }
        tokio::select! {
            () = link.read_through() => {}
            _ = ended.wait_for(|is| *is) => return,
        }
        let healing = Arc::new(Outgoing::new(outgoing.entries_max()));
        healing.begin_replay(losses.coverage());
        link.set_healing(Some(Arc::clone(&healing)));
        if link.is_closed.load(Ordering::SeqCst) {
            return;
        }
        let healed = healer(Arc::<Outgoing>::clone(&healing), &|| *ended.borrow());
        healing.flush();
        // Returns also where nobody takes anything any more.
        healing.wait_passed();
        link.set_healing(None);
        // Cut short it confirms nothing.
        if *ended.borrow() || !link.read_what_was_written(&mut ended).await {
            return;
        }
        link.cannot_heal.store(healed.is_err(), Ordering::Release);
        // What was not read is no doubt about what was found alone.
        let pause = match healed {
            Err(error) => {
                tracing::error!(
                    error,
                    ?retry,
                    "cannot republish what the servers' log lacks: the archive is unreadable"
                );
                Some(retry)
            }
            Ok(()) if waits_for_disk < DISK_WAITS_MAX && still_owes(&outgoing, &losses, &finder) => {
                waits_for_disk += 1;
                Some(backoff::doubled(disk_wait, waits_for_disk, retry))
            }
            Ok(()) => None,
        };
        if let Some(pause) = pause {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = ended.wait_for(|is| *is) => return,
            }
            link.ask_for_healing();
            continue;
        }
        outgoing.forget_owed();
        waits_for_disk = 0;
        if !link.end_healing() {
            continue;
        }
        // What was found alone and is not confirmed by now is not so. Without a finder the server ends.
        let _ = finder.send(Message::FromLog(LogUpdate::Confirmed));
        tracing::info!("republished from the archive what the servers' log lacked");
    }
}

/// Whether frames are missing in the log that were not durable when the archive was gone through.
fn still_owes(outgoing: &Outgoing, losses: &ClusterLosses, finder: &InProcessBus) -> bool {
    // What was read is known when the finder has come to it. Without a finder the server ends.
    outgoing.owes(&losses.coverage()) && finder.barrier().is_ok() && outgoing.owes(&losses.coverage())
}

/// Registers the metrics of a server that shares no log: they are there, and say that nothing is wrong.
///
/// # Errors
/// When one of the names is taken.
pub fn register_idle(registry: &prometheus::Registry) -> Result<(), prometheus::Error> {
    let link = Link::default();
    link.set_caught_up(true);
    let leadership = Arc::new(Leadership::sole(""));
    let metrics = ClusterMetrics::new(Arc::new(link), leadership, Arc::new(Outgoing::new(1)), Arc::default())?;
    registry.register(Box::new(metrics))
}

/// What is read off when the metrics are asked for.
struct ClusterMetrics {
    link: Arc<Link>,
    leadership: Arc<Leadership>,
    outgoing: Arc<Outgoing>,
    losses: Arc<ClusterLosses>,
    alone: IntGauge,
    behind: IntGauge,
    silent: IntGauge,
    healing: Gauge,
    waiting: IntGauge,
    published: IntCounter,
    read: IntCounter,
    unreadable: IntCounter,
    left_out: IntCounter,
    rebuilds: IntCounter,
    fell_behind: IntCounter,
    short: Gauge,
    leads: IntGauge,
    leader_changes: IntCounter,
}

impl ClusterMetrics {
    fn new(
        link: Arc<Link>,
        leadership: Arc<Leadership>,
        outgoing: Arc<Outgoing>,
        losses: Arc<ClusterLosses>,
    ) -> Result<Self, prometheus::Error> {
        Ok(Self {
            link,
            leadership,
            outgoing,
            losses,
            alone: IntGauge::new(
                "tapio_server_log_alone",
                "1 while the servers' log is unreachable and this server uses its own collectors' evidence only.",
            )?,
            behind: IntGauge::new(
                "tapio_server_log_behind",
                "1 after a start or an outage, until the finder has read the servers' log to its end.",
            )?,
            silent: IntGauge::new(
                "tapio_server_log_silent_servers",
                "Servers that were silent for 15 s without announcing their end: their evidence may be missing.",
            )?,
            healing: Gauge::new(
                "tapio_server_log_healing_seconds",
                "Seconds since this server began to republish from the archive what the servers' log lacks; 0 when it lacks nothing.",
            )?,
            waiting: IntGauge::new(
                "tapio_server_log_waiting_entries",
                "Entries that wait to be written to the servers' log, including those in messages that are ready or in flight.",
            )?,
            published: IntCounter::new(
                "tapio_server_log_published_messages_total",
                "Messages that this server has written to the servers' log.",
            )?,
            read: IntCounter::new(
                "tapio_server_log_read_messages_total",
                "Messages that this server has read from the servers' log.",
            )?,
            unreadable: IntCounter::new(
                "tapio_server_log_unreadable_messages_total",
                "Messages of other servers that this server could not decode: another version, or damaged.",
            )?,
            left_out: IntCounter::new(
                "tapio_server_log_left_out_entries_total",
                "Entries and messages dropped because the queue was full; the server republishes them from the archive later.",
            )?,
            rebuilds: IntCounter::new(
                "tapio_server_log_rebuilds_total",
                "Times that this server read the servers' log from its beginning.",
            )?,
            fell_behind: IntCounter::new(
                "tapio_server_log_fell_behind_total",
                "Times that the servers' log deleted messages before this server had read them.",
            )?,
            short: Gauge::new(
                "tapio_server_log_short_seconds",
                "Seconds by which the servers' log, which is full, is shorter than what a restarted server reads; 0 if it has all.",
            )?,
            leads: IntGauge::new(
                "tapio_server_log_leader",
                "1 while this server is the leader; at most one server is.",
            )?,
            leader_changes: IntCounter::new(
                "tapio_server_log_leader_changes_total",
                "Changes of the leader that this server has seen.",
            )?,
        })
    }

    fn all(&self) -> [&dyn Collector; 14] {
        [
            &self.alone,
            &self.behind,
            &self.silent,
            &self.healing,
            &self.waiting,
            &self.published,
            &self.read,
            &self.unreadable,
            &self.left_out,
            &self.rebuilds,
            &self.fell_behind,
            &self.short,
            &self.leads,
            &self.leader_changes,
        ]
    }
}

impl Collector for ClusterMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let link = &self.link;
        self.alone.set(i64::from(link.is_alone()));
        self.behind.set(i64::from(!link.is_caught_up()));
        self.silent.set(self.losses.unheard() as i64);
        self.waiting.set(link.entries_waiting(&self.outgoing) as i64);
        self.healing.set(link.healing_for().map_or(0.0, |lasted| lasted.as_secs_f64()));
        self.short.set(Duration::from_nanos(link.short_ns.load(Ordering::Relaxed)).as_secs_f64());
        self.leads.set(i64::from(self.leadership.term().is_some()));
        let left_out = self.outgoing.left_out() + link.overflowed.load(Ordering::Relaxed);
        for (counter, now) in [
            (&self.published, link.messages_published.load(Ordering::Relaxed)),
            (&self.read, link.messages_read.load(Ordering::Relaxed)),
            (&self.unreadable, link.unreadable.load(Ordering::Relaxed)),
            (&self.left_out, left_out),
            (&self.rebuilds, link.rebuilds.load(Ordering::Relaxed)),
            (&self.fell_behind, link.fell_behind.load(Ordering::Relaxed)),
            (&self.leader_changes, self.leadership.changes()),
        ] {
            counter.inc_by(now.saturating_sub(counter.get()));
        }
        self.all().into_iter().flat_map(Collector::collect).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[tokio::test]
    async fn an_unreadable_archive_confirms_nothing_and_is_retried() {
        let link = Arc::new(Link::default());
        link.set_caught_up(true);
        link.ask_for_healing();
        let (finder, messages) = InProcessBus::bounded(10);
        let (_end, ended) = watch::channel(false);
        let attempts = Arc::new(AtomicUsize::new(0));
        let healer: Healer = {
            let (attempts, link, messages) = (Arc::clone(&attempts), Arc::clone(&link), messages.clone());
            Box::new(move |_, _| match attempts.fetch_add(1, Ordering::SeqCst) {
                0 => Err("permission denied".into()),
                _ => {
                    assert!(link.is_healing() && messages.is_empty(), "the first attempt confirmed something");
                    Ok(())
                }
            })
        };
        let retry = Duration::from_millis(20);
        let outgoing = Arc::new(Outgoing::new(10));
        let healing = heal(Arc::clone(&link), Arc::default(), finder, outgoing, (healer, retry, retry), ended);
        let healing = tokio::spawn(healing);
        tokio::time::timeout(Duration::from_secs(20), link.healed()).await.expect("the second attempt is good");
        assert_eq!(attempts.load(Ordering::SeqCst), 2);
        let confirmed = messages.recv_timeout(Duration::from_secs(20)).expect("a message");
        assert!(matches!(confirmed, Message::FromLog(LogUpdate::Confirmed)));
        healing.abort();
    }
}
