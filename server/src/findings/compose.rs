//! From evidence to a finding that a person can read.
//!
//! What enters: a pattern, what it found, the anchor's history. What leaves: the public form of a finding. What must hold: it says
//! nothing that is not in the evidence, and the same evidence gives the same finding.

use std::sync::Arc;

use tapio_wire::event::EntityKind;
use tapio_wire::program::units::{human_bytes, human_duration};
use tapio_wire::service::{Death, EntityRef, Evidence, Finding, Limit, Loss, Sender};

use super::clue_history::ClueHistory;
use super::clue_store::Noted;
use super::confidence::confidence;
use super::endings::{Ended, began_ns, container_of};
use super::facts;
use super::matching::Match;
use super::pattern::Pattern;
use super::template::{Subject, Template};
use super::text;
use crate::correlate::Lost;
use crate::correlate::clue::{Clue, ClueDetail, ClueKind, Exit, Fact, Kill, Oom, SenderClass};
use text::process;

/// Pieces of evidence that a finding lists of one step: the first and the latest ones.
const STEP_EVIDENCE_MAX: usize = 8;
/// What ended a state is evidence of this step.
const END: &str = "end";
/// How long before a death its signal and its OOM kill may lie.
const DEATH_REACH_NS: u64 = 60_000_000_000;
/// How shortly before a death another process's OOM kill must be for the death to follow from it.
const CONSEQUENCE_REACH_NS: u64 = 10_000_000_000;
/// How long after a death Kubernetes may say what it was.
pub const LABEL_REACH_NS: u64 = 600_000_000_000;
/// Observations that a finding lists.
const OBSERVATIONS_MAX: usize = 3;
/// Readings of a cgroup within this time are of the same moment, for whichever death they were taken: the collector reads once
/// then.
const SAME_MOMENT_NS: u64 = 200_000_000;
/// What was read later than this after a death describes what came after it.
const READ_LATE_NS: u64 = 2_000_000_000;
/// How much later than the death they may be stamped.
const DEATH_SLACK_NS: u64 = 10_000_000;

/// What a finding is made of, besides its pattern and its evidence.
pub struct Context<'a> {
    pub id: String,
    /// How many deaths it stands for.
    pub count: u32,
    /// When the first of them was, if that is no longer part of the evidence.
    pub started_realtime_ns: Option<u64>,
    /// The history of the anchor's entity, for the death certificate.
    pub entity_history: Option<&'a ClueHistory>,
    pub lost: Lost,
    /// How the state that it reports ended.
    pub ended: Option<Ended>,
}

/// Composes a finding.
pub fn finding(pattern: &Pattern, found: &Match, context: Context<'_>) -> Option<Finding> {
    let anchor = &found.steps[pattern.anchor].last()?.clue;
    let steps: Vec<Option<&Clue>> = found.steps.iter().map(|step| step.last().map(|noted| &noted.clue)).collect();
    let over_ns = context.ended.as_ref().map(|ended| ended.at_ns);
    let subject = Subject { anchor, steps: &steps, count: context.count, over_ns };
    let all = || found.steps.iter().flatten().map(|noted| &noted.clue);
    let started_ns = all().map(began_ns).min()?;
    let verdict = pattern.verdict.render(&subject);
    let possible =
        found.is_presumed || absence_is_unsure(pattern, context.lost) || cause_is_unsure(found, context.lost);
    Some(Finding {
        id: context.id,
        pattern: pattern.id.clone(),
        title: title(pattern, &subject, possible),
        severity: pattern.severity.name().into(),
        confidence: confidence(pattern, found, context.lost),
        entity: Some(anchor.entity.to_ref()),
        started_ns: context.started_realtime_ns.map_or(started_ns, |first| first.min(started_ns)),
        ended_ns: all().map(|clue| clue.realtime_ns).max()?,
        evidence: {
            let mut listed = evidence(pattern, found);
            listed.extend(observed(&pattern.anchor_step().name, anchor, found, context.entity_history));
            let by = context.ended.iter().flat_map(|ended| &ended.by).take(STEP_EVIDENCE_MAX);
            listed.extend(by.map(|end| piece(END, "", &end.clue)));
            listed
        },
        loss: Some(Loss { events: context.lost.events, open_interval: context.lost.open_interval }),
        advice: pattern
            .advice
            .iter()
            .map(|advice: &Template| advice.render(&subject).trim().to_owned())
            .filter(|advice| !advice.is_empty())
            .collect(),
        death: death(anchor, context.entity_history, verdict),
        summary: joined(&pattern.summary.render(&subject)),
        published_ns: 0,
        last_boottime_ns: all().map(|clue| clue.boottime_ns).max()?,
        revision: 0,
        count: context.count,
        possible,
        superseded_by: String::new(),
        withdrawn: false,
        consequences: Vec::new(),
        ongoing: pattern.is_state() && context.ended.is_none(),
        resolved_ns: context.ended.map_or(0, |ended| ended.at_ns),
        missing_servers: Vec::new(),
        cluster: String::new(),
        silence: None,
        acknowledged: None,
    })
}

/// A clue ends the state that a finding of an earlier run reports.
pub fn end(finding: &mut Finding, clue: &Clue) {
    end_quietly(finding, clue.realtime_ns);
    finding.evidence.push(piece(END, "", clue));
}

/// The state of an earlier run's finding is over: it is not reported any more.
pub fn end_quietly(finding: &mut Finding, at_ns: u64) {
    finding.ongoing = false;
    finding.resolved_ns = at_ns;
}

/// A text without the gaps that parts left out leave behind.
fn joined(text: &str) -> String {
    text.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ").trim().to_owned()
}

/// The title; what is only possible begins with that word, what stands for several says so.
fn title(pattern: &Pattern, subject: &Subject<'_>, possible: bool) -> String {
    let title = pattern.title.render(subject);
    let many =
        if subject.count > 1 && !pattern.gathers() { format!(", {} times", subject.count) } else { String::new() };
    let possibly = if possible { "Possibly: " } else { "" };
    format!("{possibly}{title}{many}")
}

/// Whether what must be absent may have been lost.
fn absence_is_unsure(pattern: &Pattern, lost: Lost) -> bool {
    pattern.steps.iter().any(|step| step.absent && if step.kind.is_burst() { lost.any() } else { lost.any_lethal() })
}

/// Whether what explains it better may have been lost: nobody stated the cause, it was gathered from what processes did.
fn cause_is_unsure(found: &Match, lost: Lost) -> bool {
    let states_nothing = |kind| matches!(kind, ClueKind::Exec | ClueKind::Exit | ClueKind::Kill);
    lost.any_lethal() && found.steps.iter().flatten().all(|noted| states_nothing(noted.clue.kind()))
}

/// What the collector read of the entity when it happened: for a process that the finding is about, or at the same moment.
fn observed(cause: &str, anchor: &Clue, found: &Match, history: Option<&ClueHistory>) -> Vec<Evidence> {
    let cited = || found.steps.iter().flatten().map(|noted| &noted.clue);
    let last_ns = cited().map(|clue| clue.boottime_ns).max().unwrap_or(anchor.boottime_ns);
    // Of a trouble nobody died, and what is wrong was not read for one process.
    let is_death = matches!(anchor.detail, ClueDetail::Exit(_) | ClueDetail::Oom(_) | ClueDetail::Kill(_));
    let is_of_it = |clue: &Clue| {
        let is_its = clue.pid == 0 || cited().any(|cited| cited.pid == clue.pid);
        let is_same_moment = clue.boottime_ns.abs_diff(anchor.boottime_ns) <= SAME_MOMENT_NS;
        !is_death || is_same_moment || is_its && clue.boottime_ns <= last_ns.saturating_add(READ_LATE_NS)
    };
    let clues = history.into_iter().flatten().map(|noted| &noted.clue);
    let near = clues.filter(|clue| {
        clue.evidence.node == anchor.evidence.node && clue.boottime_ns.abs_diff(anchor.boottime_ns) <= DEATH_REACH_NS
    });
    let is_read = |clue: &&Clue| matches!(clue.kind(), ClueKind::Observation | ClueKind::CgroupUse);
    let read = near.clone().filter(is_read).filter(|clue| is_of_it(clue)).take(OBSERVATIONS_MAX);
    // A log is read when its writer has ended, however long that takes.
    let is_log = |clue: &&Clue| clue.kind() == ClueKind::LogLines && (!is_death || clue.pid == anchor.pid);
    let log = near.filter(is_log).take(1);
    read.chain(log).map(|clue| piece("observed", cause, clue)).collect()
}

fn piece(step: &str, cause: &str, clue: &Clue) -> Evidence {
    Evidence {
        id: clue.evidence.to_string(),
        step: step.to_owned(),
        time_ns: clue.realtime_ns,
        kind: clue.kind().name().into(),
        text: describe(clue),
        entity: Some(EntityRef {
            // Kubernetes may name a container of a pod that has none yet.
            container: container_of(clue).unwrap_or_default().to_owned(),
            ..clue.entity.to_ref()
        }),
        pid: clue.pid,
        caused_by: cause.into(),
    }
}

/// The window of a node in which losses matter to a match: its evidence, and a moment before it.
pub fn loss_window(found: &Match, node: u64) -> (u64, u64) {
    const BEFORE_NS: u64 = 1_000_000_000;
    let times = || {
        let of_node = found.steps.iter().flatten().filter(|noted| noted.clue.evidence.node == node);
        of_node.map(|noted| noted.clue.boottime_ns)
    };
    let first = times().min().unwrap_or(0);
    (first.saturating_sub(BEFORE_NS), times().max().unwrap_or(0))
}

fn evidence(pattern: &Pattern, found: &Match) -> Vec<Evidence> {
    let mut list = Vec::new();
    let mut cause = "";
    let anchors = &found.steps[pattern.anchor];
    for (step, bound) in pattern.steps.iter().zip(&found.steps) {
        let is_anchor_too =
            step.may_be_anchor && bound.iter().all(|noted| anchors.iter().any(|one| Arc::ptr_eq(one, noted)));
        if bound.is_empty() || is_anchor_too {
            continue;
        }
        let left_out = bound.len().saturating_sub(STEP_EVIDENCE_MAX);
        let listed = bound.iter().take(1).chain(bound.iter().skip(1 + left_out));
        list.extend(listed.map(|noted: &Arc<Noted>| piece(&step.name, cause, &noted.clue)));
        cause = &step.name;
    }
    list
}

fn sender(kill: &Kill) -> String {
    match kill.sender_class {
        SenderClass::Kernel | SenderClass::Itself => text::sent_by(kill),
        SenderClass::Same => format!(
            "{} of the same {}",
            process(&kill.sender_comm, kill.sender_pid),
            if kill.sender.pod_id() == 0 { text::kind_called(kill.sender.kind_name()) } else { "pod" }
        ),
        SenderClass::Runtime | SenderClass::OomDaemon | SenderClass::Outside => {
            format!("{} of {}", process(&kill.sender_comm, kill.sender_pid), kill.sender)
        }
    }
}

fn ending(exit: &Exit) -> String {
    match (exit.signal(), exit.exit_code()) {
        (Some(signal), _) => {
            let core = if exit.status & 0x80 == 0 { "" } else { ", core dumped" };
            format!("was ended by {}{core}", text::signal_name(signal))
        }
        (None, code) => match exit.died_by() {
            Some(signal) => {
                format!("exited with code {}, that is after {}", code.unwrap_or(0), text::signal_name(signal))
            }
            None => format!("exited with code {}", code.unwrap_or(0)),
        },
    }
}

/// What a clue says, for people.
fn describe(clue: &Clue) -> String {
    let pid = clue.pid;
    match &clue.detail {
        ClueDetail::Exec(exec) => format!("{} was started", process(&exec.comm, pid)),
        ClueDetail::Exit(exit) => {
            let life = clue.boottime_ns.saturating_sub(exit.start_time_ns);
            let life = if exit.start_time_ns == 0 { String::new() } else { format!(" after {}", human_duration(life)) };
            format!("{} {}{life}", process(&exit.comm, pid), ending(exit))
        }
        ClueDetail::Oom(oom) => format!(
            "the kernel chose {} to be killed for memory: it had {} resident; {}",
            process(&oom.comm, pid),
            human_bytes(oom.rss_bytes),
            limit_text(oom)
        ),
        ClueDetail::Kill(kill) => format!(
            "{} was sent to {} by {}{}",
            text::signal_name(kill.signal),
            process(&kill.comm, pid),
            sender(kill),
            if kill.ignored { ", and ignored" } else { "" }
        ),
        ClueDetail::Fact(fact) => facts::sentence(fact, &clue.entity),
        ClueDetail::Burst(burst) => facts::burst(burst),
    }
}

fn limit_text(oom: &Oom) -> String {
    if oom.limit_bytes == 0 {
        return "no memory limit applied to it".to_owned();
    }
    if oom.allocator_inside == Some(false) && !oom.limit_hit() {
        return format!(
            "the memory was asked for outside of {}, which used {} of its limit of {}",
            oom.limit_cgroup,
            human_bytes(oom.usage_bytes),
            human_bytes(oom.limit_bytes)
        );
    }
    format!(
        "{} used {} of its limit of {}",
        if oom.limit_cgroup.is_empty() { "its cgroup" } else { &oom.limit_cgroup },
        human_bytes(oom.usage_bytes),
        human_bytes(oom.limit_bytes)
    )
}

/// What Kubernetes says of the death of a container's first process.
fn label<'a>(anchor: &Clue, history: Option<&'a ClueHistory>) -> Option<&'a Fact> {
    if !anchor.is_lead() || anchor.entity.kind != Some(EntityKind::Container) {
        return None;
    }
    let clues = history.into_iter().flatten().map(|noted| &noted.clue);
    let said = clues.filter_map(|clue| match &clue.detail {
        ClueDetail::Fact(fact) if fact.kind == ClueKind::ContainerState && fact.text("state") == "terminated" => {
            let is_late = clue.realtime_ns.abs_diff(anchor.realtime_ns) <= LABEL_REACH_NS;
            is_late.then_some((clue.realtime_ns, &**fact))
        }
        _ => None,
    });
    said.max_by_key(|&(at, _)| at).map(|(_, fact)| fact)
}

fn label_text(fact: &Fact) -> String {
    let reason = fact.text("reason");
    let reason = if reason.is_empty() { "nothing but a code" } else { reason };
    format!("{reason} (exit code {})", fact.number("exit_code"))
}

/// Whether what Kubernetes says is what happened.
///
/// `has_oom` also where a process of the container was killed for memory so shortly before that this death follows from it: the
/// label is right in substance then.
fn agrees(fact: &Fact, exit: &Exit, has_oom: bool) -> bool {
    let code = match (exit.exit_code(), exit.signal()) {
        (Some(code), _) => code,
        (None, signal) => 128 + signal.unwrap_or(0),
    };
    let reason_fits = match fact.text("reason") {
        "OOMKilled" => has_oom,
        "Completed" => exit.status == 0,
        "Error" => exit.status != 0 && !has_oom,
        _ => true,
    };
    reason_fits && fact.number("exit_code") == u64::from(code)
}

/// The death certificate, when the anchor is a death.
fn death(anchor: &Clue, history: Option<&ClueHistory>, verdict: String) -> Option<Death> {
    let ClueDetail::Exit(exit) = &anchor.detail else {
        return None;
    };
    let near = |clue: &Clue| {
        clue.pid == anchor.pid
            && clue.boottime_ns <= anchor.boottime_ns.saturating_add(DEATH_SLACK_NS)
            && clue.boottime_ns.saturating_add(DEATH_REACH_NS) >= anchor.boottime_ns
            && clue.boottime_ns >= exit.start_time_ns.saturating_sub(DEATH_SLACK_NS)
    };
    let nearby = || history.into_iter().flatten().map(|noted| &noted.clue).filter(|clue| near(clue));
    let oom = nearby()
        .filter_map(|clue| match &clue.detail {
            ClueDetail::Oom(oom) => Some((clue.boottime_ns, oom)),
            _ => None,
        })
        .max_by_key(|&(at, _)| at);
    let kill = nearby()
        .filter_map(|clue| match &clue.detail {
            ClueDetail::Kill(kill) if Some(kill.signal) == exit.died_by() && !kill.ignored => {
                // The OOM killer's own SIGKILL explains more than any that came on top.
                let is_oom = oom.is_some() && kill.sender_class == SenderClass::Kernel;
                Some(((is_oom, clue.boottime_ns), kill))
            }
            _ => None,
        })
        .max_by_key(|&(rank, _)| rank);
    let said = label(anchor, history);
    let follows_from_oom = history.into_iter().flatten().map(|noted| &noted.clue).any(|clue| {
        let before = anchor.boottime_ns.saturating_add(DEATH_SLACK_NS).checked_sub(clue.boottime_ns);
        matches!(&clue.detail, ClueDetail::Oom(_))
            && clue.evidence.node == anchor.evidence.node
            && before.is_some_and(|before| before <= CONSEQUENCE_REACH_NS)
    });
    let was_asked = nearby().any(|clue| {
        matches!(&clue.detail, ClueDetail::Kill(kill)
            if matches!(kill.sender_class, SenderClass::Runtime | SenderClass::Outside | SenderClass::OomDaemon))
    });
    let has_oom = oom.is_some() || follows_from_oom && !was_asked;
    Some(Death {
        label_agrees: said.map(|fact| agrees(fact, exit, has_oom)),
        pid: anchor.pid,
        comm: exit.comm.to_string(),
        exit_code: exit.exit_code(),
        signal: exit.signal(),
        signal_name: exit.signal().map(text::signal_name).unwrap_or_default(),
        sender: kill.map(|(_, kill)| match text::asked_for(kill) {
            Some(_) => Sender { kernel: true, ..Sender::default() },
            None => Sender {
                pid: kill.sender_pid,
                comm: kill.sender_comm.to_string(),
                entity: (kill.sender.id != 0).then(|| kill.sender.to_ref()),
                kernel: text::is_by_kernel(kill),
            },
        }),
        limit: oom.filter(|(_, oom)| oom.limit_bytes > 0).map(|(_, oom)| Limit {
            cgroup: oom.limit_cgroup.to_string(),
            limit_bytes: oom.limit_bytes,
            usage_bytes: oom.usage_bytes,
            hit: oom.limit_hit(),
        }),
        label: said.map(label_text).unwrap_or_default(),
        verdict,
    })
}
