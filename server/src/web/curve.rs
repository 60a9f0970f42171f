//! The memory curve of a container, as SVG: its use, its limit, when it was killed, what changed meanwhile.

use std::fmt::Write;

use maud::{Markup, html};
use serde_json::Value;
use tapio_wire::program::units::{human_bytes, human_duration};
use tapio_wire::service::Event;

use crate::query::why::{detail, field};
use crate::render;

/// Units of the drawing.
const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 944.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 208.0;

/// A moment that is marked in the drawing.
pub struct Note {
    pub time_ns: u64,
    pub text: String,
    /// Somebody died; else something changed.
    pub is_death: bool,
}

/// A curve as the archive has it.
struct Curve {
    bytes: Vec<u64>,
    from_ns: u64,
    until_ns: u64,
    limit_bytes: Option<u64>,
    detail: Value,
}

impl Curve {
    fn of(event: &Event) -> Option<Self> {
        let detail = detail(event);
        let bytes: Vec<u64> = detail["memory_bytes"].as_array()?.iter().filter_map(Value::as_u64).collect();
        let interval_ns = detail["interval_ns"].as_u64().unwrap_or(0);
        let lasted_ns = interval_ns.saturating_mul(bytes.len().saturating_sub(1) as u64);
        let limit_bytes = detail["limit_bytes"].as_u64().filter(|limit| *limit > 0 && *limit < u64::MAX);
        let from_ns = event.time_ns.saturating_sub(lasted_ns);
        (bytes.len() > 1 && lasted_ns > 0).then_some(Self {
            bytes,
            from_ns,
            until_ns: event.time_ns,
            limit_bytes,
            detail,
        })
    }

    fn said(&self) -> String {
        let (first, last) = (self.bytes.first().copied().unwrap_or(0), self.bytes.last().copied().unwrap_or(0));
        let peak = self.bytes.iter().copied().max().unwrap_or(0);
        let mut said = format!(
            "{} over {}: from {} to {}, at most {}",
            field(&self.detail, "cgroup"),
            human_duration(self.until_ns - self.from_ns),
            human_bytes(first),
            human_bytes(last),
            human_bytes(peak)
        );
        if let Some(limit) = self.limit_bytes {
            let _ = write!(said, " of {}", human_bytes(limit));
        }
        match field(&self.detail, "shape") {
            "" | "unclear" => {}
            "leak" => {
                let growth = self.detail["growth_per_hour_bytes"].as_u64().unwrap_or(0);
                let _ = write!(said, "; a leak of {} an hour", human_bytes(growth));
            }
            shape => {
                let _ = write!(said, "; {shape}");
            }
        }
        said
    }

    /// Whether a moment is in the curve, or so little after it that both fit one drawing.
    fn is_near(&self, at_ns: u64) -> bool {
        at_ns >= self.from_ns && at_ns <= self.until_ns.saturating_add((self.until_ns - self.from_ns) / 4)
    }
}

/// The drawing of a curve; nothing where the event has too few points.
pub fn drawing(event: &Event, notes: &[Note]) -> Option<Markup> {
    let curve = Curve::of(event)?;
    let peak = curve.bytes.iter().copied().max().unwrap_or(0);
    let most = peak.max(curve.limit_bytes.unwrap_or(0)).max(1) as f64 * 1.08;
    let last_ns = notes.iter().map(|note| note.time_ns).filter(|at| curve.is_near(*at)).max();
    let until_ns = last_ns.map_or(curve.until_ns, |at| at.max(curve.until_ns));
    let span = (until_ns - curve.from_ns) as f64;
    let x = |at_ns: u64| LEFT + at_ns.saturating_sub(curve.from_ns) as f64 / span * (RIGHT - LEFT);
    let y = |bytes: u64| BOTTOM - bytes as f64 / most * (BOTTOM - TOP);
    let step = (curve.until_ns - curve.from_ns) as f64 / (curve.bytes.len() - 1) as f64;
    let mut line = String::new();
    for (index, &bytes) in curve.bytes.iter().enumerate() {
        let at = curve.from_ns + (index as f64 * step) as u64;
        let _ = write!(line, "{}{:.1} {:.1}", if index == 0 { "M" } else { "L" }, x(at), y(bytes));
    }
    let area = format!("{line}L{:.1} {BOTTOM}L{LEFT} {BOTTOM}z", x(curve.until_ns));
    let number = |value: f64| format!("{value:.1}");
    let notes = notes.iter().filter(|note| note.time_ns >= curve.from_ns && note.time_ns <= until_ns);
    let said = curve.said();
    Some(html! {
        figure.curve {
            div.wide.drawing tabindex="0" role="region" aria-label="Memory curve" {
                svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label=(said) {
                    path.tick d={ "M" (LEFT) " " (BOTTOM) "H" (RIGHT) } {}
                    text.tick-label x=(LEFT - 8.0) y=(BOTTOM + 4.0) text-anchor="end" { "0" }
                    text.tick-label x=(LEFT - 8.0) y=(number(y(peak) + 4.0)) text-anchor="end" { (human_bytes(peak)) }
                    @if let Some(limit) = curve.limit_bytes {
                        path.limit d={ "M" (LEFT) " " (number(y(limit))) "H" (RIGHT) } {}
                        text.limit-label x=(RIGHT - 8.0) y=(number(y(limit) - 5.0)) text-anchor="end" { "limit " (human_bytes(limit)) }
                    }
                    path.area d=(area) {}
                    path.line d=(line) {}
                    @for note in notes {
                        path.note.death[note.is_death] d={ "M" (number(x(note.time_ns))) " " (TOP) "V" (BOTTOM) } {
                            title { (note.text) ", " (render::for_people(note.time_ns)) }
                        }
                    }
                    text.tick-label x=(LEFT) y=(HEIGHT - 12.0) { (render::for_people(curve.from_ns)[11..19]) }
                    text.tick-label x=(RIGHT) y=(HEIGHT - 12.0) text-anchor="end" { (render::for_people(until_ns)[11..19]) }
                }
            }
            figcaption { (said) "." }
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(bytes: &[u64]) -> Event {
        let detail = json!({
            "cgroup": "/web", "memory_bytes": bytes, "interval_ns": 10_000_000_000_u64, "limit_bytes": 64 << 20,
            "shape": "leak", "growth_per_hour_bytes": 5 << 20,
        });
        Event { time_ns: 1_000_000_000_000, detail_json: detail.to_string(), ..Event::default() }
    }

    #[test]
    fn a_curve_says_in_words_what_it_draws() {
        let note = Note { time_ns: 1_000_000_000_001, text: "killed".into(), is_death: true };
        let text = drawing(&event(&[10 << 20, 20 << 20, 64 << 20]), &[note]).expect("drawn").into_string();
        let said =
            "/web over 20.0 s: from 10.0 MiB to 64.0 MiB, at most 64.0 MiB of 64.0 MiB; a leak of 5.0 MiB an hour";
        assert!(text.contains(said) && text.contains("limit 64.0 MiB") && text.contains("killed"), "{text}");
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }

    #[test]
    fn what_has_no_points_is_not_drawn() {
        assert!(drawing(&event(&[]), &[]).is_none() && drawing(&event(&[1]), &[]).is_none());
        assert!(drawing(&Event::default(), &[]).is_none());
        assert!(drawing(&event(&[0, 0]), &[]).is_some_and(|text| !text.into_string().contains("NaN")));
    }
}
