//! The configuration, and what may change of it while the collector runs.

pub mod config;
pub mod errnos;
pub mod live;
pub mod log_limit;
pub mod reload;
pub mod server_name;
pub mod severity;
pub mod thresholds;
