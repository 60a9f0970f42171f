//! An object store, by its URL.
//!
//! What enters: the section `archive.remote`, or a URL of the command line. What leaves: a store with this project's HTTP, and
//! the path below which its objects lie. What must hold: credentials come from the environment, web identity or a file, and
//! never from the URL.

use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AwsCredential};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, CredentialProvider, ObjectStore, RetryConfig};

use super::RemoteError;
use super::config::{RemoteSection, RemoteUrl, Service};
use super::connect::{Connector, Pace};

/// Requests are repeated so often by the store itself; after that it is the caller's turn.
const RETRIES: usize = 3;
const RETRY_LIMIT: Duration = Duration::from_secs(60);

/// A store and the path below which its objects lie.
#[derive(Clone, Debug)]
pub(super) struct Store {
    pub objects: Arc<dyn ObjectStore>,
    pub root: Path,
    /// Set for a folder of this machine: it must be there, since a mount that is not would be written beside.
    folder: Option<PathBuf>,
    pub pace: Arc<Pace>,
    /// The URL, for people.
    pub url: String,
}

impl Store {
    /// Nobody is connected to.
    pub fn open(section: &RemoteSection) -> Result<Self, RemoteError> {
        let place = RemoteUrl::parse(&section.url).map_err(RemoteError::Url)?;
        let pace = Arc::new(Pace::new(section.max_bytes_per_sec));
        let connector = Connector { ca: section.ca.clone(), pace: Arc::clone(&pace) };
        let failed = |source| RemoteError::Store { url: section.url.clone(), source };
        let retry = RetryConfig {
            max_retries: RETRIES,
            retry_timeout: RETRY_LIMIT,
            backoff: BackoffConfig { max_backoff: Duration::from_secs(2), ..BackoffConfig::default() },
        };
        let objects: Arc<dyn ObjectStore> = match place.service {
            Service::Folder => Arc::new(LocalFileSystem::new().with_fsync(true)),
            Service::S3 => {
                let mut builder = AmazonS3Builder::from_env().with_bucket_name(&place.bucket);
                if let Some(region) = &section.region {
                    builder = builder.with_region(region);
                }
                if let Some(endpoint) = &section.endpoint {
                    builder = builder.with_endpoint(endpoint);
                }
                if section.allow_http {
                    builder = builder.with_allow_http(true);
                }
                if let Some(path) = &section.credentials_file {
                    builder = builder.with_credentials(Arc::new(KeyFile { path: path.clone() }));
                }
                Arc::new(builder.with_retry(retry).with_http_connector(connector).build().map_err(failed)?)
            }
            Service::Google => {
                let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(&place.bucket);
                if let Some(endpoint) = &section.endpoint {
                    builder = builder.with_base_url(endpoint);
                }
                if section.allow_http {
                    builder = builder.with_client_options(ClientOptions::new().with_allow_http(true));
                }
                if let Some(path) = &section.credentials_file {
                    builder = builder.with_service_account_path(path.to_string_lossy());
                }
                Arc::new(builder.with_retry(retry).with_http_connector(connector).build().map_err(failed)?)
            }
            Service::Azure => {
                let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(&place.bucket);
                if let Some(endpoint) = &section.endpoint {
                    builder = builder.with_endpoint(endpoint.clone());
                }
                if section.allow_http {
                    builder = builder.with_allow_http(true);
                }
                if let Some(path) = &section.credentials_file {
                    let key = std::fs::read_to_string(path);
                    let key = key.map_err(|source| RemoteError::Credentials { path: path.clone(), source })?;
                    builder = builder.with_access_key(key.trim());
                }
                Arc::new(builder.with_retry(retry).with_http_connector(connector).build().map_err(failed)?)
            }
        };
        let folder = (place.service == Service::Folder).then(|| FilePath::new("/").join(&place.prefix));
        let root = Path::from(place.prefix);
        Ok(Self { objects, root, folder, pace, url: section.url.clone() })
    }

    /// Whether a body's pace is this program's to keep: it does not go through HTTP.
    pub fn is_folder(&self) -> bool {
        self.folder.is_some()
    }

    /// Fails when the folder is not there.
    pub fn check_folder(&self) -> Result<(), RemoteError> {
        match &self.folder {
            Some(folder) if !folder.is_dir() => Err(RemoteError::Folder { folder: folder.clone() }),
            _ => Ok(()),
        }
    }
}

/// Reads keys from a file each time, so that they may change.
#[derive(Debug)]
struct KeyFile {
    path: PathBuf,
}

#[async_trait::async_trait]
impl CredentialProvider for KeyFile {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| object_store::Error::Generic {
            store: "archive.remote.credentials_file",
            source,
        };
        let text = std::fs::read_to_string(&self.path);
        let text = text.map_err(|error| failed(format!("{}: {error}", self.path.display()).into()))?;
        keys(&text).map(Arc::new).ok_or_else(|| {
            let path = self.path.display();
            failed(format!("{path} lacks a line `aws_access_key_id = …` or `aws_secret_access_key = …`").into())
        })
    }
}

fn keys(text: &str) -> Option<AwsCredential> {
    let value = |name: &str| {
        let mut pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
    };
    Some(AwsCredential {
        key_id: value("aws_access_key_id")?,
        secret_key: value("aws_secret_access_key")?,
        token: value("aws_session_token"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_from_a_file_of_the_usual_form() {
        let found = keys("[default]\naws_access_key_id = a\naws_secret_access_key=b=c\n").expect("keys");
        assert_eq!((found.key_id.as_str(), found.secret_key.as_str(), found.token), ("a", "b=c", None));
        assert!(keys("[default]\naws_access_key_id = a\n").is_none());
    }

    #[test]
    fn every_kind_of_store_opens_without_a_connection() {
        for url in ["s3://bucket/a", "gs://bucket/a", "file:///nowhere/a"] {
            let section = RemoteSection { url: url.into(), ..RemoteSection::default() };
            let store = Store::open(&section).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert_eq!(store.check_folder().is_err(), url.starts_with("file"));
        }
        let section = RemoteSection { url: "az://container/a".into(), ..RemoteSection::default() };
        let error = Store::open(&section).expect_err("no account").to_string();
        assert!(error.contains("az://container/a"), "{error}");
    }
}
