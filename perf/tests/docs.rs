//! What the pages claim: their links lead somewhere, the commands they name exist, every pattern is listed, and the pattern that
//! they teach to write is one.

pub mod pages;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// Links of a page, without those to other hosts and to places in the page itself.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0));
    let paths = targets.map(|target| target.split_once('#').map_or(target, |(path, _)| path));
    paths.filter(|path| !path.is_empty() && !path.contains("://") && !path.contains(' ')).collect()
}

#[test]
fn every_link_leads_to_a_file() {
    let mut dead = Vec::new();
    for page in pages::all() {
        let text = pages::read(&page);
        let path = pages::root().join(&page);
        let folder = path.parent().expect("a folder");
        dead.extend(
            links(&text).into_iter().filter(|link| !folder.join(link).exists()).map(|link| format!("{page}: {link}")),
        );
    }
    assert!(dead.is_empty(), "dead links:\n{}", dead.join("\n"));
}

/// The id that a heading gets on GitHub and in the book: lower case, spaces as hyphens, no punctuation.
fn slug(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// Ids of a page's headings. A `#` in a code block is a comment of its language.
fn headings(text: &str) -> BTreeSet<String> {
    let prose = text.split("\n```").step_by(2).flat_map(str::lines);
    prose
        .filter_map(|line| line.trim_start_matches('#').strip_prefix(' ').filter(|_| line.starts_with('#')))
        .map(slug)
        .collect()
}

#[test]
fn every_link_into_a_page_leads_to_a_heading() {
    let mut dead = Vec::new();
    let mut checked = 0;
    for page in pages::all() {
        let text = pages::read(&page);
        let path = pages::root().join(&page);
        for target in text.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0)) {
            let Some((file, id)) = target.split_once('#').filter(|(file, _)| !file.contains("://")) else { continue };
            let into = if file.is_empty() { path.clone() } else { path.parent().expect("a folder").join(file) };
            let found = fs::read_to_string(&into).map(|text| headings(&text)).unwrap_or_default();
            checked += 1;
            if !found.contains(id) {
                dead.push(format!("{page}: {target}"));
            }
        }
    }
    assert!(checked > 5, "only {checked} links were found: does the search still work?");
    assert!(dead.is_empty(), "no such heading:\n{}", dead.join("\n"));
}

/// Paths of this repository in a page's code spans: files with an ending, and folders with a slash at their end.
fn shown_paths(text: &str) -> Vec<&str> {
    let prose = text.split("\n```").step_by(2).flat_map(|part| part.split('`').skip(1).step_by(2));
    let folders = ["collector/", "deploy/", "docs/", "perf/", "probes/", "ringbuf/", "server/", "wire/"];
    prose
        .filter(|span| folders.iter().any(|folder| span.starts_with(folder)))
        .filter(|span| span.ends_with('/') || span.contains('.'))
        .filter(|span| span.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_./".contains(&b)))
        .collect()
}

#[test]
fn every_path_that_is_shown_exists() {
    let mut lost = Vec::new();
    let mut checked = 0;
    for page in pages::all() {
        let text = pages::read(&page);
        for path in shown_paths(&text) {
            checked += 1;
            if !pages::root().join(path).exists() {
                lost.push(format!("{page}: {path}"));
            }
        }
    }
    assert!(checked > 50, "only {checked} paths were found: does the search still work?");
    assert!(lost.is_empty(), "no such file:\n{}", lost.join("\n"));
}

/// `make book` takes its table of contents from there.
#[test]
fn the_index_of_the_docs_lists_every_page_of_them() {
    let index = pages::read("docs/README.md");
    let known: BTreeSet<&str> = links(&index).into_iter().collect();
    let missing: Vec<String> = pages::all()
        .into_iter()
        .filter_map(|page| page.strip_prefix("docs/").map(str::to_owned))
        .filter(|page| page != "README.md" && !known.contains(page.as_str()))
        .collect();
    assert!(missing.is_empty(), "docs/README.md does not name {missing:?}");
}

/// `deploy/README.md` sends the reader of an alert there.
#[test]
fn every_alert_is_in_troubleshooting() {
    let rules = pages::read("deploy/monitoring/prometheus-rule.yaml");
    let alerts: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 20, "only {} alerts were found", alerts.len());
    let page = pages::read("docs/troubleshooting.md");
    let (_, table) = page.split_once("## An alert fires").expect("the section");
    let named: BTreeSet<&str> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" |").next())
        .flat_map(|cell| cell.split(", "))
        .collect();
    let missing: Vec<&&str> = alerts.iter().filter(|alert| !named.contains(**alert)).collect();
    assert!(missing.is_empty(), "docs/troubleshooting.md, \"An alert fires\", does not name {missing:?}");
}

/// The manifests switch the search for tests off, so a file that nobody names would never run.
#[test]
fn every_file_of_tests_is_run() {
    let mut lost = Vec::new();
    for krate in ["collector", "perf", "probes", "ringbuf", "server"] {
        let read = |file: &str| fs::read_to_string(pages::root().join(krate).join(file)).expect("readable");
        let (main, manifest) = (read("tests/main.rs"), read("Cargo.toml"));
        for entry in fs::read_dir(pages::root().join(krate).join("tests")).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_stem().expect("a name").to_string_lossy();
            let is_named = main.lines().any(|line| line == format!("mod {name};"))
                || manifest.contains(&format!("[[test]]\nname = \"{name}\"\n"));
            if path.extension().is_some_and(|ending| ending == "rs") && name != "main" && !is_named {
                lost.push(path.display().to_string());
            }
        }
    }
    assert!(lost.is_empty(), "name them in the crate's tests/main.rs: {lost:?}");
}

#[test]
fn the_readme_leads_to_every_page() {
    let readme = pages::read("README.md");
    let known: BTreeSet<&str> = links(&readme).into_iter().collect();
    let missing: Vec<String> =
        pages::all().into_iter().filter(|page| page.starts_with("docs/") && !known.contains(page.as_str())).collect();
    assert!(missing.is_empty(), "README.md does not name {missing:?}");
}

/// Command lines that a page shows: code spans, and lines of code blocks, that begin with one of the programs.
fn commands(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (index, block) in text.split("```").enumerate() {
        if index % 2 == 1 {
            let joined = block.replace("\\\n", " ");
            found.extend(joined.lines().map(|line| line.trim_start_matches(['$', '#', ' ']).to_owned()));
        } else {
            found.extend(
                block.split('`').skip(1).step_by(2).map(|span| span.split_whitespace().collect::<Vec<_>>().join(" ")),
            );
        }
    }
    found.retain(|line| PROGRAMS.iter().any(|program| words(line).first() == Some(program)));
    found
}

const PROGRAMS: [&str; 4] = ["tapio-collector", "tapio-server", "tapioctl", "tapio-perf"];

/// The words of a command line up to a pipe, a comment or the like, its program without its folder.
fn words(line: &str) -> Vec<&str> {
    let line = line.trim_start_matches("target/release/");
    line.split_whitespace().take_while(|word| !["|", ">", "2>&1", "&", "&&", ";", "#"].contains(word)).collect()
}

#[test]
fn every_command_that_is_shown_exists() {
    let mut helps: BTreeMap<Vec<String>, String> = BTreeMap::new();
    let mut help = |path: &[&str]| {
        let key: Vec<String> = path.iter().map(|&word| word.to_owned()).collect();
        let text = helps.entry(key).or_insert_with(|| {
            let arguments: Vec<&str> = path[1..].iter().copied().chain(["--help"]).collect();
            String::from_utf8_lossy(&pages::program(path[0], &arguments).stdout).into_owned()
        });
        text.clone()
    };
    let mut wrong = Vec::new();
    let mut checked = 0;
    for page in pages::all() {
        for line in commands(&pages::read(&page)) {
            let all = words(&line);
            let mut path = vec![all[0]];
            let mut before = "";
            for word in &all[1..] {
                // Options and what may be their values stand before a command too.
                let is_of_option = word.starts_with('-') || before.starts_with('-');
                before = word;
                let text = help(&path);
                let subcommands = text.split_once("Commands:").map_or("", |(_, rest)| rest);
                let names = subcommands.lines().skip(1).take_while(|line| line.starts_with("  "));
                // A word that several may stand for is written with bars.
                let first = word.split('|').next().unwrap_or(word).trim_end_matches('\\');
                if path.len() > 3 || !names.filter_map(|line| line.split_whitespace().next()).any(|name| name == first)
                {
                    if is_of_option {
                        continue;
                    }
                    let is_name = path.len() == 1 && word.bytes().all(|b| b == b'-' || b.is_ascii_lowercase());
                    if is_name && !subcommands.is_empty() {
                        wrong.push(format!("{page}: `{line}`: {} has no command {word}", path.join(" ")));
                    }
                    break;
                }
                path.push(first);
            }
            checked += 1;
            let text = format!("{}{}", help(&path), help(&path[..1]));
            for word in all.iter().filter(|word| word.starts_with("--")) {
                let flag = word.trim_start_matches('[').split(['=', ']', ',', '|', ')']).next().unwrap_or(word);
                let is_there = text.split(|c: char| c.is_whitespace() || ",=[".contains(c)).any(|known| known == flag);
                if !is_there {
                    wrong.push(format!("{page}: `{line}`: {} has no {flag}", path.join(" ")));
                }
            }
        }
    }
    assert!(checked > 50, "only {checked} commands were found: does the search still work?");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_pattern_is_documented_and_no_other() {
    let folder = pages::root().join("server/patterns");
    let files = fs::read_dir(folder).expect("the folder").map(|entry| entry.expect("an entry").path());
    let texts = files.map(|path| fs::read_to_string(path).expect("a pattern"));
    let ids: BTreeSet<String> = texts
        .map(|text| text.lines().find_map(|line| line.strip_prefix("id: ")).expect("an id").trim().to_owned())
        .collect();
    let page = pages::read("docs/patterns.md");
    let (_, table) = page.split_once("## Built in").expect("the section");
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let listed: BTreeSet<String> = rows.map(|(id, _)| id.to_owned()).collect();
    assert_eq!(listed, ids);
}

#[test]
fn the_pattern_that_is_taught_is_accepted() {
    let page = pages::read("docs/patterns.md");
    let (_, chapter) = page.split_once("## How to write one").expect("the section");
    let blocks: Vec<&str> =
        chapter.split("```yaml\n").skip(1).filter_map(|rest| Some(rest.split_once("```")?.0)).collect();
    assert!(!blocks.is_empty(), "there is no example");
    let folder = tempfile::tempdir().expect("a folder");
    for (number, block) in blocks.iter().enumerate() {
        fs::write(folder.path().join(format!("{number}.yaml")), block).expect("written");
    }
    let directory = folder.path().to_str().expect("a path");
    let said = pages::printed("tapio-server", &["check", "--patterns", directory]);
    assert!(said.contains("accepted") && !said.contains("replaces"), "{said}");
    // One that takes the place of a built-in pattern is named.
    let own = folder.path().join("own.yaml");
    fs::copy(pages::root().join("server/patterns/crashed.yaml"), &own).expect("copied");
    let said = pages::printed("tapio-server", &["check", "--patterns", directory]);
    assert!(said.contains("own.yaml: replaces the built-in pattern crashed"), "{said}");
    fs::remove_file(&own).expect("removed");
    // And a folder without any is no folder of patterns.
    let empty = tempfile::tempdir().expect("a folder");
    let output = pages::program("tapio-server", &["check", "--patterns", empty.path().to_str().expect("a path")]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && said.contains("no pattern in it"), "{said}");
    // And one that is not understood is refused with its line.
    fs::write(folder.path().join("0.yaml"), blocks[0].replace("clue: exit", "clue: exti")).expect("written");
    let output = pages::program("tapio-server", &["check", "--patterns", directory]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("exti"), "{said}");
}

/// What `tapio-server` says of a pattern whose only step has this clue and this field.
fn refusal(clue: &str, field: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let text = format!(
        "id: x\ntitle: t\nsummary: s\nseverity: low\npriority: 1\nwindow: 1m\nscope: entity\nanchor: a\nadvice: [a]\n\
         confidence: {{base: 0.5}}\nsteps:\n  - {{name: a, clue: {clue}, where: {{{field}: true}}}}\n"
    );
    fs::write(folder.path().join("x.yaml"), text).expect("written");
    let output = pages::program("tapio-server", &["check", "--patterns", folder.path().to_str().expect("a path")]);
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

#[test]
fn every_field_of_patterns_is_in_the_tables() {
    let page = pages::read("docs/patterns.md");
    let tables = page.split_once("## Keys").expect("the section").0;
    let names = |said: &str, before: &str| -> Vec<String> {
        let (_, list) = said.split_once(before).unwrap_or_else(|| panic!("{said}"));
        list.split(", ").map(str::to_owned).collect()
    };
    let clues = names(&refusal("none", "none"), "no clue is called none: there are ");
    assert!(clues.len() > 20, "{clues:?}");
    for clue in clues {
        assert!(tables.contains(&format!("`{clue}`")), "docs/patterns.md does not name the clue {clue}");
        for field in names(&refusal(&clue, "none"), &format!("a clue of kind {clue} has ")) {
            assert!(tables.contains(&format!("`{field}`")), "docs/patterns.md does not name {field} of {clue}");
        }
    }
}
