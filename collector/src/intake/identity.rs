//! Identity: which entity a cgroup id stands for.
//!
//! What enters: cgroup records (id and path), a scan of the cgroup file systems at the start, and ids found on events. What
//! leaves: entity ids, and descriptions of the entities that the stream has not heard of lately. What must hold: the table is
//! bounded; an id that nobody can name still gets an entity of its own; one thread owns an `Identity`, so there are no locks on
//! the way of an event. What Kubernetes calls an entity is in the shared [`directory`], which is asked when its version moved
//! or a description is due.

pub mod directory;
pub mod exclusion;
mod hierarchies;
mod path;
mod recent;
mod roles;
pub mod scan;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tapio_probes::record::CGROUP_V1_MEMORY;
use tapio_wire::entity_id;
use tapio_wire::event::{Entity, EntityId, EntityKind, Lane, Role};

use directory::Directory;
use exclusion::Exclusion;
pub use hierarchies::{hierarchies, scan_below};
use path::{Named, name_of};
use recent::Recent;
use roles::{Roles, Started};

/// Cgroups known at the same time, at the most.
const CGROUPS_MAX: usize = 65_536;
/// Of those, in a table that only knows paths.
const PATHS_MAX: usize = 4096;
/// How long a removed cgroup is remembered: its container's last events may still be on their way.
const REMEMBERED: Duration = Duration::from_secs(60);
/// How often a description is repeated, so that a replay of the archive's last minutes has it.
const REPEATED: Duration = Duration::from_secs(60);
/// How often an unknown id may cause a scan.
const SCAN_INTERVAL: Duration = Duration::from_secs(1);

/// Stands before the id of a cgroup whose path nobody knows.
const UNNAMED: &str = "cgroup:";

/// How far an event's subject could be told: the one list of outcomes.
pub const OUTCOMES: [&str; 6] = ["container", "container_unnamed", "pod", "unit", "host", "unknown_cgroup"];
const CONTAINER: usize = 0;
const CONTAINER_UNNAMED: usize = 1;
const POD: usize = 2;
const UNIT: usize = 3;
const HOST: usize = 4;
const UNKNOWN_CGROUP: usize = 5;

/// When an entity was described last: on which stream, when, and with which version of its names.
type Description = (u64, Instant, u64);

struct Known {
    entity: EntityId,
    named: Named,
    path: String,
    /// By lane: what one lane's batch carries may arrive after the other's.
    described: [Option<Description>; 2],
    removed: Option<Instant>,
    /// One of [`OUTCOMES`].
    outcome: usize,
    /// The version of its names in the directory, and the directory's when that was looked up.
    names: u64,
    looked_up: u64,
}

impl Known {
    fn look_up(&mut self, directory: &Directory, version: u64) {
        self.looked_up = version;
        match self.named.kind {
            EntityKind::Container => {
                let (names, is_listed) = directory.container_version(self.entity, pod_entity(&self.named));
                self.names = names;
                self.outcome = match (is_listed, names > 0) {
                    (true, _) => CONTAINER,
                    (false, true) => POD,
                    (false, false) => CONTAINER_UNNAMED,
                };
            }
            EntityKind::Pod => self.names = directory.pod_version(self.entity),
            _ => {}
        }
    }
}

impl Known {
    /// Whether it is a container's own cgroup, not one that the container made below it.
    fn is_container_itself(&self) -> bool {
        let above = self.path.rsplit_once('/').map_or("", |(above, _)| above);
        self.named.kind == EntityKind::Container && name_of(above).key != self.named.key
    }

    fn is_excluded(&self, directory: &Directory) -> bool {
        matches!(self.named.kind, EntityKind::Container | EntityKind::Pod)
            && directory.is_excluded(self.entity, pod_entity(&self.named))
    }
}

fn pod_entity(named: &Named) -> EntityId {
    if named.pod_uid.is_empty() { 0 } else { entity_id(EntityKind::Pod, &named.pod_uid) }
}

/// The table of cgroups.
pub struct Identity {
    cgroups: HashMap<u64, Known, foldhash::fast::RandomState>,
    recent: Recent,
    roots: Vec<(PathBuf, u64)>,
    generation: u64,
    scanned: Option<Instant>,
    /// Taken once for each drained batch: the clock is not read for each event.
    now: Instant,
    /// The same in seconds since it began.
    second: u32,
    began: Instant,
    unknown: u64,
    directory: Arc<Directory>,
    /// The directory's version, read once for each drained batch.
    directory_version: u64,
    outcomes: [u32; OUTCOMES.len()],
    exclusion: Option<Exclusion>,
    roles: Roles,
}

/// What a record says of a process, for its [`Role`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Origin<'a> {
    pub pid: u32,
    pub comm: &'a str,
    /// 0 where it is not known, as all below.
    pub start_time_ns: u64,
    pub parent_pid: u32,
    pub parent_cgroup_id: u64,
    pub ns_pid: u32,
    pub ns_level: u32,
}

impl Identity {
    /// A table for the cgroup hierarchies at `roots`, each with the mark that ids of it carry.
    pub fn new(roots: Vec<(PathBuf, u64)>) -> Self {
        Self::with_directory(roots, Arc::default())
    }

    /// The same, with what Kubernetes tells.
    pub fn with_directory(roots: Vec<(PathBuf, u64)>, directory: Arc<Directory>) -> Self {
        let now = Instant::now();
        Self {
            cgroups: HashMap::default(),
            recent: Recent::default(),
            roots,
            generation: 0,
            scanned: None,
            now,
            second: 0,
            began: now,
            unknown: 0,
            directory_version: directory.version(),
            directory,
            outcomes: [0; OUTCOMES.len()],
            exclusion: None,
            roles: Roles::default(),
        }
    }

    /// A table for this machine's hierarchies, filled with what exists.
    pub fn of_this_machine(directory: Arc<Directory>) -> Self {
        let mut identity = Self::with_directory(hierarchies(), directory);
        identity.scan();
        identity.scan_processes();
        identity
    }

    /// Leaves out cgroups of the namespaces that the directory excludes.
    pub fn with_exclusion(mut self, exclusion: Option<Exclusion>) -> Self {
        self.exclusion = exclusion;
        self.exclude();
        self
    }

    /// Whether nothing of a cgroup is to be told in the bulk lane.
    #[inline]
    pub fn is_excluded(&self, id: u64) -> bool {
        self.exclusion.as_ref().is_some_and(|exclusion| exclusion.contains(id))
    }

    fn exclude(&mut self) {
        let Some(exclusion) = &mut self.exclusion else { return };
        for (id, known) in self.cgroups.iter().filter(|(_, known)| known.removed.is_none()) {
            exclusion.set(*id, known.is_excluded(&self.directory));
        }
    }

    /// How many subjects of events had each of [`OUTCOMES`] since this was asked last.
    pub fn take_outcomes(&mut self) -> [u32; OUTCOMES.len()] {
        std::mem::take(&mut self.outcomes)
    }

    /// Cgroups in the table.
    pub fn len(&self) -> usize {
        self.cgroups.len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.cgroups.is_empty()
    }

    /// Ids that no path was found for, so far.
    pub fn unknown(&self) -> u64 {
        self.unknown
    }

    /// Notes the time; to be called before a batch of look-ups.
    pub fn tick(&mut self) {
        self.now = Instant::now();
        self.second = self.second_of(self.now);
        let version = self.directory.version();
        if version != std::mem::replace(&mut self.directory_version, version) {
            self.recent.forget_all();
            self.exclude();
        }
    }

    /// Makes every description due again: the stream is new, or frames that carried some were lost.
    pub fn describe_again(&mut self, generation: u64) {
        if generation != std::mem::replace(&mut self.generation, generation) {
            self.recent.forget_all();
        }
    }

    fn second_of(&self, time: Instant) -> u32 {
        time.saturating_duration_since(self.began).as_secs() as u32
    }

    /// Learns a cgroup's path.
    pub fn learn(&mut self, id: u64, path: &str) {
        if self.cgroups.len() >= CGROUPS_MAX {
            self.forget_removed(Duration::ZERO);
        }
        if self.cgroups.len() >= CGROUPS_MAX {
            // Those that have no name are easily made up again.
            self.cgroups.retain(|_, known| !known.path.starts_with(UNNAMED));
        }
        if self.cgroups.len() >= CGROUPS_MAX
            && let Some(&any) = self.cgroups.keys().next()
        {
            self.cgroups.remove(&any);
            if let Some(exclusion) = &mut self.exclusion {
                exclusion.set(any, false);
            }
        }
        let named = name_of(path);
        let entity = entity_id(named.kind, &named.key);
        let outcome = match named.kind {
            EntityKind::Container => CONTAINER_UNNAMED,
            EntityKind::Pod => POD,
            EntityKind::Unit => UNIT,
            _ if path.starts_with(UNNAMED) => UNKNOWN_CGROUP,
            _ => HOST,
        };
        let mut known = Known {
            entity,
            named,
            path: path.into(),
            described: [None; 2],
            removed: None,
            outcome,
            names: 0,
            looked_up: 0,
        };
        if matches!(known.named.kind, EntityKind::Container | EntityKind::Pod) {
            self.directory.note_cgroup(entity, path);
            known.look_up(&self.directory, self.directory_version);
        }
        if let Some(exclusion) = &mut self.exclusion {
            exclusion.set(id, known.is_excluded(&self.directory));
        }
        self.recent.forget(id);
        self.cgroups.insert(id, known);
    }

    /// A cgroup was made by a process of the cgroup `creator`, and learned. What a container's runtime makes is its pod's,
    /// wherever its cgroup is.
    pub fn begun(&mut self, id: u64, creator: u64) {
        let Some(known) = self.cgroups.get(&id) else { return };
        if !known.is_container_itself() {
            return;
        }
        self.roles.made(known.entity);
        if known.named.pod_uid.is_empty()
            && let Some(holder) = self.cgroups.get(&creator).filter(|holder| !holder.named.pod_uid.is_empty())
        {
            let pod_uid = holder.named.pod_uid.clone();
            self.hold(known.entity, &pod_uid);
        }
    }

    /// A container is held by a pod although its path does not say so.
    fn hold(&mut self, container: EntityId, pod_uid: &str) {
        let (directory, version) = (&self.directory, self.directory_version);
        for (id, known) in self.cgroups.iter_mut().filter(|(_, known)| known.entity == container) {
            pod_uid.clone_into(&mut known.named.pod_uid);
            known.look_up(directory, version);
            known.described = [None; 2];
            self.recent.forget(*id);
        }
    }

    /// A process of this cgroup replaced its image; tells its role in its container.
    pub fn role_of_exec(&mut self, entity: EntityId, cgroup_id: u64, origin: Origin<'_>) -> Role {
        let entity_of = |id| self.cgroups.get(&id).map(|known| known.entity);
        let started = Started {
            pid: origin.pid,
            start_time_ns: origin.start_time_ns,
            parent_pid: origin.parent_pid,
            parent_inside: entity_of(origin.parent_cgroup_id) == Some(entity),
            comm: origin.comm,
            ns_pid: origin.ns_pid,
            ns_level: origin.ns_level,
            in_pod: self.cgroups.get(&cgroup_id).is_some_and(|known| !known.named.pod_uid.is_empty()),
        };
        self.roles.exec(entity, started)
    }

    /// The role of a process in its container.
    pub fn role(&self, entity: EntityId, origin: Origin<'_>) -> Role {
        self.roles.of(entity, origin.pid, origin.parent_pid, origin.comm)
    }

    /// A process died; tells its role in its container.
    pub fn role_of_exit(&mut self, entity: EntityId, origin: Origin<'_>) -> Role {
        self.roles.exit(entity, origin.pid, origin.start_time_ns, origin.parent_pid, origin.comm)
    }

    /// Finds the first processes of containers that ran before, and the pods of those that other containers hold.
    fn scan_processes(&mut self) {
        let mut folders: HashMap<EntityId, (bool, Vec<PathBuf>), foldhash::fast::RandomState> = HashMap::default();
        for (id, known) in self.cgroups.iter().filter(|(_, known)| known.named.kind == EntityKind::Container) {
            let mark = id & CGROUP_V1_MEMORY;
            if let Some((root, _)) = self.roots.iter().find(|(_, of_root)| *of_root == mark)
                && self.roles.is_unknown(known.entity)
            {
                let of_container = folders.entry(known.entity).or_default();
                of_container.0 |= !known.named.pod_uid.is_empty();
                of_container.1.push(root.join(known.path.trim_start_matches('/')));
            }
        }
        for (container, (in_pod, folders)) in folders {
            let Some(first) = scan::first_process(&mut self.roles, container, in_pod, &folders) else { continue };
            if !in_pod && let Some(holder) = scan::holder(first) {
                self.hold(container, &holder.pod_uid);
            }
        }
    }

    /// Notes that a cgroup is gone; it is remembered for a while.
    pub fn remove(&mut self, id: u64) {
        let now = self.now;
        if let Some(known) = self.cgroups.get_mut(&id) {
            known.removed = Some(now);
            if known.is_container_itself() {
                self.roles.removed(known.entity);
            }
            if let Some(exclusion) = &mut self.exclusion {
                exclusion.set(id, false);
            }
        }
        if self.cgroups.len() > CGROUPS_MAX / 2 {
            self.forget_removed(REMEMBERED);
        }
    }

    /// The entity of an event's subject, by its cgroup; its description, and its pod's, go to `described` when due in this lane.
    #[inline]
    pub fn resolve(&mut self, id: u64, lane: Lane, described: &mut Vec<Entity>) -> EntityId {
        let (entity, outcome) = self.resolve_with_outcome(id, lane, described);
        self.outcomes[outcome] += 1;
        entity
    }

    /// Fetches what [`Self::resolve`] needs for a cgroup that is nearly always resolved soon.
    #[inline]
    pub fn fetch(&self, id: u64) {
        self.recent.fetch(id);
    }

    /// As [`Self::resolve`], for others that an event names: they do not count as subjects.
    #[inline]
    pub fn resolve_other(&mut self, id: u64, lane: Lane, described: &mut Vec<Entity>) -> EntityId {
        self.resolve_with_outcome(id, lane, described).0
    }

    #[inline]
    fn resolve_with_outcome(&mut self, id: u64, lane: Lane, described: &mut Vec<Entity>) -> (EntityId, usize) {
        match self.recent.get(id, lane, self.second) {
            Some(known) => known,
            None => self.resolve_by_table(id, lane, described),
        }
    }

    fn resolve_by_table(&mut self, id: u64, lane: Lane, described: &mut Vec<Entity>) -> (EntityId, usize) {
        let (now, generation) = (self.now, self.generation);
        if let Some(known) = self.cgroups.get_mut(&id) {
            if known.looked_up != self.directory_version {
                known.look_up(&self.directory, self.directory_version);
            }
            let slot = &mut known.described[lane as usize];
            let fresh = slot.filter(|(at, when, names)| {
                *at == generation && *names == known.names && now.saturating_duration_since(*when) < REPEATED
            });
            let since = fresh.map_or(now, |(_, when, _)| when);
            if fresh.is_none() {
                *slot = Some((generation, now, known.names));
                describe(known, &self.directory, described);
            }
            let answer = (known.entity, known.outcome);
            // By whole seconds it is due a little too early, and then the table knows it better.
            let due = self.second_of(since + REPEATED);
            self.recent.put(id, lane, answer, due);
            return answer;
        }
        self.resolve_unknown(id, lane, described)
    }

    /// The entity of a cgroup of which only the path is known; otherwise as [`Identity::resolve`]. The same path has the same
    /// entity, whoever resolves it.
    pub fn resolve_path(&mut self, path: &str, lane: Lane, described: &mut Vec<Entity>) -> EntityId {
        // Kernel ids are inode numbers, small, and marked with the highest bit at most: no path's hash is likely to be one.
        let id = entity_id(EntityKind::Host, path);
        if self.cgroups.get(&id).is_none_or(|known| known.path != path) {
            if self.roots.is_empty() && self.cgroups.len() >= PATHS_MAX {
                // Of paths alone nobody tells when they are gone. All that is lost is which were described lately.
                self.cgroups.clear();
            }
            self.learn(id, path);
        }
        self.resolve(id, lane, described)
    }

    /// The path of a cgroup, when known.
    pub fn path(&self, id: u64) -> Option<&str> {
        self.cgroups.get(&id).map(|known| known.path.as_str()).filter(|path| !path.starts_with(UNNAMED))
    }

    #[cold]
    fn resolve_unknown(&mut self, id: u64, lane: Lane, described: &mut Vec<Entity>) -> (EntityId, usize) {
        if !self.roots.is_empty() && self.scanned.is_none_or(|at| self.now.duration_since(at) >= SCAN_INTERVAL) {
            self.scan();
        }
        if !self.cgroups.contains_key(&id) {
            self.unknown += 1;
            self.learn(id, &format!("{UNNAMED}{:x}", id & !CGROUP_V1_MEMORY));
        }
        self.resolve_by_table(id, lane, described)
    }

    fn scan(&mut self) {
        for (root, mark) in self.roots.clone() {
            scan_below(&root, &root, &mut |id, path| {
                let id = id | mark;
                if self.cgroups.get(&id).is_none_or(|known| known.path != path) {
                    self.learn(id, path);
                }
            });
        }
        self.scanned = Some(Instant::now());
    }

    fn forget_removed(&mut self, older_than: Duration) {
        let now = self.now;
        self.cgroups.retain(|_, known| known.removed.is_none_or(|at| now.saturating_duration_since(at) < older_than));
    }
}

fn describe(known: &Known, directory: &Directory, described: &mut Vec<Entity>) {
    let named = &known.named;
    let pod = pod_entity(named);
    let is_container = named.kind == EntityKind::Container;
    let mut entity = Entity {
        parent: if is_container { pod } else { 0 },
        container_id: named.container_id.clone(),
        pod_uid: named.pod_uid.clone(),
        cgroup: known.path.clone(),
        ..Entity::named(named.kind, known.entity, named.name.clone())
    };
    if matches!(named.kind, EntityKind::Container | EntityKind::Pod) {
        directory.complete(&mut entity, described);
    }
    described.push(entity);
    if is_container && pod != 0 {
        let mut entity = Entity {
            pod_uid: named.pod_uid.clone(),
            cgroup: known.path.rsplit_once('/').map_or("", |(pod, _)| pod).into(),
            ..Entity::named(EntityKind::Pod, pod, named.pod_uid.clone())
        };
        directory.complete(&mut entity, described);
        described.push(entity);
    }
}

/// Whether a cgroup's path is that of a container, or below one.
pub fn is_container(path: &str) -> bool {
    name_of(path).kind == EntityKind::Container
}

/// Whether a cgroup's path is that of a container, and not one below it.
pub fn is_container_itself(path: &str) -> bool {
    let (named, above) = (name_of(path), path.rsplit_once('/').map_or("", |(above, _)| above));
    named.kind == EntityKind::Container && name_of(above).key != named.key
}

/// Whether a cgroup's path is that of a pod.
pub fn is_pod(path: &str) -> bool {
    name_of(path).kind == EntityKind::Pod
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const UID: &str = "8f1c2d3e-4a5b-6c7d-8e9f-0a1b2c3d4e5f";

    #[test]
    fn an_entity_is_described_once_and_again_when_the_stream_is_new() {
        let mut identity = Identity::new(Vec::new());
        identity.learn(5, &format!("/kubepods/pod{UID}/{ID}"));
        let mut described = Vec::new();
        let entity = identity.resolve(5, Lane::Bulk, &mut described);
        assert_eq!(described.len(), 2, "the container and its pod");
        assert_eq!(described[0].parent, described[1].id);
        assert_eq!(identity.resolve(5, Lane::Bulk, &mut described), entity);
        assert_eq!(described.len(), 2);
        identity.describe_again(1);
        identity.resolve(5, Lane::Bulk, &mut described);
        assert_eq!(described.len(), 4);
        identity.resolve(5, Lane::Lethal, &mut described);
        assert_eq!(described.len(), 6, "each lane's frames must stand by themselves");
    }

    #[test]
    fn a_path_has_the_entity_of_its_cgroup_and_paths_alone_are_bounded() {
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
    fn a_container_that_a_pods_container_made_is_the_pods_wherever_its_cgroup_is() {
        let mut identity = Identity::new(Vec::new());
        identity.learn(5, &format!("/kubepods/pod{UID}/{ID}"));
        let inner = "f".repeat(64);
        let resolve = |identity: &mut Identity, id| {
            let mut described = Vec::new();
            identity.describe_again(id);
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
    fn a_removed_cgroup_is_remembered_and_an_unknown_one_gets_an_entity() {
        let mut identity = Identity::new(Vec::new());
        identity.learn(5, "/a.service");
        identity.remove(5);
        assert_eq!(identity.path(5), Some("/a.service"));
        let mut described = Vec::new();
        let unknown = identity.resolve(6, Lane::Bulk, &mut described);
        assert_ne!(unknown, identity.resolve(7, Lane::Bulk, &mut described));
        assert_eq!(identity.unknown(), 2);
    }
}
