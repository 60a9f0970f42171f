//! `deliver:` of the server's configuration.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tapio_wire::program::tls::ClientFiles;
use tapio_wire::program::units;

use super::only::OnlySection;
use super::otlp::OtlpSection;
use crate::findings::Severity;

/// `deliver:`
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DeliverSection {
    /// Where findings are sent, each version of each finding at least once, by the server that leads.
    #[serde(deserialize_with = "tapio_wire::program::yaml::named")]
    pub webhook: Option<WebhookSection>,
    /// Channels of chats that get findings as messages, by a name of yours. Their keys are `kind`, `url_file`, `only`, `per_minute`,
    /// `page_url`, `tls` and `timeout`: see notify.md.
    #[schemars(example = serde_json::json!({"oncall": {"kind": "slack", "url_file": "/etc/tapio/chats/oncall"}}))]
    pub chats: BTreeMap<String, ChatSection>,
    /// Alertmanagers that get each finding as an alert.
    #[serde(deserialize_with = "tapio_wire::program::yaml::named")]
    pub alertmanager: Option<AlertmanagerSection>,
    /// Events on the pods and workloads that findings are about, for `kubectl describe` and `kubectl get events`.
    #[serde(deserialize_with = "tapio_wire::program::yaml::named")]
    pub kubernetes_events: Option<KubernetesEventsSection>,
    /// A receiver of OTLP, such as an OpenTelemetry Collector, that gets findings as log records.
    #[serde(deserialize_with = "tapio_wire::program::yaml::named")]
    pub otlp: Option<OtlpSection>,
}

/// `deliver.kubernetes_events:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KubernetesEventsSection {
    /// Findings below it make no event: `info`, `low`, `medium`, `high` or `critical`.
    #[schemars(example = Severity::Medium)]
    pub severity: Severity,
    /// Outside of a cluster: how to reach the API server.
    #[schemars(example = "/etc/tapio/kubeconfig")]
    pub kubeconfig: Option<PathBuf>,
}

impl Default for KubernetesEventsSection {
    fn default() -> Self {
        Self { severity: Severity::Low, kubeconfig: None }
    }
}

/// `deliver.alertmanager:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AlertmanagerSection {
    /// Every instance of one Alertmanager, `http://` or `https://`; each gets all alerts.
    #[schemars(example = ["https://alertmanager.monitoring:9093"])]
    pub urls: Vec<String>,
    /// A file with a token that is sent as `authorization: Bearer …`, over TLS only; read again for each alert.
    #[schemars(example = "/etc/tapio/alertmanager/token")]
    pub token_file: Option<PathBuf>,
    /// The findings that it gets.
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub only: OnlySection,
    /// TLS to `https://` addresses; by default the machine's CAs are trusted.
    pub tls: Option<ClientFiles>,
    /// How long an instance may take to answer.
    #[serde(deserialize_with = "units::duration")]
    pub timeout: Duration,
    /// How often an alert that stands is sent again, so that an Alertmanager that lost it has it again.
    #[serde(deserialize_with = "units::duration")]
    pub repeat: Duration,
    /// How long a finding of an event, such as a death, fires. One of a state fires until the state is over.
    #[serde(deserialize_with = "units::duration")]
    pub fires_for: Duration,
    /// Labels that each alert has besides.
    #[schemars(example = BTreeMap::from([("team", "platform")]))]
    pub labels: BTreeMap<String, String>,
    /// Where people reach this server's HTTP port: the address that an alert links to.
    #[schemars(example = "https://tapio.example.com")]
    pub page_url: Option<String>,
}

impl Default for AlertmanagerSection {
    fn default() -> Self {
        Self {
            urls: Vec::new(),
            token_file: None,
            only: OnlySection::default(),
            tls: None,
            timeout: Duration::from_secs(10),
            repeat: Duration::from_secs(60),
            fires_for: Duration::from_secs(15 * 60),
            labels: BTreeMap::new(),
            page_url: None,
        }
    }
}

impl AlertmanagerSection {
    pub(super) fn addresses(&self) -> Result<Vec<Address>, String> {
        if self.urls.is_empty() {
            return Err("names no address: as [\"https://alertmanager.monitoring:9093\"]".into());
        }
        self.urls.iter().map(|url| address(url, "deliver.alertmanager.token_file")).collect()
    }
}

/// The kinds of chats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ChatKind {
    /// An incoming webhook of Slack.
    #[default]
    Slack,
    /// A Teams workflow that starts when a webhook request is received.
    Teams,
}

/// `deliver.chats.NAME:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ChatSection {
    /// What it is: `slack` or `teams`.
    pub kind: ChatKind,
    /// A file with the address to post to. Whoever knows that may write to the channel. It is read again for each message.
    #[schemars(example = "/etc/tapio/chats/oncall")]
    pub url_file: PathBuf,
    /// The findings that it gets.
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub only: OnlySection,
    /// Messages a minute; what comes faster waits.
    pub per_minute: u32,
    /// Where people reach this server's HTTP port: the address that a message links to.
    #[schemars(example = "https://tapio.example.com")]
    pub page_url: Option<String>,
    /// TLS to the address; by default the machine's CAs are trusted.
    #[serde(deserialize_with = "tapio_wire::program::yaml::named")]
    pub tls: Option<ClientFiles>,
    /// How long the chat may take to answer.
    #[serde(deserialize_with = "units::duration")]
    pub timeout: Duration,
}

impl Default for ChatSection {
    fn default() -> Self {
        Self {
            kind: ChatKind::default(),
            url_file: PathBuf::new(),
            only: OnlySection::default(),
            per_minute: 20,
            page_url: None,
            tls: None,
            timeout: Duration::from_secs(10),
        }
    }
}

impl ChatSection {
    fn validate(&self, name: &str) -> Result<(), Wrong> {
        let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if name.is_empty() || name.len() > CHAT_NAME_MAX || !name.bytes().all(is_plain) {
            let problem = format!("`{name}`: a name has 1 to {CHAT_NAME_MAX} small letters, digits and -");
            return Err(("deliver.chats", problem));
        }
        if self.url_file.as_os_str().is_empty() {
            return Err((
                "deliver.chats.*.url_file",
                format!("{name}: names no file; put the chat's address into one"),
            ));
        }
        if !PER_MINUTE.contains(&self.per_minute) {
            return Err(("deliver.chats.*.per_minute", format!("{name}: from 12 to 600")));
        }
        if let Some(page) = &self.page_url {
            address(page, "nothing").map_err(|problem| ("deliver.chats.*.page_url", format!("{name}: {problem}")))?;
        }
        check_files("deliver.chats.*.tls", self.tls.as_ref())?;
        check_timeout("deliver.chats.*.timeout", self.timeout)
    }
}

/// Letters of a chat's name, and how many chats there may be.
const CHAT_NAME_MAX: usize = 32;
const CHATS_MAX: usize = 16;
/// What may be set as messages a minute. Whoever waits for its turn holds the lease meanwhile.
const PER_MINUTE: RangeInclusive<u32> = 12..=600;

/// `deliver.webhook:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WebhookSection {
    /// Where findings are posted as JSON, `http://` or `https://`.
    #[schemars(example = "https://alerts.example.com/tapio")]
    pub url: String,
    /// A file with a token that is sent as `authorization: Bearer …`, over TLS only; read again for each delivery.
    #[schemars(example = "/etc/tapio/webhook/token")]
    pub token_file: Option<PathBuf>,
    /// A file with a key that signs each request: see `tapio-signature` in notify.md; read again for each delivery.
    #[schemars(example = "/etc/tapio/webhook/key")]
    pub signing_key_file: Option<PathBuf>,
    /// The findings that it gets.
    #[serde(deserialize_with = "tapio_wire::program::yaml::or_default")]
    pub only: OnlySection,
    /// TLS to an `https://` address; by default the machine's CAs are trusted.
    #[serde(deserialize_with = "tapio_wire::program::yaml::named")]
    pub tls: Option<ClientFiles>,
    /// How long the receiver may take to answer.
    #[serde(deserialize_with = "units::duration")]
    pub timeout: Duration,
}

impl Default for WebhookSection {
    fn default() -> Self {
        Self {
            url: String::new(),
            token_file: None,
            signing_key_file: None,
            only: OnlySection::default(),
            tls: None,
            timeout: Duration::from_secs(10),
        }
    }
}

/// Where a webhook's receiver listens.
pub(super) struct Address {
    pub host: String,
    pub port: u16,
    pub has_tls: bool,
    /// The path, and what follows it.
    pub path: String,
    /// Value of the header `host`.
    pub authority: String,
}

impl WebhookSection {
    pub(super) fn address(&self) -> Result<Address, String> {
        address(&self.url, "deliver.webhook.token_file")
    }
}

pub(super) fn address(url: &str, token_key: &str) -> Result<Address, String> {
    let wrong = |why: &str| format!("`{url}` {why}: as https://host/path");
    let uri: Uri = url.parse().map_err(|_| wrong("is no address"))?;
    let has_tls = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(wrong("begins with neither http:// nor https://")),
    };
    let authority = uri.authority().filter(|authority| !authority.host().is_empty());
    let authority = authority.ok_or_else(|| wrong("names no host"))?;
    if uri.port_u16() == Some(0) {
        return Err(wrong("has port 0"));
    }
    if authority.as_str().contains('@') {
        return Err(wrong(&format!("must not hold a password; use {token_key}")));
    }
    Ok(Address {
        host: authority.host().trim_matches(['[', ']']).to_owned(),
        port: uri.port_u16().unwrap_or(if has_tls { 443 } else { 80 }),
        has_tls,
        path: uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
        authority: authority.as_str().to_owned(),
    })
}

/// A key and what is wrong with it.
pub(super) type Wrong = (&'static str, String);

/// The keys of one sink, for messages.
pub(super) struct Keys {
    pub tls: &'static str,
    pub token_file: &'static str,
    pub timeout: &'static str,
}

/// Checks how a receiver is reached.
pub(super) fn check(
    keys: &Keys,
    addresses: &[Address],
    tls: Option<&ClientFiles>,
    token_file: Option<&PathBuf>,
    timeout: Duration,
) -> Result<(), Wrong> {
    if addresses.iter().all(|address| !address.has_tls) && tls.is_some() {
        return Err((keys.tls, "without an https:// address it would have no effect".into()));
    }
    check_files(keys.tls, tls)?;
    if addresses.iter().any(|address| !address.has_tls) && token_file.is_some() {
        return Err((keys.token_file, "a token is not sent in the clear: use https://".into()));
    }
    check_timeout(keys.timeout, timeout)
}

fn check_files(key: &'static str, tls: Option<&ClientFiles>) -> Result<(), Wrong> {
    match tls {
        Some(tls) if tls.ca.as_os_str().is_empty() => Err((
            key,
            "names no ca, the certificates of the receiver's CA; without tls the machine's CAs are trusted".into(),
        )),
        Some(tls) if tls.cert.is_some() != tls.key.is_some() => Err((key, "name both cert and key, or neither".into())),
        _ => Ok(()),
    }
}

fn check_timeout(key: &'static str, timeout: Duration) -> Result<(), Wrong> {
    match (Duration::from_millis(100)..=Duration::from_secs(60)).contains(&timeout) {
        true => Ok(()),
        false => Err((key, "from 100ms to 1m".into())),
    }
}

impl DeliverSection {
    /// Checks values that the types cannot: the key, and what it may be.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn validate(&self) -> Result<(), Wrong> {
        if let Some(webhook) = &self.webhook {
            let address = webhook.address().map_err(|problem| ("deliver.webhook.url", problem))?;
            let keys = Keys {
                tls: "deliver.webhook.tls",
                token_file: "deliver.webhook.token_file",
                timeout: "deliver.webhook.timeout",
            };
            check(&keys, &[address], webhook.tls.as_ref(), webhook.token_file.as_ref(), webhook.timeout)?;
        }
        if self.chats.len() > CHATS_MAX {
            return Err(("deliver.chats", format!("at most {CHATS_MAX} of them")));
        }
        for (name, chat) in &self.chats {
            chat.validate(name)?;
        }
        if let Some(otlp) = &self.otlp {
            otlp.validate()?;
        }
        let Some(alerts) = &self.alertmanager else { return Ok(()) };
        let addresses = alerts.addresses().map_err(|problem| ("deliver.alertmanager.urls", problem))?;
        let keys = Keys {
            tls: "deliver.alertmanager.tls",
            token_file: "deliver.alertmanager.token_file",
            timeout: "deliver.alertmanager.timeout",
        };
        check(&keys, &addresses, alerts.tls.as_ref(), alerts.token_file.as_ref(), alerts.timeout)?;
        if !(Duration::from_secs(1)..=Duration::from_secs(3600)).contains(&alerts.repeat) {
            return Err(("deliver.alertmanager.repeat", "from 1s to 1h".into()));
        }
        if !(Duration::from_secs(1)..=Duration::from_secs(7 * 24 * 3600)).contains(&alerts.fires_for) {
            return Err(("deliver.alertmanager.fires_for", "from 1s to 7d".into()));
        }
        if let Some(page) = &alerts.page_url {
            address(page, "nothing").map_err(|problem| ("deliver.alertmanager.page_url", problem))?;
        }
        match alerts.labels.keys().find(|name| !is_label(name)) {
            Some(name) => {
                Err(("deliver.alertmanager.labels", format!("`{name}`: letters, digits and _, no digit first")))
            }
            None => Ok(()),
        }
    }
}

fn is_label(name: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
    name.bytes().next().is_some_and(is_letter) && name.bytes().all(|byte| is_letter(byte) || byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(), (&'static str, String)> {
        let section: DeliverSection = tapio_wire::program::yaml::from_str(text).expect("good YAML");
        section.validate()
    }

    #[test]
    fn an_impossible_webhook_is_refused_with_what_is_possible() {
        for (text, key, problem) in [
            ("webhook: {}", "deliver.webhook.url", "is no address"),
            ("webhook: {url: 'ftp://a/b'}", "deliver.webhook.url", "begins with neither"),
            ("webhook: {url: 'https://user:word@a/b'}", "deliver.webhook.url", "must not hold a password"),
            ("webhook: {url: 'https://a/b', tls: {cert: /c.pem, key: /k.pem}}", "deliver.webhook.tls", "names no ca"),
            ("chats: {On Call: {url_file: /a}}", "deliver.chats", "small letters"),
            ("chats: {oncall: {}}", "deliver.chats.*.url_file", "oncall: names no file"),
            ("chats: {oncall: {url_file: /a, per_minute: 1}}", "deliver.chats.*.per_minute", "from 12"),
            ("chats: {oncall: {url_file: /a, page_url: x}}", "deliver.chats.*.page_url", "begins with"),
            ("chats: {oncall: {url_file: /a, tls: {}}}", "deliver.chats.*.tls", "names no ca"),
            ("webhook: {url: 'http://a/b', tls: {ca: /ca.pem}}", "deliver.webhook.tls", "no effect"),
            (
                "webhook: {url: 'https://a/b', tls: {ca: /ca.pem, key: /key.pem}}",
                "deliver.webhook.tls",
                "both cert and key",
            ),
            ("webhook: {url: 'http://a/b', token_file: /token}", "deliver.webhook.token_file", "in the clear"),
            ("webhook: {url: 'http://a/b', timeout: 0s}", "deliver.webhook.timeout", "from 100ms"),
            ("alertmanager: {}", "deliver.alertmanager.urls", "names no address"),
            ("alertmanager: {urls: ['http://a', 'ftp://b']}", "deliver.alertmanager.urls", "begins with neither"),
            ("alertmanager: {urls: ['http://a'], repeat: 0s}", "deliver.alertmanager.repeat", "from 1s"),
            ("alertmanager: {urls: ['http://a'], labels: {9a: b}}", "deliver.alertmanager.labels", "no digit first"),
            ("alertmanager: {urls: ['http://a'], page_url: 'x'}", "deliver.alertmanager.page_url", "begins with"),
        ] {
            let (wrong, said) = parse(text).expect_err(text);
            assert!(wrong == key && said.contains(problem), "{text}: {wrong}: {said}");
        }
    }

    #[test]
    fn a_webhook_may_be_anywhere_and_use_tls_and_token() {
        parse("{}").expect("no sink");
        parse("webhook: {url: 'https://a/b'}").expect("the machine's CAs");
        parse("chats: {oncall: {kind: teams, url_file: /a, only: {severity: high}}}").expect("a chat");
        for (url, host, port, path) in [
            ("http://[::1]:8080", "::1", 8080, "/"),
            ("http://a/b?c=d", "a", 80, "/b?c=d"),
            ("https://a/b", "a", 443, "/b"),
        ] {
            let tls = if url.starts_with("https") { ", token_file: /token, tls: {ca: /ca.pem}" } else { "" };
            parse(&format!("webhook: {{url: '{url}'{tls}}}")).unwrap_or_else(|error| panic!("{url}: {error:?}"));
            let address = WebhookSection { url: url.into(), ..WebhookSection::default() }.address().expect(url);
            assert_eq!((address.host.as_str(), address.port, address.path.as_str()), (host, port, path));
        }
    }
}
