//! Frames on their way to the shards: indices only, nothing is copied.
//!
//! What must hold: every event of a frame is on exactly one shard's list, and all events of an entity on the same shard's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tapio_wire::frame::Frame;

use super::bus::ClueBus;
use super::permits::Permit;
use super::topology::NodeRef;

/// A frame, and which of its events belong to which shard.
pub struct RoutedFrame {
    node: NodeRef,
    frame: Arc<Frame>,
    /// Events by shard; empty when there is only one, which then takes all.
    lists: Vec<Vec<u32>>,
    routed: Instant,
    /// Held until the last shard is done with the frame: the number of permits bounds every shard's queue.
    _permit: Option<Permit>,
    /// Notified when the last shard is done with it.
    bus: Option<Arc<dyn ClueBus>>,
}

impl Drop for RoutedFrame {
    fn drop(&mut self) {
        if let Some(bus) = &self.bus {
            let header = self.frame.header();
            bus.done(header.node, header.epoch, header.seq);
        }
    }
}

impl RoutedFrame {
    /// Routes a frame's events to `shards` shards.
    pub fn new(node: NodeRef, frame: Arc<Frame>, shards: usize, permit: Option<Permit>) -> Self {
        let mut lists = Vec::new();
        if shards > 1 {
            let events = &frame.body().events;
            lists.resize_with(shards, || Vec::with_capacity(events.len() / shards + events.len() / 8 + 1));
            for (index, event) in events.iter().enumerate() {
                lists[shard_of(node.id, event.entity.to_native(), shards)].push(index as u32);
            }
        }
        Self { node, frame, lists, routed: Instant::now(), _permit: permit, bus: None }
    }

    /// Notifies this bus when the last shard is done with the frame.
    #[must_use]
    pub fn reporting(mut self, bus: Arc<dyn ClueBus>) -> Self {
        self.bus = Some(bus);
        self
    }

    /// How long ago it was routed.
    pub fn age(&self) -> Duration {
        self.routed.elapsed()
    }

    /// The node that sent it.
    pub fn node(&self) -> &NodeRef {
        &self.node
    }

    /// The frame.
    pub fn frame(&self) -> &Frame {
        &self.frame
    }

    /// How many events a shard has to look at.
    pub fn events_of(&self, shard: usize) -> usize {
        match self.lists.get(shard) {
            Some(list) => list.len(),
            None if self.lists.is_empty() => self.frame.body().events.len(),
            None => 0,
        }
    }

    /// Calls `each` with the index of every event of a shard, in the frame's order.
    #[inline]
    pub fn for_each(&self, shard: usize, mut each: impl FnMut(u32)) {
        if self.lists.is_empty() {
            (0..self.frame.body().events.len() as u32).for_each(each);
        } else if let Some(list) = self.lists.get(shard) {
            list.iter().for_each(|&index| each(index));
        }
    }
}

#[inline]
fn shard_of(node: u64, entity: u64, shards: usize) -> usize {
    let hash = (node.rotate_left(32) ^ entity).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    ((hash * shards as u64) >> 32) as usize
}
