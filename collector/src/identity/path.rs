//! What a cgroup's path says about who lives in it.

use tapio_wire::event::EntityKind;

/// What a cgroup's path says about who lives in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub kind: EntityKind,
    /// What the entity's id is made of.
    pub key: String,
    /// For people.
    pub name: String,
    pub container_id: String,
    pub pod_uid: String,
}

/// Reads a cgroup's path, below its hierarchy's root, as container runtimes and systemd build it.
///
/// Containers: `…/cri-containerd-<64 hex>.scope`, `…/crio-<64 hex>.scope`, `…/docker-<64 hex>.scope` (systemd driver) and
/// `/kubepods/…/pod<uid>/<64 hex>`, `/docker/<64 hex>` (cgroupfs driver). Pods: `pod<uid>`, with `_` for `-` in slices. Of
/// containers within containers the innermost counts: a node may be one itself.
pub fn name_of(path: &str) -> Named {
    let mut pod_uid = String::new();
    let mut container = None;
    for component in path.split('/').filter(|component| !component.is_empty()) {
        if let Some(uid) = pod_uid_of(component) {
            pod_uid = uid;
            container = None;
        } else if let Some(id) = container_id_of(component) {
            container = Some(id);
        }
    }
    if let Some(id) = container {
        let (key, name) = (id.to_string(), id[..12].to_string());
        return Named { kind: EntityKind::Container, key, name, container_id: id.into(), pod_uid };
    }
    if !pod_uid.is_empty() {
        let (key, name) = (pod_uid.clone(), pod_uid.clone());
        return Named { kind: EntityKind::Pod, key, name, container_id: String::new(), pod_uid };
    }
    let path = if path.is_empty() { "/" } else { path };
    // Units of different users, or of different machines within this one, may have the same name: the path tells them apart.
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

fn container_id_of(component: &str) -> Option<&str> {
    let bare = component.strip_suffix(".scope").unwrap_or(component);
    if bare.contains("conmon") {
        return None;
    }
    let id = bare.rsplit_once('-').map_or(bare, |(_, id)| id);
    (id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(id)
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
        ] {
            let named = name_of(&path);
            assert_eq!((named.kind, &*named.container_id, &*named.pod_uid), (EntityKind::Container, ID, pod), "{path}");
        }
    }

    #[test]
    fn pods_units_and_host_cgroups_are_told_apart() {
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
