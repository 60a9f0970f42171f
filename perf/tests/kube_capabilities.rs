//! On a real Kubernetes node: what the collector can do with all capabilities of its manifest, and without each.
//!
//! Prints the table of `docs/capabilities.md`. Runs only by `make test-kube`.

use std::collections::BTreeSet;
use std::process::{Child, Command};

use crate::kube_node::installed::{COLLECTOR, SERVER, Tapio};
use crate::kube_node::{Namespace, await_that, container, has_node, pod};
use serde_json::{Value, json};

/// Capabilities of the manifest that the lab's host has itself: SYS_RESOURCE is for kernels before 5.11, and cannot be
/// granted here.
const ALL: [&str; 5] = ["BPF", "PERFMON", "NET_ADMIN", "DAC_READ_SEARCH", "SYS_PTRACE"];
const USER: u32 = 1000;

#[test]
fn each_capability_is_needed_for_what_its_table_says() {
    if !has_node("each_capability_is_needed_for_what_its_table_says") {
        return;
    }
    let tapio = Tapio::install();
    tapio.rolled_out(SERVER);
    tapio.rolled_out(COLLECTOR);
    let namespace = Namespace::make("capabilities");
    let mut case = 0;
    let mut off_with = |capabilities: &[&str]| {
        tapio.set_capabilities(capabilities);
        tapio.rolled_out(COLLECTOR);
        case += 1;
        let off = off(&tapio, &namespace, case);
        println!("capabilities {}:", if capabilities.is_empty() { "none".into() } else { capabilities.join(", ") });
        for one in &off {
            println!("    off: {one}");
        }
        off
    };
    let without = |left_out: &str| -> Vec<&str> { ALL.into_iter().filter(|&name| name != left_out).collect() };
    let everything = off_with(&ALL);
    let is_of_probe =
        |off: &BTreeSet<String>| off.iter().any(|one| one.starts_with("probe ") || one.starts_with("source ebpf"));
    assert!(!is_of_probe(&everything), "{everything:?}");
    for name in ["BPF", "PERFMON"] {
        let off = off_with(&without(name));
        assert!(is_of_probe(&off), "without {name}: {off:?}");
    }
    let off = off_with(&without("NET_ADMIN"));
    let more: Vec<_> = off.difference(&everything).collect();
    let is_of_packets =
        |one: &&String| ["probe dns_query:", "probe packet_received:"].iter().any(|probe| one.starts_with(probe));
    assert!(more.len() == 2 && more.iter().all(is_of_packets), "without NET_ADMIN: {more:?}");
    for name in ["DAC_READ_SEARCH", "SYS_PTRACE"] {
        assert_eq!(off_with(&without(name)), everything, "without {name}");
    }
    let least = off_with(&["BPF", "PERFMON"]);
    assert_eq!(least, off, "only BPF and PERFMON");
    off_with(&[]);
    drop(namespace);
    tapio.uninstall();
}

/// Everything that the collector says is off, and what it could not read about two senders of a fatal signal.
fn off(tapio: &Tapio, namespace: &Namespace, case: u32) -> BTreeSet<String> {
    let collector = tapio.pods("collector").into_iter().next().expect("a collector");
    let readiness: Value = serde_json::from_str(&collector.readiness()).expect("JSON");
    let mut off = BTreeSet::new();
    let sources = readiness["sources"].as_object().expect("sources");
    let state = |source: &str| sources[source].as_str().unwrap_or_default().to_owned();
    off.extend(
        sources
            .keys()
            .filter(|name| !state(name).starts_with("running"))
            .map(|name| format!("source {name}: {}", state(name))),
    );
    if readiness["cpu_budget"]["includes_probes"] != true {
        off.insert("the probes' part of the CPU budget".into());
    }
    if state("ebpf").starts_with("running") {
        for probe in tapio.probes(&collector).unwrap_or_else(|error| panic!("{error}")) {
            let (program, verdict) =
                (probe["program"].as_str().expect("a name"), probe["verdict"].as_str().expect("a verdict"));
            if !["attached", "disabled"].contains(&verdict) {
                assert!(state("ebpf").contains(program), "{program} is not in {}", state("ebpf"));
                off.insert(format!("probe {program}: {verdict}: {}", probe["reason"].as_str().unwrap_or_default()));
            }
        }
    }
    for uid in [0, USER] {
        if let Err(missing) = evidence_of_a_kill(tapio, namespace, case, uid) {
            off.insert(format!("evidence of a sender with uid {uid}: {missing}"));
        }
    }
    off
}

/// Has somebody of this host kill a pod; an error says what was not read about it.
fn evidence_of_a_kill(tapio: &Tapio, namespace: &Namespace, case: u32, uid: u32) -> Result<(), String> {
    let name = format!("victim-{case}-{uid}");
    let mut victim = container("app", "busybox sleep 600");
    victim["securityContext"] = json!({"runAsUser": USER});
    victim["resources"] = json!({"limits": {"memory": "32Mi"}});
    namespace.apply(vec![pod(&name, "Never", victim)]);
    let (_, victim) = namespace.process_of(&format!("pod/{name}"));
    let mut sender = Sender::kill(uid, victim);
    let arguments = ["events", "-n", &namespace.0, "--pod", &name, "--limit", "10000"];
    let state = format!("that {name} is reported to have ended");
    let events = await_that(&state, |seen| {
        let events = tapio.tapioctl_json(&arguments).map_err(|error| seen.clone_from(&error)).ok()?;
        *seen = events.iter().map(|event| format!("\n{} {}", event["kind"], event["text"])).collect();
        // Kubernetes reports it seconds after the kernel.
        let has_ended = |event: &Value| event["kind"] == "container_state" && event["detail"]["exit_code"] == 137;
        events.iter().any(has_ended).then_some(events)
    });
    sender.end();
    if !events.iter().any(|event| event["kind"] == "signal") {
        return Err("no kernel event".into());
    }
    let observed = |key: &str, is: &dyn Fn(&Value) -> bool| {
        events.iter().any(|event| event["kind"] == "observation" && is(&event["detail"][key]))
    };
    let wanted = [
        ("its name", observed("process_comm", &|name| name == "sh")),
        ("its user", observed("process_uid", &|user| *user == uid)),
        (
            "its program",
            observed("process_command", &|command| command.as_str().is_some_and(|text| text.contains("sh"))),
        ),
        ("the victim's limit", observed("memory_limit_bytes", &|limit| *limit == 32 << 20)),
    ];
    let missing: Vec<&str> = wanted.into_iter().filter(|(_, is_known)| !is_known).map(|(what, _)| what).collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("no {}", missing.join(", no "))) }
}

/// A process that kills another one and stays until it is ended, so that it can be read about.
struct Sender(Child);

impl Sender {
    fn kill(uid: u32, victim: u32) -> Self {
        let script = format!("kill -9 {victim}; read wait");
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={uid}"), "--clear-groups", "--", "sh", "-c", &script]);
        // It waits for a line that never comes.
        Self(command.stdin(std::process::Stdio::piped()).spawn().expect("setpriv starts"))
    }

    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.end();
    }
}
