//! A finding for people: what died, why, how that is known, what to do.

use std::fmt::Write;

use tapio_wire::program::units::{human_bytes, human_duration};
use tapio_wire::service::{Death, EntityRef, Evidence, Finding, Loss};
use unicode_width::UnicodeWidthStr;

use super::layout::{Style, clean, padded, wrap};
use super::silence::held;
use super::time::for_people;
use crate::findings::text;

/// What the times of a causal chain are counted from.
const ZERO: &str = "  +0 is its first line. A minus: the kernel stamped that before what brought it about.";

/// Characters of an id that a list shows; enough to ask for the finding.
const SHORT_ID: usize = 10;

/// The headings of a list.
pub fn list_header(style: Style) -> String {
    style.dim(&format!(
        "{:<27} {:<8} {:>5} {:<SHORT_ID$} {:<21} {:<24} {}",
        "ENDED", "SEVERITY", "SURE", "ID", "PATTERN", "POD", "TITLE"
    )) + "\n"
}

/// A finding on one line of a list.
pub fn list_row(style: Style, finding: &Finding) -> String {
    let id = clean(&finding.id).chars().take(SHORT_ID).collect::<String>();
    let severity = padded(&clean(&finding.severity), 8);
    let again = if finding.withdrawn {
        style.dim(&withdrawal(finding))
    } else if finding.ongoing {
        style.bold(" (goes on)")
    } else if finding.resolved_ns > 0 {
        style.dim(&format!(" (over after {})", lasted(finding)))
    } else if finding.revision > 1 {
        style.dim(&format!(" (version {})", finding.revision))
    } else {
        String::new()
    };
    let held = match (&finding.silence, &finding.acknowledged) {
        (Some(_), _) => style.dim(" (silenced)"),
        (None, Some(_)) => style.dim(" (acknowledged)"),
        (None, None) => String::new(),
    };
    let pod = finding.entity.as_ref().and_then(pod);
    format!(
        "{} {} {:>5} {} {} {} {}{again}{held}\n",
        style.dim(&for_people(finding.ended_ns)),
        style.severity(&finding.severity, &severity),
        percent(finding.confidence),
        padded(&id, SHORT_ID),
        padded(&clean(&finding.pattern), 21),
        padded(&pod.unwrap_or_else(|| "-".to_owned()), 24),
        clean(&finding.title),
    )
}

/// `shop/web-0`, where Kubernetes reported it.
pub fn pod(entity: &EntityRef) -> Option<String> {
    (!entity.pod.is_empty()).then(|| format!("{}/{}", clean(&entity.namespace), clean(&entity.pod)))
}

/// Why a finding does not stand any more.
pub fn withdrawal(finding: &Finding) -> String {
    match finding.superseded_by.chars().take(SHORT_ID).collect::<String>() {
        by if by.is_empty() => " (withdrawn: what came later speaks against it)".to_owned(),
        by => format!(" (withdrawn: {} explains it)", clean(&by)),
    }
}

/// A finding with everything that is known of it.
pub fn finding(style: Style, finding: &Finding) -> String {
    let mut out = style.bold(wrap("", &clean(&finding.title)).trim_end()) + "\n";
    let severity = clean(&finding.severity);
    let what = if is_state(finding) { "affected" } else { "deaths" };
    let again = if finding.count > 1 { format!(" · {} {what}", finding.count) } else { String::new() };
    let _ = writeln!(
        out,
        "{} · {} sure{again} · pattern {} · id {}",
        style.severity(&severity, &severity),
        percent(finding.confidence),
        clean(&finding.pattern),
        clean(&finding.id)
    );
    let _ = writeln!(out, "{}", style.dim(&span(finding)));
    if let Some(entity) = &finding.entity {
        let _ = writeln!(out, "{}", style.dim(&place(entity)));
    }
    for sentence in held(finding) {
        out.push_str(&wrap("", &sentence));
    }
    section(style, &mut out, "What happened");
    out.push_str(&wrap("  ", &clean(&finding.summary)));
    section(style, &mut out, "Causal chain");
    let _ = writeln!(out, "{}", style.dim(ZERO));
    chain(style, &mut out, &finding.evidence);
    if let Some(death) = &finding.death {
        section(style, &mut out, "Death certificate");
        certificate(style, &mut out, death);
    }
    if !finding.consequences.is_empty() {
        section(style, &mut out, "What it brought about");
        for consequence in &finding.consequences {
            let after = human_duration(consequence.started_ns.saturating_sub(finding.started_ns));
            out.push_str(&wrap(&format!("  +{after:<10} "), &clean(&consequence.title)));
        }
    }
    section(style, &mut out, "Loss");
    if !finding.missing_servers.is_empty() {
        let text = format!("Nothing was heard of {} when this was found.", finding.missing_servers.join(", "));
        out.push_str(&wrap("  ", &clean(&text)));
    }
    if finding.possible {
        out.push_str(&wrap("  ", "Evidence that this needs was lost, or may have been: it is possible, not certain."));
    }
    out.push_str(&wrap("  ", &loss(finding.loss.as_ref())));
    if !finding.advice.is_empty() {
        section(style, &mut out, "What to do");
        for (index, advice) in finding.advice.iter().enumerate() {
            out.push_str(&wrap(&format!("  {}. ", index + 1), &clean(advice)));
        }
    }
    out
}

fn section(style: Style, out: &mut String, title: &str) {
    let _ = writeln!(out, "\n{}", style.bold(title));
}

/// `95 %`
pub fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Whether it reports a state, which has an end, and not a moment.
pub fn is_state(finding: &Finding) -> bool {
    finding.ongoing || finding.resolved_ns > 0
}

fn lasted(finding: &Finding) -> String {
    human_duration(finding.resolved_ns.saturating_sub(finding.started_ns))
}

/// When it was, by the node's clock.
pub fn span(finding: &Finding) -> String {
    if finding.ongoing {
        return format!("goes on since {}, by the node's clock", for_people(finding.started_ns));
    }
    if finding.resolved_ns > 0 {
        return format!(
            "over since {}, by the node's clock, after {}",
            for_people(finding.resolved_ns),
            lasted(finding)
        );
    }
    let lasted = finding.ended_ns.saturating_sub(finding.started_ns);
    let ended = for_people(finding.ended_ns);
    if lasted == 0 {
        format!("at {ended}, by the node's clock")
    } else {
        format!("ended {ended}, by the node's clock, {} after it began", human_duration(lasted))
    }
}

fn place(entity: &EntityRef) -> String {
    let mut parts = Vec::new();
    let chain = [
        ("workload", entity.workload.clone()),
        ("pod", pod(entity).unwrap_or_default()),
        ("container", entity.container.clone()),
    ];
    let chain: Vec<_> = chain
        .iter()
        .filter(|(_, name)| !name.is_empty())
        .map(|(what, name)| format!("{what} {}", clean(name)))
        .collect();
    if !chain.is_empty() {
        parts.push(format!("{} › node {}", chain.join(" › "), clean(&entity.node)));
    } else {
        parts.push(format!("node {}", clean(&entity.node)));
    }
    if !entity.image.is_empty() {
        parts.push(format!("image {}", clean(&entity.image)));
    }
    for (what, value) in [("container", &entity.container_id), ("pod uid", &entity.pod_uid), ("cgroup", &entity.cgroup)]
    {
        if !value.is_empty() {
            parts.push(format!("{what} {}", clean(value)));
        }
    }
    parts.join("\n")
}

/// Which piece brought each piece about.
pub fn causes(evidence: &[Evidence]) -> Vec<Option<usize>> {
    let cause_of = |index: usize| {
        let cause = &evidence[index].caused_by;
        // A cause stands before its effect, so this cannot go in a circle.
        (0..index).rev().find(|&at| !cause.is_empty() && evidence[at].step == *cause)
    };
    (0..evidence.len()).map(cause_of).collect()
}

/// `+4.9 ms`: how long after the first piece of evidence something was.
pub fn offset(time_ns: u64, first_ns: u64) -> String {
    let sign = if time_ns < first_ns { "-" } else { "+" };
    format!("{sign}{}", human_duration(time_ns.abs_diff(first_ns)))
}

/// The evidence as a tree: each piece below the step that brought it about.
fn chain(style: Style, out: &mut String, evidence: &[Evidence]) {
    let started = evidence.first().map_or(0, |piece| piece.time_ns);
    let parents = causes(evidence);
    let mut waiting: Vec<(usize, String, bool)> = Vec::new();
    let push_children = |waiting: &mut Vec<(usize, String, bool)>, of: Option<usize>, indent: &str| {
        let children: Vec<_> = (0..evidence.len()).filter(|&at| parents[at] == of).collect();
        let last = children.last().copied();
        let entries = children.iter().rev();
        waiting.extend(entries.map(|&child| (child, indent.to_owned(), Some(child) == last)));
    };
    push_children(&mut waiting, None, "  ");
    while let Some((index, indent, is_last)) = waiting.pop() {
        let piece = &evidence[index];
        let (branch, below) = if is_last { ("└─", "   ") } else { ("├─", "│  ") };
        let after = offset(piece.time_ns, started);
        let inner = format!("{indent}{below}");
        let head = format!("{indent}{branch} {after:<10} {}", clean(&piece.step));
        let _ = writeln!(out, "{}  {}", style.bold(&head), style.dim(&clean(&piece.id)));
        let has_children = parents.contains(&Some(index));
        let rule = if has_children { "│  " } else { "   " };
        for line in wrap(&" ".repeat(inner.width() + 3), &clean(&piece.text)).lines() {
            let _ = writeln!(out, "{inner}{rule}{}", line.trim_start());
        }
        push_children(&mut waiting, Some(index), &inner);
    }
}

fn certificate(style: Style, out: &mut String, death: &Death) {
    for (what, value) in certificate_rows(death) {
        let head = format!("  {what:<12}");
        let line = wrap(&head, &value);
        out.push_str(&style.dim(&head));
        out.push_str(line.strip_prefix(&head).unwrap_or(&line));
    }
}

/// What a death certificate says, line by line.
pub fn certificate_rows(death: &Death) -> Vec<(&'static str, String)> {
    let process = |comm: &str, pid: u32| format!("{} (pid {pid})", clean(comm));
    let mut rows = Vec::new();
    let mut row = |what: &'static str, value: &str| rows.push((what, value.to_owned()));
    row("process", &process(&death.comm, death.pid));
    match (death.signal, death.exit_code) {
        (Some(signal), _) => row("ended by", &format!("{} (signal {signal})", clean(&death.signal_name))),
        (None, Some(code)) => row("exit code", &code.to_string()),
        (None, None) => row("ended by", "unknown"),
    }
    if let Some(sender) = &death.sender {
        let place = sender.entity.as_ref().map_or_else(String::new, |entity| {
            format!(" of {} {}", text::kind_called(&clean(&entity.kind)), clean(&entity.name))
        });
        let by = process(&sender.comm, sender.pid);
        if sender.kernel {
            row("sent by", &clean(&text::by_kernel(death.signal.unwrap_or(0), &sender.comm, sender.pid)));
        } else {
            row("sent by", &format!("{by}{place}"));
        }
    } else if death.signal.is_some() {
        row("sent by", "not seen");
    }
    if let Some(limit) = &death.limit {
        let reached = if limit.hit { "reached" } else { "not reached" };
        row(
            "memory",
            &format!(
                "{} of {} used in {}: the limit was {reached}",
                human_bytes(limit.usage_bytes),
                human_bytes(limit.limit_bytes),
                clean(&limit.cgroup)
            ),
        );
    }
    if !death.label.is_empty() {
        let verdict = match death.label_agrees {
            Some(true) => ": agrees",
            Some(false) => ": contradicts what happened",
            None => "",
        };
        row("label", &format!("Kubernetes says {}{verdict}", clean(&death.label)));
    }
    row("verdict", &clean(&death.verdict));
    rows
}

/// What was lost in its window.
pub fn loss(loss: Option<&Loss>) -> String {
    let loss = loss.copied().unwrap_or_default();
    let mut text = match loss.events {
        0 => "No event was lost on this node in the window.".to_owned(),
        1 => "One event was lost on this node in the window: evidence may be missing.".to_owned(),
        events => format!("{events} events were lost on this node in the window: evidence may be missing."),
    };
    if loss.open_interval {
        text.push_str(" A collector died or its stream was interrupted: more may be missing than was counted.");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(step: &str, caused_by: &str, time_ns: u64) -> Evidence {
        Evidence { step: step.into(), caused_by: caused_by.into(), time_ns, ..Evidence::default() }
    }

    #[test]
    fn times_count_from_the_first_cause_earlier_ones_negative() {
        let mut out = String::new();
        chain(Style { colour: false }, &mut out, &[piece("oom", "", 1_063), piece("kill", "oom", 1_000)]);
        let heads: Vec<_> =
            out.lines().map(|line| line.split_whitespace().take(3).collect::<Vec<_>>().join(" ")).collect();
        assert!(heads.contains(&"└─ +0 ns".to_owned()) && heads.contains(&"└─ -63 ns".to_owned()), "{out}");
    }

    #[test]
    fn a_withdrawn_finding_names_its_successor() {
        let row = |superseded_by: &str| {
            let finding = Finding { withdrawn: true, superseded_by: superseded_by.into(), ..Finding::default() };
            list_row(Style { colour: false }, &finding)
        };
        assert!(row("5997b008aeb0dfd0").ends_with("(withdrawn: 5997b008ae explains it)\n"));
        assert!(row("").ends_with("(withdrawn: what came later speaks against it)\n"));
    }

    #[test]
    fn rows_with_wide_names_are_aligned() {
        let row = |pod: &str| {
            let entity = EntityRef { namespace: "shop".into(), pod: pod.into(), ..EntityRef::default() };
            let finding = Finding { entity: Some(entity), title: "title".into(), ..Finding::default() };
            list_row(Style { colour: false }, &finding)
        };
        assert_eq!(row("日本").width(), row("web-").width());
    }

    #[test]
    fn the_certificate_names_host_groups_and_the_kernel_alike() {
        let sender = |kernel: bool, pid: u32| {
            let entity = EntityRef { kind: "host".into(), name: "/tapio".into(), ..EntityRef::default() };
            let sender = tapio_wire::service::Sender { pid, comm: "sh".into(), entity: Some(entity), kernel };
            let death = Death { signal: Some(9), sender: Some(sender), ..Death::default() };
            let mut out = String::new();
            certificate(Style { colour: false }, &mut out, &death);
            out
        };
        assert!(sender(false, 7).contains("sh (pid 7) of host group /tapio\n"));
        assert!(sender(true, 7).contains("the kernel, while sh (pid 7) was running\n"));
        assert!(sender(true, 0).contains("  sent by     the kernel\n"));
    }
}
