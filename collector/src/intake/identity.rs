//! Identity: which entity a cgroup id stands for.
//!
//! What enters: cgroup records (id and path), a scan of the cgroup file systems at the start, and ids found on events.
//! What leaves: entity ids, and descriptions of the entities that the stream has not described lately. What must hold:
//! the table is bounded. An id that nobody can name still gets an entity of its own. One thread owns an `Identity`, so
//! an event's way has no locks. What Kubernetes calls an entity is in the shared [`directory`], which is asked when its
//! version moved or a description is due.

pub mod directory;
pub mod exclusion;
mod hierarchies;
mod known;
mod path;
mod recent;
mod roles;
mod room;
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
pub use known::OUTCOMES;
use known::{CONTAINER_UNNAMED, HOST, Known, POD, UNIT, UNKNOWN_CGROUP, describe};
use path::name_of;
use recent::Recent;
use roles::{Roles, Started};
use room::{Below, LOOK_INTERVAL, Place};

/// Cgroups known at the same time, at the most.
const CGROUPS_MAX: usize = 65_536;
/// Maximum number of entities in a table that only knows paths.
const PATHS_MAX: usize = 4096;
/// How long a removed cgroup is remembered: its container's last events may still be on their way.
const REMEMBERED: Duration = Duration::from_secs(60);
/// How often a description is repeated, so that a replay of the archive's last minutes has it.
const REPEATED: Duration = Duration::from_secs(60);
/// What had a lethal event within this time is described at once on a new stream.
const RECENT: Duration = Duration::from_secs(600);
/// Entities that are described at once on a new stream, at the most.
const DESCRIBED_AGAIN_MAX: usize = 1_024;
/// How often an unknown id may cause a scan.
const SCAN_INTERVAL: Duration = Duration::from_secs(1);

/// Stands before the id of a cgroup whose path nobody knows.
const UNNAMED: &str = "cgroup:";

/// The table of cgroups.
pub struct Identity {
    cgroups: HashMap<u64, Known, foldhash::fast::RandomState>,
    below: Below,
    recent: Recent,
    roots: Vec<(PathBuf, u64)>,
    generation: u64,
    scanned: Option<Instant>,
    /// When the whole table was looked through.
    looked_through: Instant,
    /// Taken once for each drained batch: the clock is not read for each event.
    now: Instant,
    /// `now` in whole seconds since `began`.
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

    /// Creates an identity with names from Kubernetes.
    pub fn with_directory(roots: Vec<(PathBuf, u64)>, directory: Arc<Directory>) -> Self {
        let now = Instant::now();
        Self {
            cgroups: HashMap::default(),
            below: Below::default(),
            recent: Recent::default(),
            roots,
            generation: 0,
            scanned: None,
            looked_through: now.checked_sub(LOOK_INTERVAL).unwrap_or(now),
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

    /// Whether bulk events of a cgroup are left out.
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

    /// Makes every description due again: the stream is new, or frames that carried some were lost. Describes at once what had
    /// lethal events lately: they may be on their way to a server that knows no name for it, and nothing more may come of it.
    pub fn describe_again(&mut self, generation: u64, described: &mut Vec<Entity>) {
        if generation == std::mem::replace(&mut self.generation, generation) {
            return;
        }
        self.recent.forget_all();
        let now = self.now;
        let latest = |known: &Known| known.described[Lane::Lethal as usize].map(|(_, when, _)| when);
        let is_recent = |when: &Instant| now.saturating_duration_since(*when) < RECENT;
        let recent = self.cgroups.iter().filter_map(|(id, known)| Some((latest(known).filter(is_recent)?, *id)));
        let mut recent: Vec<(Instant, u64)> = recent.collect();
        recent.sort_unstable_by(|a, b| b.cmp(a));
        for (_, id) in recent.into_iter().take(DESCRIBED_AGAIN_MAX) {
            let Some(known) = self.cgroups.get_mut(&id) else { continue };
            known.described[Lane::Lethal as usize] = Some((generation, now, known.names));
            describe(known, &self.directory, described);
        }
    }

    fn second_of(&self, time: Instant) -> u32 {
        time.saturating_duration_since(self.began).as_secs() as u32
    }

    /// Learns a cgroup's path.
    pub fn learn(&mut self, id: u64, path: &str) {
        if self.cgroups.len() >= CGROUPS_MAX {
            self.make_room();
        }
        if self.cgroups.len() >= CGROUPS_MAX
            && let Some(&any) = self.cgroups.keys().next()
        {
            self.forget(any);
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
            place: Place::of(&named, path),
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
        let holder = known.place.holder;
        let was = self.cgroups.insert(id, known).and_then(|was| was.place.holder);
        if let Some(holder) = holder.filter(|_| holder != was) {
            self.below.push(holder, id);
            self.bound(holder, id);
        }
    }

    /// A cgroup was made by a process of the cgroup `creator`, and learned. What a container's runtime makes is its pod's,
    /// wherever its cgroup is.
    pub fn begun(&mut self, id: u64, creator: u64) {
        let Some(known) = self.cgroups.get(&id) else { return };
        if !known.place.is_container_itself {
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

    /// A process of this cgroup replaced its image. Returns its role in its container.
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

    /// A process died. Returns its role in its container.
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
            if known.place.is_container_itself {
                self.roles.removed(known.entity);
            }
            if let Some(exclusion) = &mut self.exclusion {
                exclusion.set(id, false);
            }
        }
        if self.cgroups.len() > CGROUPS_MAX / 2 {
            self.make_room();
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

    /// Resolves another entity that an event names, as [`Self::resolve`]; it does not count as a subject.
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
                // Nothing reports that a path is gone. All that is lost is which were described recently.
                self.cgroups.clear();
                self.below = Below::default();
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
mod tests;
