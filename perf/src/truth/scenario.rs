//! A scenario: how a death is caused, and what must be said of it.

use serde::Serialize;
use tapio_wire::service::Finding;

use super::stage::Stage;
use crate::error::Error;
use crate::inject::cgroup::MemoryControl;

/// Minimum confidence of a finding that counts as a claim.
const CERTAIN: f64 = 0.8;

/// Whom a scenario was done to.
#[derive(Clone, Debug, Default)]
pub struct Caused {
    /// Ids of its containers; a finding that speaks of one of their processes must name one of them.
    pub container_ids: Vec<String>,
    /// Uids of its pods.
    pub pod_uids: Vec<String>,
    /// Ids of its processes, where they are known.
    pub pids: Vec<u32>,
}

/// How a scenario is caused; whom it was done to.
pub type Cause = fn(&mut Stage) -> Result<Caused, Error>;

/// A death that is caused for real, and the findings that explain it right.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    pub name: &'static str,
    /// Which kind of death: the group that the table sorts it into.
    pub kind: &'static str,
    pub cause: Cause,
    /// Patterns that explain it.
    pub right: &'static [&'static str],
    /// Patterns that may be said beside it.
    pub beside: &'static [&'static str],
    /// Where alone it can be caused, when it is not everywhere.
    pub only_where: Option<MemoryControl>,
    /// Nothing died, so nothing need be said.
    pub may_be_silent: bool,
    /// The pod must be named as well as the container.
    pub names_pod: bool,
    /// One of these words must be said; none for any.
    pub says: &'static [&'static str],
    /// None of these may be said.
    pub never: &'static [&'static str],
}

impl Scenario {
    /// One that `right` accepts, in whatever words.
    pub const fn new(name: &'static str, kind: &'static str, cause: Cause, right: &'static [&'static str]) -> Self {
        let (may_be_silent, names_pod) = (false, false);
        Self {
            name,
            kind,
            cause,
            right,
            beside: &[],
            only_where: None,
            may_be_silent,
            names_pod,
            says: &[],
            never: &[],
        }
    }

    /// Whether a finding explains it.
    fn is_explained_by(&self, finding: &Finding, caused: &Caused) -> bool {
        let text = words(finding);
        self.right.contains(&finding.pattern.as_str())
            && names_it(finding, caused)
            && (!self.names_pod || names_its_pod(finding, caused))
            && (self.says.is_empty() || self.says.iter().any(|word| text.contains(&word.to_lowercase())))
            && !self.never.iter().any(|word| text.contains(&word.to_lowercase()))
    }

    /// What the findings of a run say of it.
    pub fn judge(&self, caused: &Caused, findings: &[Finding]) -> Judged {
        let about: Vec<&Finding> = findings.iter().filter(|finding| is_about(finding, caused)).collect();
        let is_certain = |finding: &Finding| finding.confidence >= CERTAIN && !finding.possible;
        let wrong = about.iter().find(|finding| {
            let is_beside = self.beside.contains(&finding.pattern.as_str()) && names_it(finding, caused);
            is_certain(finding) && !is_beside && !self.is_explained_by(finding, caused)
        });
        let right = about.iter().find(|finding| is_certain(finding) && self.is_explained_by(finding, caused));
        let (outcome, shown) = match (wrong, right, about.first()) {
            (Some(wrong), _, _) => (Outcome::Wrong, Some(*wrong)),
            (None, Some(right), _) => (Outcome::Right, Some(*right)),
            (None, None, Some(first)) if self.may_be_silent => (Outcome::Right, Some(*first)),
            (None, None, None) if self.may_be_silent => (Outcome::Right, None),
            (None, None, Some(first)) => (Outcome::Possible, Some(*first)),
            (None, None, None) => (Outcome::Silent, None),
        };
        Judged {
            scenario: self.name,
            kind: self.kind,
            outcome,
            expected: self.expected(),
            pattern: shown.map(|finding| finding.pattern.clone()),
            confidence: shown.map(|finding| finding.confidence),
            title: shown.map(|finding| finding.title.clone()),
        }
    }

    /// The patterns that explain it, for people.
    pub fn expected(&self) -> String {
        let silence = self.may_be_silent.then_some("silence");
        self.right.iter().copied().chain(silence).collect::<Vec<_>>().join(" or ")
    }
}

/// What a finding says, in lower case.
fn words(finding: &Finding) -> String {
    let verdict = finding.death.as_ref().map_or("", |death| death.verdict.as_str());
    [
        &[finding.title.as_str(), finding.summary.as_str(), verdict][..],
        &finding.advice.iter().map(String::as_str).collect::<Vec<_>>(),
    ]
    .concat()
    .join("\n")
    .to_lowercase()
}

fn names_it(finding: &Finding, caused: &Caused) -> bool {
    finding.entity.as_ref().is_some_and(|entity| {
        caused.container_ids.contains(&entity.container_id) || caused.pod_uids.contains(&entity.pod_uid)
    })
}

fn names_its_pod(finding: &Finding, caused: &Caused) -> bool {
    finding.entity.as_ref().is_some_and(|entity| caused.pod_uids.contains(&entity.pod_uid))
}

fn is_about(finding: &Finding, caused: &Caused) -> bool {
    let is_its_death = finding.death.as_ref().is_some_and(|death| caused.pids.contains(&death.pid));
    !finding.withdrawn && (is_its_death || names_it(finding, caused))
}

/// How a scenario was explained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Explained as it was.
    Right,
    /// Something, and not as certain.
    Possible,
    /// Not explained at all.
    Silent,
    /// Explained with certainty as something else.
    Wrong,
}

impl Outcome {
    /// Name of the verdict.
    pub fn name(self) -> &'static str {
        match self {
            Self::Right => "right",
            Self::Possible => "possible",
            Self::Silent => "silent",
            Self::Wrong => "wrong",
        }
    }
}

/// A scenario and what was said of it.
#[derive(Clone, Debug, Serialize)]
pub struct Judged {
    pub scenario: &'static str,
    pub kind: &'static str,
    pub outcome: Outcome,
    pub expected: String,
    pub pattern: Option<String>,
    pub confidence: Option<f64>,
    pub title: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::{Caused, Outcome, Scenario};
    use tapio_wire::service::{EntityRef, Finding};

    fn finding(pattern: &str, confidence: f64, container_id: &str) -> Finding {
        Finding {
            pattern: pattern.into(),
            title: "SIGHUP by runc".into(),
            confidence,
            entity: Some(EntityRef { container_id: container_id.into(), ..EntityRef::default() }),
            ..Finding::default()
        }
    }

    #[test]
    fn certainty_about_another_cause_is_wrong_and_doubt_is_not() {
        let mut scenario = Scenario::new("a", "b", |_| Ok(Caused::default()), &["stopped"]);
        let caused = Caused { container_ids: vec!["c".into()], ..Caused::default() };
        let judge = |scenario: &Scenario, findings: &[Finding]| scenario.judge(&caused, findings).outcome;
        let stopped = finding("stopped", 0.9, "c");
        assert_eq!(judge(&scenario, std::slice::from_ref(&stopped)), Outcome::Right);
        assert_eq!(judge(&scenario, &[]), Outcome::Silent);
        assert_eq!(judge(&scenario, &[finding("stopped", 0.9, "another")]), Outcome::Silent);
        assert_eq!(judge(&scenario, &[finding("crashed", 0.79, "c")]), Outcome::Possible);
        assert_eq!(judge(&scenario, &[stopped.clone(), finding("crashed", 0.8, "c")]), Outcome::Wrong);
        assert_eq!(judge(&scenario, &[Finding { possible: true, ..finding("crashed", 0.9, "c") }]), Outcome::Possible);
        scenario.never = &["sighup"];
        assert_eq!(judge(&scenario, &[stopped]), Outcome::Wrong);
        scenario.may_be_silent = true;
        assert_eq!(judge(&scenario, &[]), Outcome::Right);
    }
}
