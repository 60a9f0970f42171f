//! `deliver.otlp:` of the server's configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use hyper::header::{HeaderName, HeaderValue};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tapio_wire::program::tls::ClientFiles;
use tapio_wire::program::units;

use super::super::config::{Address, Keys, Wrong, address, check};
use super::super::only::OnlySection;

/// Where OTLP/HTTP takes log records, below a receiver's address.
const LOGS_PATH: &str = "/v1/logs";
const HEADERS_MAX: usize = 16;
/// Headers that the server sets by itself, or that say how a message is read.
const OWN_HEADERS: [&str; 9] = [
    "authorization",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "host",
    "te",
    "transfer-encoding",
    "user-agent",
];

/// How OTLP is spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OtlpProtocol {
    /// OTLP over gRPC, mostly at port 4317.
    #[default]
    Grpc,
    /// OTLP over HTTP with protobuf, mostly at port 4318; `/v1/logs` is added to the address.
    Http,
}

/// `deliver.otlp:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OtlpSection {
    /// Where the receiver listens, `http://` or `https://`, without `/v1/logs`.
    #[schemars(example = "https://otel-collector.monitoring:4317")]
    pub url: String,
    /// `grpc` or `http`.
    pub protocol: OtlpProtocol,
    /// A file with a token that is sent as `authorization: Bearer …`, over TLS only; read again for each delivery.
    #[schemars(example = "/etc/tapio/otlp/token")]
    pub token_file: Option<PathBuf>,
    /// Headers that each request has besides, such as a tenant's name. They are no place for secrets.
    #[schemars(example = BTreeMap::from([("x-scope-orgid", "platform")]))]
    pub headers: BTreeMap<String, String>,
    /// The findings that it gets.
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub only: OnlySection,
    /// TLS to an `https://` address; by default the machine's CAs are trusted.
    #[serde(deserialize_with = "tapio_wire::program::yaml::named")]
    pub tls: Option<ClientFiles>,
    /// How long the receiver may take to answer.
    #[serde(deserialize_with = "units::duration")]
    pub timeout: Duration,
    /// Where people reach this server's HTTP port: the address that a record links to.
    #[schemars(example = "https://tapio.example.com")]
    pub page_url: Option<String>,
}

impl Default for OtlpSection {
    fn default() -> Self {
        Self {
            url: String::new(),
            protocol: OtlpProtocol::default(),
            token_file: None,
            headers: BTreeMap::new(),
            only: OnlySection::default(),
            tls: None,
            timeout: Duration::from_secs(10),
            page_url: None,
        }
    }
}

impl OtlpSection {
    /// Where requests go; for HTTP with the path of log records.
    pub(super) fn address(&self) -> Result<Address, String> {
        let mut address = address(&self.url, "deliver.otlp.token_file")?;
        if address.path.contains('?') {
            // It may be a secret.
            let without = self.url.split('?').next().unwrap_or_default();
            return Err(format!("`{without}` must have no query"));
        }
        let path = address.path.trim_end_matches('/');
        address.path = match self.protocol {
            OtlpProtocol::Grpc if !path.is_empty() => {
                return Err(format!("`{}` must have no path, or `protocol` is `http`", self.url));
            }
            OtlpProtocol::Grpc => "/".into(),
            OtlpProtocol::Http if path.ends_with(LOGS_PATH) => path.to_owned(),
            OtlpProtocol::Http => format!("{path}{LOGS_PATH}"),
        };
        Ok(address)
    }

    pub(in super::super) fn validate(&self) -> Result<(), Wrong> {
        let to = self.address().map_err(|problem| ("deliver.otlp.url", problem))?;
        let keys =
            Keys { tls: "deliver.otlp.tls", token_file: "deliver.otlp.token_file", timeout: "deliver.otlp.timeout" };
        check(&keys, &[to], self.tls.as_ref(), self.token_file.as_ref(), self.timeout)?;
        if let Some(page) = &self.page_url {
            address(page, "nothing").map_err(|problem| ("deliver.otlp.page_url", problem))?;
        }
        if self.headers.len() > HEADERS_MAX {
            return Err(("deliver.otlp.headers", format!("at most {HEADERS_MAX} of them")));
        }
        match self.headers.iter().find_map(|(name, value)| wrong_header(name, value)) {
            Some(problem) => Err(("deliver.otlp.headers", problem)),
            None => Ok(()),
        }
    }
}

/// What is wrong with a header, for HTTP as for gRPC.
fn wrong_header(name: &str, value: &str) -> Option<String> {
    let is_lower = !name.bytes().any(|byte| byte.is_ascii_uppercase());
    if !is_lower || HeaderName::try_from(name).is_err() {
        return Some(format!("`{name}`: a header's name has small letters, digits and -"));
    }
    if name == "authorization" {
        return Some("`authorization`: use deliver.otlp.token_file".into());
    }
    if OWN_HEADERS.contains(&name) || name.starts_with("grpc-") || name.ends_with("-bin") {
        return Some(format!("`{name}`: the server sets it by itself, or gRPC reserves it"));
    }
    let is_text = HeaderValue::try_from(value).is_ok_and(|value| value.to_str().is_ok());
    (!is_text).then(|| format!("`{name}`: its value has characters that no header can hold"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> OtlpSection {
        tapio_wire::program::yaml::from_str(text).expect("good YAML")
    }

    #[test]
    fn what_cannot_be_sent_is_refused_with_its_key() {
        for (text, key, problem) in [
            ("{}", "deliver.otlp.url", "is no address"),
            ("{url: 'http://a:4317/v1/logs'}", "deliver.otlp.url", "must have no path"),
            ("{url: 'http://a?b', protocol: http}", "deliver.otlp.url", "no query"),
            ("{url: 'http://a', token_file: /t}", "deliver.otlp.token_file", "in the clear"),
            ("{url: 'http://a', tls: {ca: /c}}", "deliver.otlp.tls", "no effect"),
            ("{url: 'https://a', tls: {}}", "deliver.otlp.tls", "names no ca"),
            ("{url: 'http://a', timeout: 5m}", "deliver.otlp.timeout", "to 1m"),
            ("{url: 'http://a', page_url: a}", "deliver.otlp.page_url", "begins with"),
            ("{url: 'http://a', headers: {authorization: x}}", "deliver.otlp.headers", "token_file"),
            ("{url: 'http://a', headers: {Tenant: x}}", "deliver.otlp.headers", "small letters"),
            ("{url: 'http://a', headers: {'a b': x}}", "deliver.otlp.headers", "small letters"),
            ("{url: 'http://a', headers: {grpc-timeout: x}}", "deliver.otlp.headers", "reserves"),
            ("{url: 'http://a', headers: {host: x}}", "deliver.otlp.headers", "by itself"),
            ("{url: 'http://a', headers: {x: \"a\\nb\"}}", "deliver.otlp.headers", "no header can hold"),
        ] {
            let (wrong, said) = parse(text).validate().expect_err(text);
            assert!(wrong == key && said.contains(problem), "{text}: {wrong}: {said}");
        }
    }

    #[test]
    fn the_path_of_log_records_is_added_once() {
        for (url, path) in [
            ("http://a:4318", "/v1/logs"),
            ("http://a:4318/", "/v1/logs"),
            ("https://loki/otlp", "/otlp/v1/logs"),
            ("https://loki/otlp/v1/logs", "/otlp/v1/logs"),
        ] {
            let section = parse(&format!("{{url: '{url}', protocol: http, headers: {{x-scope-orgid: shop}}}}"));
            section.validate().expect(url);
            assert_eq!(section.address().expect(url).path, path);
        }
        assert_eq!(parse("{url: 'https://a:4317'}").address().expect("good").path, "/");
    }
}
