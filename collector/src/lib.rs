//! The collector: gathers events on a node and ships them. `main.rs` chooses exit codes, `pipeline.rs` wires threads and
//! queues; everything else is a library so that tests can use it.
#![forbid(unsafe_code)]

pub mod books;
pub mod config;
pub mod conntrack;
pub mod decode;
pub mod endpoints;
pub mod epochs;
pub mod evidence;
pub mod governor;
pub mod health;
mod host;
pub mod identity;
pub mod intake;
pub mod latency;
pub mod log_limit;
pub mod metrics;
mod nap;
pub mod outbox;
pub mod pack;
pub mod pipeline;
pub mod probe_report;
pub mod queue;
pub mod redact;
pub mod reload;
pub mod shared;
pub mod shift;
pub mod ship;
pub mod source;
pub mod spool;
pub mod thresholds;
