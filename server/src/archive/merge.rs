//! Several archives read as one: those of servers that watched one cluster, or of one server before and after it lost its disk.
//!
//! What enters: directories. What leaves: frames in the order in which they were sent, by their nodes' clocks, each once. What
//! must hold: a node's frames keep the order of each archive. Memory does not grow with the archives, but for a range of
//! sequence numbers for each stay of a node at a server.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, sync_channel};

use foldhash::fast::RandomState;
use tapio_wire::frame::Header;

use super::damage;
use super::reader::{Effort, Part, ReadError, Selection};

/// Frames of each archive that are read ahead.
const AHEAD_FRAMES: usize = 4;

type Sent = (Header, Vec<u8>);

/// See [`super::reader::Reader::whole_frames`].
pub(super) fn whole_frames(
    parts: &[Part],
    wanted: &Selection,
    each: &mut dyn FnMut(&Header, &[u8]) -> ControlFlow<()>,
) -> Result<Effort, ReadError> {
    std::thread::scope(|scope| {
        let (mut heads, mut readers) = (Vec::new(), Vec::new());
        for part in parts {
            let (sender, receiver) = sync_channel::<Sent>(AHEAD_FRAMES);
            readers.push(scope.spawn(move || {
                part.whole_frames(wanted, &mut |header, bytes| match sender.send((*header, bytes.to_vec())) {
                    Ok(()) => ControlFlow::Continue(()),
                    // Nobody wants more.
                    Err(_) => ControlFlow::Break(()),
                })
            }));
            heads.push(receiver);
        }
        merge(heads, each);
        let mut sum = Effort::default();
        for reader in readers {
            let effort = match reader.join() {
                Ok(effort) => effort?,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            sum.segments += effort.segments;
            sum.scanned += effort.scanned;
            sum.segments_skipped += effort.segments_skipped;
            sum.blocks_skipped += effort.blocks_skipped;
            sum.bytes += effort.bytes;
            sum.frames += effort.frames;
            sum.damages = damage::joined(sum.damages, effort.damages);
        }
        Ok(sum)
    })
}

fn merge(sources: Vec<Receiver<Sent>>, each: &mut dyn FnMut(&Header, &[u8]) -> ControlFlow<()>) {
    let mut seen = Seen::default();
    let mut heads: Vec<(Sent, Receiver<Sent>)> =
        sources.into_iter().filter_map(|source| Some((source.recv().ok()?, source))).collect();
    loop {
        let next = heads.iter().enumerate().min_by_key(|(_, ((header, _), _))| header.realtime_ns);
        let Some((index, _)) = next else { return };
        let (header, bytes) = &heads[index].0;
        if seen.is_new(header.node, header.epoch, header.seq) && each(header, bytes).is_break() {
            return;
        }
        match heads[index].1.recv() {
            Ok(sent) => heads[index].0 = sent,
            Err(_) => drop(heads.swap_remove(index)),
        }
    }
}

/// Which frames were there, as ranges by node and epoch.
#[derive(Default)]
struct Seen(HashMap<(u64, u64), Vec<(u64, u64)>, RandomState>);

impl Seen {
    /// Whether a frame was not there before; it was, afterwards.
    fn is_new(&mut self, node: u64, epoch: u64, seq: u64) -> bool {
        let ranges = self.0.entry((node, epoch)).or_default();
        // The first range that ends at `seq`, behind it, or just before it.
        let at = ranges.partition_point(|&(_, last)| last.saturating_add(1) < seq);
        match ranges.get_mut(at) {
            Some((first, last)) if (*first..=*last).contains(&seq) => return false,
            Some((_, last)) if last.checked_add(1) == Some(seq) => *last = seq,
            Some((first, _)) if seq.checked_add(1) == Some(*first) => *first = seq,
            _ => ranges.insert(at, (seq, seq)),
        }
        if let (Some(&(_, last)), Some(&(first, end))) = (ranges.get(at), ranges.get(at + 1))
            && last.checked_add(1) == Some(first)
        {
            ranges[at].1 = end;
            ranges.remove(at + 1);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_counts_once_in_any_order_and_ranges_join() {
        let mut seen = Seen::default();
        for (seq, is_new) in [(1, true), (2, true), (2, false), (5, true), (4, true), (3, true), (3, false), (9, true)]
        {
            assert_eq!(seen.is_new(1, 1, seq), is_new, "{seq}");
        }
        assert_eq!(seen.0.values().next().expect("one"), &[(1, 5), (9, 9)]);
        assert!(seen.is_new(1, 1, u64::MAX) && !seen.is_new(1, 1, u64::MAX));
    }
}
