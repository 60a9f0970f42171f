//! `tapio-server archive stat`: from the indexes where there are some, else from the frames.

use std::collections::BTreeMap;
use std::fs::File;

use serde_json::{Value, json};
use tapio_wire::event::{Kind, PerKind};
use tapio_wire::program::units::{human_bytes, human_duration};

use super::source::Folder;
use super::{CommandError, Directory, Verdict, print, progress, style, verdict_on};
use crate::archive::damage;
use crate::archive::index::Index;
use crate::archive::reader::{ReadError, Reader};
use crate::archive::verify::verify_segment;
use crate::findings::text;
use crate::render::{self, Style};

#[derive(Default)]
struct Sums {
    segments: u64,
    indexed: u64,
    bytes: u64,
    index_bytes: u64,
    frames: u64,
    events: u64,
    raw_bytes: u64,
    frame_bytes: u64,
    first_ns: Option<u64>,
    last_ns: u64,
    kinds: PerKind,
}

impl Sums {
    fn span(&mut self, frames: u64, first_ns: u64, last_ns: u64) {
        if frames > 0 {
            self.first_ns = Some(self.first_ns.map_or(first_ns, |known| known.min(first_ns)));
            self.last_ns = self.last_ns.max(last_ns);
        }
    }
}

pub(super) fn run(arguments: &Directory) -> Result<Verdict, CommandError> {
    let mut verdict = Verdict::Done;
    for folder in arguments.source.folders(0, u64::MAX)? {
        print(&folder.headline(arguments.json))?;
        if sum_up(&folder, arguments.json)? == Verdict::Found {
            verdict = Verdict::Found;
        }
    }
    Ok(verdict)
}

fn sum_up(folder: &Folder, is_json: bool) -> Result<Verdict, CommandError> {
    let reader = Reader::new(&folder.dir);
    let segments = reader.segments()?;
    let bar = progress(segments.iter().map(|segment| segment.bytes).sum());
    let mut sums = Sums::default();
    let gaps = damage::gaps(&segments).map_err(|source| ReadError::Directory { dir: folder.dir.clone(), source })?;
    let (mut places, mut undecodable) = (Vec::new(), 0);
    for segment in &segments {
        let failed = |source| ReadError::Segment { path: segment.path.clone(), source };
        let file = match File::open(&segment.path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error).into()),
        };
        sums.segments += 1;
        sums.bytes += segment.bytes;
        let index = Index::read(&file, segment.number).map_err(failed)?;
        let damage = match &index {
            Some(_) => damage::of_closed(&file, segment.number, &mut |_| {}).map_err(failed)?,
            None => None,
        };
        match index {
            Some(index) if index.kinds_whole && damage.is_none() => {
                sums.indexed += 1;
                sums.index_bytes += index.bytes;
                sums.frames += index.frames;
                sums.events += index.events;
                sums.raw_bytes += index.raw_bytes;
                sums.frame_bytes += index.frame_bytes;
                for (sum, &count) in sums.kinds.iter_mut().zip(&index.kinds) {
                    *sum += count;
                }
                sums.span(index.frames, index.first_ns, index.last_ns);
                bar.inc(segment.bytes);
            }
            _ => {
                let report = verify_segment(segment, &mut |bytes| bar.inc(bytes)).map_err(failed)?;
                places.extend(report.damage().or(damage));
                undecodable += report.undecodable;
                sums.frames += report.frames;
                sums.events += report.events;
                sums.raw_bytes += report.raw_bytes;
                sums.frame_bytes += report.frame_bytes;
                for (sum, &count) in sums.kinds.iter_mut().zip(report.kinds.iter()) {
                    *sum += count;
                }
                sums.span(report.frames, report.first_ns, report.last_ns);
            }
        }
    }
    let books = reader.books()?;
    bar.finish_and_clear();
    let mut nodes = BTreeMap::new();
    for (id, node) in books.nodes() {
        let name = node.name.as_deref().map_or_else(|| format!("{id:016x}"), str::to_owned);
        let archived: u64 = node.epochs.iter().map(|epoch| epoch.archived.iter().sum::<u64>()).sum();
        let last_ns = node.epochs.iter().map(|epoch| epoch.realtime_ns).max().unwrap_or(0);
        nodes.insert((name, id), (node.epochs.len(), archived, last_ns));
    }
    print(&if is_json { folder.json(json_value(&sums, &nodes)) } else { people_text(style(), &sums, &nodes) })?;
    Ok(verdict_on(&damage::joined(gaps, places), undecodable))
}

type Nodes = BTreeMap<(String, u64), (usize, u64, u64)>;

fn json_value(sums: &Sums, nodes: &Nodes) -> Value {
    let kinds: BTreeMap<_, _> = Kind::ALL.iter().map(|kind| (kind.name(), sums.kinds[*kind as usize])).collect();
    json!({
        "segments": sums.segments,
        "indexed_segments": sums.indexed,
        "bytes": sums.bytes,
        "index_bytes": sums.index_bytes,
        "frames": sums.frames,
        "events": sums.events,
        "raw_bytes": sums.raw_bytes,
        "frame_bytes": sums.frame_bytes,
        "first_at": sums.first_ns.map(render::rfc3339),
        "last_at": sums.first_ns.map(|_| render::rfc3339(sums.last_ns)),
        "events_by_kind": kinds,
        "nodes": nodes.iter().map(|((name, id), (epochs, archived, last_ns))| json!({
            "node": name, "node_id": format!("{id:016x}"), "epochs": epochs, "archived_events": archived,
            "last_frame_at": render::rfc3339(*last_ns),
        })).collect::<Vec<_>>(),
    })
}

fn people_text(style: Style, sums: &Sums, nodes: &Nodes) -> String {
    let ratio = |a: u64, b: u64| if b == 0 { 0.0 } else { a as f64 / b as f64 };
    let mut out = format!(
        "{} in {}, {} of them indexed ({})\n",
        human_bytes(sums.bytes),
        text::count(sums.segments, "segment"),
        sums.indexed,
        human_bytes(sums.index_bytes)
    );
    if let Some(first_ns) = sums.first_ns {
        out.push_str(&format!(
            "from {} to {} ({})\n",
            render::rfc3339(first_ns),
            render::rfc3339(sums.last_ns),
            human_duration(sums.last_ns.saturating_sub(first_ns))
        ));
    }
    out.push_str(&format!(
        "{}, {}, {:.1} bytes an event, compressed to 1/{:.1}\n",
        text::count(sums.frames, "frame"),
        text::count(sums.events, "event"),
        ratio(sums.frame_bytes, sums.events),
        ratio(sums.raw_bytes, sums.frame_bytes)
    ));
    if !nodes.is_empty() {
        let rows: Vec<_> = nodes
            .iter()
            .map(|((name, _), (epochs, archived, last_ns))| {
                vec![render::clean(name), epochs.to_string(), archived.to_string(), render::rfc3339(*last_ns)]
            })
            .collect();
        out.push('\n');
        out.push_str(&render::table(
            style,
            &["NODE", "EPOCHS", "EVENTS", "LAST FRAME"],
            &[false, true, true, false],
            &rows,
        ));
    }
    let rows: Vec<_> = Kind::ALL
        .iter()
        .filter(|&&kind| sums.kinds[kind as usize] > 0)
        .map(|&kind| {
            let events = sums.kinds[kind as usize];
            let share = format!("{:.1} %", 100.0 * ratio(events, sums.events));
            vec![kind.name().to_owned(), kind.lane().name().to_owned(), events.to_string(), share]
        })
        .collect();
    if !rows.is_empty() {
        out.push('\n');
        out.push_str(&render::table(style, &["KIND", "LANE", "EVENTS", "SHARE"], &[false, false, true, true], &rows));
    }
    out
}
