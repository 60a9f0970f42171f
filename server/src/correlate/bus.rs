//! The way of signals from the shards to the finder.
//!
//! What must hold: a published signal reaches the finder. The in-process bus is bounded and makes its publisher wait, which
//! in turn holds back frames and, through the credit, the collectors; nothing is dropped on the way.

use crossbeam::channel::{Receiver, SendError, Sender, bounded};

use super::NodeRef;
use super::signal::Signal;

/// The finder is gone, so nothing can be published any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the finder has stopped: no signal can be published any more")]
pub struct BusClosed;

/// Carries signals to whoever joins them.
pub trait SignalBus: Send + Sync {
    /// Hands a signal over; waits while there is no room.
    ///
    /// # Errors
    /// [`BusClosed`] when nobody takes signals any more.
    fn publish(&self, signal: Signal) -> Result<(), BusClosed>;

    /// Tells that a node goes on. Does not wait: on a full bus the next one comes soon.
    fn clock(&self, _clock: NodeClock) {}

    /// Tells that entities were described anew. Does not wait: on a full bus whoever takes signals looks anyway.
    fn renamed(&self) {}
}

/// A node that sends frames, at a moment.
#[derive(Clone, Debug)]
pub struct NodeClock {
    pub node: NodeRef,
    /// Of the frame: the run of the node's collector.
    pub epoch: u64,
    /// `CLOCK_BOOTTIME` of the node, and the same moment since 1970.
    pub boottime_ns: u64,
    pub realtime_ns: u64,
}

/// What travels on the in-process bus.
pub(crate) enum Message {
    Signal(Box<Signal>),
    Clock(Box<NodeClock>),
    /// Entities were described anew.
    Renamed,
    /// Answered when everything before it was dealt with.
    Barrier(Sender<()>),
    Stop,
}

/// The bus within one process.
#[derive(Clone)]
pub struct InProcessBus {
    sender: Sender<Message>,
}

impl InProcessBus {
    /// A bus that holds at most `signals_max` signals.
    pub(crate) fn bounded(signals_max: usize) -> (Self, Receiver<Message>) {
        let (sender, receiver) = bounded(signals_max.max(1));
        (Self { sender }, receiver)
    }

    /// Waits until every signal published before was dealt with.
    ///
    /// # Errors
    /// [`BusClosed`] when the finder stopped before.
    pub fn barrier(&self) -> Result<(), BusClosed> {
        let (done, wait) = bounded(1);
        self.send(Message::Barrier(done))?;
        wait.recv().map_err(|_| BusClosed)
    }

    pub(crate) fn send(&self, message: Message) -> Result<(), BusClosed> {
        self.sender.send(message).map_err(|SendError(_)| BusClosed)
    }
}

impl SignalBus for InProcessBus {
    fn publish(&self, signal: Signal) -> Result<(), BusClosed> {
        self.send(Message::Signal(Box::new(signal)))
    }

    fn clock(&self, clock: NodeClock) {
        // Full: the next one comes soon. Closed: it is over.
        let _ = self.sender.try_send(Message::Clock(Box::new(clock)));
    }

    fn renamed(&self) {
        // Full: the finder looks after every signal. Closed: it is over.
        let _ = self.sender.try_send(Message::Renamed);
    }
}
