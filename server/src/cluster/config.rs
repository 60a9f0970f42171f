//! `cluster:` of the server's configuration.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;
use tapio_wire::program::tls::ClientFiles;
use tapio_wire::program::units;

/// Addresses that are nowhere (RFC 5737, RFC 3849): the way to them is the machine's default route.
const ELSEWHERE_V4: &str = "192.0.2.1";
const ELSEWHERE_V6: &str = "2001:db8::1";

/// `cluster:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterSection {
    /// The cluster that these servers watch: in the names of the log's streams, so that one NATS may serve several clusters.
    pub name: String,
    /// Addresses of NATS with JetStream, separated by commas, that all servers share; empty: this server is the only one.
    #[schemars(example = "nats://tapio-nats.tapio-system.svc:4222")]
    pub url: String,
    /// A name of all servers, as of a headless Service: HOST or HOST:PORT. It is looked up where `cluster.url` is empty;
    /// log, `/readyz`, status and findings then name other servers.
    #[schemars(example = "tapio-server-headless")]
    pub headless: Option<String>,
    /// This server's name among the servers; default: the machine's name, which is the pod's.
    #[schemars(example = "tapio-server-0")]
    pub server: Option<String>,
    /// Where other servers reach this one's gRPC, HOST:PORT. Default: this machine's address towards NATS, or towards other
    /// networks where NATS has none yet, with the port of gRPC.
    #[schemars(example = "10.0.0.7:9090")]
    pub advertise: Option<String>,
    /// TLS to the other servers, where `server.tls_enabled` is set.
    #[serde(deserialize_with = "tapio_wire::program::yaml::named")]
    pub peer_tls: Option<ClientFiles>,
    /// Whether a server passes the asker's token on in the clear, to the addresses in the log, where `server.tls_enabled` is not
    /// set. Needs `server.auth.token_review` without `server.auth.token_file`.
    pub token_without_tls: bool,
    /// The user at NATS.
    #[schemars(example = &"tapio")]
    pub user: Option<String>,
    /// A file with the user's password; read again for each connection.
    #[schemars(example = "/etc/tapio/nats/password")]
    pub password_file: Option<PathBuf>,
    /// A credentials file of NATS (JWT and nkey), which counts instead of the user; read again when NATS refuses it.
    #[schemars(example = "/etc/tapio/nats/user.creds")]
    pub credentials_file: Option<PathBuf>,
    /// TLS to NATS.
    pub tls: ClusterTls,
    /// Copies of the log that NATS keeps, where NATS has several servers itself: 1, 3 or 5.
    pub replicas: usize,
    /// The log's size at the most; the oldest messages are deleted. It also keeps no more than twice the longest window.
    #[serde(deserialize_with = "units::bytes")]
    pub max_bytes: u64,
}

/// `cluster.tls:`
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterTls {
    /// The certificates of the CA that signs NATS' certificate; default: those of the machine.
    #[schemars(example = "/etc/tapio/nats/ca.pem")]
    pub ca: Option<PathBuf>,
    /// Client certificate chain, for a NATS that asks for one.
    #[schemars(example = "/etc/tapio/nats/server.pem")]
    pub cert: Option<PathBuf>,
    /// Private key of the client certificate.
    #[schemars(example = "/etc/tapio/nats/server.key")]
    pub key: Option<PathBuf>,
}

impl Default for ClusterSection {
    fn default() -> Self {
        Self {
            name: "default".into(),
            url: String::new(),
            headless: None,
            server: None,
            advertise: None,
            peer_tls: None,
            token_without_tls: false,
            user: None,
            password_file: None,
            credentials_file: None,
            tls: ClusterTls::default(),
            replicas: 1,
            max_bytes: 1 << 30,
        }
    }
}

impl ClusterSection {
    /// Whether there is a log.
    pub fn is_on(&self) -> bool {
        !self.url.is_empty()
    }

    /// The addresses of NATS.
    pub fn urls(&self) -> Vec<&str> {
        self.url.split(',').map(str::trim).filter(|url| !url.is_empty()).collect()
    }

    /// Returns the URLs without the passwords that may be in them.
    pub fn urls_to_show(&self) -> String {
        let shown = |url: &str| {
            let (scheme, rest) = url.split_once("://").unwrap_or(("nats", url));
            format!("{scheme}://{}", rest.rsplit_once('@').map_or(rest, |(_, host)| host))
        };
        self.urls().into_iter().map(shown).collect::<Vec<_>>().join(",")
    }

    /// Where other servers reach this one, which listens at `listens`: an address that other machines can use where it is known.
    pub fn address(&self, listens: SocketAddr) -> String {
        if let Some(address) = &self.advertise {
            return address.clone();
        }
        if !listens.ip().is_unspecified() {
            return listens.to_string();
        }
        // Nothing is sent: the kernel chooses the address that it would send from.
        let towards = |host: &str, port: u16| {
            let socket = UdpSocket::bind((listens.ip(), 0)).ok()?;
            socket.connect((host, port)).ok()?;
            socket.local_addr().ok()
        };
        let nats = self.urls().into_iter().filter_map(|url| url.parse::<async_nats::ServerAddr>().ok());
        let towards_nats = nats.into_iter().find_map(|nats| towards(nats.host(), nats.port()));
        // Where both start together NATS may have no address yet, and this server must have one all the same.
        let elsewhere = if listens.is_ipv4() { ELSEWHERE_V4 } else { ELSEWHERE_V6 };
        let local = towards_nats.or_else(|| towards(elsewhere, 9));
        local.map_or_else(String::new, |local| SocketAddr::new(local.ip(), listens.port()).to_string())
    }

    /// Returns this server's name.
    pub fn server_name(&self) -> String {
        match &self.server {
            Some(name) => name.clone(),
            None => rustix::system::uname().nodename().to_string_lossy().into_owned(),
        }
    }

    /// Checks values that the types cannot: the key, and what it may be.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn validate(&self) -> Result<(), (&'static str, String)> {
        let is_name = |name: &str| {
            !name.is_empty()
                && name.len() <= 63
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        if !is_name(&self.name) {
            return Err(("cluster.name", format!("`{}`: letters, digits and - only, 63 at the most", self.name)));
        }
        if self.is_on() && self.urls().is_empty() {
            return Err(("cluster.url", format!("`{}` names no host: as nats://host:4222, or leave it out", self.url)));
        }
        for url in self.urls() {
            if let Err(problem) = nats_address(url) {
                return Err(("cluster.url", format!("`{url}` {problem}: as nats://host:4222")));
            }
        }
        if let Some(name) =
            self.headless.as_deref().filter(|name| !is_host_and_port(name) && !is_host_and_port(&format!("{name}:1")))
        {
            return Err(("cluster.headless", format!("`{name}` is no HOST or HOST:PORT: as tapio-server-headless")));
        }
        if let Some(address) = self.advertise.as_deref().filter(|address| !is_host_and_port(address)) {
            return Err((
                "cluster.advertise",
                format!("`{address}` is no HOST:PORT at which other servers reach this one: as 10.0.0.7:9090"),
            ));
        }
        if !self.is_on() {
            return Ok(());
        }
        if self.server_name().is_empty() {
            return Err(("cluster.server", "it is empty: set a name of letters, digits and -".into()));
        }
        if self.server_name().bytes().any(|byte| byte.is_ascii_whitespace() || b".*>".contains(&byte)) {
            return Err(("cluster.server", "no spaces, dots, * or >: set a name of letters, digits and -".into()));
        }
        if self.user.is_some() != self.password_file.is_some() {
            return Err(("cluster.user", "needs cluster.password_file, and the other way round".into()));
        }
        if self.tls.cert.is_some() != self.tls.key.is_some() {
            return Err(("cluster.tls", "name both cert and key, or neither".into()));
        }
        if ![1, 3, 5].contains(&self.replicas) {
            return Err(("cluster.replicas", format!("{}: 1, 3 or 5", self.replicas)));
        }
        if self.max_bytes < 16 << 20 {
            return Err(("cluster.max_bytes", format!("{} is less than 16MiB", self.max_bytes)));
        }
        Ok(())
    }
}

/// What is wrong with an address of NATS.
fn nats_address(url: &str) -> Result<(), String> {
    let address: async_nats::ServerAddr = url.parse().map_err(|error| format!("is no address of NATS ({error})"))?;
    match url.split_once("://").map_or("nats", |(scheme, _)| scheme) {
        "nats" | "tls" => {}
        _ => return Err("begins with neither nats:// nor tls://".into()),
    }
    match (address.host(), address.port()) {
        ("", _) => Err("names no host".into()),
        (_, 0) => Err("has port 0".into()),
        _ => Ok(()),
    }
}

/// Whether other machines can connect there: an address that is not `0.0.0.0`, or a host's name, and a port.
fn is_host_and_port(address: &str) -> bool {
    if let Ok(address) = address.parse::<SocketAddr>() {
        return !address.ip().is_unspecified() && address.port() != 0;
    }
    let Some((host, port)) = address.rsplit_once(':') else { return false };
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    // What is all digits and dots is an address, and not one that could be read.
    let is_name = host.strip_suffix('.').unwrap_or(host).split('.').all(is_label)
        && host.bytes().any(|byte| byte.is_ascii_alphabetic());
    is_name && host.len() <= 253 && port.parse::<u16>().is_ok_and(|port| port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unreachable_address_is_refused_with_its_key() {
        let section = |address: &str| ClusterSection { advertise: Some(address.into()), ..ClusterSection::default() };
        for good in ["10.0.0.7:9090", "[2001:db8::7]:9090", "tapio-0.tapio.svc:9090", "node_1:1", "localhost:9090"] {
            assert_eq!(section(good).validate(), Ok(()), "{good}");
        }
        let bad = ["nonsense", "", ":9090", "host:", "host:0", "host:70000", "0.0.0.0:9090", "[::]:9090", "::1:9090"];
        for address in bad.into_iter().chain(["http://host:9090", "10.0.0:9090", "a b:9090", "a..b:9090"]) {
            let (key, error) = section(address).validate().expect_err(address);
            assert!(key == "cluster.advertise" && error.contains("HOST:PORT"), "{key}: {error}");
        }
    }

    #[test]
    fn a_password_in_an_address_of_nats_is_not_shown() {
        let url = "nats://user:secret@one:4222, two:4222".to_owned();
        let section = ClusterSection { url, ..ClusterSection::default() };
        assert_eq!(section.urls_to_show(), "nats://one:4222,nats://two:4222");
    }

    #[test]
    fn a_server_that_starts_before_nats_has_an_address() {
        let section = |url: &str| ClusterSection { url: url.into(), ..ClusterSection::default() };
        let listens: SocketAddr = "0.0.0.0:9090".parse().expect("an address");
        assert_eq!(section("nats://127.0.0.1:4222").address(listens), "127.0.0.1:9090");
        let default_route = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
        if !default_route.lines().any(|line| line.split_whitespace().nth(1) == Some("00000000")) {
            assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "this machine has no default route");
            eprintln!("SKIP: this machine has no default route");
            return;
        }
        let address = section("nats://nats.invalid:4222").address(listens);
        let address: SocketAddr = address.parse().unwrap_or_else(|_| panic!("`{address}` is nowhere"));
        assert!(!address.ip().is_unspecified() && address.port() == 9090, "{address}");
    }
}
