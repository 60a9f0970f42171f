//! A small ext4 on a loop device, unmounted when dropped, whatever became of the test.

use std::path::Path;
use std::process::Command;

pub struct SmallDisk {
    mount: tempfile::TempDir,
    image: tempfile::NamedTempFile,
}

fn run(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

impl SmallDisk {
    /// `None` where it cannot be had: it needs root, mkfs.ext4 and a loop device.
    pub fn new(mib: u64) -> Option<Self> {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(mib << 20).unwrap();
        let disk = Self { mount: tempfile::tempdir().unwrap(), image };
        let made = run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(disk.image.path()));
        (made && disk.mount("loop")).then_some(disk)
    }

    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    /// Mounts it: `loop`, or `loop,ro`.
    pub fn mount(&self, options: &str) -> bool {
        run(Command::new("mount").args(["-o", options]).arg(self.image.path()).arg(self.path()))
    }

    /// Unmounts it; nothing may be open on it.
    pub fn unmount(&self) {
        assert!(run(Command::new("umount").arg(self.path())), "something is open on {}", self.path().display());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A mount that stays is seen in the next run; there is nobody to report it to here.
        let _ = Command::new("umount").arg("-l").arg(self.path()).output();
    }
}
