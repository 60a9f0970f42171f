//! The way of clues from the shards to the finder.
//!
//! What must hold: a published clue reaches the finder. The in-process bus is bounded and makes its publisher wait, which
//! in turn holds back frames and, through the credit, the collectors; nothing is dropped on the way.

use std::sync::Arc;

use crossbeam::channel::{Receiver, SendError, Sender, bounded};
use rkyv::{Archive, Deserialize, Serialize};
use tapio_wire::frame::Frame;
use tapio_wire::service::Finding;

use super::batch::Batch;
use super::clue::Clue;
use super::loss::Interval;
use super::topology::{EntityInfo, NodeRef};

/// The finder is gone, so nothing can be published any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the finder has stopped: no clue can be published any more")]
pub struct BusClosed;

/// Carries clues to the finder, or to other servers.
pub trait ClueBus: Send + Sync {
    /// Hands a clue over; waits while there is no room.
    ///
    /// # Errors
    /// [`BusClosed`] when nobody takes clues any more.
    fn publish(&self, clue: Clue) -> Result<(), BusClosed>;

    /// Reports that a node goes on. Does not wait: on a full bus the next one comes soon.
    fn clock(&self, _clock: NodeClock) {}

    /// Reports that entities were described again. Does not wait: on a full bus whoever takes clues looks anyway.
    fn renamed(&self) {}

    /// Whether it wants [`ClueBus::began`] and [`ClueBus::done`] to be called for frames.
    fn follows_frames(&self) -> bool {
        false
    }

    /// Reports that a frame goes to the shards; frames of one node come in the order of their sequence.
    fn began(&self, _frame: &FrameBegun<'_>) {}

    /// Reports that the shards have published everything that this frame led to.
    fn done(&self, _node: u64, _epoch: u64, _seq: u64) {}
}

/// A frame that goes to the shards, and what was learned from it before they see it.
pub struct FrameBegun<'a> {
    pub node: &'a NodeRef,
    pub frame: &'a Frame,
    /// What is known of entities that it described again.
    pub described: Vec<Arc<EntityInfo>>,
    /// What was lost since the frame before.
    pub lost: Option<Interval>,
}

/// A node that sends frames, at a moment.
#[derive(Archive, Serialize, Deserialize, Clone, Debug)]
pub struct NodeClock {
    pub node: NodeRef,
    /// Epoch of the frame: the run of the node's collector.
    pub epoch: u64,
    /// `CLOCK_BOOTTIME` of the node, and the same moment since 1970.
    pub boottime_ns: u64,
    pub realtime_ns: u64,
}

/// What travels on the in-process bus.
pub(crate) enum Message {
    Clue(Box<Clue>),
    Clock(Box<NodeClock>),
    /// Entities were described again.
    Renamed,
    /// An update for a finder that follows the log.
    FromLog(LogUpdate),
    /// The archive was replayed.
    Replayed,
    /// Answered when everything before it was dealt with.
    Barrier(Sender<()>),
    Stop,
}

/// What the reader of the log sends the finder.
pub(crate) enum LogUpdate {
    /// What a server wrote, and when the log took it, nanoseconds since 1970.
    Batch(Box<Batch>, u64),
    /// What a server wrote and is kept for those who come later: what there is, and nothing that happened.
    Facts(Box<Batch>),
    /// The last word of other servers on what was found before the log begins.
    Kept(Box<Finding>),
    /// The log is read again from its beginning.
    Rebuild {
        /// When the first message of the log was written, nanoseconds since 1970.
        begins_ns: u64,
        /// Older messages were deleted.
        is_cut: bool,
    },
    /// The end of the log was reached for the first time since; whether all that there is to say was in it.
    CaughtUp { confirms: bool },
    /// What the log had lacked is in it now.
    Confirmed,
    /// A message of this server could not be read.
    Unread(String, u64),
    /// A message of before this moment is deleted or damaged, nanoseconds since 1970: what frames led to may have been in it.
    Missed(u64),
    /// From now on batches come from this server itself, which has this name, and not from the log.
    Alone(String),
}

/// The bus within one process.
#[derive(Clone)]
pub struct InProcessBus {
    sender: Sender<Message>,
}

impl InProcessBus {
    /// A bus that holds at most `clues_max` clues.
    pub(crate) fn bounded(clues_max: usize) -> (Self, Receiver<Message>) {
        let (sender, receiver) = bounded(clues_max.max(1));
        (Self { sender }, receiver)
    }

    /// Waits until every clue published before was dealt with.
    ///
    /// # Errors
    /// [`BusClosed`] when the finder stopped before.
    pub fn barrier(&self) -> Result<(), BusClosed> {
        let (done, wait) = bounded(1);
        self.send(Message::Barrier(done))?;
        wait.recv().map_err(|_| BusClosed)
    }

    /// Tells the finder that everything before was a replay, which is over.
    ///
    /// # Errors
    /// [`BusClosed`] when the finder has stopped.
    pub fn end_replay(&self) -> Result<(), BusClosed> {
        self.send(Message::Replayed)
    }

    pub(crate) fn send(&self, message: Message) -> Result<(), BusClosed> {
        self.sender.send(message).map_err(|SendError(_)| BusClosed)
    }
}

impl ClueBus for InProcessBus {
    fn publish(&self, clue: Clue) -> Result<(), BusClosed> {
        self.send(Message::Clue(Box::new(clue)))
    }

    fn clock(&self, clock: NodeClock) {
        // Full: the next one comes soon. Closed: it is over.
        let _ = self.sender.try_send(Message::Clock(Box::new(clock)));
    }

    fn renamed(&self) {
        // Full: the finder looks after every clue. Closed: it is over.
        let _ = self.sender.try_send(Message::Renamed);
    }
}
