//! The command line of `tapio-perf`. Exit codes: 0 all is well, 1 a check failed, 2 it could not be run.

#![forbid(unsafe_code)]

mod arguments;

use std::process::ExitCode;

use arguments::{
    Arguments, CapacityArguments, Command, FloodArguments, IngestArguments, InjectArguments, LoadArguments,
    ProbesArguments, ProfileName, QueryArguments, StormArguments, TruthArguments,
};
use clap::Parser;
use tapio_perf::capacity::{self, Cluster, CostSource};
use tapio_perf::client::FindingWatch;
use tapio_perf::error::{Context, Error};
use tapio_perf::flood::{self, FloodOptions};
use tapio_perf::ingest::{self, IngestOptions};
use tapio_perf::inject::own_servers::{self, OwnServers};
use tapio_perf::inject::victim;
use tapio_perf::inject::{InjectOptions, Injector, measure};
use tapio_perf::interrupt;
use tapio_perf::load::{self, LoadOptions, compare};
use tapio_perf::probes::{self, ProbesOptions};
use tapio_perf::processes::collector::Resources;
use tapio_perf::query::{self, QueryOptions};
use tapio_perf::storm::{self, StormOptions};
use tapio_perf::truth::{self, TruthOptions};
use tapio_wire::complain;
use tapio_wire::program::output;

const CHECK_FAILED: u8 = 1;
const NOT_RUN: u8 = 2;

fn main() -> ExitCode {
    if let Err(error) = tapio_wire::program::descriptors::raise_limit() {
        complain!("tapio-perf: the limit of open files stays as it is: {error}");
    }
    let result = match Arguments::parse().command {
        // These must not start threads: a process that has left its pid namespace cannot.
        Command::Victim(victim) => victim::run(&victim).map(|code| code as u8),
        Command::Load(arguments) => interrupt::listen().and_then(|()| run_load(arguments)),
        Command::Ingest(arguments) => interrupt::listen().and_then(|()| run_ingest(arguments)),
        Command::Query(arguments) => interrupt::listen().and_then(|()| run_query(arguments)),
        Command::Probes(arguments) => interrupt::listen().and_then(|()| run_probes(arguments)),
        Command::Capacity(arguments) => interrupt::listen().and_then(|()| run_capacity(arguments)),
        Command::Storm(arguments) => interrupt::listen().and_then(|()| run_storm(arguments)),
        Command::Flood(arguments) => interrupt::listen().and_then(|()| run_flood(arguments)),
        Command::Truth(arguments) => interrupt::listen().and_then(|()| run_truth(arguments)),
        Command::Inject(arguments) => interrupt::listen().and_then(|()| run_inject(&arguments)),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain!("tapio-perf: {error}");
            ExitCode::from(NOT_RUN)
        }
    }
}

fn print_json(value: &impl serde::Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::Invalid(error.to_string()))?;
    say(&format!("{text}\n"))
}

/// Prints to standard output. A reader that has gone has seen enough; what was asked for is done all the same.
fn say(text: &str) -> Result<(), Error> {
    output::print_while_read(text).context(|| "write to standard output".into())
}

fn run_load(arguments: LoadArguments) -> Result<u8, Error> {
    let ProfileName::Mixed = arguments.profile;
    let is_json = arguments.json;
    let options = LoadOptions {
        nodes: arguments.nodes,
        pace: arguments.rate,
        clues: arguments.clues,
        duration: arguments.duration,
        server: arguments.server,
        servers: arguments.several.several(),
        entities: arguments.entities,
        ring_bytes: arguments.ring as usize,
        seed: arguments.seed,
        bin_dir: arguments.bin_dir,
        batch_timeout: arguments.batch_timeout,
        resources: Resources { max_memory_mb: arguments.max_memory_mb, max_cpu_milli: arguments.max_cpu_milli },
        also: arguments.also,
        node_name: arguments.node_name,
        collector_config: String::new(),
        server_config: arguments.server_config.iter().map(|line| format!("{line}\n")).collect(),
    };
    let is_sound = match arguments.compare_log {
        Some(rounds) => {
            let comparison = compare::compare(&options, rounds, |with_log, report| match is_json {
                true => Ok(()),
                false => say(&format!("{} THE LOG\n{report}\n\n", if with_log { "WITH" } else { "WITHOUT" })),
            })?;
            print(is_json, &comparison)?;
            comparison.is_sound
        }
        None => {
            let report = load::run(&options)?;
            print(is_json, &report)?;
            report.is_sound()
        }
    };
    Ok(if is_sound { 0 } else { CHECK_FAILED })
}

fn run_ingest(arguments: IngestArguments) -> Result<u8, Error> {
    let report = ingest::run(&IngestOptions {
        nodes: arguments.nodes,
        frame_rate: arguments.frames_per_sec,
        events_per_frame: arguments.events_per_frame,
        duration: arguments.duration,
        describe: arguments.describe,
        signals: arguments.signals,
        entities: arguments.entities,
        archive: arguments.archive,
        server_cores: arguments.server_cores,
        server_config: arguments.server_config.iter().map(|line| format!("{line}\n")).collect(),
        archive_dir: arguments.archive_dir,
        bin_dir: arguments.bin_dir,
        ..IngestOptions::default()
    })?;
    print(arguments.json, &report)?;
    Ok(if report.ledger_closes { 0 } else { CHECK_FAILED })
}

fn run_query(arguments: QueryArguments) -> Result<u8, Error> {
    let report = query::run(&QueryOptions {
        events: arguments.events,
        nodes: arguments.nodes.into(),
        repeats: arguments.repeats,
        server_cores: arguments.server_cores,
        bin_dir: arguments.bin_dir,
    })?;
    print(arguments.json, &report)?;
    Ok(0)
}

fn print(as_json: bool, report: &(impl serde::Serialize + std::fmt::Display)) -> Result<(), Error> {
    if as_json {
        return print_json(report);
    }
    say(&format!("{report}\n"))
}

fn run_probes(arguments: ProbesArguments) -> Result<u8, Error> {
    let report = probes::run(&ProbesOptions {
        duration: arguments.duration,
        slice: arguments.slice,
        directory: arguments.directory,
        only: arguments.only,
    })?;
    print(arguments.json, &report)?;
    Ok(if arguments.check && !report.are_goals_met { CHECK_FAILED } else { 0 })
}

fn run_capacity(arguments: CapacityArguments) -> Result<u8, Error> {
    let pods = arguments.pods_per_node;
    let cluster = Cluster {
        nodes: arguments.nodes,
        pods_per_node: pods,
        events_per_node: arguments.events_per_node.unwrap_or_else(|| arguments.profile.events_per_second(pods)),
        peak_factor: arguments.peak,
        retention_s: arguments.retention.as_secs(),
        server_cores: arguments.server_cores,
        utilisation: arguments.utilisation,
        probe_ns_per_event: arguments.probe_ns,
    };
    let source = if arguments.measured.is_empty() {
        CostSource::Runs { duration: arguments.duration, bin_dir: arguments.bin_dir }
    } else {
        CostSource::Files(arguments.measured)
    };
    let plan = capacity::run(&cluster, &source)?;
    if arguments.json {
        print_json(&plan)?;
    } else {
        say(&plan.to_string())?;
    }
    Ok(0)
}

fn run_storm(arguments: StormArguments) -> Result<u8, Error> {
    let report = storm::run(&StormOptions {
        duration: arguments.duration,
        threads: arguments.threads,
        bin_dir: arguments.bin_dir,
        is_quiet: arguments.json,
    })?;
    print(arguments.json, &report)?;
    Ok(if report.is_accounted_for { 0 } else { CHECK_FAILED })
}

fn run_flood(arguments: FloodArguments) -> Result<u8, Error> {
    let report = flood::run(&FloodOptions {
        before: arguments.before.into(),
        kills: arguments.kills.into(),
        bin_dir: arguments.bin_dir,
    })?;
    print(arguments.json, &report)?;
    Ok(if report.complaints.is_empty() { 0 } else { CHECK_FAILED })
}

fn run_truth(arguments: TruthArguments) -> Result<u8, Error> {
    if arguments.list {
        for scenario in truth::scenarios(&arguments.only) {
            say(&format!("{:40}  {:30}  {}\n", scenario.name, scenario.kind, scenario.expected()))?;
        }
        return Ok(0);
    }
    let report = truth::run(&TruthOptions {
        only: arguments.only,
        own_pid_namespace: arguments.pid_namespace,
        bin_dir: arguments.bin_dir,
        page: arguments.page,
        update: std::env::var_os("TAPIO_UPDATE_DOCS").is_some_and(|value| value == "1"),
        is_quiet: arguments.json,
    })?;
    print(arguments.json, &report)?;
    Ok(if report.is_true() { 0 } else { CHECK_FAILED })
}

fn run_inject(arguments: &InjectArguments) -> Result<u8, Error> {
    if arguments.repeat == 0 {
        return Err(Error::Invalid("--repeat must be at least 1".into()));
    }
    let several = arguments.several.several();
    if several.is_some() && !arguments.measure {
        return Err(Error::Invalid("--servers starts servers to measure their findings: add --measure".into()));
    }
    let mut injector = Injector::new(InjectOptions {
        memory_bytes: arguments.memory,
        keep: arguments.keep_time,
        program: std::env::current_exe().context(|| "find this executable".into())?,
    })?;
    let how_often = (arguments.repeat, arguments.interval);
    if let (Some(turns), Some(several)) = (arguments.compare_log, several) {
        let comparison =
            own_servers::compare(&mut injector, arguments.fault, how_often, turns, several.count, |with_log, one| {
                match arguments.json {
                    true => Ok(()),
                    false => say(&format!("{} the log: {one}\n", if with_log { "with" } else { "without" })),
                }
            })?;
        print(arguments.json, &comparison)?;
        let missing = comparison.without_log.missing + comparison.with_log.missing;
        return Ok(if missing > 0 { CHECK_FAILED } else { 0 });
    }
    let mut own = several.map(|several| OwnServers::start(several, None)).transpose()?;
    let mut watches = Vec::new();
    if arguments.measure && own.is_none() {
        watches.push(FindingWatch::start(&arguments.server)?);
    }
    let watched = match &mut own {
        Some(own) => own.watches(),
        None => watches.as_mut_slice(),
    };
    let series = measure::run(&mut injector, arguments.fault, how_often, watched, |measured| match arguments.json {
        true => Ok(()),
        false => say(&format!("{measured}\n")),
    })?;
    own.map_or(Ok(()), OwnServers::stop)?;
    if arguments.json {
        match series.injections.as_slice() {
            [only] if !arguments.measure => print_json(&only.injection)?,
            _ => print_json(&series)?,
        }
    } else if arguments.measure {
        let found = series.injections.len() - series.missing;
        say(&format!("{found} of {} found: {}\n", series.injections.len(), series.latency_us))?;
        if let Some(elsewhere) = &series.elsewhere_latency_us {
            say(&format!("by all servers: {elsewhere}\n"))?;
        }
    }
    if series.missing > 0 {
        complain!(
            "tapio-perf: {} of {} injections led to no finding within {} s",
            series.missing,
            series.injections.len(),
            measure::FINDING_LIMIT.as_secs()
        );
        return Ok(CHECK_FAILED);
    }
    Ok(0)
}
