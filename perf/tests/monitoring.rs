//! A real Prometheus scrapes a real server and real collectors, and evaluates the rules and the dashboard of `deploy/monitoring`: what
//! those name exists, and what docs/metrics.md lists is there.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::lab::Need::{Bpf, Cgroups, Root};
use crate::lab::{FedNode, can_run, inject};
use serde_json::{Value, json};
use tapio_perf::clock::wait_for;
use tapio_perf::processes::collector::Feed;
use tapio_perf::processes::{Collector, CollectorOptions, Process, Server, ServerOptions, bin_dir, free_port, http};

const LIMIT: Duration = Duration::from_secs(30);
/// What rules and dashboard take from others: kubelet, kube-state-metrics, Prometheus itself, our recording rules.
const FOREIGN: [&str; 4] = ["kubelet_volume_stats_", "kube_daemonset_status_", "kube_deployment_", "kube_statefulset_"];

fn repository(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

fn text(name: &str) -> String {
    fs::read_to_string(repository(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Debian's, which `deploy/check.sh` unpacks beside the build, or that of `PATH`.
fn prometheus_binary() -> Option<PathBuf> {
    let unpacked = bin_dir(None).ok()?.parent()?.join("tools/prometheus/usr/bin/prometheus");
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(unpacked)
        .chain(std::env::split_paths(&paths).map(|folder| folder.join("prometheus")))
        .find(|path| path.is_file())
}

/// Returns Prometheus for a test, which is skipped without it unless nothing may be skipped.
fn prometheus_for(test: &str) -> Option<PathBuf> {
    let binary = prometheus_binary();
    if binary.is_none() {
        let text = format!("SKIP {test}: needs Prometheus: make check-deploy");
        assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "{text}");
        eprintln!("{text}");
    }
    binary
}

struct Prometheus {
    // Before the folder: the process ends before its files go.
    process: Process,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    fn start(binary: &Path, jobs: &[(&str, u16)], groups: &Value) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (port, path) = (free_port().expect("a port"), |name: &str| folder.path().join(name));
        let scrapes: Vec<Value> = jobs
            .iter()
            .enumerate()
            .map(|(at, (job, port))| {
                let labels =
                    json!({"job": job, "node": format!("n{at}"), "pod": format!("p{at}"), "namespace": "tapio-system"});
                json!({"job_name": format!("{job}-{at}"),
                    "static_configs": [{"targets": [format!("127.0.0.1:{port}")], "labels": labels}]})
            })
            .collect();
        // JSON is YAML.
        let config = json!({"global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [path("rules.yaml")], "scrape_configs": scrapes});
        fs::write(path("rules.yaml"), groups.to_string()).expect("written");
        fs::write(path("prometheus.yaml"), config.to_string()).expect("written");
        let mut command = Command::new(binary);
        command
            .arg(format!("--config.file={}", path("prometheus.yaml").display()))
            .arg(format!("--storage.tsdb.path={}", path("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let process = Process::spawn("prometheus", command, path("log")).unwrap_or_else(|error| panic!("{error}"));
        Self { process, port, _folder: folder }
    }

    /// What its API answers; [`None`] while it does not serve yet.
    fn ask(&mut self, path: &str) -> Option<Value> {
        self.process.check_running().unwrap_or_else(|error| panic!("{error}"));
        let (status, body) = http::get(self.port, path).ok()?;
        let answer = (status == 200).then(|| serde_json::from_str::<Value>(&body).expect("JSON"))?;
        Some(answer["data"].clone())
    }

    /// Waits until it scrapes so many targets.
    fn await_targets(&mut self, count: usize) {
        wait_for("targets that are up", LIMIT, |seen| {
            let targets = self.ask("/api/v1/targets").unwrap_or_default();
            let targets = targets["activeTargets"].as_array().cloned().unwrap_or_default();
            *seen = targets.iter().map(|target| format!("{} {} ", target["health"], target["lastError"])).collect();
            Ok((targets.len() == count && targets.iter().all(|target| target["health"] == "up")).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", self.process.output()));
    }

    fn names(&mut self) -> BTreeSet<String> {
        let values = self.ask("/api/v1/label/__name__/values").unwrap_or_default();
        values.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// Whether an expression is one that Prometheus evaluates; else what it says.
    fn evaluate(&mut self, expression: &str) -> Result<(), String> {
        let mut path = "/api/v1/query?query=".to_owned();
        for byte in expression.bytes() {
            let _ = if byte.is_ascii_alphanumeric() {
                write!(path, "{}", byte as char)
            } else {
                write!(path, "%{byte:02X}")
            };
        }
        match http::get(self.port, &path).map_err(|error| error.to_string())? {
            (200, _) => Ok(()),
            (_, body) => Err(format!("{expression}: {body}")),
        }
    }
}

/// The groups of the PrometheusRule, as Prometheus itself reads them.
fn rule_groups() -> Value {
    let rule: Value = serde_saphyr::from_str(&text("deploy/monitoring/prometheus-rule.yaml")).expect("YAML");
    json!({"groups": rule["spec"]["groups"]})
}

/// All strings under the key `expr`.
fn expressions(value: &Value) -> Vec<String> {
    match value {
        Value::Object(map) => map
            .iter()
            .flat_map(|(key, value)| match value.as_str() {
                Some(text) if key == "expr" => vec![text.to_owned()],
                _ => expressions(value),
            })
            .collect(),
        Value::Array(list) => list.iter().flat_map(expressions).collect(),
        _ => Vec::new(),
    }
}

/// The metrics that an expression names: words that are followed by a selector, a range or an operator and look like one.
fn metrics_of(expression: &str) -> BTreeSet<&str> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    words.filter(|word| word.starts_with("tapio_") || word.starts_with("kube")).collect()
}

/// A histogram's series are three, documented as one.
fn family(name: &str) -> &str {
    let stem = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
    stem.filter(|stem| stem.ends_with("_seconds") || stem.ends_with("_bytes")).unwrap_or(name)
}

/// Rows `| \`tapio_…\` | type | labels | unit | there | …` of docs/metrics.md: the name, and whether the metric is always there.
fn documented() -> Option<Vec<(String, bool)>> {
    let page = fs::read_to_string(repository("docs/metrics.md")).ok()?;
    let rows = page.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `tapio_")?.split('|').map(str::trim);
        let name = format!("tapio_{}", cells.next()?.trim_end_matches('`'));
        Some((name, cells.any(|cell| cell == "always")))
    });
    let rows: Vec<_> = rows.collect();
    (!rows.is_empty()).then_some(rows)
}

/// A CA, a server's and a client's certificate, as PEM files.
fn certificates(folder: &Path) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    fs::write(folder.join("ca.pem"), params.self_signed(&key).expect("signed").pem()).expect("written");
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec!["tapio-server".into()]).expect("a name");
    fs::write(folder.join("own.pem"), params.signed_by(&key, &issuer).expect("signed").pem()).expect("written");
    fs::write(folder.join("own.key"), key.serialize_pem()).expect("written");
}

#[test]
fn prometheus_knows_all_metrics_of_rules_and_dashboard() {
    let _turn = crate::lab::alone();
    let test = "prometheus_knows_all_metrics_of_rules_and_dashboard";
    let Some(binary) = prometheus_for(test) else { return };
    if !can_run(test, &[Root, Cgroups, Bpf]) {
        return;
    }
    // With TLS, the kernel, a filter and a death, so that what exists only then exists.
    let folder = tempfile::tempdir().expect("a folder");
    certificates(folder.path());
    let dir = folder.path().display();
    let server = Server::start(&ServerOptions {
        extra_server: format!(
            ", tls_enabled: true, tls: {{cert: {dir}/own.pem, key: {dir}/own.key, client_ca: {dir}/ca.pem}}"
        ),
        ..ServerOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let options = |node: &str, feed: Feed| CollectorOptions {
        node: node.into(),
        server: server.address(),
        feed,
        extra_grpc: format!(
            ", tls_enabled: true, tls: {{ca: {dir}/ca.pem, cert: {dir}/own.pem, key: {dir}/own.key, server_name: tapio-server}}"
        ),
        extra_config: "pipeline: {filter_config: {min_severity: critical}}\n".into(),
        ..CollectorOptions::default()
    };
    let start = |node, feed| Collector::start(&options(node, feed)).unwrap_or_else(|error| panic!("{error}"));
    let fed = FedNode::feed(start("fed", Feed::Shm), 500.0);
    let kernel = start("kernel", Feed::Ebpf);
    inject(&["oom", "--memory", "16MiB"]);

    let jobs = [
        ("tapio-server", server.http_port()),
        ("tapio-collector", fed.collector.port()),
        ("tapio-collector", kernel.port()),
    ];
    let groups = rule_groups();
    let mut prometheus = Prometheus::start(&binary, &jobs, &groups);
    prometheus.await_targets(jobs.len());

    let dashboard: Value = serde_json::from_str(&text("deploy/monitoring/dashboard.json")).expect("JSON");
    let shown: Vec<String> = expressions(&dashboard).iter().map(|text| text.replace("$node", ".*")).collect();
    assert!(shown.len() > 30, "{} expressions", shown.len());
    let alerts = expressions(&groups);
    let named: BTreeSet<&str> = shown.iter().chain(&alerts).flat_map(|text| metrics_of(text)).collect();
    let own = named.iter().copied().filter(|name| !FOREIGN.iter().any(|foreign| name.starts_with(foreign)));
    let page = documented();
    if page.is_none() {
        eprintln!("docs/metrics.md is missing: not compared");
    }
    // What the page says is there from the first refusal on, and the like, is left out where nothing was refused.
    let optional: BTreeSet<&str> =
        page.iter().flatten().filter(|(_, is_always)| !is_always).map(|(name, _)| name.as_str()).collect();
    let always = page.iter().flatten().filter(|(_, is_always)| *is_always).map(|(name, _)| name.as_str());
    let wanted: BTreeSet<&str> = own.chain(always).filter(|name| !optional.contains(family(name))).collect();
    wait_for("every metric that is named", LIMIT, |seen| {
        let names = prometheus.names();
        let there = |name: &&&str| names.iter().any(|known| known == *name || family(known) == **name);
        let missing: Vec<_> = wanted.iter().filter(|name| !there(name)).collect();
        *seen = format!("missing: {missing:?}");
        Ok(missing.is_empty().then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", server.output()));

    all_are_documented(&mut prometheus, page.as_deref(), named.len());
    let wrong: Vec<_> = shown.iter().filter_map(|text| prometheus.evaluate(text).err()).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    all_rules_are_sound(&mut prometheus, alerts.len());
    // What the autoscaler's adapter asks for is what a rule records, once there are two scrapes to take a rate of.
    let adapter = text("deploy/monitoring/prometheus-adapter-values.yaml");
    let recorded = groups["groups"][0]["rules"][0]["record"].as_str().expect("a recording rule");
    assert!(adapter.contains(recorded), "{recorded}");
    wait_for(recorded, LIMIT, |_| Ok(prometheus.names().contains(recorded).then_some(())))
        .unwrap_or_else(|error| panic!("{error}"));
}

/// Every metric that the programs expose is in docs/metrics.md.
fn all_are_documented(prometheus: &mut Prometheus, page: Option<&[(String, bool)]>, named: usize) {
    let names = prometheus.names();
    let exposed: BTreeSet<&str> =
        names.iter().filter(|name| name.starts_with("tapio_")).map(|name| family(name)).collect();
    println!("{} metrics exposed, {named} named by rules and dashboard", exposed.len());
    if let Some(page) = page {
        let listed: BTreeSet<&str> = page.iter().map(|(name, _)| name.as_str()).collect();
        let missing: Vec<_> = exposed.difference(&listed).collect();
        assert!(missing.is_empty(), "not in docs/metrics.md: {missing:?}");
    }
}

/// Prometheus evaluates so many rules without an error.
fn all_rules_are_sound(prometheus: &mut Prometheus, count: usize) {
    wait_for("the rules' evaluation", LIMIT, |seen| {
        let rules = prometheus.ask("/api/v1/rules").unwrap_or_default();
        let groups = rules["groups"].as_array().cloned().unwrap_or_default();
        let rules: Vec<_> =
            groups.iter().flat_map(|group| group["rules"].as_array().cloned().unwrap_or_default()).collect();
        *seen = rules
            .iter()
            .filter(|rule| rule["health"] != "ok")
            .map(|rule| format!("{} {}; ", rule["name"], rule["lastError"]))
            .collect();
        Ok((rules.len() == count && seen.is_empty()).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn names_are_read_out_of_expressions_and_pages() {
    let _turn = crate::lab::alone();
    let found =
        metrics_of(r#"sum by (le) (rate(tapio_a_seconds_bucket{node=~"$node"}[5m])) / kubelet_volume_stats_x > 0"#);
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["kubelet_volume_stats_x", "tapio_a_seconds_bucket"]);
    assert_eq!(family("tapio_a_seconds_bucket"), "tapio_a_seconds");
    assert_eq!(family("tapio_a_bytes"), "tapio_a_bytes");
    let value = json!({"panels": [{"targets": [{"expr": "a"}, {"expr": "b"}]}]});
    assert_eq!(expressions(&value), ["a", "b"]);
}
