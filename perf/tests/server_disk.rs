//! A disk that fails under a real server: system calls that the kernel answers with an error.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::lab::{FedNode, Need, can_run};
use tapio_perf::clock::wait_for;
use tapio_perf::processes::{Server, ServerOptions, http};

const EVENTS_PER_SECOND: f64 = 20_000.0;

/// Makes a process's system calls fail, for as long as it lives.
struct Injection(Child);

impl Injection {
    fn start(pid: u32, inject: &str) -> Self {
        let mut command = Command::new("strace");
        command.args(["-q", "-f", "-p", &pid.to_string(), "-e", "trace=fdatasync", "-e", inject, "-o", "/dev/null"]);
        Self(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("strace starts"))
    }
}

impl Drop for Injection {
    fn drop(&mut self) {
        // On SIGTERM it lets go of the process.
        if let Some(pid) = rustix::process::Pid::from_raw(self.0.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

fn poisoned(server: &Server) -> u64 {
    let (_, metrics) = http::get(server.http_port(), "/metrics").unwrap_or_else(|error| panic!("{error}"));
    let line = metrics.lines().find_map(|line| line.strip_prefix("tapio_server_archive_poisoned_segments_total "));
    line.unwrap_or_else(|| panic!("no such metric:\n{metrics}")).parse().expect("a number")
}

/// FAULTS 7.
#[test]
fn syncs_that_fail_with_eio_poison_segments_and_lose_nothing() {
    let _turn = crate::lab::beside();
    const NAME: &str = "syncs_that_fail_with_eio_poison_segments_and_lose_nothing";
    if !can_run(NAME, &[Need::Root]) {
        return;
    }
    if !Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_ok_and(|status| status.success()) {
        assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "{NAME} needs strace");
        eprintln!("SKIP {NAME}: needs strace");
        return;
    }
    // strace does not see what io_uring does.
    let mut server = Server::start(&ServerOptions {
        extra_archive: ", disk: plain, segment_bytes: 8MiB".into(),
        ..ServerOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let node = FedNode::start("kill-disk", &server.address(), EVENTS_PER_SECOND);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 5_000);
    {
        let _failing = Injection::start(server.pid().expect("it runs"), "inject=fdatasync:error=EIO:when=2+5");
        wait_for("segments to be poisoned", Duration::from_secs(30), |seen| {
            let poisoned = poisoned(&server);
            *seen = format!("{poisoned} poisoned");
            Ok((poisoned >= 5).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", server.output()));
        node.wait_for_progress(&server, &mut archived, 5_000);
    }
    node.wait_for_progress(&server, &mut archived, 5_000);
    let (ledger, states) = node.finish(&server);
    assert_eq!(ledger.dropped, 0, "{ledger}");
    assert_eq!(states, ["closed"]);
    let status = server.stop().expect("the server ends");
    assert!(status.is_some_and(|status| status.success()), "{}", server.output());
}
