//! Asking the API server whether a token is good (`authentication.k8s.io/v1`, TokenReview).
//!
//! What enters: tokens of anyone who may connect. What leaves: whose they are, as the API server says it now or said it a moment
//! ago. What must hold: nobody is let in because the API server could not be asked. The questions at a time are bounded, so that
//! a flood of tokens does not become a flood of reviews.
//!
//! Kubernetes before 1.30 does not say in a review where the token's pod runs. Then this server gets the pod, which costs a
//! second question for each new token of somebody who may ship.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use kube::{Api, Client};
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::Account;
use super::config::{ACCOUNT_PREFIX, TokenReviewSection};
use super::verdicts::{self, Verdicts};
use crate::kube_client::{self, KubeClientError};

/// Reviews under way at a time.
const REVIEWS_MAX: usize = 32;
/// Requests that may wait for one of them.
const WAITING_MAX: usize = 2048;
/// How long a review may take, its wait included.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(8);
/// Where a token that is bound to a pod says which node the pod runs on (Kubernetes 1.30 and later).
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
/// Where it says which pod that is, in older versions too.
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Why a token was not reviewed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreviewed {
    #[error("too many tokens wait for a review")]
    Busy,
    #[error("the API server did not answer within {} s", REVIEW_TIMEOUT.as_secs())]
    Silent,
    #[error(
        "the API server does not let this server create tokenreviews.authentication.k8s.io ({0}): bind the ClusterRole \
         system:auth-delegator, or one with that verb, to its service account"
    )]
    Forbidden(String),
    #[error("{0}")]
    Failed(String),
}

/// What the reviews move.
struct ReviewMetrics {
    reviews: IntCounterVec,
    seconds: Histogram,
    hits: IntCounter,
    entries: IntGaugeVec,
    nodes_unknown: IntCounter,
}

impl ReviewMetrics {
    fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let reviews = Opts::new(
            "tapio_server_token_reviews_total",
            "Token reviews that the server requested from the Kubernetes API, by result; error: it gave no answer.",
        );
        let seconds = HistogramOpts::new(
            "tapio_server_token_review_seconds",
            "Time of a token review, including its wait for a free slot.",
        );
        let entries = Opts::new("tapio_server_token_review_cache_entries", "Token reviews in the cache, by result.");
        let metrics = Self {
            reviews: IntCounterVec::new(reviews, &["result"])?,
            seconds: Histogram::with_opts(seconds.buckets(prometheus::exponential_buckets(0.001, 2.0, 14)?))?,
            hits: IntCounter::new(
                "tapio_server_token_review_cache_hits_total",
                "Tokens whose review was in the cache.",
            )?,
            entries: IntGaugeVec::new(entries, &["result"])?,
            nodes_unknown: IntCounter::new(
                "tapio_server_token_nodes_unknown_total",
                "Accepted tokens whose node is unknown because RBAC denies reading their pod.",
            )?,
        };
        for result in ["accepted", "refused", "error"] {
            metrics.reviews.with_label_values(&[result]);
        }
        registry.register(Box::new(metrics.reviews.clone()))?;
        registry.register(Box::new(metrics.seconds.clone()))?;
        registry.register(Box::new(metrics.hits.clone()))?;
        registry.register(Box::new(metrics.entries.clone()))?;
        registry.register(Box::new(metrics.nodes_unknown.clone()))?;
        Ok(metrics)
    }
}

/// Asks the API server whether a token is good, by a TokenReview.
pub(super) struct Reviewer {
    section: TokenReviewSection,
    client: RwLock<Client>,
    verdicts: Mutex<Verdicts>,
    turns: Semaphore,
    waiting: AtomicUsize,
    /// Namespaces for which it was logged that their pods may not be read.
    logged: Mutex<HashSet<String>>,
    metrics: ReviewMetrics,
}

impl Reviewer {
    /// Finds the way to the API server, which is not asked for anything yet.
    pub async fn open(section: TokenReviewSection, registry: &Registry) -> Result<Self, super::AuthError> {
        let client = connect(&section).await?;
        Ok(Self {
            client: RwLock::new(client),
            verdicts: Mutex::new(Verdicts::new(section.ttl, section.refused_ttl)),
            turns: Semaphore::new(REVIEWS_MAX),
            waiting: AtomicUsize::new(0),
            logged: Mutex::default(),
            metrics: ReviewMetrics::register(registry)?,
            section,
        })
    }

    /// What is allowed to whom.
    pub fn section(&self) -> &TokenReviewSection {
        &self.section
    }

    /// Reviews a token and returns its account; `None` if it belongs to no account, or not to this audience.
    pub async fn review(&self, token: &str) -> Result<Option<Arc<Account>>, Unreviewed> {
        let key = verdicts::key(token);
        if let Some(verdict) = self.remembered(&key) {
            return Ok(verdict);
        }
        let _waiting = Waiting::enter(&self.waiting).ok_or(Unreviewed::Busy)?;
        let asked = Instant::now();
        let answer = timeout(REVIEW_TIMEOUT, async {
            // Never closed.
            let _turn = self.turns.acquire().await.map_err(|_| Unreviewed::Busy)?;
            // Another caller with the same token may have had the answer meanwhile.
            match self.remembered(&key) {
                Some(verdict) => Ok((verdict, false)),
                None => self.ask(token).await.map(|account| (account.map(Arc::new), true)),
            }
        });
        let answer = answer.await.unwrap_or(Err(Unreviewed::Silent));
        self.metrics.seconds.observe(asked.elapsed().as_secs_f64());
        let result = match &answer {
            Ok((_, false)) => None,
            Ok((Some(_), true)) => Some("accepted"),
            Ok((None, true)) => Some("refused"),
            Err(_) => Some("error"),
        };
        if let Some(result) = result {
            self.metrics.reviews.with_label_values(&[result]).inc();
        }
        let (verdict, is_new) = answer?;
        if is_new {
            let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
            verdicts.put(key, verdict.clone(), Instant::now());
            let (good, bad) = verdicts.len();
            self.metrics.entries.with_label_values(&["accepted"]).set(good as i64);
            self.metrics.entries.with_label_values(&["refused"]).set(bad as i64);
        }
        Ok(verdict)
    }

    fn remembered(&self, key: &verdicts::Key) -> Option<Option<Arc<Account>>> {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        let verdict = verdicts.get(key, Instant::now());
        if verdict.is_some() {
            self.metrics.hits.inc();
        }
        verdict
    }

    async fn ask(&self, token: &str) -> Result<Option<Account>, Unreviewed> {
        let spec = TokenReviewSpec { audiences: Some(vec![self.section.audience.clone()]), token: token.to_owned() };
        let review = TokenReview { spec, ..TokenReview::default() };
        let answer = match self.create(&review).await {
            // This server's own token has been replaced: kube reads it again only once a minute.
            Err(kube::Error::Api(status)) if status.code == 401 => {
                match connect(&self.section).await {
                    Ok(client) => *self.client.write().unwrap_or_else(PoisonError::into_inner) = client,
                    Err(error) => return Err(Unreviewed::Failed(error.to_string())),
                }
                self.create(&review).await
            }
            answer => answer,
        };
        let review = answer.map_err(|error| match error {
            kube::Error::Api(status) if status.code == 403 => Unreviewed::Forbidden(status.message.clone()),
            error => Unreviewed::Failed(error.to_string()),
        })?;
        let Some((mut account, pod)) = self.account_of(review) else { return Ok(None) };
        // Only who ships speaks for a node.
        if let Some(pod) = pod.filter(|_| account.node.is_none() && account.is_among(&self.section.may_ship)) {
            match self.node_of(&pod).await? {
                PodNode::Known(node) => account.node = Some(node),
                PodNode::Unknown => self.metrics.nodes_unknown.inc(),
                PodNode::Gone => return Ok(None),
            }
        }
        Ok(Some(account))
    }

    /// The node that a pod runs on. Where this server may not get pods it is unknown, as if the token were bound to none.
    async fn node_of(&self, pod: &PodRef) -> Result<PodNode, Unreviewed> {
        let client = self.client();
        match Api::<Pod>::namespaced(client, &pod.namespace).get(&pod.name).await {
            Ok(found) if found.metadata.uid.as_deref() == Some(&pod.uid) => {
                let node = found.spec.and_then(|spec| spec.node_name).filter(|node| !node.is_empty());
                // Nothing runs in a pod without a node: whoever shows its token is somewhere else.
                Ok(node.map_or(PodNode::Gone, PodNode::Known))
            }
            // Another one by that name: the token's own is gone, and the token with it.
            Ok(_) => Ok(PodNode::Gone),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(PodNode::Gone),
            Err(kube::Error::Api(status)) if status.code == 403 => {
                // As many namespaces as there are accounts that may ship.
                let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
                if logged.insert(pod.namespace.clone()) {
                    tracing::warn!(
                        reason = status.message,
                        "the nodes of tokens are not known: Kubernetes before 1.30 does not name them, and this server may \
                         not get the pods in namespace {}; deploy/server-deployment.yaml has the Role",
                        pod.namespace
                    );
                }
                Ok(PodNode::Unknown)
            }
            Err(error) => Err(Unreviewed::Failed(error.to_string())),
        }
    }

    fn client(&self) -> Client {
        self.client.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn create(&self, review: &TokenReview) -> Result<TokenReview, kube::Error> {
        Api::<TokenReview>::all(self.client()).create(&PostParams::default(), review).await
    }

    /// Returns the token's account, and the pod that it is bound to.
    fn account_of(&self, review: TokenReview) -> Option<(Account, Option<PodRef>)> {
        let status = review.status.filter(|status| status.authenticated == Some(true))?;
        // An authenticator that knows no audiences answers without: its tokens are for the API server, not for us.
        if !status.audiences.unwrap_or_default().contains(&self.section.audience) {
            return None;
        }
        let user = status.user?;
        let mut extra = user.extra.unwrap_or_default();
        let mut value_of = |key: &str| extra.remove(key).and_then(|mut names| names.pop());
        let username = user.username.filter(|name| !name.is_empty())?;
        let namespace = username.strip_prefix(ACCOUNT_PREFIX).and_then(|account| account.split_once(':'));
        let pod = match (namespace, value_of(POD_NAME), value_of(POD_UID)) {
            (Some((namespace, _)), Some(name), Some(uid)) => Some(PodRef { namespace: namespace.into(), name, uid }),
            _ => None,
        };
        Some((Account { node: value_of(NODE_NAME), groups: user.groups.unwrap_or_default(), username }, pod))
    }
}

/// A pod that a token is bound to.
struct PodRef {
    namespace: String,
    name: String,
    uid: String,
}

/// What there is to know of such a pod.
enum PodNode {
    Known(String),
    /// The server may not get pods there.
    Unknown,
    /// There is none by that name and uid, or it never ran.
    Gone,
}

/// A place among those who wait, given up when it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn enter(count: &'a AtomicUsize) -> Option<Self> {
        // Relaxed: it only counts.
        let place = Self(count);
        (count.fetch_add(1, Ordering::Relaxed) < WAITING_MAX).then_some(place)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn connect(section: &TokenReviewSection) -> Result<Client, KubeClientError> {
    kube_client::connect(section.kubeconfig.as_deref(), "server.auth.token_review.kubeconfig").await
}
