//! Several servers, one answer: the log that all of them read.
//!
//! What enters: what this server's shards derive. What leaves: what every server derives, in one order, to this server's finder.
//! What must hold: no acknowledgement to a collector waits for the log. Without the log this server goes on by itself. The same
//! log gives the same findings on every server.
//!
//! ```text
//! shards ──► Outgoing ──► publisher ──► JetStream ──► reader ──► finder
//!                             └── while the log is away: the same entries, at once ──┘
//! ```

mod config;
mod connections;
mod coverage;
mod flight;
mod kept;
mod leader;
mod link;
mod log;
mod losses;
mod namesakes;
mod outgoing;
mod publisher;
mod reader;
mod running;
mod streams;

pub use config::{ClusterSection, ClusterTls};
pub(crate) use connections::Connections;
pub use coverage::Coverage;
pub(crate) use kept::{is_sound, read_all as read_kept};
pub use leader::{Leadership, Term, Timing};
pub use link::Link;
pub(crate) use log::MESSAGE_BYTES_MAX;
pub use log::{Log, LogError};
pub use losses::{ClusterLosses, Other};
pub use outgoing::Outgoing;
pub use running::{Cluster, Healer, register_idle};
pub use streams::Bucket;
