//! How a reader sleeps and is woken.
//!
//! In: descriptors of rings and eventfds. Out: the tokens of those that are ready. Held: an epoll descriptor.
//!
//! A BPF ring's descriptor is ready while the ring holds bytes. But epoll only learns of it when a probe submits with a
//! wakeup, when the descriptor is added, or if it was ready at the last wait. Probes submit without a wakeup unless the
//! flag is set. Hence set the flag, check the ring, then wait, and always with a timeout.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;
use rustix::event::{EventfdFlags, Timespec};
use rustix::io::Errno;

use crate::error::{Error, Refusal};
use crate::mapping::{Access, Mapping};
use crate::protocol;

/// A u32 in a BPF array made with `BPF_F_MMAPABLE` (`.bss` is one) that probes read before they submit: 1 asks for a wakeup.
///
/// The wakeup protocol of memfd rings holds with one gap. A probe loads the flag between reserve and submit, and on x86
/// that load may overtake the kernel's store of the producer position. A record can then sit unannounced until the wait
/// times out or the next record comes. A probe closes the gap by reading the flag with an atomic operation.
pub struct WakeupFlag {
    mapping: Mapping,
    offset_bytes: usize,
}

impl WakeupFlag {
    /// Maps the first word of the array.
    pub fn map(map: BorrowedFd<'_>) -> Result<Self, Error> {
        Self::map_at(map, 0)
    }

    /// Maps the word at `offset_bytes`, a multiple of four, of the array.
    pub fn map_at(map: BorrowedFd<'_>, offset_bytes: usize) -> Result<Self, Error> {
        let page_bytes = rustix::param::page_size();
        let advice = "check that the map is an array with BPF_F_MMAPABLE, writable, and that the offset is inside";
        let bytes = offset_bytes
            .checked_add(size_of::<u32>())
            .filter(|_| offset_bytes.is_multiple_of(size_of::<u32>()))
            .and_then(|end| end.checked_next_multiple_of(page_bytes))
            .ok_or(Errno::INVAL);
        let mapping = bytes
            .and_then(|bytes| Mapping::shared(map, 0, bytes, Access::Write))
            .map_err(Error::system("map the BPF wakeup flag", advice))?;
        Ok(Self { mapping, offset_bytes })
    }

    /// Asks for a wakeup, or no longer. After asking, look at [`crate::Reader::is_empty`] before sleeping.
    pub fn set(&self, wanted: bool) {
        protocol::request_wakeup(self.mapping.word32(self.offset_bytes), wanted);
    }
}

/// A non-blocking eventfd.
pub struct EventFd {
    fd: OwnedFd,
}

impl EventFd {
    /// A new one, closed on exec.
    pub fn new() -> Result<Self, Error> {
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(|fd| Self { fd })
            .map_err(Error::system("create an eventfd", "raise RLIMIT_NOFILE"))
    }

    /// One that a peer made: refused unless it is an eventfd, so that polling it cannot block.
    ///
    /// Add it with [`Poller::add_edge`] and never clear it: the peer can make reading it block.
    pub fn from_peer(fd: OwnedFd) -> Result<Self, Error> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        // Links to files are absolute paths, so no file can carry this name.
        if link.is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]") {
            Ok(Self { fd })
        } else {
            Err(Error::Refused(Refusal::NotEventFd))
        }
    }

    /// Makes it readable.
    pub fn notify(&self) -> Result<(), Error> {
        match rustix::io::write(&self.fd, &1u64.to_ne_bytes()) {
            // A full counter is readable as it is.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(cause) => Err(Error::system("notify an eventfd", "report this")(cause)),
        }
    }

    /// Makes it unreadable until the next notification.
    pub fn clear(&self) -> Result<(), Error> {
        match rustix::io::read(&self.fd, &mut [0; 8]) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(cause) => Err(Error::system("clear an eventfd", "report this")(cause)),
        }
    }

    /// A second descriptor of the same eventfd.
    pub(crate) fn duplicate(&self) -> Result<OwnedFd, Error> {
        rustix::io::fcntl_dupfd_cloexec(&self.fd, 0)
            .map_err(Error::system("duplicate an eventfd", "raise RLIMIT_NOFILE"))
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits for the first of several descriptors to be ready.
pub struct Poller {
    epoll: OwnedFd,
    tokens: Vec<u64>,
}

/// Descriptors reported by one wait; the others are reported by the next.
const EVENTS_MAX: usize = 64;

impl Poller {
    /// One that waits for nothing yet.
    pub fn new() -> Result<Self, Error> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(Error::system("create an epoll descriptor", "raise RLIMIT_NOFILE"))?;
        Ok(Self { epoll, tokens: Vec::with_capacity(EVENTS_MAX) })
    }

    /// Reports `token` while `fd` is readable: for BPF rings, and for eventfds that are cleared after each report.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64) -> Result<(), Error> {
        self.register(fd, token, epoll::EventFlags::IN)
    }

    /// Reports `token` once for each time that `fd` becomes readable or is notified. For eventfds that are never
    /// cleared, and for BPF rings that are read after each wait.
    pub fn add_edge(&self, fd: BorrowedFd<'_>, token: u64) -> Result<(), Error> {
        self.register(fd, token, epoll::EventFlags::IN | epoll::EventFlags::ET)
    }

    fn register(&self, fd: BorrowedFd<'_>, token: u64, flags: epoll::EventFlags) -> Result<(), Error> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags).map_err(Error::system(
            "poll a descriptor",
            "add each descriptor once, and only rings, eventfds and the like",
        ))
    }

    /// Reports `fd` no more.
    pub fn remove(&self, fd: BorrowedFd<'_>) -> Result<(), Error> {
        epoll::delete(&self.epoll, fd).map_err(Error::system("stop polling a descriptor", "remove only what was added"))
    }

    /// Sleeps until something is ready, at most for `timeout` when there is one, and says what is.
    ///
    /// None are ready after the timeout, or when a signal came first.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<&[u64], Error> {
        // A timeout beyond what the kernel counts is none.
        let timeout = timeout.and_then(|duration| Timespec::try_from(duration).ok());
        self.tokens.clear();
        let mut events = [MaybeUninit::uninit(); EVENTS_MAX];
        match epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()) {
            Ok((ready, _)) => self.tokens.extend(ready.iter().map(|event| event.data.u64())),
            Err(Errno::INTR) => {}
            Err(cause) => return Err(Error::system("wait for descriptors", "report this")(cause)),
        }
        Ok(&self.tokens)
    }
}
