//! What is wrong is refused at the start, with a text that says what and where, and an exit code of its own.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::lab::Need::{Bpf, Root};
use crate::lab::{PERF, assert_says, can_run, program, refusal};
use tapio_perf::processes::collector::{self, Feed};
use tapio_perf::processes::{CollectorOptions, Server, ServerOptions, free_port, server};

/// Starts a program with a configuration; what it said when it refused.
fn refused(name: &str, config: &str) -> (String, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("config.yaml");
    fs::write(&file, config).expect("written");
    let mut command = Command::new(program(name));
    command.arg("--config").arg(&file);
    let said = refusal(command, name);
    (said, file.display().to_string())
}

#[test]
fn an_unknown_key_is_named_with_file_and_line() {
    for (name, config, key) in [
        ("tapio-collector", "collector:\n  nod_name: x\n", "nod_name"),
        ("tapio-collector", "colector: {}\n", "colector"),
        ("tapio-server", "server:\n  prot: 9090\n", "prot"),
        ("tapio-server", "archive:\n  dir: /tmp\n  max_byte: 1GiB\n", "max_byte"),
    ] {
        let (said, file) = refused(name, config);
        assert_says(&said, &[key, &file, "line"]);
    }
}

#[test]
fn a_wrong_type_or_an_impossible_value_is_named() {
    for (name, config, key) in [
        ("tapio-collector", "health:\n  port: banana\n", "port"),
        ("tapio-collector", "collector:\n  sampling_rate: 7.0\n", "sampling_rate"),
        ("tapio-collector", "collector:\n  enabled_collectors: [ebfp]\n", "ebfp"),
        ("tapio-collector", "grpc:\n  server_endpoints: []\n", "server_endpoints"),
        ("tapio-server", "server:\n  port: 99999\n", "port"),
        ("tapio-server", "archive:\n  max_bytes: lots\n", "max_bytes"),
    ] {
        let (said, file) = refused(name, config);
        assert_says(&said, &[key, &file]);
    }
}

#[test]
fn a_configuration_that_is_not_there_is_named() {
    for name in ["tapio-collector", "tapio-server"] {
        let mut command = Command::new(program(name));
        command.args(["--config", "/nonexistent/tapio.yaml"]);
        assert_says(&refusal(command, name), &["/nonexistent/tapio.yaml", "--config"]);
    }
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let folder = tempfile::tempdir().expect("a folder");
    let free = free_port().expect("a port");
    for config in
        [server::config_text(folder.path(), port, free, ""), server::config_text(folder.path(), free, port, "")]
    {
        let (said, _) = refused("tapio-server", &config);
        assert_says(&said, &[&port.to_string(), "in use"]);
    }
    let options = CollectorOptions { node: "n".into(), server: "127.0.0.1:1".into(), ..CollectorOptions::default() };
    // The health address is all interfaces by default; the taken one is among them.
    let config = collector::config_text(&options, &folder.path().join("rings.sock"), port);
    let (said, _) = refused("tapio-collector", &config);
    assert_says(&said, &[&port.to_string(), "in use"]);
}

#[test]
fn an_archive_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    fs::write(&file, "in the way").expect("written");
    for archive in [Path::new("/proc/tapio-archive"), &file.join("archive")] {
        let ports = [free_port(), free_port()].map(|port| port.expect("a port"));
        let config = server::config_text(archive, ports[0], ports[1], "");
        let (said, _) = refused("tapio-server", &config);
        assert_says(&said, &[&archive.display().to_string()]);
    }
}

#[test]
fn a_second_server_on_the_same_archive_is_refused() {
    let first = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let ports = [free_port(), free_port()].map(|port| port.expect("a port"));
    let config = server::config_text(first.archive_dir(), ports[0], ports[1], "");
    let (said, _) = refused("tapio-server", &config);
    assert_says(&said, &[&first.archive_dir().display().to_string(), "another"]);
    let ready = tapio_perf::processes::http::get(first.http_port(), "/readyz");
    assert_eq!(ready.expect("the first one answers").0, 200);
}

fn ebpf_config(folder: &Path) -> String {
    let options = CollectorOptions {
        node: "n".into(),
        server: "127.0.0.1:1".into(),
        feed: Feed::Ebpf,
        ..CollectorOptions::default()
    };
    let port = free_port().expect("a port");
    collector::config_text(&options, &folder.join("rings.sock"), port)
}

#[test]
fn a_kernel_without_type_information_is_reported() {
    if !can_run("a_kernel_without_type_information_is_reported", &[Root, Bpf]) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("collector.yaml");
    fs::write(&file, ebpf_config(folder.path())).expect("written");
    let command = || {
        let mut command = Command::new(program("tapio-collector"));
        command.arg("--config").arg(&file);
        command
    };
    let mut by_environment = command();
    by_environment.env("TAPIO_BTF", "/nonexistent/vmlinux");
    let mut by_flag = command();
    by_flag.args(["--btf", "/nonexistent/vmlinux"]);
    for command in [by_environment, by_flag] {
        let said = refusal(command, "tapio-collector without BTF");
        assert_says(&said, &["BTF", "/nonexistent/vmlinux"]);
    }
}

#[test]
fn probes_without_privileges_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let everybody = |path: &Path, mode| {
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("permissions");
    };
    everybody(folder.path(), 0o755);
    let file = folder.path().join("collector.yaml");
    fs::write(&file, ebpf_config(folder.path())).expect("written");
    everybody(&file, 0o644);
    // A copy, since nobody may not be let into the folder of the build.
    let copy = folder.path().join("tapio-collector");
    fs::copy(program("tapio-collector"), &copy).expect("copied");
    everybody(&copy, 0o755);
    let mut command = Command::new(&copy);
    if rustix::process::geteuid().is_root() {
        // Not by the command's own uid: it is started through another program, which would not take that over.
        command = Command::new("/usr/bin/setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]).arg(&copy);
    }
    command.arg("--config").arg(&file);
    let said = refusal(command, "tapio-collector as nobody");
    let lower = said.to_lowercase();
    assert!(lower.contains("root") || lower.contains("cap_bpf"), "it does not say which rights it needs:\n{said}");
}

/// A load run, as far as `tapio-perf capacity` needs one.
const LOAD_RUN: &str = r#"{"nodes": 1, "events_archived": 10, "events_per_second": 1.0, "bytes_wire": 100, "ledger_closes": true,
    "collector": {"cpu_ns_per_event": 1.0, "rss_bytes": 1}, "server": {"cpu_ns_per_event": 1.0, "rss_bytes": 1}}"#;

#[test]
fn a_reader_that_leaves_ends_no_program_with_a_panic() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run.json");
    fs::write(&run, LOAD_RUN).expect("written");
    let run = run.to_str().expect("a path");
    let defaults = folder.path().join("config.yaml");
    fs::write(&defaults, "logging: {level: info}\n").expect("written");
    let defaults = defaults.to_str().expect("a path");
    for (name, arguments, code) in [
        ("tapio-perf", &["capacity", "--nodes", "3", "--measured", run][..], 0),
        ("tapio-perf", &["capacity", "--nodes", "3", "--measured", run, "--json"], 0),
        ("tapio-perf", &["truth", "--list"], 0),
        ("tapio-collector", &["config"], 0),
        ("tapio-collector", &["check", "--config", defaults], 0),
        ("tapio-server", &["config"], 0),
        ("tapio-server", &["check", "--config", defaults], 0),
        ("tapioctl", &["completions", "bash"], 0),
        // Their errors go to a pipe that nobody reads, too.
        ("tapio-perf", &["load", "--nodes", "0"], 2),
        ("tapio-collector", &["check"], 2),
        ("tapio-server", &["check"], 2),
        ("tapioctl", &["--server", "127.0.0.1:1", "status"], 3),
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = Command::new(program(name));
        command.args(arguments).stdout(writer.try_clone().expect("the same")).stderr(writer);
        let status = command.status().expect("it starts");
        assert_eq!(status.code(), Some(code), "{name} {arguments:?}: {status}");
    }
}

#[test]
fn wrong_flags_are_wrong_usage_and_name_what_is_right() {
    for (name, arguments, words) in [
        ("tapio-server", &["--log-level", "loud"][..], &["loud", "trace, debug, info, warn, error, off"][..]),
        ("tapio-collector", &["--log-level", "loud"], &["loud", "trace, debug, info, warn, error, off"]),
        ("tapio-server", &["--cluster-url", "nats://"], &["cluster.url", "names no host", "nats://host:4222"]),
        ("tapio-collector", &["--server", "nowhere"], &["server_endpoints", "nowhere", "host:port"]),
        ("tapioctl", &["findings", "--severity", "loud"], &["loud", "info, low, medium, high, critical"]),
        ("tapio-perf", &["load", "--profile", "loud"], &["loud", "mixed"]),
    ] {
        let output = Command::new(program(name)).args(arguments).output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{name} {arguments:?}: {said}");
        assert_says(&said, words);
    }
}

#[test]
fn tapio_perf_refuses_what_makes_no_sense() {
    let perf = |arguments: &[&str]| {
        let mut command = Command::new(PERF);
        command.args(arguments);
        refusal(command, "tapio-perf")
    };
    assert_says(&perf(&["load", "--rate", "fast"]), &["fast", "max"]);
    assert_says(&perf(&["load", "--duration", "5"]), &["5", "100ms"]);
    assert_says(&perf(&["load", "--nodes", "0"]), &["--nodes"]);
    assert_says(&perf(&["inject", "meteor"]), &["meteor", "silent-child-oom"]);
    assert_says(&perf(&["load", "--bin-dir", "/nonexistent"]), &["tapio-server", "/nonexistent", "make build"]);
}
