//! Which findings a sink gets.

use schemars::JsonSchema;
use serde::Deserialize;
use tapio_wire::program::glob;
use tapio_wire::service::Finding;

use crate::findings::Severity;

/// `only:` of a sink. What a sink was sent once, it is sent every change of.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OnlySection {
    /// The lowest severity: `info`, `low`, `medium`, `high` or `critical`. Default: all.
    #[schemars(example = Severity::High)]
    pub severity: Option<Severity>,
    /// Namespaces, `*` stands for anything. Default: all, and what is in none, such as nodes.
    #[schemars(example = ["shop-*", "payments"])]
    pub namespaces: Vec<String>,
    /// Patterns by id, `*` stands for anything. Default: all.
    #[schemars(example = ["*-oom-*", "bad-release"])]
    pub patterns: Vec<String>,
}

impl OnlySection {
    /// Whether it names this finding.
    pub fn names(&self, finding: &Finding) -> bool {
        let severity = Severity::ALL.into_iter().find(|known| known.name() == finding.severity);
        let namespace = finding.entity.as_ref().map_or("", |entity| entity.namespace.as_str());
        let is_one_of =
            |globs: &[String], name: &str| globs.is_empty() || globs.iter().any(|glob| glob::matches(glob, name));
        severity >= self.severity
            && is_one_of(&self.namespaces, namespace)
            && is_one_of(&self.patterns, &finding.pattern)
    }
}

#[cfg(test)]
mod tests {
    use tapio_wire::service::EntityRef;

    use super::*;

    #[test]
    fn severity_namespace_and_pattern_must_all_agree() {
        let finding = |severity: &str, namespace: &str, pattern: &str| Finding {
            severity: severity.into(),
            pattern: pattern.into(),
            entity: Some(EntityRef { namespace: namespace.into(), ..EntityRef::default() }),
            ..Finding::default()
        };
        assert!(OnlySection::default().names(&finding("info", "", "stopped")));
        let only = OnlySection {
            severity: Some(Severity::High),
            namespaces: vec!["shop-*".into()],
            patterns: vec!["*-oom-*".into(), "bad-release".into()],
        };
        assert!(only.names(&finding("high", "shop-eu", "child-oom-exit")));
        assert!(only.names(&finding("critical", "shop-us", "bad-release")));
        for (severity, namespace, pattern) in [
            ("medium", "shop-eu", "bad-release"),
            ("high", "shop", "bad-release"),
            ("high", "", "bad-release"),
            ("high", "shop-eu", "stopped"),
        ] {
            assert!(!only.names(&finding(severity, namespace, pattern)), "{severity} {namespace} {pattern}");
        }
    }
}
