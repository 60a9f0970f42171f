//! A finding as Markdown, to begin a postmortem with.
//!
//! What must hold: a text from a node stays text: it becomes neither markup nor HTML, and no line of its own.

use std::fmt::Write;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use tapio_wire::service::{EntityRef, Finding};

use super::finding::{Around, zero};
use super::{commands, parts};
use crate::findings::Certainty;
use crate::render;

/// What stands for something in Markdown or in HTML.
const SPECIAL: &str = "\\`*_{}[]()<>#+-.!|~&$:@^=";

/// A text that stays one.
fn plain(text: &str) -> String {
    let text = render::clean(&text.split_whitespace().collect::<Vec<_>>().join(" "));
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        // Within a word and before a blank these mean nothing, and escaped they are hard to read.
        let is_quiet = matches!(c, '.' | '-' | ':' | '+' | '=' | '(' | ')' | '#' | '!' | '@');
        // `1.` begins a list.
        let is_first = out.bytes().all(|byte| byte.is_ascii_digit());
        if SPECIAL.contains(c) && (is_first || !is_quiet) {
            out.push('\\');
        }
        out.push(c);
    }
    // An address becomes a link by itself in many renderers.
    out.replace("://", "\\://").replace("www.", "www\\.")
}

/// How many backticks of a text stand beside each other at most.
fn longest_run(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

/// A text in backticks, whatever is in it.
fn code(text: &str) -> String {
    let text = render::clean(text);
    let longest = longest_run(&text);
    let fence = "`".repeat(longest + 1);
    let pad = if longest > 0 { " " } else { "" };
    format!("{fence}{pad}{text}{pad}{fence}")
}

fn place(entity: &EntityRef) -> String {
    let pod = render::pod(entity).unwrap_or_default();
    let parts = [
        ("workload", entity.workload.clone()),
        ("pod", pod),
        ("container", entity.container.clone()),
        ("", if entity.pod.is_empty() { parts::called(entity) } else { String::new() }),
        ("node", entity.node.clone()),
    ];
    let named = parts.iter().filter(|(_, name)| !name.is_empty());
    named.map(|(what, name)| format!("{what} {}", plain(name)).trim().to_owned()).collect::<Vec<_>>().join(" › ")
}

/// The whole text.
pub fn text(finding: &Finding, around: &Around, certainty: Option<&Certainty>) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        let _ = writeln!(out, "{text}");
    };
    line(format!("# {}\n", plain(&finding.title)));
    line(format!("- **Severity**: {}, {} sure", plain(&finding.severity), render::percent(finding.confidence)));
    line(format!("- **When**: {}", plain(&render::span(finding))));
    if let Some(entity) = &finding.entity {
        line(format!("- **Where**: {}", place(entity)));
    }
    line(format!("- **Finding**: {}, pattern {}", code(&finding.id), code(&finding.pattern)));
    for (why, minus) in certainty.into_iter().flat_map(|certainty| &certainty.lowered) {
        line(format!("- **Less sure** by {}: {}", render::percent(*minus), plain(why)));
    }
    line(format!("\n## What happened\n\n{}\n", plain(&finding.summary)));
    if let Some(death) = &finding.death {
        line("| death certificate | |\n|---|---|".into());
        for (what, value) in render::certificate_rows(death) {
            line(format!("| {what} | {} |", plain(&value)));
        }
        line(String::new());
    }
    line("## Timeline\n".into());
    let zero = zero(finding);
    line(format!("Counted from {}.\n", render::for_people(zero)));
    line("| | offset | step | what | record |\n|---|---|---|---|---|".into());
    for (index, piece) in finding.evidence.iter().enumerate() {
        let offset = render::offset(piece.time_ns, zero);
        let (step, text) = (plain(&piece.step), plain(&piece.text));
        line(format!("| {} | {offset} | {step} | {text} | {} |", index + 1, code(&piece.id)));
    }
    for event in &around.changes {
        let (offset, kind) = (render::offset(event.time_ns, zero), plain(&event.kind.replace('_', " ")));
        line(format!("| | {offset} | {kind} | {} | {} |", plain(&parts::cut(&event.text)), code(&event.id)));
    }
    if !finding.consequences.is_empty() {
        line("\n## What it brought about\n".into());
        for consequence in &finding.consequences {
            let offset = render::offset(consequence.started_ns, finding.started_ns);
            line(format!("- {offset} {} ({})", plain(&consequence.title), code(&consequence.id)));
        }
    }
    line(format!("\n## Loss\n\n{}", plain(&render::loss(finding.loss.as_ref()))));
    if !finding.missing_servers.is_empty() {
        let servers = finding.missing_servers.join(", ");
        line(format!("\nNothing was heard of {} when this was found.", plain(&servers)));
    }
    for missing in &around.missing {
        line(format!("\n{}", plain(missing)));
    }
    line("\n## What to do\n".into());
    for (index, advice) in finding.advice.iter().enumerate() {
        line(format!("{}. {}", index + 1, plain(advice)));
    }
    let commands = commands::of(finding);
    let longest = commands.iter().map(|command| longest_run(&command.line)).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    line(format!("\n{fence}sh"));
    for command in &commands {
        line(format!("{}  # {}", command.line, command.purpose));
    }
    line(fence);
    out
}

/// The text, as a browser shows it and saves it.
pub fn response(finding: &Finding, around: &Around, certainty: Option<&Certainty>) -> Response {
    ([(header::CONTENT_TYPE, "text/markdown; charset=utf-8")], text(finding, around, certainty)).into_response()
}

#[cfg(test)]
mod tests {
    use tapio_wire::service::Evidence;

    use super::*;

    #[test]
    fn names_stay_text_in_every_place() {
        for (name, shown) in [
            ("web", "web"),
            ("a|b", "a\\|b"),
            ("# head", "\\# head"),
            ("- item", "\\- item"),
            ("<script>", "\\<script\\>"),
            ("[x](javascript:y)", "\\[x\\](javascript:y)"),
            ("a\n\n# b", "a # b"),
            ("\x1b[2Jx", "\u{fffd}\\[2Jx"),
            ("http://evil", "http\\://evil"),
        ] {
            assert_eq!(plain(name), shown, "{name}");
        }
        assert_eq!(code("a`b"), "`` a`b ``");
        assert_eq!(code("a\nb"), "`a\u{fffd}b`");
    }

    #[test]
    fn a_hostile_finding_has_the_lines_that_any_has() {
        let of = |name: &str| {
            let entity = EntityRef { kind: "unit".into(), name: name.into(), node: "n".into(), ..EntityRef::default() };
            let piece = Evidence { step: name.into(), text: name.into(), ..Evidence::default() };
            let (title, summary, advice) = (name.into(), name.into(), vec![name.into()]);
            let finding =
                Finding { title, summary, advice, entity: Some(entity), evidence: vec![piece], ..Finding::default() };
            text(&finding, &Around::default(), None)
        };
        let (calm, hostile) = (of("calm"), of("a\n```\n| <b> | \n# head\x1b[1m"));
        assert_eq!(calm.lines().count(), hostile.lines().count(), "{hostile}");
        assert_eq!(calm.matches("```").count(), 2);
        let fences = hostile.lines().filter(|line| line.trim_start().starts_with("```")).count();
        assert_eq!(fences, 2, "{hostile}");
        assert!(!hostile.contains('\x1b'), "{hostile}");
    }
}
