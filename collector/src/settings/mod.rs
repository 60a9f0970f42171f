//! The configuration, and what may change of it while the collector runs.

pub mod config;
pub mod log_limit;
pub mod reload;
pub mod thresholds;
