//! The server's query service, for callers that block: status, and findings as they are published.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tapio_wire::service::query_client::QueryClient;
use tapio_wire::service::{
    Finding, ListFindingsRequest, ListFindingsResponse, StatusRequest, StatusResponse, WatchFindingsRequest,
};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio_stream::StreamExt;
use tonic::transport::{Channel, Endpoint};

use crate::clock::boottime_ns;
use crate::error::{Context, Error};
use crate::interrupt;

const TIMEOUT: Duration = Duration::from_secs(5);
/// A status speaks of every node.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Maximum number of findings that the server returns at once.
const FINDINGS_MAX: u32 = 1000;
/// More pages than a server keeps findings for.
const PAGES_MAX: usize = 100;

fn runtime() -> Result<Runtime, Error> {
    Builder::new_current_thread().enable_all().build().context(|| "start a client".into())
}

fn server_error(address: &str, message: impl ToString) -> Error {
    Error::Server { address: address.to_owned(), message: message.to_string() }
}

async fn connect(address: &str) -> Result<QueryClient<Channel>, Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| server_error(address, error))?
        .connect_timeout(TIMEOUT);
    let channel = endpoint.connect().await.map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        server_error(address, cause.unwrap_or_else(|| error.to_string()))
    })?;
    Ok(QueryClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

/// A server to ask. Each question has a connection of its own: between two of them nothing here would answer the server's
/// keepalive.
pub struct Client {
    address: String,
    runtime: Runtime,
}

impl Client {
    /// Makes sure that there is a server at `host:port`.
    pub fn connect(address: &str) -> Result<Self, Error> {
        let runtime = runtime()?;
        runtime.block_on(connect(address))?;
        Ok(Self { address: address.to_owned(), runtime })
    }

    /// The server's status now; where it shares a log with others, theirs too.
    pub fn status(&mut self) -> Result<StatusResponse, Error> {
        self.ask_status(StatusRequest { local: false })
    }

    /// What the server itself has.
    pub fn own_status(&mut self) -> Result<StatusResponse, Error> {
        self.ask_status(StatusRequest { local: true })
    }

    fn ask_status(&mut self, request: StatusRequest) -> Result<StatusResponse, Error> {
        let address = &self.address;
        let answer = async {
            let mut query = connect(address).await?;
            let response = query.status(request).await;
            response.map(tonic::Response::into_inner).map_err(|status| server_error(address, status))
        };
        let answer = self.runtime.block_on(async { tokio::time::timeout(2 * TIMEOUT, answer).await });
        answer.unwrap_or_else(|_| Err(server_error(address, "no status within 10 s")))
    }

    /// The newest findings, as many as an answer holds.
    pub fn findings(&mut self) -> Result<Vec<Finding>, Error> {
        Ok(self.page_of_findings(String::new())?.findings)
    }

    /// All findings, page by page. Those that are found or go between two pages may be missing.
    pub fn all_findings(&mut self) -> Result<Vec<Finding>, Error> {
        let (mut findings, mut token) = (Vec::new(), String::new());
        for _ in 0..PAGES_MAX {
            let page = self.page_of_findings(token)?;
            findings.extend(page.findings);
            token = page.next_page_token;
            if token.is_empty() {
                return Ok(findings);
            }
        }
        Err(server_error(&self.address, format!("more than {PAGES_MAX} pages of findings")))
    }

    fn page_of_findings(&mut self, page_token: String) -> Result<ListFindingsResponse, Error> {
        let address = &self.address;
        let answer = async {
            let mut query = connect(address).await?;
            let request = ListFindingsRequest { limit: FINDINGS_MAX, page_token, ..ListFindingsRequest::default() };
            let response = query.list_findings(request).await;
            response.map(tonic::Response::into_inner).map_err(|status| server_error(address, status))
        };
        let answer = self.runtime.block_on(async { tokio::time::timeout(2 * TIMEOUT, answer).await });
        answer.unwrap_or_else(|_| Err(server_error(address, "no findings within 10 s")))
    }
}

/// A finding and when it came, by this host's `CLOCK_BOOTTIME`.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub finding: Finding,
    pub arrived_ns: u64,
}

/// Findings as they are published, from a thread of its own that stamps their arrival.
pub struct FindingWatch {
    address: String,
    arrivals: Receiver<Result<Arrival, String>>,
    seen: Vec<Arrival>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FindingWatch {
    /// Subscribes; what is published after this returned arrives.
    pub fn start(address: &str) -> Result<Self, Error> {
        let runtime = runtime()?;
        let (sender, arrivals) = channel();
        let (ready, is_ready) = channel();
        let (stop, stopped) = oneshot::channel();
        let own_address = address.to_owned();
        let thread = thread::Builder::new()
            .name("findings".into())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = watch(&own_address, &ready, &sender) => {}
                        _ = stopped => {}
                    }
                });
            })
            .context(|| "start the thread that watches findings".into())?;
        let watch =
            Self { address: address.to_owned(), arrivals, seen: Vec::new(), stop: Some(stop), thread: Some(thread) };
        match is_ready.recv_timeout(2 * TIMEOUT) {
            Ok(Ok(())) => Ok(watch),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(server_error(address, "WatchFindings did not start in time")),
        }
    }

    /// Waits for a finding that `wanted` accepts; one that came before counts as well. `None` when time is up.
    pub fn wait(&mut self, limit: Duration, wanted: impl Fn(&Finding) -> bool) -> Result<Option<Arrival>, Error> {
        if let Some(arrival) = self.seen.iter().find(|arrival| wanted(&arrival.finding)) {
            return Ok(Some(arrival.clone()));
        }
        let end = Instant::now() + limit;
        loop {
            interrupt::check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            match self.arrivals.recv_timeout(left.min(Duration::from_millis(50))) {
                Ok(Ok(arrival)) => {
                    self.seen.push(arrival.clone());
                    if wanted(&arrival.finding) {
                        return Ok(Some(arrival));
                    }
                }
                Ok(Err(message)) => return Err(server_error(&self.address, message)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(server_error(&self.address, "the stream of findings ended"));
                }
            }
        }
    }

    /// Everything that came so far.
    pub fn seen(&self) -> &[Arrival] {
        &self.seen
    }

    /// Forgets what came so far.
    pub fn forget(&mut self) {
        self.seen.clear();
    }
}

impl Drop for FindingWatch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn watch(address: &str, ready: &Sender<Result<(), Error>>, sender: &Sender<Result<Arrival, String>>) {
    let request = WatchFindingsRequest { since_ns: 0 };
    let stream = match connect(address).await {
        Ok(mut query) => query.watch_findings(request).await.map_err(|status| server_error(address, status)),
        Err(error) => Err(error),
    };
    let mut stream = match stream {
        Ok(response) => {
            let _ = ready.send(Ok(()));
            response.into_inner()
        }
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    while let Some(finding) = stream.next().await {
        let arrived_ns = boottime_ns();
        let arrival = finding.map(|finding| Arrival { finding, arrived_ns }).map_err(|status| status.to_string());
        if sender.send(arrival).is_err() {
            return;
        }
    }
}
