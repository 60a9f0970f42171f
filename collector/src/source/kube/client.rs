//! The way to the API server.
//!
//! What enters: the configuration, the service account's files or a kubeconfig. What leaves: requests' answers, or
//! [`Trouble`] that says what to do next. What must hold: nothing is retried here, so that the watches decide how long
//! they wait. After a 401 the client is recreated from its files, since kube reads a token file again only once a
//! minute.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::http;
use futures::StreamExt;
use futures::stream::BoxStream;
use kube::api::{ListParams, WatchParams};
use kube::client::ClientBuilder;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{Request, WatchEvent};
use kube::{Client, Config};
use tower::BoxError;
use tower::util::MapResultLayer;

use super::objects::{Object, Page};
use crate::settings::config::K8sSection;

/// What the source may do, for the manifests to grant: API group, resource, verbs. The Lease is needed in the collector's own
/// namespace only, everything else in the whole cluster.
pub const PERMISSIONS: &[(&str, &str, &[&str])] = &[
    ("", "pods", &["list", "watch"]),
    ("", "events", &["list", "watch"]),
    ("", "nodes", &["list", "watch"]),
    ("", "configmaps", &["list", "watch"]),
    ("", "secrets", &["list", "watch"]),
    ("", "services", &["list", "watch"]),
    ("", "endpoints", &["list", "watch"]),
    ("", "persistentvolumeclaims", &["list", "watch"]),
    ("apps", "deployments", &["list", "watch"]),
    ("apps", "replicasets", &["list", "watch"]),
    ("apps", "statefulsets", &["list", "watch"]),
    ("apps", "daemonsets", &["list", "watch"]),
    ("batch", "jobs", &["list", "watch"]),
    ("discovery.k8s.io", "endpointslices", &["list", "watch"]),
    ("autoscaling", "horizontalpodautoscalers", &["list", "watch"]),
    ("coordination.k8s.io", "leases", &["get", "create", "update"]),
];

/// Objects of one page of a list.
const PAGE_OBJECTS: u32 = 500;
/// How long a list may take before the connection is given up, each page.
const LIST_TIMEOUT: Duration = Duration::from_secs(60);
/// Time after which the API server ends a watch by itself.
pub const WATCH_TIMEOUT_S: u32 = 240;

/// Why there is no way to an API server.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error(
        "not in a cluster: {0}; set collectors.k8s.in_cluster to false to use KUBECONFIG or collectors.k8s.kubeconfig"
    )]
    NotInCluster(kube::config::InClusterError),
    #[error("no usable kubeconfig: {0}; set collectors.k8s.kubeconfig or KUBECONFIG")]
    Kubeconfig(#[from] kube::config::KubeconfigError),
    #[error("cannot make a client: {0}")]
    Client(#[from] kube::Error),
}

/// Why a request brought no answer, by what is to be done about it.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// List again.
    #[error("the resource version is too old")]
    Expired,
    /// Read the credentials again.
    #[error("401: the credentials are not accepted")]
    Unauthorized,
    #[error("403: {0}")]
    Forbidden(String),
    /// The API server has no such resource.
    #[error("404: there is no such resource")]
    Absent,
    /// Somebody else wrote the object in between.
    #[error("409: {0}")]
    Conflict(String),
    /// Wait, for as long as it says.
    #[error("{status}: the API server is busy")]
    Busy { status: u16, retry_after: Option<Duration> },
    #[error("an object could not be read: {0}")]
    Undecodable(String),
    #[error("{0}")]
    Broken(String),
}

impl Trouble {
    /// The name that metrics use.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden(_) => "forbidden",
            Self::Absent => "absent",
            Self::Conflict(_) => "conflict",
            Self::Busy { .. } => "busy",
            Self::Undecodable(_) => "undecodable",
            Self::Broken(_) => "broken",
        }
    }

    fn of_status(code: u16, reason: &str, message: &str) -> Self {
        match code {
            410 => Self::Expired,
            _ if reason == "Expired" || reason == "Gone" => Self::Expired,
            // A resource version that makes no sense to this server: another cluster's, or one out of a restored backup.
            400 => Self::Expired,
            401 => Self::Unauthorized,
            403 => Self::Forbidden(message.into()),
            404 => Self::Absent,
            409 => Self::Conflict(message.into()),
            429 | 500..=599 => Self::Busy { status: code, retry_after: None },
            _ => Self::Broken(format!("{code}: {message}")),
        }
    }
}

impl From<kube::Error> for Trouble {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::of_status(status.code, &status.reason, &status.message),
            kube::Error::SerdeError(error) => Self::Undecodable(error.to_string()),
            kube::Error::Service(error) => match error.downcast::<Refused>() {
                Ok(refused) => match refused.status {
                    401 => Self::Unauthorized,
                    status => Self::Busy { status, retry_after: refused.retry_after },
                },
                Err(error) => Self::Broken(error.to_string()),
            },
            error => Self::Broken(error.to_string()),
        }
    }
}

/// An answer whose headers matter, which kube would drop.
#[derive(Debug, thiserror::Error)]
#[error("the API server answered {status}")]
struct Refused {
    status: u16,
    retry_after: Option<Duration>,
}

fn refuse<B>(answer: Result<http::Response<B>, BoxError>) -> Result<http::Response<B>, BoxError> {
    let answer = answer?;
    let status = answer.status().as_u16();
    if !matches!(status, 401 | 429 | 500..=599) {
        return Ok(answer);
    }
    // RFC 9110: seconds, or a date, which no API server sends.
    let header = answer.headers().get(http::header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let retry_after = header.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
    Err(Box::new(Refused { status, retry_after }))
}

/// What is listed and watched.
#[derive(Clone, Debug)]
pub struct Resource {
    /// The name that people see: `pods`.
    pub what: &'static str,
    pub path: String,
    pub fields: Option<String>,
    /// Contents are not to be sent, only metadata.
    pub metadata_only: bool,
    /// Few objects: the first list may come from the API server's cache, in one page.
    pub is_small: bool,
}

impl Resource {
    /// All objects of the cluster at this path.
    pub fn new(what: &'static str, path: &str) -> Self {
        Self { what, path: path.into(), fields: None, metadata_only: false, is_small: false }
    }
}

/// Sends requests to the API server.
pub struct Access {
    section: K8sSection,
    client: RwLock<Client>,
}

impl Access {
    /// Finds the credentials. The API server is not asked for anything yet.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub async fn open(section: &K8sSection) -> Result<Arc<Self>, AccessError> {
        let client = connect(section).await?;
        Ok(Arc::new(Self { section: section.clone(), client: RwLock::new(client) }))
    }

    /// The client as of now.
    pub fn client(&self) -> Client {
        self.client.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the credentials again.
    pub async fn renew(&self) {
        match connect(&self.section).await {
            Ok(client) => *self.client.write().unwrap_or_else(PoisonError::into_inner) = client,
            Err(error) => tracing::warn!(%error, "cannot reload the credentials for the API server"),
        }
    }

    /// Reads one page of a list. `from_cache`: an answer from the API server's cache is enough.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub async fn list<T: Object>(
        &self,
        resource: &Resource,
        token: &str,
        from_cache: bool,
    ) -> Result<Page<T>, Trouble> {
        let mut params = ListParams { field_selector: resource.fields.clone(), ..ListParams::default() };
        if from_cache && resource.is_small {
            params = params.match_any();
        } else {
            params.limit = Some(PAGE_OBJECTS);
            params.continue_token = Some(token.to_owned()).filter(|token| !token.is_empty());
        }
        let request = Request::new(&*resource.path);
        let request = if resource.metadata_only { request.list_metadata(&params) } else { request.list(&params) };
        let request = request.map_err(|error| Trouble::Broken(error.to_string()))?;
        let client = self.client();
        match tokio::time::timeout(LIST_TIMEOUT, client.request(request)).await {
            Ok(page) => Ok(page?),
            Err(_) => Err(Trouble::Broken(format!("no answer within {} s", LIST_TIMEOUT.as_secs()))),
        }
    }

    /// Opens a watch from a resource version on.
    ///
    /// # Errors
    /// See [`Trouble`].
    pub async fn watch<T: Object>(
        &self,
        resource: &Resource,
        version: &str,
    ) -> Result<BoxStream<'static, Result<WatchEvent<T>, Trouble>>, Trouble> {
        let mut params = WatchParams::default().timeout(WATCH_TIMEOUT_S);
        params.field_selector.clone_from(&resource.fields);
        let request = Request::new(&*resource.path);
        let request = if resource.metadata_only {
            request.watch_metadata(&params, version)
        } else {
            request.watch(&params, version)
        };
        let request = request.map_err(|error| Trouble::Broken(error.to_string()))?;
        let client = self.client();
        let opened = tokio::time::timeout(LIST_TIMEOUT, client.request_events::<T>(request)).await;
        let stream = opened.map_err(|_| Trouble::Broken("no answer to a watch".into()))??;
        let stream = stream.map(|event| match event {
            Ok(WatchEvent::Error(status)) => Err(Trouble::of_status(status.code, &status.reason, &status.message)),
            Ok(event) => Ok(event),
            Err(error) => Err(error.into()),
        });
        Ok(stream.boxed())
    }
}

async fn connect(section: &K8sSection) -> Result<Client, AccessError> {
    let mut config = if section.in_cluster {
        Config::incluster().map_err(AccessError::NotInCluster)?
    } else {
        match &section.kubeconfig {
            Some(path) => {
                Config::from_custom_kubeconfig(Kubeconfig::read_from(path)?, &KubeConfigOptions::default()).await?
            }
            None => Config::from_kubeconfig(&KubeConfigOptions::default()).await?,
        }
    };
    config.default_retry = false;
    config.connect_timeout = Some(Duration::from_secs(10));
    let builder = ClientBuilder::try_from(config)?;
    Ok(builder.with_layer(&MapResultLayer::new(refuse)).build())
}
