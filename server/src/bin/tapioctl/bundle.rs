//! `tapioctl bundle`: one file about one finding, to attach to a report.
//!
//! What enters: a finding, what was found besides of the same workload, events around it, and how the servers and the ledgers stand.
//! What leaves: one JSON object, which a person may read before it is sent on. What must hold: a file that is there is not
//! overwritten; what is missing is in the bundle; with `--redact` the names that identify a cluster are in it nowhere.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::OpenOptions;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use clap_complete::engine::ArgValueCompleter;
use serde_json::{Value, json};
use tapio_server::render;
use tapio_wire::program::units::parse_duration;
use tapio_wire::service::{Event, Finding, GetFindingRequest, ListEventsRequest, ListFindingsRequest};

use super::events::each;
use super::output::print;
use super::server::{Client, Failure, ServerAt, connect, status};
use super::{complete, now_ns};

/// Events of one question, and findings besides.
const EVENTS_MAX: u32 = 5_000;
const FINDINGS_MAX: u32 = 100;
/// Kinds of a node's events that may have to do with a death, whomever they are about.
const NODE_KINDS: [&str; 5] = ["oom", "signal", "exit", "node_condition", "unit_state"];

#[derive(Args)]
pub struct Arguments {
    /// Id of the finding, or the beginning of the id
    #[arg(value_parser = NonEmptyStringValueParser::new(), add = ArgValueCompleter::new(complete::ids))]
    id: String,
    /// File to write, which must not exist; `-` for standard output. Default: tapio-ID.json here
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// How long before and after the finding events are included
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration)]
    around: Duration,
    /// Replace names of namespaces, pods, workloads, nodes and images, and addresses; leave arguments and log lines out
    #[arg(long)]
    redact: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.to_string())
}

/// Runs `tapioctl bundle`.
pub async fn run(server: &ServerAt, arguments: &Arguments) -> Result<(), Failure> {
    let mut client = connect(server, true).await?;
    let failed = |status: tonic::Status| Failure::of(server, &status);
    let finding =
        client.get_finding(GetFindingRequest { id: arguments.id.clone() }).await.map_err(failed)?.into_inner();
    let besides = besides(&mut client, server, &finding).await?;
    let Around { events, missing } = events(&mut client, server, &finding, arguments.around).await?;
    let mut standing = render::status_value(&status(&mut client, server).await?);
    let nodes: BTreeSet<&str> = finding
        .evidence
        .iter()
        .filter_map(|evidence| Some(evidence.entity.as_ref()?.node.as_str()))
        .chain(finding.entity.as_ref().map(|entity| entity.node.as_str()))
        .collect();
    if let Some(all) = standing["nodes"].as_array_mut() {
        // A bundle is about one finding: other nodes' ledgers say nothing of it.
        all.retain(|node| node["node"].as_str().is_some_and(|name| nodes.contains(name)));
    }
    let mut bundle = json!({
        "format": "tapio-bundle/1",
        "made_at": render::rfc3339(now_ns()),
        "tapioctl": env!("CARGO_PKG_VERSION"),
        "redacted": arguments.redact,
        "is_complete": server.is_complete() && missing.is_empty(),
        "missing": missing,
        "finding": render::finding_value(&finding),
        "findings_besides": besides.iter().map(render::finding_value).collect::<Vec<_>>(),
        "events": events,
        "status": standing,
    });
    if arguments.redact {
        Redaction::of(&bundle).apply("", &mut bundle);
    }
    let text = format!("{bundle:#}\n");
    let path = match &arguments.to {
        Some(path) if path.as_os_str() == "-" => return print(&text),
        Some(path) => path.clone(),
        None => format!("tapio-{}.json", render::clean(&finding.id)).into(),
    };
    let shown = path.display();
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(|error| Failure::Other(format!("cannot write {shown}: {error}; name another file with --to")))?;
    file.write_all(text.as_bytes()).map_err(|error| Failure::Other(format!("cannot write {shown}: {error}")))?;
    let holds = match arguments.redact {
        true => "names are replaced; process names and texts of the kernel are not",
        false => "it holds names of pods, nodes and images: read it before you send it, or use --redact",
    };
    let (findings, events) = (besides.len() + 1, events.len());
    let plural = if findings == 1 { "" } else { "s" };
    print(&format!("{shown}: {findings} finding{plural}, {events} events; {holds}\n"))
}

/// Other findings of the same workload, or else pod.
async fn besides(client: &mut Client, server: &ServerAt, finding: &Finding) -> Result<Vec<Finding>, Failure> {
    let entity = finding.entity.clone().unwrap_or_default();
    let (workload, pod) = match (entity.workload.is_empty(), entity.pod_uid.is_empty()) {
        (false, _) => (entity.workload, String::new()),
        (true, false) => (String::new(), entity.pod_uid),
        (true, true) => return Ok(Vec::new()),
    };
    let namespace = entity.namespace;
    let request =
        ListFindingsRequest { limit: FINDINGS_MAX, workload, pod, namespace, ..ListFindingsRequest::default() };
    let listed = client.list_findings(request).await.map_err(|status| Failure::of(server, &status))?.into_inner();
    server.lacks(&listed.incomplete)?;
    Ok(listed.findings.into_iter().filter(|other| other.id != finding.id).collect())
}

/// Events of a bundle, in the order of time, and why some may be missing.
struct Around {
    events: Vec<Value>,
    missing: Vec<String>,
}

/// Events of what the finding is about, and those of its node that may have to do with it; the nearest where there are many.
async fn events(
    client: &mut Client,
    server: &ServerAt,
    finding: &Finding,
    around: Duration,
) -> Result<Around, Failure> {
    let entity = finding.entity.clone().unwrap_or_default();
    let around_ns = u64::try_from(around.as_nanos()).unwrap_or(u64::MAX);
    let about = match entity.pod_uid.is_empty() {
        false => ListEventsRequest { pod: entity.pod_uid, ..ListEventsRequest::default() },
        true => ListEventsRequest { entity: format!("{:016x}", entity.id), ..ListEventsRequest::default() },
    };
    let mut asked = vec![("what it is about", about)];
    // Of no node in particular it would be all of them.
    if !entity.node.is_empty() {
        let kinds = NODE_KINDS.map(str::to_owned).to_vec();
        asked.push(("its node", ListEventsRequest { node: entity.node, kinds, ..ListEventsRequest::default() }));
    }
    let (began_ns, ended_ns) = (finding.started_ns, finding.ended_ns.max(finding.resolved_ns));
    let before = (began_ns.saturating_sub(around_ns), began_ns, true);
    let after = (began_ns, ended_ns.saturating_add(around_ns), false);
    let mut found: HashMap<String, Value> = HashMap::new();
    let mut missing = Vec::new();
    for (of, request) in asked {
        for (when, (since_ns, until_ns, newest)) in [("before it", before), ("from it on", after)] {
            let request = ListEventsRequest { since_ns, until_ns, newest, limit: EVENTS_MAX, ..request.clone() };
            let mut count = 0;
            let mut take = |event: &Event| {
                count += 1;
                found.entry(event.id.clone()).or_insert_with(|| render::event_value(event));
                Ok(())
            };
            match each(client, server, request, &mut take).await {
                Ok(()) if count >= EVENTS_MAX => missing.push(format!("events of {of} {when}: only {EVENTS_MAX}")),
                Ok(()) => {}
                // The finding holds its evidence, also where the archive has forgotten it.
                Err(Failure::Other(reason)) => missing.push(format!("events of {of} {when}: {reason}")),
                Err(failure) => return Err(failure),
            }
        }
    }
    let mut events: Vec<Value> = found.into_values().collect();
    events.sort_by_cached_key(|event| event["time"].as_str().unwrap_or_default().to_owned());
    Ok(Around { events, missing })
}

/// Keys whose texts are words of Tapio, of the kernel or of Kubernetes' API, names of processes, times and ids.
const PLAIN: [&str; 40] = [
    "allocator_comm",
    "archived_at",
    "by",
    "caused_by",
    "change",
    "comm",
    "condition",
    "disk",
    "ended_at",
    "epoch",
    "exit_code",
    "format",
    "id",
    "kind",
    "lane",
    "last_frame_at",
    "made_at",
    "measure",
    "object",
    "observed",
    "pattern",
    "phase",
    "published_at",
    "resolved_at",
    "result",
    "revision",
    "sender_comm",
    "sender_parent",
    "severity",
    "shape",
    "signal_name",
    "source",
    "stage",
    "started_at",
    "state",
    "step",
    "superseded_by",
    "syscall",
    "tapioctl",
    "time",
];
/// Keys whose values name a part of the cluster, and what stands in their place.
const NAMES: [(&str, &str); 14] = [
    ("cgroup", "cgroup"),
    ("cluster", "cluster"),
    ("container", "container"),
    ("container_id", "container-id"),
    ("image", "image"),
    ("limit_cgroup", "cgroup"),
    ("missing_servers", "server"),
    ("name", "name"),
    ("namespace", "namespace"),
    ("node", "node"),
    ("nodes", "node"),
    ("pod", "pod"),
    ("server", "server"),
    ("workload", "workload"),
];
/// Keys whose texts are sentences of findings: names, addresses and uids in them are replaced.
const SENTENCES: [&str; 7] = ["advice", "label", "missing", "summary", "text", "title", "verdict"];
/// Kinds of evidence whose text says what the kernel or systemd reported. Others may quote a command, a message or a log.
const QUOTED_KINDS: [&str; 8] =
    ["exit", "oom", "reclaim", "reclaim_burst", "signal", "cgroup_use", "container_state", "node_condition"];
/// A letter is too common to be replaced in sentences.
const WORD_MIN: usize = 2;
const LEFT_OUT: &str = "[left out]";

/// What stands for each name; the same name is the same everywhere. What no list above allows is left out.
struct Redaction {
    aliases: HashMap<String, String>,
    /// The longest first: a name may hold another.
    names: Vec<String>,
}

impl Redaction {
    fn of(bundle: &Value) -> Self {
        let mut found: BTreeMap<String, &'static str> = BTreeMap::new();
        collect(bundle, None, &mut found);
        let mut counts: HashMap<&str, usize> = HashMap::new();
        let mut aliases = HashMap::new();
        for (name, what) in found {
            let count = counts.entry(what).or_default();
            *count += 1;
            aliases.insert(name, format!("{what}-{count}"));
        }
        let mut names: Vec<String> = aliases.keys().filter(|name| name.len() >= WORD_MIN).cloned().collect();
        names.sort_by_key(|name| Reverse(name.len()));
        Self { aliases, names }
    }

    fn apply(&self, key: &str, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.text(key, text),
            Value::Array(parts) => parts.iter_mut().for_each(|part| self.apply(key, part)),
            Value::Object(fields) => {
                let quotes = |kind: &Value| kind.as_str().is_some_and(|kind| QUOTED_KINDS.contains(&kind));
                // An event's line repeats its fields, and a piece of evidence may quote what it is about.
                if fields.contains_key("detail") || fields.get("kind").is_some_and(|kind| !quotes(kind)) {
                    fields.remove("text");
                }
                // An event's own source is a word; a connection's is an address.
                fields.iter_mut().for_each(|(key, field)| match (key.as_str(), &*field) {
                    ("source", Value::String(text)) if is_address(text) => *field = LEFT_OUT.into(),
                    _ => self.apply(key, field),
                });
            }
            _ => {}
        }
    }

    fn text(&self, key: &str, text: &str) -> String {
        if PLAIN.contains(&key) || text.is_empty() {
            return text.to_owned();
        }
        if let Some(alias) = self.aliases.get(text) {
            return alias.clone();
        }
        match (key, text.rsplit_once('/')) {
            ("workload", Some((kind, name))) => match self.aliases.get(name) {
                Some(alias) => format!("{kind}/{alias}"),
                None => LEFT_OUT.to_owned(),
            },
            _ if SENTENCES.contains(&key) => self.sentence(text),
            _ => LEFT_OUT.to_owned(),
        }
    }

    fn sentence(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for name in &self.names {
            if text.contains(name.as_str()) {
                text = replace_words(&text, name, &self.aliases[name]);
            }
        }
        let words = text.split(' ').map(|word| {
            let bare = word.trim_matches(|letter: char| !letter.is_alphanumeric());
            match is_address(bare) || has_uid(bare) {
                true => word.replace(bare, "[address]"),
                false => word.to_owned(),
            }
        });
        words.collect::<Vec<_>>().join(" ")
    }
}

fn is_address(word: &str) -> bool {
    word.parse::<IpAddr>().is_ok() || word.parse::<SocketAddr>().is_ok()
}

/// Whether a uid is in it, as Kubernetes or as a cgroup's name writes it, or the id of a container.
fn has_uid(word: &str) -> bool {
    let is_of_id = |letter: char| letter.is_ascii_hexdigit() || matches!(letter, '-' | '_');
    let mut parts = word.split(|letter| !is_of_id(letter));
    parts.any(|part| part.len() >= 32 && part.bytes().filter(u8::is_ascii_hexdigit).count() >= 32)
}

fn collect(value: &Value, what: Option<&'static str>, found: &mut BTreeMap<String, &'static str>) {
    match (value, what) {
        (Value::String(text), Some(what)) => {
            // A workload is KIND/NAME: the kind stays.
            let name = text.rsplit('/').next().filter(|_| what == "workload").unwrap_or(text);
            if !name.is_empty() {
                found.entry(name.to_owned()).or_insert(what);
            }
        }
        (Value::Array(parts), _) => parts.iter().for_each(|part| collect(part, what, found)),
        (Value::Object(fields), _) => {
            for (key, field) in fields {
                let what = NAMES.iter().find(|(known, _)| known == key).map(|(_, what)| *what);
                collect(field, what, found);
            }
        }
        _ => {}
    }
}

/// Replaces a name where no letter or digit stands beside it.
fn replace_words(text: &str, name: &str, alias: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(name) {
        let (before, after) = (&rest[..at], &rest[at + name.len()..]);
        let is_part = |character: Option<char>| character.is_some_and(char::is_alphanumeric);
        let is_beside = is_part(before.chars().next_back().or_else(|| out.chars().next_back()));
        out.push_str(before);
        out.push_str(if is_beside || is_part(after.chars().next()) { name } else { alias });
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything that names a part of a cluster, or may hold a secret, has the mark in it.
    fn bundle() -> Value {
        json!({
            "format": "tapio-bundle/1",
            "finding": {
                "id": "23841bace3", "pattern": "memory-limit-kill", "severity": "high",
                "title": "mark-ns/mark-0/mark exceeded its limit on node mark-17",
                "summary": "Refused by 10.96.4.7:8080 and fd00::7, of pod 0b0cf4e8-61b7-4e6a-9d1a-5f7c0d3f2a11.",
                "entity": {
                    "namespace": "mark-ns", "pod": "mark-0", "container": "mark", "workload": "Deployment/mark", "node": "mark-17",
                    "pod_uid": "0b0cf4e8-61b7-4e6a-9d1a-5f7c0d3f2a11", "image": "registry.mark/app:1", "id": "1ecf4cc47817a3f2",
                },
                "evidence": [
                    {"kind": "oom", "text": "mark-0 was killed in /kubepods/pod0b0cf4e8_61b7_4e6a_9d1a_5f7c0d3f2a11"},
                    {"kind": "log_lines", "text": "the last that it wrote: password=mark"},
                    {"kind": "observation", "text": "mark --token=mark"},
                ],
                "missing_servers": ["tapio-mark-1"],
            },
            "events": [
                {
                    "kind": "exec", "source": "ebpf", "node": "mark-17", "text": "exec arguments=--password=mark",
                    "detail": {"comm": "webpack", "arguments": "--password=mark", "path": "/opt/mark"},
                },
                {
                    "kind": "tcp", "source": "ebpf", "text": "tcp 10.1.2.3",
                    "detail": {"source": "10.1.2.3", "destination": "10.1.2.4", "source_port": 80},
                },
                {"kind": "observation", "detail": {"process_command": "mark -x", "members": ["/pod-mark 1 MiB"], "top_address": "10.1.2.5"}},
                {"kind": "rollout", "detail": {"images": "registry.mark/app:2", "message": "by mark", "service": "mark"}},
            ],
            "status": {
                "nodes": [{"node": "mark-17", "off": [{"source": "k8s", "reason": "no route to mark"}]}],
                "deliveries": [{"trouble": "mark.example.com", "given_up": [{"reason": "mark.example.com says no"}]}],
                "incomplete": [{"server": "tapio-mark-1", "nodes": ["mark-17"]}],
            },
        })
    }

    #[test]
    fn nothing_that_names_a_cluster_survives_redaction() {
        let mut bundle = bundle();
        Redaction::of(&bundle).apply("", &mut bundle);
        let text = bundle.to_string();
        for secret in ["mark", "password", "10.", "fd00", "61b7", "registry"] {
            assert!(!text.contains(secret), "{secret}: {bundle:#}");
        }
    }

    #[test]
    fn what_a_reader_needs_survives_redaction() {
        let mut bundle = bundle();
        Redaction::of(&bundle).apply("", &mut bundle);
        let (finding, events) = (&bundle["finding"], &bundle["events"]);
        assert_eq!(
            (finding["pattern"].as_str(), events[0]["kind"].as_str()),
            (Some("memory-limit-kill"), Some("exec"))
        );
        assert_eq!(
            (events[0]["detail"]["comm"].as_str(), events[0]["source"].as_str()),
            (Some("webpack"), Some("ebpf"))
        );
        assert_eq!(events[1]["detail"]["source_port"], 80);
        assert_eq!(finding["entity"]["node"], events[0]["node"], "the same name is the same everywhere");
        assert_eq!(finding["entity"]["node"], bundle["status"]["incomplete"][0]["nodes"][0]);
        let title = finding["title"].as_str().expect("a text");
        assert!(
            title.ends_with(&format!("on node {}", finding["entity"]["node"].as_str().expect("a name"))),
            "{title}"
        );
        assert_eq!(finding["entity"]["workload"].as_str().map(|name| name.starts_with("Deployment/")), Some(true));
    }

    #[test]
    fn a_name_within_a_word_stays() {
        assert_eq!(replace_words("web webs aweb web-1 (web)", "web", "pod-1"), "pod-1 webs aweb pod-1-1 (pod-1)");
    }
}
