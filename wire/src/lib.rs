//! What travels between Tapio's programs and lies in its archive: events, frames, segments, the ledger, the gRPC service.
//!
//! Bytes from the network or the disk become trusted in one place, [`frame::Frame::decode`], and the type carries that trust
//! inward. [`program`] holds what both programs need besides: configuration files, TLS, tokens, connections. This crate knows no
//! sibling.

pub mod compress;
pub mod error;
pub mod event;
pub mod frame;
pub mod ledger;
pub mod limits;
pub mod program;
mod rows;
pub mod segment;
pub mod service;
pub mod wait_status;

/// The node id that a node's name stands for: FNV-1a, 64 bits (draft-eastlake-fnv), so that any language can compute it.
pub fn node_id(name: &str) -> u64 {
    fnv1a(&[name.as_bytes()])
}

/// The id of an entity: FNV-1a, 64 bits, over the kind's name, a zero byte and the entity's key; never 0.
pub fn entity_id(kind: event::EntityKind, key: &str) -> event::EntityId {
    fnv1a(&[kind.name().as_bytes(), &[0], key.as_bytes()]).max(1)
}

/// The finalizer of splitmix64 (Steele, Lea and Flood 2014): every bit of the value changes about half of all bits.
#[inline]
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// What splitmix64 adds to its state for each number.
pub const MIX_STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// FNV-1a, 64 bits, over these parts one behind another.
pub fn fnv1a(parts: &[&[u8]]) -> u64 {
    parts
        .iter()
        .flat_map(|part| part.iter())
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
