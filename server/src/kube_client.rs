//! A way to the Kubernetes API server: from within the cluster, or by a kubeconfig.

use std::path::Path;
use std::time::Duration;

use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no way to the API server. `key` is the one that names the kubeconfig.
#[derive(Debug, thiserror::Error)]
pub enum KubeClientError {
    #[error("not in a cluster: {source}; outside of one set {key}")]
    NotInCluster { key: &'static str, source: kube::config::InClusterError },
    #[error("no usable kubeconfig: {source}; see {key}")]
    Kubeconfig { key: &'static str, source: kube::config::KubeconfigError },
    #[error("cannot make a client for the API server: {0}")]
    Client(#[from] kube::Error),
}

/// A client that repeats no request by itself. Nobody is connected to.
///
/// # Errors
/// See [`KubeClientError`].
pub async fn connect(kubeconfig: Option<&Path>, key: &'static str) -> Result<Client, KubeClientError> {
    let wrong = |source| KubeClientError::Kubeconfig { key, source };
    let mut config = match kubeconfig {
        Some(path) => {
            let kubeconfig = Kubeconfig::read_from(path).map_err(wrong)?;
            kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(wrong)?
        }
        None => kube::Config::incluster().map_err(|source| KubeClientError::NotInCluster { key, source })?,
    };
    config.default_retry = false;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    Ok(Client::try_from(config)?)
}
