//! Evidence that fades, read beside the kernel's source.

use std::process::{Child, Command};
use std::sync::Arc;

use crate::lab::{Kernel, Lab, MemoryCgroup, can_run};
use tapio_collector::intake::Intake;
use tapio_collector::intake::identity::Identity;
use tapio_collector::source::evidence;
use tapio_wire::event::{Detail, Observation, Source};

/// A child that is killed and reaped when the test ends early.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Fails when it is dead already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn shell(script: &str) -> Killed {
    Killed(Command::new("sh").args(["-c", script]).spawn().expect("sh runs"))
}

fn observation(detail: &Detail) -> Option<&Observation> {
    match detail {
        Detail::Observation(observation) => Some(observation),
        _ => None,
    }
}

#[test]
fn a_signals_sender_and_its_victims_limit_are_read() {
    if !can_run("a_signals_sender_and_its_victims_limit_are_read", &[]) {
        return;
    }
    let mut lab = Lab::new();
    let (asking, reading) = evidence::channel(evidence::Options {
        with_arguments: false,
        watch_interval: tapio_collector::settings::config::WATCH_INTERVAL,
        node: 7,
        log_lines: 0,
        log_dir: Default::default(),
        directory: Default::default(),
    });
    let counts = reading.counts();
    let intake = Intake::new(lab.context.clone(), Source::Collector, Identity::new(Vec::new()));
    let reading = std::thread::spawn(move || reading.run(intake));
    let kernel = Kernel::start_with(&lab.context, Some(asking));

    let limit = MemoryCgroup::make("evidence", 64 << 20);
    let victim = shell("sleep 60; true");
    let victim_pid = victim.0.id();
    if let Some(limit) = &limit {
        limit.add(victim_pid);
    }
    // The sender lives on, and has an argument that is nobody's business.
    let sender = shell(&format!("kill -KILL {victim_pid}; sleep 60; : secret"));
    let seen = lab.wait("observation of the sender", |seen| {
        seen.event.pid == victim_pid
            && observation(&seen.event.body).is_some_and(|observation| observation.process != 0)
    });
    let found = observation(&seen.event.body).expect("it was looked for");
    assert_eq!((found.process, found.process_uid), (sender.0.id(), 0));
    assert_eq!(seen.name(found.process_comm), "sh");
    assert_eq!(seen.name(found.process_command), "sh (2 arguments)");
    let signal =
        lab.wait("signal", |seen| matches!(&seen.event.body, Detail::Signal(_)) && seen.event.pid == victim_pid);
    let Detail::Signal(signal_body) = &signal.event.body else { unreachable!("it was looked for") };
    assert_eq!((seen.event.entity, found.process_entity), (signal.event.entity, signal_body.sender_entity));
    if limit.is_some() {
        assert_eq!(found.memory_limit_bytes, 64 << 20, "{found:?}");
    }
    drop((kernel, victim, sender));
    reading.join().expect("no panic: it ends when nobody can ask any more");
    lab.assert_books_close(Source::Collector);
    let (readings, microseconds) = counts.readings();
    println!("{readings} readings, {microseconds} us together");
    assert!(Arc::strong_count(&counts) == 1, "nobody counts any more");
}
