//! `tapio-perf`: loads Tapio, measures it, and makes faults for it to find.
//!
//! It knows the other programs from outside only: it starts the real binaries, feeds them through rings and cgroups, and
//! reads what they serve. The library part is what the end-to-end tests share with the program.

#![forbid(unsafe_code)]

pub mod capacity;
pub mod client;
pub mod clock;
pub mod error;
pub mod flood;
pub mod host;
pub mod ingest;
pub mod inject;
pub mod interrupt;
pub mod kubelet;
pub mod latency;
pub mod load;
pub mod probes;
pub mod processes;
pub mod query;
pub mod random;
pub mod storm;
pub mod troubles;
pub mod truth;

pub use error::Error;
