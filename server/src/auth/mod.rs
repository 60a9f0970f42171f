//! Who may do what: tokens, certificates, and the nodes that a stream may speak for.
//!
//! What enters: requests, as they come off the connection. What leaves: a [`Caller`] with each request that may go on, or a
//! [`Denied`] that says what to do. What must hold: where a token is configured nothing is returned without one, and what could
//! not be decided is refused. Who was let in and who was not is counted, and written to the audit log.
//!
//! ```text
//!  gRPC ──► gate ──┬──► shared token? ──► TokenReview (remembered for a while) ──► may it ship, may it query?
//!  HTTP ──► api ───┘                                                                │ Caller: identity, nodes
//!                                                 ingest: hello's node ◄── may_be ──┘
//! ```

mod audit;
mod certificate;
mod config;
mod gate;
mod review;
mod verdicts;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use prometheus::{IntCounterVec, Opts, Registry};
use rustls::pki_types::CertificateDer;
use tapio_wire::program::token::{TokenError, TokenFile};
use tonic::Status;

pub use crate::kube_client::KubeClientError;
pub use audit::{Audit, Record};
pub use certificate::CertificateNames;
pub use config::{AuthSection, NodeIdentity, Subject, TokenReviewSection};
pub use gate::{ASKED_BY, GateLayer};
use review::Unreviewed;

use review::Reviewer;

/// Bytes of a header with a token; more is something else.
const HEADER_BYTES_MAX: usize = 16 << 10;

/// Why nobody could be let in or kept out.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("server.auth.token_file: {0}")]
    Token(#[from] TokenError),
    #[error("server.auth.token_review: {0}")]
    Review(#[from] KubeClientError),
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// What a request wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Collectors' streams.
    Ship,
    /// Findings, events, status.
    Query,
    /// Health and reflection: whoever may do one of the others may do this.
    Other,
    /// To say of what nobody is notified.
    Silence,
}

impl Purpose {
    fn of_path(path: &str) -> Self {
        let mut parts = path.trim_start_matches('/').split('/');
        match (parts.next(), parts.next()) {
            (Some("tapio.v1.Ingest"), _) => Self::Ship,
            (Some("tapio.v1.Query"), _) | (Some("tapio.v1.Silences"), Some("ListSilences")) => Self::Query,
            (Some("tapio.v1.Silences"), _) => Self::Silence,
            _ => Self::Other,
        }
    }

    /// Name in metrics and the audit log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ship => "ship",
            Self::Query => "query",
            Self::Other => "other",
            Self::Silence => "silence",
        }
    }
}

/// Account to which the API server says a token belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub username: String,
    pub groups: Vec<String>,
    /// The node of the pod that it was made for.
    pub node: Option<String>,
}

impl Account {
    fn is_among(&self, subjects: &[Subject]) -> bool {
        subjects.iter().any(|subject| match subject {
            Subject::User(name) => *name == self.username,
            Subject::Group(name) => self.groups.contains(name),
        })
    }
}

/// Who sent a request that was let in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// A name for logs: an account, a certificate's common name, `shared token`, or empty for anyone.
    pub identity: String,
    /// The nodes for which it may ship; `None` for whichever it says.
    nodes: Option<Vec<String>>,
}

impl Caller {
    /// One that may ship for these nodes only.
    pub fn of_nodes(identity: &str, nodes: Vec<String>) -> Self {
        Self { identity: identity.into(), nodes: Some(nodes) }
    }

    /// Whether it may ship for a node.
    pub fn may_be(&self, node: &str) -> bool {
        self.nodes.as_ref().is_none_or(|nodes| nodes.iter().any(|name| name == node))
    }
}

/// Why a request was not let in. The text says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error(
        "the token is missing or wrong; set grpc.token_file of the collector (tapioctl: --token-file) to a file with the \
         content of server.auth.token_file"
    )]
    WrongToken,
    #[error(
        "the token is missing; set grpc.token_file of the collector (tapioctl: --token-file) to the file of a service account \
         token for the audience `{audience}`"
    )]
    NoToken { audience: String },
    #[error(
        "the token is not accepted by the API server: it is expired, revoked, or not for the audience `{audience}` \
         (server.auth.token_review.audience)"
    )]
    Refused { audience: String },
    #[error("{who} may not {}: server.auth.token_review.{key} does not name it", .purpose.name())]
    NotAllowed { who: String, purpose: Purpose, key: &'static str },
    #[error("server.auth.node_identity asks for {0}, and there is none that names a node")]
    NoNode(&'static str),
    #[error("the token cannot be reviewed now, so nobody is let in: {0}")]
    Unreviewed(#[from] Unreviewed),
}

impl Denied {
    /// A short constant for the metric's label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::WrongToken => "wrong_token",
            Self::NoToken { .. } => "no_token",
            Self::Refused { .. } => "refused_token",
            Self::NotAllowed { .. } => "not_allowed",
            Self::NoNode(_) => "no_node",
            Self::Unreviewed(_) => "unreviewed",
        }
    }

    /// Status for gRPC.
    pub fn status(&self) -> Status {
        let text = self.to_string();
        match self {
            Self::WrongToken | Self::NoToken { .. } | Self::Refused { .. } => Status::unauthenticated(text),
            Self::NotAllowed { .. } | Self::NoNode(_) => Status::permission_denied(text),
            Self::Unreviewed(_) => Status::unavailable(text),
        }
    }
}

/// What a request shows of its sender.
#[derive(Clone, Copy, Default)]
pub struct Shown<'a> {
    /// The header `authorization`.
    pub authorization: Option<&'a [u8]>,
    /// The certificate that its connection was made with.
    pub certificate: Option<&'a CertificateDer<'a>>,
    pub peer: Option<SocketAddr>,
}

/// Decides who may do what.
pub struct Auth {
    token: Option<TokenFile>,
    reviewer: Option<Reviewer>,
    node_identity: NodeIdentity,
    denied: IntCounterVec,
    audit: Audit,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("node_identity", &self.node_identity).finish_non_exhaustive()
    }
}

impl Auth {
    /// Opens the guard as configured. It does not ask the API server for anything yet.
    ///
    /// # Errors
    /// See [`AuthError`].
    pub async fn open(section: &AuthSection, registry: &Registry) -> Result<Self, AuthError> {
        let reviewer = match &section.token_review {
            Some(section) => Some(Reviewer::open(section.clone(), registry).await?),
            None => None,
        };
        let denied =
            Opts::new("tapio_server_denied_requests_total", "Requests that the server denied, by purpose and reason.");
        let denied = IntCounterVec::new(denied, &["purpose", "reason"])?;
        registry.register(Box::new(denied.clone()))?;
        Ok(Self {
            token: section.token_file.clone().map(TokenFile::load).transpose()?,
            reviewer,
            node_identity: section.node_identity,
            denied,
            audit: Audit::register(registry)?,
        })
    }

    /// Whether a request needs a token.
    pub fn wants_token(&self) -> bool {
        self.token.is_some() || self.reviewer.is_some()
    }

    /// The audit log.
    pub fn audit(&self) -> &Audit {
        &self.audit
    }

    /// Lets a request in, or says why not.
    ///
    /// # Errors
    /// See [`Denied`].
    pub async fn admit(&self, purpose: Purpose, shown: Shown<'_>) -> Result<Caller, Denied> {
        let admitted = self.decide(purpose, shown).await;
        if let Err(denied) = &admitted {
            self.denied.with_label_values(&[purpose.name(), denied.label()]).inc();
        }
        admitted
    }

    async fn decide(&self, purpose: Purpose, shown: Shown<'_>) -> Result<Caller, Denied> {
        let names = shown.certificate.map(CertificateNames::of).unwrap_or_default();
        let account = self.account(purpose, shown.authorization).await?;
        let mut identity = names.common.clone().map(|name| format!("CN={name}")).unwrap_or_default();
        let by_token = match &account {
            Token::NotAsked => "",
            Token::Shared => "shared token",
            Token::Reviewed(account) => &account.username,
        };
        if !identity.is_empty() && !by_token.is_empty() {
            identity.push_str(", ");
        }
        identity.push_str(by_token);
        let nodes = match purpose {
            Purpose::Ship => self.nodes(&names, &account)?,
            Purpose::Query | Purpose::Other | Purpose::Silence => None,
        };
        Ok(Caller { identity, nodes })
    }

    async fn account(&self, purpose: Purpose, authorization: Option<&[u8]>) -> Result<Token, Denied> {
        if !self.wants_token() {
            return Ok(Token::NotAsked);
        }
        if self.token.as_ref().is_some_and(|token| token.admits(authorization)) {
            return Ok(Token::Shared);
        }
        let Some(reviewer) = &self.reviewer else {
            return Err(Denied::WrongToken);
        };
        let section = reviewer.section();
        let header = authorization.filter(|header| header.len() <= HEADER_BYTES_MAX);
        let token = header.and_then(|header| std::str::from_utf8(header).ok()?.strip_prefix("Bearer "));
        let Some(token) = token.map(str::trim).filter(|token| !token.is_empty()) else {
            return Err(Denied::NoToken { audience: section.audience.clone() });
        };
        let Some(account) = reviewer.review(token).await? else {
            return Err(Denied::Refused { audience: section.audience.clone() });
        };
        let (is_allowed, key) = match purpose {
            Purpose::Ship => (account.is_among(&section.may_ship), "may_ship"),
            Purpose::Query => (account.is_among(&section.may_query), "may_query"),
            Purpose::Silence => (account.is_among(&section.may_silence), "may_silence"),
            Purpose::Other => {
                (account.is_among(&section.may_ship) || account.is_among(&section.may_query), "may_query")
            }
        };
        match is_allowed {
            true => Ok(Token::Reviewed(account)),
            false => Err(Denied::NotAllowed { who: account.username.clone(), purpose, key }),
        }
    }

    /// The nodes that a stream may claim; `None` for any.
    fn nodes(&self, names: &CertificateNames, account: &Token) -> Result<Option<Vec<String>>, Denied> {
        let of_token = match account {
            Token::Reviewed(account) => account.node.clone(),
            Token::NotAsked | Token::Shared => None,
        };
        let of_certificate = match self.node_identity {
            NodeIdentity::Certificate => match names.nodes() {
                nodes if nodes.is_empty() => return Err(Denied::NoNode("a certificate")),
                nodes => Some(nodes),
            },
            _ => names.node_user().map(|node| vec![node.to_owned()]),
        };
        if self.node_identity == NodeIdentity::Token && of_token.is_none() {
            return Err(Denied::NoNode("a token bound to a pod"));
        }
        Ok(match (of_certificate, of_token) {
            // Both are believed, so both must agree.
            (Some(nodes), Some(node)) => Some(nodes.into_iter().filter(|name| *name == node).collect()),
            (Some(nodes), None) => Some(nodes),
            (None, Some(node)) => Some(vec![node]),
            (None, None) => None,
        })
    }
}

/// What a request's token is.
enum Token {
    NotAsked,
    Shared,
    Reviewed(Arc<Account>),
}
