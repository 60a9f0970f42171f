//! What is in a remote archive, from the names of its objects alone.

use std::collections::BTreeMap;

use futures::TryStreamExt;
use object_store::ObjectStore;
use object_store::path::Path;

use super::RemoteError;
use super::names::{self, SegmentName};
use super::store::Store;

/// Label of the server that owns segments.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Label {
    pub cluster: String,
    pub server: String,
    pub life: String,
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.cluster, self.server, self.life)
    }
}

/// A segment with its manifest.
#[derive(Clone, Debug)]
pub struct Listed {
    pub name: SegmentName,
    pub path: Path,
    pub bytes: u64,
}

/// The segments of one archive directory, by number. Objects without a manifest are none.
pub type Segments = BTreeMap<u64, Listed>;

/// Lists what is below a path.
pub async fn list(store: &Store, below: &Path) -> Result<BTreeMap<Label, Segments>, RemoteError> {
    let failed = |source| RemoteError::Object { name: store.url.clone(), source };
    let mut objects = store.objects.list(Some(below));
    let mut segments: BTreeMap<Label, BTreeMap<u64, Vec<Listed>>> = BTreeMap::new();
    let mut manifests: BTreeMap<(Label, u64), ()> = BTreeMap::new();
    while let Some(object) = objects.try_next().await.map_err(failed)? {
        let parts: Vec<String> = object.location.parts().map(|part| part.as_ref().to_owned()).collect();
        let [.., cluster, server, life, file] = parts.as_slice() else { continue };
        if !names::is_life(life) {
            continue;
        }
        let label = || Label { cluster: cluster.clone(), server: server.clone(), life: life.clone() };
        if let Some(number) = names::manifest_number(file) {
            manifests.insert((label(), number), ());
        } else if let Some(name) = SegmentName::parse(file) {
            let listed = Listed { name, path: object.location, bytes: object.size };
            segments.entry(label()).or_default().entry(listed.name.number).or_default().push(listed);
        }
    }
    let mut whole = BTreeMap::new();
    for (label, numbers) in segments {
        let mut of_life = Segments::new();
        for (number, mut found) in numbers {
            if !manifests.contains_key(&(label.clone(), number)) {
                continue;
            }
            let listed = match found.pop() {
                Some(only) if found.is_empty() => only,
                Some(last) => {
                    found.push(last);
                    chosen(store, &label, below, number, found).await?
                }
                None => continue,
            };
            of_life.insert(number, listed);
        }
        if !of_life.is_empty() {
            whole.insert(label, of_life);
        }
    }
    Ok(whole)
}

/// Those with events between two moments: a run without holes, so that what its snapshots count is in it.
pub fn of_time(segments: Segments, (since_ns, until_ns): (u64, u64)) -> Segments {
    let is_of_time = |listed: &Listed| {
        // Names have whole seconds.
        listed.name.first_ns <= until_ns && listed.name.last_ns.saturating_add(1_000_000_000) >= since_ns
    };
    let mut numbers = segments.iter().filter(|(_, listed)| is_of_time(listed)).map(|(&number, _)| number);
    let Some(first) = numbers.next() else { return Segments::new() };
    let last = numbers.next_back().unwrap_or(first);
    segments.into_iter().filter(|(number, _)| (first..=last).contains(number)).collect()
}

/// Chooses among several objects of one number the one that the manifest names: the others' uploads were never
/// completed.
async fn chosen(
    store: &Store,
    label: &Label,
    below: &Path,
    number: u64,
    found: Vec<Listed>,
) -> Result<Listed, RemoteError> {
    let wanted = manifest(store, &found[0].path, number).await?.object;
    let is_wanted = |listed: &Listed| listed.name.file() == wanted;
    found.into_iter().find(is_wanted).ok_or_else(|| RemoteError::Damaged {
        name: format!("{label}/{}", names::manifest_file(number)),
        problem: format!("{wanted} is not there below {below}"),
    })
}

/// Reads the manifest that lies beside a segment.
pub async fn manifest(store: &Store, segment: &Path, number: u64) -> Result<super::manifest::Manifest, RemoteError> {
    let mut parts: Vec<_> = segment.parts().map(|part| part.as_ref().to_owned()).collect();
    parts.pop();
    let path = Path::from_iter(parts).join(names::manifest_file(number));
    let failed = |source| RemoteError::Object { name: path.to_string(), source };
    let found = store.objects.get_opts(&path, object_store::GetOptions::default()).await.map_err(failed)?;
    let bytes = found.bytes().await.map_err(failed)?;
    super::manifest::Manifest::parse(&bytes)
        .map_err(|problem| RemoteError::Manifest { name: path.to_string(), problem })
}
