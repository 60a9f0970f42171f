//! What every stage uses.

pub mod books;
pub mod clock;
pub(crate) mod host;
pub mod metrics;
pub mod status;
