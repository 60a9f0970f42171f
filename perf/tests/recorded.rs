//! What Kubernetes of today says, from its API server to the finding: recorded objects of the newest API, a collector and a server.
//!
//! The lab's node is older and lacks most of it. Containers that die do so for real, in cgroups that are named as kubelet names them.

mod cluster;
mod deaths;
mod objects;
#[path = "../../collector/tests/kube_api/server.rs"]
mod server;
mod states;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tapio_perf::client::Client;
use tapio_perf::clock::wait_for;
use tapio_perf::inject::{InjectOptions, Injector};
use tapio_perf::processes::collector::Feed;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions, http};
use tapio_perf::truth::stage::Stage;
use tapio_wire::service::Finding;

use self::cluster::Cluster;
use crate::lab;
use crate::lab::Need::{Bpf, Cgroups, Root};
use crate::lab::{can_run, program};

/// How long the election may take, and all findings together.
const LIMIT: Duration = Duration::from_secs(60);
/// What is said with this much or more must be right.
const CERTAIN: f64 = 0.8;

/// Something that happens to a pod or Job, and what must be found of it.
struct Scenario {
    /// Name of the pod or its owner.
    name: &'static str,
    cause: fn(&mut Lab),
    right: &'static str,
    /// The container that the finding must name; empty for none in particular.
    container: &'static str,
    /// What the finding must say.
    says: &'static [&'static str],
    /// What it must not say.
    never: &'static [&'static str],
    /// Other patterns that may be found with certainty.
    beside: &'static [&'static str],
}

impl Scenario {
    const fn new(name: &'static str, cause: fn(&mut Lab), right: &'static str) -> Self {
        Self { name, cause, right, container: "web", says: &[], never: &[], beside: &[] }
    }

    fn is_about(&self, finding: &Finding) -> bool {
        finding
            .entity
            .as_ref()
            .is_some_and(|entity| entity.pod == self.name || entity.workload.rsplit('/').next() == Some(self.name))
    }

    /// Why this is not what must be found, empty if it is.
    fn objections(&self, finding: &Finding) -> Vec<String> {
        let mut objections = Vec::new();
        let text = text(finding);
        if finding.confidence < CERTAIN || finding.possible {
            objections.push(format!("only {} certain", finding.confidence));
        }
        let container = finding.entity.as_ref().map_or("", |entity| &*entity.container);
        if !self.container.is_empty() && !container.is_empty() && container != self.container {
            objections.push(format!("about {container}"));
        }
        objections.extend(self.says.iter().filter(|says| !text.contains(**says)).map(|says| format!("no {says:?}")));
        objections.extend(self.never.iter().filter(|never| text.contains(**never)).map(|never| format!("{never:?}")));
        objections
    }
}

fn text(finding: &Finding) -> String {
    format!("{}\n{}\n{}", finding.title, finding.summary, finding.advice.join("\n"))
}

/// A cluster of recorded objects and the node whose containers they name.
struct Lab {
    stage: Stage,
    cluster: Cluster,
    /// Events so far, whose names differ.
    events: u32,
    /// Containers that live on until everything is judged: their end would be a kill from outside.
    bystanders: Vec<deaths::Live>,
}

impl Lab {
    fn uid(&mut self) -> String {
        self.stage.name().pod_uid
    }

    fn put(&self, object: &Value) {
        self.cluster.put(object);
    }

    /// An Event is new.
    fn says(&mut self, event: &Value) {
        self.events += 1;
        let mut event = event.clone();
        for key in ["name", "uid"] {
            let name = event["metadata"][key].as_str().expect("a name");
            event["metadata"][key] = json!(format!("{name}{:x}", self.events));
        }
        self.cluster.put(&event);
    }
}

/// Waits until the scenario's finding is as it must be, and shows it.
fn await_right(client: &mut Client, scenario: &Scenario, limit: Duration) -> Result<(), String> {
    let found = wait_for(&format!("{} of {}", scenario.right, scenario.name), limit, |seen| {
        let about: Vec<_> = client.findings()?.into_iter().filter(|one| scenario.is_about(one)).collect();
        *seen = about
            .iter()
            .map(|one| format!("\n{} {:?}: {}", one.pattern, scenario.objections(one), text(one)))
            .collect();
        Ok(about.into_iter().find(|one| one.pattern == scenario.right && scenario.objections(one).is_empty()))
    });
    let found = found.map_err(|error| error.to_string())?;
    println!("{}: {} {}: {}\n    {}", scenario.name, found.severity, found.pattern, found.title, found.summary);
    Ok(())
}

#[test]
fn what_todays_kubernetes_says_is_explained_correctly() {
    let _turn = lab::alone();
    if !can_run("what_todays_kubernetes_says_is_explained_correctly", &[Root, Cgroups, Bpf]) {
        return;
    }
    let program = program("tapio-perf");
    let inject = InjectOptions { memory_bytes: 32 << 20, keep: Duration::from_millis(200), program: program.clone() };
    let stage = Stage::new(Injector::new(inject).expect("an injector"), program).expect("a stage");
    let mut lab = Lab { stage, cluster: Cluster::start(), events: 0, bystanders: Vec::new() };
    let server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let mut collector = Collector::start(&CollectorOptions {
        node: objects::NODE.into(),
        server: server.address(),
        feed: Feed::Kube,
        extra_k8s: format!(", kubeconfig: \"{}\"", lab.cluster.api.kubeconfig().display()),
        ..CollectorOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    wait_for("the election", LIMIT, |_| {
        let (_, text) = http::get(collector.port(), "/metrics")?;
        Ok(text.contains("tapio_collector_kube_leader 1").then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}"));

    let scenarios: Vec<&Scenario> = states::SCENARIOS.iter().chain(deaths::SCENARIOS).collect();
    for scenario in &scenarios {
        (scenario.cause)(&mut lab);
    }
    let mut client = server.client().expect("the server answers");
    let (mut wrong, caused) = (Vec::new(), Instant::now());
    for scenario in &scenarios {
        wrong.extend(await_right(&mut client, scenario, LIMIT.saturating_sub(caused.elapsed())).err());
    }
    for finding in client.findings().expect("findings") {
        let Some(scenario) = scenarios.iter().find(|scenario| scenario.is_about(&finding)) else { continue };
        let is_certain = finding.confidence >= CERTAIN && !finding.possible;
        if is_certain && finding.pattern != scenario.right && !scenario.beside.contains(&&*finding.pattern) {
            wrong.push(format!("{}: certain and wrong: {}: {}", scenario.name, finding.pattern, text(&finding)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    let status = collector.stop().unwrap_or_else(|error| panic!("{error}"));
    assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", collector.output());
}
