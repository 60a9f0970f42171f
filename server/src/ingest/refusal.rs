//! Why a stream was ended.

use std::time::Duration;

use tapio_wire::error::FrameError;
use tapio_wire::frame::{VERSION, VERSION_OLDEST};
use tapio_wire::limits::{NEWEST_EPOCH_KEY, NODE_NAME_BYTES_MAX, REFUSED_FRAME_KEY, SEQUENCE_AHEAD_MAX};
use tonic::Status;
use tonic::metadata::MetadataValue;

/// What was wrong with a stream, in words for its peer's log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the first message must be a hello")]
    NoHello,
    #[error("no hello within {0:?}")]
    HelloTimeout(Duration),
    #[error("only the first message may be a hello")]
    SecondHello,
    #[error("the message holds neither a hello nor a frame")]
    EmptyMessage,
    #[error("the node name must have 1 to {NODE_NAME_BYTES_MAX} bytes, none of them a control character")]
    NodeName,
    #[error("node id {declared:#x} is not that of the node's name, {expected:#x}")]
    NodeId { declared: u64, expected: u64 },
    #[error("{identity} may not ship for node `{node}`: its certificate or its token is another node's")]
    NotItsNode { node: String, identity: String },
    #[error(
        "frame version {0} is not supported; this server speaks {VERSION_OLDEST} to {VERSION}: upgrade the servers first"
    )]
    Version(u32),
    #[error(
        "epoch {epoch} is older than epoch {newest} of the same node; if two machines have this node name, set \
         collector.node_name on one"
    )]
    OldEpoch { epoch: u64, newest: u64 },
    #[error("too many nodes")]
    TooManyNodes,
    #[error("this server has {0} streams already (server.max_concurrent_streams): try another one, or later")]
    TooManyStreams(usize),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the frame is of node {frame:#x}, the stream of node {stream:#x}")]
    ForeignNode { frame: u64, stream: u64 },
    #[error("the frame is of epoch {frame}, the stream of epoch {stream}")]
    ForeignEpoch { frame: u64, stream: u64 },
    #[error("sequence numbers start at 1")]
    SequenceZero,
    #[error("sequence jumps from {from} to {to}")]
    SequenceGap { from: u64, to: u64 },
    #[error("sequence {seq} is more than {SEQUENCE_AHEAD_MAX} ahead of {durable}, the last durable one")]
    SequenceAhead { seq: u64, durable: u64 },
}

impl Refusal {
    /// A short constant for the metric's label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::NoHello => "no_hello",
            Self::HelloTimeout(_) => "hello_timeout",
            Self::SecondHello => "second_hello",
            Self::EmptyMessage => "empty_message",
            Self::NodeName => "node_name",
            Self::NodeId { .. } => "node_id",
            Self::NotItsNode { .. } => "not_its_node",
            Self::Version(_) => "hello_version",
            Self::OldEpoch { .. } => "old_epoch",
            Self::TooManyNodes => "too_many_nodes",
            Self::TooManyStreams(_) => "too_many_streams",
            Self::Frame(error) => error.label(),
            Self::ForeignNode { .. } => "foreign_node",
            Self::ForeignEpoch { .. } => "foreign_epoch",
            Self::SequenceZero => "sequence_zero",
            Self::SequenceGap { .. } => "sequence_gap",
            Self::SequenceAhead { .. } => "sequence_ahead",
        }
    }

    /// Whether the same frame would be refused by any server, however often it is sent. Not one of a newer version, which a newer
    /// server takes, nor one that is ahead of a slow archive.
    fn blames_frame(&self) -> bool {
        match self {
            Self::Frame(error) => !matches!(error, FrameError::Version { .. }),
            Self::SequenceZero | Self::SequenceGap { .. } => true,
            _ => false,
        }
    }

    /// Status for gRPC.
    pub fn status(&self) -> Status {
        let text = self.to_string();
        match self {
            Self::OldEpoch { newest, .. } => {
                let mut status = Status::failed_precondition(text);
                status.metadata_mut().insert(NEWEST_EPOCH_KEY, MetadataValue::from(*newest));
                status
            }
            Self::Version(_) | Self::NodeId { .. } => Status::failed_precondition(text),
            Self::ForeignNode { .. } | Self::ForeignEpoch { .. } | Self::NotItsNode { .. } => {
                Status::permission_denied(text)
            }
            Self::TooManyNodes | Self::TooManyStreams(_) => Status::resource_exhausted(text),
            Self::HelloTimeout(_) => Status::deadline_exceeded(text),
            _ => {
                let mut status = Status::invalid_argument(text);
                if self.blames_frame() {
                    status.metadata_mut().insert(REFUSED_FRAME_KEY, MetadataValue::from_static(self.label()));
                }
                status
            }
        }
    }
}
