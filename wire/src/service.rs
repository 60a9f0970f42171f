//! The gRPC services of `proto/tapio.proto`, generated at build time.

#![allow(missing_docs, reason = "generated; the proto file carries the documentation")]
#![allow(clippy::all, unused_qualifications, reason = "generated")]

tonic::include_proto!("tapio.v1");

/// The services' descriptors, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tapio.bin"));
