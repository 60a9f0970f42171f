//! The Kubernetes source: what the API server says of this node's pods, and of the cluster's objects when this collector is
//! the one that watches them.
//!
//! What enters: lists and watches. What leaves: events of the lethal lane, and names for the directory. What must hold:
//! nothing is dropped: when there is no room the watches wait, and the API server keeps what they have not read. The only
//! object that is ever written is the election's Lease.

mod claims;
pub mod client;
mod cluster;
mod config;
mod container_state;
mod events;
pub mod lease;
mod nodes;
mod objects;
mod pods;
mod report;
mod services;
mod stuck;
#[cfg(test)]
mod tests;
mod waiting;
mod watch;
mod workloads;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch as channel};

pub use client::{AccessError, PERMISSIONS};
pub use watch::{WATCH_OUTCOMES, WatchCounts};

use self::client::Access;
use self::lease::{Election, Pace};
use self::pods::Pods;
use self::report::{ReportSender, Scribe, WatchReport};
use self::watch::Context;
use crate::base::clock::realtime_ns;
use crate::base::metrics::{Metrics, raise};
use crate::base::status::Status;
use crate::budget::governor::Metered;
use crate::intake::Intake;
use crate::intake::identity::directory::Directory;
use crate::intake::pass::Pass;
use crate::settings::config::K8sSection;

/// How long giving the Lease back may take.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// What metrics show of the source.
#[derive(Default)]
pub struct KubeState {
    pub watches: Arc<WatchCounts>,
    /// Whether this collector watches the cluster's objects.
    pub is_leader: AtomicBool,
    /// CPU time of those watches.
    pub cluster_cpu_ns: Arc<AtomicU64>,
}

impl KubeState {
    /// Registers its metrics.
    ///
    /// # Errors
    /// When two metrics have the same name.
    pub fn register(self: &Arc<Self>, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        let watches = metrics.counters(
            "tapio_collector_kube_watches_total",
            "Lists read and watches ended, by outcome",
            &["outcome"],
        )?;
        let leader =
            metrics.gauge("tapio_collector_kube_leader", "1 while this collector watches the cluster's objects")?;
        let state = Arc::clone(self);
        metrics.on_scrape(move || {
            for (outcome, count) in state.watches.get() {
                raise(&watches.with_label_values(&[outcome]), count);
            }
            leader.set(i64::from(state.is_leader.load(Ordering::Relaxed)));
        });
        Ok(())
    }
}

/// Runs the watches of the API server and emits their events.
pub struct KubeSource {
    access: Arc<Access>,
    section: K8sSection,
    node: Arc<str>,
    directory: Arc<Directory>,
    state: Arc<KubeState>,
    status: Status,
}

impl KubeSource {
    /// Finds the credentials. Whether the API server can be reached shows later: an unreachable one is tried again and again.
    ///
    /// # Errors
    /// When there are no credentials.
    pub async fn open(
        section: &K8sSection,
        node: &str,
        directory: Arc<Directory>,
        state: Arc<KubeState>,
    ) -> Result<Self, AccessError> {
        let access = Access::open(section).await?;
        Ok(Self { access, section: section.clone(), node: node.into(), directory, state, status: Status::default() })
    }

    /// What it waits for: the API server's answer about this node's pods.
    pub fn status(&self) -> Status {
        self.status.clone()
    }

    /// Watches until it is asked to stop, then hands on what was heard.
    pub async fn run(self, mut intake: Intake, mut stop: channel::Receiver<bool>) {
        let (sender, mut heard) = ReportSender::channel();
        let mut scribe = Scribe::new(Arc::clone(&self.directory));
        let namespace = self.lease_namespace();
        // Two collectors of one node, the old and the new one, are two candidates.
        let identity = format!("{}_{:x}", self.node, realtime_ns());
        let (stream, streams) = channel::channel(intake.generation());
        let (term, elected) = channel::channel(None);
        let nodes = Arc::<AtomicU64>::default();
        let election = Election::new(
            Arc::clone(&self.access),
            namespace.clone(),
            identity.clone(),
            Pace::default(),
            nodes.clone(),
        );
        let context = Context {
            access: Arc::clone(&self.access),
            sender,
            counts: Arc::clone(&self.state.watches),
            node: Arc::clone(&self.node),
            status: self.status.clone(),
            streams,
        };
        let watching = async {
            futures::join!(self.watch_pods(&context), election.run(term), self.watch_cluster(&context, elected, &nodes))
        };
        {
            let mut watching = std::pin::pin!(watching);
            loop {
                tokio::select! {
                    // An error means that the sender is gone.
                    _ = stop.wait_for(|stop| *stop) => break,
                    _ = pump(&mut heard, &mut scribe, &mut intake) => {
                        // What was reported before the first stream goes over it.
                        let generation = intake.generation();
                        stream.send_if_modified(|known| std::mem::replace(known, generation) != generation && generation > 1);
                    }
                    _ = &mut watching => {}
                }
            }
        }
        drop(context);
        if self.state.is_leader.swap(false, Ordering::Relaxed) {
            let released = lease::release(&self.access, &namespace, &identity);
            if tokio::time::timeout(RELEASE_TIMEOUT, released).await.is_err() {
                tracing::debug!("cannot release the Lease: it expires by itself");
            }
        }
        heard.close();
        loop {
            let mut pass = intake.begin();
            write(&mut heard, &mut scribe, &mut pass);
            pass.finish_all();
            if heard.is_empty() && intake.is_empty() {
                return;
            }
            // The packer makes room in a moment and cannot know when.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn lease_namespace(&self) -> String {
        self.section
            .lease_namespace
            .clone()
            .or_else(|| std::env::var("POD_NAMESPACE").ok().filter(|name| !name.is_empty()))
            .unwrap_or_else(|| self.access.client().default_namespace().to_owned())
    }

    async fn watch_pods(&self, context: &Context) {
        let resource = pods::of_node(&self.node);
        self.status.waits_for("waiting for the API server's list of this node's pods".into());
        loop {
            let mut follower = Pods::new(
                Arc::clone(&self.directory),
                self.section.exclude_system_namespaces,
                self.section.stuck_after,
            );
            watch::follow(context, &resource, &mut follower).await;
            tracing::warn!("this endpoint does not serve pods: it is not a Kubernetes API server");
            tokio::time::sleep(cluster::ABSENT_PAUSE).await;
        }
    }

    async fn watch_cluster(
        &self,
        context: &Context,
        mut elected: channel::Receiver<Option<lease::Term>>,
        nodes: &Arc<AtomicU64>,
    ) {
        loop {
            let Ok(term) = elected.wait_for(Option::is_some).await.map(|term| *term) else { return };
            let Some(term) = term else { continue };
            self.state.is_leader.store(true, Ordering::Relaxed);
            tokio::select! {
                () = Metered::new(
                    cluster::watch(context, term.since_ns, &self.section, nodes, &self.directory),
                    Arc::clone(&self.state.cluster_cpu_ns),
                ) => {}
                _ = elected.wait_for(Option::is_none) => {}
            }
            self.state.is_leader.store(false, Ordering::Relaxed);
        }
    }
}

/// Waits for something to be heard or due, and hands it on.
async fn pump(heard: &mut mpsc::Receiver<WatchReport>, scribe: &mut Scribe, intake: &mut Intake) {
    let mut pass = intake.begin();
    let has_room = scribe.has_room(&mut pass);
    let limit = pass.sleep_limit();
    pass.finish();
    let report = match has_room {
        true => tokio::time::timeout(limit, heard.recv()).await.ok().flatten(),
        false => {
            tokio::time::sleep(limit).await;
            None
        }
    };
    // What is received here is written before anything else is awaited: a pump that is given up has nothing in hands.
    let mut pass = intake.begin();
    if let Some(report) = report {
        scribe.write(report, &mut pass);
    }
    write(heard, scribe, &mut pass);
    pass.finish();
}

/// Hands on what was heard, as far as there is room.
fn write(heard: &mut mpsc::Receiver<WatchReport>, scribe: &mut Scribe, pass: &mut Pass<'_>) {
    while scribe.has_room(pass)
        && let Ok(report) = heard.try_recv()
    {
        scribe.write(report, pass);
    }
}
