//! What servers send one another through the log.
//!
//! What enters: what the shards derive from frames. What leaves: bytes of one message, and the same again. What must hold: a
//! message is checked as a whole before anything of it is used; one of another version is refused by its first byte and skipped.
//!
//! ```text
//! version u8 · lz4 block with its size before it, of the rkyv archive of a Batch
//! ```

use std::sync::Arc;

use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use super::clue::Clue;
use super::{Dropped, EntityInfo, Interval, NodeClock, NodeRef};

/// Changes with everything that changes the layout of an entry: `a_message_of_this_version_is_read_for_ever` fails otherwise.
pub const VERSION: u8 = 1;
/// What a message may unpack to.
const UNPACKED_MAX: usize = 16 << 20;

/// Entries of one server, in the order in which they hold.
#[derive(Archive, Serialize, Deserialize, Debug)]
pub struct Batch {
    /// The server that wrote it.
    pub server: String,
    /// Where its gRPC can be reached by other servers; empty where that is not known.
    pub address: String,
    pub entries: Vec<Entry>,
}

/// One thing that all servers are to know.
#[derive(Archive, Serialize, Deserialize, Debug)]
pub enum Entry {
    /// An entity is described, or described otherwise.
    Described(Arc<EntityInfo>),
    Clue(Box<Clue>),
    /// A node goes on.
    Clock(NodeClock),
    /// Events of a node were lost, as one server saw by two frames that followed one another.
    Lost {
        node: u64,
        /// The later one of the two.
        epoch: u64,
        seq: u64,
        interval: Interval,
    },
    /// Everything that a stretch of a node's frames gives occasion to stands in the log before this. An empty one says only from
    /// which frame on the server has the node's stream.
    Covered(Covered),
    /// The server ends in an orderly way.
    Leaving,
}

impl Entry {
    /// Whether it is sent when everything before it was taken.
    pub fn closes(&self) -> bool {
        match self {
            Self::Covered(covered) => !covered.is_empty(),
            Self::Leaving => true,
            _ => false,
        }
    }
}

/// A stretch of frames of one collector's run.
#[derive(Archive, Serialize, Deserialize, Clone, Debug)]
pub struct Covered {
    pub node: NodeRef,
    pub epoch: u64,
    pub from: Point,
    pub to: Point,
    /// The last frame is the epoch's last one.
    pub is_final: bool,
}

impl Covered {
    /// Says only from where on a server has the node's frames.
    pub fn from_here(node: NodeRef, epoch: u64, from: Point) -> Self {
        let to = Point { seq: from.seq.saturating_sub(1), ..from };
        Self { node, epoch, from, to, is_final: false }
    }

    /// Whether it has no frame.
    pub fn is_empty(&self) -> bool {
        self.to.seq < self.from.seq
    }
}

/// A frame's place in its stream.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    pub seq: u64,
    /// `CLOCK_BOOTTIME` of the node, and the same moment since 1970 by the node's clock.
    pub boottime_ns: u64,
    pub realtime_ns: u64,
    /// What the node had lost up to this frame since the epoch began.
    pub dropped: Dropped,
}

/// Why a message cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    #[error("its version is {0} and this server reads {VERSION}: upgrade the older servers")]
    Version(u8),
    #[error("it is damaged: {0}")]
    Damaged(String),
}

impl Batch {
    /// The bytes of a message.
    ///
    /// # Errors
    /// [`BatchError::Damaged`] when memory for them is short.
    pub fn encode(&self) -> Result<Vec<u8>, BatchError> {
        let archive = rkyv::to_bytes::<rkyv::rancor::Error>(self).map_err(|error| damaged(&error))?;
        let mut message = vec![VERSION];
        message.extend(lz4_flex::block::compress_prepend_size(&archive));
        Ok(message)
    }

    /// Reads a message.
    ///
    /// # Errors
    /// See [`BatchError`].
    pub fn decode(message: &[u8]) -> Result<Self, BatchError> {
        let (&version, packed) = message.split_first().ok_or_else(|| damaged(&"it is empty"))?;
        if version != VERSION {
            return Err(BatchError::Version(version));
        }
        let (size, packed) = lz4_flex::block::uncompressed_size(packed).map_err(|error| damaged(&error))?;
        if size > UNPACKED_MAX {
            return Err(damaged(&format!("it would unpack to {size} bytes")));
        }
        let mut archive = AlignedVec::<16>::new();
        archive.resize(size, 0);
        let length = lz4_flex::block::decompress_into(packed, &mut archive).map_err(|error| damaged(&error))?;
        rkyv::from_bytes::<Self, rkyv::rancor::Error>(&archive[..length]).map_err(|error| damaged(&error))
    }
}

fn damaged(error: &dyn std::fmt::Display) -> BatchError {
    BatchError::Damaged(error.to_string())
}
