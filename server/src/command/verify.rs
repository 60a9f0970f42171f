//! `tapio-server archive verify`.

use serde_json::{Value, json};

use tapio_wire::program::units::human_bytes;

use super::source::Folder;
use super::{CommandError, Directory, Verdict, print, progress};
use crate::archive::damage::{self, Damage, DamagePlace};
use crate::archive::reader::{ReadError, Reader};
use crate::archive::verify::{IndexState, SegmentReport, verify_segment};
use crate::findings::text;

/// The copy alone does not show which of the two it is.
const OPEN_HINT: &str = "The newest segment was not closed. If a server wrote it while `cp` copied it, the copy has holes and the archive \
                         has none: copy it with `tapio-server archive copy DIR TO`\n";

pub(super) fn run(arguments: &Directory) -> Result<Verdict, CommandError> {
    let mut verdict = Verdict::Done;
    for folder in arguments.source.folders(0, u64::MAX)? {
        print(&folder.headline(arguments.json))?;
        if verify(&folder, arguments.json)? == Verdict::Found {
            verdict = Verdict::Found;
        }
    }
    Ok(verdict)
}

fn verify(folder: &Folder, is_json: bool) -> Result<Verdict, CommandError> {
    let segments = Reader::new(&folder.dir).segments()?;
    let bar = progress(segments.iter().map(|segment| segment.bytes).sum());
    let gaps = damage::gaps(&segments).map_err(|source| ReadError::Directory { dir: folder.dir.clone(), source })?;
    let mut is_sound = gaps.is_empty();
    let mut sums = SegmentReport::default();
    let (mut checked, mut indexed) = (0, 0);
    let mut is_newest_open = false;
    for segment in &segments {
        let mut report = match verify_segment(segment, &mut |bytes| bar.inc(bytes)) {
            Ok(report) => report,
            // Retention was faster.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(source) => return Err(ReadError::Segment { path: segment.path.clone(), source }.into()),
        };
        let of_this = gaps.iter().filter(|gap| gap.segment == segment.number);
        report.gap = of_this.clone().find(|gap| !matches!(gap.place, DamagePlace::Absent(_))).cloned();
        is_sound &= report.is_sound();
        is_newest_open =
            report.gap.is_none() && !report.is_sound() && report.index == IndexState::None && !report.is_foreign;
        checked += 1;
        indexed += u64::from(report.index == IndexState::Sound);
        sums.frames += report.frames;
        sums.events += report.events;
        sums.bytes += report.bytes;
        let line = if is_json { folder.json(json_value(&report)) } else { text_line(&report) };
        bar.suspend(|| print(&line))?;
        for gap in of_this.filter(|gap| matches!(gap.place, DamagePlace::Absent(_))) {
            let line = if is_json { folder.json(gap_value(gap)) } else { format!("DAMAGED: {gap}\n") };
            bar.suspend(|| print(&line))?;
        }
    }
    bar.finish_and_clear();
    if !is_json {
        let verdict = if is_sound { "sound" } else { "DAMAGED: what is damaged was acknowledged and is lost here" };
        print(&format!(
            "{}, {indexed} of them indexed, {}, {}, {}: {verdict}\n",
            text::count(checked, "segment"),
            human_bytes(sums.bytes),
            text::count(sums.frames, "frame"),
            text::count(sums.events, "event")
        ))?;
        if is_newest_open {
            print(OPEN_HINT)?;
        }
    }
    Ok(if is_sound { Verdict::Done } else { Verdict::Found })
}

fn gap_value(gap: &Damage) -> Value {
    let lost = |lost: &damage::Lost| {
        json!({
            "node": lost.name, "node_id": format!("{:016x}", lost.node), "epoch": format!("{:x}", lost.epoch),
            "frames": lost.frames, "events": lost.events.iter().sum::<u64>(),
            "first_seq": lost.first_seq, "last_seq": lost.last_seq,
        })
    };
    let (absent, from) = match &gap.place {
        DamagePlace::Absent(numbers) => (Some([*numbers.start(), *numbers.end()]), None),
        DamagePlace::End(from) => (None, Some(*from)),
        DamagePlace::Bytes(_) => (None, None),
    };
    json!({
        "sound": false,
        "absent_segments": absent,
        "unreadable_from": from,
        "missing_frames": gap.missing.map(|missing| missing.frames),
        "missing_events": gap.missing.map(|missing| missing.events),
        "counted_by_segment": gap.counted_by,
        "missing": gap.lost.iter().map(lost).collect::<Vec<_>>(),
    })
}

fn json_value(report: &SegmentReport) -> Value {
    json!({
        "segment": report.number,
        "bytes": report.bytes,
        "frames": report.frames,
        "events": report.events,
        "index": report.index,
        "sound": report.is_sound(),
        "damages": report.damages.iter().map(|range| json!({"from": range.start, "to": range.end})).collect::<Vec<_>>(),
        "undecodable_frames": report.undecodable,
        "uncommitted_bytes": report.uncommitted_bytes,
        "foreign": report.is_foreign,
        "gap": report.gap.as_ref().map(gap_value),
    })
}

fn text_line(report: &SegmentReport) -> String {
    let mut notes = Vec::new();
    if report.is_foreign {
        notes.push("not the segment that its name says".to_owned());
    }
    for range in report.damages.iter().take(5) {
        notes.push(format!("damaged from byte {} to {}", range.start, range.end));
    }
    if report.damages.len() > 5 {
        notes.push(format!("and at {} more places", report.damages.len() - 5));
    }
    if report.undecodable > 0 {
        notes.push(format!("{} frames that cannot be decoded", report.undecodable));
    }
    match report.index {
        IndexState::Sound => {}
        IndexState::None => notes.push("no index: queries scan it".to_owned()),
        IndexState::Differs => notes.push("its index says something else than its frames".to_owned()),
    }
    if let Some(gap) = &report.gap {
        notes.push(gap.to_string());
    } else if report.uncommitted_bytes > 0 {
        notes.push(format!("{} bytes behind the last commit, never acknowledged", report.uncommitted_bytes));
    }
    let verdict = if report.is_sound() { "sound" } else { "DAMAGED" };
    format!(
        "segment {:>6}  {:>10}  {:>7} frames  {:>9} events  {verdict}{}{}\n",
        report.number,
        human_bytes(report.bytes),
        report.frames,
        report.events,
        if notes.is_empty() { "" } else { ": " },
        notes.join("; ")
    )
}
