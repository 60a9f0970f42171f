//! `tapioctl`: what an operator asks a server.
//!
//! Exit codes: 0 done, 1 an error or nothing of that name, 2 wrong usage, 3 the server cannot be reached,
//! 4 a server's part of the answer is missing.
#![forbid(unsafe_code)]

mod bundle;
mod complete;
mod events;
mod findings;
mod forward;
mod ledger;
mod mcp;
mod output;
mod server;
mod silence;
mod top;
mod why;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::builder::NonEmptyStringValueParser;
use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use clap_complete::engine::ArgValueCompleter;
use forward::Forward;
use output::{Format, print};
use server::{Failure, ServerAt};
use tapio_server::render::{self, Style};
use tapio_wire::complain;
use tapio_wire::program::clock::now_ns;
use tokio::signal::unix::{SignalKind, signal};

/// Ask a tapio-server what died, why, and what to do about it.
#[derive(Parser)]
#[command(
    name = "tapioctl",
    version,
    after_help = "Exit codes: 0 done, 1 an error or nothing of that name, 2 wrong usage, 3 the server cannot be reached, 4 a server's \
                  part of the answer is missing."
)]
struct Arguments {
    #[command(flatten)]
    server: ServerAt,
    #[command(flatten)]
    forward: forward::ForwardArguments,
    /// When to use colours
    #[arg(long, global = true, value_enum, default_value_t = Colour::Auto)]
    color: Colour,
    /// Output format: a table, a wide table, JSON (one object a line) or YAML (one document each)
    #[arg(long, short, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// Print JSON, as --output json
    #[arg(long, global = true, conflicts_with = "output")]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Colour {
    /// Colours on a terminal, unless NO_COLOR is set
    Auto,
    Always,
    Never,
}

#[derive(Subcommand)]
enum Command {
    /// List findings, newest first
    Findings(findings::ListArguments),
    /// Show one finding with its evidence, death certificate and advice
    Finding {
        /// Id of the finding, or the beginning of the id
        #[arg(value_parser = NonEmptyStringValueParser::new(), add = ArgValueCompleter::new(complete::ids))]
        id: String,
    },
    /// Explain why a pod, a container or a unit died, with all its evidence
    Why(why::Arguments),
    /// Write one file about a finding, to attach to a report: its evidence, events around it, ledgers, versions
    Bundle(bundle::Arguments),
    /// Print events from the server's archive
    Events(events::Arguments),
    /// Show live rates by node, kind and entity
    Top(top::Arguments),
    /// Show the ledger of every node, epoch and source: emitted = archived + dropped + held
    Ledger(ledger::Arguments),
    /// Show the server, its nodes and whether the ledger closes
    Status,
    /// Show of each sink what waits, what failed last and why, and what was given up
    Deliveries,
    /// Say of which findings nobody is notified for a while
    #[command(subcommand)]
    Silence(silence::Command),
    /// Say that you deal with a finding: it stays in lists, and chats say no more than its end
    Ack(silence::AckArguments),
    /// Let an assistant ask, by the Model Context Protocol on standard input and output
    Mcp,
    /// Print a script that completes this command's arguments in a shell, with names that the server knows
    Completions {
        /// Shell of the completion script
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// How to print, for every command.
#[derive(Clone, Copy)]
struct Printing {
    style: Style,
    format: Format,
}

fn main() -> ExitCode {
    complete::answer();
    let matches = Arguments::command().get_matches();
    let names_server = matches.value_source("server").is_some_and(|source| source != ValueSource::DefaultValue);
    let mut arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain!("tapioctl: cannot start: {error}");
            return ExitCode::from(1);
        }
    };
    let mut server = std::mem::take(&mut arguments.server);
    let program = std::env::args().next().unwrap_or_default();
    let needs_server = !matches!(arguments.command, Command::Completions { .. });
    let forwarded = match needs_server && arguments.forward.is_wanted(&program, names_server) {
        true => Forward::start(&arguments.forward).map(Some),
        false => Ok(None),
    };
    let outcome = forwarded.and_then(|forward| match forward {
        Some(forward) => {
            server.is_at(&forward.address);
            // kubectl must not be left behind.
            runtime.block_on(async {
                tokio::select! {
                    outcome = run(arguments, &server, Some(forward)) => outcome,
                    signal = ended_by() => Err(Failure::Other(format!("ended by {signal}"))),
                }
            })
        }
        None => runtime.block_on(run(arguments, &server, None)),
    });
    // What an assistant asked is not waited for.
    runtime.shutdown_background();
    if !server.is_complete() {
        server.complain();
    }
    let (message, code) = match outcome {
        Ok(()) if server.is_complete() => return ExitCode::SUCCESS,
        Ok(()) => return ExitCode::from(4),
        Err(Failure::Incomplete) => ("nothing is printed, since a part is missing (--require-complete)".into(), 4),
        // Whoever read the output has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            return ExitCode::SUCCESS;
        }
        Err(Failure::Output(error)) => (format!("cannot write: {error}"), 1),
        // What is not known here may be in the part that is missing.
        Err(Failure::Other(message)) if !server.is_complete() => (message, 4),
        Err(Failure::Other(message)) => (message, 1),
        Err(Failure::Usage(message)) => (message, 2),
        Err(Failure::Broken(message)) => (message, 3),
        Err(Failure::Unreachable(message)) => (
            format!("cannot reach the server at {message}\nGive its address with --server HOST:PORT or TAPIO_SERVER."),
            3,
        ),
    };
    // It may repeat an argument, which a script took from anywhere.
    let message: Vec<String> = message.lines().map(render::clean).collect();
    complain!("tapioctl: {}", message.join("\n"));
    ExitCode::from(code)
}

/// Waits for a signal that asks this program to end. Where none can be waited for it never returns.
async fn ended_by() -> &'static str {
    let terminated = signal(SignalKind::terminate()).ok().zip(signal(SignalKind::hangup()).ok());
    let Some((mut terminate, mut hangup)) = terminated else { return std::future::pending().await };
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = hangup.recv() => "SIGHUP",
    }
}

/// Runs one command. `forward` is there as long as it is asked through.
async fn run(arguments: Arguments, server: &ServerAt, forward: Option<Forward>) -> Result<(), Failure> {
    let is_terminal = io::stdout().is_terminal();
    let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let style = Style {
        colour: match arguments.color {
            Colour::Auto => is_terminal && !no_colour,
            Colour::Always => true,
            Colour::Never => false,
        },
    };
    let format = if arguments.json { Format::Json } else { arguments.output };
    let printing = Printing { style, format };
    match arguments.command {
        Command::Findings(arguments) => findings::list(server, printing, &arguments).await,
        Command::Finding { id } => findings::show(server, printing, id).await,
        Command::Why(arguments) => why::run(server, printing, &arguments).await,
        Command::Bundle(arguments) => bundle::run(server, &arguments).await,
        Command::Events(arguments) => events::run(server, printing, &arguments).await,
        Command::Top(arguments) => top::run(server, printing, &arguments).await,
        Command::Ledger(arguments) => ledger::run(server, printing, &arguments).await,
        Command::Status => {
            let mut client = server::connect(server, true).await?;
            let status = server::status(&mut client, server).await?;
            print(&format.one(&render::status_value(&status)).unwrap_or_else(|| render::status(style, &status)))
        }
        Command::Deliveries => {
            let mut client = server::connect(server, true).await?;
            let status = server::status(&mut client, server).await?;
            if format.is_table() {
                return print(&render::deliveries(style, &status));
            }
            let sinks = render::deliveries_values(&status);
            print(&sinks.iter().filter_map(|sink| format.one(sink)).collect::<String>())
        }
        Command::Silence(command) => silence::run(server, printing, command).await,
        Command::Ack(arguments) => silence::acknowledge(server, printing, arguments).await,
        Command::Mcp => mcp::run(server, server.access_options(), forward).await,
        Command::Completions { shell } => {
            let script = complete::script(shell).map_err(|error| Failure::Other(error.to_string()))?;
            print(&script)
        }
    }
}

/// What a request asks for where nothing is asked for: the empty text.
fn filter(given: &Option<String>) -> String {
    given.clone().unwrap_or_default()
}

fn moment(text: Option<&str>) -> Result<u64, Failure> {
    text.map_or(Ok(0), |text| render::parse_since(text, now_ns()).map_err(Failure::Usage))
}
