//! What a cgroup's path says about who lives in it.

use tapio_wire::event::EntityKind;

/// What a cgroup's path says about who lives in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub kind: EntityKind,
    /// What the entity's id is made of.
    pub key: String,
    /// Name for people.
    pub name: String,
    pub container_id: String,
    pub pod_uid: String,
}

/// Reads a cgroup's path, below its hierarchy's root, as container runtimes and systemd build it. Of containers within containers
/// the innermost counts: a node may be one itself.
///
/// | form | who builds it |
/// |---|---|
/// | `…/cri-containerd-<64 hex>.scope`, `…/crio-<64 hex>.scope`, `…/docker-<64 hex>.scope`, `…/libpod-<64 hex>.scope` | systemd drivers |
/// | `/kubepods/…/pod<uid>/<64 hex>`, `/docker/<64 hex>`, `/actions_job/<64 hex>` | cgroupfs drivers |
/// | `…/<slice>:cri-containerd:<64 hex>`, `…/<slice>:docker:<64 hex>` | a systemd name given to a cgroupfs driver |
/// | `/ecs/<task>/<task>-<number>` | Amazon ECS on Fargate |
/// | `/garden/<handle>`, `/buildkit/<id>`, `/mesos/<id>`, `/nomad/<allocation>/…` | Cloud Foundry, BuildKit, Mesos, Nomad |
/// | `nomad.slice/…/<allocation>.<task>.scope` | Nomad on version 2 |
/// | `/lxc/<name>`, `/lxc.payload.<name>`, `/lxc.payload/<name>` | LXC, Incus |
/// | `…/systemd-nspawn@<name>.service`, `…/machine-<name>.scope` | systemd-nspawn, systemd-machined |
///
/// Pods: `pod<uid>`, with `_` for `-` in slices.
pub fn name_of(path: &str) -> Named {
    let mut pod_uid = String::new();
    let mut container: Option<(String, String, String)> = None;
    let (mut above, mut end) = ("", 0);
    for component in path.split('/') {
        end += component.len();
        if component.is_empty() {
            end += 1;
            continue;
        }
        let of_pod = component.split_once(':').map_or(component, |(slice, _)| slice);
        if let Some(uid) = pod_uid_of(of_pod) {
            pod_uid = uid;
            container = None;
        }
        if let Some(id) = container_id_of(component) {
            container = Some((id.into(), id[..12].into(), id.into()));
        } else if let Some(name) = container_name_of(above, component) {
            let key = path[..end].to_owned();
            container = Some((key, name.into(), name.into()));
        }
        (above, end) = (component, end + 1);
    }
    if let Some((key, name, container_id)) = container {
        return Named { kind: EntityKind::Container, key, name, container_id, pod_uid };
    }
    if !pod_uid.is_empty() {
        let (key, name) = (pod_uid.clone(), pod_uid.clone());
        return Named { kind: EntityKind::Pod, key, name, container_id: String::new(), pod_uid };
    }
    let path = if path.is_empty() { "/" } else { path };
    // Units of different users, or of different machines within this one, may have the same name: the path distinguishes them.
    // The last four never have a cgroup, but fail as well.
    let kinds = [".service", ".scope", ".socket", ".mount", ".swap", ".timer", ".path", ".automount", ".device"];
    let is_unit = |part: &str| kinds.iter().any(|end| part.ends_with(end));
    let mut rest = path;
    let (kind, key, name) = loop {
        match rest.rsplit_once('/') {
            Some((_, last)) if is_unit(last) => break (EntityKind::Unit, rest, last),
            Some((before, _)) => rest = before,
            None if is_unit(rest) => break (EntityKind::Unit, rest, rest),
            None => break (EntityKind::Host, path, path),
        }
    };
    Named { kind, key: key.into(), name: name.into(), container_id: String::new(), pod_uid: String::new() }
}

fn pod_uid_of(component: &str) -> Option<String> {
    let in_slice = component.strip_suffix(".slice").and_then(|slice| slice.rsplit_once("-pod"));
    let (uid, dashed) = match in_slice {
        Some((before, uid)) if before.contains("kubepods") => (uid, uid.replace('_', "-")),
        _ => component.strip_prefix("pod").map(|uid| (uid, uid.to_string()))?,
    };
    // Static pods have an uid of 32 hexadecimal digits without dashes.
    let sound = uid.len() >= 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-' || byte == b'_');
    sound.then_some(dashed)
}

fn is_hexadecimal(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn container_id_of(component: &str) -> Option<&str> {
    let bare = component.strip_suffix(".scope").unwrap_or(component);
    if bare.contains("conmon") {
        return None;
    }
    let id = bare.rsplit_once(['-', ':']).map_or(bare, |(_, id)| id);
    (id.len() == 64 && is_hexadecimal(id)).then_some(id)
}

/// The name of a container whose cgroup is not called by an id of 64 digits: by its component and the one above.
fn container_name_of<'a>(above: &str, component: &'a str) -> Option<&'a str> {
    let named = match above {
        "garden" | "buildkit" | "mesos" | "lxc" | "lxc.payload" | "nomad" => Some(component),
        "nomad.slice" | "share.slice" | "reserve.slice" => {
            let task = component.strip_suffix(".scope").filter(|task| task.contains('.'));
            task.filter(|task| task.as_bytes().get(8) == Some(&b'-'))
        }
        _ => None,
    };
    let of_machine = || {
        let unit = component.strip_prefix("systemd-nspawn@").and_then(|name| name.strip_suffix(".service"));
        let scope = component.strip_prefix("machine-").and_then(|name| name.strip_suffix(".scope"));
        unit.or(scope).or_else(|| component.strip_prefix("lxc.payload."))
    };
    // The task's id, 32 digits, and the container's number.
    let of_task = || {
        let (task, number) = component.split_once('-')?;
        let is_one = task.len() == 32 && is_hexadecimal(task) && !number.is_empty() && is_hexadecimal(number);
        (is_one && task == above).then_some(component)
    };
    named.or_else(of_machine).or_else(of_task).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const OUTER: &str = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";
    const UID: &str = "8f1c2d3e-4a5b-6c7d-8e9f-0a1b2c3d4e5f";

    #[test]
    fn containers_are_recognised_in_every_naming_style() {
        let slice = UID.replace('-', "_");
        for (path, pod) in [
            (
                format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice/cri-containerd-{ID}.scope"
                ),
                UID,
            ),
            (format!("/kubepods.slice/kubepods-pod{slice}.slice/crio-{ID}.scope"), UID),
            (format!("/kubepods/besteffort/pod{UID}/{ID}"), UID),
            (format!("/kubepods/pod{UID}/{ID}/nested/app.service"), UID),
            (format!("/docker/{ID}"), ""),
            (
                format!(
                    "/system.slice/docker-{OUTER}.scope/kubelet.slice/kubelet-kubepods-pod{slice}.slice/cri-containerd-{ID}.scope"
                ),
                UID,
            ),
            (format!("/system.slice/docker-{ID}.scope"), ""),
            (format!("/kubepods-burstable-pod{slice}.slice:cri-containerd:{ID}"), UID),
            (format!("/system.slice:docker:{ID}"), ""),
            (format!("/system.slice/containerd.service/kubepods-pod{slice}.slice:cri-containerd:{ID}"), UID),
            (format!("/machine.slice/libpod-{ID}.scope/container"), ""),
            (format!("/kubepods/besteffort/pod{UID}/crio-{ID}"), UID),
            (format!("/actions_job/{ID}"), ""),
            (format!("/ecs/0123456789abcdef0123456789abcdef/{ID}"), ""),
        ] {
            let named = name_of(&path);
            assert_eq!((named.kind, &*named.container_id, &*named.pod_uid), (EntityKind::Container, ID, pod), "{path}");
        }
    }

    #[test]
    fn containers_with_a_name_instead_of_an_id_are_recognised() {
        for (path, name) in [
            ("/garden/6f1e2b1a-3c1f-4b5e-7d44-0f6a", "6f1e2b1a-3c1f-4b5e-7d44-0f6a"),
            ("/buildkit/xq2hn1uqs3zyk6pxmvxn0vqz9", "xq2hn1uqs3zyk6pxmvxn0vqz9"),
            ("/nomad.slice/0b4bd5d3-21c6-3a2c-2d9d-0f2f5c1f7d6e.web.scope", "0b4bd5d3-21c6-3a2c-2d9d-0f2f5c1f7d6e.web"),
            (
                "/nomad.slice/share.slice/0b4bd5d3-21c6-3a2c-2d9d-0f2f5c1f7d6e.web.scope",
                "0b4bd5d3-21c6-3a2c-2d9d-0f2f5c1f7d6e.web",
            ),
            ("/nomad/0b4bd5d3-21c6", "0b4bd5d3-21c6"),
            ("/lxc/db", "db"),
            ("/lxc.payload.db/system.slice/cron.service", "db"),
            ("/machine.slice/systemd-nspawn@db.service/payload", "db"),
            ("/machine.slice/machine-db.scope/init.scope", "db"),
            (
                "/ecs/0123456789abcdef0123456789abcdef/0123456789abcdef0123456789abcdef-2531612879",
                "0123456789abcdef0123456789abcdef-2531612879",
            ),
        ] {
            let named = name_of(path);
            assert_eq!((named.kind, &*named.name), (EntityKind::Container, name), "{path}");
        }
        let key = |path| name_of(path).key;
        assert_eq!(key("/lxc/db/init.scope"), key("/lxc/db"), "what is below belongs to it");
        assert_ne!(key("/lxc/db"), key("/lxc/web"));
    }

    #[test]
    fn pods_units_and_host_cgroups_are_distinguished() {
        assert_eq!(name_of(&format!("/kubepods/burstable/pod{UID}")).kind, EntityKind::Pod);
        assert_eq!(name_of("/system.slice/sshd.service").name, "sshd.service");
        let of_user =
            |user: u32| name_of(&format!("/user.slice/user-{user}.slice/user@{user}.service/app.slice/app.service"));
        assert_eq!(of_user(1).name, of_user(2).name);
        assert_ne!(of_user(1).key, of_user(2).key);
        assert_eq!(name_of("/user.slice/user-1000.slice/session-3.scope").kind, EntityKind::Unit);
        assert_eq!(name_of("/user.slice/podcast").kind, EntityKind::Host);
        assert_eq!(name_of("").key, "/");
        assert_eq!(name_of(&format!("/machine.slice/crio-conmon-{ID}.scope")).kind, EntityKind::Unit);
    }
}
