//! Disks that stall and disks that fail, with a real kernel. A loop device's file lies on a file system that is frozen
//! for a while, and then cut off. As root: `TAPIO_REQUIRE=all cargo test -p tapio-probes`.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::lab::{Session, can_run, victim};
use tapio_probes::record::{BlockIo, RecordKind};

const EIO: i32 = 5;
const WRITE: u8 = 1;
const PATIENCE: Duration = Duration::from_secs(20);
/// The collector's default for a slow I/O.
const SLOW: Duration = Duration::from_millis(100);

fn succeeds(program: &str, arguments: &[&Path]) -> bool {
    Command::new(program).args(arguments).status().is_ok_and(|status| status.success())
}

/// A loop device whose file lies on an ext4 of its own.
struct Stack {
    directory: PathBuf,
    below: PathBuf,
    device: PathBuf,
}

impl Stack {
    /// [`None`], after saying so, where the tools are missing; with `TAPIO_REQUIRE=all` that fails the test.
    fn make() -> Option<Self> {
        let directory = std::env::temp_dir().join(format!("tapio-stack-{}", std::process::id()));
        let below = directory.join("below");
        fs::create_dir_all(&below).expect("a directory");
        let mut stack = Self { directory, below, device: PathBuf::new() };
        let image = stack.directory.join("image");
        fs::File::create(&image).and_then(|file| file.set_len(32 << 20)).expect("a file");
        let mounted = succeeds("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), &image])
            && succeeds("mount", &["-o".as_ref(), "loop".as_ref(), &image, &stack.below]);
        let file = stack.below.join("disk");
        // All its blocks are there: nothing has to be allocated while it is frozen.
        let found = mounted.then(|| {
            fs::write(&file, vec![7; 4 << 20]).expect("there is room");
            Command::new("losetup").args(["--find", "--show"]).arg(&file).output()
        });
        match found {
            Some(Ok(output)) if output.status.success() => {
                stack.device = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
                Some(stack)
            }
            other => {
                println!("SKIP: needs mkfs.ext4, mount, losetup and two free loop devices: {other:?}");
                assert!(!std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all"), "TAPIO_REQUIRE=all");
                None
            }
        }
    }

    /// Reads and writes under way.
    fn in_flight(&self) -> Vec<u32> {
        let name = self.device.file_name().expect("a device has a name");
        let text = fs::read_to_string(Path::new("/sys/block").join(name).join("inflight")).expect("sysfs says");
        text.split_whitespace().map(|number| number.parse().expect("a number")).collect()
    }

    fn is_of(&self) -> impl Fn(&BlockIo) -> bool + use<> {
        let number = fs::metadata(&self.device).expect("the device is there").rdev();
        let device = rustix::fs::major(number) << 20 | rustix::fs::minor(number);
        move |io: &BlockIo| io.device == device
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // What was not made cannot be undone. A file system that stays frozen could not be unmounted.
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.below).output();
        if !self.device.as_os_str().is_empty() {
            succeeds("losetup", &["--detach".as_ref(), &self.device]);
        }
        let _ = Command::new("umount").arg(&self.below).output();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn write(device: &Path) -> std::io::Result<()> {
    let mut file = fs::File::options().write(true).open(device)?;
    file.write_all(&[1; 8192])?;
    file.sync_all()
}

#[test]
fn stalling_and_failing_disks_are_reported() {
    if !can_run("stalling_and_failing_disks_are_reported") {
        return;
    }
    let Some(stack) = Stack::make() else {
        return;
    };
    let is_of_device = stack.is_of();
    let mut session = Session::start();

    assert!(succeeds("fsfreeze", &["--freeze".as_ref(), &stack.below]));
    let device = stack.device.clone();
    let writer = std::thread::spawn(move || write(&device));
    let deadline = Instant::now() + PATIENCE;
    while stack.in_flight()[1] == 0 {
        assert!(Instant::now() < deadline, "the write has not reached the device");
        std::thread::yield_now();
    }
    // The stall itself: there is nothing to wait for but the time.
    std::thread::sleep(SLOW * 2);
    assert!(succeeds("fsfreeze", &["--unfreeze".as_ref(), &stack.below]));
    writer.join().expect("it does not panic").expect("the write was late, and is done");
    let slow: BlockIo = session.wait_for(RecordKind::BlockIo, |io: &BlockIo| is_of_device(io) && io.operation == WRITE);
    assert_eq!((slow.error, slow.pad), (0, [0; 7]));
    assert!(slow.latency_ns >= (SLOW * 2).as_nanos() as u64 && slow.latency_ns < 60_000_000_000, "{slow:?}");

    assert!(victim("cut").arg(&stack.below).status().expect("it runs").success());
    write(&stack.device).expect_err("the disk is gone");
    let failed: BlockIo = session.wait_for(RecordKind::BlockIo, |io: &BlockIo| is_of_device(io) && io.error != 0);
    assert_eq!((failed.error, failed.operation, failed.pad), (-EIO, WRITE, [0; 7]));
}
