//! Streams of archived events: read on threads that may block, few at a time, a bounded number of bytes each.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tapio_wire::service::{Event, ListEventsRequest, RemoteRead};
use tokio::sync::{Semaphore, mpsc};

use crate::archive::reader::Reader;
use crate::archive::restored;
use crate::events::{self, Choice, EventsError, Outcome};
use crate::remote::{History, Past, Read};

/// Requests that read the archive at a time.
const READERS_MAX: usize = 4;
/// Events on their way to one client.
const QUEUE_EVENTS: usize = 256;

/// Why a request brings no (more) events.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("{READERS_MAX} requests are reading the archive already: try again in a moment")]
    Busy,
    #[error(transparent)]
    Events(#[from] EventsError),
}

impl Refused {
    pub(super) fn to_status(&self) -> tonic::Status {
        match self {
            Self::Busy => tonic::Status::resource_exhausted(self.to_string()),
            Self::Events(EventsError::Read(_)) => tonic::Status::internal(self.to_string()),
            Self::Events(_) => tonic::Status::not_found(self.to_string()),
        }
    }
}

/// Reads the events of a directory.
#[derive(Clone)]
pub struct EventSource {
    dir: PathBuf,
    /// The name of the cluster whose events these are.
    cluster: Arc<str>,
    history: Option<Arc<History>>,
    readers: Arc<Semaphore>,
}

/// What a stream came to, once it has ended.
pub type Ended = Arc<Mutex<Option<Outcome>>>;

impl EventSource {
    /// Reads an archive's directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let readers = Arc::new(Semaphore::new(READERS_MAX));
        Self { dir: dir.into(), cluster: "".into(), history: None, readers }
    }

    /// Names the cluster in each event.
    pub fn of_cluster(self, name: &str) -> Self {
        Self { cluster: name.into(), ..self }
    }

    /// Adds a remote archive for what is not in the directory.
    pub fn with_history(self, history: Option<History>) -> Self {
        Self { history: history.map(Arc::new), ..self }
    }

    /// Starts to read. Where damage left something out, a last event that is none says what.
    ///
    /// # Errors
    /// [`Refused::Busy`] when enough others read.
    pub fn stream(&self, choice: Choice) -> Result<(mpsc::Receiver<Result<Event, Refused>>, Ended), Refused> {
        let permit = Arc::clone(&self.readers).try_acquire_owned().map_err(|_| Refused::Busy)?;
        let (sender, receiver) = mpsc::channel(QUEUE_EVENTS);
        let source = self.clone();
        let ended = Ended::default();
        let outcome = Arc::clone(&ended);
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let (past, mut unread) = source.past(&choice);
            let restored = restored::dirs(&source.dir);
            let mut reader = Reader::over(restored.into_iter().chain([source.dir.clone()]));
            if let Some(past) = &past {
                reader = reader.with_sparse(past.parts(), Arc::<Past>::clone(past));
            }
            let selected = events::select_from(&reader, &choice, &mut |event| {
                let event = Event { cluster: source.cluster.to_string(), ..event };
                match sender.blocking_send(Ok(event)) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            });
            let remote = past.as_ref().map(|past| past.read());
            if let (Some(past), Some(history)) = (&past, &source.history) {
                unread = unread.or_else(|| past.unread());
                history.count(past);
            }
            let selected = match selected {
                // What has the name may have been described in what was not read.
                Err(EventsError::Node { .. } | EventsError::Nothing { .. }) if unread.is_some() => {
                    Ok(Outcome::default())
                }
                selected => selected,
            };
            match selected {
                Ok(done) => {
                    let done = Outcome { unread, remote, ..done };
                    let incomplete = Vec::from_iter(done.incomplete());
                    let told = remote.filter(|_| choice.tells_remote).map(RemoteRead::from);
                    *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
                    if !incomplete.is_empty() || told.is_some() {
                        let _ = sender.blocking_send(Ok(Event { incomplete, remote: told, ..Event::default() }));
                    }
                }
                Err(error) => {
                    // Whoever asked may have left.
                    let _ = sender.blocking_send(Err(error.into()));
                }
            }
        });
        Ok((receiver, ended))
    }
}

impl EventSource {
    /// What the remote archive has for a request, or why it was not read.
    fn past(&self, choice: &Choice) -> (Option<Arc<Past>>, Option<String>) {
        let Some(history) = self.history.as_ref().filter(|_| choice.reads_remote) else { return (None, None) };
        match history.before(choice.since_ns, choice.until_ns.unwrap_or(u64::MAX), choice.is_named()) {
            Ok(past) => (past, None),
            Err(error) => {
                tracing::warn!(%error, "cannot read archive.remote: events come from this disk only");
                (None, Some(error.to_string()))
            }
        }
    }
}

impl From<Read> for RemoteRead {
    fn from(read: Read) -> Self {
        Self { read_bytes: read.read_bytes, segments: read.segments, archive_bytes: read.archive_bytes }
    }
}

/// What a request asks for, within the bounds.
pub fn choice_of(request: &ListEventsRequest) -> Result<Choice, String> {
    let limit = match request.limit {
        0 => events::EVENTS_DEFAULT.into(),
        // A server of another version may ask for its client.
        limit if request.local => limit.min(events::EVENTS_MAX).into(),
        limit => events::within_limit(limit, request.newest)?,
    };
    Ok(Choice {
        since_ns: request.since_ns,
        until_ns: (request.until_ns > 0).then_some(request.until_ns),
        node: request.node.clone(),
        namespace: request.namespace.clone(),
        pod: request.pod.clone(),
        workload: request.workload.clone(),
        entity: request.entity.clone(),
        kinds: events::kinds_named(request.kinds.iter().map(String::as_str))?,
        limit,
        newest: request.newest,
        read_bytes_max: events::READ_BYTES_MAX,
        // The server that was asked reads it for all of them.
        reads_remote: !request.local,
        tells_remote: request.tells_remote && !request.local,
    })
}
