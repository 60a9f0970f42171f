//! The collector: gathers events on a node and ships them. `main.rs` chooses exit codes, `pipeline.rs` wires threads and
//! queues; everything else is a library so that tests can use it.
//!
//! One folder for each stage. A stage uses those below it and never one above: `perf/lab/tidy.sh` has the order.
//!
//! ```text
//!   serve      /readyz, /metrics
//!   source     the kernel, shared memory, Kubernetes, systemd, evidence
//!   intake     records → events: identity, filters, batches
//!   ship       one stream to one server
//!   outbox     queues, packer, frames until the ack, spool
//!   budget     CPU and memory budgets
//!   settings   the configuration, and what changes of it at run time
//!   base       clocks, the ledger's books, metrics, host
//! ```
#![forbid(unsafe_code)]

pub mod base;
pub mod budget;
pub mod intake;
pub mod outbox;
pub mod pipeline;
pub mod serve;
pub mod settings;
pub mod ship;
pub mod source;
