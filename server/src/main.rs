//! `tapio-server`: archives what collectors ship, correlates it and publishes findings.
//!
//! Exit codes: 0 after a clean shutdown, 1 when it could not start or ended badly, 2 for bad usage. `archive` and `replay`: 0
//! done, 1 the archive cannot be read, 2 for bad usage, 3 damage or differences were found.
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::{Parser, Subcommand};
use tapio_server::budget::Budget;
use tapio_server::command::{self, ArchiveCommand, ReplayArguments};
use tapio_server::config::{Config, ConfigError, LogFormat};
use tapio_server::pipeline::Pipeline;
use tapio_server::render::clean_lines;
use tapio_wire::complain;
use tapio_wire::program::config_file::LOG_LEVELS;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Archives what Tapio's collectors ship, correlates it and publishes findings.
#[derive(Parser)]
#[command(
    name = "tapio-server",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Exit codes: 0 after a clean shutdown, 1 when it could not start or ended badly, 2 for wrong usage. \
                  Of archive and replay: 3 when damage or differences were found."
)]
struct Arguments {
    /// Configuration file (YAML); default: every key at its default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address to listen on, instead of server.address.
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,
    /// gRPC port, instead of server.port.
    #[arg(long)]
    port: Option<u16>,
    /// URL of the NATS with JetStream that all servers share, instead of cluster.url.
    #[arg(long, value_name = "URL", env = "TAPIO_CLUSTER_URL")]
    cluster_url: Option<String>,
    /// Name that stands for all servers, instead of cluster.headless.
    #[arg(long, value_name = "HOST", env = "TAPIO_CLUSTER_HEADLESS")]
    cluster_headless: Option<String>,
    /// NATS user, instead of cluster.user.
    #[arg(long, value_name = "NAME", env = "TAPIO_CLUSTER_USER", requires = "cluster_password_file")]
    cluster_user: Option<String>,
    /// File with the NATS user's password, instead of cluster.password_file.
    #[arg(long, value_name = "FILE", env = "TAPIO_CLUSTER_PASSWORD_FILE")]
    cluster_password_file: Option<PathBuf>,
    /// Minimum log level, instead of logging.level.
    #[arg(long, value_name = "LEVEL", ignore_case = true, value_parser = PossibleValuesParser::new(LOG_LEVELS))]
    log_level: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Check, summarize, copy, export or print an archive, even while a server writes it
    #[command(subcommand)]
    Archive(ArchiveCommand),
    /// Run an archive through the patterns again, faster than real time, and print the findings
    Replay(ReplayArguments),
    /// Check a configuration and the patterns that it names, and start nothing; exit code 2 when they are refused
    Check {
        /// Configuration file (YAML)
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Directory of patterns, instead of correlation.patterns
        #[arg(long, value_name = "DIR")]
        patterns: Option<PathBuf>,
    },
    /// Print a configuration with every key, its default and its meaning
    Config {
        /// Print Markdown tables of the keys instead
        #[arg(long)]
        reference: bool,
    },
}

/// Time between two checks that every thread still runs.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long the rest may take to end after a part has failed.
const BROKEN_DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// How much free memory at the heap's end glibc keeps, and from what size on an allocation is a mapping of its own.
///
/// By default glibc raises both to the size of what was freed. A table that grows leaves half of itself behind each time, and
/// frames of many sizes come and go between what stays. With a million entities a third of the heap was such gaps (`mallopt(3)`:
/// either setting ends that). It reads them when a process starts.
const HEAP: [(&str, &str); 2] = [("MALLOC_TRIM_THRESHOLD_", "8388608"), ("MALLOC_MMAP_THRESHOLD_", "1048576")];

fn main() -> ExitCode {
    tapio_wire::program::heap::start_with(&HEAP);
    let mut arguments = Arguments::parse();
    if let Some(command) = arguments.command.take() {
        return command::exit_code(match command {
            Command::Archive(command) => command.run(),
            Command::Replay(arguments) => arguments.run(),
            Command::Check { config, patterns } => command::check(config.as_deref(), patterns.as_deref()),
            Command::Config { reference } => command::print_config(reference),
        });
    }
    let config = match configured(arguments) {
        Ok(config) => config,
        Err((error, code)) => {
            complain!("tapio-server: {}", clean_lines(&error.to_string()));
            return code;
        }
    };
    match run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain!("tapio-server: {}", clean_lines(&error.to_string()));
            ExitCode::FAILURE
        }
    }
}

/// The configuration as flags change it, or why not and the exit code: a wrong flag is wrong usage.
fn configured(arguments: Arguments) -> Result<Config, (ConfigError, ExitCode)> {
    let mut config = Config::load(arguments.config.as_deref()).map_err(|error| (error, ExitCode::FAILURE))?;
    if let Some(address) = arguments.address {
        config.server.address = address;
    }
    if let Some(port) = arguments.port {
        config.server.port = port;
    }
    if let Some(url) = arguments.cluster_url {
        config.cluster.url = url;
    }
    if let Some(name) = arguments.cluster_headless {
        config.cluster.headless = Some(name);
    }
    if let Some(user) = arguments.cluster_user {
        config.cluster.user = Some(user);
    }
    if let Some(file) = arguments.cluster_password_file {
        config.cluster.password_file = Some(file);
    }
    if let Some(level) = arguments.log_level {
        config.logging.level = level;
    }
    config.validate("command line").map_err(|error| (error, ExitCode::from(2)))?;
    Ok(config)
}

fn run(config: &Config) -> Result<(), Box<dyn std::error::Error>> {
    start_logging(config);
    // Each collector is a connection.
    tapio_wire::program::descriptors::raise_limit_and_log();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(Budget::of(&config.resources).io_threads)
        .thread_name("io")
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let pipeline = tokio::select! {
            started = Pipeline::start(config) => started?,
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        };
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        loop {
            tokio::select! {
                _ = terminate.recv() => break tracing::info!("SIGTERM: draining"),
                _ = interrupt.recv() => break tracing::info!("SIGINT: draining"),
                _ = look.tick() => {}
            }
            let ended = pipeline.ended();
            if !ended.is_empty() {
                let parts = ended.join(", ");
                tracing::error!(parts, "a part ended by itself: draining, so that the program is restarted");
                // What the others wait for may have gone with it.
                let _ = tokio::time::timeout(BROKEN_DRAIN_TIMEOUT, pipeline.shutdown()).await;
                return Err(format!("{parts} ended by itself; the log says why").into());
            }
        }
        pipeline.shutdown().await?;
        Ok(())
    });
    // A recovery that was asked to stop is not waited for: it changes nothing that the next one would not.
    runtime.shutdown_background();
    outcome
}

/// Colours are for a terminal, unless NO_COLOR is set.
fn is_coloured() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn start_logging(config: &Config) {
    // The audit log is written whatever the level.
    let audit = if config.logging.audit { ",audit=info" } else { ",audit=off" };
    // The client's words come with every attempt, and with each connection that is made and closed. The server says itself what is
    // wrong, more seldom.
    let client = match config.logging.level.contains("async_nats") {
        true => "",
        false => ",async_nats=warn,async_nats::connector=off",
    };
    let filter = EnvFilter::new(format!("{}{audit}{client}", config.logging.level));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(is_coloured())
        .with_writer(std::io::stderr)
        // It would be printed to the same pipe that nobody reads, and end the thread with a panic.
        .log_internal_errors(false);
    match config.logging.format {
        LogFormat::Json => builder.json().flatten_event(true).init(),
        LogFormat::Text => builder.init(),
    }
}
