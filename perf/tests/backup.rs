//! What docs/backup.md says, done: an archive is copied while the server writes it, and the copy is whole.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::lab::{self, FedNode};
use tapio_perf::processes::{Server, ServerOptions, bin_dir, binary};

/// `tapio-server archive copy`, as the page has it; what it said.
fn copy(from: &Path, to: &Path) -> String {
    let output = Command::new(lab::program("tapio-server")).args(["archive", "copy"]).args([from, to]).output();
    let output = output.expect("it starts");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// How many copies are made.
const COPIES: usize = 100;

fn verify(dir: &Path) -> String {
    let program = binary("tapio-server", &bin_dir(None).expect("a folder")).expect("the server");
    let output = Command::new(program).args(["archive", "verify"]).arg(dir).output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

#[test]
fn a_copy_of_a_running_servers_archive_can_be_restored() {
    let _turn = lab::beside();
    let server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let node = FedNode::start("backed-up", &server.address(), 20_000.0);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 30_000);
    let findings = |server: &Server| {
        let listed = server.client().and_then(|mut client| client.findings());
        let listed = listed.unwrap_or_else(|error| panic!("{error}\n{}", server.output()));
        listed.into_iter().map(|finding| finding.id).collect::<BTreeSet<_>>()
    };
    let before = findings(&server);
    // By now what those rest on is durable, and what does not stand any more is gone.
    node.wait_for_progress(&server, &mut archived, 5000);
    let found: Vec<String> = findings(&server).intersection(&before).cloned().collect();
    let folder = tempfile::tempdir().expect("a folder");
    let (backup, restored) = (folder.path().join("backup"), folder.path().join("restored"));
    copy(server.archive_dir(), &backup);
    assert!(verify(&backup).contains("sound"));
    // The original went on, and has all of it.
    node.wait_for_progress(&server, &mut archived, 1000);
    node.finish(&server);

    copy(&backup, &restored);
    let options = ServerOptions { archive_dir: Some(restored.clone()), ..ServerOptions::default() };
    let mut second = Server::start(&options).unwrap_or_else(|error| panic!("{error}"));
    let status = second.client().and_then(|mut client| client.status()).unwrap_or_else(|error| panic!("{error}"));
    let sources = status.nodes.iter().flat_map(|node| &node.epochs).flat_map(|epoch| &epoch.sources);
    let events: u64 = sources.map(|source| source.archived).sum();
    assert!(events >= 30_000, "{events} events are back");
    assert_eq!(status.unexplained_events, 0, "{status:?}");
    let back = findings(&second);
    for finding in &found {
        assert!(back.contains(finding), "{finding:?} is not among {back:?}");
    }
    second.stop().expect("it ends");
    verify(&restored);
}

/// Copies of a server that writes as fast as this machine lets it. With `cp` in the place of `archive copy` some of them are found
/// damaged, more of them the busier the machine is.
#[test]
fn a_hundred_copies_under_load_lack_nothing_acknowledged() {
    let _turn = lab::alone();
    // Segments are small, so that some are closed and opened while they are copied.
    let options = ServerOptions { extra_archive: ", segment_bytes: 8MiB".into(), ..ServerOptions::default() };
    let server = Server::start(&options).unwrap_or_else(|error| panic!("{error}"));
    let node = FedNode::start("copied", &server.address(), 100_000.0);
    let mut archived = 0;
    node.wait_for_progress(&server, &mut archived, 30_000);
    let folder = tempfile::tempdir().expect("a folder");
    for turn in 0..COPIES {
        let acknowledged = node.archived(&server);
        let to = folder.path().join(format!("copy-{turn}"));
        let from = server.archive_dir();
        // For comparison: shows how often a plain copy is damaged.
        if std::env::var_os("TAPIO_TEST_PLAIN_CP").is_some() {
            fs::create_dir(&to).expect("made");
            let script = "cp --sparse=always --preserve=timestamps \"$0\"/*.segment \"$1\"";
            let mut command = Command::new("/bin/sh");
            assert!(command.args(["-c", script]).args([from, &to]).status().expect("sh starts").success());
        } else {
            copy(from, &to);
        }
        let said = verify(&to);
        let events =
            |line: &str| line.split(", ").find_map(|part| part.strip_suffix(" events: sound")?.parse::<u64>().ok());
        let copied = said.lines().last().and_then(events).unwrap_or_else(|| panic!("no sum in {said}"));
        assert!(
            copied >= acknowledged,
            "copy {turn} has {copied} events of {acknowledged} that were acknowledged before"
        );
        fs::remove_dir_all(&to).expect("removed");
    }
    node.wait_for_progress(&server, &mut archived, 1000);
    node.finish(&server);
}
