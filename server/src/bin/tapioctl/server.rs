//! The connection to a server, and what can go wrong.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tapio_server::render;
use tapio_wire::complain;
use tapio_wire::program::dial;
use tapio_wire::program::tls::{ClientFiles, Watched};
use tapio_wire::program::token::{Bearer, TokenFile};
use tapio_wire::service::query_client::QueryClient;
use tapio_wire::service::silences_client::SilencesClient;
use tapio_wire::service::{RemoteRead, StatusRequest, StatusResponse, Unanswered};
use tonic::Code;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an idle connection is looked after.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A status speaks of every node.
const ANSWER_BYTES_MAX: usize = 64 << 20;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the only server may take to answer at all. A machine may take connections for a server that is stopped.
const FIRST_ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Time that one of several servers may take to answer before the next one is asked, and that connecting to it may
/// take.
const NEXT_SERVER_TIMEOUT: Duration = Duration::from_secs(2);

/// A client of silences.
pub type Silences = SilencesClient<InterceptedService<Channel, Bearer>>;
/// A query client.
pub type Client = QueryClient<InterceptedService<Channel, Bearer>>;

/// What ends the program otherwise than well.
#[derive(Debug)]
pub enum Failure {
    Unreachable(String),
    /// The connection was made, and broke.
    Broken(String),
    Other(String),
    /// A server's part is missing, and the answer was asked for as a whole.
    Incomplete,
    Usage(String),
    Output(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl Failure {
    /// Makes the failure from an answer.
    pub fn of(server: &ServerAt, status: &tonic::Status) -> Self {
        let at = &server.server;
        if status.message().contains("grpc-status header missing, mapped from HTTP status code 4") {
            let message = status.message();
            return Self::Broken(format!(
                "{at} does not speak gRPC ({message}): this looks like the HTTP port; gRPC is 9090 by default"
            ));
        }
        match status.code() {
            Code::Unavailable => Self::Unreachable(format!("{at}: {}", status.message())),
            // A server's own words have no source; this is of the connection.
            Code::Unknown | Code::Cancelled if status.source().is_some() && !has_timed_out(status) => {
                Self::Broken(format!("the connection to {at} broke: {}{}", innermost(status), server.hint()))
            }
            Code::DeadlineExceeded | Code::Cancelled => Self::Unreachable(format!("{at} did not answer in time")),
            _ => Self::Other(status.message().to_owned()),
        }
    }
}

fn has_timed_out(status: &tonic::Status) -> bool {
    std::iter::successors(status.source(), |&error| error.source()).any(|error| error.is::<tonic::TimeoutExpired>())
}

/// The text of the first cause.
fn innermost(status: &tonic::Status) -> String {
    let cause = std::iter::successors(status.source(), |&error| error.source()).last();
    cause.map_or_else(|| status.message().to_owned(), ToString::to_string)
}

/// Where the server is, and what it asks for
#[derive(Default, clap::Args)]
pub struct ServerAt {
    /// gRPC address of the server (HOST:PORT or a URL). Of several, separated by commas or behind one name, the first that answers
    /// is used
    #[arg(long, global = true, env = "TAPIO_SERVER", default_value = "http://127.0.0.1:9090")]
    server: String,
    /// Print nothing and exit with code 4 if a server's part is missing
    #[arg(long, global = true)]
    require_complete: bool,
    #[command(flatten)]
    access: Access,
    /// Servers whose parts were missing in what was printed.
    #[arg(skip)]
    missing: Missing,
    /// What was read of a remote archive for what was printed.
    #[arg(skip)]
    remote: Mutex<RemoteRead>,
    /// The server that was reached last was one of several.
    #[arg(skip)]
    has_others: AtomicBool,
}

/// Servers whose parts were missing, by name and reason.
type Missing = Mutex<BTreeMap<(String, String), Unanswered>>;

impl Deref for ServerAt {
    type Target = str;

    fn deref(&self) -> &str {
        &self.server
    }
}

impl ServerAt {
    /// The options by which another run of this program reaches the same server.
    pub fn access_options(&self) -> Vec<String> {
        let access = &self.access;
        let files = [
            ("--tls-ca", &access.tls_ca),
            ("--tls-cert", &access.tls_cert),
            ("--tls-key", &access.tls_key),
            ("--token-file", &access.token_file),
        ];
        let files = files.into_iter().filter_map(|(name, file)| Some(format!("{name}={}", file.as_ref()?.display())));
        let name = access.tls_server_name.iter().map(|name| format!("--tls-server-name={name}"));
        let complete = self.require_complete.then(|| "--require-complete".to_owned());
        files.chain(name).chain(complete).collect()
    }

    /// Asks at this address, whatever was given.
    pub fn is_at(&mut self, address: &str) {
        self.server = address.to_owned();
    }

    /// Takes in whose parts an answer lacks.
    pub fn lacks(&self, incomplete: &[Unanswered]) -> Result<(), Failure> {
        let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        let keyed = incomplete.iter().map(|part| ((part.server.clone(), part.reason.clone()), part.clone()));
        missing.extend(keyed);
        drop(missing);
        match self.is_complete() {
            false if self.require_complete => Err(Failure::Incomplete),
            _ => Ok(()),
        }
    }

    /// Takes in what an answer took from a remote archive.
    pub fn has_read(&self, remote: &RemoteRead) {
        let mut sum = self.remote.lock().unwrap_or_else(PoisonError::into_inner);
        sum.read_bytes += remote.read_bytes;
        sum.segments = sum.segments.max(remote.segments);
        sum.archive_bytes = sum.archive_bytes.max(remote.archive_bytes);
    }

    /// What was read of a remote archive by now; `None` where none was asked.
    pub fn remote(&self) -> Option<RemoteRead> {
        let read = *self.remote.lock().unwrap_or_else(PoisonError::into_inner);
        (read.segments > 0).then_some(read)
    }

    /// A new answer is asked for: what the last one lacked does not count.
    pub fn ask_anew(&self) {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether an answer is wanted as a whole or not at all.
    pub fn requires_complete(&self) -> bool {
        self.require_complete
    }

    /// What may be wrong where a connection broke.
    fn hint(&self) -> &'static str {
        match self.access.hint() {
            // An HTTP port closes at the first bytes of HTTP/2. Several addresses were asked for their health before.
            "" if self.access.tls_ca.is_none() && !self.has_others.load(Ordering::Relaxed) => {
                "; is it the gRPC port, 9090 by default, and without TLS?"
            }
            hint => hint,
        }
    }

    /// The addresses, in the order in which they are asked.
    fn addresses(&self) -> Vec<&str> {
        self.server.split(',').map(str::trim).filter(|address| !address.is_empty()).collect()
    }

    /// Whether what goes on until it is interrupted may go on at another server after this.
    pub fn may_go_on_after(&self, failure: &Failure) -> bool {
        matches!(failure, Failure::Unreachable(_) | Failure::Broken(_)) && self.has_others.load(Ordering::Relaxed)
    }

    /// Whether nobody's part was missing.
    pub fn is_complete(&self) -> bool {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Prints to standard error whose parts were missing.
    pub fn complain(&self) {
        let missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        let line = |missing: &Unanswered| {
            if missing.server.is_empty() {
                // The only server there is answered, though not with all of it.
                return complain!("incomplete: {}", render::clean(&missing.reason));
            }
            let server = render::clean(&missing.server);
            let nodes = match missing.nodes.len() {
                0 => String::new(),
                count if count > NODES_NAMED_MAX => format!(" ({count} nodes shipped to it last)"),
                _ => format!(" (nodes that shipped to it last: {})", render::clean(&missing.nodes.join(", "))),
            };
            complain!("incomplete: the part of server {server} is missing{nodes}: {}", render::clean(&missing.reason));
        };
        missing.values().for_each(line);
    }
}

/// Nodes of a missing server that are named.
const NODES_NAMED_MAX: usize = 8;

/// What a server with TLS or tokens asks for
#[derive(Default, clap::Args)]
struct Access {
    /// Use TLS, with the certificate of the CA that signed the server's (PEM)
    #[arg(long, global = true, value_name = "FILE", env = "TAPIO_TLS_CA")]
    tls_ca: Option<PathBuf>,
    /// Client certificate chain, for a server that asks for one (PEM)
    #[arg(long, global = true, value_name = "FILE", env = "TAPIO_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// Private key of the client certificate (PEM)
    #[arg(long, global = true, value_name = "FILE", env = "TAPIO_TLS_KEY")]
    tls_key: Option<PathBuf>,
    /// Name in the server's certificate, instead of the host in --server
    #[arg(long, global = true, value_name = "NAME", env = "TAPIO_TLS_SERVER_NAME")]
    tls_server_name: Option<String>,
    /// File with a token: that of server.auth.token_file, or one that server.auth.token_review accepts for queries
    #[arg(long, global = true, value_name = "FILE", env = "TAPIO_TOKEN_FILE")]
    token_file: Option<PathBuf>,
}

impl Access {
    /// What may be wrong where a connection broke after its handshake: in TLS 1.3 a client learns only then, and not always in
    /// words, that the server wants its certificate.
    fn hint(&self) -> &'static str {
        match (&self.tls_ca, &self.tls_cert) {
            (Some(_), None) => "; if it wants certificates of its clients, show one with --tls-cert and --tls-key",
            _ => "",
        }
    }
}

/// The status of all servers.
pub async fn status(client: &mut Client, server: &ServerAt) -> Result<StatusResponse, Failure> {
    let answer = client.status(StatusRequest::default()).await;
    let status = answer.map_err(|status| Failure::of(server, &status))?.into_inner();
    server.lacks(&status.incomplete)?;
    Ok(status)
}

/// Connects to the first of the servers that answers. A name stands for all addresses that it has.
pub async fn connect(server: &ServerAt, with_timeout: bool) -> Result<Client, Failure> {
    Ok(reach(server, with_timeout).await?.client)
}

/// The same, to say of what nobody is notified.
pub async fn connect_silences(server: &ServerAt) -> Result<Silences, Failure> {
    Ok(reach(server, true).await?.silences)
}

async fn reach(server: &ServerAt, with_timeout: bool) -> Result<Reached, Failure> {
    let mut failures: Vec<String> = Vec::new();
    let names = server.addresses();
    for name in &names {
        let target = Target::of(name, &server.access, with_timeout)?;
        let addresses: Vec<SocketAddr> = match tokio::net::lookup_host((target.host.as_str(), target.port)).await {
            Ok(addresses) => addresses.collect(),
            Err(error) => {
                failures.push(format!("{name}: {error}"));
                continue;
            }
        };
        if addresses.is_empty() {
            failures.push(format!("{name}: the name has no address"));
        }
        let is_only = names.len() == 1 && addresses.len() == 1;
        server.has_others.store(!is_only, Ordering::Relaxed);
        for address in &addresses {
            let answered = async {
                let reached =
                    target.reach(*address, if is_only { CONNECT_TIMEOUT } else { NEXT_SERVER_TIMEOUT }).await?;
                first_answer(reached, server, is_only).await
            };
            let shown = match addresses.len() {
                1 => (*name).to_owned(),
                _ => format!("{name} ({})", address.ip()),
            };
            match answered.await {
                Ok(reached) => return Ok(reached),
                Err(NoAnswer::Reason(reason)) => failures.push(format!("{shown}: {reason}")),
                Err(NoAnswer::Failure(Failure::Unreachable(reason))) => failures.push(reason),
                Err(NoAnswer::Failure(failure)) => return Err(failure),
            }
        }
    }
    match failures.is_empty() {
        true => Err(Failure::Usage("--server names no address".into())),
        false => Err(Failure::Unreachable(failures.join("\n  nor at "))),
    }
}

/// A connection.
struct Reached {
    client: Client,
    silences: Silences,
    health: HealthClient<InterceptedService<Channel, Bearer>>,
}

/// Why an address cannot be used.
enum NoAnswer {
    /// The next one may do.
    Reason(String),
    Failure(Failure),
}

/// Asks for the server's health. Every answer of a gRPC server will do, also that it has no such service or wants a token.
async fn first_answer(mut reached: Reached, server: &ServerAt, is_only: bool) -> Result<Reached, NoAnswer> {
    let patience = if is_only { FIRST_ANSWER_TIMEOUT } else { NEXT_SERVER_TIMEOUT };
    let asked = reached.health.check(HealthCheckRequest::default());
    let reason = match tokio::time::timeout(patience, asked).await {
        Ok(Ok(_)) => return Ok(reached),
        Ok(Err(status)) if is_of_server(&status) => return Ok(reached),
        Ok(Err(status)) if is_only => return Err(NoAnswer::Failure(Failure::of(server, &status))),
        Ok(Err(status)) => format!("it does not speak gRPC, or went away ({})", innermost(&status)),
        Err(_) => format!(
            "it did not answer within {} s, though the connection was made: it is stopped or overloaded",
            patience.as_secs()
        ),
    };
    Err(NoAnswer::Reason(reason))
}

/// Whether a gRPC server said it, and not the connection.
fn is_of_server(status: &tonic::Status) -> bool {
    status.source().is_none() && !status.message().contains("grpc-status header missing")
}

/// The port of an address, which a URL's parser leaves out where it is none.
fn port_of(uri: &tonic::transport::Uri) -> Result<u16, String> {
    let written = uri.authority().and_then(|authority| authority.as_str().rsplit_once(':'));
    match (uri.port_u16(), written) {
        (Some(0), _) => Err("port 0 is out of range: 1 to 65535".into()),
        (Some(port), _) => Ok(port),
        (None, Some((_, port))) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => {
            Err(format!("port `{port}` is out of range: 1 to 65535"))
        }
        (None, _) => Ok(if uri.scheme_str() == Some("https") { 443 } else { 80 }),
    }
}

/// One of the servers that --server names.
struct Target {
    host: String,
    port: u16,
    endpoint: Endpoint,
    tls: Option<Arc<Watched<ClientFiles>>>,
    token: Option<Arc<TokenFile>>,
}

impl Target {
    fn of(server: &str, access: &Access, with_timeout: bool) -> Result<Self, Failure> {
        let url = if server.contains("://") { server.to_owned() } else { format!("http://{server}") };
        let wrong = |problem: String| Failure::Usage(format!("\"{server}\" is no address: {problem}"));
        let uri: tonic::transport::Uri = url.parse().map_err(|error| wrong(format!("{error}")))?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let port = port_of(&uri).map_err(wrong)?;
        let usage = |error: &dyn Error| Failure::Usage(error.to_string());
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
            // A watcher must notice that the server is gone, also when it closed no connection.
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(REQUEST_TIMEOUT)
            .keep_alive_while_idle(true);
        if with_timeout {
            endpoint = endpoint.timeout(REQUEST_TIMEOUT);
        }
        Ok(Self { host: host.to_owned(), port, endpoint, tls, token: token.map(Arc::new) })
    }

    async fn reach(&self, address: SocketAddr, timeout: Duration) -> Result<Reached, NoAnswer> {
        let endpoint = self.endpoint.clone().connect_timeout(timeout);
        let channel = dial::dial(&endpoint, address, self.tls.as_ref()).await.map_err(|error| {
            let causes = std::iter::successors(Some(&error as &dyn Error), |&error| error.source());
            NoAnswer::Reason(causes.last().map_or_else(String::new, ToString::to_string))
        })?;
        let health = HealthClient::with_interceptor(channel.clone(), Bearer(self.token.clone()));
        let silences = SilencesClient::with_interceptor(channel.clone(), Bearer(self.token.clone()));
        let client = QueryClient::with_interceptor(channel, Bearer(self.token.clone()));
        Ok(Reached { silences, client: client.max_decoding_message_size(ANSWER_BYTES_MAX), health })
    }
}
