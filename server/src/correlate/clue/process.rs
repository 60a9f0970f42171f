//! Clues about processes: what the kernel said of an exec, an exit, an OOM kill or a signal.

use std::sync::Arc;

use rkyv::{Archive, Deserialize, Serialize};
use tapio_wire::event::Role;
use tapio_wire::wait_status::{Ending, ending};

use super::EntityInfo;
use super::LimitLevel;

/// A place in pid namespaces.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct NsPid {
    pub pid: u32,
    pub level: u32,
}

/// A process image was replaced.
#[derive(Archive, Serialize, Deserialize, Clone, Debug)]
pub struct Exec {
    pub comm: Arc<str>,
    pub parent_pid: u32,
    pub ns: NsPid,
    pub role: Role,
}

/// A process died.
#[derive(Archive, Serialize, Deserialize, Clone, Debug)]
pub struct Exit {
    pub comm: Arc<str>,
    pub parent_pid: u32,
    pub ns: NsPid,
    /// Status as `wait(2)` reports it.
    pub status: u32,
    pub start_time_ns: u64,
    pub oom_score_adj: i16,
    pub role: Role,
}

impl Exit {
    /// The exit code, when it exited by itself.
    pub fn exit_code(&self) -> Option<u32> {
        match ending(self.status) {
            Ending::Exited(code) => Some(code),
            Ending::Killed(_) => None,
        }
    }

    /// The signal that ended it.
    pub fn signal(&self) -> Option<u32> {
        match ending(self.status) {
            Ending::Exited(_) => None,
            Ending::Killed(signal) => Some(signal),
        }
    }

    /// The signal that ended it, or that its exit code stands for. By convention a process that handles a signal, or whose child
    /// died by one, exits with 128 and the signal's number.
    pub fn died_by(&self) -> Option<u32> {
        match self.exit_code() {
            Some(code @ 129..=192) => Some(code - 128),
            Some(_) => None,
            None => self.signal(),
        }
    }
}

/// Every kernel's pages are a multiple of 4 KiB.
const PAGE_SHIFT: u32 = 12;

/// The OOM killer chose a process.
#[derive(Archive, Serialize, Deserialize, Clone, Debug)]
pub struct Oom {
    pub comm: Arc<str>,
    pub ns: NsPid,
    pub allocator_pid: u32,
    pub allocator_comm: Arc<str>,
    /// What of `rss_bytes` is anonymous memory, pages of 4 KiB; 0 where it is not known: these bytes were padding.
    pub anon_pages: u32,
    pub rss_bytes: u64,
    pub limit_cgroup: Arc<str>,
    pub limit_bytes: u64,
    pub usage_bytes: u64,
    pub oom_score_adj: i16,
    pub role: Role,
    /// Levels above the victim's own memory cgroup.
    pub limit_height: u32,
    /// What has the limit, and whose it is.
    pub limit_level: LimitLevel,
    /// Whether the allocator is below the limit; `None` where it is not known.
    pub allocator_inside: Option<bool>,
    /// The kernel said that it kills for this limit.
    pub kills_for_limit: bool,
    /// What of `rss_bytes` is shared memory and files of a tmpfs, pages of 4 KiB.
    pub shmem_pages: u32,
}

/// What a process had resident, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    pub anon: u64,
    pub file: u64,
    pub shmem: u64,
}

impl Oom {
    /// A size as `anon_pages` and `shmem_pages` have it.
    pub fn pages(bytes: u64) -> u32 {
        u32::try_from(bytes >> PAGE_SHIFT).unwrap_or(u32::MAX)
    }

    /// What the victim itself had resident, where that is known.
    pub fn resident(&self) -> Option<Resident> {
        let [anon, shmem] = [self.anon_pages, self.shmem_pages].map(|pages| u64::from(pages) << PAGE_SHIFT);
        (anon > 0).then_some(Resident { anon, file: self.rss_bytes.saturating_sub(anon + shmem), shmem })
    }

    /// Whether the limit was reached, by the kernel's own word or by what was in use: the kernel charges in batches, so a little
    /// room may be left. Where the allocator is not below it, only a limit that was lowered under its use was.
    pub fn limit_hit(&self) -> bool {
        let room = self.limit_bytes.saturating_sub(self.usage_bytes);
        match self.allocator_inside {
            _ if self.limit_bytes == 0 => false,
            _ if self.kills_for_limit => true,
            Some(false) => self.usage_bytes > self.limit_bytes,
            _ => room <= self.batch_bytes(),
        }
    }

    /// What is in use beyond the limit, when that is more than the kernel's batches explain: the limit was lowered under it.
    pub fn over_bytes(&self) -> Option<u64> {
        let over = self.usage_bytes.saturating_sub(self.limit_bytes);
        (self.limit_bytes > 0 && over > self.batch_bytes()).then_some(over)
    }

    fn batch_bytes(&self) -> u64 {
        (self.limit_bytes / 64).clamp(1 << 20, 16 << 20)
    }
}

/// A signal was sent.
#[derive(Archive, Serialize, Deserialize, Clone, Debug)]
pub struct Kill {
    pub signal: u32,
    pub code: i32,
    pub comm: Arc<str>,
    pub ns: NsPid,
    pub sender_pid: u32,
    pub sender_comm: Arc<str>,
    pub sender: Arc<EntityInfo>,
    pub sender_class: SenderClass,
    /// The target ignores it.
    pub ignored: bool,
    pub role: Role,
    /// The kernel sent it to a process that had used up its CPU time.
    pub over_cpu_limit: bool,
    /// Repeats of the same signal since the one before.
    pub repeats: u32,
}

/// Who sent a signal, seen from its target.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderClass {
    /// The kernel itself: a fault, the OOM killer.
    Kernel,
    /// The process itself.
    Itself,
    /// Another process of the same entity or pod.
    Same,
    /// A container runtime, kubelet or the service manager.
    Runtime,
    /// A daemon whose duty is to kill before the kernel runs out of memory.
    OomDaemon,
    /// Anyone else.
    Outside,
}

impl SenderClass {
    /// Every class.
    pub const ALL: [Self; 6] = [Self::Kernel, Self::Itself, Self::Same, Self::Runtime, Self::OomDaemon, Self::Outside];

    /// The name that patterns use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Itself => "self",
            Self::Same => "same",
            Self::Runtime => "runtime",
            Self::OomDaemon => "oom_daemon",
            Self::Outside => "outside",
        }
    }
}
