//! The source for local processes: drains the memfd rings that they hand over on a Unix socket.
//!
//! What enters: connections, each with a ring (see `tapio_ringbuf::handover`), and the rings' records. What leaves:
//! batches. What must hold: a peer is hostile until proven otherwise. It must run as root or as this process's user.
//! Its ring is checked before it is mapped, and rings are bounded in number and size. A ring that breaks its layout is
//! detached, and the others continue. A peer's report of its own losses is trusted: it concerns that peer only.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use tapio_ringbuf::handover;
use tapio_ringbuf::{EventFd, Limits, Poller, Reader};
use tapio_wire::ledger::{Reason, Stage};

use crate::budget::nap::{self, Nap};
use crate::intake::Intake;
use crate::intake::pass::Pass;
use crate::settings::config::ShmSection;
use crate::source::stop::Stop;

const STOP_TOKEN: u64 = 0;
const ARRIVAL_TOKEN: u64 = 1;
const FIRST_PEER_TOKEN: u64 = 2;
/// The shortest nap between looks at the rings while there is traffic.
const LINGER: Duration = Duration::from_millis(1);
/// How long peers that go on writing are listened to after the end was asked for.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// Maximum number of this epoch's rings that are remembered after they were detached.
const KNOWN_RINGS_MAX: usize = 4096;

/// Why the source cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ShmError {
    #[error(
        "cannot listen at {path}: {error}; choose another collectors.shm.socket, or stop the collector that holds it"
    )]
    Listen { path: PathBuf, error: std::io::Error },
    #[error(transparent)]
    Ring(#[from] tapio_ringbuf::Error),
}

struct Arrival {
    name: String,
    /// The memfd's device and inode.
    ring: (u64, u64),
    reader: Reader,
    eventfd: EventFd,
    stream: UnixStream,
}

struct Peer {
    ring: (u64, u64),
    token: u64,
    name: String,
    reader: Reader,
    eventfd: EventFd,
    stream: UnixStream,
    /// The ring's records and drops that belong to earlier readers.
    base: u64,
    base_dropped: u64,
    emitted: u64,
    dropped: u64,
    has_left: bool,
    /// The ring's next record was reserved and never committed.
    is_stalled: bool,
}

/// What a pass over the rings has brought.
struct Found {
    records: usize,
    /// True if there was no space for all of it.
    has_more: bool,
}

fn finish(pass: Pass<'_>, all: bool) {
    match all {
        true => pass.finish_all(),
        false => pass.finish(),
    }
}

/// The listening socket and the rings that were handed over.
pub struct ShmSource {
    poller: Poller,
    stop: Arc<Stop>,
    arrivals: Receiver<Arrival>,
    arrived: Arc<EventFd>,
    peers: Vec<Peer>,
    peer_count: Arc<AtomicUsize>,
    next_token: u64,
    /// Rings that this epoch has read: what was consumed of them before is not inherited a second time.
    known_rings: HashSet<(u64, u64)>,
    /// What rings that are gone had emitted and dropped.
    gone_emitted: u64,
    gone_dropped: u64,
    socket: PathBuf,
    nap: Nap,
}

impl ShmSource {
    /// Listens and accepts rings on a thread of its own.
    ///
    /// # Errors
    /// When the socket cannot be had.
    pub fn listen(config: &ShmSection, stop: Arc<Stop>) -> Result<Self, ShmError> {
        let listener = bind(&config.socket).map_err(|error| ShmError::Listen { path: config.socket.clone(), error })?;
        let poller = Poller::new()?;
        let arrived = Arc::new(EventFd::new()?);
        poller.add(stop.eventfd().as_fd(), STOP_TOKEN)?;
        poller.add(arrived.as_fd().as_fd(), ARRIVAL_TOKEN)?;
        let (sender, arrivals) = bounded(config.max_peers);
        let peer_count = Arc::new(AtomicUsize::new(0));
        let acceptor = Acceptor {
            listener,
            sender,
            arrived: Arc::clone(&arrived),
            peer_count: Arc::clone(&peer_count),
            max_peers: config.max_peers,
            limits: Limits {
                data_bytes_max: usize::try_from(config.max_ring_bytes).unwrap_or(usize::MAX),
                record_bytes_max: tapio_probes::record::RECORD_BYTES_MAX,
                ..Limits::default()
            },
        };
        std::thread::Builder::new()
            .name("shm-accept".into())
            .spawn(move || acceptor.run())
            .map_err(|error| ShmError::Listen { path: config.socket.clone(), error })?;
        Ok(Self {
            poller,
            stop,
            arrivals,
            arrived,
            peers: Vec::new(),
            peer_count,
            next_token: FIRST_PEER_TOKEN,
            known_rings: HashSet::new(),
            gone_emitted: 0,
            gone_dropped: 0,
            socket: config.socket.clone(),
            nap: Nap::new(LINGER),
        })
    }

    /// Drains until asked to stop, then drains what is left.
    ///
    /// # Errors
    /// When polling fails.
    pub fn run(mut self, mut intake: Intake) -> Result<(), ShmError> {
        while !self.stop.is_set() {
            match self.pass(&mut intake, false) {
                Found { has_more: false, .. } => self.sleep(&mut intake)?,
                Found { records: 0, .. } => self.wait(LINGER)?,
                _ => {}
            }
        }
        self.stop.eventfd().clear()?;
        let deadline = Instant::now() + DRAIN_LIMIT;
        while self.pass(&mut intake, true).records > 0 && Instant::now() < deadline {}
        // What peers went on to write belongs to the next reader of their rings.
        self.disown_unread(&intake);
        while !intake.is_empty() {
            intake.begin().finish_all();
            self.poller.wait(Some(LINGER)).map(|_| ())?;
        }
        if let Err(error) = std::fs::remove_file(&self.socket) {
            tracing::debug!(%error, "the socket was already removed");
        }
        Ok(())
    }

    fn pass(&mut self, intake: &mut Intake, all: bool) -> Found {
        while let Ok(arrival) = self.arrivals.try_recv() {
            self.add(arrival, intake);
        }
        let before = intake.accepted();
        let (mut found, mut fullest) = (Found { records: 0, has_more: false }, 0.0f64);
        for index in 0..self.peers.len() {
            let mut pass = intake.begin();
            let room = pass.room();
            let peer = &mut self.peers[index];
            fullest = fullest.max(peer.reader.pending_bytes() as f64 / peer.reader.capacity_bytes() as f64);
            match peer.reader.drain_ahead(room, &mut pass, Pass::fetch, Pass::accept) {
                Ok(done) => {
                    found.records += done.records;
                    found.has_more |= done.more;
                    peer.is_stalled = done.stalled;
                }
                Err(error) => {
                    tracing::warn!(peer = peer.name, %error, "ring detached: its layout is broken");
                    peer.has_left = true;
                }
            }
            peer.read_counters();
            self.state(&pass);
            finish(pass, all);
        }
        if found.records == 0 {
            self.let_go(intake);
            finish(intake.begin(), all);
        }
        self.nap.saw(Instant::now(), found.records, intake.accepted() - before, fullest);
        intake.expect(self.nap.events_per_second());
        found
    }

    fn add(&mut self, arrival: Arrival, intake: &Intake) {
        let Arrival { name, ring, reader, eventfd, stream } = arrival;
        if self.peers.iter().any(|peer| peer.ring == ring) {
            tracing::warn!(peer = name, "ring refused: it is already attached");
            self.peer_count.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        let base_dropped = reader.accounted_dropped().unwrap_or(0);
        let base = reader.consumed();
        let token = self.next_token;
        self.next_token += 2;
        let added =
            self.poller.add_edge(eventfd.as_fd(), token).and_then(|()| self.poller.add(stream.as_fd(), token + 1));
        if let Err(error) = added {
            tracing::warn!(peer = name, %error, "ring detached: it cannot be polled");
            self.peer_count.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        if self.known_rings.len() < KNOWN_RINGS_MAX && self.known_rings.insert(ring) {
            intake.books().add_inherited(base.saturating_add(base_dropped));
        }
        tracing::info!(peer = name, capacity_bytes = reader.capacity_bytes(), consumed_before = base, "ring attached");
        self.peers.push(Peer {
            ring,
            token,
            name,
            reader,
            eventfd,
            stream,
            base,
            base_dropped,
            emitted: 0,
            dropped: 0,
            has_left: false,
            is_stalled: false,
        });
    }

    /// States what all rings together have emitted and dropped.
    fn state(&self, intake: &Intake) {
        let sum =
            |gone: u64, of: fn(&Peer) -> u64| self.peers.iter().fold(gone, |sum, peer| sum.saturating_add(of(peer)));
        let emitted = sum(self.gone_emitted, |peer| peer.emitted);
        let dropped = sum(self.gone_dropped, |peer| peer.dropped);
        intake.books().set_emitted(emitted);
        intake.books().set_dropped(Stage::Ring, Reason::Full, dropped);
    }

    fn disown_unread(&mut self, intake: &Intake) {
        for peer in &mut self.peers {
            peer.read_counters();
            peer.emitted = peer.taken();
        }
        self.state(intake);
    }

    fn let_go(&mut self, intake: &Intake) {
        let mut index = 0;
        while index < self.peers.len() {
            let peer = &mut self.peers[index];
            // A peer that left a record half written will not finish it.
            if !(peer.has_left && (peer.reader.is_empty() || peer.is_stalled)) {
                index += 1;
                continue;
            }
            peer.read_counters();
            // Whatever it claims beyond what its ring held never existed for anybody else.
            let emitted = peer.taken();
            if emitted != peer.emitted {
                tracing::warn!(peer = peer.name, claimed = peer.emitted, emitted, "a ring's counters did not add up");
            }
            self.gone_emitted = self.gone_emitted.saturating_add(emitted);
            self.gone_dropped = self.gone_dropped.saturating_add(peer.dropped);
            let peer = self.peers.swap_remove(index);
            for polled in [peer.eventfd.as_fd(), peer.stream.as_fd()] {
                if let Err(error) = self.poller.remove(polled) {
                    tracing::debug!(%error, "the descriptor was no longer polled");
                }
            }
            self.peer_count.fetch_sub(1, Ordering::AcqRel);
            tracing::info!(peer = peer.name, emitted, dropped = peer.dropped, "ring detached");
            self.state(intake);
        }
    }

    fn sleep(&mut self, intake: &mut Intake) -> Result<(), ShmError> {
        if let Some(nap) = self.nap.length(intake.missing(), intake.due(), !intake.is_empty()) {
            let sleepers = self.peers.iter().filter(|peer| !peer.reader.is_woken_when_filling());
            let beside = sleepers.map(|peer| nap::beside_memfd(peer.reader.capacity_bytes()));
            let nap = beside.fold(nap, Duration::min).max(LINGER);
            intake.napped(nap);
            return self.wait(nap);
        }
        intake.napped(Duration::ZERO);
        for peer in &self.peers {
            peer.reader.set_need_wakeup(true);
        }
        // A record that was published before its writer saw the flag is found here. A later one brings a wakeup, and so
        // does the end of one that is being written. A peer that left something half written is let go at the next
        // look.
        let is_empty = self.peers.iter().all(|peer| peer.reader.is_empty());
        self.wait(if is_empty { intake.sleep_limit() } else { LINGER })?;
        for peer in &self.peers {
            peer.reader.set_need_wakeup(false);
        }
        Ok(())
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), ShmError> {
        for &token in self.poller.wait(Some(timeout))? {
            if token == ARRIVAL_TOKEN {
                self.arrived.clear()?;
            } else if token >= FIRST_PEER_TOKEN
                && token % 2 == 1
                && let Some(peer) = self.peers.iter_mut().find(|peer| peer.token + 1 == token)
            {
                // Nothing is ever sent on the connection: readable means closed.
                peer.has_left = true;
            }
        }
        // A closed connection stays readable; it must not turn the wait into a busy loop while its ring is drained.
        for peer in self.peers.iter_mut().filter(|peer| peer.has_left) {
            if let Err(error) = self.poller.remove(peer.stream.as_fd()) {
                tracing::trace!(%error, "already removed");
            }
        }
        Ok(())
    }
}

impl Peer {
    fn read_counters(&mut self) {
        let Some(counters) = self.reader.producer_counters() else { return };
        // A claim beyond this is no count of anything that happened; the sums of all peers must not suffer from it.
        const CLAIM_MAX: u64 = 1 << 56;
        let dropped = counters.dropped.min(CLAIM_MAX).saturating_sub(self.base_dropped);
        self.dropped = self.dropped.max(dropped);
        let emitted = counters.emitted.min(CLAIM_MAX).saturating_sub(self.base.saturating_add(self.base_dropped));
        self.emitted = self.emitted.max(self.taken()).max(emitted);
        self.reader.set_accounted_dropped(self.base_dropped.saturating_add(self.dropped));
    }

    /// What was taken out of the ring or lost before it, in this reader's time.
    fn taken(&self) -> u64 {
        self.reader.consumed().saturating_sub(self.base).saturating_add(self.dropped)
    }
}

/// A ring's name, its memfd's device and inode, its reader, and what its peer notifies.
type Taken = (String, (u64, u64), Reader, EventFd);

struct Acceptor {
    listener: UnixListener,
    sender: Sender<Arrival>,
    arrived: Arc<EventFd>,
    peer_count: Arc<AtomicUsize>,
    max_peers: usize,
    limits: Limits,
}

impl Acceptor {
    fn run(self) {
        for connection in self.listener.incoming() {
            let stream = match connection {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection for a ring could not be accepted");
                    // It stays pending, for want of descriptors as a rule: nothing says when there are some again.
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            let outcome = self.take(&stream);
            let reply = outcome.as_ref().map(|_| ()).map_err(String::as_str);
            if let Err(error) = handover::answer(&stream, reply) {
                tracing::debug!(%error, "a peer left during the handover");
                continue;
            }
            match outcome {
                Ok((name, ring, reader, eventfd)) => {
                    self.peer_count.fetch_add(1, Ordering::AcqRel);
                    let arrival = Arrival { name, ring, reader, eventfd, stream };
                    if self.sender.send(arrival).is_err() {
                        return;
                    }
                    if let Err(error) = self.arrived.notify() {
                        tracing::debug!(%error, "cannot wake the reader: it finds the new ring at its next pass");
                    }
                }
                Err(reason) => tracing::warn!(reason, "ring refused"),
            }
        }
    }

    fn take(&self, stream: &UnixStream) -> Result<Taken, String> {
        let peer = rustix::net::sockopt::socket_peercred(stream).map_err(|error| error.to_string())?;
        let own = rustix::process::geteuid();
        if !peer.uid.is_root() && peer.uid != own {
            return Err(format!("user {} may not hand over rings", peer.uid.as_raw()));
        }
        if self.peer_count.load(Ordering::Acquire) >= self.max_peers {
            return Err(format!("{} rings are attached already; raise collectors.shm.max_peers", self.max_peers));
        }
        let received = handover::receive(stream).map_err(|error| error.to_string())?;
        let stat = rustix::fs::fstat(&received.memfd).map_err(|error| error.to_string())?;
        let reader = Reader::from_memfd(received.memfd, self.limits).map_err(|error| error.to_string())?;
        let eventfd = EventFd::from_peer(received.eventfd).map_err(|error| error.to_string())?;
        Ok((received.name, (stat.st_dev, stat.st_ino), reader, eventfd))
    }
}

/// Binds the socket for this user only. One left behind by a collector that was killed is replaced; one that answers is not.
fn bind(path: &Path) -> std::io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
