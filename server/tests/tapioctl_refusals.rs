//! What `tapioctl` refuses, and what it says of servers and names that are not there.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tapio_server::query;
use tapio_server::silences::Silences;
use tapio_wire::program::http::{Bounds, serve as serve_http};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;

use crate::cluster_support::until;
use crate::programs::TAPIOCTL;
use crate::tapioctl_output::{Fixed, Server, output as run, serve};

/// Serves the same store at another address, with an archive.
fn serve_archive(server: &Server) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("LOCK"), "").expect("an archive without a segment");
    let listener = server.runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let events = query::EventSource::new(folder.path());
    let service = query::service_with_events(
        Arc::clone(&server.machine.store),
        Arc::new(Fixed),
        events,
        None,
        Arc::new(Silences::in_memory()),
    );
    let router = tonic::transport::Server::builder().add_service(service);
    server.runtime.spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    (folder, address)
}

/// A port where connections are made and nothing is ever said; and one that answers in HTTP/1.
fn wrong_servers() -> (std::net::TcpListener, String, String) {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = silent.local_addr().expect("an address").to_string();
    let http = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let http_address = http.local_addr().expect("an address").to_string();
    std::thread::spawn(move || {
        for stream in http.incoming() {
            let mut stream = stream.expect("a connection");
            // The other side may have left.
            let _ = std::io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n");
        }
    });
    (silent, address, http_address)
}

#[test]
fn a_server_that_never_answers_is_passed_over() {
    let server = serve();
    let (_silent, silent, http) = wrong_servers();
    for first in [&silent, &http] {
        let began = std::time::Instant::now();
        let (output, text) = run(&format!("{first},{}", server.address), &["findings", "--json"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && text.contains("\"pattern\""), "{first}: {text} {said}");
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    }
    let (output, _) = run(&format!("{silent},{http}"), &["findings"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains(&format!("{silent}: it did not answer within 2 s")) && said.contains(&http), "{said}");
    // The only one is given more time, and not as long as a request may take.
    for command in [&["findings"][..], &["events"], &["status"]] {
        let began = std::time::Instant::now();
        let (output, _) = run(&silent, command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(said.contains(&format!("{silent}: it did not answer within 5 s")), "{said}");
        assert!(began.elapsed() < Duration::from_secs(15), "{command:?}: {:?}", began.elapsed());
    }
}

/// Runs `tapioctl` where `servers.test` has these addresses. `None` where nobody may mount, and that is not required.
fn run_with_name(addresses: &[&str], port: u16, arguments: &[&str]) -> Option<std::process::Output> {
    let folder = tempfile::tempdir().expect("a folder");
    let hosts = folder.path().join("hosts");
    let lines: String = addresses.iter().map(|address| format!("{address} servers.test\n")).collect();
    fs::write(&hosts, lines).expect("written");
    let script = "mount --bind \"$1\" /etc/hosts || exit 99; shift; exec \"$@\"";
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .arg(&hosts)
        .args([TAPIOCTL, "--server", &format!("servers.test:{port}")])
        .args(arguments)
        .output()
        .expect("unshare is in util-linux");
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(99) || said.contains("unshare failed") {
        let text = format!("a_name_stands_for_all_its_addresses needs a mount namespace: {said}");
        assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "{text}");
        eprintln!("SKIP: {text}");
        return None;
    }
    Some(output)
}

#[test]
fn a_name_stands_for_all_its_addresses() {
    let server = serve();
    let listener = server.runtime.block_on(TcpListener::bind("127.0.0.2:0")).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let service = query::service(Arc::clone(&server.machine.store), Arc::new(Fixed));
    let router = tonic::transport::Server::builder().add_service(service);
    server.runtime.spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    let finds = |addresses: &[&str]| {
        let output = run_with_name(addresses, port, &["findings", "--json"])?;
        let (text, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && text.contains("\"pattern\""), "{addresses:?}: {text} {said}");
        Some(())
    };
    // Nobody listens at the first; then somebody does who never answers, as a server that is stopped.
    if finds(&["127.0.0.1", "127.0.0.2"]).is_none() {
        return;
    }
    let _silent = std::net::TcpListener::bind(("127.0.0.1", port)).expect("it is free on this address");
    finds(&["127.0.0.1", "127.0.0.2"]).expect("a namespace, as before");
    let output = run_with_name(&["127.0.0.1", "127.0.0.3"], port, &["findings"]).expect("a namespace, as before");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    let silent = format!("servers.test:{port} (127.0.0.1): it did not answer within 2 s");
    let refused = format!("nor at servers.test:{port} (127.0.0.3): 127.0.0.3:{port}: Connection refused");
    assert!(said.contains(&silent) && said.contains(&refused), "{said}");
}

#[test]
fn a_port_that_does_not_exist_is_reported() {
    for (server, says) in [
        ("127.0.0.1:99999", "port `99999` is out of range: 1 to 65535"),
        ("[::1]:70000", "port `70000` is out of range"),
        ("127.0.0.1:0", "port 0 is out of range"),
    ] {
        let (output, _) = run(server, &["status"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && said.contains(says), "{server}: {said}");
    }
}

#[test]
fn an_http_port_is_distinguished_from_an_absent_server() {
    let server = serve();
    let listener = server.runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let ((_end, ended), answer) =
        (tokio::sync::watch::channel(false), |_, _| async { Ok(hyper::Response::new(String::new())) });
    server.runtime.spawn(serve_http(listener, Bounds::default(), answer, ended));
    let (output, _) = run(&address, &["status"]);
    let said = String::from_utf8_lossy(&output.stderr);
    let is_named = said.contains("is it the gRPC port, 9090 by default");
    assert_eq!((output.status.code(), is_named), (Some(3), true), "{said}");
}

#[test]
fn impossible_names_are_wrong_usage_unknown_names_are_reported() {
    let server = serve();
    for wrong in [
        &["findings", "--severity", "huge"][..],
        &["events", "--kind", "exit,nonsense"],
        &["events", "--since", "1m", "--until", "2m"],
        // What is empty would choose everything.
        &["findings", "--pod", ""],
        &["findings", "--severity", ""],
        &["findings", "-n", ""],
        &["findings", "--workload", ""],
        &["findings", "--pattern", ""],
        &["findings", "--node", ""],
        &["finding", ""],
        &["events", "--pod", ""],
        &["events", "--node", ""],
        &["events", "--entity", ""],
        &["events", "--kind", ""],
        &["events", "-n", ""],
        &["events", "--workload", ""],
        &["events", "--limit", "1000001"],
        &["why", ""],
        &["why", "pod/web", "-n", ""],
        &["why", "container/dc31f"],
        &["why", "deploy/a/b/c"],
        &["why", "unit/a/b"],
        &["why", "container/web-0/web"],
        &["why", "pod/web 0"],
        &["why", "pod/web\n"],
        &["why", "host/a\nb"],
        &["ledger", "--node", ""],
    ] {
        let (output, _) = run(&server.address, wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {output:?}");
    }
    let (output, _) = run(&server.address, &["why", "deploy/\x1b[31ma/b/c"]);
    assert!(!output.stderr.contains(&0x1b) && output.stderr.contains(&b'['), "{output:?}");
    let (output, _) = run(&server.address, &["why", "container/zz"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("A container is called by its id"), "{said}");
    for (unknown, expected) in [
        (["findings", "--pattern", "nope"], "no built-in pattern is called nope"),
        (["findings", "--node", "n9"], "no node is called n9; known are: n1"),
    ] {
        let (output, text) = run(&server.address, &unknown);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), text.as_str()), (Some(0), "No findings.\n"), "{said}");
        assert!(said.contains(expected), "{said}");
    }
    let nobody = ["findings", "--pod", "nobody", "-n", "shop"];
    let (answer, text) = run(&server.address, &nobody);
    let said = String::from_utf8_lossy(&answer.stderr);
    assert_eq!((answer.status.code(), text.as_str()), (Some(0), "No findings.\n"), "{said}");
    assert!(said.contains("no finding names namespace shop, pod nobody") && said.contains("not known"), "{said}");
    let (_folder, address) = serve_archive(&server);
    let (answer, text) = run(&address, &nobody);
    let said = String::from_utf8_lossy(&answer.stderr);
    assert_eq!((answer.status.code(), text.as_str()), (Some(0), "No findings.\n"), "{said}");
    assert!(said.contains("no finding and no event in the archive names namespace shop, pod nobody"), "{said}");
    let (output, _) = run(&server.address, &["findings", "--pattern", "crashed"]);
    assert!(output.stderr.is_empty(), "a pattern that there is, and found nothing: {output:?}");
    let (_, status) = run(&server.address, &["status"]);
    assert!(status.contains("0 events correlated") && status.contains("2 segments"), "{status}");
}

/// With kubectl and without: neither knows such a cluster.
#[test]
fn a_cluster_that_kubectl_cannot_reach_is_reported() {
    let arguments = ["--port-forward", "--kubeconfig", "/nonexistent/config", "findings"];
    let output = Command::new(TAPIOCTL).args(arguments).output().expect("tapioctl runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let is_named =
        said.contains("service/tapio-server in namespace tapio-system") || said.contains("cannot run kubectl");
    assert_eq!((output.status.code(), is_named), (Some(3), true), "{said}");
}

/// `tapioctl` with a program in kubectl's place that forwards to a server, and says in a file which process it is.
fn through_a_forward(folder: &Path, server: &str, arguments: &[&str]) -> Command {
    let (path, pid) = (folder.join("kubectl"), folder.join("pid"));
    let script =
        format!("#!/bin/sh\necho $$ >{}\necho 'Forwarding from {server} -> 9090'\nexec sleep 60\n", pid.display());
    fs::write(&path, script).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
    let mut command = Command::new(TAPIOCTL);
    command.arg("--port-forward").args(arguments).env_remove("TAPIO_SERVER");
    command.env("PATH", format!("{}:{}", folder.display(), std::env::var("PATH").expect("there is one")));
    command
}

fn forwarder_is_gone(folder: &Path) {
    let pid = fs::read_to_string(folder.join("pid")).expect("it ran");
    until("kubectl has ended", || (!Path::new("/proc").join(pid.trim()).exists()).then_some(()));
}

#[test]
fn a_forwarded_port_is_asked_and_given_back() {
    let server = serve();
    let folder = tempfile::tempdir().expect("a folder");
    let output = through_a_forward(folder.path(), &server.address, &["findings"]).output().expect("tapioctl runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("memory-limit-kill"));
    forwarder_is_gone(folder.path());
    // Also when this program is asked to end while it watches.
    fs::remove_file(folder.path().join("pid")).expect("removed");
    let mut watching = through_a_forward(folder.path(), &server.address, &["findings", "--watch"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("tapioctl runs");
    let mut line = String::new();
    // Kept open: whoever writes into a closed pipe ends by itself.
    let mut output = BufReader::new(watching.stdout.take().expect("a pipe"));
    output.read_line(&mut line).expect("the heading");
    kill_process(Pid::from_child(&watching), Signal::TERM).expect("it is there");
    assert_eq!(watching.wait().expect("it ends").code(), Some(1));
    drop(output);
    forwarder_is_gone(folder.path());
}
