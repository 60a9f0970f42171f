//! Sentences of a pattern, with places for what was found.
//!
//! `{step.field}` is a field of a step; `{entity}`, `{node}`, `{pod}`, `{namespace}`, `{container}`, `{workload}`, `{image}` and
//! `{count}` belong to the finding. `{ongoing}` and `{without.step}` write nothing: a state that is over lacks the one, a step that was
//! found the other. A part in `[[` and `]]` is left out when it lacks something. What must hold: every place was checked when the pattern was loaded.

use tapio_wire::program::units::human_duration;

use super::endings::began_ns;
use super::field::Field;
use crate::correlate::clue::{Clue, ClueKind};

/// A step's name and its field, resolved by whoever knows the steps.
pub type Resolved = (usize, Field);

#[derive(Clone, Debug)]
enum Part {
    Text(String),
    Entity,
    Node,
    Count,
    /// The state goes on.
    Ongoing,
    /// A name of the anchor's entity.
    Own(Field),
    Field(usize, Field),
    /// A step was not found.
    Without(usize),
    Optional(Vec<Part>),
}

/// A sentence.
#[derive(Clone, Debug)]
pub struct Template {
    parts: Vec<Part>,
}

/// What a sentence speaks of.
pub struct Subject<'a> {
    pub anchor: &'a Clue,
    /// Clues by step; `None` where it was not found.
    pub steps: &'a [Option<&'a Clue>],
    pub count: u32,
    /// When the state that it reports was over, nanoseconds since 1970.
    pub over_ns: Option<u64>,
}

impl Template {
    /// Reads a sentence; `resolve` knows the steps and says what is wrong with a place.
    pub fn parse(text: &str, resolve: &dyn Fn(&str, &str) -> Result<Resolved, String>) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("[[") {
            let (inside, behind) = after.split_once("]]").ok_or_else(|| format!("`[[` without `]]` in \"{text}\""))?;
            if inside.contains("[[") || before.contains("]]") {
                return Err(format!("`[[` and `]]` do not pair in \"{text}\""));
            }
            places(before, resolve, &mut parts)?;
            let mut optional = Vec::new();
            places(inside, resolve, &mut optional)?;
            if optional.iter().all(|part| matches!(part, Part::Text(_))) {
                return Err(format!(
                    "`[[{inside}]]` has no place, so it would never be left out: write {{step.field}} into it, or no `[[ ]]`"
                ));
            }
            parts.push(Part::Optional(optional));
            rest = behind;
        }
        if rest.contains("]]") {
            return Err(format!("`[[` and `]]` do not pair in \"{text}\""));
        }
        places(rest, resolve, &mut parts)?;
        Ok(Self { parts })
    }

    /// Whether it needs a step outside of its optional parts.
    pub fn needs(&self, step: usize) -> bool {
        let needs = |part: &Part| matches!(part, Part::Field(needed, _) if *needed == step);
        self.parts.iter().any(needs)
    }

    /// The sentence about a subject.
    pub fn render(&self, subject: &Subject<'_>) -> String {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Optional(parts) => {
                    let mut inside = String::new();
                    if parts.iter().all(|part| fill(part, subject, &mut inside)) {
                        push_text(&inside, &mut text);
                    }
                }
                part => {
                    if !fill(part, subject, &mut text) {
                        text.push('?');
                    }
                }
            }
        }
        text
    }
}

/// Appends a text of the pattern. A full stop behind words that end a sentence themselves, as kubelet's do, is left out.
fn push_text(text: &str, out: &mut String) {
    let ends_sentence = out.ends_with(['.', '!', '?', '…']);
    let is_stop = text.starts_with('.') && !text.starts_with("..");
    out.push_str(if ends_sentence && is_stop { &text[1..] } else { text });
}

fn fill(part: &Part, subject: &Subject<'_>, out: &mut String) -> bool {
    match part {
        Part::Text(text) => push_text(text, out),
        Part::Entity => out.push_str(&subject.anchor.entity.to_string()),
        Part::Node => out.push_str(&subject.anchor.entity.node.name),
        Part::Count => out.push_str(&subject.count.to_string()),
        Part::Ongoing => return subject.over_ns.is_none(),
        Part::Without(step) => return subject.steps.get(*step).copied().flatten().is_none(),
        Part::Own(field) => match field.show(subject.anchor) {
            Some(value) => out.push_str(&value),
            None => return false,
        },
        Part::Field(step, field) => {
            let clue = subject.steps.get(*step).copied().flatten();
            match clue.and_then(|clue| show(*field, clue, subject)) {
                Some(value) => out.push_str(value.trim_end()),
                None => return false,
            }
        }
        Part::Optional(_) => return false,
    }
    true
}

/// What a field says. Once a state is over, it lasted until then, and not until its last report.
fn show(field: Field, clue: &Clue, subject: &Subject<'_>) -> Option<String> {
    match subject.over_ns {
        Some(over_ns)
            if field == Field::Lasted && matches!(clue.kind(), ClueKind::Trouble | ClueKind::NodeCondition) =>
        {
            Some(human_duration(over_ns.saturating_sub(began_ns(clue))))
        }
        _ => field.show(clue),
    }
}

fn places(
    text: &str,
    resolve: &dyn Fn(&str, &str) -> Result<Resolved, String>,
    parts: &mut Vec<Part>,
) -> Result<(), String> {
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        let (place, behind) = after.split_once('}').ok_or_else(|| format!("`{{` without `}}` in \"{text}\""))?;
        if !before.is_empty() {
            parts.push(Part::Text(before.to_owned()));
        }
        parts.push(match (place, place.split_once('.')) {
            ("entity", _) => Part::Entity,
            ("node", _) => Part::Node,
            ("count", _) => Part::Count,
            ("ongoing", _) => Part::Ongoing,
            ("pod", _) => Part::Own(Field::Pod),
            ("namespace", _) => Part::Own(Field::Namespace),
            ("container", _) => Part::Own(Field::Container),
            ("workload", _) => Part::Own(Field::Workload),
            ("image", _) => Part::Own(Field::Image),
            // Every clue has an entity.
            (_, Some(("without", step))) => Part::Without(resolve(step, "entity")?.0),
            (_, Some((step, field))) => {
                let (step, field) = resolve(step, field)?;
                Part::Field(step, field)
            }
            (_, None) => {
                return Err(format!("{{{place}}} is unknown: write {{entity}}, {{node}}, {{pod}}, {{namespace}}, {{container}}, {{workload}}, \
                     {{image}}, {{count}}, {{ongoing}}, {{without.step}} or {{step.field}}"));
            }
        });
        rest = behind;
    }
    if !rest.is_empty() {
        parts.push(Part::Text(rest.to_owned()));
    }
    Ok(())
}
