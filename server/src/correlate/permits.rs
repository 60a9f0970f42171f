//! How many frames may be between delivery and the shards: of all nodes together, and of each.
//!
//! What must hold: a node that floods the shards holds back its own stream, and the frames of other nodes find room. Waiting
//! callers are released when correlation stops.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Stopped;
use super::generations::Generations;

/// Nodes that together may use all permits: each has its part of them.
const NODES_IN_FLIGHT: usize = 4;
/// Permits of one node: one frame is worked on while the next one comes.
const SHARE_MIN: usize = 2;
/// Nodes whose share is remembered.
const SHARES_MAX: usize = 20_000;

/// Held until the last shard is done with a frame: one permit of all, and one of the node's share.
pub struct Permit {
    _of_all: OwnedSemaphorePermit,
    _of_node: OwnedSemaphorePermit,
}

/// The permits.
pub(super) struct Permits {
    all: Arc<Semaphore>,
    frames: u32,
    shares: Mutex<Generations<u64, Arc<Semaphore>>>,
}

impl Permits {
    /// Allows `frames` frames at once.
    pub fn new(frames: usize) -> Self {
        let frames = frames.clamp(1, 1 << 16);
        let shares = Mutex::new(Generations::new(SHARES_MAX));
        Self { all: Arc::new(Semaphore::new(frames)), frames: frames as u32, shares }
    }

    /// How many there are of all nodes.
    pub fn frames(&self) -> usize {
        self.frames as usize
    }

    /// How many of them one node may have.
    pub fn of_a_node(&self) -> usize {
        (self.frames() / NODES_IN_FLIGHT).max(SHARE_MIN)
    }

    /// Waits for a permit for a frame of this node: first of its own share, so that it takes no room while it waits.
    ///
    /// # Errors
    /// [`Stopped`] when there are none any more.
    pub async fn acquire(&self, node: u64) -> Result<Permit, Stopped> {
        let share = {
            let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(shares.entry(node, || Arc::new(Semaphore::new(self.of_a_node()))))
        };
        let of_node = share.acquire_owned().await.map_err(|_| Stopped)?;
        let of_all = Arc::clone(&self.all).acquire_owned().await.map_err(|_| Stopped)?;
        Ok(Permit { _of_all: of_all, _of_node: of_node })
    }

    /// Waits until all are free.
    ///
    /// # Errors
    /// [`Stopped`] when there are none any more.
    pub async fn all_free(&self) -> Result<(), Stopped> {
        self.all.acquire_many(self.frames).await.map(drop).map_err(|_| Stopped)
    }

    /// Gives out no more of them.
    pub fn close(&self) {
        self.all.close();
        let shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        shares.values().for_each(|share| share.close());
    }

    /// Whether there are none any more.
    pub fn is_closed(&self) -> bool {
        self.all.is_closed()
    }
}
