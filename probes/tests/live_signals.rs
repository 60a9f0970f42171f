//! Signals whose code says that the kernel sent them: some of them do, and some are made up by a process.
//!
//! As root: `TAPIO_REQUIRE=all cargo test -p tapio-probes`.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use crate::lab::{Killed, Session, can_run, victim};
use tapio_probes::record::{Exec, RecordKind, Signal};

const SIGKILL: u32 = 9;
const SIGALRM: u32 = 14;
const SIGTERM: u32 = 15;
const SI_TIMER: i32 = -2;
const SI_MESGQ: i32 = -3;
const SI_ASYNCIO: i32 = -4;
const SI_SIGIO: i32 = -5;
const SI_ASYNCNL: i32 = -60;

/// A signal to a process that somebody queues: what is recorded of it, and who that was.
fn queued(session: &mut Session, number: u32, code: i32, call: u32) -> (Signal, u32) {
    let mut target = Killed(victim("sleep").spawn().expect("it starts"));
    let pid = target.0.id();
    session.wait_for(RecordKind::Exec, |exec: &Exec| exec.header.pid == pid);
    let words = [pid.to_string(), number.to_string(), code.to_string(), call.to_string()];
    let mut forger: std::process::Child = victim("queue").args(words).spawn().expect("it starts");
    let by = forger.id();
    assert!(forger.wait().expect("it ends").success(), "call {call} takes code {code}");
    assert_eq!(target.0.wait().expect("it ends").signal(), Some(number as i32));
    (session.wait_for(RecordKind::Signal, |signal: &Signal| signal.header.pid == pid), by)
}

#[test]
fn a_made_up_code_is_not_the_kernels() {
    if !can_run("a_made_up_code_is_not_the_kernels") {
        return;
    }
    let mut session = Session::start();
    for code in [SI_TIMER, SI_MESGQ, SI_ASYNCIO, SI_SIGIO, SI_ASYNCNL] {
        // rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal.
        for call in 1..=3 {
            for number in [SIGKILL, SIGALRM, SIGTERM] {
                let (signal, by) = queued(&mut session, number, code, call);
                assert_eq!((signal.signal, signal.code), (number, code));
                assert_eq!((signal.from_kernel, signal.sender_pid), (0, by), "{code} by call {call}");
            }
        }
    }
}

/// The signal that a process asked the kernel for.
fn asked_for(session: &mut Session, command: &mut Command, number: u32) -> Signal {
    let mut target = Killed(command.arg(number.to_string()).spawn().expect("it starts"));
    let pid = target.0.id();
    assert_eq!(target.0.wait().expect("it ends").signal(), Some(number as i32));
    session.wait_for(RecordKind::Signal, |signal: &Signal| signal.header.pid == pid)
}

#[test]
fn what_a_process_asked_the_kernel_for_is_the_kernels() {
    if !can_run("what_a_process_asked_the_kernel_for_is_the_kernels") {
        return;
    }
    let mut session = Session::start();
    for number in [SIGALRM, SIGTERM, 40] {
        let signal = asked_for(&mut session, &mut victim("ring"), number);
        assert_eq!((signal.code, signal.from_kernel), (SI_TIMER, 1), "a timer");
        let signal = asked_for(&mut session, &mut victim("notify"), number);
        assert_eq!((signal.code, signal.from_kernel), (SI_MESGQ, 1), "a queue of messages");
    }
}

/// A timer may run out at any moment of a process that queues signals itself.
#[test]
fn a_timer_that_interrupts_a_forger_is_a_timer() {
    if !can_run("a_timer_that_interrupts_a_forger_is_a_timer") {
        return;
    }
    let mut session = Session::start();
    let mut other = Killed(victim("sleep").spawn().expect("it starts"));
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    // They queue signals that are ignored, on every CPU.
    let _busy: Vec<Killed> = (0..cpus)
        .map(|_| Killed(victim("queue-for-ever").arg(other.0.id().to_string()).spawn().expect("it starts")))
        .collect();
    for _ in 0..8 {
        let signal = asked_for(&mut session, &mut victim("ring"), SIGALRM);
        assert_eq!((signal.code, signal.from_kernel), (SI_TIMER, 1), "{signal:?}");
    }
    other.0.kill().expect("it runs");
}
