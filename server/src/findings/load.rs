//! From pattern files to patterns.
//!
//! What enters: YAML, embedded and from the operator's directory. What leaves: a [`PatternSet`]. What must hold: a file that cannot
//! work is refused with file, place and reason, never loaded in part; what is read is bounded.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use tapio_wire::program::yaml::{self, Placed, TextPosition};

use super::checks::{Wrong, check, check_step, nanoseconds, one_of, step_named, wrong};
use super::embedded::EMBEDDED;
use super::field::{Field, FieldType};
use super::pattern::{Condition, Pattern, PatternSet, Same, Step};
use super::regular_file;
use super::schema::{ConditionFile, EndFile, PatternFile, Scalar, StepFile};
use super::step_mask::StepMask;
use super::template::{Resolved, Template};
use super::text::signal_number;
use super::words;
use crate::correlate::clue::ClueKind;

const FILES_MAX: usize = 256;
const FILE_BYTES_MAX: u64 = 256 << 10;

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

/// Finds a step's field by name, or says why there is none.
type Resolve<'a> = dyn Fn(&str, &str) -> Result<Resolved, String> + 'a;

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
        each_after: None,
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
        each_after: step.count.as_ref().and_then(|count| named(&count.after)),
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
