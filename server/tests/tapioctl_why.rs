//! `tapioctl why` against a whole server: what it says of what is well, of every kind of subject, and of what changed before.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::correlate_node::{MIB, Node, SECOND};
use crate::whole_server::{LIMIT, Stream, Whole, hello};

/// A node that booted ten minutes ago.
fn node() -> Node {
    let now_ns = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
    let mut node = Node::new("n1");
    node.booted_ns = now_ns - 600 * SECOND;
    node
}

/// A server that has the node's events in its archive.
async fn served(node: &Node) -> Whole {
    let server = Whole::start(|_| ()).await;
    let mut stream = Stream::open(server.channel().await, "", hello("n1", node.epoch)).await.expect("it is taken");
    stream.welcome().await.expect("welcome");
    for bytes in &node.bytes {
        stream.frame(bytes.clone()).await;
    }
    stream.acknowledged(node.bytes.len() as u64).await;
    server
}

async fn asked(server: &Whole, arguments: &[&str]) -> String {
    let mut command = crate::programs::tapioctl(server.pipeline.grpc_address, &["why"]);
    command.args(arguments);
    let output = crate::programs::output(command).await;
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Asks until the answer has all that is wanted: correlation is done a moment after the acknowledgement.
async fn answer(server: &Whole, arguments: &[&str], wanted: &[&str]) -> String {
    answer_when(server, arguments, |text| wanted.iter().all(|wanted| text.contains(wanted))).await
}

/// Asks until the answer is complete.
async fn answer_when(server: &Whole, arguments: &[&str], is_complete: impl Fn(&str) -> bool) -> String {
    let deadline = Instant::now() + LIMIT;
    loop {
        let text = asked(server, arguments).await;
        if is_complete(&text) {
            return text;
        }
        assert!(Instant::now() < deadline, "incomplete: {text}");
    }
}

/// The lines below a title, up to the next title.
fn section<'a>(text: &'a str, title: &str) -> &'a str {
    let from = text.find(&format!("\n{title}\n")).unwrap_or_else(|| panic!("no {title}: {text}"));
    let below = &text[from + title.len() + 2..];
    below.split("\n\n").next().unwrap_or(below)
}

const NOW: &str = "State now, as last reported";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_healthy_pod_has_a_state_and_a_curve() {
    let mut node = node();
    let web = node.kube_container("Deployment/web", "shop/web-1", "c1");
    node.runs(10 * SECOND, web, "web");
    node.curve(590 * SECOND, web, 64 * MIB, [30; 40]);
    node.lethal(591 * SECOND);
    let server = served(&node).await;
    let text = answer(&server, &["pod/shop/web-1"], &["Nothing was found to be wrong with pod shop/web-1"]).await;
    let state = section(&text, NOW);
    assert!(state.contains("state=running") && state.contains("shape=steady"), "{text}");
    assert!(!text.contains("What changed before"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lasting_trouble_is_in_the_state_and_events() {
    let mut node = node();
    let web = node.kube_container("Deployment/web", "shop/web-1", "c1");
    node.runs(10 * SECOND, web, "web");
    for minute in 0..5 {
        node.trouble((300 + 60 * minute) * SECOND, web, "throttled", "", false);
        node.lethal((300 + 60 * minute) * SECOND);
    }
    node.trouble(400 * SECOND, web, "pids-at-limit", "", false);
    node.trouble(500 * SECOND, web, "pids-at-limit", "", true);
    node.lethal(541 * SECOND);
    let server = served(&node).await;
    // The end is the last that happens.
    let text = answer_when(&server, &["pod/web-1"], |text| {
        text.contains("throttled-now") && text.matches("what=pids-at-limit").count() == 2
    })
    .await;
    let state = section(&text, NOW);
    assert!(state.contains("what=throttled") && !state.contains("pids-at-limit"), "{text}");
    let events = section(&text, "Last events");
    assert_eq!(events.matches("what=throttled").count(), 1, "{text}");
    assert_eq!(events.matches("what=pids-at-limit").count(), 2, "its beginning and its end: {text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_and_units_are_explained() {
    let mut node = node();
    node.job_failed(100 * SECOND, "shop", "import", "BackoffLimitExceeded");
    let job = node.kube_workload("Job/import", "shop");
    let message = "Job has reached the specified backoff limit";
    node.said_of(100 * SECOND, job, ["Job", "import", "BackoffLimitExceeded", message]);
    let unit = node.unit("nginx.service");
    node.unit_state(200 * SECOND, unit, "nginx.service", "failed", "start-limit-hit");
    node.lethal(201 * SECOND);
    let server = served(&node).await;
    let job = answer(&server, &["job/import", "-n", "shop"], &["pattern job-failed", message]).await;
    assert!(section(&job, NOW).contains("reason=BackoffLimitExceeded"), "{job}");
    let unit = answer(&server, &["unit/nginx"], &["pattern unit-start-limit"]).await;
    assert!(section(&unit, NOW).contains("result=start-limit-hit") && !unit.contains("shop/import"), "{unit}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_shows_or_counts_all_its_replicas() {
    let mut node = node();
    for number in 1..=3 {
        let web = node.kube_container("Deployment/web", &format!("shop/web-{number}"), &format!("c{number}"));
        node.runs(10 * SECOND, web, "web");
    }
    for number in 1..=30 {
        let many = node.kube_container("Deployment/many", &format!("shop/many-{number}"), &format!("m{number}"));
        match number {
            7 => node.waits(12 * SECOND, many, ["web", "CrashLoopBackOff", "back-off"]),
            _ => node.runs((20 + number) * SECOND, many, "web"),
        }
    }
    let killed = node.kube_container("Deployment/web", "shop/web-2", "c2");
    node.limit_kill(killed, 100, 100 * SECOND);
    let server = served(&node).await;
    let text = answer(&server, &["deploy/web", "-n", "shop"], &["pattern memory-limit-kill", NOW]).await;
    for number in 1..=3 {
        assert!(section(&text, NOW).contains(&format!("shop/web-{number}")), "{text}");
    }
    assert!(!text.contains("not shown"), "{text}");
    let text = answer(&server, &["deploy/many", "-n", "shop"], &[NOW]).await;
    assert!(section(&text, NOW).contains("and 10 more that are not shown"), "{text}");
    assert!(section(&text, NOW).contains("shop/many-7"), "the one that does not run is shown: {text}");
    let json: Value =
        serde_json::from_str(&asked(&server, &["deploy/many", "-n", "shop", "-o", "json"]).await).expect("JSON");
    assert_eq!((json["state_left_out"].as_u64(), json["state"].as_array().map(Vec::len)), (Some(10), Some(20)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_changed_a_limit_before_a_death_is_named() {
    let mut node = node();
    let web = node.kube_container("Deployment/web", "shop/web-1", "c1");
    node.runs(10 * SECOND, web, "web");
    let how = "changed its specification (Update): memory limit of web from 64Mi to 32Mi";
    node.changed(100 * SECOND, "Deployment/web", "shop", ["kubectl-set", how]);
    node.changed(100 * SECOND, "Deployment/other", "shop", ["argocd-controller", "changed its specification (Apply)"]);
    node.changed(100 * SECOND, "Deployment/web", "elsewhere", ["helm", "changed its specification (Update)"]);
    node.limit_kill(web, 100, 130 * SECOND);
    let server = served(&node).await;
    for subject in ["pod/shop/web-1", "deploy/shop/web"] {
        let text = answer(&server, &[subject], &["pattern memory-limit-kill", "What changed before"]).await;
        let changes = section(&text, "What changed before");
        assert!(changes.contains("reason=kubectl-set") && changes.contains("from 64Mi to 32Mi"), "{text}");
        assert!(!changes.contains("argocd-controller") && !changes.contains("helm"), "of others: {text}");
    }
}
