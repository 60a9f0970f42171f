//! `server.auth:` who may connect, beyond what TLS says.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tapio_wire::program::units;

/// What the user names of service accounts begin with; namespace, colon and name follow.
pub(super) const ACCOUNT_PREFIX: &str = "system:serviceaccount:";

/// The section `server.auth:` of the configuration.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AuthSection {
    /// A token that admits to everything, which all clients share: what a request carries as `authorization: Bearer …`. The
    /// file may change at any time.
    #[schemars(example = "/etc/tapio/token")]
    pub token_file: Option<PathBuf>,
    /// Tokens of Kubernetes, about which the API server is asked. A section whose keys are all comments asks by its defaults.
    #[serde(deserialize_with = "named")]
    pub token_review: Option<TokenReviewSection>,
    /// What says which node a stream ships for.
    pub node_identity: NodeIdentity,
}

/// A section that is named and empty must not leave a server open: it has its defaults.
fn named<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<TokenReviewSection>, D::Error> {
    Ok(Some(Option::deserialize(deserializer)?.unwrap_or_default()))
}

/// `server.auth.token_review:`
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TokenReviewSection {
    /// The audience that a token must have been made for.
    pub audience: String,
    /// Who may ship: `namespace/name` of service accounts, `user:NAME`, `group:NAME`.
    #[schemars(with = "Vec<String>")]
    pub may_ship: Vec<Subject>,
    /// Who may query, named likewise.
    #[schemars(with = "Vec<String>", example = ["monitoring/tapioctl"])]
    pub may_query: Vec<Subject>,
    /// Who may silence and acknowledge findings, named likewise; others may not, though they may query.
    #[schemars(with = "Vec<String>", example = ["user:jane@example.com", "group:oncall"])]
    pub may_silence: Vec<Subject>,
    /// How long a good token is not asked about again.
    #[serde(deserialize_with = "units::duration")]
    pub ttl: Duration,
    /// How long a refused token is not reviewed again.
    #[serde(deserialize_with = "units::duration")]
    pub refused_ttl: Duration,
    /// Outside of a cluster: how to reach the API server.
    #[schemars(example = "/etc/tapio/kubeconfig")]
    pub kubeconfig: Option<PathBuf>,
}

impl Default for TokenReviewSection {
    fn default() -> Self {
        Self {
            audience: "tapio".into(),
            may_ship: vec![Subject::account("tapio-system", "tapio-collector")],
            may_query: Vec::new(),
            may_silence: Vec::new(),
            ttl: Duration::from_secs(60),
            refused_ttl: Duration::from_secs(10),
            kubeconfig: None,
        }
    }
}

/// What says which node a stream ships for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NodeIdentity {
    /// Token and certificate; else the hello.
    #[default]
    Auto,
    /// A name in the client's certificate.
    Certificate,
    /// The node of the token's pod.
    Token,
}

/// Somebody in a list of those who may: `namespace/name` of a service account, `user:NAME` or `group:NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    User(String),
    Group(String),
}

impl Subject {
    /// A service account.
    pub fn account(namespace: &str, name: &str) -> Self {
        Self::User(format!("{ACCOUNT_PREFIX}{namespace}:{name}"))
    }

    fn parse(text: &str) -> Option<Self> {
        let subject = match (text.split_once(':'), text.split_once('/')) {
            (Some(("user", name)), _) => Self::User(name.into()),
            (Some(("group", name)), _) => Self::Group(name.into()),
            (None, Some((namespace, name))) if !namespace.is_empty() && !name.contains('/') => {
                Self::account(namespace, name)
            }
            _ => return None,
        };
        (!text.ends_with([':', '/'])).then_some(subject)
    }
}

/// Serializes a subject as it is written in a list; a service account by its user's name.
impl Serialize for Subject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = match self {
            Self::Group(name) => format!("group:{name}"),
            Self::User(name) => match name.strip_prefix(ACCOUNT_PREFIX).and_then(|account| account.split_once(':')) {
                Some((namespace, name)) => format!("{namespace}/{name}"),
                None => format!("user:{name}"),
            },
        };
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Subject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            D::Error::custom(format!(
                "`{text}` names nobody; write namespace/name of a service account, user:NAME or group:NAME"
            ))
        })
    }
}

impl AuthSection {
    /// Whether a request needs a token.
    pub fn wants_token(&self) -> bool {
        self.token_file.is_some() || self.token_review.is_some()
    }

    /// Checks values that the types cannot: the key and what is wrong with it.
    ///
    /// # Errors
    /// What may be instead.
    pub fn validate(&self, asks_for_certificates: bool) -> Result<(), (&'static str, String)> {
        if let Some(review) = &self.token_review {
            if review.audience.is_empty() {
                return Err(("server.auth.token_review.audience", "name the audience that tokens are made for".into()));
            }
            if review.may_ship.is_empty() && review.may_query.is_empty() {
                let problem = "may_ship and may_query are empty: nobody would be let in".into();
                return Err(("server.auth.token_review", problem));
            }
            let longest = Duration::from_secs(3600);
            if review.ttl > longest || review.refused_ttl > longest {
                return Err(("server.auth.token_review.ttl", "more than 1h would admit tokens long revoked".into()));
            }
        }
        match self.node_identity {
            NodeIdentity::Certificate if !asks_for_certificates => Err((
                "server.auth.node_identity",
                "certificate needs server.tls.client_ca, or no client has a certificate".into(),
            )),
            NodeIdentity::Token if self.token_review.is_none() => Err((
                "server.auth.node_identity",
                "token needs server.auth.token_review, or no token says where it runs".into(),
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_accounts_users_and_groups_and_nothing_else() {
        let account = Subject::User("system:serviceaccount:a:b".into());
        for (text, subject) in [
            ("a/b", Some(account)),
            ("user:jane@example.com", Some(Subject::User("jane@example.com".into()))),
            ("group:system:masters", Some(Subject::Group("system:masters".into()))),
            ("a", None),
            ("a/", None),
            ("/b", None),
            ("a/b/c", None),
            ("user:", None),
            ("role:x", None),
        ] {
            assert_eq!(Subject::parse(text), subject, "{text}");
            if let Some(subject) = subject {
                assert_eq!(serde_json::to_value(&subject).expect("a string"), text);
            }
        }
    }
}
