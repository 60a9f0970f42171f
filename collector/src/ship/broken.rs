//! Why there is no stream, or no longer.
//!
//! In: errors of connections, statuses of servers. Out: one reason, whose text says what to look at. What must hold: what a server
//! said is distinguished from what never reached one, and a frame's fault from everybody else's.

use std::error::Error;

use tapio_wire::limits::{NEWEST_EPOCH_KEY, REFUSED_FRAME_KEY};
use tapio_wire::program::dial::{ConnectFailed, TlsFailed};
use tonic::{Code, Status};

/// Why there is no stream, or no longer: what to look at is in the text.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("{0}; look at grpc.server_endpoints, at the Service of that name and at the cluster's DNS")]
    Resolve(String),
    #[error(
        "no TCP connection: {0}; is a server running there, and does a NetworkPolicy or firewall let this node reach it?"
    )]
    Connect(String),
    #[error("no TLS session: {0}")]
    Tls(String),
    #[error("no HTTP/2 connection: {0}; is this the server's gRPC port, and do both sides agree on tls_enabled?")]
    Http2(String),
    #[error(
        "the server refuses this collector: {} ({:?}); look at grpc.token_file and grpc.tls here, and at the server's auth",
        .0.message(), .0.code()
    )]
    Refused(Status),
    #[error("the server ended the stream: {} ({:?})", .0.message(), .0.code())]
    Status(Status),
    #[error("the connection to the server broke: {0}; look at the network between this node and the server's")]
    Lost(String),
    #[error("the server did not answer in time")]
    Silent,
    #[error("the server closed the stream")]
    Closed,
    #[error("the server does not speak the protocol: {0}")]
    Protocol(&'static str),
}

impl Broken {
    /// The name in [`super::state::FAILURES`].
    pub fn name(&self) -> &'static str {
        match self {
            Self::Resolve(_) => "resolve",
            Self::Connect(_) => "connect",
            Self::Tls(_) => "tls",
            Self::Http2(_) => "http2",
            Self::Refused(_) => "refused",
            Self::Status(_) => "status",
            Self::Lost(_) => "lost",
            Self::Silent => "silent",
            Self::Closed => "closed",
            Self::Protocol(_) => "protocol",
        }
    }

    /// What broke before the server said a word may be no HTTP/2 connection at all.
    pub fn before_welcome(status: Status) -> Self {
        match Self::from(status) {
            Self::Lost(text) => Self::Http2(text),
            other => other,
        }
    }

    /// Whether a server has refused what it was sent.
    pub fn is_about_frame(&self) -> bool {
        matches!(self, Self::Status(status) if status.code() == Code::InvalidArgument)
    }

    /// Whether the server says that any other would refuse this frame too.
    pub fn blames_frame(&self) -> bool {
        matches!(self, Self::Status(status) if status.metadata().contains_key(REFUSED_FRAME_KEY))
    }

    /// Whether a server does not take this collector, whatever it sends.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_))
    }
}

impl From<tonic::transport::Error> for Broken {
    fn from(error: tonic::transport::Error) -> Self {
        connection_error(&error)
    }
}

impl From<Status> for Broken {
    fn from(status: Status) -> Self {
        match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => Self::Refused(status),
            // One that has a cause was made here: no server said it.
            _ if status.source().is_some() => Self::Lost(with_causes(&status)),
            _ => Self::Status(status),
        }
    }
}

/// How the transport says that [`CONNECT_TIMEOUT`] ran out; its type is private.
const TIMED_OUT: &str = "deadline has elapsed";

/// What kept a connection from being made.
fn connection_error(error: &(dyn Error + 'static)) -> Broken {
    let text = with_causes(error);
    if has_cause::<TlsFailed>(error) {
        Broken::Tls(text)
    } else if has_cause::<ConnectFailed>(error) || text.contains(TIMED_OUT) {
        Broken::Connect(text)
    } else {
        Broken::Http2(text)
    }
}

/// Whether an error, or what an I/O error on its way wraps, is a `T`.
fn has_cause<T: Error + 'static>(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        if error.is::<T>() || wrapped.is_some_and(|wrapped| wrapped.is::<T>()) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The newest epoch that the server knows of this node, when it refused ours as older.
pub(super) fn newest_epoch(status: &Status) -> Option<u64> {
    status.metadata().get(NEWEST_EPOCH_KEY)?.to_str().ok()?.parse().ok()
}

fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
