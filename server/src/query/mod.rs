//! The query service: findings and status for operators' tools.
//!
//! What enters: requests of anyone who may connect. What leaves: pages of findings, a stream of changes, the status. What must
//! hold: pages are bounded; a watcher that is too slow misses no finding's latest version, it is sent what it missed.

use std::pin::Pin;
use std::sync::Arc;

use tapio_wire::service::query_server::{Query, QueryServer};
use tapio_wire::service::{
    Finding, GetFindingRequest, ListFindingsRequest, ListFindingsResponse, StatusRequest, StatusResponse,
    WatchFindingsRequest,
};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response};

use crate::findings::{FindingStore, LookupError, Position};

const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1000;
/// Bytes of an id or a page token.
const TOKEN_BYTES_MAX: usize = 128;
/// Findings on their way to one watcher.
const WATCHER_QUEUE: usize = 64;

/// Knows how the server is.
pub trait StatusSource: Send + Sync + 'static {
    /// The status as of now.
    fn status(&self) -> StatusResponse;
}

/// The query service over a store.
pub fn service(store: Arc<FindingStore>, status: Arc<dyn StatusSource>) -> QueryServer<QueryService> {
    QueryServer::new(QueryService { store, status })
}

/// See [`service`].
pub struct QueryService {
    store: Arc<FindingStore>,
    status: Arc<dyn StatusSource>,
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
        let request = request.into_inner();
        let limit = match request.limit as usize {
            0 => PAGE_DEFAULT,
            limit => limit.min(PAGE_MAX),
        };
        let after = match bounded(&request.page_token)? {
            "" => None,
            token => Some(
                Position::from_token(token)
                    .ok_or_else(|| tonic::Status::invalid_argument("this page token was not given by this server"))?,
            ),
        };
        let (page, next) = self.store.list(request.since_ns, after.as_ref(), limit);
        Ok(Response::new(ListFindingsResponse {
            findings: page.iter().map(|finding| (**finding).clone()).collect(),
            next_page_token: next.map(|next| next.to_token()).unwrap_or_default(),
        }))
    }

    async fn get_finding(&self, request: Request<GetFindingRequest>) -> Result<Response<Finding>, tonic::Status> {
        let request = request.into_inner();
        match self.store.get(bounded(&request.id)?) {
            Ok(finding) => Ok(Response::new((*finding).clone())),
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
        tokio::spawn(watch(Arc::clone(&self.store), since_ns, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<StatusResponse>, tonic::Status> {
        Ok(Response::new(self.status.status()))
    }
}

type Watcher = mpsc::Sender<Result<Finding, tonic::Status>>;

async fn send_all(watcher: &Watcher, findings: &[Arc<Finding>]) -> bool {
    for finding in findings {
        if watcher.send(Ok((**finding).clone())).await.is_err() {
            return false;
        }
    }
    true
}

/// Sends a watcher what there is and then every change, until it leaves.
async fn watch(store: Arc<FindingStore>, since_ns: u64, watcher: Watcher) {
    let (mut changes, mut sent_ns) = store.watch();
    if since_ns > 0 {
        let mut known = store.published_after(0);
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
                tracing::warn!(missed, "a watcher is slow; it is sent the latest versions");
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
