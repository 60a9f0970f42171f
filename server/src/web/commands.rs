//! What to type next, filled in: a reader copies it into a shell.
//!
//! What must hold: a name from a node is one word of the shell, whatever is in it.

use tapio_wire::service::{EntityRef, Finding};

use crate::render;

/// A command, and what it is for.
pub struct Command {
    pub purpose: &'static str,
    pub line: String,
}

/// One word of a POSIX shell.
fn word(text: &str) -> String {
    let text = render::clean(text);
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@=,+".contains(c);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// The commands that go on from a finding.
pub fn of(finding: &Finding) -> Vec<Command> {
    let mut commands = Vec::new();
    let mut add = |purpose: &'static str, parts: &[&str]| {
        let line = parts.iter().map(|part| word(part)).collect::<Vec<_>>().join(" ");
        commands.push(Command { purpose, line });
    };
    let none = EntityRef::default();
    let entity = finding.entity.as_ref().unwrap_or(&none);
    let (namespace, pod) = (entity.namespace.as_str(), entity.pod.as_str());
    if !pod.is_empty() {
        let pod = format!("pod/{pod}");
        add("What Kubernetes says of the pod", &["kubectl", "describe", "-n", namespace, &pod]);
        if !entity.container.is_empty() {
            let of_container = ["kubectl", "logs", "-n", namespace, &pod, "-c", &entity.container, "--previous"];
            add("What it wrote before it died", &of_container);
        }
    }
    if let Some((kind, name)) = entity.workload.split_once('/').filter(|_| !namespace.is_empty()) {
        let kind = kind.to_lowercase();
        if matches!(kind.as_str(), "deployment" | "statefulset" | "daemonset") {
            add("What was released", &["kubectl", "rollout", "history", "-n", namespace, &format!("{kind}/{name}")]);
        }
        add("Everything about its workload", &["tapioctl", "why", &format!("{kind}/{name}"), "-n", namespace]);
    }
    match entity.kind.as_str() {
        "unit" => {
            add("How the unit is", &["systemctl", "status", "--", &entity.name]);
            let since = render::for_people(finding.started_ns.saturating_sub(600 * 1_000_000_000));
            add("What the unit wrote", &["journalctl", "--since", &since, "-u", &entity.name]);
        }
        "node" => add("What Kubernetes says of the node", &["kubectl", "describe", &format!("node/{}", entity.node)]),
        _ => {}
    }
    add("This finding in a terminal", &["tapioctl", "finding", &finding.id]);
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_is_one_word_of_a_shell() {
        for name in ["$(reboot)", "a b", "'; rm -rf ~ #", "`x`", "a\nb", "\x1b[2J", "", "--all"] {
            let entity = EntityRef { kind: "unit".into(), name: name.into(), ..EntityRef::default() };
            let finding = Finding { id: "1".into(), entity: Some(entity), ..Finding::default() };
            let line = &of(&finding)[0].line;
            let script = format!("set -- {line}; printf '%s|' \"$#\" \"$4\"");
            let output = std::process::Command::new("sh").arg("-c").arg(script).output().expect("a shell");
            let said = String::from_utf8(output.stdout).expect("UTF-8");
            assert_eq!(said, format!("4|{}|", render::clean(name)), "{line}");
        }
    }

    #[test]
    fn a_container_of_a_pod_has_its_commands_filled_in() {
        let entity = EntityRef {
            kind: "container".into(),
            namespace: "shop".into(),
            pod: "web-0".into(),
            container: "web".into(),
            workload: "Deployment/web".into(),
            ..EntityRef::default()
        };
        let finding = Finding { id: "1".into(), entity: Some(entity), ..Finding::default() };
        let lines: Vec<_> = of(&finding).into_iter().map(|command| command.line).collect();
        let wanted = [
            "kubectl describe -n shop pod/web-0",
            "kubectl logs -n shop pod/web-0 -c web --previous",
            "kubectl rollout history -n shop deployment/web",
            "tapioctl why deployment/web -n shop",
            "tapioctl finding 1",
        ];
        assert_eq!(lines, wanted);
    }
}
