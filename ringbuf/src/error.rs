//! What can go wrong with a ring; each text says what to do.

use rustix::io::Errno;

/// An operation on a ring failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The kernel refused a system call.
    #[error("cannot {action}: {cause}; {advice}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What to look at.
        advice: &'static str,
        /// The kernel's answer.
        cause: Errno,
    },
    /// A size that no ring can have was asked for.
    #[error(
        "a ring cannot have {data_bytes} bytes of data: use a power of two from {page_bytes} (the page size) to 1 GiB"
    )]
    DataSize {
        /// The size asked for.
        data_bytes: usize,
        /// Bytes of a page on this machine.
        page_bytes: usize,
    },
    /// What a peer offered does not meet the conditions for being mapped; nothing of it was used.
    #[error("the peer's descriptor is refused: {0}")]
    Refused(Refusal),
    /// The ring's bytes violate its layout; the reader hands out nothing more.
    #[error(
        "the ring is corrupt at position {position}: {what}; drop this reader and have the producer start a new ring"
    )]
    Corrupt {
        /// The consumer position at which it was noticed.
        position: u64,
        /// The violated rule.
        what: Corruption,
    },
}

/// Why a peer's descriptor was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The descriptor has no seals: it is not a memfd.
    #[error("it is not a memfd; create it with memfd_create and MFD_ALLOW_SEALING")]
    NotMemfd,
    /// The memfd could still shrink under the reader.
    #[error("it lacks seals; add F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_SEAL before handing it over")]
    Unsealed,
    /// The size is not that of a ring, or outside of the limits.
    #[error(
        "its {file_bytes} bytes are not two pages and a power of two from {data_bytes_min} to {data_bytes_max} bytes of data"
    )]
    Size {
        /// Bytes of the file.
        file_bytes: u64,
        /// The smallest data area accepted.
        data_bytes_min: usize,
        /// The largest data area accepted.
        data_bytes_max: usize,
    },
    /// The producer page does not say that it is a ring of this layout.
    #[error("its magic, version or data size is not that of this ring layout; use the same version on both sides")]
    Identity,
    /// The descriptor is not an eventfd.
    #[error("it is not an eventfd; create it with eventfd and EFD_NONBLOCK")]
    NotEventFd,
}

/// The rule of the layout that a ring's bytes violate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Corruption {
    /// A position lies inside of a record's eight bytes.
    #[error("a position is not a multiple of eight")]
    Misaligned,
    /// The producer is behind the consumer, or further ahead than the ring is long.
    #[error("the producer position is out of reach")]
    OutOfReach,
    /// The producer position went backwards.
    #[error("the producer position went backwards")]
    Rewound,
    /// A record claims bytes that were not produced.
    #[error("a record is longer than what was produced")]
    Overlong,
    /// A record is longer than the reader's limit.
    #[error("a record is longer than the limit")]
    OverLimit,
}

impl Error {
    /// Makes a function for `map_err` on system calls.
    pub(crate) fn system(action: &'static str, advice: &'static str) -> impl FnOnce(Errno) -> Self {
        move |cause| Self::System { action, advice, cause }
    }
}
