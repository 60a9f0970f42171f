//! How much a finding is to be believed, and what lowers that.
//!
//! What enters: a pattern, the steps of it that were found, what was lost. What leaves: a number, and the reasons why it is not
//! higher. What must hold: the reasons add up to the number, since both come from [`reductions`].

use tapio_wire::program::units::human_duration;
use tapio_wire::service::Finding;

use super::matching::Match;
use super::pattern::{Pattern, PatternSet, Step};
use crate::correlate::Lost;

/// Taken off for evidence that is required and presumed to be lost.
const PRESUMED_MINUS: f64 = 0.3;
/// Something may always be otherwise.
const LEAST: f64 = 0.05;

/// Why a confidence is lower than it could be.
enum Reason<'a> {
    NotFound(&'a Step),
    Presumed(&'a Step),
    Lost,
    /// What was lost may be the very thing that must be absent.
    MayBePresent,
    OpenInterval,
}

impl Reason<'_> {
    fn text(&self) -> String {
        match self {
            Self::NotFound(step) => {
                let within = step.within_ns.map(|ns| format!(" within {}", human_duration(ns))).unwrap_or_default();
                format!("no {} was seen{within} for its step \"{}\"", said(step), step.name)
            }
            Self::Presumed(step) => {
                format!("the {} of its step \"{}\" is presumed: it may have been lost", said(step), step.name)
            }
            Self::Lost => "events were lost on the node in the window".into(),
            Self::MayBePresent => "what must be absent may be among the lost events".into(),
            Self::OpenInterval => "a collector died or its stream was interrupted: more may be missing".into(),
        }
    }
}

fn said(step: &Step) -> String {
    format!("{} event", step.kind.name().replace('_', " "))
}

/// What is taken off the base, and why.
fn reductions<'a>(
    pattern: &'a Pattern,
    lost: Lost,
    is_found: impl Fn(usize, &Step) -> bool,
) -> impl Iterator<Item = (Reason<'a>, f64)> {
    let of_step = move |(index, step): (usize, &'a Step)| {
        let is_missing = !is_found(index, step);
        let not_found = (step.optional && is_missing).then_some((Reason::NotFound(step), step.minus));
        let presumed = (step.may_be_lost && is_missing).then_some((Reason::Presumed(step), PRESUMED_MINUS));
        not_found.into_iter().chain(presumed)
    };
    let has_absent = pattern.steps.iter().any(|step| step.absent);
    let of_loss = [
        lost.any().then_some(Reason::Lost),
        (lost.any() && has_absent).then_some(Reason::MayBePresent),
        lost.open_interval.then_some(Reason::OpenInterval),
    ];
    let of_loss = of_loss.into_iter().flatten().map(|reason| (reason, pattern.confidence_loss));
    pattern.steps.iter().enumerate().flat_map(of_step).chain(of_loss)
}

/// How much a match is to be believed, 0 to 1.
pub fn confidence(pattern: &Pattern, found: &Match, lost: Lost) -> f64 {
    let is_found = |index: usize, _: &Step| found.steps.get(index).is_some_and(|bound| !bound.is_empty());
    let minus = reductions(pattern, lost, is_found).fold(pattern.confidence, |left, (_, minus)| left - minus);
    (minus.clamp(LEAST, 1.0) * 1000.0).round() / 1000.0
}

/// Why a finding is not surer.
#[derive(Clone, Debug, PartialEq)]
pub struct Certainty {
    /// What its pattern begins with, when all evidence is there.
    pub base: f64,
    /// What lowers it, and by how much.
    pub lowered: Vec<(String, f64)>,
}

impl Certainty {
    /// Rates a finding; [`None`] if its pattern is no longer known here.
    pub fn of(patterns: &PatternSet, finding: &Finding) -> Option<Self> {
        let pattern = patterns.patterns().iter().find(|pattern| pattern.id == finding.pattern)?;
        let loss = finding.loss.unwrap_or_default();
        let lost = Lost { events: loss.events, bulk: 0, open_interval: loss.open_interval };
        let is_found = |_: usize, step: &Step| finding.evidence.iter().any(|piece| piece.step == step.name);
        let lowered = reductions(pattern, lost, is_found).filter(|(_, minus)| *minus > 0.0);
        let lowered = lowered.map(|(reason, minus)| (reason.text(), minus)).collect();
        Some(Self { base: pattern.confidence, lowered })
    }
}
