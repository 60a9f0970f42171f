//! The server: takes frames from collectors, archives them durably, correlates them and publishes findings.
//!
//! `main.rs` chooses exit codes, `pipeline.rs` wires threads and queues; everything else is a library so that tests and
//! benchmarks can use it.
#![forbid(unsafe_code)]

pub mod api;
pub mod archive;
pub mod auth;
pub mod budget;
pub mod cluster;
pub mod command;
pub mod config;
pub mod connection;
pub mod correlate;
pub mod deliver;
pub mod events;
pub mod findings;
pub mod http;
pub mod ingest;
pub mod kube_client;
pub mod metrics;
pub mod parquet;
pub mod pipeline;
pub mod query;
pub mod remote;
pub mod render;
pub mod silences;
pub mod tls;
pub mod vitals;
pub mod web;
