//! Pattern files as they are written: YAML, every key known.
//!
//! What enters: one file's text. What must hold: an unknown key or a value of the wrong type is refused here; what the keys mean
//! together is checked by `load.rs`.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use schemars::JsonSchema;
use serde::de::{Error, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use tapio_wire::program::units;
use tapio_wire::program::yaml::Placed;

/// A duration with its unit.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(transparent)]
pub struct Time(#[serde(deserialize_with = "units::duration")] pub Duration);

/// One pattern file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatternFile {
    /// Lower case with dashes; findings carry it.
    pub id: Placed<String>,
    /// A line for people, with places: see `template.rs`.
    pub title: Placed<String>,
    /// What happened, in a sentence or two.
    pub summary: Placed<String>,
    /// The death certificate's verdict, one sentence; the title when left out.
    pub verdict: Option<Placed<String>>,
    pub severity: Severity,
    /// Among patterns that explain the same death the highest wins.
    pub priority: u32,
    /// All evidence lies within this time before or after the anchor.
    pub window: Placed<Time>,
    /// Scope whose clues are joined.
    pub scope: Scope,
    /// The step that brings the finding about, usually the death itself.
    pub anchor: Placed<String>,
    pub confidence: Placed<ConfidenceRules>,
    /// Steps in the order of cause and effect.
    pub steps: Placed<Vec<StepFile>>,
    /// What to do next.
    pub advice: Vec<Placed<String>>,
    /// Optional steps of which at least one must be found.
    #[serde(default)]
    pub one_of: Vec<Placed<String>>,
    /// Patterns whose findings are consequences of this one's, and by what they must hang together.
    #[serde(default)]
    pub absorbs: BTreeMap<String, Placed<Scope>>,
    /// Findings of several replicas of one workload become one.
    #[serde(default = "yes")]
    pub fold: bool,
    /// What it reports is a state: one of these ends it.
    pub ends: Option<Placed<Vec<EndFile>>>,
    /// Time without reports after which a repeatedly reported state is over.
    pub quiet: Option<Placed<Time>>,
}

/// A clue that ends the state that a finding reports.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndFile {
    /// The kind of clue.
    pub clue: Placed<String>,
    /// The key's former name, refused with what to write instead.
    #[serde(default, rename = "signal", deserialize_with = "refuse_signal")]
    _signal: (),
    /// Conditions on its fields.
    #[serde(default, rename = "where")]
    pub conditions: BTreeMap<String, Placed<ConditionFile>>,
}

/// Refuses the key `signal`, and says what to write.
fn refuse_signal<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    let kind = String::deserialize(deserializer)?;
    Err(D::Error::custom(format!("the key `signal` is called `clue` now: write `clue: {kind}`")))
}

fn yes() -> bool {
    true
}

/// How much a finding is to be believed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfidenceRules {
    /// Confidence with all evidence at hand, 0 to 1.
    pub base: f64,
    /// Taken off for each optional step that was not found.
    #[serde(default)]
    pub minus: BTreeMap<String, Placed<f64>>,
    /// Taken off when events were lost in the window.
    #[serde(default = "loss_default")]
    pub loss: f64,
}

fn loss_default() -> f64 {
    0.15
}

/// One step.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepFile {
    pub name: Placed<String>,
    /// The kind of clue.
    pub clue: Placed<String>,
    /// The key's former name, refused with what to write instead.
    #[serde(default, rename = "signal", deserialize_with = "refuse_signal")]
    _signal: (),
    /// Conditions on its fields.
    #[serde(default, rename = "where")]
    pub conditions: BTreeMap<String, Placed<ConditionFile>>,
    /// Fields that must equal a field of another step, written `step.field`.
    #[serde(default)]
    pub same: BTreeMap<String, Placed<String>>,
    /// Maximum time after the previous found step.
    pub within: Option<Time>,
    /// Minimum time after the previous found step.
    pub after_at_least: Option<Time>,
    /// With an absent step before the anchor: an event this close to the next step that was found, before or after it, does not count.
    pub apart: Option<Time>,
    /// With an absent step before the anchor: only an event after that step counts.
    pub after: Option<Placed<String>>,
    /// With an absent step before the anchor: only an event before that step counts, or, where it was not found, before the next one.
    pub before: Option<Placed<String>>,
    /// With `before`: it does not count where this step was found within `slack` of that one.
    pub unless: Option<Placed<String>>,
    /// How much earlier than the step before it this step may be stamped.
    pub slack: Option<Time>,
    pub count: Option<CountFile>,
    /// The pattern matches without it, with less confidence.
    #[serde(default)]
    pub optional: bool,
    /// The step is required, but where events were lost the pattern matches without it and says that it is only
    /// possible.
    #[serde(default)]
    pub may_be_lost: bool,
    /// The anchor's clue may be this step as well: what happened in two changes may be heard of as one.
    #[serde(default)]
    pub may_be_anchor: bool,
    /// The step must not exist: before the anchor when it is listed before it, after the anchor when listed after.
    #[serde(default)]
    pub absent: bool,
}

/// How often a step must be found.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CountFile {
    pub min: u32,
    /// Counted are different values of this field.
    pub distinct: Option<Placed<String>>,
    /// Of an anchor: each counted clue, and not only the last one, is after this step.
    pub after: Option<Placed<String>>,
}

/// Severities, rising.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Info,
    Low,
    Medium,
    High,
    Critical,
}

impl Severity {
    /// All of them, rising.
    pub const ALL: [Self; 5] = [Self::Info, Self::Low, Self::Medium, Self::High, Self::Critical];

    /// Name in findings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Critical => "critical",
        }
    }
}

/// Scope whose clues a pattern joins.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Hash)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// One entity's.
    Entity,
    /// One pod's; the entity's where there is no pod.
    Pod,
    /// One workload's: all its pods, its rollouts and its configuration.
    Workload,
    /// One Service's: its backends, its endpoints, and what its clients meet.
    Service,
    /// One node's.
    Node,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 5] = [Self::Entity, Self::Pod, Self::Workload, Self::Service, Self::Node];
}

/// A plain value of a condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scalar {
    Number(u64),
    Flag(bool),
    Text(String),
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Text(text) => write!(f, "{text}"),
        }
    }
}

/// A value, a list of values, or a map of `min`, `max`, `not`, `starts` and `contains`.
#[derive(Debug)]
pub enum ConditionFile {
    OneOf(Vec<Scalar>),
    Range { min: Option<Bound>, max: Option<Bound>, not: Vec<Scalar>, starts: Vec<Scalar>, contains: Vec<Scalar> },
}

/// A number that bounds a range.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    pub number: u64,
    /// True if it was written as a duration.
    pub is_duration: bool,
}

impl<'de> Deserialize<'de> for Bound {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Scalar::deserialize(deserializer)? {
            Scalar::Number(number) => Ok(Self { number, is_duration: false }),
            Scalar::Text(text) => {
                let ns = units::parse_duration(&text).map_err(D::Error::custom)?.as_nanos();
                Ok(Self { number: u64::try_from(ns).unwrap_or(u64::MAX), is_duration: true })
            }
            Scalar::Flag(_) => Err(D::Error::custom("a bound is a number or a duration")),
        }
    }
}

struct ScalarVisitor;

impl Visitor<'_> for ScalarVisitor {
    type Value = Scalar;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, true, false or a text")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Scalar, E> {
        Ok(Scalar::Flag(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Scalar, E> {
        match u64::try_from(value) {
            Ok(value) => Ok(Scalar::Number(value)),
            Err(_) => Err(E::invalid_value(Unexpected::Signed(value), &self)),
        }
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Scalar, E> {
        Ok(Scalar::Number(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Scalar, E> {
        Ok(Scalar::Text(value.to_owned()))
    }
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ScalarVisitor)
    }
}

struct ConditionVisitor;

impl<'de> Visitor<'de> for ConditionVisitor {
    type Value = ConditionFile;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value, a list of values, or a map with min, max, not, starts or contains")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<ConditionFile, E> {
        Ok(ConditionFile::OneOf(vec![Scalar::Flag(value)]))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<ConditionFile, E> {
        ScalarVisitor.visit_i64(value).map(|number| ConditionFile::OneOf(vec![number]))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<ConditionFile, E> {
        Ok(ConditionFile::OneOf(vec![Scalar::Number(value)]))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<ConditionFile, E> {
        Ok(ConditionFile::OneOf(vec![Scalar::Text(value.to_owned())]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<ConditionFile, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element()? {
            values.push(value);
        }
        Ok(ConditionFile::OneOf(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ConditionFile, A::Error> {
        let (mut min, mut max, mut not, mut starts, mut contains) = (None, None, Vec::new(), Vec::new(), Vec::new());
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "min" => min = Some(map.next_value()?),
                "max" => max = Some(map.next_value()?),
                "not" | "starts" | "contains" => {
                    let ConditionFile::OneOf(values) = map.next_value()? else {
                        return Err(A::Error::custom(format!("`{key}` takes a value or a list of values")));
                    };
                    match key.as_str() {
                        "not" => not = values,
                        "starts" => starts = values,
                        _ => contains = values,
                    }
                }
                other => return Err(A::Error::unknown_field(other, &["min", "max", "not", "starts", "contains"])),
            }
        }
        Ok(ConditionFile::Range { min, max, not, starts, contains })
    }
}

impl<'de> Deserialize<'de> for ConditionFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ConditionVisitor)
    }
}
