//! The timeline of a finding: lanes of what happened where, as SVG.
//!
//! What enters: marks with their moments and causes, and bands in which something was lost or not watched. What leaves: a drawing
//! whose offsets from the first cause are logarithmic, so that microseconds and hours are both seen. What must hold: a mark has
//! the number that the list below the drawing gives it.

use std::fmt::Write;

use maud::{Markup, html};

use crate::render;

/// The lanes, from what is deepest to what is furthest.
pub const LANES: [&str; 6] = ["kernel", "container", "pod", "node", "unit", "clients"];

/// Units of the drawing.
const WIDTH: f64 = 960.0;
const LEFT: f64 = 92.0;
const RIGHT: f64 = 940.0;
const RADIUS: f64 = 10.0;
const ROW: f64 = 26.0;
const LANE_PAD: f64 = 12.0;
const TOP: f64 = 8.0;
const AXIS: f64 = 26.0;
/// Marks nearer to each other than `APART` stand above each other, in at most `ROWS_MAX` rows.
const APART: f64 = 24.0;
const ROWS_MAX: usize = 5;
/// Labels of the axis are so far apart.
const TICKS_APART: f64 = 64.0;
/// Offsets below this are all at zero.
const UNIT_NS: f64 = 1_000.0;
/// Where the axis has labels.
const TICKS: [(f64, &str); 6] =
    [(1e3, "1 µs"), (1e6, "1 ms"), (1e9, "1 s"), (60e9, "1 min"), (3600e9, "1 h"), (86_400e9, "1 d")];

/// Something that happened.
pub struct Mark {
    pub time_ns: u64,
    /// The kind of event.
    pub kind: String,
    pub text: String,
    /// The page that it opens.
    pub path: String,
    /// The mark that brought it about, by its place among the marks.
    pub cause: Option<usize>,
    /// True for a consequence, or the change that came before; false for evidence.
    pub is_aside: bool,
    /// The place of its lane in [`LANES`].
    pub lane: usize,
}

/// When something was lost or not watched.
pub struct Band {
    pub from_ns: u64,
    pub until_ns: u64,
    pub why: String,
}

/// The lane of a kind of event.
pub fn lane_of(kind: &str) -> usize {
    let name = match kind {
        "container_state" | "observation" | "cgroup_use" | "curve" | "log_lines" | "trouble" => "container",
        "pod_state" | "kube_event" | "object_state" | "rollout" | "config_change" => "pod",
        "node_condition" | "conntrack" | "gap" => "node",
        "unit_state" | "unit_job" => "unit",
        "endpoints" | "refused_burst" | "retransmit_burst" | "syn_retransmit_burst" | "dns_failure_burst" => "clients",
        _ => "kernel",
    };
    LANES.iter().position(|lane| *lane == name).unwrap_or(0)
}

/// Where moments are.
struct Scale {
    zero_ns: u64,
    low: f64,
    high: f64,
}

/// An offset as it is drawn: its logarithm, on either side of zero.
fn drawn(offset_ns: f64) -> f64 {
    (1.0 + offset_ns.abs() / UNIT_NS).log10().copysign(offset_ns)
}

impl Scale {
    fn over(zero_ns: u64, moments: impl Iterator<Item = u64>) -> Self {
        let mut scale = Self { zero_ns, low: 0.0, high: 0.0 };
        for at_ns in moments {
            let at = scale.offset(at_ns);
            (scale.low, scale.high) = (scale.low.min(at), scale.high.max(at));
        }
        let pad = (scale.high - scale.low).max(1.0) * 0.04;
        Self { low: scale.low - pad, high: scale.high + pad, ..scale }
    }

    fn offset(&self, at_ns: u64) -> f64 {
        drawn(at_ns as f64 - self.zero_ns as f64)
    }

    fn x_of(&self, offset: f64) -> f64 {
        LEFT + (offset - self.low) / (self.high - self.low) * (RIGHT - LEFT)
    }

    fn x(&self, at_ns: u64) -> f64 {
        self.x_of(self.offset(at_ns))
    }

    /// Labels of the axis that are far enough from each other; zero is always there.
    fn ticks(&self) -> Vec<(f64, String)> {
        let mut ticks = vec![(self.x_of(0.0), "0".to_owned())];
        for sign in [1.0, -1.0] {
            for (ns, label) in TICKS {
                let at = drawn(sign * ns);
                let x = self.x_of(at);
                let is_in = at >= self.low && at <= self.high;
                if is_in && ticks.iter().all(|(other, _)| (x - other).abs() >= TICKS_APART) {
                    ticks.push((x, format!("{}{label}", if sign < 0.0 { "−" } else { "+" })));
                }
            }
        }
        ticks
    }
}

/// A lane with something in it.
struct TimelineRow {
    name: &'static str,
    top: f64,
    height: f64,
}

/// Where each mark is, and the lanes that have any.
struct Layout {
    at: Vec<(f64, f64)>,
    lanes: Vec<TimelineRow>,
    bottom: f64,
}

fn layout(scale: &Scale, marks: &[Mark]) -> Layout {
    let mut at = vec![(0.0, 0.0); marks.len()];
    let (mut lanes, mut top) = (Vec::new(), TOP);
    for (lane, name) in LANES.into_iter().enumerate() {
        let mut of_lane: Vec<usize> = (0..marks.len()).filter(|&mark| marks[mark].lane == lane).collect();
        if of_lane.is_empty() {
            continue;
        }
        of_lane.sort_by_key(|&mark| (marks[mark].time_ns, mark));
        // The right end of each row.
        let mut rows: Vec<f64> = Vec::new();
        for mark in of_lane {
            let x = scale.x(marks[mark].time_ns);
            let row = match rows.iter().position(|end| x - end >= APART) {
                Some(free) => free,
                None if rows.len() < ROWS_MAX => {
                    rows.push(0.0);
                    rows.len() - 1
                }
                None => ROWS_MAX - 1,
            };
            // In the last row what has no room stands beside its place, not upon another.
            let x = if rows[row] > 0.0 { x.max(rows[row] + APART.min(RIGHT - rows[row])) } else { x };
            rows[row] = x;
            at[mark] = (x, top + LANE_PAD / 2.0 + ROW * (row as f64 + 0.5));
        }
        let height = LANE_PAD + ROW * rows.len() as f64;
        lanes.push(TimelineRow { name, top, height });
        top += height;
    }
    Layout { at, lanes, bottom: top }
}

/// An arrow from one mark to another; none where they touch.
fn arrow(from: (f64, f64), to: (f64, f64)) -> Option<String> {
    let (dx, dy) = (to.0 - from.0, to.1 - from.1);
    let length = dx.hypot(dy);
    if length < RADIUS * 2.0 + 6.0 {
        return None;
    }
    let (ux, uy) = (dx / length, dy / length);
    let end = RADIUS + 3.0;
    Some(format!(
        "M{:.1} {:.1}L{:.1} {:.1}",
        from.0 + ux * RADIUS,
        from.1 + uy * RADIUS,
        to.0 - ux * end,
        to.1 - uy * end
    ))
}

/// The drawing. Offsets are counted from `zero_ns`.
pub fn drawing(zero_ns: u64, marks: &[Mark], bands: &[Band]) -> Markup {
    let of_bands = bands.iter().flat_map(|band| [band.from_ns, band.until_ns]);
    let scale = Scale::over(zero_ns, marks.iter().map(|mark| mark.time_ns).chain(of_bands));
    let Layout { at, lanes, bottom } = layout(&scale, marks);
    let mut arrows = String::new();
    for (mark, to) in marks.iter().zip(&at) {
        if let Some(path) = mark.cause.and_then(|cause| arrow(*at.get(cause)?, *to)) {
            let _ = write!(arrows, "{path}");
        }
    }
    let number = |value: f64| format!("{value:.1}");
    html! {
        div.wide.drawing tabindex="0" role="region" aria-label="Timeline" {
            svg viewBox={ "0 0 " (WIDTH) " " (number(bottom + AXIS)) } role="group" aria-label="What happened when, by lanes" {
                defs {
                    pattern id="hatch" width="8" height="8" patternUnits="userSpaceOnUse" patternTransform="rotate(45)" {
                        path.hatch d="M0 0V8" {}
                    }
                    marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto" {
                        path.tip d="M0 0L8 4L0 8z" {}
                    }
                }
                @for (index, lane) in lanes.iter().enumerate() {
                    rect.lane.odd[index % 2 == 1] x="0" y=(number(lane.top)) width=(WIDTH) height=(number(lane.height)) {}
                    text.lane-name x="8" y=(number(lane.top + lane.height / 2.0 + 4.0)) { (lane.name) }
                }
                @for (x, label) in scale.ticks() {
                    path.tick d={ "M" (number(x)) " " (TOP) "V" (number(bottom)) } {}
                    text.tick-label x=(number(x)) y=(number(bottom + 18.0)) text-anchor="middle" { (label) }
                }
                @for band in bands {
                    rect.band x=(number(scale.x(band.from_ns))) y=(TOP) height=(number(bottom - TOP))
                        width=(number((scale.x(band.until_ns) - scale.x(band.from_ns)).max(6.0))) { title { (band.why) } }
                }
                path.arrows d=(arrows) marker-end="url(#tip)" {}
                @for (index, (mark, (x, y))) in marks.iter().zip(&at).enumerate() {
                    a.mark.aside[mark.is_aside] href=(mark.path)
                        aria-label={ (index + 1) ": " (mark.kind.replace('_', " ")) ", " (render::offset(mark.time_ns, zero_ns)) } {
                        title { (index + 1) " · " (render::offset(mark.time_ns, zero_ns)) " · " (mark.text) }
                        circle cx=(number(*x)) cy=(number(*y)) r=(RADIUS) {}
                        text x=(number(*x)) y=(number(y + 4.0)) text-anchor="middle" { (index + 1) }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(time_ns: u64, kind: &str, cause: Option<usize>) -> Mark {
        let (lane, is_aside) = (lane_of(kind), false);
        Mark { time_ns, kind: kind.into(), text: "<b>".into(), path: "/e/1".into(), cause, is_aside, lane }
    }

    #[test]
    fn later_is_further_right_from_microseconds_to_hours() {
        let zero: u64 = 10_000_000_000_000;
        let offsets: [i64; 8] =
            [-3_600_000_000_000, -1_000_000, -2_000, 0, 2_000, 1_000_000, 1_000_000_000, 60_000_000_000];
        let moments = offsets.map(|offset| zero.checked_add_signed(offset).expect("in range"));
        let scale = Scale::over(zero, moments.into_iter());
        let xs = moments.map(|at| scale.x(at));
        assert!(xs.is_sorted() && xs[0] > LEFT && xs[7] < RIGHT, "{xs:?}");
        assert!(xs.windows(2).all(|pair| pair[1] - pair[0] > 5.0), "{xs:?}");
        let labels: Vec<_> = scale.ticks().into_iter().map(|(_, label)| label).collect();
        assert!(labels.contains(&"0".into()) && labels.contains(&"−1 h".into()), "{labels:?}");
    }

    #[test]
    fn marks_of_one_moment_stand_apart() {
        let marks: Vec<_> = (0..30).map(|_| mark(5, "exit", None)).collect();
        let scale = Scale::over(5, marks.iter().map(|mark| mark.time_ns));
        let at = layout(&scale, &marks[..5]).at;
        for (index, a) in at.iter().enumerate() {
            let others = at.iter().skip(index + 1);
            assert!(others.clone().all(|b| (a.0 - b.0).hypot(a.1 - b.1) >= RADIUS * 2.0), "{at:?}");
        }
        assert!(layout(&scale, &marks).at.iter().all(|(x, _)| *x <= RIGHT), "a crowd stays in the drawing");
    }

    #[test]
    fn a_drawing_has_arrows_bands_and_escaped_titles() {
        let marks = [mark(5, "oom", None), mark(2_000_005, "exit", Some(0))];
        let bands = [Band { from_ns: 7, until_ns: 9_000_000, why: "lost & gone".into() }];
        let text = drawing(5, &marks, &bands).into_string();
        assert!(
            text.contains("marker-end") && text.contains("lost &amp; gone") && text.contains("&lt;b&gt;"),
            "{text}"
        );
        assert!(!text.contains("<b>") && !text.contains("style="), "{text}");
        assert!(!drawing(5, &[], &[]).into_string().contains("NaN"));
    }
}
