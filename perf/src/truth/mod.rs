//! Certainty is earned: deaths of every kind, caused for real, against what is said of them through all patterns.
//!
//! In: scenarios. Out: a [`Report`], a line a scenario. What must hold: a scenario is judged by everything that the
//! server found of it by the end of the run. The run ends when a marker, caused last, has passed through every stage.

mod docs;
mod exits;
mod memory;
pub mod scenario;
mod signals;
pub mod stage;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tapio_wire::complain;

use self::scenario::{Caused, Judged, Outcome, Scenario};
use self::stage::Stage;
use crate::client::FindingWatch;
use crate::clock::wait_for;
use crate::error::Error;
use crate::inject::{Fault, InjectOptions, Injector};
use crate::interrupt;
use crate::processes::collector::Feed;
use crate::processes::{CollectorOptions, Server, ServerOptions, bin_dir, binary};

/// The limit of the injector's containers.
const MEMORY_BYTES: u64 = 32 << 20;
const KEEP: Duration = Duration::from_millis(200);
/// How long the last marker's finding may take.
const MARKER_LIMIT: Duration = Duration::from_secs(20);
/// The longest window in which a pattern waits for what would explain it better: PATTERNS' silent child has 30 s.
const WINDOW: Duration = Duration::from_secs(35);

/// What is run.
#[derive(Clone, Debug, Default)]
pub struct TruthOptions {
    /// Names of which a scenario's name contains one; all when empty.
    pub only: Vec<String>,
    /// Where the programs are; beside this executable when not given.
    pub bin_dir: Option<PathBuf>,
    /// The page with the table of what is explained right.
    pub page: Option<PathBuf>,
    /// Rewrite the page instead of comparing it.
    pub update: bool,
    /// The collector sees only the processes of a pid namespace of its own.
    pub own_pid_namespace: bool,
    /// Say nothing while it runs.
    pub is_quiet: bool,
}

/// How every scenario was explained.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub scenarios: Vec<Judged>,
    /// Scenarios that could not be caused here, and why.
    pub not_caused: Vec<String>,
    /// Scenarios that the page calls right and that are not any more, and those that are possibly something else now.
    pub worse: Vec<String>,
}

impl Report {
    fn count(&self, outcome: Outcome) -> usize {
        self.scenarios.iter().filter(|judged| judged.outcome == outcome).count()
    }

    /// Nothing is explained wrong with certainty, nothing is passed over in silence, everything could be caused, and nothing got worse.
    pub fn is_true(&self) -> bool {
        self.count(Outcome::Wrong) == 0
            && self.count(Outcome::Silent) == 0
            && self.worse.is_empty()
            && self.not_caused.is_empty()
    }
}

/// All scenarios that `only` leaves.
pub fn scenarios(only: &[String]) -> Vec<&'static Scenario> {
    let all = memory::ALL.iter().chain(signals::ALL).chain(exits::ALL);
    all.filter(|scenario| only.is_empty() || only.iter().any(|part| scenario.name.contains(part.as_str()))).collect()
}

/// Causes the scenarios one after the other and judges all of them at the end.
pub fn run(options: &TruthOptions) -> Result<Report, Error> {
    let chosen = scenarios(&options.only);
    if chosen.is_empty() {
        return Err(Error::Invalid("no scenario has such a name: tapio-perf truth --list shows all".into()));
    }
    // This executable may be a test's.
    let program = binary("tapio-perf", &bin_dir(options.bin_dir.as_deref())?)?;
    let inject = InjectOptions { memory_bytes: MEMORY_BYTES, keep: KEEP, program: program.clone() };
    let mut stage = Stage::new(Injector::new(inject)?, program)?;
    let server = Server::start(&ServerOptions { bin_dir: options.bin_dir.clone(), ..ServerOptions::default() })?;
    stage.watch(&CollectorOptions {
        bin_dir: options.bin_dir.clone(),
        node: "truth".into(),
        server: server.address(),
        feed: Feed::Ebpf,
        own_pid_namespace: options.own_pid_namespace,
        // Troubles of live workloads are reported after six samples.
        extra_collector: ", watch_interval: 1s".into(),
        ..CollectorOptions::default()
    })?;
    let mut watch = FindingWatch::start(&server.address())?;
    let (mut caused, mut not_caused) = (Vec::new(), Vec::new());
    let control = stage.memory_control()?;
    for scenario in chosen {
        if scenario.only_where.is_some_and(|only| only != control) {
            continue;
        }
        interrupt::check()?;
        if !options.is_quiet {
            complain!("causing {}", scenario.name);
        }
        match (scenario.cause)(&mut stage) {
            Ok(done) => caused.push((scenario, done)),
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            Err(error) => not_caused.push(format!("{}: {error}", scenario.name)),
        }
    }
    let scenarios = settle(&mut stage, &server, &mut watch, &caused)?;
    let mut report = Report { scenarios, not_caused, worse: Vec::new() };
    if let Some(page) = &options.page {
        report.worse = docs::check(page, &report.scenarios, options.update)?;
    }
    Ok(report)
}

/// Waits until a marker passed every stage and everything is explained right, or can no longer be; then judges.
fn settle(
    stage: &mut Stage,
    server: &Server,
    watch: &mut FindingWatch,
    caused: &[(&Scenario, Caused)],
) -> Result<Vec<Judged>, Error> {
    let marker = stage.inject(Fault::Segv)?;
    let is_marker = |finding: &tapio_wire::service::Finding| {
        finding.entity.as_ref().is_some_and(|entity| marker.container_ids.contains(&entity.container_id))
    };
    if watch.wait(MARKER_LIMIT, is_marker)?.is_none() {
        return Err(Error::TimedOut {
            what: "the finding of the last marker, a crash".into(),
            seconds: MARKER_LIMIT.as_secs(),
            seen: server.output(),
        });
    }
    let mut client = server.client()?;
    let mut judged = Vec::new();
    let settled = wait_for("the findings", WINDOW, |_| {
        let findings = client.findings()?;
        judged = caused.iter().map(|(scenario, done)| scenario.judge(done, &findings)).collect();
        Ok(judged.iter().all(|one| one.outcome == Outcome::Right).then_some(()))
    });
    match settled {
        // What is not explained right by now will not be.
        Ok(()) | Err(Error::TimedOut { .. }) => Ok(judged),
        Err(error) => Err(error),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for one in &self.scenarios {
            let got = match (&one.pattern, one.confidence, &one.title) {
                (Some(pattern), Some(confidence), Some(title)) => {
                    format!("{pattern} {:.0} %: {title}", confidence * 100.0)
                }
                _ => "nothing".to_owned(),
            };
            writeln!(f, "{:8}  {:40}  {:36}  {got}", one.outcome.name(), one.scenario, one.expected)?;
        }
        write!(f, "\n{}\n", docs::matrix(&self.scenarios))?;
        for line in &self.not_caused {
            writeln!(f, "failed    {line}")?;
        }
        for name in &self.worse {
            writeln!(f, "worse     {name}: docs/truth.md has it better, or otherwise")?;
        }
        let count = |outcome| self.count(outcome);
        write!(
            f,
            "{} right, {} possible, {} silent, {} wrong, {} not caused",
            count(Outcome::Right),
            count(Outcome::Possible),
            count(Outcome::Silent),
            count(Outcome::Wrong),
            self.not_caused.len()
        )
    }
}
