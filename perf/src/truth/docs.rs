//! The page that lists how each scenario was judged, and which scenarios and tests try each pattern. A run writes it or is compared
//! with it.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;
use std::fs;
use std::path::Path;

use super::scenario::{Judged, Outcome, Scenario};
use crate::error::{Context, Error};

/// The page's parts that are written here, by name.
const TRUTH: &str = "truth";
const MATRIX: &str = "matrix";
const PATTERNS: &str = "patterns";

/// The scenarios that the page calls right and that are not, and the patterns that nothing tries; with `update`, the page follows
/// instead. The page lies in `docs/` of a checkout.
pub fn check(page: &Path, judged: &[Judged], update: bool) -> Result<Vec<String>, Error> {
    let text = fs::read_to_string(page).context(|| format!("read {}", page.display()))?;
    let mut worse = worse(split(&text, TRUTH)?.1, judged);
    let root = page.parent().and_then(Path::parent).unwrap_or(Path::new(".."));
    let tried = patterns(root, &super::scenarios(&[]))?;
    worse.extend(tried.iter().filter(|one| one.is_untried()).map(|one| format!("{} is tried by nothing", one.pattern)));
    if update {
        let text = replaced(&text, TRUTH, &table(judged))?;
        let text = replaced(&text, MATRIX, &matrix(judged))?;
        let text = replaced(&text, PATTERNS, &tries(&tried))?;
        fs::write(page, text).context(|| format!("write {}", page.display()))?;
        worse.clear();
    }
    Ok(worse)
}

/// A text before, in and after a part.
fn split<'a>(text: &'a str, part: &str) -> Result<(&'a str, &'a str, &'a str), Error> {
    let (begin, end) = (format!("<!-- begin: {part} -->"), format!("<!-- end: {part} -->"));
    let found = text.split_once(&begin).and_then(|(before, rest)| {
        let (inside, after) = rest.split_once(&end)?;
        Some((before, inside, after))
    });
    found.ok_or_else(|| Error::Invalid(format!("the page has no {begin} with {end} after it")))
}

fn replaced(text: &str, part: &str, by: &str) -> Result<String, Error> {
    let (before, _, after) = split(text, part)?;
    Ok(format!("{before}<!-- begin: {part} -->\n\n{by}\n<!-- end: {part} -->{after}"))
}

/// Where a pattern is tried.
struct Tried {
    pattern: String,
    /// Scenarios that are caused here.
    scenarios: Vec<&'static str>,
    /// Tests on a real Kubernetes node.
    on_a_node: Vec<String>,
    /// Tests by recorded objects of the newest API.
    by_objects: Vec<String>,
    /// Tests by events, through all patterns.
    by_events: Vec<String>,
}

impl Tried {
    fn is_untried(&self) -> bool {
        self.scenarios.is_empty()
            && [&self.on_a_node, &self.by_objects, &self.by_events].iter().all(|tests| tests.is_empty())
    }
}

/// Every embedded pattern of a checkout.
fn patterns(root: &Path, scenarios: &[&'static Scenario]) -> Result<Vec<Tried>, Error> {
    let names = |folder: &Path, ending: &str| -> Result<Vec<String>, Error> {
        let entries = fs::read_dir(folder).context(|| format!("list {}", folder.display()))?;
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> = names.filter_map(|name| name.strip_suffix(ending).map(str::to_owned)).collect();
        names.sort();
        Ok(names)
    };
    let read = |path: &Path| fs::read_to_string(path).context(|| format!("read {}", path.display()));
    let texts = |folder: &Path, start: &str| -> Result<Vec<(String, String)>, Error> {
        let files = names(folder, ".rs")?.into_iter().filter(|name| name.starts_with(start));
        let text_of = |name: String| {
            let path = folder.join(&name);
            let mut text = read(&path.with_extension("rs"))?;
            // Its modules are in the folder of its name.
            if path.is_dir() {
                for module in names(&path, ".rs")? {
                    text += &read(&path.join(module).with_extension("rs"))?;
                }
            }
            Ok((name, text))
        };
        files.map(text_of).collect()
    };
    let by_events = texts(&root.join("server/tests"), "correlate_")?;
    let (on_a_node, by_objects) =
        (texts(&root.join("perf/tests"), "kube")?, texts(&root.join("perf/tests"), "recorded")?);
    let naming = |files: &[(String, String)], pattern: &str| {
        let quoted = format!("\"{pattern}\"");
        files.iter().filter(|(_, text)| text.contains(&quoted)).map(|(name, _)| name.clone()).collect()
    };
    let tried = |pattern: String| Tried {
        scenarios: scenarios.iter().filter(|one| one.right.contains(&&*pattern)).map(|one| one.name).collect(),
        on_a_node: naming(&on_a_node, &pattern),
        by_objects: naming(&by_objects, &pattern),
        by_events: naming(&by_events, &pattern),
        pattern,
    };
    Ok(names(&root.join("server/patterns"), ".yaml")?.into_iter().map(tried).collect())
}

fn tries(tried: &[Tried]) -> String {
    let mut text = String::from(
        "| pattern | caused here | on a Kubernetes node | by recorded objects | by events |\n|---|---|---|---|---|\n",
    );
    for one in tried {
        let [node, objects, events] = [&one.on_a_node, &one.by_objects, &one.by_events].map(|tests| tests.join(", "));
        let here = one.scenarios.join(", ");
        let _ = writeln!(text, "| {} | {here} | {node} | {objects} | {events} |", one.pattern);
    }
    text
}

fn worse(table: &str, judged: &[Judged]) -> Vec<String> {
    let right: HashSet<&str> =
        table.lines().filter_map(|line| line.strip_prefix("| right | ")?.split(" |").next()).collect();
    let rows: HashSet<&str> = table.lines().collect();
    let is_otherwise = |one: &Judged| {
        let row = row(one);
        one.outcome == Outcome::Possible && table.contains(&format!("| {} |", one.scenario)) && !rows.contains(&*row)
    };
    let is_worse = |one: &&Judged| one.outcome != Outcome::Right && right.contains(one.scenario) || is_otherwise(one);
    judged.iter().filter(is_worse).map(|one| one.scenario.to_owned()).collect()
}

/// How each kind of death was explained: a row a kind, with how often each pattern was found.
pub fn matrix(judged: &[Judged]) -> String {
    let mut text = String::from("| kind | right | possible | silent | wrong | found |\n|---|---|---|---|---|---|\n");
    let mut kinds: Vec<&str> = judged.iter().map(|one| one.kind).collect();
    let mut seen = HashSet::new();
    kinds.retain(|kind| seen.insert(*kind));
    for kind in kinds {
        let of_kind = || judged.iter().filter(|one| one.kind == kind);
        let count = |outcome| of_kind().filter(|one| one.outcome == outcome).count();
        let mut found: BTreeMap<&str, usize> = BTreeMap::new();
        for one in of_kind() {
            *found.entry(one.pattern.as_deref().unwrap_or("nothing")).or_default() += 1;
        }
        let found: Vec<String> = found.into_iter().map(|(pattern, times)| format!("{pattern} {times}")).collect();
        let counts = [Outcome::Right, Outcome::Possible, Outcome::Silent, Outcome::Wrong].map(count);
        let [right, possible, silent, wrong] = counts;
        let _ = writeln!(text, "| {kind} | {right} | {possible} | {silent} | {wrong} | {} |", found.join(", "));
    }
    text
}

fn table(judged: &[Judged]) -> String {
    let mut text = String::from("| outcome | scenario | kind | expected | found |\n|---|---|---|---|---|\n");
    for one in judged {
        let _ = writeln!(text, "{}", row(one));
    }
    text
}

fn row(one: &Judged) -> String {
    let found = one.pattern.as_deref().unwrap_or("nothing");
    let (outcome, name) = (one.outcome.name(), one.scenario);
    format!("| {outcome} | {name} | {} | {} | {found} |", one.kind, one.expected)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{matrix, patterns, replaced, split, table, worse};
    use crate::truth::scenario::{Judged, Outcome};

    #[test]
    fn every_pattern_is_tried() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let all = patterns(&root, &crate::truth::scenarios(&[])).expect("a checkout");
        let untried: Vec<_> = all.iter().filter(|one| one.is_untried()).map(|one| &one.pattern).collect();
        assert!(all.len() > 40 && untried.is_empty(), "{untried:?}");
    }

    #[test]
    fn only_the_part_is_replaced() {
        let page = "a <!-- begin: x -->old<!-- end: x --> b";
        let text = replaced(page, "x", "new").expect("a part");
        assert_eq!(text, "a <!-- begin: x -->\n\nnew\n<!-- end: x --> b");
        assert!(split(page, "y").is_err());
    }

    fn judged(outcome: Outcome) -> Judged {
        let (pattern, confidence, title) = (None, None, None);
        Judged { scenario: "a", kind: "k", outcome, expected: "x".into(), pattern, confidence, title }
    }

    #[test]
    fn the_matrix_counts_each_kind_and_what_was_found() {
        let one = |pattern: Option<&str>, outcome| Judged { pattern: pattern.map(str::to_owned), ..judged(outcome) };
        let all = [one(Some("b"), Outcome::Wrong), one(Some("a"), Outcome::Right), one(None, Outcome::Silent)];
        let text = matrix(&all);
        assert!(text.ends_with("| 1 | 0 | 1 | 1 | a 1, b 1, nothing 1 |\n"), "{text}");
    }

    #[test]
    fn what_was_right_and_is_not_is_worse() {
        let page = table(&[judged(Outcome::Right)]);
        assert!(worse(&page, &[judged(Outcome::Right)]).is_empty());
        assert_eq!(worse(&page, &[judged(Outcome::Silent)]), ["a"]);
        assert!(worse(&table(&[judged(Outcome::Wrong)]), &[judged(Outcome::Silent)]).is_empty());
        // What is possibly something else than before is worse too.
        let possible = |pattern: &str| Judged { pattern: Some(pattern.into()), ..judged(Outcome::Possible) };
        let page = table(&[possible("x")]);
        assert!(worse(&page, &[possible("x")]).is_empty());
        assert_eq!(worse(&page, &[possible("y")]), ["a"]);
    }
}
