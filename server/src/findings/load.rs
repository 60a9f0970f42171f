//! From pattern files to patterns.
//!
//! What enters: YAML, embedded and from the operator's directory. What leaves: a [`PatternSet`]. What must hold: a file that cannot
//! work is refused with file, place and reason, never loaded in part; what is read is bounded.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use tapio_wire::program::yaml::{self, Placed, TextPosition};

use super::embedded::EMBEDDED;
use super::field::{Field, FieldType};
use super::pattern::{Condition, PATTERN_STEPS_MAX, Pattern, PatternSet, Same, Step, StepMask};
use super::regular_file;
use super::schema::{ConditionFile, EndFile, PatternFile, Scalar, StepFile};
use super::template::{Resolved, Template};
use super::text::signal_number;
use super::words;
use crate::correlate::clue::ClueKind;

const FILES_MAX: usize = 256;
const FILE_BYTES_MAX: u64 = 256 << 10;
const WINDOW_MAX: Duration = Duration::from_secs(86_400);

/// Why a pattern file was refused.
#[derive(Debug, thiserror::Error)]
#[error("{file}{}: {reason}", shown(.place))]
pub struct PatternError {
    pub file: String,
    pub place: TextPosition,
    pub reason: String,
}

/// A pattern out of the operator's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnPattern {
    pub file: String,
    pub id: String,
    /// True if its id is that of a built-in pattern, which it replaces.
    pub is_built_in: bool,
}

/// `:4:11`; nothing for the file as a whole.
fn shown(place: &TextPosition) -> String {
    if *place == TextPosition::default() { String::new() } else { format!(":{place}") }
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
        let (mut patterns, mut own) = (BTreeMap::<String, Pattern>::new(), Vec::<OwnPattern>::new());
        for (index, (file, text)) in files.iter().enumerate() {
            let (pattern, place) = parse(file, text)?;
            let id = pattern.id.clone();
            if own.iter().any(|known| known.id == id) {
                return Err(PatternError {
                    file: file.clone(),
                    place,
                    reason: format!("another file of the directory has the id {id}"),
                });
            }
            let is_built_in = patterns.insert(id.clone(), pattern).is_some();
            if index >= embedded {
                own.push(OwnPattern { file: file.clone(), id, is_built_in });
            }
        }
        for OwnPattern { file, id, .. } in &own {
            let absorbs = patterns.get(id).into_iter().flat_map(|pattern| &pattern.absorbs);
            if let Some((unknown, _)) = absorbs.into_iter().find(|(absorbed, _)| !patterns.contains_key(absorbed)) {
                let reason = format!("`absorbs` names {unknown}, and no pattern has that id");
                return Err(PatternError { file: file.clone(), place: TextPosition::default(), reason });
            }
        }
        let mut set = Self::assemble(patterns.into_values().collect())?;
        set.own = own;
        Ok(set)
    }

    /// The operator's patterns, in the order of their files.
    pub fn own(&self) -> &[OwnPattern] {
        &self.own
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
        place: TextPosition::default(),
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
        let unread = |error: io::Error| fail(&path, error.to_string());
        let file = regular_file::open(&path, File::options().read(true)).map_err(unread)?;
        let mut text = String::new();
        file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(unread)?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(fail(&path, format!("larger than {FILE_BYTES_MAX} bytes")));
        }
        files.push((path.display().to_string(), text));
    }
    Ok(())
}

/// Checks one file. Also returns where its id is.
fn parse(file: &str, text: &str) -> Result<(Pattern, TextPosition), PatternError> {
    let refuse = |place: TextPosition, reason: String| PatternError { file: file.to_owned(), place, reason };
    let parsed: PatternFile = yaml::from_str(text).map_err(|error| refuse(error.place(), error.reason()))?;
    let place = parsed.id.place();
    let pattern = compile(parsed).map_err(|(place, reason)| refuse(place, reason))?;
    Ok((pattern, place))
}

/// What is wrong, and where.
type Wrong = (TextPosition, String);

/// Finds a step's field by name, or says why there is none.
type Resolve<'a> = dyn Fn(&str, &str) -> Result<Resolved, String> + 'a;

fn is_id(text: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
    !text.is_empty() && text.bytes().all(is_allowed)
}

fn wrong<T>(place: TextPosition, reason: impl Into<String>) -> Result<T, Wrong> {
    Err((place, reason.into()))
}

/// Checks what does not depend on the clues that steps look for.
fn check(file: &PatternFile) -> Result<(), Wrong> {
    if !is_id(&file.id) {
        return wrong(file.id.place(), "`id` takes lower case letters, digits and dashes");
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

fn step_named(steps: &[StepFile], name: &str) -> Option<usize> {
    steps.iter().position(|step| *step.name == name)
}

/// Checks what a step says of itself.
fn check_step(file: &PatternFile, index: usize, anchor: usize) -> Result<(), Wrong> {
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
    Ok(())
}

/// The optional steps of which one must be found.
fn one_of(file: &PatternFile) -> Result<Vec<usize>, Wrong> {
    let mut one_of = Vec::new();
    for name in &file.one_of {
        match file.steps.iter().position(|step| *step.name == **name && step.optional) {
            Some(index) => one_of.push(index),
            None => return wrong(name.place(), format!("`one_of` names {}, which is no optional step", **name)),
        }
    }
    Ok(one_of)
}

fn compile(file: PatternFile) -> Result<Pattern, Wrong> {
    check(&file)?;
    let kinds = file.steps.iter().map(|step| kind_of(&step.clue)).collect::<Result<Vec<_>, Wrong>>()?;
    let resolve = |name: &str, field: &str| -> Result<(usize, Field), String> {
        let index = step_named(&file.steps, name).ok_or_else(|| format!("there is no step called {name}"))?;
        let found = Field::of_kind(field, kinds[index]).ok_or_else(|| no_field(name, field, kinds[index]))?;
        Ok((index, found))
    };
    let Some(anchor) = step_named(&file.steps, &file.anchor) else {
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
    let mut steps = Vec::with_capacity(file.steps.len());
    for (index, step) in file.steps.iter().enumerate() {
        check_step(&file, index, anchor)?;
        let minus = file.confidence.minus.get(&*step.name).map(|minus| **minus);
        steps.push(compile_step(&file.steps, kinds[index], index, anchor, &resolve, minus)?);
    }
    let one_of = one_of(&file)?;
    let ends = file.ends.iter().flat_map(|ends| ends.iter()).map(compile_end).collect::<Result<Vec<_>, Wrong>>()?;
    if let Some(place) = file.ends.as_ref().filter(|ends| !ends.is_empty()).map(Placed::place)
        && steps[anchor].count_min > 1
    {
        return wrong(place, "a pattern with `ends` reports a state from its first clue on: its anchor is not counted");
    }
    if let Some(quiet) = file.quiet.as_ref().filter(|_| ends.is_empty()) {
        return wrong(quiet.place(), "only a pattern with `ends` reports a state that can be over");
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
        conditions.push(compile_condition(field, kind, condition).map_err(located)?);
    }
    Ok(Step {
        name: "end".into(),
        kind,
        number: 0,
        conditions,
        same: Vec::new(),
        within_ns: None,
        after_at_least_ns: 0,
        apart_ns: 0,
        after: None,
        before: None,
        unless: None,
        slack_ns: 0,
        count_min: 1,
        is_counted: false,
        distinct: None,
        optional: true,
        may_be_lost: false,
        may_be_anchor: false,
        absent: false,
        minus: 0.0,
    })
}

fn compile_step(
    steps: &[StepFile],
    kind: ClueKind,
    index: usize,
    anchor: usize,
    resolve: &Resolve<'_>,
    minus: Option<f64>,
) -> Result<Step, Wrong> {
    let step = &steps[index];
    let mut conditions = Vec::new();
    for (name, condition) in &step.conditions {
        let located = |reason: String| (condition.place(), format!("step {}: {reason}", *step.name));
        let (_, field) = resolve(&step.name, name).map_err(located)?;
        conditions.push(compile_condition(field, kind, condition).map_err(located)?);
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
    let named = |name: &Option<Placed<String>>| name.as_ref().and_then(|name| step_named(steps, name));
    Ok(Step {
        is_counted: step.count.is_some(),
        distinct,
        may_be_lost: step.may_be_lost,
        may_be_anchor: step.may_be_anchor,
        name: step.name.to_string(),
        kind,
        number: 0,
        conditions,
        same,
        within_ns: step.within.map(|time| nanoseconds(time.0)),
        after_at_least_ns: step.after_at_least.map_or(0, |time| nanoseconds(time.0)),
        apart_ns: step.apart.map_or(0, |time| nanoseconds(time.0)),
        slack_ns: step.slack.map_or(0, |time| nanoseconds(time.0)),
        count_min: step.count.as_ref().map_or(1, |count| count.min.max(1)),
        optional: step.optional,
        absent: step.absent,
        after: named(&step.after),
        before: named(&step.before),
        unless: named(&step.unless),
        minus: minus.unwrap_or(0.0),
    })
}

fn compile_condition(field: Field, kind: ClueKind, condition: &ConditionFile) -> Result<Condition, String> {
    let value = |scalar: &Scalar| match (field.field_type(), scalar) {
        (FieldType::Flag, Scalar::Flag(_)) => Ok(scalar.clone()),
        (FieldType::Text, Scalar::Text(word)) => words::check(field, kind, word).map(|()| scalar.clone()),
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
            // Parts of words.
            let text = |scalar: &Scalar| match scalar {
                Scalar::Text(text) => Ok(text.clone()),
                other => Err(format!("{} neither starts with {other} nor contains it: it is a text", field.name())),
            };
            let texts = |scalars: &[Scalar]| scalars.iter().map(text).collect::<Result<Vec<_>, _>>();
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
