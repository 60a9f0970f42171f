//! The archive on real disks that fail: power cut, read-only, no descriptors, io_uring forbidden.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use crate::archive_support::*;
use rustix::process::{Resource, getrlimit, setrlimit};
use tapio_server::archive::{Archive, ArchiveConfig, ArchiveError, ArchiveState, DiskChoice, DiskKind, lock_books};

/// `_IOR('X', 125, __u32)` of linux/fs.h, and "do not flush the log": what was not synced is gone.
const FS_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587d;
const NO_LOG_FLUSH: u32 = 2;

fn cut_power(disk: &SmallDisk) -> bool {
    let root = File::open(disk.path()).unwrap();
    let flag = NO_LOG_FLUSH;
    // SAFETY: the descriptor is open, and the request reads one u32 from the pointer, which outlives the call.
    unsafe { libc::ioctl(root.as_raw_fd(), FS_IOC_SHUTDOWN as _, &raw const flag) == 0 }
}

/// FAULTS 2.
#[test]
fn a_power_cut_loses_nothing_that_was_acknowledged() {
    let Some(disk) = SmallDisk::new(64) else {
        return skip("a_power_cut_loses_nothing_that_was_acknowledged", "root, mkfs.ext4 and a loop device");
    };
    for round in 1..=4 {
        let dir = disk.path().join(format!("archive-{round}"));
        let config = ArchiveConfig { segment_bytes: 1 << 20, ..plain(&dir) };
        let archive = open(config.clone());
        let mut frames = Frames::new("node-1", 1);
        frames.events = 8000;
        let receiver = Arc::new(Receiver::default());
        let mut sent = Vec::new();
        // Across rotations, and a few more that nobody waits for.
        for seq in 1..=20 * round {
            let bytes = frames.next();
            append(&archive, append_of(&bytes, &frames.name, &receiver));
            sent.push(bytes);
            if seq <= 20 * round - 3 {
                receiver.wait_for(seq);
            }
        }
        // What counts is what was acknowledged when the power went: afterwards there is nobody who could acknowledge. ext4 lets a
        // sync that the shutdown overtakes succeed (its extents cannot be converted any more, and it waits for a transaction
        // of before).
        let acknowledged = receiver.seq() as usize;
        assert!(acknowledged >= 20 * round as usize - 3);
        assert!(cut_power(&disk), "ext4 knows FS_IOC_SHUTDOWN");
        append(&archive, frames.append(&receiver));
        wait_not_ready(&archive);
        archive.shutdown();
        drop(archive);
        disk.unmount();
        assert!(disk.mount("loop"), "it mounts again");
        let (archive, replayed) = open_and_replay(config, ALL);
        assert!(replayed.len() >= acknowledged, "{} of {acknowledged}", replayed.len());
        assert_eq!(replayed[..acknowledged], sent[..acknowledged]);
        assert!(lock_books(archive.books()).durable_seq(frames.node(), 1) >= acknowledged as u64);
        drop(archive);
    }
}

/// FAULTS 8.
#[test]
fn a_read_only_file_system_is_named_at_the_start() {
    let Some(disk) = SmallDisk::new(16) else {
        return skip("a_read_only_file_system_is_named_at_the_start", "root, mkfs.ext4 and a loop device");
    };
    disk.unmount();
    assert!(disk.mount("loop,ro"));
    let refused = Archive::open(plain(disk.path()), Duration::ZERO, &mut |_, _| {});
    match refused {
        Err(error @ ArchiveError::Directory { .. }) => {
            let text = error.to_string();
            assert!(text.contains("Read-only") && text.contains("archive.dir"), "{text}");
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was opened"),
    }
}

/// FAULTS 8. In a process of its own, since the limit is the process's.
#[test]
fn without_descriptors_nothing_is_acknowledged_until_there_are_some() {
    const CHILD: &str = "TAPIO_TEST_DESCRIPTORS";
    if std::env::var_os(CHILD).is_none() {
        let (_, name) = concat!(module_path!(), "::without_descriptors_nothing_is_acknowledged_until_there_are_some")
            .split_once("::")
            .expect("a module of the executable");
        let run = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--test-threads", "1"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let archive = open(ArchiveConfig { segment_bytes: 64 << 10, ..plain(dir.path()) });
    let mut frames = Frames::new("node-1", 1);
    frames.events = 8000;
    let receiver = Arc::new(Receiver::default());
    append(&archive, frames.append(&receiver));
    receiver.wait_for(1);
    let before = getrlimit(Resource::Nofile);
    let mut none = before;
    none.current = Some(0);
    // `append` makes a runtime, which needs descriptors: it is made before.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let appender = archive.appender();
    setrlimit(Resource::Nofile, none).unwrap();
    for _ in 0..8 {
        runtime.block_on(appender.append(frames.append(&receiver))).unwrap();
    }
    let reason = wait_not_ready(&archive);
    let acknowledged = receiver.seq();
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(reason.contains("Too many open files"), "{reason}");
    assert!(acknowledged < frames.seq);
    receiver.wait_for(frames.seq);
    wait_ready(&archive);
}

/// Forbids `io_uring_setup` to this thread and those that it starts, as container runtimes' profiles do.
fn forbid_io_uring() {
    const SECCOMP_MODE_FILTER: libc::c_ulong = 2;
    const RET_ALLOW: u32 = 0x7fff_0000;
    const RET_EPERM: u32 = 0x0005_0000 | libc::EPERM as u32;
    // Load the call's number; if it is io_uring_setup, the next line; else the one after.
    let mut program = [
        libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 },
        libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: libc::SYS_io_uring_setup as u32 },
        libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: RET_EPERM },
        libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: RET_ALLOW },
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: prctl(2) with plain numbers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: the filter and its program outlive the call, which copies them.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &raw const filter) }, 0);
}

/// FAULTS 12.
#[test]
fn without_io_uring_plain_writes_take_over_and_say_so() {
    let forbidden = std::thread::spawn(|| {
        forbid_io_uring();
        let dir = tempfile::tempdir().unwrap();
        let auto = ArchiveConfig { disk: DiskChoice::Auto, ..plain(dir.path()) };
        let archive = open(auto.clone());
        assert_eq!(archive.stats().disk, DiskKind::Plain);
        let registry = prometheus::Registry::new();
        archive.metrics().register(&registry).unwrap();
        let gathered = registry.gather();
        let gauge = gathered.iter().find(|family| family.name() == "tapio_archive_uring").expect("the gauge");
        assert_eq!(gauge.get_metric()[0].get_gauge().get_value(), 0.0);
        assert_eq!(*archive.state().borrow(), ArchiveState::Ready);
        let sent = append_each(&archive, &mut Frames::new("node-1", 1), 3);
        archive.shutdown();
        drop(archive);
        let uring = ArchiveConfig { disk: DiskChoice::Uring, ..auto.clone() };
        let refused = Archive::open(uring, Duration::ZERO, &mut |_, _| {});
        assert!(matches!(refused, Err(ArchiveError::Uring { .. })), "asked for by name, it is an error");
        assert_eq!(open_and_replay(auto, ALL).1, sent);
    });
    forbidden.join().unwrap();
}
