//! Reads the log and drives the finder by it.
//!
//! What enters: messages of all servers. What leaves: batches to the finder, in the order of the log. What must hold: after a
//! break it goes on where it was. Where the log does not have that any more, or is another one, everything is read again, and what
//! the log lacks is requested from the archive. The same holds where messages in the middle of the log are gone or damaged.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::consumer::pull::Ordered;
use async_nats::jetstream::stream::{Info, Stream};
use futures::StreamExt;
use tokio::sync::watch;

use super::config::ClusterSection;
use super::kept::{self, Kept};
use super::link::Link;
use super::log::{self, Log, LogError, Position};
use super::losses::{DELETED, is_rechecked};
use super::namesakes::Namesakes;
use crate::correlate::batch::{Batch, BatchError, Entry};
use crate::correlate::{BusClosed, InProcessBus, LogUpdate, Message};
use tapio_wire::service::Finding;

const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// How often it is looked whether the log is still the same one.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How long the next fact may take.
const FACTS_TIMEOUT: Duration = Duration::from_secs(10);

/// How often damaged messages are a reason to send again what the archives have.
const DAMAGED_INTERVAL: Duration = Duration::from_secs(600);

/// Why reading ended.
enum End {
    /// The server ends.
    Ended,
    Broken(String),
}

fn broken(error: &dyn std::fmt::Display) -> End {
    End::Broken(error.to_string())
}

impl From<BusClosed> for End {
    fn from(_: BusClosed) -> Self {
        Self::Ended
    }
}

fn from_seq(position: Option<Position>) -> u64 {
    position.map_or(0, |at| at.seq + 1)
}

/// Where reading begins, and up to which message the log was written by then.
struct Start {
    generation: u64,
    target: u64,
    position: Option<Position>,
}

/// When the first message of a log was written, nanoseconds since 1970; never for an empty one.
fn begins_ns(info: &Info) -> u64 {
    match info.state.messages {
        0 => u64::MAX,
        _ => info.state.first_timestamp.unix_timestamp_nanos() as u64,
    }
}

fn warn_of_kept(error: &LogError) {
    tracing::warn!(%error, "cannot read findings that are older than the servers' log");
}

/// Messages that are deleted from the middle of a log.
fn deleted(info: &Info) -> u64 {
    info.state.deleted_count.unwrap_or(0)
}

/// Reads the log and drives the finder by it.
pub struct Reader {
    config: ClusterSection,
    keep: Duration,
    finder: InProcessBus,
    link: Arc<Link>,
    position: Option<Position>,
    /// The log was read before, up to there: one that ends earlier has lost its end.
    was: Option<Position>,
    /// Messages in the middle of the log that are known to be deleted.
    deleted: u64,
    /// When the first message after a missing one was written. The archive is not asked yet for what was in it.
    missed_ns: Option<u64>,
    /// Messages of another version were read since reading began.
    has_other_versions: bool,
    /// When the archive was last asked because of a damaged message.
    damaged_at: Option<Instant>,
    kept: Option<Kept>,
    namesakes: Namesakes,
}

impl Reader {
    /// Drives `finder`.
    pub fn new(config: &ClusterSection, keep: Duration, finder: InProcessBus, link: Arc<Link>) -> Self {
        Self {
            config: config.clone(),
            keep,
            finder,
            link,
            position: None,
            was: None,
            deleted: 0,
            missed_ns: None,
            has_other_versions: false,
            damaged_at: None,
            kept: None,
            namesakes: Namesakes::default(),
        }
    }

    /// Reads until `ended`.
    pub async fn run(mut self, mut ended: watch::Receiver<bool>) {
        let mut retry = RETRY_MIN;
        loop {
            let before = self.position;
            let outcome = tokio::select! {
                outcome = self.read() => outcome,
                _ = ended.wait_for(|is| *is) => return,
            };
            match outcome {
                Err(End::Broken(error)) => {
                    self.link.is_reading.store(false, Ordering::Release);
                    if self.position != before {
                        retry = RETRY_MIN;
                    }
                    if self.link.set_read_trouble(Some(error.clone())) {
                        tracing::warn!(error, "cannot read the servers' log");
                    }
                }
                Ok(()) | Err(End::Ended) => return,
            }
            tokio::select! {
                () = tokio::time::sleep(retry) => retry = RETRY_MAX.min(retry * 2),
                _ = ended.wait_for(|is| *is) => return,
            }
        }
    }

    async fn read(&mut self) -> Result<(), End> {
        let log =
            Log::connect(&self.config, self.keep, &self.link.connections).await.map_err(|error| broken(&error))?;
        let stream = log.ensure().await.map_err(|error| broken(&error))?;
        loop {
            self.read_on(&log, &stream).await?;
            // Asked to start again.
            self.position = None;
        }
    }

    /// Reads until something breaks, or it is to start again.
    async fn read_on(&mut self, log: &Log, stream: &Stream) -> Result<(), End> {
        let mut connects = log.connects();
        let info = stream.get_info().await.map_err(|error| broken(&error))?;
        let created_ns = info.created.unix_timestamp_nanos();
        let is_lost = self.is_lost(stream, &info).await.map_err(|error| broken(&error))?;
        let goes_on = self
            .position
            .filter(|at| !is_lost && info.state.first_sequence <= at.seq + 1 && deleted(&info) <= self.deleted);
        // Without a place to go on at, the first message is the one that is there first.
        let Start { generation, target, mut position } = match goes_on {
            Some(_) => Start {
                generation: self.link.generation.load(Ordering::Acquire),
                target: info.state.last_sequence,
                position: goes_on,
            },
            None => self.begin_anew(log, stream, &info, is_lost).await?,
        };
        let mut messages = log::read_from(stream, from_seq(position)).await.map_err(|error| broken(&error))?;
        self.link.is_reading.store(true, Ordering::Release);
        self.link.set_read_trouble(None);
        self.position = position;
        if let Some(position) = position {
            self.reached(position.seq, target, generation)?;
        }
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        look.tick().await;
        // Since it was looked last.
        let mut has_moved = false;
        loop {
            let message = tokio::select! {
                message = messages.next() => message,
                () = self.link.rebuild.notified() => return Ok(()),
                _ = look.tick() => {
                    let info = match (stream.get_info().await, std::mem::take(&mut has_moved)) {
                        // Of a slow log the answer comes after the messages that are on their way.
                        (Err(_), true) => continue,
                        (info, _) => info.map_err(|error| broken(&error))?,
                    };
                    self.link.set_short(log::short_of(&info, self.keep));
                    let is_shorter = position.is_some_and(|at| info.state.last_sequence < at.seq);
                    if is_shorter || info.created.unix_timestamp_nanos() != created_ns {
                        return Err(broken(&"it is another log"));
                    }
                    if let Some(anew) = self.read_anew(log, stream, &mut connects).await? {
                        messages = anew;
                    }
                    if self.lacks_more(&info) {
                        return Ok(());
                    }
                    self.follow_kept(begins_ns(&info)).await?;
                    continue;
                }
            };
            let message = message.ok_or_else(|| broken(&"the consumer ended"))?.map_err(|error| broken(&error))?;
            if let Some(anew) = self.read_anew(log, stream, &mut connects).await? {
                messages = anew;
                continue;
            }
            let info = message.info().map_err(|error| broken(&error))?;
            let (seq, at_ns) = (info.stream_sequence, info.published.unix_timestamp_nanos() as u64);
            match position {
                Some(at) if seq > at.seq + 1 => {
                    let info = stream.get_info().await.map_err(|error| broken(&error))?;
                    if info.state.first_sequence > at.seq + 1 {
                        // What was between was deleted before this server came to it.
                        return Ok(());
                    }
                    self.passed_gap(seq - at.seq - 1, at_ns)?;
                }
                Some(at) if seq <= at.seq => continue,
                _ => {}
            }
            self.pass_on(&message, created_ns, seq, at_ns)?;
            position = Some(Position { created_ns, seq, written_ns: Some(at_ns) });
            has_moved = true;
            (self.position, self.was) = (position, position);
            self.link.messages_read.fetch_add(1, Ordering::Relaxed);
            self.reached(seq, target, generation)?;
        }
    }

    /// Starts another consumer after the last message that was read, if the connection was made anew; otherwise returns [`None`].
    /// A restarted NATS has forgotten the consumer, and the client notices only after several missed heartbeats. An error says that
    /// the log has lost that last message.
    async fn read_anew(&self, log: &Log, stream: &Stream, connects: &mut u64) -> Result<Option<Ordered>, End> {
        if std::mem::replace(connects, log.connects()) == *connects {
            return Ok(None);
        }
        let info = stream.get_info().await.map_err(|error| broken(&error))?;
        if self.is_lost(stream, &info).await.map_err(|error| broken(&error))? {
            return Err(broken(&"it has lost its end"));
        }
        let next = log::read_from(stream, from_seq(self.position)).await;
        Ok(Some(next.map_err(|error| broken(&error))?))
    }

    /// Whether it is another log than the one that was read, or has lost what was read last. NATS may have lost the end of what it
    /// had, and have other messages in its place.
    async fn is_lost(&self, stream: &Stream, info: &Info) -> Result<bool, LogError> {
        let Some(was) = self.was else { return Ok(false) };
        if was.created_ns != info.created.unix_timestamp_nanos() || was.seq > info.state.last_sequence {
            return Ok(true);
        }
        let Some(written_ns) = was.written_ns else { return Ok(false) };
        let there = log::message_at(stream, was.seq).await?;
        Ok(there.is_some_and(|message| message.time.unix_timestamp_nanos() as u64 != written_ns))
    }

    /// Forgets what is known of the log that was, and reads the facts of this one.
    async fn begin_anew(&mut self, log: &Log, stream: &Stream, info: &Info, is_lost: bool) -> Result<Start, End> {
        let created_ns = info.created.unix_timestamp_nanos();
        let first_seq = info.state.first_sequence;
        // Before anything is asked for: what is known is of the log that was.
        self.link.set_caught_up(false);
        if is_lost {
            tracing::warn!("the servers' log was lost: republishing it from the archive");
            self.link.losses_seen.fetch_add(1, Ordering::AcqRel);
            self.link.ask_for_healing();
        } else if let Some(was) = self.was.filter(|was| first_seq > was.seq + 1) {
            self.fell_behind(first_seq - was.seq - 1);
        }
        // Also where the next step fails: what was read was another log, or is read again.
        (self.was, self.position) = (None, None);
        (self.deleted, self.has_other_versions) = (deleted(info), false);
        if self.missed_ns.take().is_some() {
            self.link.ask_for_healing();
        }
        // A server that may not read must not forget for it what it knows.
        drop(log::read_from(stream, 0).await.map_err(|error| broken(&error))?);
        // What a server finds alone it finds until its own messages are in the log.
        self.link.is_reading.store(true, Ordering::Release);
        self.link.in_company().await;
        let generation = self.link.generation.load(Ordering::Acquire);
        self.link.rebuilds.fetch_add(1, Ordering::Relaxed);
        self.read_kept(log, info).await?;
        // That may have taken so long that this server gave the log up. It must not take what it finds now for what all find.
        let gave_up = || End::Broken("this server went on alone before the log was read".into());
        if self.link.is_alone() {
            return Err(gave_up());
        }
        self.send(LogUpdate::Rebuild { begins_ns: begins_ns(info), is_cut: first_seq > 1 })?;
        if self.link.is_alone() {
            self.send(LogUpdate::Alone(log.names.server().to_owned()))?;
            return Err(gave_up());
        }
        self.read_facts(log).await?;
        let info = stream.get_info().await.map_err(|error| broken(&error))?;
        let target = info.state.last_sequence;
        let position = (info.state.messages == 0).then_some(Position { created_ns, seq: target, written_ns: None });
        Ok(Start { generation, target, position })
    }

    /// Messages were deleted before this server came to them: what there is is known by the facts, and the rest is missing.
    fn fell_behind(&self, missed: u64) {
        tracing::warn!(
            missed,
            "this server fell behind the servers' log and reads the rest of it from the beginning: raise cluster.max_bytes"
        );
        self.link.fell_behind.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether more messages are deleted from the middle of the log than were when it was read there.
    fn lacks_more(&mut self, info: &Info) -> bool {
        let lacks_more = deleted(info) > self.deleted;
        if lacks_more {
            // Whoever joins lacks them. Where they were shows what must be sent again.
            tracing::warn!("messages in the middle of the servers' log were deleted: reading it again");
        }
        self.deleted = deleted(info);
        lacks_more
    }

    /// Messages before this moment are deleted, and reading again would not bring them.
    fn passed_gap(&mut self, missed: u64, at_ns: u64) -> Result<(), BusClosed> {
        tracing::warn!(missed, "messages in the middle of the servers' log are deleted: republishing from the archive");
        self.send(LogUpdate::Unread(DELETED.to_owned(), at_ns))?;
        self.missed(at_ns)
    }

    /// Sends the finder what a message says, or that it cannot be read.
    fn pass_on(
        &mut self,
        message: &async_nats::jetstream::Message,
        created_ns: i128,
        seq: u64,
        at_ns: u64,
    ) -> Result<(), BusClosed> {
        if self.missed_ns.is_some_and(|missed_ns| !is_rechecked(missed_ns, at_ns)) {
            self.missed_ns = None;
            self.link.ask_for_healing();
        }
        let id = message.headers.as_ref().and_then(|headers| headers.get(NATS_MESSAGE_ID));
        // What was so before this server read is no matter now.
        if let Some(name) = id.and_then(|id| self.namesakes.note(id.as_str(), at_ns))
            && self.link.is_caught_up()
        {
            self.link.note_namesake(name);
        }
        match Batch::decode(&message.payload) {
            Ok(mut batch) => {
                if !log::follows(message.headers.as_ref(), created_ns, seq) {
                    // The clues of these frames are in a log that was lost. Its writer sends them again from its archive.
                    batch.entries.retain(|entry| !matches!(entry, Entry::Covered(_)));
                    if batch.server == self.config.server_name() {
                        self.link.losses_seen.fetch_add(1, Ordering::AcqRel);
                    }
                }
                self.send(LogUpdate::Batch(Box::new(batch), at_ns))
            }
            Err(error) => {
                let server = message.headers.as_ref().and_then(|headers| headers.get(log::SERVER_HEADER));
                let server = server.map_or("a server of another version", |server| server.as_str());
                self.send(LogUpdate::Unread(server.to_owned(), at_ns))?;
                if self.link.unreadable.fetch_add(1, Ordering::Relaxed) == 0 {
                    tracing::error!(server, %error, seq, "cannot decode a message in the servers' log: skipped");
                }
                match error {
                    BatchError::Version(_) => {
                        self.has_other_versions = true;
                        Ok(())
                    }
                    // Whoever writes one after another must not keep all servers from delivering: they are only counted then.
                    BatchError::Damaged(_) if self.damaged_at.is_some_and(|at| at.elapsed() < DAMAGED_INTERVAL) => {
                        Ok(())
                    }
                    BatchError::Damaged(_) => {
                        self.damaged_at = Some(Instant::now());
                        self.missed(at_ns)
                    }
                }
            }
        }
    }

    /// A message of before this moment is missing. The archive is asked for what was in it when all was read that may belong to it.
    fn missed(&mut self, at_ns: u64) -> Result<(), BusClosed> {
        self.missed_ns = Some(at_ns);
        self.link.expect_healing();
        self.send(LogUpdate::Missed(at_ns))
    }

    /// Waits while the finder has no room.
    fn send(&self, update: LogUpdate) -> Result<(), BusClosed> {
        self.held(|finder| finder.send(Message::FromLog(update)))
    }

    fn held(&self, wait: impl FnOnce(&InProcessBus) -> Result<(), BusClosed>) -> Result<(), BusClosed> {
        self.link.is_held.store(true, Ordering::Release);
        let outcome = wait(&self.finder);
        self.link.is_held.store(false, Ordering::Release);
        outcome
    }

    fn reached(&mut self, seq: u64, target: u64, generation: u64) -> Result<(), BusClosed> {
        // Where it is asked to start again, what it has read so far does not count.
        let is_asked = self.link.generation.load(Ordering::Acquire) != generation;
        if seq >= target && !self.link.is_caught_up() && !is_asked {
            if std::mem::take(&mut self.has_other_versions) {
                // Of before an upgrade, also of this server: whoever joins now is to know what they said.
                self.link.ask_for_healing();
            }
            // What the archive has to publish again may confirm what was found alone.
            let confirms = !self.link.is_healing();
            self.send(LogUpdate::CaughtUp { confirms })?;
            // Whoever sees the flag below may rely on the finder's being there too.
            self.held(|finder| finder.barrier())?;
            self.link.set_caught_up(true);
        }
        self.link.read_seq.store(seq, Ordering::Release);
        self.link.moved.notify_one();
        Ok(())
    }

    /// Takes in findings that are older than what the log says. Without them it is only less that is known.
    async fn read_kept(&mut self, log: &Log, info: &Info) -> Result<(), End> {
        let begins_ns = begins_ns(info);
        self.kept = None;
        match log.ensure_findings().await {
            // A state goes on, whenever it began.
            Ok(stream) => {
                let is_older = |finding: &Finding| finding.ongoing || kept::needed_from_ns(finding) < begins_ns;
                self.take_kept(Kept::new(stream), Duration::MAX, is_older).await
            }
            Err(error) => {
                warn_of_kept(&error);
                Ok(())
            }
        }
    }

    /// Takes in what a leader keeps later: where NATS lost everything, only after it has become the leader.
    async fn follow_kept(&mut self, begins_ns: u64) -> Result<(), End> {
        let Some(kept) = self.kept.take_if(|_| self.link.is_caught_up()) else { return Ok(()) };
        self.take_kept(kept, LOOK_INTERVAL, |finding| kept::needed_from_ns(finding) < begins_ns).await
    }

    /// Passes kept findings on for as long as `limit`; the next call goes on.
    async fn take_kept(
        &mut self,
        mut kept: Kept,
        limit: Duration,
        is_meant: impl Fn(&Finding) -> bool,
    ) -> Result<(), End> {
        let mut passed_on = Ok(());
        let reading = kept.read_on(|finding| {
            self.link.messages_read.fetch_add(1, Ordering::Relaxed);
            if passed_on.is_ok() && is_meant(&finding) {
                passed_on = self.send(LogUpdate::Kept(Box::new(finding)));
            }
        });
        if let Ok(Err(error)) = tokio::time::timeout(limit, reading).await {
            warn_of_kept(&error);
        }
        self.kept = Some(kept);
        Ok(passed_on?)
    }

    /// Reads the facts: the last message of each.
    async fn read_facts(&self, log: &Log) -> Result<(), End> {
        let facts = log.facts().await.map_err(|error| broken(&error))?;
        let info = facts.get_info().await.map_err(|error| broken(&error))?;
        if info.state.messages == 0 {
            return Ok(());
        }
        let mut messages = log::read_from(&facts, 0).await.map_err(|error| broken(&error))?;
        loop {
            let message = log::next_within(&mut messages, FACTS_TIMEOUT).await.map_err(|error| broken(&error))?;
            self.link.messages_read.fetch_add(1, Ordering::Relaxed);
            let seq = message.info().map_err(|error| broken(&error))?.stream_sequence;
            if let Ok(batch) = Batch::decode(&message.payload) {
                self.send(LogUpdate::Facts(Box::new(batch)))?;
            }
            if seq >= info.state.last_sequence {
                return Ok(());
            }
        }
    }
}
