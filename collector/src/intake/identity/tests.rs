use super::*;

const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const UID: &str = "8f1c2d3e-4a5b-6c7d-8e9f-0a1b2c3d4e5f";

#[test]
fn an_entity_is_described_once_on_each_stream() {
    let mut identity = Identity::new(Vec::new());
    identity.learn(5, &format!("/kubepods/pod{UID}/{ID}"));
    let mut described = Vec::new();
    let entity = identity.resolve(5, Lane::Bulk, &mut described);
    assert_eq!(described.len(), 2, "the container and its pod");
    assert_eq!(described[0].parent, described[1].id);
    assert_eq!(identity.resolve(5, Lane::Bulk, &mut described), entity);
    assert_eq!(described.len(), 2);
    identity.describe_again(1, &mut described);
    assert_eq!(described.len(), 2, "it had no lethal event");
    identity.resolve(5, Lane::Bulk, &mut described);
    assert_eq!(described.len(), 4);
    identity.resolve(5, Lane::Lethal, &mut described);
    assert_eq!(described.len(), 6, "each lane's frames must stand by themselves");
}

/// Its death may be on its way to another server, and nothing more comes of it.
#[test]
fn what_died_lately_is_described_on_a_new_stream() {
    let mut identity = Identity::new(Vec::new());
    identity.learn(5, &format!("/kubepods/pod{UID}/{ID}"));
    let entity = identity.resolve(5, Lane::Lethal, &mut Vec::new());
    identity.remove(5);
    for (generation, expected) in [(0, 0), (1, 2), (1, 0), (2, 2)] {
        let mut described = Vec::new();
        identity.describe_again(generation, &mut described);
        assert_eq!(described.len(), expected, "the container and its pod, once on each stream");
        assert!(described.first().is_none_or(|first| first.id == entity));
    }
}

#[test]
fn a_path_has_its_cgroups_entity_and_paths_are_bounded() {
    let mut described = Vec::new();
    let mut of_kernel = Identity::new(Vec::new());
    of_kernel.learn(5, "/system.slice/web.service");
    let entity = of_kernel.resolve(5, Lane::Lethal, &mut described);
    let mut of_paths = Identity::new(Vec::new());
    for number in 0..3 * PATHS_MAX {
        of_paths.resolve_path(&format!("/system.slice/run-{number}.service"), Lane::Lethal, &mut Vec::new());
        assert!(of_paths.len() <= PATHS_MAX);
    }
    assert_eq!(of_paths.resolve_path("/system.slice/web.service", Lane::Lethal, &mut described), entity);
    assert_eq!((described.len(), &described[1]), (2, &described[0]));
}

#[test]
fn a_container_made_by_a_pods_container_is_the_pods() {
    let mut identity = Identity::new(Vec::new());
    identity.learn(5, &format!("/kubepods/pod{UID}/{ID}"));
    let inner = "f".repeat(64);
    let resolve = |identity: &mut Identity, id| {
        let mut described = Vec::new();
        identity.describe_again(id, &mut Vec::new());
        identity.resolve(id, Lane::Lethal, &mut described);
        described[0].pod_uid.clone()
    };
    identity.learn(6, &format!("/docker/{inner}"));
    identity.begun(6, 5);
    assert_eq!(resolve(&mut identity, 6), UID);
    identity.learn(7, &format!("/docker/{}", "e".repeat(64)));
    identity.begun(7, 1);
    assert_eq!(resolve(&mut identity, 7), "", "the node's own daemon made it");
    // What the container makes below itself is no container that begins.
    identity.learn(8, &format!("/docker/{inner}/init.scope"));
    identity.begun(8, 5);
    let origin = Origin { pid: 9, comm: "sh", ..Origin::default() };
    let entity = identity.resolve(6, Lane::Lethal, &mut Vec::new());
    assert_eq!(identity.role_of_exec(entity, 6, origin), Role::First);
}

#[test]
fn removed_cgroups_are_remembered_and_unknown_ones_get_an_entity() {
    let mut identity = Identity::new(Vec::new());
    identity.learn(5, "/a.service");
    identity.remove(5);
    assert_eq!(identity.path(5), Some("/a.service"));
    let mut described = Vec::new();
    let unknown = identity.resolve(6, Lane::Bulk, &mut described);
    assert_ne!(unknown, identity.resolve(7, Lane::Bulk, &mut described));
    assert_eq!(identity.unknown(), 2);
}

/// A flood's removals are left out: nothing says that its cgroups went.
#[test]
fn a_full_table_keeps_the_cgroups_that_are_there() {
    let root = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(root.path().join("web")).expect("a cgroup");
    let mut identity = Identity::new(vec![(root.path().to_owned(), 0)]);
    identity.learn(1, "/web");
    for id in 2..=CGROUPS_MAX as u64 {
        // Of so many folders that none has too many.
        identity.learn(id, &format!("/{}/gone", id % 64));
    }
    assert_eq!(identity.cgroups.len(), CGROUPS_MAX);
    identity.learn(0, "/new");
    assert_eq!(identity.cgroups.len(), 2, "what is there, and what is new");
    assert!(identity.cgroups.contains_key(&1));
}

/// A container that makes cgroups without end, whose removals are left out too.
#[test]
fn a_flood_of_cgroups_takes_no_other_containers_place() {
    let root = tempfile::tempdir().expect("a directory");
    std::fs::create_dir_all(root.path().join("app.slice/kept")).expect("a cgroup");
    let mut identity = Identity::new(vec![(root.path().to_owned(), 0)]);
    let container = |number: u64| format!("/kubepods/pod{UID}/{number:064x}");
    identity.learn(1, "/app.slice/kept");
    identity.learn(2, &container(2));
    let flooding = identity.resolve(2, Lane::Lethal, &mut Vec::new());
    let (mut id, mut others) = (1_000, Vec::new());
    for number in 3..100 {
        identity.learn(number, &container(number));
        others.push((number, identity.resolve(number, Lane::Lethal, &mut Vec::new())));
        for _ in 0..2 * CGROUPS_MAX / 97 {
            id += 1;
            identity.learn(id, &format!("{}/flood/{id}", container(2)));
            // One that looks like a container or a pod does not help it.
            let like_pod = format!("pod{UID}/{id}");
            let likes = [format!("{id:064x}"), format!("{id:064x}/x"), like_pod, format!("lxc/{id}/x")];
            for (place, like) in likes.into_iter().enumerate() {
                identity.learn(id + ((1 + place as u64) << 40), &format!("{}/{like}", container(2)));
            }
        }
    }
    assert!(identity.len() < 3 * room::BELOW_MAX, "{}", identity.len());
    // Nothing is answered from the small cache in front.
    identity.recent.forget_all();
    for (number, entity) in others {
        assert_eq!(identity.resolve(number, Lane::Lethal, &mut Vec::new()), entity, "container {number}");
    }
    assert_eq!(identity.resolve(id, Lane::Lethal, &mut Vec::new()), flooding);
    for number in 0..3 * room::BELOW_MAX as u64 {
        identity.learn((1 << 50) + number, &format!("/app.slice/{number}"));
    }
    assert_eq!(identity.path(1), Some("/app.slice/kept"), "it is there, and the others are not");
    assert_eq!(identity.unknown(), 0);
}
