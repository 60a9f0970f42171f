//! The table of curves: how memory and CPU of containers went, a row for each sample.
//!
//! What enters: decoded frames. What leaves: rows. What must hold: a sample's time is counted back from its curve's.

use tapio_wire::event::ArchivedDetail;
use tapio_wire::frame::Frame;

use super::schema::CURVES;
use super::table::{Partitions, Written};
use super::{ExportError, SegmentTables};
use crate::archive::index::realtime_ns;

const fn at(name: &str) -> usize {
    CURVES.column(name)
}

/// Collects samples.
pub(super) struct Curves {
    partitions: Partitions,
}

impl Curves {
    pub fn new() -> Result<Self, ExportError> {
        Ok(Self { partitions: Partitions::new(&CURVES)? })
    }

    /// Takes in the curves of a frame.
    pub fn frame(&mut self, shared: &mut SegmentTables, frame: &Frame) -> Result<(), ExportError> {
        let (header, body) = (frame.header(), frame.body());
        if header.lethal_events == 0 {
            return Ok(());
        }
        for (idx, event) in body.events.iter().enumerate() {
            let ArchivedDetail::Curve(curve) = &event.body else { continue };
            let last_ns = realtime_ns(header, event.time_ns.to_native());
            let slot = shared.catalog.slot(header.node, event.entity.to_native());
            let known = shared.catalog.named(&mut shared.texts, slot);
            let node = shared.catalog.node_text(&mut shared.texts, header.node);
            let mut text = |text: String| shared.texts.number(&text);
            let cells = [
                (at("node"), node),
                (at("namespace"), known.namespace),
                (at("workload"), known.workload),
                (at("pod"), known.pod),
                (at("container"), known.container),
                (at("entity"), known.name),
                (at("id"), text(format!("{:x}:{:x}:{}:{idx}", header.node, header.epoch, header.seq))),
                (at("node_id"), text(format!("{:x}", header.node))),
                (at("epoch"), text(format!("{:x}", header.epoch))),
                (at("segment"), shared.segment),
            ];
            let interval_ns = curve.interval_ns.to_native();
            for (before, point) in curve.points.iter().rev().enumerate() {
                let time_ns = last_ns.saturating_sub(interval_ns.saturating_mul(before as u64));
                let hour = self.partitions.hour(time_ns);
                let batch = self.partitions.batch(&shared.place, hour)?;
                batch.row();
                batch.unsigned(at("time"), time_ns);
                cells.iter().for_each(|&(column, text)| batch.text(column, text));
                let memory = u64::from(point.memory_kib.to_native()) << 10;
                let share = |part: u8| memory * u64::from(part) / 255;
                for (column, value) in [
                    (at("memory_bytes"), memory),
                    (at("file_bytes"), share(point.file_share)),
                    (at("shmem_bytes"), share(point.shmem_share)),
                    (at("cpu_milli"), point.cpu_milli.to_native().into()),
                    (at("throttled_percent"), point.throttled.into()),
                    (at("memory_limit_bytes"), curve.limit_bytes.to_native()),
                    (at("interval_ns"), interval_ns),
                    (at("seq"), header.seq),
                ] {
                    batch.unsigned(column, value);
                }
                if batch.is_full() {
                    self.partitions.flush(hour, &shared.texts, &mut shared.encoder)?;
                }
            }
        }
        Ok(())
    }

    /// Writes what waits, and ends the files.
    pub fn finish(self, shared: &mut SegmentTables) -> Result<Vec<Written>, ExportError> {
        self.partitions.finish(&shared.place, &shared.texts, &mut shared.encoder)
    }
}
