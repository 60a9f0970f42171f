//! The connection to a server, and what can go wrong.

use std::io;
use std::time::Duration;

use tapio_wire::service::query_client::QueryClient;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an idle connection is looked after.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A status speaks of every node.
const ANSWER_BYTES_MAX: usize = 64 << 20;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// A query client.
pub type Client = QueryClient<Channel>;

/// What ends the program otherwise than well.
pub enum Failure {
    Unreachable(String),
    Other(String),
    Usage(String),
    Output(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl Failure {
    /// Of an answer.
    pub fn of(server: &str, status: &tonic::Status) -> Self {
        match status.code() {
            Code::Unavailable => Self::Unreachable(format!("{server}: {}", status.message())),
            Code::DeadlineExceeded | Code::Cancelled => Self::Unreachable(format!("{server} did not answer in time")),
            _ => Self::Other(status.message().to_owned()),
        }
    }
}

/// Connects.
pub async fn connect(server: &str, with_timeout: bool) -> Result<Client, Failure> {
    let url = if server.contains("://") { server.to_owned() } else { format!("http://{server}") };
    let mut endpoint = Endpoint::from_shared(url)
        .map_err(|error| Failure::Usage(format!("\"{server}\" is no address: {error}")))?
        .connect_timeout(CONNECT_TIMEOUT)
        // A watcher must notice that the server is gone, also when it went without a word.
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(REQUEST_TIMEOUT)
        .keep_alive_while_idle(true);
    if with_timeout {
        endpoint = endpoint.timeout(REQUEST_TIMEOUT);
    }
    let channel = endpoint.connect().await.map_err(|error| {
        let mut reason = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            reason = error.to_string();
            cause = error.source();
        }
        Failure::Unreachable(format!("{server}: {reason}"))
    })?;
    Ok(QueryClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX))
}
