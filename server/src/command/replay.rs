//! `tapio-server replay`: the archive through the patterns again, as fast as the machine can.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use tapio_wire::complain;
use tapio_wire::frame::Frame;
use tapio_wire::program::units::human_duration;
use tapio_wire::service::Finding;

use super::check::NoPattern;
use super::{CommandError, Source, Verdict, moment, print, progress, style, verdict_on};
use crate::archive::damage::Damage;
use crate::archive::reader::{Reader, Selection};
use crate::correlate::{CorrelateConfig, Correlator, LossBook, LossView, NodeRef, Topology};
use crate::findings::{Finder, FinderConfig, FindingStore, PatternSet, journal, text};
use crate::render::{self, Style};

/// Findings that a replay keeps: the newest.
const FINDINGS_MAX: usize = 100_000;

/// `tapio-server replay …`
#[derive(Args)]
pub struct ReplayArguments {
    #[command(flatten)]
    source: Source,
    /// Only frames since: an age (90s, 10m, 2h, 1d) or a date in UTC (2026-01-02T03:04:05Z)
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// Only frames until: an age or a date, as in --since
    #[arg(long, value_name = "WHEN")]
    until: Option<String>,
    /// Directory with patterns besides the built-in ones, as correlation.patterns
    #[arg(long, value_name = "DIR")]
    patterns: Option<PathBuf>,
    /// Compare with the findings that the server has stored; exit code 3 if they differ
    #[arg(long)]
    diff: bool,
    /// Analysis window, as correlation.analysis_window
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = tapio_wire::program::units::parse_duration)]
    window: Duration,
    /// Print JSON, one object a line
    #[arg(long)]
    json: bool,
}

impl ReplayArguments {
    /// Does it.
    ///
    /// # Errors
    /// [`CommandError`] with what to do.
    pub fn run(self) -> Result<Verdict, CommandError> {
        let wanted = Selection {
            since_ns: moment(self.since.as_deref())?.unwrap_or(0),
            until_ns: moment(self.until.as_deref())?.unwrap_or(u64::MAX),
            ..Selection::default()
        };
        let patterns = PatternSet::load(self.patterns.as_deref())
            .map_err(|error| CommandError::Usage(render::clean(&error.to_string())))?;
        if let Some(directory) = self.patterns.as_deref().filter(|_| patterns.own().is_empty()) {
            return Err(CommandError::Usage(NoPattern(directory).to_string()));
        }
        let directory = self.source.directory();
        if self.diff && directory.is_none() {
            let problem = "--diff compares with a server's stored findings, which are in its directory alone";
            return Err(CommandError::Usage(problem.into()));
        }
        // What is found rests on what happened before, too.
        let window = self.window.as_nanos() as u64;
        let folders = self.source.folders(wanted.since_ns.saturating_sub(window), wanted.until_ns)?;
        let started = Instant::now();
        let mut ran = run_again(&Source::reader(&folders), &wanted, patterns, self.window)?;
        let elapsed = started.elapsed();
        let verdict = if let Some(directory) = directory.filter(|_| self.diff) {
            let stored = journal::read(directory)
                .map_err(|error| CommandError::Other(format!("the stored findings cannot be read: {error}")))?;
            let mut stored: Vec<_> = stored.findings.into_values().collect();
            stored.retain(|finding| finding.ended_ns >= wanted.since_ns && finding.ended_ns <= wanted.until_ns);
            let differences = compare(stored, std::mem::take(&mut ran.findings));
            print(&differences.text(style(), self.json))?;
            if differences.is_none() { Verdict::Done } else { Verdict::Found }
        } else {
            let style = style();
            let mut out = String::new();
            if !self.json && !ran.findings.is_empty() {
                out.push_str(&render::list_header(style));
            }
            for finding in &ran.findings {
                out.push_str(&match self.json {
                    true => render::finding_json(finding) + "\n",
                    false => render::list_row(style, finding),
                });
            }
            print(&out)?;
            Verdict::Done
        };
        let happened = Duration::from_nanos(ran.last_ns.saturating_sub(ran.first_ns.unwrap_or(ran.last_ns)));
        complain!(
            "{}, {} over {} replayed in {}: {:.0} times faster than they happened",
            text::count(ran.frames, "frame"),
            text::count(ran.events, "event"),
            human_duration(happened.as_nanos() as u64),
            human_duration(elapsed.as_nanos() as u64),
            happened.as_secs_f64() / elapsed.as_secs_f64().max(1e-9)
        );
        Ok(match verdict_on(&ran.damages, ran.undecodable) {
            Verdict::Done => verdict,
            Verdict::Found => Verdict::Found,
        })
    }
}

/// Entities whose state is kept.
const ENTITIES_MAX: usize = 1_000_000;

pub(super) struct Ran {
    /// Oldest first.
    pub findings: Vec<Arc<Finding>>,
    frames: u64,
    events: u64,
    first_ns: Option<u64>,
    last_ns: u64,
    damages: Vec<Damage>,
    undecodable: u64,
}

pub(super) fn run_again(
    reader: &Reader,
    wanted: &Selection,
    patterns: PatternSet,
    window: Duration,
) -> Result<Ran, CommandError> {
    let other = |error: &dyn std::error::Error| CommandError::Other(error.to_string());
    let bytes = reader.segments()?.iter().map(|segment| segment.bytes).sum();
    let names: HashMap<_, _> = reader.node_names()?.into_iter().collect();
    let losses = Arc::new(LossBook::default());
    let store = Arc::new(FindingStore::new(FINDINGS_MAX));
    let patterns = Arc::new(patterns);
    let view: Arc<dyn LossView> = Arc::clone(&losses) as Arc<dyn LossView>;
    let topology = Arc::new(Topology::new(ENTITIES_MAX));
    let mut finder =
        Finder::start(&FinderConfig::default(), Arc::clone(&patterns), Arc::clone(&topology), view, Arc::clone(&store))
            .map_err(|error| other(&error))?;
    let config = CorrelateConfig {
        window,
        entities_max: ENTITIES_MAX,
        wanted: patterns.kinds(),
        interest: Some({
            let patterns = Arc::clone(&patterns);
            Arc::new(move |clue| patterns.wants(clue))
        }),
        ..CorrelateConfig::default()
    };
    let correlator =
        Correlator::start(&config, topology, losses, Arc::new(finder.bus())).map_err(|error| other(&error))?;
    let bar = progress(bytes);
    let mut ran = Ran {
        findings: Vec::new(),
        frames: 0,
        events: 0,
        first_ns: None,
        last_ns: 0,
        damages: Vec::new(),
        undecodable: 0,
    };
    let mut stopped = None;
    let effort = reader.whole_frames(wanted, &mut |header, bytes| {
        let Ok(frame) = Frame::decode(bytes) else {
            ran.undecodable += 1;
            return ControlFlow::Continue(());
        };
        bar.inc(bytes.len() as u64);
        ran.frames += 1;
        ran.events += u64::from(header.events());
        ran.first_ns = Some(ran.first_ns.map_or(header.realtime_ns, |first| first.min(header.realtime_ns)));
        ran.last_ns = ran.last_ns.max(header.realtime_ns);
        let name = names.get(&header.node).cloned().unwrap_or_else(|| format!("{:016x}", header.node).into());
        match correlator.deliver_blocking(NodeRef { id: header.node, name }, Arc::new(frame)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                stopped = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(error) = stopped {
        return Err(other(&error));
    }
    ran.damages = effort.damages;
    correlator.drained_blocking().map_err(|error| other(&error))?;
    correlator.stop();
    finder.stop();
    bar.finish_and_clear();
    (ran.findings, _) = store.list(0, None, FINDINGS_MAX);
    ran.findings.reverse();
    Ok(ran)
}

/// What two lists of findings have not in common.
#[derive(Default)]
struct Differences {
    /// Stored, and not found again.
    gone: Vec<Finding>,
    /// Found, and not stored.
    new: Vec<Arc<Finding>>,
    /// Found otherwise, and how.
    changed: Vec<(Arc<Finding>, Vec<String>)>,
    same: usize,
}

fn compare(stored: Vec<Finding>, found: Vec<Arc<Finding>>) -> Differences {
    let mut stored: BTreeMap<String, Finding> =
        stored.into_iter().map(|finding| (finding.id.clone(), finding)).collect();
    let mut differences = Differences::default();
    for finding in found {
        let Some(before) = stored.remove(&finding.id) else {
            differences.new.push(finding);
            continue;
        };
        let mut what = Vec::new();
        let mut note = |name: &str, before: String, now: String| {
            if before != now {
                what.push(format!("{name}: {before} → {now}"));
            }
        };
        note("pattern", before.pattern.clone(), finding.pattern.clone());
        note("severity", before.severity.clone(), finding.severity.clone());
        note("title", before.title.clone(), finding.title.clone());
        note("confidence", format!("{:.2}", before.confidence), format!("{:.2}", finding.confidence));
        note("deaths", before.count.to_string(), finding.count.to_string());
        let evidence = |finding: &Finding| {
            let ids: Vec<_> = finding.evidence.iter().map(|piece| format!("{} {}", piece.step, piece.id)).collect();
            ids.join(", ")
        };
        note("evidence", evidence(&before), evidence(&finding));
        if what.is_empty() {
            differences.same += 1;
        } else {
            differences.changed.push((finding, what));
        }
    }
    differences.gone = stored.into_values().collect();
    differences.gone.sort_by_key(|finding| finding.ended_ns);
    differences
}

impl Differences {
    fn is_none(&self) -> bool {
        self.gone.is_empty() && self.new.is_empty() && self.changed.is_empty()
    }

    fn text(&self, style: Style, json: bool) -> String {
        let mut out = String::new();
        let mut line = |sign: &str, name: &str, finding: &Finding, what: &[String]| {
            if json {
                let value = json!({ "difference": name, "what": what, "finding": render::finding_value(finding) });
                out.push_str(&format!("{value}\n"));
                return;
            }
            out.push_str(&format!("{sign} {}", render::list_row(style, finding)));
            for what in what {
                out.push_str(&format!("    {}\n", render::clean(what)));
            }
        };
        self.gone.iter().for_each(|finding| line("-", "gone", finding, &[]));
        self.new.iter().for_each(|finding| line("+", "new", finding, &[]));
        self.changed.iter().for_each(|(finding, what)| line("~", "changed", finding, what));
        if !json {
            out.push_str(&format!(
                "{} as stored, {} changed, {} new, {} gone\n",
                self.same,
                self.changed.len(),
                self.new.len(),
                self.gone.len()
            ));
        }
        out
    }
}
