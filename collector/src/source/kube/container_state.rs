//! One state of a container, as an event.

use tapio_wire::event::{ContainerState, Detail};

use super::objects::{Container, ContainerStatus, Limits, Pod, Terminated, Waiting, quantity_milli, unix_ns};
use super::report::{Subject, WatchReport};

/// One state of a container.
#[derive(Default)]
pub(super) struct Shown<'a> {
    pub(super) id: &'a str,
    pub(super) state: u8,
    pub(super) is_last: bool,
    pub(super) reason: &'a str,
    pub(super) message: &'a str,
    pub(super) exit_code: i32,
    pub(super) signal: i32,
    pub(super) started_ns: u64,
    pub(super) finished_ns: u64,
}

impl<'a> Shown<'a> {
    pub(super) fn waiting(status: &'a ContainerStatus, waiting: &'a Waiting) -> Self {
        let (reason, message) = (&*waiting.reason, &*waiting.message);
        Self { id: &status.container_id, state: 1, reason, message, ..Self::default() }
    }

    pub(super) fn ended(id: &'a str, ended: &'a Terminated, is_last: bool) -> Self {
        Self {
            id,
            state: 3,
            is_last,
            reason: &ended.reason,
            message: &ended.message,
            exit_code: ended.exit_code,
            signal: ended.signal,
            started_ns: unix_ns(ended.started_at.as_ref()),
            finished_ns: unix_ns(ended.finished_at.as_ref()),
        }
    }
}

/// A state of a container as it is reported, once or again.
#[derive(Clone)]
pub(super) struct StateReport {
    subject: Subject,
    /// Container, image, reason and message.
    texts: [String; 4],
    state: ContainerState,
}

impl StateReport {
    pub(super) fn event(&self) -> WatchReport {
        let Self { subject, texts, state } = self.clone();
        WatchReport::event(subject, move |batch| {
            let [container, image, reason, message] = texts.map(|text| batch.text(&text));
            Detail::ContainerState(Box::new(ContainerState { container, image, reason, message, ..state }))
        })
    }
}

/// How a container can fail to start at all.
const START_FAILURES: [&str; 3] = ["StartError", "ContainerCannotRun", "RunContainerError"];

/// Why a container does not run, where that lasts until somebody mends it. `None` where it runs, has ended, or is on its way.
pub(super) fn hindrance(status: &ContainerStatus) -> Option<Shown<'_>> {
    let failed_to_start = |ended: &&Terminated| START_FAILURES.contains(&&*ended.reason);
    if let Some(ended) = &status.state.terminated {
        return Some(ended).filter(failed_to_start).map(|ended| Shown::ended(id_of(status, ended), ended, false));
    }
    let waiting = status.state.waiting.as_ref()?;
    match &*waiting.reason {
        "" | "ContainerCreating" | "PodInitializing" => None,
        "CrashLoopBackOff" | "RunContainerError" => {
            let ended = status.last_state.terminated.as_ref().filter(failed_to_start)?;
            Some(Shown::ended(id_of(status, ended), ended, true))
        }
        _ => Some(Shown::waiting(status, waiting)),
    }
}

/// The id of the run of a container that ended.
pub(super) fn id_of<'a>(status: &'a ContainerStatus, ended: &'a Terminated) -> &'a str {
    if ended.container_id.is_empty() { &status.container_id } else { &ended.container_id }
}

/// What is reported of one state of a container.
pub(super) fn state_report(
    subject: Subject,
    pod: &Pod,
    status: &ContainerStatus,
    role: u8,
    shown: &Shown<'_>,
) -> StateReport {
    let limits = specified(pod, &status.name).map(|container| &container.resources.limits);
    let milli = |of: fn(&Limits) -> &str| limits.map_or(0, |limits| quantity_milli(of(limits)));
    let image = awaited_image(pod, status, shown);
    let texts = [&*status.name, image, shown.reason, shown.message].map(str::to_owned);
    // Names are set when it is written.
    let state = ContainerState {
        container: 0,
        image: 0,
        reason: 0,
        message: 0,
        exit_code: shown.exit_code,
        signal: shown.signal,
        restart_count: status.restart_count,
        started_ns: shown.started_ns,
        finished_ns: shown.finished_ns,
        state: shown.state,
        is_last: shown.is_last,
        is_ready: status.ready,
        role,
        memory_limit_bytes: milli(|limits| &limits.memory) / 1000,
        cpu_limit_milli: milli(|limits| &limits.cpu),
    };
    StateReport { subject, texts, state }
}

/// The image that a container waits for: that of a volume, where kubelet's words name it.
fn awaited_image<'a>(pod: &'a Pod, status: &'a ContainerStatus, shown: &Shown<'_>) -> &'a str {
    let of_volumes = pod.spec.volumes.iter().map(|volume| &*volume.image.reference);
    let is_named = |reference: &&str| !reference.is_empty() && shown.message.contains(*reference);
    let is_awaited = shown.reason.contains("Image");
    of_volumes.filter(|_| is_awaited).find(is_named).unwrap_or_else(|| image_of(pod, status))
}

/// The image as the specification names it: the status may have a digest only.
pub(super) fn image_of<'a>(pod: &'a Pod, status: &'a ContainerStatus) -> &'a str {
    let specified = specified(pod, &status.name).map(|container| &*container.image);
    specified.filter(|image| !image.is_empty()).unwrap_or(&status.image)
}

fn specified<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    let spec = &pod.spec;
    let all = spec.containers.iter().chain(&spec.init_containers).chain(&spec.ephemeral_containers);
    all.into_iter().find(|container| container.name == name)
}
