//! Bounds that both sides of the wire keep, in one place, with the relations between them asserted.

/// Bytes of a frame on the wire and in the archive, header and ledger included.
pub const FRAME_BYTES_MAX: usize = 4 << 20;
/// Bytes of a frame's body before compression.
pub const RAW_BYTES_MAX: usize = 8 << 20;
/// Events in one frame.
pub const FRAME_EVENTS_MAX: usize = 65_536;
/// lz4 cannot expand a byte into more than this many: a literal run or match grows by at most 255 a byte. Rows expand less.
pub const EXPANSION_MAX: usize = 255;
/// Bytes of a gRPC message: a frame and its envelope.
pub const MESSAGE_BYTES_MAX: usize = FRAME_BYTES_MAX + 64;
/// Bytes of a node's name: a DNS subdomain name (RFC 1123).
pub const NODE_NAME_BYTES_MAX: usize = 253;
/// Whether a node may have this name.
pub fn is_node_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= NODE_NAME_BYTES_MAX && !name.chars().any(char::is_control)
}

/// How far a stream's sequence may be ahead of what is durable: more is a broken or hostile peer.
pub const SEQUENCE_AHEAD_MAX: u64 = 1 << 20;

const _: () = assert!(RAW_BYTES_MAX <= FRAME_BYTES_MAX * EXPANSION_MAX);
const _: () = assert!(FRAME_EVENTS_MAX * crate::event::ARCHIVED_EVENT_BYTES_MAX <= RAW_BYTES_MAX);

/// The metadata key in which a server that refuses an epoch as old names the newest that it knows, in decimal.
pub const NEWEST_EPOCH_KEY: &str = "tapio-newest-epoch";

/// The metadata key in which a server that refuses a stream for what a frame holds, or for its place in the sequence, says why in a
/// word. Without it the frame is not at fault.
pub const REFUSED_FRAME_KEY: &str = "tapio-refused-frame";
