//! A lease on a remote archive: one program at a time changes what is there.
//!
//! What enters: who wants to work, and what on. What leaves: a term, the next higher number. What must hold: of two that ask at a time
//! one gets it, since an object is created only where none is. A holder that dies loses it after [`LASTS`]; one whose term is over
//! learns that when it renews it, which it does every minute while it works on segments.

use std::time::Duration;

use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use serde::{Deserialize, Serialize};
use tapio_wire::program::clock::now_ns;

use super::store::Store;
use super::{RemoteError, names, put};

/// How long a lease holds without being renewed.
pub(super) const LASTS: Duration = Duration::from_secs(600);
const FOLDER: [&str; 2] = ["locks", "maintenance"];
const DIGITS: usize = 20;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Term {
    holder: String,
    /// What the holder does.
    what: String,
    /// 0 once it is given back.
    until_ns: u64,
}

/// A lease that is held.
#[derive(Debug)]
pub(super) struct Lease {
    term: u64,
    content: Term,
    renewed_ns: u64,
}

fn folder(store: &Store) -> Path {
    FOLDER.into_iter().fold(store.root.clone(), |path, part| path.join(part))
}

fn path(store: &Store, term: u64) -> Path {
    folder(store).join(format!("{term:0DIGITS$}.json"))
}

/// The terms that are there, in order.
async fn terms(store: &Store) -> Result<Vec<u64>, RemoteError> {
    let failed = |source| RemoteError::Object { name: store.url.clone(), source };
    let mut objects = store.objects.list(Some(&folder(store)));
    let mut terms = Vec::new();
    while let Some(object) = objects.try_next().await.map_err(failed)? {
        terms.extend(object.location.filename().and_then(names::manifest_number));
    }
    terms.sort_unstable();
    Ok(terms)
}

impl Lease {
    /// Takes the next term.
    ///
    /// # Errors
    /// [`RemoteError::Busy`] while somebody else holds one.
    pub async fn take(store: &Store, holder: &str, what: &str) -> Result<Self, RemoteError> {
        let known = terms(store).await?;
        let last = known.last().copied().unwrap_or(0);
        if last > 0
            && let Some(held) = read(store, last).await?
            && held.until_ns > now_ns()
        {
            return Err(RemoteError::Busy {
                holder: held.holder,
                what: held.what,
                until: names::moment(held.until_ns),
            });
        }
        let now = now_ns();
        let until_ns = now + LASTS.as_nanos() as u64;
        let content = Term { holder: holder.to_owned(), what: what.to_owned(), until_ns };
        let lease = Self { term: last + 1, content, renewed_ns: now };
        if !put::create(store, &path(store, lease.term), lease.payload()).await? {
            let until = names::moment(until_ns);
            return Err(RemoteError::Busy { holder: "somebody else".into(), what: what.to_owned(), until });
        }
        for old in known {
            // Best effort: the highest one counts.
            let _ = store.objects.delete(&path(store, old)).await;
        }
        Ok(lease)
    }

    /// Renews it where that is due, and fails where somebody else has a later term.
    pub async fn keep(&mut self, store: &Store) -> Result<(), RemoteError> {
        let now = now_ns();
        if now.saturating_sub(self.renewed_ns) < LASTS.as_nanos() as u64 / 10 {
            return Ok(());
        }
        if terms(store).await?.last() != Some(&self.term) {
            return Err(RemoteError::LeaseLost);
        }
        self.content.until_ns = now + LASTS.as_nanos() as u64;
        self.put(store).await?;
        self.renewed_ns = now;
        Ok(())
    }

    /// Gives it back.
    pub async fn release(mut self, store: &Store) -> Result<(), RemoteError> {
        self.content.until_ns = 0;
        self.put(store).await
    }

    fn payload(&self) -> PutPayload {
        PutPayload::from(serde_json::to_vec_pretty(&self.content).unwrap_or_default())
    }

    async fn put(&self, store: &Store) -> Result<(), RemoteError> {
        let path = path(store, self.term);
        let put = store.objects.put(&path, self.payload()).await;
        put.map(drop).map_err(|source| RemoteError::Object { name: path.to_string(), source })
    }
}

/// What a term says; `None` where it is gone or is no term.
async fn read(store: &Store, term: u64) -> Result<Option<Term>, RemoteError> {
    let path = path(store, term);
    let failed = |source| RemoteError::Object { name: path.to_string(), source };
    match store.objects.get(&path).await {
        Ok(found) => Ok(serde_json::from_slice(&found.bytes().await.map_err(failed)?).ok()),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remote::RemoteSection;

    #[tokio::test]
    async fn one_holds_a_lease_until_it_ends_or_is_over() {
        let dir = tempfile::tempdir().expect("a folder");
        let section = RemoteSection { url: format!("file://{}", dir.path().display()), ..RemoteSection::default() };
        let store = Store::open(&section).expect("a folder");
        let mut first = Lease::take(&store, "a", "erase").await.expect("free");
        let refused = Lease::take(&store, "b", "another job").await.expect_err("held");
        assert!(refused.to_string().contains("a holds it") && refused.to_string().contains("erase"), "{refused}");
        first.keep(&store).await.expect("held");
        first.release(&store).await.expect("given back");
        let mut second = Lease::take(&store, "b", "another job").await.expect("free");
        assert_eq!(second.term, 2);
        // It dies, and its time is over.
        second.content.until_ns = 1;
        second.put(&store).await.expect("written");
        let third = Lease::take(&store, "c", "another job").await.expect("over");
        assert_eq!(third.term, 3);
        second.renewed_ns = 0;
        assert!(matches!(second.keep(&store).await, Err(RemoteError::LeaseLost)));
    }
}
