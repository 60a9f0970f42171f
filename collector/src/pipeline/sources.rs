//! The sources: which of them run, on threads and tasks of their own.

use std::fmt::Display;
use std::sync::Arc;
use std::thread::JoinHandle;

use tapio_probes::{Controls, RunTimes};
use tapio_wire::event::Source;
use tokio::sync::watch;
use tokio::task::JoinHandle as TaskHandle;

use super::{Node, StartError, spawn};
use crate::base::metrics::Metrics;
use crate::base::status::{Alive, SourceState, Status};
use crate::budget::memory::load_config;
use crate::intake::Intake;
use crate::intake::identity::Identity;
use crate::intake::identity::exclusion::Exclusion;
use crate::intake::requests::{Evidence, EvidenceCounts};
use crate::intake::source_context::SourceContext;
use crate::settings::config::Config;
use crate::source::conntrack::ConntrackPoll;
use crate::source::ebpf::{EbpfSource, MissedRuns};
use crate::source::evidence::EvidenceReader;
use crate::source::kube::{KubeSource, KubeState};
use crate::source::shm::ShmSource;
use crate::source::stop::Stop;
use crate::source::systemd::{SystemdCounts, SystemdSource};
use crate::source::{ended_epochs, evidence, probe_report};

/// What sources are started with.
pub(super) struct Start<'a> {
    pub(super) config: &'a Config,
    pub(super) context: &'a SourceContext,
    pub(super) node: &'a Node,
    /// A source that cannot run is reported and left out.
    pub(super) allow_missing: bool,
}

impl Start<'_> {
    /// An intake for a source whose events bring paths of cgroups, or none.
    fn intake(&self, source: Source) -> Intake {
        Intake::new(self.context.clone(), source, Identity::new(Vec::new()))
    }
}

/// The running sources.
pub(super) struct Sources {
    stop: Arc<Stop>,
    stop_shm: Arc<Stop>,
    stop_tasks: watch::Sender<bool>,
    /// True once the sources must stop.
    pub(super) tasks_stopped: watch::Receiver<bool>,
    pub(super) threads: Vec<JoinHandle<()>>,
    /// Sources that wait for others' answers rather than for rings.
    pub(super) tasks: Vec<TaskHandle<()>>,
    pub(super) states: Vec<SourceState>,
    /// Controls of the probes, where they run.
    pub(super) controls: Option<Arc<Controls>>,
    pub(super) run_times: Option<RunTimes>,
    missed: Arc<MissedRuns>,
    evidence: Arc<EvidenceCounts>,
    systemd: Arc<SystemdCounts>,
    kube: Arc<KubeState>,
}

impl Sources {
    /// Starts the sources that the configuration asks for.
    pub(super) async fn start(start: &Start<'_>) -> Result<Self, StartError> {
        let (stop_tasks, tasks_stopped) = watch::channel(false);
        let cluster_cpu_ns = Arc::clone(&start.context.governed.cluster_cpu_ns);
        let mut sources = Self {
            stop: Arc::new(Stop::new()?),
            stop_shm: Arc::new(Stop::new()?),
            stop_tasks,
            tasks_stopped,
            threads: Vec::new(),
            tasks: Vec::new(),
            states: Vec::new(),
            controls: None,
            run_times: None,
            missed: Arc::default(),
            evidence: Arc::default(),
            systemd: Arc::default(),
            kube: Arc::new(KubeState { cluster_cpu_ns, ..KubeState::default() }),
        };
        if start.config.runs("ebpf") {
            sources.start_ebpf(start)?;
        }
        if start.config.runs("shm") {
            sources.start_shm(start)?;
        }
        if start.config.runs("systemd") {
            sources.start_systemd(start).await?;
        }
        if start.config.runs("k8s") {
            sources.start_kube(start).await?;
        }
        if sources.threads.is_empty() && sources.tasks.is_empty() && !start.allow_missing {
            return Err(StartError::NoSource);
        }
        sources.start_conntrack(start);
        sources.start_ended_epochs(start);
        Ok(sources)
    }

    /// Asks all of them to stop.
    pub(super) fn stop(&self) {
        self.stop_tasks.send_replace(true);
        self.stop.set();
        self.stop_shm.set();
    }

    /// Registers the metrics of the sources.
    pub(super) fn register(&self, metrics: &mut Metrics) -> Result<(), prometheus::Error> {
        self.missed.register(metrics)?;
        self.evidence.register(metrics)?;
        self.systemd.register(metrics)?;
        self.kube.register(metrics)
    }

    fn start_ebpf(&mut self, start: &Start<'_>) -> Result<(), StartError> {
        let section = &start.config.collectors.ebpf;
        let load = load_config(start.config);
        let source = match EbpfSource::load(&load, section.linger, section.flush_interval, Arc::clone(&self.stop)) {
            Ok(source) => source,
            Err(error) => return self.off("ebpf", error, start),
        };
        let status = probe_report::report(&source.verdicts());
        self.missed = source.missed_runs();
        (self.controls, self.run_times) = (source.controls(), source.run_times());
        let directory = &start.context.directory;
        let exclusion = self.controls.clone().filter(|_| directory.excludes()).map(Exclusion::new);
        let identity = Identity::of_this_machine(Arc::clone(directory)).with_exclusion(exclusion);
        let (asking, reading) = evidence_of(start).unzip();
        let intake = Intake::new(start.context.clone(), Source::Ebpf, identity).with_evidence(asking);
        self.thread("ebpf", status, move || {
            if let Err(error) = source.run(intake) {
                tracing::error!(%error, "the ebpf source ended");
            }
        })?;
        if let Some(reading) = reading {
            self.evidence = reading.counts();
            let identity = Identity::with_directory(Vec::new(), Arc::clone(directory));
            let intake = Intake::new(start.context.clone(), Source::Collector, identity);
            // It ends when all its senders are gone.
            self.thread("evidence", Status::default(), move || reading.run(intake))?;
        }
        Ok(())
    }

    fn start_shm(&mut self, start: &Start<'_>) -> Result<(), StartError> {
        let source = match ShmSource::listen(&start.config.collectors.shm, Arc::clone(&self.stop_shm)) {
            Ok(source) => source,
            Err(error) => return self.off("shm", error, start),
        };
        let intake = start.intake(Source::Shm);
        self.thread("shm", Status::default(), move || {
            if let Err(error) = source.run(intake) {
                tracing::error!(%error, "the shm source ended");
            }
        })
    }

    async fn start_systemd(&mut self, start: &Start<'_>) -> Result<(), StartError> {
        let source = match SystemdSource::connect(&start.config.collectors.systemd, start.node.id).await {
            Ok(source) => source,
            Err(error) => return self.off("systemd", error, start),
        };
        self.systemd = source.counts();
        let status = source.status();
        self.task("systemd", status, source.run(start.intake(Source::Systemd), self.tasks_stopped.clone()));
        Ok(())
    }

    async fn start_kube(&mut self, start: &Start<'_>) -> Result<(), StartError> {
        let (directory, state) = (Arc::clone(&start.context.directory), Arc::clone(&self.kube));
        let opened = KubeSource::open(&start.config.collectors.k8s, &start.node.name, directory, state).await;
        let source = match opened {
            Ok(source) => source,
            Err(error) => return self.off("k8s", error, start),
        };
        let intake = start.intake(Source::Kube);
        let (runtime, stopped) = (tokio::runtime::Handle::current(), self.tasks_stopped.clone());
        self.thread("k8s", source.status(), move || {
            // Timers and sockets are driven by the thread that runs the runtime, which goes on until this one ends.
            runtime.block_on(source.run(intake, stopped));
        })
    }

    fn start_conntrack(&mut self, start: &Start<'_>) {
        let interval = start.config.collector.conntrack_interval;
        if !interval.is_zero() {
            let poll = ConntrackPoll::new(interval, start.node.id);
            let status = poll.status();
            self.task("conntrack", status, poll.run(start.intake(Source::Collector), self.tasks_stopped.clone()));
        }
    }

    fn start_ended_epochs(&mut self, start: &Start<'_>) {
        let (ended, intake) = (Arc::clone(&start.context.ended), start.intake(Source::Collector));
        let run = ended_epochs::run(ended, start.node.id, intake, self.tasks_stopped.clone());
        self.tasks.push(tokio::spawn(run));
    }

    /// Starts a source on a thread of its own.
    fn thread(
        &mut self,
        source: &'static str,
        status: Status,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<(), StartError> {
        let alive = Alive::default();
        let guard = alive.begin();
        self.threads.push(spawn(source, move || {
            let _alive = guard;
            run();
        })?);
        self.states.push(SourceState { source, off: None, alive, status });
        Ok(())
    }

    /// Starts a source as a task of the runtime.
    fn task(&mut self, source: &'static str, status: Status, run: impl Future<Output = ()> + Send + 'static) {
        let alive = Alive::default();
        let guard = alive.begin();
        self.tasks.push(tokio::spawn(async move {
            let _alive = guard;
            run.await;
        }));
        self.states.push(SourceState { source, off: None, alive, status });
    }

    /// Notes that a source cannot run, or returns the error where none may be missing.
    fn off<E>(&mut self, source: &'static str, error: E, start: &Start<'_>) -> Result<(), StartError>
    where
        E: Display + Into<StartError>,
    {
        if !start.allow_missing {
            return Err(error.into());
        }
        tracing::warn!(%error, "the {source} source is off");
        let off = Some(error.to_string());
        self.states.push(SourceState { source, off, alive: Alive::default(), status: Status::default() });
        Ok(())
    }
}

/// Who asks for evidence, and who reads it, where it is on.
fn evidence_of(start: &Start<'_>) -> Option<(Evidence, EvidenceReader)> {
    let section = &start.config.collector;
    section.evidence.then(|| {
        evidence::channel(evidence::Options {
            with_arguments: section.evidence_arguments,
            watch_interval: section.watch_interval,
            node: start.node.id,
            log_lines: section.log_lines,
            log_dir: section.log_dir.clone(),
            directory: Arc::clone(&start.context.directory),
        })
    })
}
