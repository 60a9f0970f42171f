//! Memfds as files: made and sealed for a writer, checked for a reader.
//!
//! In: a size, or a peer's descriptor. Out: a [`RingMapping`] whose file cannot shrink (M2 of `mapping.rs`).
//!
//! A peer's descriptor may be anything. `F_GET_SEALS` answers for shared memory alone, so a file that could block or fault
//! (FUSE, a device, a disk) is refused before it is touched. With `F_SEAL_SHRINK` no page vanishes, so no access ends in
//! SIGBUS; `F_SEAL_SEAL` makes that final; `F_SEAL_GROW` makes the size that was checked the size that stays. A memfd of huge
//! pages, whose faults can fail, has a size that is never two small pages and a power of two. Pages that the peer left
//! unwritten, or punched out, read as zeros and are charged to whoever touches them first: `data_bytes_max` bounds that.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use crate::error::{Error, Refusal};
use crate::layout::{self, MEMFD_RECORD_BYTES_MAX};
use crate::mapping::{Access, RingMapping};
use crate::sync::Ordering;

/// What a reader accepts from a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The smallest data area.
    pub data_bytes_min: usize,
    /// The largest data area: memory that a peer can make this process pay for.
    pub data_bytes_max: usize,
    /// The largest record: the size of the buffer that records are copied to.
    pub record_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { data_bytes_min: 4096, data_bytes_max: 64 << 20, record_bytes_max: MEMFD_RECORD_BYTES_MAX }
    }
}

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Makes a sealed memfd with an empty ring in it and maps it for a writer.
pub(crate) fn create(data_bytes: usize, name: &str) -> Result<(RingMapping, OwnedFd), Error> {
    let page_bytes = rustix::param::page_size();
    if !layout::is_data_size(data_bytes, page_bytes) {
        return Err(Error::DataSize { data_bytes, page_bytes });
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know NOEXEC_SEAL; later ones may be set to insist on it.
    let memfd = rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL)
        .or_else(|error| if error == Errno::INVAL { rustix::fs::memfd_create(name, flags) } else { Err(error) })
        .map_err(Error::system("create a memfd", "use a name of at most 249 bytes without NUL"))?;
    rustix::fs::ftruncate(&memfd, (2 * page_bytes + data_bytes) as u64)
        .map_err(Error::system("size the memfd", "free memory or ask for a smaller ring"))?;
    rustix::fs::fcntl_add_seals(&memfd, SEALS)
        .map_err(Error::system("seal the memfd", "check that the kernel supports file seals"))?;
    let ring = RingMapping::of_memfd(memfd.as_fd(), data_bytes, Access::Write)
        .map_err(Error::system("map the memfd", MAP_ADVICE))?;
    let identity = &ring.producer_page().identity.0;
    // Relaxed suffices: the memfd reaches the peer through a system call.
    identity.magic.store(layout::MAGIC, Ordering::Relaxed);
    identity.version.store(layout::VERSION, Ordering::Relaxed);
    identity.wakes.store(1, Ordering::Relaxed);
    identity.data_bytes.store(data_bytes as u64, Ordering::Relaxed);
    Ok((ring, memfd))
}

/// Checks a peer's descriptor and maps it for a reader. Positions are still to be checked.
pub(crate) fn attach(memfd: BorrowedFd<'_>, limits: &Limits) -> Result<RingMapping, Error> {
    let data_bytes = check_file(memfd, limits)?;
    let ring = RingMapping::of_memfd(memfd, data_bytes, Access::Read)
        .map_err(Error::system("map the peer's memfd", MAP_ADVICE))?;
    let identity = &ring.producer_page().identity.0;
    let known = identity.magic.load(Ordering::Relaxed) == layout::MAGIC
        && identity.version.load(Ordering::Relaxed) == layout::VERSION
        && identity.wakes.load(Ordering::Relaxed) <= 1
        && identity.data_bytes.load(Ordering::Relaxed) == data_bytes as u64;
    if known { Ok(ring) } else { Err(Error::Refused(Refusal::Identity)) }
}

const MAP_ADVICE: &str = "check RLIMIT_AS, vm.max_map_count and that the descriptor is open for reading and writing";

/// Bytes of the data area of a file that meets the conditions for being mapped.
fn check_file(memfd: BorrowedFd<'_>, limits: &Limits) -> Result<usize, Error> {
    let seals = rustix::fs::fcntl_get_seals(memfd).map_err(|_| Error::Refused(Refusal::NotMemfd))?;
    if !seals.contains(SEALS) {
        return Err(Error::Refused(Refusal::Unsealed));
    }
    let page_bytes = rustix::param::page_size();
    let stat = rustix::fs::fstat(memfd).map_err(Error::system("stat the peer's memfd", "report this"))?;
    let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
    usize::try_from(file_bytes)
        .ok()
        .and_then(|bytes| bytes.checked_sub(2 * page_bytes))
        .filter(|&bytes| layout::is_data_size(bytes, page_bytes))
        .filter(|bytes| (limits.data_bytes_min..=limits.data_bytes_max).contains(bytes))
        .ok_or(Error::Refused(Refusal::Size {
            file_bytes,
            data_bytes_min: limits.data_bytes_min,
            data_bytes_max: limits.data_bytes_max,
        }))
}
