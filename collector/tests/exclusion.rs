//! Excluded namespaces, through the real probes and a real cgroup.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::lab;
use crate::lab::{Kernel, LIMIT, Lab, can_run};
use tapio_collector::intake::identity::directory::{ContainerNames, PodNames};
use tapio_collector::intake::identity::hierarchies;
use tapio_collector::settings::config::Config;
use tapio_wire::entity_id;
use tapio_wire::event::{Detail, EntityId, EntityKind, SOURCES, Source};
use tapio_wire::ledger::{Reason, Stage};

const UID: &str = "5e1c2d3e-4a5b-6c7d-8e9f-0a1b2c3d4e5f";

/// A container's cgroup of version 2, below its pod's.
struct Container {
    pod: PathBuf,
    id: String,
}

impl Container {
    fn make() -> Self {
        let (root, _) = hierarchies().into_iter().find(|(_, mark)| *mark == 0).expect("cgroup version 2 is mounted");
        let id = format!("{:064x}", std::process::id());
        let pod = root.join("kubepods").join(format!("pod{UID}"));
        std::fs::create_dir_all(pod.join(&id)).expect("a cgroup");
        Self { pod, id }
    }

    fn entity(&self) -> EntityId {
        entity_id(EntityKind::Container, &self.id)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let deadline = Instant::now() + LIMIT;
        // Busy until its last process is reaped.
        while self.pod.join(&self.id).exists() && std::fs::remove_dir(self.pod.join(&self.id)).is_err() {
            if Instant::now() > deadline {
                return eprintln!("{} remains", self.pod.display());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // The common parent may be another test's as well.
        let _ = std::fs::remove_dir(&self.pod);
        let _ = self.pod.parent().map(std::fs::remove_dir);
    }
}

/// A shell within a container that starts a program for every line that it reads.
struct Shell(Child);

impl Shell {
    fn start(container: &Container) -> Self {
        let procs = container.pod.join(&container.id).join("cgroup.procs");
        let script = format!("echo 0 > {}; while read -r line; do /bin/true; done", procs.display());
        Self(Command::new("sh").args(["-c", &script]).stdin(Stdio::piped()).spawn().expect("sh runs"))
    }

    fn run(&mut self) {
        self.0.stdin.as_mut().expect("a pipe").write_all(b"\n").expect("it reads");
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // Its input ends, and so does it; the kill is for one that hangs.
        drop(self.0.stdin.take());
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn excluded(lab: &Lab) -> u64 {
    let ledger = lab.context.books.snapshot(&[0; SOURCES]);
    ledger.account(Source::Ebpf).dropped[Stage::Filter as usize][Reason::Excluded as usize]
}

#[test]
fn an_excluded_namespace_has_deaths_only() {
    if !can_run("an_excluded_namespace_has_deaths_only", &[]) {
        return;
    }
    let mut config = Config::default();
    config.collectors.k8s.exclude_namespaces = vec!["noisy".into()];
    let mut lab = Lab::with(config);
    let kernel = Kernel::start(&lab.context);
    let container = Container::make();
    let entity = container.entity();
    let mut shell = Shell::start(&container);
    shell.run();
    let of_container = move |seen: &lab::Seen| seen.event.entity == entity;
    let is_fork = move |seen: &lab::Seen| of_container(seen) && matches!(seen.event.body, Detail::Fork { .. });
    let is_exit = move |seen: &lab::Seen| of_container(seen) && matches!(seen.event.body, Detail::Exit(_));
    lab.wait("fork before the namespace is known", is_fork);
    assert_eq!(kernel.controls.excluded_cgroups(), 0);

    let pod =
        PodNames { uid: UID.into(), namespace: "noisy".into(), name: "web".into(), owner: None, addresses: Vec::new() };
    let names = ContainerNames { id: container.id.as_str().into(), name: "web".into(), image: "web".into() };
    lab.context.directory.update(pod, vec![names], Instant::now());
    // The pod's cgroup and the container's.
    let deadline = Instant::now() + LIMIT;
    while kernel.controls.excluded_cgroups() < 2 {
        assert!(Instant::now() < deadline, "{} cgroups are excluded", kernel.controls.excluded_cgroups());
        std::thread::sleep(Duration::from_millis(5));
    }
    // Whatever was on its way has arrived once a death that came later has.
    let ends = |lab: &Lab| lab.seen.iter().filter(|seen| is_exit(seen)).count();
    let forks = |lab: &Lab| lab.seen.iter().filter(|seen| is_fork(seen)).count();
    let mut run_one = |lab: &mut Lab| {
        let (before, deadline) = (ends(lab), Instant::now() + LIMIT);
        shell.run();
        while ends(lab) == before {
            assert!(Instant::now() < deadline, "deaths are reported of excluded namespaces too");
            lab.drain();
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    run_one(&mut lab);
    let (forks_before, left_out) = (forks(&lab), excluded(&lab));
    for _ in 0..5 {
        run_one(&mut lab);
    }
    let deadline = Instant::now() + LIMIT;
    while excluded(&lab) < left_out + 5 {
        assert!(Instant::now() < deadline, "{} is counted of 5 forks and more", excluded(&lab) - left_out);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(forks(&lab), forks_before, "a fork of an excluded namespace was reported");

    drop(shell);
    drop(container);
    let deadline = Instant::now() + LIMIT;
    while kernel.controls.excluded_cgroups() > 0 {
        assert!(Instant::now() < deadline, "{} cgroups are excluded", kernel.controls.excluded_cgroups());
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(kernel);
    lab.assert_books_close(Source::Ebpf);
}
