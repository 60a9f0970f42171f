//! Findings that outlive the servers' log.
//!
//! What enters: the stream in which the leader keeps the last version of each finding. What leaves: what is older than the log, also
//! where the leader writes it later, into a stream that was lost. What must hold: what the log itself still says is found by reading
//! it, and never taken from here.

use std::time::Duration;

use async_nats::jetstream::stream::Stream;
use prost::Message as _;
use tapio_wire::service::Finding;

use super::log::{self, LogError, Position};

/// How long the next kept finding may take.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

fn failed(error: &dyn std::fmt::Display) -> LogError {
    LogError::JetStream { what: "the findings", error: error.to_string() }
}

/// Whether a finding can be one of this program's: somebody may have edited what was kept.
pub(crate) fn is_sound(finding: &Finding) -> bool {
    !finding.id.is_empty()
        && (0.0..=1.0).contains(&finding.confidence)
        && finding.count < u32::MAX / 2
        && finding.published_ns < u64::MAX / 2
}

/// The moment up to which the log must reach back to find this again, nanoseconds since 1970. A state and a series of deaths go on,
/// whenever they began.
pub(super) fn needed_from_ns(finding: &Finding) -> u64 {
    if finding.ongoing || finding.count > 1 { finding.started_ns } else { finding.ended_ns }
}

/// Reads the last version of each finding that is kept. What cannot be read is left out.
///
/// # Errors
/// [`LogError::JetStream`] when the stream cannot be read to its end.
pub(crate) async fn read_all(stream: &Stream, take: impl FnMut(Finding)) -> Result<(), LogError> {
    Kept { stream: stream.clone(), position: None }.read_on(take).await
}

/// The kept findings, and how far they were read.
pub(super) struct Kept {
    stream: Stream,
    position: Option<Position>,
}

impl Kept {
    /// From the beginning on.
    pub fn new(stream: Stream) -> Self {
        Self { stream, position: None }
    }

    /// Reads what was kept since the last call. Whoever drops the future goes on with the next message.
    ///
    /// # Errors
    /// [`LogError::JetStream`] when the stream cannot be read to its end.
    pub async fn read_on(&mut self, mut take: impl FnMut(Finding)) -> Result<(), LogError> {
        let info = self.stream.get_info().await.map_err(|error| failed(&error))?;
        let (created_ns, last_seq) = (info.created.unix_timestamp_nanos(), info.state.last_sequence);
        let known = self.position.filter(|at| at.created_ns == created_ns && at.seq <= last_seq).map_or(0, |at| at.seq);
        if info.state.messages == 0 || known == last_seq {
            return Ok(());
        }
        let mut messages = log::read_from(&self.stream, known + 1).await?;
        loop {
            let message = log::next_within(&mut messages, READ_TIMEOUT).await.map_err(|error| failed(&error))?;
            let seq = message.info().map_err(|error| failed(&error))?.stream_sequence;
            // Bytes that are no finding, such as none at all, may decode as one.
            if let Some(finding) = Finding::decode(message.payload.clone()).ok().filter(is_sound) {
                take(finding);
            }
            self.position = Some(Position { created_ns, seq, written_ns: None });
            if seq >= last_seq {
                return Ok(());
            }
        }
    }
}
