//! Silences and acknowledgements for people.

use tapio_wire::service::{Finding, Silence};

use super::layout::{Style, clean, table};
use super::time::for_people;

/// Until when nobody is notified, or who deals with it, and why: one sentence each.
pub fn held(finding: &Finding) -> Vec<String> {
    let silenced = finding.silence.as_ref().map(|silence| format!("Silenced {}", until(silence)));
    let acknowledged = finding.acknowledged.as_ref().map(|silence| format!("Acknowledged {}", until(silence)));
    silenced.into_iter().chain(acknowledged).collect()
}

fn until(silence: &Silence) -> String {
    let by = if silence.by.is_empty() { String::new() } else { format!("by {} ", clean(&silence.by)) };
    let why = if silence.reason.is_empty() { String::new() } else { format!(": {}", clean(&silence.reason)) };
    format!("{by}until {}{why}", for_people(silence.until_ns))
}

/// A table of them.
pub fn silences(style: Style, silences: &[Silence]) -> String {
    if silences.is_empty() {
        return "Nothing is silenced or acknowledged.\n".into();
    }
    let or_any = |text: &str| if text.is_empty() { "any".to_owned() } else { clean(text) };
    let row = |silence: &Silence| {
        let about = match silence.finding.as_str() {
            "" => [&silence.pattern, &silence.namespace, &silence.workload].map(|text| or_any(text)),
            finding => [format!("finding {}", clean(finding)), "-".into(), "-".into()],
        };
        let end = match silence.ended_ns {
            0 => for_people(silence.until_ns),
            ended_ns => format!("ended {}", for_people(ended_ns)),
        };
        let [pattern, namespace, workload] = about;
        vec![clean(&silence.id), pattern, namespace, workload, end, or_dash(&silence.by), clean(&silence.reason)]
    };
    let rows: Vec<_> = silences.iter().map(row).collect();
    table(style, &["ID", "PATTERN", "NAMESPACE", "WORKLOAD", "UNTIL", "BY", "REASON"], &[false; 7], &rows)
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { clean(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_reasons_do_not_reach_a_terminal() {
        let hostile = Silence {
            id: "a1".into(),
            pattern: "x\u{1b}[2J".into(),
            reason: "\u{202e}why\n<b>".into(),
            by: "\u{1b}]0;me".into(),
            ..Silence::default()
        };
        let plain = Style { colour: false };
        let finding = Finding { silence: Some(hostile.clone()), ..Finding::default() };
        for text in [silences(plain, std::slice::from_ref(&hostile)), held(&finding).remove(0)] {
            assert!(!text.contains(['\u{1b}', '\u{202e}']) && text.contains("why"), "{text}");
        }
        assert_eq!(silences(plain, &[hostile]).lines().count(), 2);
    }
}
