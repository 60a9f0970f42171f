//! `tapioctl bundle`: one file about one finding, to attach to a report.
//!
//! What enters: a finding, what was found besides of the same workload, events around it, and how the servers and the ledgers stand.
//! What leaves: one JSON object, which a person may read before it is sent on. What must hold: a file that is there is not
//! overwritten; what is missing is in the bundle; with `--redact` the names that identify a cluster are in it nowhere.

use std::collections::{BTreeSet, HashMap};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use serde_json::{Value, json};
use tapio_server::render;
use tapio_wire::program::units::parse_duration;
use tapio_wire::service::{Event, Finding, GetFindingRequest, ListEventsRequest, ListFindingsRequest};

use super::events::each;
use super::now_ns;
use super::output::print;
use super::server::{Client, Failure, ServerAt, connect, status};

/// Events of one question, and findings besides.
const EVENTS_MAX: u32 = 5_000;
const FINDINGS_MAX: u32 = 100;
/// Kinds of a node's events that may have to do with a death, whomever they are about.
const NODE_KINDS: [&str; 5] = ["oom", "signal", "exit", "node_condition", "unit_state"];

#[derive(Args)]
pub struct Arguments {
    /// Id of the finding, or the beginning of the id
    #[arg(value_parser = NonEmptyStringValueParser::new())]
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
    let events = events(&mut client, server, &finding, arguments.around).await?;
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
        "is_complete": server.is_complete(),
        "finding": render::finding_value(&finding),
        "findings_besides": besides.iter().map(render::finding_value).collect::<Vec<_>>(),
        "events": events,
        "status": standing,
    });
    if arguments.redact {
        Redaction::of(&bundle).apply(&mut bundle);
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
    print(&format!("{shown}: {findings} findings, {events} events; {holds}\n"))
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

/// Events of what the finding is about, and those of its node that may have to do with it, in the order of time.
async fn events(
    client: &mut Client,
    server: &ServerAt,
    finding: &Finding,
    around: Duration,
) -> Result<Vec<Value>, Failure> {
    let entity = finding.entity.clone().unwrap_or_default();
    let around_ns = u64::try_from(around.as_nanos()).unwrap_or(u64::MAX);
    let window = ListEventsRequest {
        since_ns: finding.started_ns.saturating_sub(around_ns),
        until_ns: finding.ended_ns.max(finding.resolved_ns).saturating_add(around_ns),
        limit: EVENTS_MAX,
        ..ListEventsRequest::default()
    };
    let about = match entity.pod_uid.is_empty() {
        false => ListEventsRequest { pod: entity.pod_uid, ..window.clone() },
        true => ListEventsRequest { entity: format!("{:016x}", entity.id), ..window.clone() },
    };
    let kinds = NODE_KINDS.map(str::to_owned).to_vec();
    let of_node = ListEventsRequest { node: entity.node, kinds, ..window };
    let mut found: HashMap<String, Value> = HashMap::new();
    for request in [about, of_node] {
        let mut take = |event: &Event| {
            found.entry(event.id.clone()).or_insert_with(|| render::event_value(event));
            Ok(())
        };
        match each(client, server, request, &mut take).await {
            // An archive that has forgotten them: the finding holds its evidence.
            Ok(()) | Err(Failure::Other(_)) => {}
            Err(failure) => return Err(failure),
        }
    }
    let mut events: Vec<Value> = found.into_values().collect();
    events.sort_by_cached_key(|event| event["time"].as_str().unwrap_or_default().to_owned());
    Ok(events)
}

/// Keys whose values identify a cluster, and what stands in their place.
const NAMES: [(&str, &str); 15] = [
    ("namespace", "namespace"),
    ("pod", "pod"),
    ("pod_uid", "uid"),
    ("uid", "uid"),
    ("workload", "workload"),
    ("container", "container"),
    ("container_id", "container-id"),
    ("node", "node"),
    ("image", "image"),
    ("name", "name"),
    ("cgroup", "cgroup"),
    ("server", "server"),
    ("cluster", "cluster"),
    ("source_address", "address"),
    ("address", "address"),
];
/// Keys whose values may hold secrets.
const SECRETS: [&str; 4] = ["arguments", "lines", "command", "command_line"];
/// A letter is too common to be replaced in texts; where it is the whole value it is.
const WORD_MIN: usize = 2;

/// What stands for each name; the same name is the same everywhere.
struct Redaction {
    /// The longest first: a name may hold another.
    names: Vec<(String, String)>,
}

impl Redaction {
    fn of(bundle: &Value) -> Self {
        let mut found: Vec<(String, &'static str)> = Vec::new();
        collect(bundle, &mut found);
        found.sort_unstable();
        found.dedup_by(|one, other| one.0 == other.0);
        let mut counts: HashMap<&str, usize> = HashMap::new();
        let mut names: Vec<(String, String)> = found
            .into_iter()
            .map(|(name, what)| {
                let count = counts.entry(what).or_default();
                *count += 1;
                (name, format!("{what}-{count}"))
            })
            .collect();
        names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        Self { names }
    }

    fn apply(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.text(text),
            Value::Array(parts) => parts.iter_mut().for_each(|part| self.apply(part)),
            Value::Object(fields) => {
                for (key, field) in fields.iter_mut() {
                    match SECRETS.contains(&key.as_str()) && !field.is_null() {
                        true => *field = json!("[left out]"),
                        false => self.apply(field),
                    }
                }
            }
            _ => {}
        }
    }

    fn text(&self, text: &str) -> String {
        if let Some((_, alias)) = self.names.iter().find(|(name, _)| name == text) {
            return alias.clone();
        }
        let mut text = text.to_owned();
        for (name, alias) in self.names.iter().filter(|(name, _)| name.len() >= WORD_MIN) {
            text = replace_words(&text, name, alias);
        }
        text
    }
}

fn collect(value: &Value, found: &mut Vec<(String, &'static str)>) {
    match value {
        Value::Array(parts) => parts.iter().for_each(|part| collect(part, found)),
        Value::Object(fields) => {
            for (key, field) in fields {
                let what = NAMES.iter().find(|(known, _)| known == key).map(|(_, what)| *what);
                if let (Value::String(text), Some(what)) = (field, what) {
                    // A workload is KIND/NAME: the kind stays.
                    let name = text.rsplit('/').next().filter(|_| what == "workload").unwrap_or(text);
                    found.extend((!name.is_empty()).then(|| (name.to_owned(), what)));
                }
            }
            fields.values().for_each(|field| collect(field, found));
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

    #[test]
    fn the_same_name_is_replaced_the_same_way_everywhere() {
        let mut bundle = json!({
            "finding": {
                "title": "shop/web-0/web exceeded its limit on node worker-17",
                "entity": {"namespace": "shop", "pod": "web-0", "container": "web", "workload": "Deployment/web", "node": "worker-17"},
            },
            "events": [
                {"kind": "exec", "arguments": "--password=x", "comm": "webpack", "node": "worker-17"},
                {"message": "Stopping container web of shop/web-0; workshop stays", "node": "worker-17"},
            ],
        });
        Redaction::of(&bundle).apply(&mut bundle);
        let text = bundle.to_string();
        for name in ["worker-17", "web-0", "shop/", "password"] {
            assert!(!text.contains(name), "{name}: {bundle:#}");
        }
        assert_eq!(bundle["events"][0]["comm"], "webpack");
        assert!(text.contains("workshop stays"), "{bundle:#}");
        assert_eq!(bundle["finding"]["entity"]["node"], bundle["events"][1]["node"]);
        assert_eq!(
            bundle["finding"]["entity"]["workload"].as_str().map(|name| name.starts_with("Deployment/")),
            Some(true)
        );
    }

    #[test]
    fn a_name_within_a_word_stays() {
        assert_eq!(replace_words("web webs aweb web-1 (web)", "web", "pod-1"), "pod-1 webs aweb pod-1-1 (pod-1)");
    }
}
