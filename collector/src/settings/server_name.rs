//! A server as it is configured.

use std::net::IpAddr;
use std::str::FromStr;

/// A configured `host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerName {
    pub host: String,
    pub port: u16,
}

impl ServerName {
    /// Whether it is this machine, judged by the name.
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl FromStr for ServerName {
    /// A sentence that says what an endpoint looks like.
    type Err = String;

    fn from_str(endpoint: &str) -> Result<Self, String> {
        let problem = || format!("`{endpoint}` is no endpoint; write host:port, like tapio-server:9090");
        let with_scheme = if endpoint.contains("://") { endpoint.to_string() } else { format!("http://{endpoint}") };
        let uri: tonic::transport::Uri = with_scheme.parse().map_err(|_| problem())?;
        match (uri.host(), uri.port_u16()) {
            (Some(host), Some(port)) if !host.is_empty() && port != 0 => {
                Ok(Self { host: host.trim_matches(['[', ']']).to_owned(), port })
            }
            _ => Err(problem()),
        }
    }
}
