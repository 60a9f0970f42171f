//! Findings that outlive the servers' log.
//!
//! What enters: the stream in which the leader keeps the last version of each finding. What leaves: what is older than the log. What
//! must hold: what the log itself still says is found by reading it, and never taken from here.

use std::time::Duration;

use async_nats::jetstream::stream::Stream;
use prost::Message as _;
use tapio_wire::service::Finding;

use super::log::{self, LogError};

/// How long the next kept finding may take.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

fn failed(error: &dyn std::fmt::Display) -> LogError {
    LogError::JetStream { what: "the findings", error: error.to_string() }
}

/// Reads the last version of each finding that is kept. What cannot be read is left out.
///
/// # Errors
/// [`LogError::JetStream`] when the stream cannot be read to its end.
pub(crate) async fn read_all(stream: &Stream, mut take: impl FnMut(Finding)) -> Result<(), LogError> {
    let info = stream.get_info().await.map_err(|error| failed(&error))?;
    if info.state.messages == 0 {
        return Ok(());
    }
    let mut messages = log::read_from(stream, 0).await?;
    loop {
        let message = log::next_within(&mut messages, READ_TIMEOUT).await.map_err(|error| failed(&error))?;
        let seq = message.info().map_err(|error| failed(&error))?.stream_sequence;
        if let Ok(finding) = Finding::decode(message.payload.clone()) {
            take(finding);
        }
        if seq >= info.state.last_sequence {
            return Ok(());
        }
    }
}
