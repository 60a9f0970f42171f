//! What docs/backup.md says, done: an archive is copied while the server writes it, and the copy is whole.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::lab::FedNode;
use tapio_perf::processes::{Server, ServerOptions, bin_dir, binary};

/// `cp --sparse=always --preserve=timestamps`, as the page has it: segments first, then the journal.
fn copy(from: &Path, to: &Path) {
    let names = fs::read_dir(from).expect("the archive").map(|entry| entry.expect("an entry").path());
    let wanted = |path: &Path, part: &str| path.file_name().is_some_and(|name| name.to_string_lossy().contains(part));
    let (segments, rest): (Vec<_>, Vec<_>) = names
        .filter(|path| wanted(path, ".segment") || wanted(path, "findings.jsonl"))
        .partition(|path| wanted(path, ".segment"));
    for files in [segments, rest] {
        if files.is_empty() {
            continue;
        }
        let mut command = Command::new("cp");
        command.args(["--sparse=always", "--preserve=timestamps"]).args(&files).arg(to);
        assert!(command.status().expect("cp starts").success());
    }
}

fn verify(dir: &Path) -> String {
    let program = binary("tapio-server", &bin_dir(None).expect("a folder")).expect("the server");
    let output = Command::new(program).args(["archive", "verify"]).arg(dir).output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

#[test]
fn a_copy_of_a_running_servers_archive_brings_events_and_findings_back() {
    let _turn = crate::lab::beside();
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
    fs::create_dir(&backup).expect("made");
    fs::create_dir(&restored).expect("made");
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
