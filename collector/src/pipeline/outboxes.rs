//! The outboxes: of the present epoch, and of those that an earlier run left in the spool.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crossbeam::sync::Parker;

use super::{Node, Parts, StartError, spawn};
use crate::base::clock::realtime_ns;
use crate::base::status::Alive;
use crate::outbox::Outbox;
use crate::outbox::links::Links;
use crate::outbox::spool::{Left, Spool};
use crate::outbox::spool_thread;
use crate::settings::config::{Config, SpoolSection};

/// Where frames wait until a server has them.
pub(super) struct Outboxes {
    pub(super) present: Arc<Outbox>,
    /// Outboxes of earlier epochs, oldest first.
    pub(super) replays: Vec<Arc<Outbox>>,
    /// The epoch that the present one begins with.
    pub(super) epoch: u64,
    pub(super) spool_bytes: Arc<AtomicU64>,
}

impl Outboxes {
    /// Opens the spool, where there is one, and starts its thread.
    pub(super) fn open(
        config: &Config,
        node: &Node,
        limit_bytes: usize,
        links: &Links,
        parts: &mut Parts,
    ) -> Result<Self, StartError> {
        let spool_bytes = Arc::default();
        let Some(section) = &config.grpc.spool else {
            let epoch = realtime_ns();
            let present = Arc::new(Outbox::new(node.id, epoch, limit_bytes, links));
            return Ok(Self { present, replays: Vec::new(), epoch, spool_bytes });
        };
        let (spool, left) = open_spool(section, node)?;
        let parker = Parker::new();
        let epoch = left.iter().map(|left| left.epoch + 1).fold(realtime_ns(), u64::max);
        let own = left.iter().enumerate().filter(|(_, left)| left.node == node.id);
        let replays = own.map(|(index, own)| {
            let next = left.get(index + 1).map_or(epoch, |next| next.epoch);
            Arc::new(Outbox::replay(own, next, limit_bytes, links, parker.unparker().clone()))
        });
        let replays: Vec<_> = replays.collect();
        let present = Outbox::new(node.id, epoch, limit_bytes, links).with_spool(parker.unparker().clone());
        let outboxes = Self { present: Arc::new(present), replays, epoch, spool_bytes };
        parts.push(("spool", outboxes.run(spool, parker)?));
        Ok(outboxes)
    }

    /// Starts the spool's thread. Returns what shows whether it runs.
    fn run(&self, spool: Spool, parker: Parker) -> std::io::Result<Alive> {
        let all = self.replays.iter().chain([&self.present]).map(Arc::clone).collect();
        let bytes = Arc::clone(&self.spool_bytes);
        let alive = Alive::default();
        let guard = alive.begin();
        spawn("spool", move || {
            let _alive = guard;
            spool_thread::run(spool, all, &parker, &bytes);
        })?;
        Ok(alive)
    }
}

/// Opens the spool and deletes what another node has left in it.
fn open_spool(section: &SpoolSection, node: &Node) -> Result<(Spool, Vec<Left>), StartError> {
    let (mut spool, left) = Spool::open(&section.dir, section.max_bytes)?;
    for foreign in left.iter().filter(|left| left.node != node.id) {
        tracing::warn!(epoch = foreign.epoch, "deleted the spool: its frames are of another node");
        spool.acknowledged(foreign.epoch, u64::MAX, foreign.acked_events);
    }
    Ok((spool, left))
}
