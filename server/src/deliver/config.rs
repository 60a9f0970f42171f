//! `deliver:` of the server's configuration.

use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;
use schemars::JsonSchema;
use serde::Deserialize;
use tapio_wire::program::tls::ClientFiles;
use tapio_wire::program::units;

/// `deliver:`
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DeliverSection {
    /// Where findings are sent, each version of each finding at least once, by the server that leads.
    pub webhook: Option<WebhookSection>,
}

/// `deliver.webhook:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WebhookSection {
    /// Where findings are posted as JSON, `http://` or `https://`.
    #[schemars(example = "https://alerts.example.com/tapio")]
    pub url: String,
    /// A file with a token that is sent as `authorization: Bearer …`, over TLS only; read anew for each delivery.
    #[schemars(example = "/etc/tapio/webhook/token")]
    pub token_file: Option<PathBuf>,
    /// TLS to an `https://` address.
    pub tls: Option<ClientFiles>,
    /// How long the receiver may take to answer.
    #[serde(deserialize_with = "units::duration")]
    pub timeout: Duration,
}

impl Default for WebhookSection {
    fn default() -> Self {
        Self { url: String::new(), token_file: None, tls: None, timeout: Duration::from_secs(10) }
    }
}

/// Where a webhook's receiver listens.
pub(super) struct Address {
    pub host: String,
    pub port: u16,
    pub has_tls: bool,
    /// The path, and what follows it.
    pub path: String,
    /// For the header `host`.
    pub authority: String,
}

impl WebhookSection {
    pub(super) fn address(&self) -> Result<Address, String> {
        let wrong = |why: &str| format!("`{}` {why}: as https://host/path", self.url);
        let uri: Uri = self.url.parse().map_err(|_| wrong("is no address"))?;
        let has_tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(wrong("begins with neither http:// nor https://")),
        };
        let authority = uri.authority().ok_or_else(|| wrong("names no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("must not hold a password; use deliver.webhook.token_file"));
        }
        Ok(Address {
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: uri.port_u16().unwrap_or(if has_tls { 443 } else { 80 }),
            has_tls,
            path: uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
            authority: authority.as_str().to_owned(),
        })
    }
}

impl DeliverSection {
    /// Checks values that the types cannot: the key, and what it may be.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn validate(&self) -> Result<(), (&'static str, String)> {
        let Some(webhook) = &self.webhook else { return Ok(()) };
        let address = webhook.address().map_err(|problem| ("deliver.webhook.url", problem))?;
        let has_ca = webhook.tls.as_ref().is_some_and(|tls| !tls.ca.as_os_str().is_empty());
        if address.has_tls && !has_ca {
            return Err(("deliver.webhook.tls", "https:// needs ca, the certificates of the receiver's CA".into()));
        }
        if !address.has_tls && webhook.tls.is_some() {
            return Err((
                "deliver.webhook.tls",
                "without https:// in deliver.webhook.url it would have no effect".into(),
            ));
        }
        if webhook.tls.as_ref().is_some_and(|tls| tls.cert.is_some() != tls.key.is_some()) {
            return Err(("deliver.webhook.tls", "name both cert and key, or neither".into()));
        }
        if !address.has_tls && webhook.token_file.is_some() {
            return Err(("deliver.webhook.token_file", "a token is not sent in the clear: use https://".into()));
        }
        if !(Duration::from_millis(100)..=Duration::from_secs(60)).contains(&webhook.timeout) {
            return Err(("deliver.webhook.timeout", "from 100ms to 1m".into()));
        }
        Ok(())
    }
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
            ("webhook: {url: 'https://a/b'}", "deliver.webhook.tls", "needs ca"),
            ("webhook: {url: 'http://a/b', tls: {ca: /ca.pem}}", "deliver.webhook.tls", "no effect"),
            (
                "webhook: {url: 'https://a/b', tls: {ca: /ca.pem, key: /key.pem}}",
                "deliver.webhook.tls",
                "both cert and key",
            ),
            ("webhook: {url: 'http://a/b', token_file: /token}", "deliver.webhook.token_file", "in the clear"),
            ("webhook: {url: 'http://a/b', timeout: 0s}", "deliver.webhook.timeout", "from 100ms"),
        ] {
            let (wrong, said) = parse(text).expect_err(text);
            assert!(wrong == key && said.contains(problem), "{text}: {wrong}: {said}");
        }
    }

    #[test]
    fn a_webhook_may_be_anywhere_and_use_tls_and_token() {
        parse("{}").expect("no sink");
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
