//! Tapio as its manifests install it: the three files of the quick start, `kubectl apply -k deploy`, or what a test
//! renders. Only the images' names are replaced, and what the API server is too old for.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tapio_perf::processes::http;

use super::{Namespace, await_that, deployment, eater, kubectl, kubectl_reading, setting};

pub const SERVER: &str = "deployment/tapio-server";
pub const COLLECTOR: &str = "daemonset/tapio-collector";
pub const NATS: &str = "statefulset/tapio-nats";
pub const NAMESPACE: &str = "tapio-system";
const NAMESPACE_FILE: &str = "namespace.yaml";
const FILES: [&str; 2] = ["server-deployment.yaml", "collector-daemonset.yaml"];
/// What `tapioctl` ends with when a server's part is missing.
const INCOMPLETE: i32 = 4;
/// What an API server before 1.23 or 1.21 has instead.
const OLDER: [(&str, &str); 2] = [("autoscaling/v2", "autoscaling/v2beta2"), ("policy/v1", "policy/v1beta1")];

/// Tapio on the cluster; uninstalled when this is dropped.
#[derive(Default)]
pub struct Tapio {
    texts: Vec<String>,
}

impl Tapio {
    /// Applies the three files, in their order.
    pub fn install() -> Self {
        let mut tapio = Self::prepare();
        for file in FILES {
            tapio.apply(with_images(&deploy_text(file)), "--validate=true");
        }
        tapio
    }

    /// Applies what `kubectl apply -k deploy` does.
    pub fn install_all() -> Self {
        Self::install_all_with(&[])
    }

    /// The same, with other settings: each pair is what the manifests have, and what comes in its place.
    pub fn install_all_with(settings: &[(&str, &str)]) -> Self {
        let mut tapio = Self::prepare();
        let folder = deploy("");
        let rendered = kubectl(&["kustomize", folder.to_str().expect("a path")]);
        let mut text = with_images(&rendered.unwrap_or_else(|error| panic!("{error}")));
        for (setting, other) in settings {
            assert!(text.contains(setting), "{setting} is not in the manifests");
            text = text.replace(setting, other);
        }
        let versions = kubectl(&["api-versions"]).unwrap_or_else(|error| panic!("{error}"));
        for (version, older) in OLDER {
            if !versions.lines().any(|line| line == version) {
                text = text.replace(&format!("apiVersion: {version}\n"), &format!("apiVersion: {older}\n"));
            }
        }
        tapio.apply(text, "--validate=true");
        tapio
    }

    /// The namespace, and in it the password of servers and NATS, by the command in the manifest.
    fn prepare() -> Self {
        let mut tapio = Self::default();
        tapio.apply(deploy_text(NAMESPACE_FILE), "--validate=true");
        let text = deploy_text(FILES[0]);
        let mut commands = text.lines().filter_map(|line| line.strip_prefix("#   "));
        let command = commands.find(|line| line.contains("create secret generic tapio-nats")).expect("it is printed");
        let status = Command::new("sh").args(["-euc", command]).status().expect("sh starts");
        assert!(status.success(), "{status}: {command}");
        tapio
    }

    /// Applies the last of what was applied once more, and gives what kubectl says: a line an object.
    pub fn apply_again(&self) -> Vec<String> {
        let said = kubectl_reading(&["apply", "-f", "-"], self.texts.last().expect("something was applied"));
        said.unwrap_or_else(|error| panic!("{error}")).lines().map(str::to_owned).collect()
    }

    /// Applies some objects, which go when this is dropped. `validate` is kubectl's option.
    pub fn apply(&mut self, text: String, validate: &str) {
        // First of all known: an error leaves half of them behind.
        self.texts.push(text);
        let applied = kubectl_reading(&["apply", validate, "-f", "-"], &self.texts[self.texts.len() - 1]);
        print!("{}", applied.unwrap_or_else(|error| panic!("{error}")));
    }

    /// Waits until all pods of a Deployment, StatefulSet or DaemonSet are of its newest template, and ready.
    pub fn rolled_out(&self, what: &str) {
        // One after the other, where a small node has no room for a third server before the first has ended.
        if let Err(error) = kubectl(&["-n", NAMESPACE, "rollout", "status", what, "--timeout=300s"]) {
            let pods = kubectl(&["-n", NAMESPACE, "describe", "pods"]).unwrap_or_default();
            let readiness = self.collectors().first().map(Pod::readiness).unwrap_or_default();
            panic!("{error}\n{pods}\n{readiness}\n{}", self.log(what));
        }
    }

    /// `kubectl rollout restart`, and waits.
    pub fn restart(&self, what: &str) {
        kubectl(&["-n", NAMESPACE, "rollout", "restart", what]).expect("restarted");
        self.rolled_out(what);
    }

    /// Runs something while there is no collector on any node.
    pub fn without_collectors(&self, run: impl FnOnce()) {
        let patch = |value: Value| {
            let patch =
                json!({"spec": {"template": {"spec": {"nodeSelector": {"tapio.test/none": value}}}}}).to_string();
            kubectl(&["-n", NAMESPACE, "patch", COLLECTOR, "-p", &patch]).expect("patched");
        };
        patch(json!("here"));
        await_that("that the collectors are gone", |seen| {
            let label = "app.kubernetes.io/component=collector";
            *seen = kubectl(&["-n", NAMESPACE, "get", "pods", "-l", label, "-o", "name"]).unwrap_or_else(|error| error);
            seen.is_empty().then_some(())
        });
        run();
        patch(Value::Null);
        self.rolled_out(COLLECTOR);
    }

    /// Gives the only container another image.
    pub fn set_image(&self, what: &str, image: &str) {
        let name = what.rsplit('-').next().expect("a name");
        kubectl(&["-n", NAMESPACE, "set", "image", what, &format!("{name}={image}")]).expect("the image is set");
    }

    /// What the collector may do beside what everybody may.
    pub fn set_capabilities(&self, capabilities: &[&str]) {
        let path = "/spec/template/spec/containers/0/securityContext/capabilities/add";
        let patch = json!([{"op": "replace", "path": path, "value": capabilities}]).to_string();
        kubectl(&["-n", NAMESPACE, "patch", COLLECTOR, "--type=json", "-p", &patch]).expect("patched");
    }

    /// `tapioctl` in a server's pod, as an operator runs it.
    pub fn tapioctl(&self, arguments: &[&str]) -> Result<String, String> {
        self.pods("server").first().ok_or("no server is ready")?.tapioctl(arguments)
    }

    /// Runs `tapioctl` and parses its lines of JSON.
    pub fn tapioctl_json(&self, arguments: &[&str]) -> Result<Vec<Value>, String> {
        json_lines(&self.tapioctl(&[arguments, &["-o", "json"]].concat())?)
    }

    /// What `tapio-collector probes` says of each program, in the collector's container.
    pub fn probes(&self, collector: &Pod) -> Result<Vec<Value>, String> {
        let program = ["/usr/bin/tapio-collector", "--config", "/etc/tapio/collector.yaml", "probes", "--json"];
        json_lines(&kubectl(&[&["-n", NAMESPACE, "exec", &collector.name, "--"][..], &program].concat())?)
    }

    /// The first listed finding of a pattern that is about an entity of such a name.
    pub fn finding(&self, pattern: &str, name: impl Fn(&str) -> bool) -> Value {
        await_that(&format!("a finding of {pattern}"), |seen| {
            let all =
                self.tapioctl_json(&["findings", "--limit", "500"]).map_err(|error| seen.clone_from(&error)).ok()?;
            *seen = all.iter().map(|one| format!("\n{} {}", one["pattern"], one["title"])).collect();
            let is_meant = |one: &Value| one["entity"]["name"].as_str().is_some_and(&name);
            all.into_iter().find(|one| one["pattern"] == pattern && is_meant(one))
        })
    }

    /// `tapioctl findings`, in the server's pod, names pod, container and limit of a pod that is killed for its memory. The finding
    /// is given back.
    pub fn explains_a_kill(&self, namespace: &Namespace, name: &str) -> Value {
        namespace.apply(vec![deployment(name, eater("eater"))]);
        let start = format!("{}/{name}-", namespace.0);
        let found =
            self.finding("memory-limit-kill", |entity| entity.starts_with(&start) && entity.ends_with("/eater"));
        let pod = found["entity"]["pod"].as_str().expect("a pod's name").to_owned();
        assert_eq!(namespace.get(&format!("pod/{pod}"), "{.metadata.name}"), pod, "{found}");
        assert_eq!(found["entity"]["workload"], format!("Deployment/{name}"), "{found}");
        assert_eq!(found["death"]["limit"]["limit_bytes"], 24 << 20, "{found}");
        let table = self.tapioctl(&["findings"]).expect("a table");
        let line = table.lines().find(|line| line.contains(&pod)).unwrap_or_else(|| panic!("{pod} is not in\n{table}"));
        assert!(line.contains("eater") && line.contains("24.0 MiB"), "{line}");
        println!("{line}");
        // It is killed again and again: what follows wants the load for itself.
        kubectl(&["-n", &namespace.0, "delete", "deployment", name, "--wait=true"]).expect("deleted");
        found
    }

    /// Waits until the server's ledger explains everything, of `epochs` epochs at least, and gives its rows. What an epoch that
    /// has ended still held is explained by nothing.
    pub fn closed_ledger(&self, epochs: usize) -> Vec<Value> {
        await_that("that the ledger closes", |seen| {
            let rows = self.tapioctl_json(&["ledger"]).map_err(|error| seen.clone_from(&error)).ok()?;
            *seen = rows.iter().map(|row| format!("\n{row}")).collect();
            let mut known: Vec<_> = rows.iter().map(|row| row["epoch"].to_string()).collect();
            known.dedup();
            let is_closed = |row: &Value| {
                row["unexplained"] == 0 && (row["state"] == "open" || (row["state"] == "closed" && row["held"] == 0))
            };
            (known.len() >= epochs && rows.iter().all(is_closed)).then_some(rows)
        })
    }

    /// Ready pods of a component that are not about to end.
    pub fn pods(&self, component: &str) -> Vec<Pod> {
        let mut pods = self.all_pods(component);
        pods.retain(|pod| pod.is_ready);
        pods
    }

    /// Pods of the collector, ready or not.
    pub fn collectors(&self) -> Vec<Pod> {
        self.all_pods("collector")
    }

    fn all_pods(&self, component: &str) -> Vec<Pod> {
        let label = format!("app.kubernetes.io/component={component}");
        let text = kubectl(&["-n", NAMESPACE, "get", "pods", "-l", &label, "-o", "json"]).unwrap_or_default();
        let list: Value = serde_json::from_str(&text).unwrap_or_default();
        let items = list["items"].as_array().cloned().unwrap_or_default();
        items.iter().filter(|item| item["metadata"]["deletionTimestamp"].is_null()).map(Pod::of).collect()
    }

    /// The only matching finding of `pattern`, which each of `servers` servers must have. Its id must be
    /// the same on all, and so must what `content` takes of it. The order in which servers published does not count.
    pub fn found_alike(&self, servers: usize, pattern: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        await_that(&format!("{pattern}, alike from {servers} servers"), |seen| {
            let pods = self.pods("server");
            let mut answers = Vec::new();
            seen.clear();
            for pod in &pods {
                let all =
                    pod.tapioctl_json(&["findings", "--limit", "500"]).map_err(|error| seen.push_str(&error)).ok()?;
                let meant: Vec<Value> =
                    all.iter().filter(|one| one["pattern"] == pattern && is_it(one)).cloned().collect();
                seen.extend(meant.iter().map(|one| format!("\n{}: {one}", pod.name)));
                if meant.is_empty() {
                    let others = all.iter().map(|one| format!("{} {} of {}", one["id"], one["pattern"], one["entity"]));
                    *seen += &format!("\n{} has only: {}", pod.name, others.collect::<Vec<_>>().join(", "));
                }
                answers.push(meant);
            }
            let alike =
                |one: &Value| ["id", "count", "title", "summary", "confidence", "possible"].map(|key| one[key].clone());
            let first = answers.first().and_then(|answer| answer.first())?;
            let is_alike = answers.iter().all(|answer| answer.len() == 1 && alike(&answer[0]) == alike(first));
            (pods.len() == servers && is_alike).then(|| first.clone())
        })
    }

    /// The last lines of a component's log.
    pub fn log(&self, what: &str) -> String {
        kubectl(&["-n", NAMESPACE, "logs", what, "--tail=40"]).unwrap_or_else(|error| error)
    }

    /// Deletes what was applied, in the opposite order, and waits until it is gone.
    pub fn uninstall(mut self) {
        if let Err(error) = self.delete() {
            panic!("{error}");
        }
    }

    fn delete(&mut self) -> Result<(), String> {
        while let Some(text) = self.texts.pop() {
            kubectl_reading(&["delete", "--ignore-not-found", "--timeout=120s", "-f", "-"], &text)?;
        }
        Ok(())
    }
}

impl Drop for Tapio {
    fn drop(&mut self) {
        if let Err(error) = self.delete() {
            eprintln!("Tapio is left behind: {error}");
        }
    }
}

/// A pod of Tapio's.
pub struct Pod {
    pub name: String,
    pub uid: String,
    pub is_ready: bool,
    /// IP address of the pod.
    pub address: String,
    container_id: String,
}

impl Pod {
    fn of(item: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let container = &item["status"]["containerStatuses"][0];
        Self {
            name: text(&item["metadata"]["name"]),
            uid: text(&item["metadata"]["uid"]),
            is_ready: container["ready"] == true,
            address: text(&item["status"]["podIP"]),
            container_id: text(&container["containerID"]).rsplit('/').next().unwrap_or_default().to_owned(),
        }
    }

    /// `tapioctl` in it.
    pub fn tapioctl(&self, arguments: &[&str]) -> Result<String, String> {
        kubectl(&[&["-n", NAMESPACE, "exec", &self.name, "--", "/usr/bin/tapioctl"][..], arguments].concat())
    }

    /// Runs `tapioctl` and parses its lines of JSON.
    pub fn tapioctl_json(&self, arguments: &[&str]) -> Result<Vec<Value>, String> {
        json_lines(&self.tapioctl(&[arguments, &["-o", "json"]].concat())?)
    }

    /// The findings that `tapioctl` in it lists, also where it says that a part is missing.
    pub fn known_findings(&self) -> Result<Vec<Value>, String> {
        let program = ["/usr/bin/tapioctl", "findings", "--limit", "500", "-o", "json"];
        let exec = ["-n", NAMESPACE, "exec", &self.name, "--"];
        let output = Command::new("kubectl").args(exec).args(program).output().expect("kubectl starts");
        match output.status.code() {
            Some(0 | INCOMPLETE) => json_lines(&String::from_utf8_lossy(&output.stdout)),
            _ => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// What `GET /readyz` of a collector says.
    pub fn readiness(&self) -> String {
        self.get("/readyz").unwrap_or_else(|error| error)
    }

    /// The body of an answer of a collector.
    pub fn get(&self, path: &str) -> Result<String, String> {
        self.get_from(8081, path)
    }

    /// Gets a path from any port.
    pub fn get_from(&self, port: u16, path: &str) -> Result<String, String> {
        self.answer_from(port, path).map(|(_, body)| body)
    }

    /// Status and body of an answer.
    pub fn answer_from(&self, port: u16, path: &str) -> Result<(u16, String), String> {
        let address: SocketAddr = format!("{}:{port}", self.address).parse().map_err(|_| "it has no address yet")?;
        http::get_from(address, path).map_err(|error| error.to_string())
    }

    /// Log of the pod, a JSON object a line.
    pub fn log(&self) -> Vec<Value> {
        let text = kubectl(&["-n", NAMESPACE, "logs", &self.name]).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Process of the pod on this machine.
    pub fn pid(&self) -> Option<u32> {
        super::process_of(&self.container_id)
    }
}

fn json_lines(text: &str) -> Result<Vec<Value>, String> {
    text.lines().map(|line| serde_json::from_str(line).map_err(|error| format!("{error}: {line}"))).collect()
}

fn deploy(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file)
}

/// A file of `deploy/`.
fn deploy_text(file: &str) -> String {
    let path = deploy(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Manifests with the images by the names that they have here.
fn with_images(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        lines.push(match line.split_once("image: ") {
            Some((before, name)) if before.trim().is_empty() => {
                let settings = [
                    ("tapio-server", "TAPIO_TEST_SERVER_IMAGE"),
                    ("tapio-collector", "TAPIO_TEST_COLLECTOR_IMAGE"),
                    ("nats", "TAPIO_TEST_NATS_IMAGE"),
                ];
                let ours = settings.iter().find(|(start, _)| name.starts_with(&format!("{start}:")));
                let (_, setting_name) = ours.unwrap_or_else(|| panic!("an image that is not ours: {name}"));
                format!("{before}image: {}", setting(setting_name))
            }
            _ => line.to_owned(),
        });
    }
    lines.join("\n") + "\n"
}
