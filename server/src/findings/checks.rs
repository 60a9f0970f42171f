//! What the keys of a pattern file mean together.
//!
//! What enters: one file, every key known. What must hold: a file that could not work, or would not do what it seems to say, is refused
//! with the place and what to write instead.

use std::time::Duration;

use tapio_wire::program::units::human_duration;
use tapio_wire::program::yaml::TextPosition;

use super::pattern::PATTERN_STEPS_MAX;
use super::schema::{PatternFile, StepFile};

const WINDOW_MAX: Duration = Duration::from_secs(86_400);
/// As many letters as a label of Kubernetes takes, and a pattern's id is one where findings are delivered to.
const ID_BYTES_MAX: usize = 63;

/// What is wrong, and where.
pub(super) type Wrong = (TextPosition, String);

fn is_id(text: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
    !text.is_empty() && text.bytes().all(is_allowed)
}

pub(super) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

pub(super) fn wrong<T>(place: TextPosition, reason: impl Into<String>) -> Result<T, Wrong> {
    Err((place, reason.into()))
}

/// Checks what does not depend on the clues that steps look for.
pub(super) fn check(file: &PatternFile) -> Result<(), Wrong> {
    if !is_id(&file.id) {
        return wrong(file.id.place(), "`id` takes lower case letters, digits and dashes");
    }
    if file.id.len() > ID_BYTES_MAX {
        let length = file.id.len();
        return wrong(file.id.place(), format!("`id` has {length} letters: write at most {ID_BYTES_MAX}"));
    }
    if file.steps.is_empty() || file.steps.len() > PATTERN_STEPS_MAX {
        return wrong(file.steps.place(), format!("a pattern has 1 to {PATTERN_STEPS_MAX} steps"));
    }
    if file.window.0.is_zero() || file.window.0 > WINDOW_MAX {
        return wrong(file.window.place(), "`window` is longer than 0 and at most 24h");
    }
    let in_unit = |value: f64| (0.0..=1.0).contains(&value);
    if !in_unit(file.confidence.base)
        || !in_unit(file.confidence.loss)
        || !file.confidence.minus.values().all(|minus| in_unit(**minus))
    {
        return wrong(file.confidence.place(), "confidences lie between 0 and 1");
    }
    for (name, minus) in &file.confidence.minus {
        if !file.steps.iter().any(|step| *step.name == *name && step.optional) {
            return wrong(minus.place(), format!("`minus` names {name}, which is no optional step"));
        }
    }
    for (id, scope) in &file.absorbs {
        if !is_id(id) || *id == *file.id {
            return wrong(scope.place(), format!("`absorbs` names {id}: write the id of another pattern"));
        }
    }
    Ok(())
}

pub(super) fn step_named(steps: &[StepFile], name: &str) -> Option<usize> {
    steps.iter().position(|step| *step.name == name)
}

/// Checks what a step says of itself.
pub(super) fn check_step(file: &PatternFile, index: usize, anchor: usize) -> Result<(), Wrong> {
    let step = &file.steps[index];
    let refuse = |reason: &str| wrong(step.name.place(), format!("step {}: {reason}", *step.name));
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
    if step.may_be_anchor && (step.absent || step.count.is_some() || index == anchor) {
        return refuse("only a step that is neither absent nor counted, and not the anchor, may be the anchor as well");
    }
    if step.absent && step.count.is_some() {
        return refuse("what is absent has no count");
    }
    if step.apart.is_some() && !(step.absent && index < anchor) {
        return refuse("`apart` is for a step that must be absent before the anchor");
    }
    for named in [&step.after, &step.before, &step.unless].into_iter().flatten() {
        let other = step_named(&file.steps, named).filter(|other| *other < anchor && !file.steps[*other].absent);
        if !(step.absent && index < anchor) || other.is_none() {
            return refuse("an absent step before the anchor names a present one there by `after`, `before`, `unless`");
        }
    }
    // What must be absent may be looked for further back than all evidence.
    let within = step.within.filter(|_| !step.absent);
    let times =
        [("within", within), ("after_at_least", step.after_at_least), ("apart", step.apart), ("slack", step.slack)];
    if let Some((key, _)) = times.iter().find(|(_, time)| time.is_some_and(|time| time.0 > file.window.0)) {
        let window = human_duration(nanoseconds(file.window.0));
        return refuse(&format!(
            "`{key}` is longer than `window`, all that is looked at: write at most {window}, or a longer `window`"
        ));
    }
    if step.within.zip(step.after_at_least).is_some_and(|(within, at_least)| at_least.0 > within.0) {
        return refuse("`after_at_least` is longer than `within`: nothing is both");
    }
    if let Some(named) = step.count.as_ref().and_then(|count| count.after.as_ref()) {
        let is_before = |other: &StepFile| !other.absent && !other.optional && !other.may_be_lost;
        let other = step_named(&file.steps, named).filter(|other| *other < anchor && is_before(&file.steps[*other]));
        if index != anchor || other.is_none() {
            return wrong(
                named.place(),
                format!("step {}: only the anchor's count names a required step before it by `after`", *step.name),
            );
        }
    }
    Ok(())
}

/// The optional steps of which one must be found.
pub(super) fn one_of(file: &PatternFile) -> Result<Vec<usize>, Wrong> {
    let mut one_of = Vec::new();
    for name in &file.one_of {
        match file.steps.iter().position(|step| *step.name == **name && step.optional) {
            Some(index) => one_of.push(index),
            None => return wrong(name.place(), format!("`one_of` names {}, which is no optional step", **name)),
        }
    }
    Ok(one_of)
}
