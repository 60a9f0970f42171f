//! Names as kubelet and containerd give them: pod uids, container ids and the cgroup path that is made of both.

use crate::random::Random;

/// A container of a pod, by the names that end up in its cgroup's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerName {
    /// `xxxxxxxx-xxxx-4xxx-xxxx-xxxxxxxxxxxx`
    pub pod_uid: String,
    /// 64 hexadecimal digits.
    pub container_id: String,
}

impl ContainerName {
    /// A container of a new pod.
    pub fn random(random: &mut Random) -> Self {
        Self { pod_uid: pod_uid(random), container_id: container_id(random) }
    }

    /// Names another container of the same pod.
    pub fn sibling(&self, random: &mut Random) -> Self {
        Self { pod_uid: self.pod_uid.clone(), container_id: container_id(random) }
    }

    /// The pod's cgroup in the systemd naming, for a burstable pod, without a slash in front.
    pub fn pod_path(&self) -> String {
        let uid = self.pod_uid.replace('-', "_");
        format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice")
    }

    /// The last component of the container's cgroup.
    pub fn scope(&self) -> String {
        format!("cri-containerd-{}.scope", self.container_id)
    }

    /// The container's cgroup, without a slash in front.
    pub fn path(&self) -> String {
        format!("{}/{}", self.pod_path(), self.scope())
    }
}

/// How deep a container's cgroup is below the root.
pub const CONTAINER_LEVEL: u32 = 4;

fn pod_uid(random: &mut Random) -> String {
    let (high, low) = (random.next_u64(), random.next_u64());
    format!(
        "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xfff,
        0x8000 | low >> 48 & 0x3fff,
        low & 0xffff_ffff_ffff
    )
}

fn container_id(random: &mut Random) -> String {
    (0..4).map(|_| format!("{:016x}", random.next_u64())).collect()
}

#[cfg(test)]
mod tests {
    use super::{CONTAINER_LEVEL, ContainerName};
    use crate::random::Random;
    use tapio_probes::record::CGROUP_PATH_BYTES;

    #[test]
    fn cgroup_paths_are_named_as_kubelet_does() {
        let name =
            ContainerName { pod_uid: "0a1b2c3d-1111-4222-8333-444455556666".into(), container_id: "ab".repeat(32) };
        assert_eq!(
            name.path(),
            format!(
                "kubepods.slice/kubepods-burstable.slice/\
                 kubepods-burstable-pod0a1b2c3d_1111_4222_8333_444455556666.slice/\
                 cri-containerd-{}.scope",
                "ab".repeat(32)
            )
        );
        assert_eq!(name.path().split('/').count() as u32, CONTAINER_LEVEL);
        assert!(name.path().len() + 2 <= CGROUP_PATH_BYTES);
    }

    #[test]
    fn random_names_have_the_right_shape_and_differ() {
        let mut random = Random::new(1);
        let (first, second) = (ContainerName::random(&mut random), ContainerName::random(&mut random));
        assert_ne!(first, second);
        for name in [&first, &second] {
            assert_eq!(name.pod_uid.len(), 36);
            assert_eq!(name.container_id.len(), 64);
            let groups: Vec<usize> = name.pod_uid.split('-').map(str::len).collect();
            assert_eq!(groups, [8, 4, 4, 4, 12]);
            assert_eq!(&name.pod_uid[14..15], "4");
        }
        assert_eq!(first.sibling(&mut random).pod_uid, first.pod_uid);
    }
}
