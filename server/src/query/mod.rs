//! The query service: findings and status for operators' tools.
//!
//! What enters: requests of anyone who may connect. What leaves: pages of findings, a stream of changes, the status. What must
//! hold: pages are bounded; a watcher that is too slow misses no finding's latest version, it is sent what it missed.

mod events;
mod list;
mod peers;
mod silences;
pub mod why;

use std::pin::Pin;
use std::sync::Arc;

use tapio_wire::service::query_server::{Query, QueryServer};
use tapio_wire::service::{
    Event, Finding, GetFindingRequest, ListEventsRequest, ListFindingsRequest, ListFindingsResponse, RemoteRead,
    StatusRequest, StatusResponse, Unanswered, WatchFindingsRequest,
};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response};

use crate::events::Choice;
use crate::findings::{FindingStore, LookupError, Position};
use crate::silences::Silences;

pub use events::{EventSource, Refused};
pub use list::{Page, SEVERITIES, list, page};
pub use peers::Peers;
pub use silences::{SilencesService, silences_service};
pub(crate) use silences::{acknowledge, status_of};

/// Bytes of an id or a page token.
const TOKEN_BYTES_MAX: usize = 128;
/// Findings on their way to one watcher.
pub(crate) const WATCHER_QUEUE: usize = 64;

/// Knows how the server is.
pub trait StatusSource: Send + Sync + 'static {
    /// The status as of now.
    fn status(&self) -> StatusResponse;
}

/// The query service over a store.
pub fn service(store: Arc<FindingStore>, status: Arc<dyn StatusSource>) -> QueryServer<QueryService> {
    let silences = Arc::new(Silences::in_memory());
    QueryServer::new(QueryService { store, status, events: None, peers: None, silences })
}

/// The query service over a store and an archive, what is silenced of it, and what other servers have.
pub fn service_with_events(
    store: Arc<FindingStore>,
    status: Arc<dyn StatusSource>,
    events: EventSource,
    peers: Option<Arc<Peers>>,
    silences: Arc<Silences>,
) -> QueryServer<QueryService> {
    QueryServer::new(QueryService { store, status, events: Some(events), peers, silences })
}

/// See [`service`].
pub struct QueryService {
    store: Arc<FindingStore>,
    status: Arc<dyn StatusSource>,
    events: Option<EventSource>,
    peers: Option<Arc<Peers>>,
    silences: Arc<Silences>,
}

impl Position {
    fn to_token(&self) -> String {
        format!("{:x}-{}", self.ended_ns, self.id)
    }

    fn from_token(token: &str) -> Option<Self> {
        let (ended_ns, id) = token.split_once('-')?;
        Some(Self { ended_ns: u64::from_str_radix(ended_ns, 16).ok()?, id: id.to_owned() })
    }
}

/// Events, and what is said of them.
pub(crate) struct Told {
    pub events: Vec<Event>,
    /// Servers whose part is missing.
    pub incomplete: Vec<Unanswered>,
    /// What was read of the remote archive, where the choice asks for it.
    pub remote: Option<RemoteRead>,
}

/// Events of all servers, and what is missing of them.
///
/// # Errors
/// When this server's archive cannot be read, too many read it, or no server knows what was asked for.
pub(crate) async fn events_of_all(
    source: &EventSource,
    peers: Option<&Peers>,
    choice: Choice,
    metadata: &MetadataMap,
) -> Result<Told, tonic::Status> {
    let mut events = match peers {
        Some(peers) => peers.all_events(source, choice, metadata).await?,
        None => peers::own_events(source, choice).await?,
    };
    let (mut incomplete, mut remote) = (Vec::new(), None);
    events.retain_mut(|event| {
        incomplete.append(&mut event.incomplete);
        remote = remote.or(event.remote.take());
        !event.id.is_empty()
    });
    Ok(Told { events, incomplete, remote })
}

/// Servers whose part of the findings is missing here.
pub(crate) fn unheard(peers: Option<&Peers>, store: &FindingStore) -> Vec<Unanswered> {
    let unjoined = |server| Unanswered {
        server,
        reason: "no log joins it with the server that answers: set cluster.url".into(),
        ..Unanswered::default()
    };
    peers.map_or_else(|| store.unjoined().into_iter().map(unjoined).collect(), Peers::unheard)
}

fn bounded(token: &str) -> Result<&str, tonic::Status> {
    if token.len() > TOKEN_BYTES_MAX {
        return Err(tonic::Status::invalid_argument(format!("an id or token has at most {TOKEN_BYTES_MAX} bytes")));
    }
    Ok(token)
}

#[tonic::async_trait]
impl Query for QueryService {
    async fn list_findings(
        &self,
        request: Request<ListFindingsRequest>,
    ) -> Result<Response<ListFindingsResponse>, tonic::Status> {
        let mut listed = list(&self.store, &request.into_inner()).map_err(tonic::Status::invalid_argument)?;
        listed.findings.iter_mut().for_each(|finding| self.silences.mark(finding));
        listed.incomplete = unheard(self.peers.as_deref(), &self.store);
        Ok(Response::new(listed))
    }

    async fn get_finding(&self, request: Request<GetFindingRequest>) -> Result<Response<Finding>, tonic::Status> {
        let request = request.into_inner();
        match self.store.get(bounded(&request.id)?) {
            Ok(finding) => Ok(Response::new((*self.silences.marked(finding)).clone())),
            Err(error @ LookupError::NotFound(_)) => Err(tonic::Status::not_found(error.to_string())),
            Err(error @ LookupError::Ambiguous { .. }) => Err(tonic::Status::invalid_argument(error.to_string())),
        }
    }

    type WatchFindingsStream = Pin<Box<dyn Stream<Item = Result<Finding, tonic::Status>> + Send>>;

    async fn watch_findings(
        &self,
        request: Request<WatchFindingsRequest>,
    ) -> Result<Response<Self::WatchFindingsStream>, tonic::Status> {
        let since_ns = request.into_inner().since_ns;
        let (sender, receiver) = mpsc::channel(WATCHER_QUEUE);
        tokio::spawn(watch(Arc::clone(&self.store), since_ns, None, sender));
        let silences = Arc::clone(&self.silences);
        let marked = ReceiverStream::new(receiver).map(move |finding| {
            finding.map(|mut finding| {
                silences.mark(&mut finding);
                finding
            })
        });
        Ok(Response::new(Box::pin(marked)))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, tonic::Status> {
        let mut status = self.status.status();
        match &self.peers {
            Some(peers) if request.get_ref().local => peers.introduce(&mut status),
            Some(peers) => peers.complete(&mut status, request.metadata()).await,
            None => status.incomplete = unheard(None, &self.store),
        }
        Ok(Response::new(status))
    }

    type ListEventsStream = Pin<Box<dyn Stream<Item = Result<Event, tonic::Status>> + Send>>;

    async fn list_events(
        &self,
        request: Request<ListEventsRequest>,
    ) -> Result<Response<Self::ListEventsStream>, tonic::Status> {
        let Some(events) = &self.events else {
            return Err(tonic::Status::failed_precondition("this server has no archive to read events from"));
        };
        let choice = events::choice_of(request.get_ref()).map_err(tonic::Status::invalid_argument)?;
        if let Some(peers) = self.peers.as_ref().filter(|_| !request.get_ref().local) {
            let all = peers.all_events(events, choice, request.metadata()).await?;
            return Ok(Response::new(Box::pin(tokio_stream::iter(all.into_iter().map(Ok)))));
        }
        let (receiver, _) = events.stream(choice).map_err(|refused| refused.to_status())?;
        let events = ReceiverStream::new(receiver).map(|event| event.map_err(|refused| refused.to_status()));
        let incomplete = if request.get_ref().local { Vec::new() } else { unheard(None, &self.store) };
        let missing = (!incomplete.is_empty()).then(|| Ok(Event { incomplete, ..Event::default() }));
        Ok(Response::new(Box::pin(events.chain(tokio_stream::iter(missing)))))
    }
}

pub(crate) type Watcher = mpsc::Sender<Result<Finding, tonic::Status>>;

async fn send_all(watcher: &Watcher, findings: &[Arc<Finding>]) -> bool {
    for finding in findings {
        if watcher.send(Ok((**finding).clone())).await.is_err() {
            return false;
        }
    }
    true
}

/// Sends a watcher what there is and then every change, until it leaves. One that comes back says what it had last, by its
/// `published_ns`. What is published after this call is sent, even before the future is polled.
pub(crate) fn watch(
    store: Arc<FindingStore>,
    since_ns: u64,
    had_ns: Option<u64>,
    watcher: Watcher,
) -> impl Future<Output = ()> + Send {
    let (changes, sent_ns) = store.watch();
    send_changes(store, (changes, sent_ns), since_ns, had_ns, watcher)
}

async fn send_changes(
    store: Arc<FindingStore>,
    (mut changes, mut sent_ns): (broadcast::Receiver<Arc<Finding>>, u64),
    since_ns: u64,
    had_ns: Option<u64>,
    watcher: Watcher,
) {
    if since_ns > 0 || had_ns.is_some() {
        // One that comes back may have what was withdrawn meanwhile.
        let mut known = match had_ns {
            Some(had_ns) => store.changed_after(had_ns),
            None => store.published_after(0),
        };
        known.retain(|finding| finding.ended_ns >= since_ns && finding.published_ns <= sent_ns);
        if !send_all(&watcher, &known).await {
            return;
        }
    }
    loop {
        let change = tokio::select! {
            change = changes.recv() => change,
            () = watcher.closed() => return,
        };
        let findings = match change {
            Ok(finding) => vec![finding],
            Err(RecvError::Lagged(missed)) => {
                tracing::warn!(missed, "slow watcher: it gets the latest versions only");
                store.changed_after(sent_ns)
            }
            Err(RecvError::Closed) => return,
        };
        for finding in findings {
            if finding.published_ns <= sent_ns {
                continue;
            }
            sent_ns = finding.published_ns;
            if !send_all(&watcher, &[finding]).await {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_watcher_gets_what_is_published_before_its_first_poll() {
        let store = Arc::new(FindingStore::new(10));
        let (sender, mut receiver) = mpsc::channel(4);
        let watching = watch(Arc::clone(&store), 0, None, sender);
        store.publish(Finding { id: "1".into(), ..Finding::default() });
        tokio::spawn(watching);
        let first = tokio::time::timeout(std::time::Duration::from_secs(5), receiver.recv()).await;
        let first = first.expect("in time").expect("open").expect("a finding");
        assert_eq!(first.id, "1");
    }
}
