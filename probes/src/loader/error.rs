//! Why no program can work.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;

use aya::EbpfError;
use aya::maps::MapError;

use super::rings::RING_BYTES_MAX;
use crate::attach::is_not_permitted;
use crate::object::{AUDITED_PATH_BYTES_MAX, AUDITED_PATHS_MAX, PROGRAMS};

/// Why no program can work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process lacks the capabilities.
    #[error(
        "not permitted to {action}: {source}. Run as root, or with CAP_BPF and CAP_PERFMON (and CAP_SYS_RESOURCE before \
         Linux 5.11)"
    )]
    NotPermitted {
        /// What was refused.
        action: &'static str,
        /// How.
        source: io::Error,
    },
    /// The kernel's type information is missing or unreadable.
    #[error(
        "no kernel type information in {}: {reason}. The probes need Linux 5.8 or newer with CONFIG_DEBUG_INFO_BTF=y, and \
         /sys mounted",
        path.display()
    )]
    NoBtf {
        /// Where it was looked for.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The ring's size makes no sense.
    #[error("a ring of {bytes} bytes is impossible: give 1 to {RING_BYTES_MAX} bytes")]
    RingSize {
        /// What was asked for.
        bytes: u32,
    },
    /// [`LoadConfig::disabled`] names something that is no program.
    #[error("there is no program {name:?} to disable; the programs are {}", program_names())]
    UnknownProgram {
        /// What was named.
        name: String,
    },
    /// [`LoadConfig::audited_paths`] has too many, or one that is too long or empty.
    #[error("cannot audit {path:?}: there may be {AUDITED_PATHS_MAX} paths of 1 to {AUDITED_PATH_BYTES_MAX} bytes")]
    AuditedPath {
        /// Which one.
        path: String,
    },
    /// A map could not be made.
    #[error("cannot create the map {name}: {source}. The probes need Linux 5.8 or newer, and memory for their rings")]
    Map {
        /// Which map.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The object could not be fitted to this kernel.
    #[error("the probes do not fit this kernel: {0}")]
    Object(String),
}

fn program_names() -> String {
    PROGRAMS.iter().map(|program| program.name).collect::<Vec<_>>().join(", ")
}

pub(super) fn object_error(error: EbpfError) -> Error {
    match error {
        EbpfError::MapError(MapError::CreateError { io_error, .. }) if is_not_permitted(&io_error) => {
            Error::NotPermitted { action: "create BPF maps", source: io_error }
        }
        EbpfError::MapError(MapError::CreateError { name, io_error }) => Error::Map { name, source: io_error },
        other => {
            let mut text = other.to_string();
            let mut cause = other.source();
            while let Some(error) = cause {
                let next = error.to_string();
                if !text.ends_with(&next) {
                    text.push_str(": ");
                    text.push_str(&next);
                }
                cause = error.source();
            }
            Error::Object(text)
        }
    }
}
