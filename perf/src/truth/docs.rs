//! The page that says what is told right: written from a run, and compared with the next.

use std::collections::HashSet;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use super::scenario::{Judged, Outcome};
use crate::error::{Context, Error};

const BEGIN: &str = "<!-- begin: truth -->";
const END: &str = "<!-- end: truth -->";

/// The scenarios that the page calls right and that are not; with `update`, the page follows instead.
pub fn check(page: &Path, judged: &[Judged], update: bool) -> Result<Vec<String>, Error> {
    let text = fs::read_to_string(page).context(|| format!("read {}", page.display()))?;
    let (before, rest, after) = text
        .split_once(BEGIN)
        .and_then(|(before, rest)| rest.split_once(END).map(|(table, after)| (before, table, after)))
        .ok_or_else(|| Error::Invalid(format!("{} has no {BEGIN} and {END}", page.display())))?;
    if update {
        let text = format!("{before}{BEGIN}\n\n{}\n{END}{after}", table(judged));
        fs::write(page, text).context(|| format!("write {}", page.display()))?;
        return Ok(Vec::new());
    }
    Ok(worse(rest, judged))
}

fn worse(table: &str, judged: &[Judged]) -> Vec<String> {
    let right: HashSet<&str> =
        table.lines().filter_map(|line| line.strip_prefix("| right | ")?.split(" |").next()).collect();
    let is_worse = |one: &&Judged| one.outcome != Outcome::Right && right.contains(one.scenario);
    judged.iter().filter(is_worse).map(|one| one.scenario.to_owned()).collect()
}

fn table(judged: &[Judged]) -> String {
    let mut text = String::from("| outcome | scenario | kind | expected | told |\n|---|---|---|---|---|\n");
    for one in judged {
        let told = one.pattern.as_deref().unwrap_or("nothing");
        let (outcome, name) = (one.outcome.name(), one.scenario);
        let _ = writeln!(text, "| {outcome} | {name} | {} | {} | {told} |", one.kind, one.expected);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{table, worse};
    use crate::truth::scenario::{Judged, Outcome};

    #[test]
    fn what_was_right_and_is_not_is_worse() {
        let judged = |outcome| Judged {
            scenario: "a",
            kind: "k",
            outcome,
            expected: "x".into(),
            pattern: None,
            confidence: None,
            title: None,
        };
        let page = table(&[judged(Outcome::Right)]);
        assert!(worse(&page, &[judged(Outcome::Right)]).is_empty());
        assert_eq!(worse(&page, &[judged(Outcome::Silent)]), ["a"]);
        assert!(worse(&table(&[judged(Outcome::Wrong)]), &[judged(Outcome::Silent)]).is_empty());
    }
}
