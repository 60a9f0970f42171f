//! `archive.remote:` of the server's configuration.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;
use tapio_wire::program::units;

/// `archive.remote:`
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RemoteSection {
    /// Where closed segments are uploaded: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix` or
    /// `file:///folder`. Several clusters and servers may share it.
    #[schemars(example = &"s3://tapio-archive/production")]
    pub url: String,
    /// The cluster's name in the names of objects; default: `cluster.name`.
    #[schemars(example = "production-eu")]
    pub cluster: Option<String>,
    /// This server's name there, a different one for each server; default: `cluster.server`, or the machine's name.
    #[schemars(example = "tapio-server-0")]
    pub server: Option<String>,
    /// The open segment is closed after this when it has events, so that no older ones are on this disk alone.
    #[serde(deserialize_with = "units::duration")]
    pub every: Duration,
    /// Whether tables in Parquet are written there too, for SQL (docs/sql.md): events, deaths, curves, the ledger, findings.
    pub parquet: bool,
    /// Bytes a second that uploads may take; 0 for no limit.
    #[serde(deserialize_with = "units::bytes")]
    pub max_bytes_per_sec: u64,
    /// What this server may keep, in `archive.dir`, of segments that it fetches for requests about the past; 0 to answer from
    /// its own disk alone.
    #[serde(deserialize_with = "units::bytes")]
    pub cache_bytes: u64,
    /// The service's address, where it is not the provider's own: of MinIO, Ceph and the like.
    #[schemars(example = "https://minio.example.com:9000")]
    pub endpoint: Option<String>,
    /// The bucket's region, for `s3://`; default: `AWS_REGION`, or us-east-1.
    #[schemars(example = "eu-central-1")]
    pub region: Option<String>,
    /// Whether `endpoint` may be `http://`: events then travel in the clear.
    pub allow_http: bool,
    /// A file with credentials, instead of the environment and web identity. S3 (read for each request): `aws_access_key_id = …`
    /// and `aws_secret_access_key = …`. Google: the account's JSON. Azure: the key.
    #[schemars(example = "/etc/tapio/remote/credentials")]
    pub credentials_file: Option<PathBuf>,
    /// The certificates of the CA that signs the service's certificate; default: those of the machine.
    #[schemars(example = "/etc/tapio/remote/ca.pem")]
    pub ca: Option<PathBuf>,
}

impl Default for RemoteSection {
    fn default() -> Self {
        Self {
            url: String::new(),
            cluster: None,
            server: None,
            every: Duration::from_secs(300),
            parquet: false,
            max_bytes_per_sec: 0,
            cache_bytes: 512 << 20,
            endpoint: None,
            region: None,
            allow_http: false,
            credentials_file: None,
            ca: None,
        }
    }
}

/// The kinds of service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    S3,
    Google,
    Azure,
    Folder,
}

/// A URL's parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteUrl {
    pub service: Service,
    /// The bucket or container; empty for a folder.
    pub bucket: String,
    /// The prefix or the folder's path, without slashes at its ends.
    pub prefix: String,
}

impl RemoteUrl {
    /// Reads a URL.
    ///
    /// # Errors
    /// What is wrong, and what it may be.
    pub fn parse(url: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            format!("`{url}` {why}: as s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///folder")
        };
        let (scheme, rest) = url.split_once("://").ok_or_else(|| wrong("is no address"))?;
        let service = match scheme {
            "s3" => Service::S3,
            "gs" => Service::Google,
            "az" => Service::Azure,
            "file" => Service::Folder,
            _ => return Err(wrong("begins with none of s3://, gs://, az://, file://")),
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        match service {
            Service::Folder if !bucket.is_empty() => return Err(wrong("names a host")),
            Service::Folder if prefix.trim_matches('/').is_empty() => return Err(wrong("names no folder")),
            Service::Folder => {}
            _ if bucket.is_empty() => return Err(wrong("names no bucket")),
            _ if bucket.contains(['@', '?', '#']) => {
                return Err(wrong("must hold no credentials; use the environment or archive.remote.credentials_file"));
            }
            _ => {}
        }
        let prefix = prefix.trim_matches('/').to_owned();
        if object_store::path::Path::parse(&prefix).is_err() || prefix.contains(['?', '#', '%', '*']) {
            return Err(wrong("has a prefix that cannot be part of an object's name"));
        }
        Ok(Self { service, bucket: bucket.to_owned(), prefix })
    }
}

/// Whether a text names a remote archive, and not a folder of this machine.
pub fn is_url(text: &str) -> bool {
    text.contains("://")
}

/// Whether it can be a part of an object's name.
pub fn is_name(name: &str) -> bool {
    let is_fine = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !name.is_empty() && name.len() <= 128 && !name.starts_with('.') && name.bytes().all(is_fine)
}

impl RemoteSection {
    /// Checks values that the types cannot: the key, and what it may be.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn validate(&self, server_name: &str) -> Result<(), (&'static str, String)> {
        let place = RemoteUrl::parse(&self.url).map_err(|problem| ("archive.remote.url", problem))?;
        for (key, name) in [("archive.remote.cluster", &self.cluster), ("archive.remote.server", &self.server)] {
            if let Some(name) = name.as_deref().filter(|name| !is_name(name)) {
                return Err((key, format!("`{name}`: letters, digits, -, _ and . only, 128 at the most")));
            }
        }
        if self.server.is_none() && !is_name(server_name) {
            let problem = format!("`{server_name}` is no name for it: set one of letters, digits, -, _ and .");
            return Err(("archive.remote.server", problem));
        }
        if self.max_bytes_per_sec != 0 && self.max_bytes_per_sec < 64 << 10 {
            return Err((
                "archive.remote.max_bytes_per_sec",
                format!(
                    "{} would take hours for one segment; 0 for no limit, or 64KiB and more",
                    self.max_bytes_per_sec
                ),
            ));
        }
        let (is_folder, is_s3) = (place.service == Service::Folder, place.service == Service::S3);
        let no_effect = "it has no effect with this archive.remote.url";
        for (key, has_no_effect) in [
            ("archive.remote.endpoint", is_folder && self.endpoint.is_some()),
            ("archive.remote.region", !is_s3 && self.region.is_some()),
            ("archive.remote.allow_http", is_folder && self.allow_http),
            ("archive.remote.credentials_file", is_folder && self.credentials_file.is_some()),
            ("archive.remote.ca", is_folder && self.ca.is_some()),
        ] {
            if has_no_effect {
                return Err((key, no_effect.to_owned()));
            }
        }
        match self.endpoint.as_deref().map(|endpoint| endpoint.split_once("://")) {
            None => Ok(()),
            Some(Some((_, host))) if host.is_empty() || host.starts_with(['/', ':']) => {
                Err(("archive.remote.endpoint", "it names no host: as https://host:9000".to_owned()))
            }
            Some(Some(("https", _))) => Ok(()),
            Some(Some(("http", _))) if self.allow_http => Ok(()),
            Some(Some(("http", _))) => {
                Err(("archive.remote.endpoint", "http:// needs archive.remote.allow_http: true".to_owned()))
            }
            Some(_) => Err(("archive.remote.endpoint", "it is no address: as https://host:9000".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(), (&'static str, String)> {
        let section: RemoteSection = tapio_wire::program::yaml::from_str(text).expect("good YAML");
        section.validate("server-0")
    }

    #[test]
    fn an_impossible_remote_is_refused_with_what_is_possible() {
        for (text, key, problem) in [
            ("{}", "url", "is no address"),
            ("url: /var/archive", "url", "is no address"),
            ("url: ftp://bucket", "url", "none of s3://"),
            ("url: s3:///prefix", "url", "names no bucket"),
            ("url: s3://key:secret@bucket/prefix", "url", "no credentials"),
            ("url: file://host/folder", "url", "names a host"),
            ("url: file:///", "url", "names no folder"),
            ("url: s3://bucket/a//b", "url", "object's name"),
            ("{url: s3://bucket, cluster: a/b}", "cluster", "letters, digits"),
            ("{url: s3://bucket, server: ''}", "server", "letters, digits"),
            ("{url: s3://bucket, max_bytes_per_sec: 1KiB}", "max_bytes_per_sec", "64KiB"),
            ("{url: s3://bucket, endpoint: 'http://minio:9000'}", "endpoint", "allow_http"),
            ("{url: s3://bucket, endpoint: minio}", "endpoint", "is no address"),
            ("{url: 'file:///folder', endpoint: 'https://a'}", "endpoint", "no effect"),
            ("{url: gs://bucket, region: x}", "region", "no effect"),
            ("{url: 'file:///folder', allow_http: true}", "allow_http", "no effect"),
            ("{url: 'file:///folder', ca: /ca.pem}", "ca", "no effect"),
            ("{url: 'file:///folder', credentials_file: /c}", "credentials_file", "no effect"),
        ] {
            let (wrong, said) = parse(text).expect_err(text);
            assert!(wrong == format!("archive.remote.{key}") && said.contains(problem), "{text}: {wrong}: {said}");
        }
    }

    #[test]
    fn a_remote_may_be_of_any_provider_or_a_folder() {
        for (url, service, bucket, prefix) in [
            ("s3://bucket", Service::S3, "bucket", ""),
            ("s3://bucket/a/b/", Service::S3, "bucket", "a/b"),
            ("gs://bucket/a", Service::Google, "bucket", "a"),
            ("az://container/a", Service::Azure, "container", "a"),
            ("file:///var/backup/", Service::Folder, "", "var/backup"),
        ] {
            parse(&format!("url: {url}")).unwrap_or_else(|error| panic!("{url}: {error:?}"));
            let place = RemoteUrl { service, bucket: bucket.into(), prefix: prefix.into() };
            assert_eq!(RemoteUrl::parse(url), Ok(place));
        }
        parse("{url: s3://bucket, endpoint: 'http://127.0.0.1:9000', allow_http: true}").expect("accepted");
    }
}
