//! What the archive has, on its way through the shards: at the start, and again when the servers' log has lost it.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tapio_wire::event::EntityKind;
use tapio_wire::frame::{Frame, Header};

use super::PipelineError;
use crate::archive::offsite::Offsite;
use crate::archive::reader::{Reader, Selection};
use crate::archive::{Archive, ArchiveConfig, ArchiveError};
use crate::budget::Budget;
use crate::cluster::{Cluster, Healer};
use crate::config::Config;
use crate::correlate::{CorrelateConfig, Correlator, InProcessBus, LossBook, NodeRef, Topology};
use crate::findings::PatternSet;

/// Opens the archive and replays its last minutes.
pub(super) async fn open_archive(
    config: &Config,
    budget: &Budget,
    window: Duration,
    correlator: Arc<Correlator>,
    finder: InProcessBus,
    cluster: Option<Arc<Cluster>>,
    offsite: Option<Arc<Offsite>>,
) -> Result<Arc<Archive>, PipelineError> {
    let archive_config = ArchiveConfig {
        dir: config.archive.dir.clone(),
        max_bytes: config.archive.max_bytes,
        max_age: config.archive.max_age,
        commit_interval: config.archive.commit_interval,
        commit_bytes: config.archive.commit_bytes as usize,
        disk: config.archive.disk,
        segment_bytes: config.archive.segment_bytes,
        queue_bytes: budget.queue_bytes,
        offsite,
    };
    let opened = tokio::task::spawn_blocking(move || {
        if let Some(cluster) = &cluster {
            cluster.begin_replay();
        }
        // What a frame of the window does not describe has its name from before. What cannot be read is told when it is opened.
        let names = Reader::new(&archive_config.dir).node_names().unwrap_or_default().into_iter().collect();
        let mut replay = Replay { correlator, names, frames: AtomicU64::new(0) };
        let archive = Archive::open(archive_config, window, &mut |header, bytes| replay.frame(header, bytes))?;
        if let Err(error) = replay.correlator.drained_blocking() {
            tracing::error!(%error, "replay not finished");
        }
        if let Some(cluster) = &cluster {
            cluster.end_replay();
        }
        if let Err(error) = finder.barrier() {
            tracing::error!(%error, "replay not finished");
        }
        tracing::info!(frames = replay.frames.load(Ordering::Relaxed), "replayed the archive's last minutes");
        Ok::<_, ArchiveError>(Arc::new(archive))
    });
    Ok(opened.await??)
}

/// How much of the archive is replayed. A pattern that looks back further than the configured window must find as much after a
/// restart as before. A minute more brings the descriptions of what was quiet at its beginning.
pub(super) fn replay_window(config: &Config, patterns: &PatternSet) -> Duration {
    match config.correlation.enabled {
        true => config.correlation.analysis_window.max(patterns.window_max()) + Duration::from_secs(60),
        false => Duration::ZERO,
    }
}

/// Goes through the archive's last minutes with a shard of its own.
pub(super) fn healer(config: &Config, correlate: &CorrelateConfig, window: Duration) -> Healer {
    let dir = config.archive.dir.clone();
    let correlate = CorrelateConfig { shards: Some(1), ..correlate.clone() };
    Box::new(move |bus, is_over| {
        let losses = Arc::new(LossBook::default());
        losses.set_replaying(true);
        let topology = Arc::new(Topology::new(correlate.entities_max));
        let said = |error: &dyn std::error::Error| error.to_string();
        let correlator = Correlator::start(&correlate, topology, losses, bus).map_err(|error| said(&error))?;
        let correlator = Arc::new(correlator);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(u64::MAX, |now| now.as_nanos() as u64);
        let reader = Reader::new(&dir);
        let books = reader.books().map_err(|error| said(&error))?;
        let names = books.nodes().filter_map(|(id, node)| Some((id, node.name.clone()?))).collect();
        let epochs = books.status(|_| false).into_iter().flat_map(|node| node.epochs);
        // A node whose clock is ahead must not push the others out of the window.
        let newest_ns = epochs.map(|epoch| epoch.last_frame_ns.min(now)).max().unwrap_or(0);
        let since_ns = newest_ns.saturating_sub(window.as_nanos() as u64);
        let mut replay = Replay { correlator, names, frames: AtomicU64::new(0) };
        let wanted = Selection { since_ns, ..Selection::default() };
        let read = reader.whole_frames(&wanted, &mut |header, bytes| {
            replay.frame(header, bytes);
            if is_over() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let drained = replay.correlator.drained_blocking();
        let effort = read.map_err(|error| said(&error))?;
        drained.map_err(|error| said(&error))?;
        if !effort.damages.is_empty() || effort.undecodable > 0 {
            let (damages, undecodable) = (effort.damages.len(), effort.undecodable);
            tracing::warn!(damages, undecodable, "the archive is damaged: its lost frames are not republished");
        }
        Ok(())
    })
}

/// Feeds the archive's last minutes to the shards.
struct Replay {
    correlator: Arc<Correlator>,
    names: HashMap<u64, Arc<str>>,
    frames: AtomicU64,
}

impl Replay {
    fn frame(&mut self, header: &Header, bytes: &[u8]) {
        let frame = match Frame::decode(bytes) {
            Ok(frame) => Arc::new(frame),
            Err(error) => {
                tracing::warn!(%error, seq = header.seq, "cannot replay an archived frame");
                return;
            }
        };
        for entity in frame.body().entities.iter() {
            if entity.kind.get() == EntityKind::Node && entity.id.to_native() == header.node {
                self.names.insert(header.node, entity.name.as_str().into());
            }
        }
        let unnamed = || Arc::from(format!("{:016x}", header.node));
        let name = Arc::clone(self.names.entry(header.node).or_insert_with(unnamed));
        if self.correlator.deliver_blocking(NodeRef { id: header.node, name }, frame).is_ok() {
            self.frames.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unreadable_archive_is_no_healed_log() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        std::fs::write(&file, "in the way").expect("written");
        std::fs::write(folder.path().join("LOCK"), "").expect("written");
        let healed = |dir: &std::path::Path| {
            let mut config = Config::default();
            config.archive.dir = dir.into();
            let (bus, _clues) = InProcessBus::bounded(10);
            healer(&config, &CorrelateConfig::default(), Duration::from_secs(60))(Arc::new(bus), &|| false)
        };
        assert_eq!(healed(folder.path()), Ok(()), "an archive without a segment");
        let error = healed(&file.join("archive")).expect_err("no folder");
        assert!(error.contains("archive"), "{error}");
    }
}
