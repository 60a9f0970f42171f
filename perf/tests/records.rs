//! The documented layout (`docs/records.md`) is enough: a program in another language, written by it, publishes to a real
//! collector.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tapio_perf::clock::wait_for;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions, http};

#[test]
fn a_program_written_by_the_document_is_understood() {
    let _turn = crate::lab::beside();
    const COUNT: u64 = 3000;
    let is_there = Command::new("python3").args(["-c", "import os; os.eventfd"]).output();
    if !is_there.is_ok_and(|output| output.status.success()) || cfg!(not(target_arch = "x86_64")) {
        let text = "SKIP a_program_written_by_the_document_is_understood: needs Python 3.10 on x86-64";
        assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "{text}");
        eprintln!("{text}");
        return;
    }
    let server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let collector = Collector::start(&CollectorOptions {
        node: "records".into(),
        server: server.address(),
        ..CollectorOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ringbuf/examples/publish.py");
    let output = Command::new("python3").arg(script).arg(collector.socket()).arg(COUNT.to_string()).output();
    let output = output.expect("python3 starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said} {}", String::from_utf8_lossy(&output.stderr));
    let words: Vec<u64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [COUNT, dropped] = words[..] else {
        panic!("{said}");
    };
    // Each is taken in as the kind that it says, or was declared dropped by its writer.
    let metric = |page: &str, name: &str, label: &str| -> u64 {
        let line =
            page.lines().find(|line| line.starts_with(name) && label.split(' ').all(|label| line.contains(label)));
        line.and_then(|line| line.rsplit_once(' ')?.1.parse().ok()).unwrap_or(0)
    };
    let counted = wait_for("the records in the metrics", Duration::from_secs(10), |seen| {
        let (_, page) = http::get(collector.port(), "/metrics")?;
        let taken_in = metric(&page, "tapio_collector_events_decoded_total", "source=\"shm\" kind=\"block_io\"");
        let emitted = metric(&page, "tapio_collector_events_emitted_total", "source=\"shm\"");
        *seen = format!("{taken_in} of {emitted} taken in");
        Ok((taken_in + dropped == COUNT && emitted == COUNT).then_some(()))
    });
    counted.unwrap_or_else(|error| panic!("{error}\n{}", collector.output()));
}
