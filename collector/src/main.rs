//! `tapio-collector`: one on each node.
//!
//! Exit codes: 0 after a clean shutdown, 1 when it could not start or not everything could be handed over, 2 for bad usage or, of
//! `check`, a configuration that is refused.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::builder::PossibleValuesParser;
use clap::{Parser, Subcommand};
use tapio_collector::budget::memory::load_config;
use tapio_collector::pipeline::Pipeline;
use tapio_collector::settings::config::{Config, LogFormat};
use tapio_collector::settings::log_limit::LogLimit;
use tapio_collector::settings::reload::{LOOK_INTERVAL, Reload};
use tapio_probes::{Probes, ProgramState};
use tapio_wire::complain;
use tapio_wire::program::config_file::LOG_LEVELS;
use tapio_wire::program::output;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Gathers kernel, Kubernetes and systemd events on this node and ships them to a Tapio server.
#[derive(Parser)]
#[command(name = "tapio-collector", version)]
struct Arguments {
    /// Configuration file (YAML); default: every key at its default.
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Server address (host:port), instead of grpc.server_endpoints; may be repeated.
    #[arg(long, value_name = "ADDRESS")]
    server: Vec<String>,
    /// Minimum log level, instead of logging.level.
    #[arg(long, value_name = "LEVEL", ignore_case = true, value_parser = PossibleValuesParser::new(LOG_LEVELS))]
    log_level: Option<String>,
    /// Kernel type information (BTF) file, instead of /sys/kernel/btf/vmlinux.
    #[arg(long, value_name = "FILE", env = "TAPIO_BTF", global = true)]
    btf: Option<PathBuf>,
    /// Run with the sources that work here and report the others, instead of failing.
    #[arg(long)]
    allow_missing_sources: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Load every probe and report whether it works on this kernel.
    Probes {
        /// Print one JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Check a configuration (--config FILE) without starting anything; exit code 2 if it is invalid
    Check,
    /// Print a configuration with every key, its default and its meaning
    Config {
        /// Print Markdown tables of the keys instead
        #[arg(long)]
        reference: bool,
    },
}

/// How much free memory at the heap's end glibc keeps, and from what size on an allocation is a mapping of its own.
///
/// By itself glibc raises both to the size of a block that was freed. After the probes have read the kernel's type
/// information, 16 MiB would stay resident for ever. Either setting ends that (`mallopt(3)`); glibc reads them when a
/// process starts.
const HEAP: [(&str, &str); 2] = [("MALLOC_TRIM_THRESHOLD_", "1048576"), ("MALLOC_MMAP_THRESHOLD_", "1048576")];

fn main() -> ExitCode {
    tapio_wire::program::heap::start_with(&HEAP);
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            complain!("tapio-collector: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode, Box<dyn std::error::Error>> {
    match arguments.command {
        Some(Command::Check) => return check(arguments.config.as_deref()),
        Some(Command::Config { reference }) => {
            return print(&if reference { Config::reference() } else { Config::commented_defaults() });
        }
        Some(Command::Probes { .. }) | None => {}
    }
    let mut config = Config::load(arguments.config.as_deref())?;
    if !arguments.server.is_empty() {
        config.grpc.server_endpoints = arguments.server;
    }
    if let Some(level) = arguments.log_level {
        config.logging.level = level;
    }
    if arguments.btf.is_some() {
        config.collectors.ebpf.btf = arguments.btf;
    }
    if let Err(error) = config.validate("command line") {
        complain!("tapio-collector: {error}");
        return Ok(ExitCode::from(2));
    }
    if let Some(Command::Probes { json }) = arguments.command {
        return probes(&config, json);
    }
    let log_limit = LogLimit::default();
    let set_level = start_logging(&config, log_limit.clone());
    tapio_wire::program::descriptors::raise_limit_and_log();
    let path = arguments.config;
    // This one thread alone. Its work between two waits mostly takes microseconds. Two threads would wake each other
    // for every frame, and a scheduler for many costs at each wait.
    let runtime = tokio::runtime::Builder::new_current_thread().thread_name("blocking").enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let pipeline = Pipeline::start(&config, arguments.allow_missing_sources).await?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut reload =
            path.map(|path| Reload::new(path, Arc::clone(&pipeline.live), pipeline.controls.clone(), set_level));
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        let is_asked = loop {
            tokio::select! {
                _ = terminate.recv() => { tracing::info!("SIGTERM: draining"); break true; }
                _ = interrupt.recv() => { tracing::info!("SIGINT: draining"); break true; }
                _ = hangup.recv() => {}
                _ = look.tick() => {}
            }
            log_limit.report();
            let ended = pipeline.ended();
            if !ended.is_empty() {
                tracing::error!(
                    parts = ended.join(", "),
                    "a part ended by itself: draining, so that the program is restarted"
                );
                break false;
            }
            if let Some(reload) = &mut reload {
                reload.look();
            }
        };
        let is_clean = pipeline.shutdown().await && is_asked;
        Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    });
    // A thread that still waits for room must not keep the process from ending.
    runtime.shutdown_background();
    outcome
}

fn check(path: Option<&Path>) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let Some(path) = path else {
        complain!("tapio-collector: name the file to check with --config");
        return Ok(ExitCode::from(2));
    };
    match Config::load(Some(path)) {
        Ok(_) => print(&format!("{}: accepted\n", path.display())),
        Err(error) => {
            complain!("tapio-collector: {error}");
            Ok(ExitCode::from(2))
        }
    }
}

/// Colours are for a terminal, unless NO_COLOR is set.
fn is_coloured() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Starts logging; what it returns changes the level.
fn start_logging(config: &Config, limit: LogLimit) -> Box<dyn Fn(&str) + Send> {
    let filter = EnvFilter::new(&config.logging.level);
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(is_coloured())
        .with_writer(std::io::stderr)
        // It would be printed to the same pipe that nobody reads, and end the thread with a panic.
        .log_internal_errors(false);
    match config.logging.format {
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.finish().with(limit).init();
            Box::new(move |level| changed(handle.reload(EnvFilter::new(level))))
        }
        LogFormat::Text => {
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            builder.finish().with(limit).init();
            Box::new(move |level| changed(handle.reload(EnvFilter::new(level))))
        }
    }
}

fn changed(result: Result<(), tracing_subscriber::reload::Error>) {
    if let Err(error) = result {
        tracing::error!(%error, "the log level cannot be changed");
    }
}

fn probes(config: &Config, json: bool) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let probes = Probes::load(&load_config(config))?;
    let width = |text: fn(&tapio_probes::Verdict) -> usize| probes.verdicts().iter().map(text).max().unwrap_or(0);
    let (program, hook) = (width(|verdict| verdict.program.len()), width(|verdict| verdict.hook.len()));
    let mut text = String::new();
    if !json {
        writeln!(text, "{:program$}  {:hook$}  {:6}  VERDICT", "PROGRAM", "HOOK", "LANE")?;
    }
    for verdict in probes.verdicts() {
        let (state, reason) = match &verdict.state {
            ProgramState::Attached => ("attached", ""),
            ProgramState::NotOnThisKernel(reason) => ("not on this kernel", reason.as_str()),
            ProgramState::Refused(reason) => ("refused", reason.as_str()),
            ProgramState::Disabled => ("disabled", "by configuration"),
        };
        if json {
            let kinds: Vec<&str> = verdict.produces.iter().map(|kind| kind.name()).collect();
            let line = serde_json::json!({
                "program": verdict.program, "hook": verdict.hook, "lane": verdict.lane,
                "produces": kinds, "verdict": state, "reason": reason,
            });
            writeln!(text, "{line}")?;
        } else {
            let separator = if reason.is_empty() { "" } else { ": " };
            writeln!(
                text,
                "{:program$}  {:hook$}  {:6}  {state}{separator}{reason}",
                verdict.program, verdict.hook, verdict.lane
            )?;
        }
    }
    print(&text)
}

/// Prints to standard output. A reader that closes the pipe early is no error.
fn print(text: &str) -> Result<ExitCode, Box<dyn std::error::Error>> {
    output::print_while_read(text)?;
    Ok(ExitCode::SUCCESS)
}
