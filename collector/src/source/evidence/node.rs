//! What is wrong on the node itself: tasks that hang in the kernel, and file systems without room.
//!
//! In: looks at the tasks and the file systems, each half minute. Out: troubles. What must hold: bounded in tasks; an end is
//! reported only where the beginning was. A trouble that ends while no collector runs is not reported as over. The server ends it when
//! no more reports come.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;

use super::lasting::{Lasting, Trouble, What, Whose};
use super::tasks::{self, FileSystem, Task};

/// Looks in a row that find a task waiting without being interruptible: half a minute lies between them.
const BLOCKED_LOOKS: u32 = 2;
/// Looks in a row that find a file system full, or not any more.
const DISK_LOOKS: u32 = 2;
/// A file system is full from `FULL` percent on, and has space again below `ROOM` percent.
const FULL: u64 = 95;
const ROOM: u64 = 90;
/// It is filling up from here on, and not any more below the second. By default kubelet deletes images, and evicts pods for what
/// images are on, from 85 % on.
const FILLING: u64 = 80;
const CALM: u64 = 75;

/// How full a file system is, of bytes or of inodes.
#[derive(Default)]
struct Filling {
    full: Lasting,
    filling: Lasting,
}

/// Finds hanging tasks and full file systems of the node.
#[derive(Default)]
pub struct NodeWatch {
    blocked: HashMap<Task, (Lasting, bool), RandomState>,
    disks: HashMap<String, [Filling; 2], RandomState>,
}

impl NodeWatch {
    /// A look at the tasks that are blocked now.
    pub fn tasks(&mut self, now: Instant, repeat_interval: Duration, found: &[Task], reports: &mut Vec<Trouble>) {
        for task in found {
            self.blocked.entry(task.clone()).or_default();
        }
        self.blocked.retain(|task, (lasting, was_killed)| {
            let is_blocked = found.contains(task);
            *was_killed |= is_blocked && tasks::is_killed(task.pid);
            let what = if *was_killed { What::Unkillable } else { What::Blocked };
            // It ends at once: a task that moved on is not blocked.
            let looks = if is_blocked { BLOCKED_LOOKS } else { 1 };
            if let Some(report) = lasting.saw(now, is_blocked, looks, repeat_interval) {
                let whose = Whose::Cgroup(task.cgroup.clone());
                reports.push(Trouble {
                    pid: task.pid,
                    place: task.place.clone(),
                    comm: task.comm.clone(),
                    ..Trouble::new(whose, what, report.since, (0, 0), report.is_over)
                });
            }
            is_blocked
        });
    }

    /// A look at the file systems.
    pub fn disks(
        &mut self,
        now: Instant,
        repeat_interval: Duration,
        found: Vec<FileSystem>,
        reports: &mut Vec<Trouble>,
    ) {
        // Volumes come and go with their pods.
        self.disks.retain(|mount, _| found.iter().any(|disk| disk.mount == *mount));
        for disk in found {
            let states = self.disks.entry(disk.mount.clone()).or_default();
            let percents = [
                (What::DiskFull, What::DiskFilling, disk.used_percent),
                (What::InodesFull, What::InodesFilling, disk.inodes_percent),
            ];
            for (Filling { full, filling }, (is_full, is_filling, percent)) in states.iter_mut().zip(percents) {
                let from = if full.is_reported() { ROOM } else { FULL };
                let of_full = full.saw(now, percent >= from, DISK_LOOKS, repeat_interval);
                // What is full is not filling up.
                let from = if filling.is_reported() { CALM } else { FILLING };
                let fills = percent >= from && percent < FULL && !full.is_reported();
                let of_filling = filling.saw(now, fills, DISK_LOOKS, repeat_interval);
                for (what, report) in [(is_full, of_full), (is_filling, of_filling)] {
                    let Some(report) = report else { continue };
                    let place = disk.mount.clone();
                    reports.push(Trouble {
                        place,
                        ..Trouble::new(Whose::Node, what, report.since, (percent, 100), report.is_over)
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = crate::settings::config::WATCH_INTERVAL;
    const AGAIN: Duration = Duration::from_secs(60);

    fn overs(reports: &[Trouble]) -> Vec<(What, bool)> {
        reports.iter().map(|trouble| (trouble.what, trouble.is_over)).collect()
    }

    #[test]
    fn a_task_is_blocked_after_half_a_minute() {
        let (start, mut watch, mut reports) = (Instant::now(), NodeWatch::default(), Vec::new());
        let task = Task {
            // Of nobody: it has no pending SIGKILL.
            pid: 0,
            start_time_ns: 7,
            switches: 9,
            comm: "dd".into(),
            place: "nfs_wait".into(),
            cgroup: "/kubepods/pod1/c1".into(),
        };
        for number in 0..8 {
            let found = if (1..6).contains(&number) { vec![task.clone()] } else { Vec::new() };
            watch.tasks(start + INTERVAL * number, AGAIN, &found, &mut reports);
        }
        assert_eq!(overs(&reports), [(What::Blocked, false), (What::Blocked, true)]);
        assert!(watch.blocked.is_empty());
    }

    #[test]
    fn a_file_system_is_full_until_it_has_room_again() {
        let (start, mut watch, mut reports) = (Instant::now(), NodeWatch::default(), Vec::new());
        for number in 0..40 {
            let used_percent = match number {
                0..10 => 96,
                10..20 => 92,
                _ => 70,
            };
            let disk = FileSystem { mount: "/var".into(), used_percent, inodes_percent: 3 };
            watch.disks(start + INTERVAL * number, AGAIN, vec![disk], &mut reports);
        }
        let full = What::DiskFull;
        let of_room: Vec<_> = overs(&reports).into_iter().filter(|(what, _)| *what == full).collect();
        assert_eq!(of_room.first(), Some(&(full, false)));
        assert_eq!(of_room.last(), Some(&(full, true)));
        assert!(of_room.iter().filter(|report| report.1).count() == 1, "{reports:?}");
        assert!(overs(&reports).iter().all(|(what, _)| *what == full), "inodes never ran out, so nothing is over");
    }

    #[test]
    fn a_file_system_fills_before_it_is_full() {
        let (start, mut watch, mut reports) = (Instant::now(), NodeWatch::default(), Vec::new());
        let percents = [79, 79, 81, 81, 78, 78, 96, 96, 96, 96, 85, 85, 85, 85, 74, 74, 74, 74];
        for (number, percent) in percents.into_iter().enumerate() {
            let disk = FileSystem { mount: "/var".into(), used_percent: 3, inodes_percent: percent };
            watch.disks(start + INTERVAL * number as u32, AGAIN * 60, vec![disk], &mut reports);
        }
        let (full, filling) = (What::InodesFull, What::InodesFilling);
        assert_eq!(
            overs(&reports),
            [(filling, false), (full, false), (filling, true), (full, true), (filling, false), (filling, true)]
        );
    }

    #[test]
    fn a_volume_that_was_unmounted_is_forgotten() {
        let (start, mut watch, mut reports) = (Instant::now(), NodeWatch::default(), Vec::new());
        for number in 0..100 {
            let disk = FileSystem { mount: format!("/v{number}"), used_percent: 99, inodes_percent: 3 };
            watch.disks(start + INTERVAL * number, AGAIN, vec![disk], &mut reports);
        }
        assert_eq!((watch.disks.len(), reports.len()), (1, 0));
    }
}
