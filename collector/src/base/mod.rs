//! What every stage uses.

pub mod books;
pub(crate) mod host;
pub mod latency;
