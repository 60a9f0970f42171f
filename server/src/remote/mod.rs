//! The archive in an object store: it outlives this server and its disk.
//!
//! What enters: closed segments. What leaves: the same bytes as objects, each with a manifest, and from there folders that the
//! archive's reader reads. What must hold:
//!
//! - Nothing here stands before an acknowledgement: the archive's thread only notes which segments are closed.
//! - A manifest is put last, and only where none is: an object without one is no segment. Only an erasure replaces one.
//! - Retention deletes a segment that is not uploaded for its size alone, and counts it (`archive/offsite.rs`).
//!
//! ```text
//! <prefix>/<cluster>/<server>/<life>/<number>-<first event>-<last event>-<sha-256>.segment    as it was closed
//! <prefix>/<cluster>/<server>/<life>/<number>.json                                           its manifest
//! ```
//!
//! A life is one archive directory: its name has the moment when it was first uploaded, and a random part. So a server whose
//! disk was replaced begins a new one, and so does one that finds other contents under its numbers.

mod accounting;
mod cache;
mod config;
mod connect;
mod erased_tables;
mod fetch;
mod history;
mod keeping;
mod lease;
mod life;
mod listing;
mod manifest;
mod metrics;
mod names;
mod past;
mod put;
mod ranges;
mod store;
mod table_writer;
mod tables;
mod uploader;

use std::io;
use std::path::PathBuf;

use crate::archive::holds::Hold;
use crate::parquet::ExportError;

pub use cache::View;
pub use config::{RemoteSection, is_name, is_url};
pub(crate) use connect::{machine_roots, trusting};
pub use erased_tables::rewrite as rewrite_tables;
pub use fetch::{CACHE_BYTES_DEFAULT, Fetch, Fetched};
pub use history::History;
pub use keeping::{ErasureReport, Keeping, erasable};
pub use listing::Label;
pub use manifest::{Manifest, NodeCount};
pub use metrics::RemoteMetrics;
pub use past::{Past, Read};
pub use table_writer::TableWriter;
pub use tables::{Mark, TableStore};
pub use uploader::{Names, Uploader};

/// Why the remote archive cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    #[error("{0}")]
    Url(String),
    #[error("{url} cannot be used: {source}")]
    Store { url: String, source: object_store::Error },
    #[error("{name}: {source}")]
    Object { name: String, source: object_store::Error },
    #[error("the folder {} is not there: make it, or mount what shall be there", folder.display())]
    Folder { folder: PathBuf },
    #[error("archive.remote.credentials_file: {}: {source}", path.display())]
    Credentials { path: PathBuf, source: io::Error },
    #[error("{}: {source}", path.display())]
    Local { path: PathBuf, source: io::Error },
    #[error("{url} holds no archive: give the URL that archive.remote.url names, or one below it")]
    Empty { url: String },
    #[error("{name} is no manifest that this version understands: {problem}")]
    Manifest { name: String, problem: String },
    #[error("{name} is not what its manifest says: {problem}")]
    Damaged { name: String, problem: String },
    #[error(
        "{needed} bytes are needed and the cache may have {allowed}: choose less with --since and --until, or give it more \
         with --cache-bytes"
    )]
    Cache { needed: u64, allowed: u64 },
    #[error("{server} has {found} under {name}, and this archive has something else: another server has its name")]
    Collision { server: String, name: String, found: String },
    #[error("{0}")]
    Usage(String),
    #[error("the remote archive is being worked on: {holder} holds it for {what} until {until}, or until that is done")]
    Busy { holder: String, what: String, until: String },
    #[error("the lease on the remote archive was lost to somebody else: run this again, and it goes on")]
    LeaseLost,
    #[error(
        "the legal hold {id} of {by} keeps this ({reason}): `tapio-server archive hold remove` ends it where it may be erased"
    )]
    Held { id: String, reason: String, by: String },
    #[error(
        "segment {number} has bytes that cannot be read, which the legal hold {id} may keep: nothing of it is erased before that \
         hold ends"
    )]
    Unread { number: u64, id: String },
    #[error("the thread that uploads cannot be started: {0}")]
    Thread(io::Error),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error("the remote archive's metrics cannot be created: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl RemoteError {
    /// A segment holds what cannot be read, and there is a legal hold.
    pub fn unread(number: u64, hold: &Hold) -> Self {
        Self::Unread { number, id: hold.id.clone() }
    }
}
