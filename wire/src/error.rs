//! What can be wrong with bytes from the network or the disk.

/// Why a frame was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {bytes} bytes is shorter than its header and what that declares")]
    Truncated { bytes: usize },
    #[error("a frame of {bytes} bytes exceeds the limit of {limit}")]
    TooLong { bytes: usize, limit: usize },
    #[error("these bytes do not start with a frame's magic")]
    NotAFrame,
    #[error(
        "frame version {version} is not supported; this build speaks {oldest} to {newest}: upgrade the servers first"
    )]
    Version { version: u16, oldest: u16, newest: u16 },
    #[error("the frame's header or ledger does not match its checksum")]
    HeaderChecksum,
    #[error("the frame's payload does not match its checksum")]
    PayloadChecksum,
    #[error(
        "the frame declares {raw} bytes of body, which {payload} bytes of payload cannot hold or the limit forbids"
    )]
    DeclaredSize { raw: u32, payload: u32 },
    #[error("the frame's payload cannot be decompressed to the declared size")]
    Compression,
    #[error("the frame's body is not a valid archive")]
    Archive,
    #[error("the frame's header contradicts its body: {what}")]
    Contradiction { what: &'static str },
    #[error("the frame's ledger names something unknown")]
    Ledger,
}

impl FrameError {
    /// A short constant for a metric's label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Truncated { .. } => "truncated",
            Self::TooLong { .. } => "too_long",
            Self::NotAFrame => "magic",
            Self::Version { .. } => "version",
            Self::HeaderChecksum => "header_checksum",
            Self::PayloadChecksum => "payload_checksum",
            Self::DeclaredSize { .. } => "declared_size",
            Self::Compression => "compression",
            Self::Archive => "archive",
            Self::Contradiction { .. } => "contradiction",
            Self::Ledger => "ledger",
        }
    }
}
