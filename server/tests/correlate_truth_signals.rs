//! Signals as causes of death: who sent them, and whether they explain the end.

use crate::correlate_node::{MS, Node, Process, SECOND, SIGKILL, SIGTERM};
use crate::correlate_truth::{SIGABRT, SIGHUP, SIGUSR1, first, member, only, runc};

#[test]
fn any_ending_signal_of_the_runtime_is_a_stop() {
    for (signal, status, expected) in [
        (SIGHUP, 129 << 8, "stopped-by-signal"),
        (36, 36, "stopped-by-signal"),
        (SIGTERM, 0, "stopped"),
        (SIGHUP, 5 << 8, "exited-with-error"),
    ] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let app = first(web, 100, "app");
        let runc = runc(&mut node);
        node.signal(100 * SECOND, app, signal, Some(runc));
        node.exit(100 * SECOND + MS, app, status);
        node.lethal(101 * SECOND);
        assert_eq!(only(&node).pattern, expected, "{signal}");
    }
}

#[test]
fn an_ignored_stop_signal_of_the_image_is_reported() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let app = first(web, 100, "app");
    let runc = runc(&mut node);
    node.ignored(100 * SECOND, app, SIGUSR1, runc);
    node.signal(110 * SECOND, app, SIGKILL, Some(runc));
    node.exit(110 * SECOND + MS, app, SIGKILL);
    node.lethal(111 * SECOND);
    let found = only(&node);
    assert_eq!(found.pattern, "ignored-stopsignal");
    assert!(found.title.contains("SIGUSR1"), "{}", found.title);
}

#[test]
fn a_stop_from_outside_that_is_obeyed_is_reported() {
    let mut node = Node::new("n1");
    let web = node.container("web", "web");
    let session = node.unit("session-3.scope");
    let app = first(web, 100, "app");
    node.signal(100 * SECOND, app, SIGTERM, Some(Process::of_node(session, 55, "bash")));
    node.exit(101 * SECOND, app, 0);
    node.lethal(102 * SECOND);
    assert_eq!(only(&node).pattern, "stopped-from-outside");
}

#[test]
fn a_signal_survived_before_explains_an_end_only_perhaps() {
    // When each is sent and how much later it ends, in milliseconds, and what is found.
    let cases: [(&[u64], u64, &str); 5] = [
        (&[0], 1000, "stopped-from"),
        // As timeout(1) sends it.
        (&[0, 1], 1000, "stopped-from"),
        (&[0, 5000], 1000, "signalled-again-before-end"),
        // Somebody is impatient, and it ends in its own time.
        (&[0, 5000], 10_000, "signalled-again-before-end"),
        (&[0, 30_000, 60_000], 1000, "signalled-again-before-end"),
    ];
    for (is_inside, (times, after, expected)) in [false, true].into_iter().flat_map(|is| cases.map(|case| (is, case))) {
        let mut node = Node::new("n1");
        let (web, session) = (node.container("web", "web"), node.unit("session-3.scope"));
        let app = first(web, 100, "app");
        let sender = if is_inside { member(web, 120, "sh") } else { Process::of_node(session, 55, "bash") };
        for time in times {
            node.signal(100 * SECOND + time * MS, app, SIGTERM, Some(sender));
        }
        node.exit(100 * SECOND + (times.last().expect("one") + after) * MS, app, 3 << 8);
        node.lethal(200 * SECOND);
        let found = only(&node);
        assert!(found.pattern.starts_with(expected), "{times:?} {is_inside}: {found:#?}");
        assert_eq!(found.confidence >= 0.8, expected == "stopped-from", "{found:#?}");
    }
}

#[test]
fn a_signal_of_a_write_or_timer_names_no_process() {
    const SIGPIPE: u32 = 13;
    const SIGALRM: u32 = 14;
    for (signal, is_of_kernel, because) in
        [(SIGPIPE, false, "a pipe or socket that nobody reads"), (SIGALRM, true, "a timer that it had set ran out")]
    {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let app = first(web, 100, "app");
        node.signal(100 * SECOND, app, signal, (!is_of_kernel).then_some(app));
        if is_of_kernel {
            node.sent_while_running(77);
        }
        node.exit(100 * SECOND + MS, app, signal);
        node.lethal(101 * SECOND);
        let found = only(&node);
        let death = found.death.as_ref().expect("somebody died");
        assert!(death.verdict.contains(because) && !death.verdict.contains("77"), "{death:#?}");
        assert!(death.sender.as_ref().is_some_and(|sender| sender.kernel), "{death:#?}");
        assert!(found.summary.contains(because), "{}", found.summary);
    }
}

#[test]
fn a_signal_that_a_process_asked_for_names_nobody() {
    const SIGIO: u32 = 29;
    const SI_TIMER: i32 = -2;
    const POLL_IN: i32 = 1;
    for (signal, code, because) in [
        (40, SI_TIMER, "a timer that it had set ran out"),
        (SIGUSR1, SI_TIMER, "a timer that it had set ran out"),
        (SIGTERM, SI_TIMER, "a timer that it had set ran out"),
        (40, POLL_IN, "a file that it watches"),
        (SIGIO, POLL_IN, "a file that it watches"),
        (SIGIO, 128, "a file that it watches"),
    ] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let app = first(web, 100, "app");
        node.signal(100 * SECOND, app, signal, None);
        node.sent_while_running(77);
        node.sent_with_code(code);
        node.exit(100 * SECOND + MS, app, signal);
        node.lethal(101 * SECOND);
        let found = only(&node);
        assert_eq!(found.pattern, "exited-with-error", "{signal} {code}");
        let death = found.death.as_ref().expect("somebody died");
        assert!(death.verdict.contains(because) && !death.verdict.contains("77"), "{death:#?}");
        assert!(death.sender.as_ref().is_some_and(|sender| sender.kernel && sender.pid == 0), "{death:#?}");
        assert!(found.summary.contains(because), "{}", found.summary);
    }
}

/// Any process may queue a signal with a code by which the kernel says that a timer ran out.
#[test]
fn a_code_made_up_by_its_sender_is_no_timers() {
    for (signal, code) in [(14, -2), (SIGKILL, -3), (40, -4), (SIGUSR1, -5), (SIGTERM, -60)] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let session = node.unit("session-3.scope");
        let app = first(web, 100, "app");
        node.signal(100 * SECOND, app, signal, Some(Process::of_node(session, 55, "forger")));
        node.sent_with_code(code);
        node.exit(100 * SECOND + MS, app, signal);
        node.lethal(101 * SECOND);
        let found = only(&node);
        assert_eq!(found.pattern, "killed-from-outside", "{signal} {code}");
        let death = found.death.as_ref().expect("somebody died");
        assert!(death.sender.as_ref().is_some_and(|sender| !sender.kernel && sender.pid == 55), "{death:#?}");
        assert!(!death.verdict.contains("because") && !found.summary.contains("because"), "{found:#?}");
    }
}

#[test]
fn a_handled_signal_explains_an_end_only_perhaps() {
    for (times, expected) in [(1, "interrupted-from-outside"), (5, "exited-with-error")] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let session = node.unit("session-3.scope");
        let app = first(web, 100, "app");
        for time in 0..times {
            node.signal((90 + 2 * time) * SECOND, app, SIGHUP, Some(Process::of_node(session, 55, "reloader")));
        }
        node.exit((90 + 2 * (times - 1)) * SECOND + SECOND, app, 1 << 8);
        node.lethal(110 * SECOND);
        let found = only(&node);
        assert_eq!(found.pattern, expected, "{times}");
        assert!(found.confidence <= 0.8 && !found.summary.contains("obeyed"), "{found:#?}");
    }
}

#[test]
fn a_master_that_kills_its_worker_is_named_as_killer() {
    for signal in [SIGABRT, SIGKILL] {
        let mut node = Node::new("n1");
        let web = node.container("web", "web");
        let (master, worker) = (first(web, 100, "gunicorn"), member(web, 107, "worker"));
        node.signal(100 * SECOND, worker, signal, Some(master));
        node.exit(100 * SECOND + MS, worker, signal);
        node.lethal(101 * SECOND);
        let found = only(&node);
        assert_eq!(found.pattern, "killed-by-own-process");
        assert!(found.summary.contains("gunicorn"), "{}", found.summary);
    }
}
