//! On a real Kubernetes node: the production overlay, as deploy/README.md says to apply it. It explains a kill; who has no token, or
//! another's, is refused with the reason; the log is read over TLS; the archive outlives the set; and nothing is left.
//!
//! Runs only by `make test-kube`.

mod operator;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::kube_node::installed::{COLLECTOR, NAMESPACE, NATS, Pod, Tapio};
use crate::kube_node::{Namespace, await_that, container, has_node, kubectl, kubectl_reading, pod, setting};
use operator::Operator;
use serde_json::{Value, json};
use tapio_perf::processes::{Collector, CollectorOptions, bin_dir, binary};

const SET: &str = "statefulset/tapio-server";
const AUDIENCE: &str = "tapio-server";
/// A node that is not there.
const ELSEWHERE: &str = "tapio-test-elsewhere";

#[test]
fn production_explains_a_kill_and_checks_tokens() {
    if !has_node("production_explains_a_kill_and_checks_tokens") {
        return;
    }
    let operator = Operator::new();
    let mut tapio = Tapio::default();
    tapio.apply(fs::read_to_string(operator.path("namespace.yaml")).expect("a file"), "--validate=true");
    operator.run_shown("create secret generic tapio-$who-tls");
    let rendered = operator.render();
    // An old API server does not know the claims' retention; its own is the same.
    tapio.apply(rendered.clone(), "--validate=warn");
    for what in [NATS, SET, COLLECTOR] {
        tapio.rolled_out(what);
    }
    the_log_is_read(&tapio);

    let namespace = Namespace::make("production");
    let found = tapio.explains_a_kill(&namespace, "leak");
    drop(namespace);
    let server = the(&tapio, "server");
    collectors_were_reviewed(&server);
    who_asks_is_looked_at(&operator, &server);
    who_ships_is_looked_at(&operator, &tapio, &server);
    the_archive_outlives_the_set(&operator, &mut tapio, rendered, &found);
    tapio.uninstall();
    for kind in ["clusterrole", "clusterrolebinding", "priorityclass"] {
        let left = kubectl(&["get", kind, "-l", "app.kubernetes.io/part-of=tapio", "-o", "name"]).expect("an answer");
        assert_eq!(left, "", "{kind}");
    }
    // Claims and secrets are in it.
    let left = kubectl(&["get", "namespace", NAMESPACE, "--ignore-not-found", "-o", "name"]).expect("an answer");
    assert_eq!(left, "", "the namespace");
    println!("after uninstalling: no namespace, claim, secret or role of it");
}

fn the(tapio: &Tapio, component: &str) -> Pod {
    tapio.pods(component).into_iter().next().unwrap_or_else(|| panic!("no {component} is ready"))
}

/// The sum of a metric's series that have all these labels.
fn metric(server: &Pod, name: &str, labels: &[&str]) -> f64 {
    let text = server.get_from(9091, "/metrics").expect("metrics");
    let lines = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
    let lines = lines.filter(|line| labels.iter().all(|label| line.contains(label)));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// NATS took the server's certificate and password, and the server NATS' certificate.
fn the_log_is_read(tapio: &Tapio) {
    await_that("the log", |seen| {
        let server = tapio.pods("server").into_iter().next()?;
        let text = server.get_from(9091, "/metrics").map_err(|error| *seen = error).ok()?;
        let wanted = ["tapio_server_log_alone 0", "tapio_server_log_behind 0"];
        *seen =
            text.lines().filter(|line| line.starts_with("tapio_server_log_")).map(|line| format!("\n{line}")).collect();
        wanted.iter().all(|wanted| text.lines().any(|line| line == *wanted)).then_some(())
    });
}

/// The API server was asked about the collector's token and about that of the server's own tapioctl, and said whose they are.
fn collectors_were_reviewed(server: &Pod) {
    let accepted = metric(server, "tapio_server_token_reviews_total", &["result=\"accepted\""]);
    assert!(accepted >= 2.0, "{accepted} reviews");
    let node = setting("TAPIO_TEST_NODE");
    let is_of = |line: &Value, name: &str, account: &str| {
        let identity = format!("CN={name}, system:serviceaccount:{NAMESPACE}:{account}");
        line["identity"] == identity.as_str()
    };
    let log = server.log();
    let line = log.iter().find(|line| is_of(line, "collector", "tapio-collector") && line["node"] == node.as_str());
    println!("{}", line.unwrap_or_else(|| panic!("no collector of {node}: {log:?}")));
    let asked = |line: &&Value| line["target"] == "audit" && is_of(line, "server", "tapio-server");
    println!("{}", log.iter().find(asked).unwrap_or_else(|| panic!("nobody asked: {log:?}")));
    println!("tapio_server_token_reviews_total{{result=\"accepted\"}} {accepted}");
}

/// `tapioctl` of somebody who is not in a pod of Tapio's.
struct Asker<'a> {
    operator: &'a Operator,
    server: &'a Pod,
}

impl Asker<'_> {
    fn ask(&self, certificate: Option<&str>, token: Option<&Path>) -> Result<String, String> {
        let mut command = Command::new(tapioctl());
        command.arg("--server").arg(format!("{}:9090", self.server.address));
        self.ask_by(command, certificate, token)
    }

    /// As kubectl's own command, which finds the server by itself.
    fn ask_by_kubectl(&self, certificate: &str, token: &Path) -> Result<String, String> {
        let folder = self.operator.path("plugins");
        fs::create_dir_all(&folder).expect("a folder");
        std::os::unix::fs::symlink(tapioctl(), folder.join("kubectl-tapio")).expect("a link");
        let path = std::env::var("PATH").expect("there is one");
        let mut command = Command::new("kubectl");
        command.arg("tapio").env("PATH", format!("{}:{path}", folder.display()));
        self.ask_by(command, Some(certificate), Some(token))
    }

    fn ask_by(&self, mut command: Command, certificate: Option<&str>, token: Option<&Path>) -> Result<String, String> {
        let path = |file: &str| self.operator.path(file);
        command.arg("--tls-ca").arg(path("ca.crt")).args(["--tls-server-name", "tapio-server.tapio-system.svc"]);
        if let Some(name) = certificate {
            command.arg("--tls-cert").arg(path(&format!("{name}.crt")));
            command.arg("--tls-key").arg(path(&format!("{name}.key")));
        }
        if let Some(token) = token {
            command.arg("--token-file").arg(token);
        }
        let output = command.arg("findings").output().expect("it starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }
}

fn tapioctl() -> PathBuf {
    binary("tapioctl", &bin_dir(None).expect("a folder")).expect("tapioctl is built")
}

/// A file with a new token of an account, as `kubectl create token` makes it.
fn token(operator: &Operator, account: &str, audience: &str, bound_to: Option<&str>) -> PathBuf {
    let audience_option = format!("--audience={audience}");
    let mut command = vec!["-n", NAMESPACE, "create", "token", account, &audience_option, "--duration=1h"];
    if let Some(pod) = bound_to {
        command.extend(["--bound-object-kind=Pod", "--bound-object-name", pod]);
    }
    let path = operator.path(&format!("{account}-{audience}-{}", bound_to.unwrap_or("unbound")));
    fs::write(&path, kubectl(&command).unwrap_or_else(|error| panic!("{error}"))).expect("written");
    path
}

fn who_asks_is_looked_at(operator: &Operator, server: &Pod) {
    for account in ["tapioctl", "stranger"] {
        kubectl(&["-n", NAMESPACE, "create", "serviceaccount", account]).expect("an account");
    }
    let asker = Asker { operator, server };
    let good = token(operator, "tapioctl", AUDIENCE, None);
    let table = asker.ask(Some("me"), Some(&good)).unwrap_or_else(|error| panic!("{error}"));
    assert!(table.contains("memory-limit-kill"), "{table}");
    let by_kubectl = asker.ask_by_kubectl("me", &good).unwrap_or_else(|error| panic!("{error}"));
    assert!(by_kubectl.contains("memory-limit-kill"), "{by_kubectl}");
    println!("kubectl tapio findings: {} lines", by_kubectl.lines().count());

    let elsewhere = token(operator, "tapioctl", "vault", None);
    let stranger = token(operator, "stranger", AUDIENCE, None);
    let collector = token(operator, "tapio-collector", AUDIENCE, None);
    let may_not = |account: &str| format!("system:serviceaccount:{NAMESPACE}:{account} may not query");
    for (what, certificate, token, says) in [
        ("without a certificate", None, Some(&good), vec!["broke", "certificates of its clients", "--tls-cert"]),
        (
            "without a token",
            Some("me"),
            None,
            vec!["the token is missing", "tapioctl: --token-file", "audience `tapio-server`"],
        ),
        (
            "with a token for another audience",
            Some("me"),
            Some(&elsewhere),
            vec!["not for the audience `tapio-server`", "server.auth.token_review.audience"],
        ),
        (
            "of an account that is not listed",
            Some("me"),
            Some(&stranger),
            vec![&may_not("stranger"), "token_review.may_query"],
        ),
        ("of the collectors' account", Some("me"), Some(&collector), vec![&may_not("tapio-collector")]),
    ] {
        let refusal = asker.ask(certificate, token.map(PathBuf::as_path)).expect_err(what);
        assert!(says.iter().all(|part| refusal.contains(part)), "{what}: {refusal}");
        println!("tapioctl {what}: {refusal}");
    }
    for reason in ["no_token", "refused_token", "not_allowed"] {
        let labels = ["purpose=\"query\"", &format!("reason=\"{reason}\"")];
        assert!(metric(server, "tapio_server_denied_requests_total", &labels) >= 1.0, "{reason}");
    }
}

/// A pod of the collector's account that is said to run on a node which is not there.
struct PodElsewhere;

impl PodElsewhere {
    fn make() -> Self {
        let mut pod = pod(ELSEWHERE, "Never", container("app", "busybox sleep 600"));
        pod["spec"]["nodeName"] = json!(ELSEWHERE);
        pod["spec"]["serviceAccountName"] = json!("tapio-collector");
        kubectl_reading(&["-n", NAMESPACE, "apply", "-f", "-"], &pod.to_string()).expect("applied");
        Self
    }
}

impl Drop for PodElsewhere {
    fn drop(&mut self) {
        // No kubelet confirms that it is gone.
        let options = ["--grace-period=0", "--force", "--ignore-not-found"];
        let deleted = kubectl(&[&["-n", NAMESPACE, "delete", "pod", ELSEWHERE][..], &options].concat());
        if let Err(error) = deleted {
            eprintln!("{ELSEWHERE} is left behind: {error}");
        }
    }
}

/// Collectors of somebody who has the collectors' certificate, with tokens good and bad.
fn who_ships_is_looked_at(operator: &Operator, tapio: &Tapio, server: &Pod) {
    let node = setting("TAPIO_TEST_NODE");
    let reviewed = metric(server, "tapio_server_token_reviews_total", &["result=\"accepted\""]);
    // Stolen out of the collector's pod.
    let own = operator.path("own-token");
    let pid = the(tapio, "collector").pid().expect("the collector runs here");
    fs::copy(format!("/proc/{pid}/root/var/run/secrets/tapio/token"), &own).expect("the token is where README.md says");
    let another_audience = token(operator, "tapio-collector", "vault", None);
    let unbound = token(operator, "tapio-collector", AUDIENCE, None);
    let queries_only = token(operator, "tapioctl", AUDIENCE, None);

    let collector = |name: &str, token: Option<&Path>| {
        let path = |file: &str| operator.path(file).display().to_string();
        let token = token.map(|token| format!(", token_file: {}", token.display())).unwrap_or_default();
        CollectorOptions {
            node: name.into(),
            server: format!("{}:9090", server.address),
            extra_grpc: format!(
                ", tls_enabled: true{token}, \
                 tls: {{ca: {}, cert: {}, key: {}, server_name: tapio-server-headless.tapio-system.svc}}",
                path("ca.crt"),
                path("collector.crt"),
                path("collector.key"),
            ),
            ..CollectorOptions::default()
        }
    };
    let another_nodes = |name: &str| format!("may not ship for node `{name}`: its certificate or its token is another");
    let is_refused = |what: &str, name: &str, token: Option<&Path>, says: &str| {
        let mut stranger = Collector::prepare(&collector(name, token)).expect("prepared");
        stranger.spawn().expect("spawned");
        await_that(&format!("the refusal of {what}"), |seen| {
            *seen = stranger.output();
            (seen.contains("cannot stream to the server") && seen.contains(says)).then_some(())
        });
        let output = stranger.output();
        println!("a collector with {what}: {}", output.lines().find(|line| line.contains(says)).unwrap_or_default());
        stranger.kill();
    };
    for (what, name, token, says) in [
        ("its own token for another node", ELSEWHERE, Some(&own), another_nodes(ELSEWHERE)),
        ("a token that is bound to no pod", ELSEWHERE, Some(&unbound), "a token bound to a pod".into()),
        ("no token", ELSEWHERE, None, "set grpc.token_file of the collector".into()),
        ("a token for another audience", ELSEWHERE, Some(&another_audience), "audience `tapio-server`".into()),
        ("a token that may only query", ELSEWHERE, Some(&queries_only), "server.auth.token_review.may_ship".into()),
    ] {
        is_refused(what, name, token.map(PathBuf::as_path), &says);
    }
    // Kubernetes deletes a pod on a node that does not exist before long: it is used at once.
    let pod = PodElsewhere::make();
    let bound_elsewhere = token(operator, "tapio-collector", AUDIENCE, Some(ELSEWHERE));
    is_refused("another pod's token", &node, Some(&bound_elsewhere), &another_nodes(&node));
    assert!(metric(server, "tapio_server_ingest_refused_total", &["reason=\"not_its_node\""]) >= 2.0);

    // Nothing is wrong with that token but what it was used for.
    let mut rightly = Collector::start(&collector(ELSEWHERE, Some(&bound_elsewhere)));
    let rightly = rightly.as_mut().unwrap_or_else(|error| panic!("{error}\n{:?}", server.log().last()));
    let status = rightly.stop().expect("it ends").expect("it ran");
    assert!(status.success(), "{}", rightly.output());
    drop(pod);
    let reviews = metric(server, "tapio_server_token_reviews_total", &["result=\"accepted\""]);
    assert!(reviews > reviewed, "{reviews} reviews, {reviewed} before");
    let readiness: Value = serde_json::from_str(&the(tapio, "collector").readiness()).expect("JSON");
    assert_eq!(readiness["connected"], true, "nobody took the stream of {node}: {readiness}");
}

/// What the page says of uninstalling leaves claims and secrets, and a server that comes back knows what its archive knows.
fn the_archive_outlives_the_set(operator: &Operator, tapio: &mut Tapio, rendered: String, found: &Value) {
    let claim = || {
        let path = "jsonpath={.status.phase} {.metadata.uid}";
        kubectl(&["-n", NAMESPACE, "get", "pvc", "archive-tapio-server-0", "-o", path]).expect("a claim")
    };
    let before = claim();
    assert!(before.starts_with("Bound "), "{before}");
    operator.run_shown("delete daemonset tapio-collector --cascade=foreground");
    await_that("that the server's pod is gone", |seen| {
        *seen = kubectl(&["-n", NAMESPACE, "get", "pods", "-o", "name"]).unwrap_or_else(|error| error);
        seen.is_empty().then_some(())
    });
    assert_eq!(claim(), before);
    tapio.apply(rendered, "--validate=warn");
    tapio.rolled_out(SET);
    tapio.rolled_out(COLLECTOR);
    assert_eq!(claim(), before);
    let again = tapio.finding("memory-limit-kill", |name| found["entity"]["name"] == name);
    assert_eq!(again["death"]["limit"], found["death"]["limit"], "{again}");
    println!("after `kubectl delete` and `apply`: {} is still listed, from claim {before}", again["title"]);
    // The epoch before was closed, so nothing of it was lost on the way.
    tapio.closed_ledger(2);
    println!("{}", tapio.tapioctl(&["ledger"]).expect("a ledger"));
}
