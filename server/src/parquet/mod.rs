//! The archive as Parquet, for SQL: tables that any engine reads.
//!
//! What enters: closed segments, and findings. What leaves: files of the tables of [`schema`] below a folder, one for each segment
//! and hour of its events. What must hold:
//!
//! - A file's name comes from its segment's content: whoever exports a segment, and however often, writes the same name.
//! - Each event of the segment is in one row, each loss in the ledger beside it ([`ledger`]).
//! - Memory does not grow with the segment, but for its distinct texts.
//!
//! ```text
//! <table>/cluster=<cluster>/date=2026-01-02/hour=03/<segment>-<content>.parquet
//! ```

mod curves;
mod deaths;
mod events;
mod export;
mod findings;
mod ledger;
mod names;
mod pages;
mod schema;
mod table;

use std::io;
use std::path::PathBuf;

pub use export::{Exported, Exporter, SegmentId};
pub use schema::{SCHEMA_VERSION, TABLES};
pub use table::{ColumnType, Table, Written, below};

use names::Catalog;
use pages::ChunkEncoder;
use table::{FileTarget, Texts};

/// Why something could not be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("{} cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} cannot be written: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("Parquet: {0}")]
    Parquet(#[from] parquet::errors::ParquetError),
}

/// What the tables of one segment have in common.
struct SegmentTables {
    place: FileTarget,
    texts: Texts,
    catalog: Catalog,
    encoder: ChunkEncoder,
    /// The text that the column `segment` has.
    segment: u32,
}
