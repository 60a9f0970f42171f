//! `tapioctl`: what an operator asks a server.
//!
//! Exit codes: 0 done, 1 an error or no such finding, 2 wrong usage, 3 the server cannot be reached.
#![forbid(unsafe_code)]

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Parser, Subcommand, ValueEnum};
use tapio_server::render::{self, Style};
use tapio_wire::dial;
use tapio_wire::service::query_client::QueryClient;
use tapio_wire::service::{Finding, GetFindingRequest, ListFindingsRequest, StatusRequest, WatchFindingsRequest};
use tapio_wire::tls::{ClientFiles, Watched};
use tapio_wire::token::{Bearer, TokenFile};
use tonic::Code;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an idle connection is looked after.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A status speaks of every node.
const ANSWER_BYTES_MAX: usize = 64 << 20;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Findings asked for at once.
const PAGE: u32 = 500;

/// Ask a tapio-server what died, why, and what to do about it.
#[derive(Parser)]
#[command(
    name = "tapioctl",
    version,
    after_help = "Exit codes: 0 done, 1 an error or no such finding, 2 wrong usage, 3 the server cannot be reached."
)]
struct Arguments {
    /// The server's gRPC address, HOST:PORT or a URL
    #[arg(long, global = true, env = "TAPIO_SERVER", default_value = "http://127.0.0.1:9090")]
    server: String,
    #[command(flatten)]
    access: Access,
    /// When to use colours
    #[arg(long, global = true, value_enum, default_value_t = Colour::Auto)]
    color: Colour,
    #[command(subcommand)]
    command: Command,
}

/// What a server with TLS or tokens asks for
#[derive(clap::Args)]
struct Access {
    /// Speak TLS: the certificates of the CA that signs the server's, PEM
    #[arg(long, global = true, value_name = "FILE", env = "TAPIO_TLS_CA")]
    tls_ca: Option<PathBuf>,
    /// The own certificate chain, for a server that wants to see one
    #[arg(long, global = true, value_name = "FILE", env = "TAPIO_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, global = true, value_name = "FILE", env = "TAPIO_TLS_KEY")]
    tls_key: Option<PathBuf>,
    /// The name in the server's certificate, instead of the host in --server
    #[arg(long, global = true, value_name = "NAME", env = "TAPIO_TLS_SERVER_NAME")]
    tls_server_name: Option<String>,
    /// The token of server.auth.token_file
    #[arg(long, global = true, value_name = "FILE", env = "TAPIO_TOKEN_FILE")]
    token_file: Option<PathBuf>,
}

type Client = QueryClient<InterceptedService<Channel, Bearer>>;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Colour {
    /// On a terminal, unless NO_COLOR is set
    Auto,
    Always,
    Never,
}

#[derive(Subcommand)]
enum Command {
    /// List findings, newest first
    Findings {
        /// Go on with every finding that is published or changes, until interrupted
        #[arg(long)]
        watch: bool,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
        /// Only findings that ended since: how long ago (90s, 10m, 2h, 1d) or a date in UTC (2026-01-02T03:04:05Z)
        #[arg(long, value_name = "WHEN")]
        since: Option<String>,
        /// At most so many
        #[arg(long, default_value_t = 100, conflicts_with = "watch", value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
    /// Show one finding with its evidence, death certificate and advice
    Finding {
        /// Its id, or the beginning of it
        id: String,
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
    /// Show the server, its nodes and whether the ledger closes
    Status {
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
}

enum Failure {
    Unreachable(String),
    Other(String),
    Usage(String),
    Output(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl Failure {
    fn of(server: &str, status: &tonic::Status) -> Self {
        match status.code() {
            Code::Unavailable => Self::Unreachable(format!("{server}: {}", status.message())),
            Code::DeadlineExceeded | Code::Cancelled => Self::Unreachable(format!("{server} did not answer in time")),
            _ => Self::Other(status.message().to_owned()),
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("tapioctl: cannot start: {error}");
            return ExitCode::from(1);
        }
    };
    let (message, code) = match runtime.block_on(run(arguments)) {
        Ok(()) => return ExitCode::SUCCESS,
        // Whoever read the output has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            return ExitCode::SUCCESS;
        }
        Err(Failure::Output(error)) => (format!("cannot write: {error}"), 1),
        Err(Failure::Other(message)) => (message, 1),
        Err(Failure::Usage(message)) => (message, 2),
        Err(Failure::Unreachable(message)) => (
            format!("cannot reach the server at {message}\nGive its address with --server HOST:PORT or TAPIO_SERVER."),
            3,
        ),
    };
    eprintln!("tapioctl: {message}");
    ExitCode::from(code)
}

async fn run(arguments: Arguments) -> Result<(), Failure> {
    let is_terminal = io::stdout().is_terminal();
    let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let style = Style {
        colour: match arguments.color {
            Colour::Auto => is_terminal && !no_colour,
            Colour::Always => true,
            Colour::Never => false,
        },
    };
    let server = &arguments.server;
    match arguments.command {
        Command::Findings { watch, json, since, limit } => {
            let since_ns = match since {
                Some(since) => render::parse_since(&since, now_ns()).map_err(Failure::Usage)?,
                None => 0,
            };
            let mut client = connect(server, &arguments.access, !watch).await?;
            if !watch {
                return list(&mut client, server, style, json, since_ns, limit).await;
            }
            follow(&mut client, server, style, json, since_ns).await
        }
        Command::Finding { id, json } => {
            let mut client = connect(server, &arguments.access, true).await?;
            let finding = client
                .get_finding(GetFindingRequest { id })
                .await
                .map_err(|status| Failure::of(server, &status))?
                .into_inner();
            print(&if json { render::finding_json(&finding) + "\n" } else { render::finding(style, &finding) })
        }
        Command::Status { json } => {
            let mut client = connect(server, &arguments.access, true).await?;
            let status =
                client.status(StatusRequest {}).await.map_err(|status| Failure::of(server, &status))?.into_inner();
            print(&if json { render::status_json(&status) + "\n" } else { render::status(style, &status) })
        }
    }
}

fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_nanos() as u64)
}

fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

async fn connect(server: &str, access: &Access, with_timeout: bool) -> Result<Client, Failure> {
    let url = if server.contains("://") { server.to_owned() } else { format!("http://{server}") };
    let wrong = |problem: String| Failure::Usage(format!("\"{server}\" is no address: {problem}"));
    let uri: tonic::transport::Uri = url.parse().map_err(|error| wrong(format!("{error}")))?;
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    let usage = |error: &dyn std::error::Error| Failure::Usage(error.to_string());
    let tls = match &access.tls_ca {
        Some(ca) => {
            let files = ClientFiles {
                ca: ca.clone(),
                cert: access.tls_cert.clone(),
                key: access.tls_key.clone(),
                server_name: access.tls_server_name.clone(),
            };
            Some(Arc::new(Watched::load(files).map_err(|error| usage(&error))?))
        }
        None if uri.scheme_str() == Some("https") => {
            return Err(Failure::Usage("https needs --tls-ca, the certificates of the server's CA".into()));
        }
        None => None,
    };
    let token = access.token_file.clone().map(TokenFile::load).transpose().map_err(|error| usage(&error))?;
    let mut endpoint = dial::endpoint(host, port, tls.is_some())
        .map_err(|error| wrong(error.to_string()))?
        .connect_timeout(CONNECT_TIMEOUT)
        // A watcher must notice that the server is gone, also when it went without a word.
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(REQUEST_TIMEOUT)
        .keep_alive_while_idle(true);
    if with_timeout {
        endpoint = endpoint.timeout(REQUEST_TIMEOUT);
    }
    let unreachable = |reason: String| Failure::Unreachable(format!("{server}: {reason}"));
    let addresses = tokio::net::lookup_host((host, port)).await.map_err(|error| unreachable(error.to_string()))?;
    let mut reason = "the name has no address".to_owned();
    let mut connected = None;
    for address in addresses {
        match dial::dial(&endpoint, address, tls.as_ref()).await {
            Ok(channel) => {
                connected = Some(channel);
                break;
            }
            Err(error) => {
                reason = error.to_string();
                let mut cause = std::error::Error::source(&error);
                while let Some(error) = cause {
                    reason = error.to_string();
                    cause = error.source();
                }
            }
        }
    }
    let channel = connected.ok_or_else(|| unreachable(reason))?;
    let client = QueryClient::with_interceptor(channel, Bearer(token.map(Arc::new)));
    Ok(client.max_decoding_message_size(ANSWER_BYTES_MAX))
}

fn line(style: Style, json: bool, finding: &Finding) -> String {
    if json { render::finding_json(finding) + "\n" } else { render::list_row(style, finding) }
}

async fn list(
    client: &mut Client,
    server: &str,
    style: Style,
    json: bool,
    since_ns: u64,
    limit: u32,
) -> Result<(), Failure> {
    let mut left = limit;
    let mut page_token = String::new();
    let mut is_first = true;
    while left > 0 {
        let request =
            ListFindingsRequest { since_ns, limit: left.min(PAGE), page_token, ..ListFindingsRequest::default() };
        let response = client.list_findings(request).await.map_err(|status| Failure::of(server, &status))?.into_inner();
        let mut text = String::new();
        if is_first && !json {
            text = if response.findings.is_empty() { "No findings.\n".to_owned() } else { render::list_header(style) };
        }
        is_first = false;
        for finding in response.findings.iter().take(left as usize) {
            text.push_str(&line(style, json, finding));
        }
        print(&text)?;
        left = left.saturating_sub(response.findings.len() as u32);
        page_token = response.next_page_token;
        if page_token.is_empty() || response.findings.is_empty() {
            break;
        }
    }
    Ok(())
}

async fn follow(client: &mut Client, server: &str, style: Style, json: bool, since_ns: u64) -> Result<(), Failure> {
    let mut stream = client
        .watch_findings(WatchFindingsRequest { since_ns })
        .await
        .map_err(|status| Failure::of(server, &status))?
        .into_inner();
    if !json {
        print(&render::list_header(style))?;
    }
    loop {
        match stream.message().await {
            Ok(Some(finding)) => print(&line(style, json, &finding))?,
            Ok(None) => {
                return Err(Failure::Unreachable(format!("{server}: it ended the stream")));
            }
            Err(status) => return Err(Failure::of(server, &status)),
        }
    }
}
