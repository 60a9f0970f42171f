//! From pattern files to patterns.
//!
//! What enters: YAML, embedded and from the operator's directory. What leaves: a [`PatternSet`]. What must hold: a file that cannot
//! work is refused with file, place and reason, never loaded in part; what is read is bounded.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use tapio_wire::program::yaml::{self, Place, Placed};

use super::field::{Field, FieldType};
use super::pattern::{Condition, PATTERN_STEPS_MAX, Pattern, PatternSet, Same, Step, StepMask};
use super::schema::{ConditionFile, EndFile, PatternFile, Scalar, StepFile};
use super::template::{Resolved, Template};
use super::text::signal_number;
use crate::correlate::clue::ClueKind;

const FILES_MAX: usize = 256;
const FILE_BYTES_MAX: u64 = 256 << 10;
const WINDOW_MAX: Duration = Duration::from_secs(86_400);

const EMBEDDED: [(&str, &str); 95] = [
    ("aborted-as-init.yaml", include_str!("../../patterns/aborted-as-init.yaml")),
    ("bad-config.yaml", include_str!("../../patterns/bad-config.yaml")),
    ("bad-release.yaml", include_str!("../../patterns/bad-release.yaml")),
    ("bus-error-full.yaml", include_str!("../../patterns/bus-error-full.yaml")),
    ("bus-error.yaml", include_str!("../../patterns/bus-error.yaml")),
    ("child-crash-exit.yaml", include_str!("../../patterns/child-crash-exit.yaml")),
    ("child-killed-exit.yaml", include_str!("../../patterns/child-killed-exit.yaml")),
    ("child-oom-before-exit.yaml", include_str!("../../patterns/child-oom-before-exit.yaml")),
    ("child-oom-exit.yaml", include_str!("../../patterns/child-oom-exit.yaml")),
    ("command-not-found.yaml", include_str!("../../patterns/command-not-found.yaml")),
    ("configuration-missing.yaml", include_str!("../../patterns/configuration-missing.yaml")),
    ("connections-dropped.yaml", include_str!("../../patterns/connections-dropped.yaml")),
    ("connections-lost.yaml", include_str!("../../patterns/connections-lost.yaml")),
    ("conntrack-full.yaml", include_str!("../../patterns/conntrack-full.yaml")),
    ("conntrack-nearly-full.yaml", include_str!("../../patterns/conntrack-nearly-full.yaml")),
    ("container-not-created.yaml", include_str!("../../patterns/container-not-created.yaml")),
    ("cpu-limit-kill.yaml", include_str!("../../patterns/cpu-limit-kill.yaml")),
    ("crash-loop.yaml", include_str!("../../patterns/crash-loop.yaml")),
    ("crashed.yaml", include_str!("../../patterns/crashed.yaml")),
    ("deadline-exceeded.yaml", include_str!("../../patterns/deadline-exceeded.yaml")),
    ("descriptor-leak.yaml", include_str!("../../patterns/descriptor-leak.yaml")),
    ("descriptors-at-limit.yaml", include_str!("../../patterns/descriptors-at-limit.yaml")),
    ("disk-failing.yaml", include_str!("../../patterns/disk-failing.yaml")),
    ("disk-full-eviction.yaml", include_str!("../../patterns/disk-full-eviction.yaml")),
    ("disk-nearly-full.yaml", include_str!("../../patterns/disk-nearly-full.yaml")),
    ("dns-is-down.yaml", include_str!("../../patterns/dns-is-down.yaml")),
    ("dns-lookups-fail.yaml", include_str!("../../patterns/dns-lookups-fail.yaml")),
    ("drained.yaml", include_str!("../../patterns/drained.yaml")),
    ("ended-by-controller.yaml", include_str!("../../patterns/ended-by-controller.yaml")),
    ("ends-and-restarts.yaml", include_str!("../../patterns/ends-and-restarts.yaml")),
    ("evicted-by-api.yaml", include_str!("../../patterns/evicted-by-api.yaml")),
    ("evicted-by-taint.yaml", include_str!("../../patterns/evicted-by-taint.yaml")),
    ("evicted.yaml", include_str!("../../patterns/evicted.yaml")),
    ("exited-with-error.yaml", include_str!("../../patterns/exited-with-error.yaml")),
    ("false-oomkilled-label.yaml", include_str!("../../patterns/false-oomkilled-label.yaml")),
    ("fatal-signal-survived.yaml", include_str!("../../patterns/fatal-signal-survived.yaml")),
    ("flood.yaml", include_str!("../../patterns/flood.yaml")),
    ("ignored-sigterm.yaml", include_str!("../../patterns/ignored-sigterm.yaml")),
    ("ignored-stopsignal.yaml", include_str!("../../patterns/ignored-stopsignal.yaml")),
    ("image-pull-failed.yaml", include_str!("../../patterns/image-pull-failed.yaml")),
    ("init-container-runs.yaml", include_str!("../../patterns/init-container-runs.yaml")),
    ("interrupted-from-inside.yaml", include_str!("../../patterns/interrupted-from-inside.yaml")),
    ("interrupted-from-outside.yaml", include_str!("../../patterns/interrupted-from-outside.yaml")),
    ("job-failed.yaml", include_str!("../../patterns/job-failed.yaml")),
    ("killed-by-kernel.yaml", include_str!("../../patterns/killed-by-kernel.yaml")),
    ("killed-by-own-process.yaml", include_str!("../../patterns/killed-by-own-process.yaml")),
    ("killed-from-outside.yaml", include_str!("../../patterns/killed-from-outside.yaml")),
    ("liveness-probe-kill.yaml", include_str!("../../patterns/liveness-probe-kill.yaml")),
    ("memory-high-stall.yaml", include_str!("../../patterns/memory-high-stall.yaml")),
    ("memory-limit-kill.yaml", include_str!("../../patterns/memory-limit-kill.yaml")),
    ("never-goes.yaml", include_str!("../../patterns/never-goes.yaml")),
    ("never-ready.yaml", include_str!("../../patterns/never-ready.yaml")),
    ("node-allocatable-kill.yaml", include_str!("../../patterns/node-allocatable-kill.yaml")),
    ("node-memory-exhausted.yaml", include_str!("../../patterns/node-memory-exhausted.yaml")),
    ("node-shutdown.yaml", include_str!("../../patterns/node-shutdown.yaml")),
    ("oom-daemon-kill.yaml", include_str!("../../patterns/oom-daemon-kill.yaml")),
    ("packets-vanish.yaml", include_str!("../../patterns/packets-vanish.yaml")),
    ("pid-limit.yaml", include_str!("../../patterns/pid-limit.yaml")),
    ("pid-namespace-ended.yaml", include_str!("../../patterns/pid-namespace-ended.yaml")),
    ("pids-at-limit.yaml", include_str!("../../patterns/pids-at-limit.yaml")),
    ("pod-deleted.yaml", include_str!("../../patterns/pod-deleted.yaml")),
    ("pod-limit-kill.yaml", include_str!("../../patterns/pod-limit-kill.yaml")),
    ("pods-refused.yaml", include_str!("../../patterns/pods-refused.yaml")),
    ("post-start-failed.yaml", include_str!("../../patterns/post-start-failed.yaml")),
    ("pre-stop-failed.yaml", include_str!("../../patterns/pre-stop-failed.yaml")),
    ("preempted.yaml", include_str!("../../patterns/preempted.yaml")),
    ("process-stopped.yaml", include_str!("../../patterns/process-stopped.yaml")),
    ("reclaim-stall-probe-failure.yaml", include_str!("../../patterns/reclaim-stall-probe-failure.yaml")),
    ("resize-refused.yaml", include_str!("../../patterns/resize-refused.yaml")),
    ("restarted-for-resize.yaml", include_str!("../../patterns/restarted-for-resize.yaml")),
    ("restarted-with-all.yaml", include_str!("../../patterns/restarted-with-all.yaml")),
    ("runtime-died.yaml", include_str!("../../patterns/runtime-died.yaml")),
    ("runtime-hangs.yaml", include_str!("../../patterns/runtime-hangs.yaml")),
    ("sandbox-failed.yaml", include_str!("../../patterns/sandbox-failed.yaml")),
    ("scheduling-gated.yaml", include_str!("../../patterns/scheduling-gated.yaml")),
    ("second-limit-kill.yaml", include_str!("../../patterns/second-limit-kill.yaml")),
    ("session-oom.yaml", include_str!("../../patterns/session-oom.yaml")),
    ("silent-child-oom.yaml", include_str!("../../patterns/silent-child-oom.yaml")),
    ("slice-limit-kill.yaml", include_str!("../../patterns/slice-limit-kill.yaml")),
    ("start-failed.yaml", include_str!("../../patterns/start-failed.yaml")),
    ("startup-probe-kill.yaml", include_str!("../../patterns/startup-probe-kill.yaml")),
    ("stopped-by-signal.yaml", include_str!("../../patterns/stopped-by-signal.yaml")),
    ("stopped-from-inside.yaml", include_str!("../../patterns/stopped-from-inside.yaml")),
    ("stopped-from-outside.yaml", include_str!("../../patterns/stopped-from-outside.yaml")),
    ("stopped.yaml", include_str!("../../patterns/stopped.yaml")),
    ("storage-stall.yaml", include_str!("../../patterns/storage-stall.yaml")),
    ("task-blocked.yaml", include_str!("../../patterns/task-blocked.yaml")),
    ("throttled-into-probe-failure.yaml", include_str!("../../patterns/throttled-into-probe-failure.yaml")),
    ("throttled-now.yaml", include_str!("../../patterns/throttled-now.yaml")),
    ("unit-restart-loop.yaml", include_str!("../../patterns/unit-restart-loop.yaml")),
    ("unit-start-limit.yaml", include_str!("../../patterns/unit-start-limit.yaml")),
    ("unschedulable.yaml", include_str!("../../patterns/unschedulable.yaml")),
    ("upstream-refused.yaml", include_str!("../../patterns/upstream-refused.yaml")),
    ("user-refused.yaml", include_str!("../../patterns/user-refused.yaml")),
    ("volume-not-mounted.yaml", include_str!("../../patterns/volume-not-mounted.yaml")),
];

/// Why a pattern file was refused.
#[derive(Debug, thiserror::Error)]
#[error("{file}{}: {reason}", shown(.place))]
pub struct PatternError {
    pub file: String,
    pub place: Place,
    pub reason: String,
}

/// `:4:11`; nothing for the file as a whole.
fn shown(place: &Place) -> String {
    if *place == Place::default() { String::new() } else { format!(":{place}") }
}

impl PatternSet {
    /// The patterns that are part of this program.
    ///
    /// # Errors
    /// Never with the files as they are shipped; a test loads them.
    pub fn embedded() -> Result<Self, PatternError> {
        Self::load(None)
    }

    /// The embedded patterns and those of a directory, whose `*.yaml` files replace embedded ones of the same id.
    ///
    /// # Errors
    /// [`PatternError`] names the file, the place and the reason.
    pub fn load(directory: Option<&Path>) -> Result<Self, PatternError> {
        let mut files: Vec<(String, String)> =
            EMBEDDED.iter().map(|&(name, text)| (name.to_owned(), text.to_owned())).collect();
        let embedded = files.len();
        if let Some(directory) = directory {
            read_directory(directory, &mut files)?;
        }
        let mut patterns = BTreeMap::new();
        for (index, (file, text)) in files.iter().enumerate() {
            let (pattern, place) = parse(file, text)?;
            let is_own = index >= embedded;
            if let Some((_, true)) = patterns.get(&pattern.id) {
                return Err(PatternError {
                    file: file.clone(),
                    place,
                    reason: format!("another file of the directory has the id {}", pattern.id),
                });
            }
            patterns.insert(pattern.id.clone(), (pattern, is_own));
        }
        Self::assemble(patterns.into_values().map(|(pattern, _)| pattern).collect())
    }

    /// A set of the patterns in these texts alone; each comes with the name of its file.
    ///
    /// # Errors
    /// [`PatternError`] names the file, the line and the reason.
    pub fn from_texts(files: &[(&str, &str)]) -> Result<Self, PatternError> {
        let patterns: Result<_, _> =
            files.iter().map(|(file, text)| parse(file, text).map(|(pattern, _)| pattern)).collect();
        Self::assemble(patterns?)
    }
}

fn read_directory(directory: &Path, files: &mut Vec<(String, String)>) -> Result<(), PatternError> {
    let fail = |path: &Path, reason: String| PatternError {
        file: path.display().to_string(),
        place: Place::default(),
        reason,
    };
    let entries = std::fs::read_dir(directory)
        .map_err(|error| fail(directory, format!("the directory of patterns cannot be read: {error}")))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| fail(directory, error.to_string()))?.path();
        if path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml") {
            paths.push(path);
        }
    }
    if paths.len() > FILES_MAX {
        return Err(fail(directory, format!("more than {FILES_MAX} pattern files")));
    }
    paths.sort();
    for path in paths {
        let size = std::fs::metadata(&path).map_err(|error| fail(&path, error.to_string()))?.len();
        if size > FILE_BYTES_MAX {
            return Err(fail(&path, format!("larger than {FILE_BYTES_MAX} bytes")));
        }
        let text = std::fs::read_to_string(&path).map_err(|error| fail(&path, error.to_string()))?;
        files.push((path.display().to_string(), text));
    }
    Ok(())
}

/// Checks one file. Also returns where its id is.
fn parse(file: &str, text: &str) -> Result<(Pattern, Place), PatternError> {
    let refuse = |place: Place, reason: String| PatternError { file: file.to_owned(), place, reason };
    let parsed: PatternFile = yaml::from_str(text).map_err(|error| refuse(error.place(), error.reason()))?;
    let place = parsed.id.place();
    let pattern = compile(parsed).map_err(|(place, reason)| refuse(place, reason))?;
    Ok((pattern, place))
}

/// What is wrong, and where.
type Wrong = (Place, String);

/// Finds a step's field by name, or says why there is none.
type Resolve<'a> = dyn Fn(&str, &str) -> Result<Resolved, String> + 'a;

fn compile(file: PatternFile) -> Result<Pattern, Wrong> {
    let wrong = |place: Place, reason: String| Err((place, reason));
    let is_id = |text: &str| {
        !text.is_empty()
            && text
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_')
    };
    if !is_id(&file.id) {
        return wrong(file.id.place(), "`id` takes lower case letters, digits and dashes".into());
    }
    if file.steps.is_empty() || file.steps.len() > PATTERN_STEPS_MAX {
        return wrong(file.steps.place(), format!("a pattern has 1 to {PATTERN_STEPS_MAX} steps"));
    }
    if file.window.0.is_zero() || file.window.0 > WINDOW_MAX {
        return wrong(file.window.place(), "`window` is longer than 0 and at most 24h".into());
    }
    let kinds = file.steps.iter().map(|step| kind_of(&step.clue)).collect::<Result<Vec<_>, Wrong>>()?;
    let resolve = |name: &str, field: &str| -> Result<(usize, Field), String> {
        let index = file
            .steps
            .iter()
            .position(|step| *step.name == name)
            .ok_or_else(|| format!("there is no step called {name}"))?;
        let found = Field::of_kind(field, kinds[index]).ok_or_else(|| no_field(name, field, kinds[index]))?;
        Ok((index, found))
    };
    let Some(anchor) = file.steps.iter().position(|step| *step.name == *file.anchor) else {
        return wrong(file.anchor.place(), format!("the anchor {} is no step", *file.anchor));
    };
    let sentence = |text: &Placed<String>| -> Result<Template, Wrong> {
        let template = Template::parse(text, &resolve).map_err(|reason| (text.place(), reason))?;
        match file
            .steps
            .iter()
            .enumerate()
            .find(|(index, step)| (step.optional || step.absent || step.may_be_lost) && template.needs(*index))
        {
            Some((_, step)) => {
                Err((text.place(), format!("{} may be missing: put its part into [[ and ]]", *step.name)))
            }
            None => Ok(template),
        }
    };
    let in_unit = |value: f64| (0.0..=1.0).contains(&value);
    if !in_unit(file.confidence.base)
        || !in_unit(file.confidence.loss)
        || !file.confidence.minus.values().all(|minus| in_unit(**minus))
    {
        return wrong(file.confidence.place(), "confidences lie between 0 and 1".into());
    }
    for (name, minus) in &file.confidence.minus {
        if !file.steps.iter().any(|step| *step.name == *name && step.optional) {
            return wrong(minus.place(), format!("`minus` names {name}, which is no optional step"));
        }
    }
    let mut steps = Vec::with_capacity(file.steps.len());
    for (index, step) in file.steps.iter().enumerate() {
        let refuse = |reason: &str| Err((step.name.place(), format!("step {}: {reason}", *step.name)));
        if !is_id(&step.name) {
            return refuse("a name takes lower case letters, digits, dashes and underscores");
        }
        if file.steps[..index].iter().any(|other| *other.name == *step.name) {
            return refuse("another step has this name");
        }
        if step.optional && step.absent {
            return refuse("it cannot be both optional and absent");
        }
        if index == anchor && (step.optional || step.absent || step.count.is_none() && !step.same.is_empty()) {
            return refuse("the anchor is neither optional nor absent, and others refer to it by `same`");
        }
        if step.may_be_lost && (step.optional || step.absent || index == anchor) {
            return refuse("only a step that is required, and not the anchor, may be lost");
        }
        if step.absent && step.count.is_some() {
            return refuse("what is absent has no count");
        }
        steps.push(compile_step(
            step,
            kinds[index],
            index,
            anchor,
            &resolve,
            file.confidence.minus.get(&*step.name).map(|minus| **minus),
        )?);
    }
    let mut one_of = Vec::new();
    for name in &file.one_of {
        match file.steps.iter().position(|step| *step.name == **name && step.optional) {
            Some(index) => one_of.push(index),
            None => return wrong(name.place(), format!("`one_of` names {}, which is no optional step", **name)),
        }
    }
    for (id, scope) in &file.absorbs {
        if !is_id(id) || *id == *file.id {
            return wrong(scope.place(), format!("`absorbs` names {id}: write the id of another pattern"));
        }
    }
    let ends = file.ends.iter().flat_map(|ends| ends.iter()).map(compile_end).collect::<Result<Vec<_>, Wrong>>()?;
    if let Some(place) = file.ends.as_ref().filter(|ends| !ends.is_empty()).map(Placed::place)
        && steps[anchor].count_min > 1
    {
        return wrong(
            place,
            "a pattern with `ends` reports a state from its first clue on: its anchor is not counted".into(),
        );
    }
    if let Some(quiet) = file.quiet.as_ref().filter(|_| ends.is_empty()) {
        return wrong(quiet.place(), "only a pattern with `ends` reports a state that can be over".into());
    }
    Ok(Pattern {
        one_of,
        // Numbered with the steps of all patterns.
        required: StepMask::default(),
        ends,
        quiet_ns: file.quiet.map(|quiet| nanoseconds(quiet.0)),
        absorbs: file.absorbs.iter().map(|(id, scope)| (id.clone(), **scope)).collect(),
        // Known when all patterns are.
        absorbed_by: Vec::new(),
        roots: StepMask::default(),
        consequences: StepMask::default(),
        fold: file.fold,
        title: sentence(&file.title)?,
        summary: sentence(&file.summary)?,
        verdict: sentence(file.verdict.as_ref().unwrap_or(&file.title))?,
        advice: file.advice.iter().map(sentence).collect::<Result<_, _>>()?,
        severity: file.severity,
        priority: file.priority,
        window_ns: nanoseconds(file.window.0),
        scope: file.scope,
        steps,
        anchor,
        confidence: file.confidence.base,
        confidence_loss: file.confidence.loss,
        id: file.id.into_inner(),
    })
}

fn kind_of(clue: &Placed<String>) -> Result<ClueKind, Wrong> {
    ClueKind::from_name(clue).ok_or_else(|| {
        let names: Vec<_> = ClueKind::ALL.iter().map(|kind| kind.name()).collect();
        (clue.place(), format!("no clue is called {}: there are {}", **clue, names.join(", ")))
    })
}

fn no_field(step: &str, field: &str, kind: ClueKind) -> String {
    format!("{step} has no {field}: a clue of kind {} has {}", kind.name(), Field::names_of(kind))
}

/// What ends a state: a clue like a step's, of the same pod or entity.
fn compile_end(end: &EndFile) -> Result<Step, Wrong> {
    let kind = kind_of(&end.clue)?;
    let mut conditions = Vec::new();
    for (name, condition) in &end.conditions {
        let located = |reason: String| (condition.place(), format!("ends: {reason}"));
        let field = Field::of_kind(name, kind).ok_or_else(|| located(no_field(&end.clue, name, kind)))?;
        conditions.push(compile_condition(field, condition).map_err(located)?);
    }
    Ok(Step {
        name: "end".into(),
        kind,
        number: 0,
        conditions,
        same: Vec::new(),
        within_ns: None,
        after_at_least_ns: 0,
        slack_ns: 0,
        count_min: 1,
        is_counted: false,
        distinct: None,
        optional: true,
        may_be_lost: false,
        absent: false,
        minus: 0.0,
    })
}

fn compile_step(
    step: &StepFile,
    kind: ClueKind,
    index: usize,
    anchor: usize,
    resolve: &Resolve<'_>,
    minus: Option<f64>,
) -> Result<Step, Wrong> {
    let mut conditions = Vec::new();
    for (name, condition) in &step.conditions {
        let located = |reason: String| (condition.place(), format!("step {}: {reason}", *step.name));
        let (_, field) = resolve(&step.name, name).map_err(located)?;
        conditions.push(compile_condition(field, condition).map_err(located)?);
    }
    let mut same = Vec::new();
    for (name, reference) in &step.same {
        let located = |reason: String| (reference.place(), format!("step {}: {reason}", *step.name));
        let (_, field) = resolve(&step.name, name).map_err(located)?;
        let (other, other_field) = reference
            .split_once('.')
            .ok_or_else(|| located(format!("`same` takes step.field, not {}", **reference)))
            .and_then(|(other, field)| resolve(other, field).map_err(located))?;
        let is_nearer = if index < anchor { other > index && other <= anchor } else { other < index };
        // All that are counted must be like the last of them.
        let is_own = other == index && step.count.is_some();
        let may_refer = is_nearer || is_own || step.absent && other != index;
        if !may_refer {
            return Err(located(format!(
                "{} must lie between this step and the anchor, or be the anchor",
                **reference
            )));
        }
        same.push(Same { field, other, other_field, is_own });
    }
    let distinct = match step.count.as_ref().and_then(|count| count.distinct.as_ref()) {
        Some(name) => {
            let located = |reason: String| (name.place(), format!("step {}: {reason}", *step.name));
            Some(resolve(&step.name, name).map_err(located)?.1)
        }
        None => None,
    };
    Ok(Step {
        is_counted: step.count.is_some(),
        distinct,
        may_be_lost: step.may_be_lost,
        name: step.name.to_string(),
        kind,
        number: 0,
        conditions,
        same,
        within_ns: step.within.map(|time| nanoseconds(time.0)),
        after_at_least_ns: step.after_at_least.map_or(0, |time| nanoseconds(time.0)),
        slack_ns: step.slack.map_or(0, |time| nanoseconds(time.0)),
        count_min: step.count.as_ref().map_or(1, |count| count.min.max(1)),
        optional: step.optional,
        absent: step.absent,
        minus: minus.unwrap_or(0.0),
    })
}

fn compile_condition(field: Field, condition: &ConditionFile) -> Result<Condition, String> {
    let value = |scalar: &Scalar| match (field.field_type(), scalar) {
        (FieldType::Flag, Scalar::Flag(_)) | (FieldType::Text, Scalar::Text(_)) => Ok(scalar.clone()),
        (FieldType::Signal, Scalar::Text(name)) => {
            signal_number(name).map(Scalar::Number).ok_or_else(|| format!("no signal is called {name}"))
        }
        (FieldType::Number | FieldType::Bytes | FieldType::Nanoseconds | FieldType::Signal, Scalar::Number(_)) => {
            Ok(scalar.clone())
        }
        (expected, _) => Err(format!("{} cannot be {scalar}: it is a {expected:?}", field.name())),
    };
    let values = |scalars: &[Scalar]| scalars.iter().map(value).collect::<Result<Vec<_>, _>>();
    Ok(match condition {
        ConditionFile::OneOf(scalars) if scalars.is_empty() => {
            return Err(format!("{} has an empty list", field.name()));
        }
        ConditionFile::OneOf(scalars) => Condition {
            field,
            one_of: values(scalars)?,
            not: Vec::new(),
            starts: Vec::new(),
            contains: Vec::new(),
            range: 0..=u64::MAX,
            allows_missing: false,
        },
        ConditionFile::Range { min, max, not, starts, contains } => {
            let is_number = !matches!(field.field_type(), FieldType::Flag | FieldType::Text);
            if (min.is_some() || max.is_some()) && !is_number {
                return Err(format!("{} has no minimum or maximum", field.name()));
            }
            if [min, max].into_iter().flatten().any(|bound| bound.is_duration)
                && field.field_type() != FieldType::Nanoseconds
            {
                return Err(format!("{} is no duration", field.name()));
            }
            let range = min.map_or(0, |bound| bound.number)..=max.map_or(u64::MAX, |bound| bound.number);
            if range.is_empty() {
                return Err(format!("{} has a minimum above its maximum", field.name()));
            }
            if !(starts.is_empty() && contains.is_empty()) && field.field_type() != FieldType::Text {
                return Err(format!("{} is no text: it neither starts with anything nor contains it", field.name()));
            }
            let texts = |scalars: &[Scalar]| Ok::<_, String>(values(scalars)?.iter().map(Scalar::to_string).collect());
            Condition {
                field,
                one_of: Vec::new(),
                not: values(not)?,
                starts: texts(starts)?,
                contains: texts(contains)?,
                range,
                allows_missing: min.is_none() && max.is_none() && starts.is_empty() && contains.is_empty(),
            }
        }
    })
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
