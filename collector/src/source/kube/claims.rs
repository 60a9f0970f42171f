//! Claims for storage that pods without a node wait for.
//!
//! In: claims, and Events about them. Out: for such a pod, which of its claims is not bound and what was said of it last.
//! What must hold: bounded; a claim that is gone is forgotten.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::objects::{Event, Pod, Volume};

/// Claims remembered.
const CLAIMS_MAX: usize = 16_384;

/// The namespace and name of a claim.
type Key = (String, String);

#[derive(Default)]
struct Known {
    phase: String,
    /// Reason and message of the last Event, a warning if there was one.
    said: Option<(bool, String, String)>,
}

/// What is known of claims, shared by those who watch them and those who watch pods.
#[derive(Clone, Default)]
pub struct KnownClaims(Arc<Mutex<HashMap<Key, Known>>>);

impl KnownClaims {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, namespace: &str, name: &str, change: impl FnOnce(&mut Known)) {
        let mut known = self.lock();
        let key = (namespace.to_owned(), name.to_owned());
        if known.len() < CLAIMS_MAX || known.contains_key(&key) {
            change(known.entry(key).or_default());
        }
    }

    /// A claim is in this phase.
    pub fn seen(&self, namespace: &str, name: &str, phase: &str) {
        self.change(namespace, name, |known| {
            phase.clone_into(&mut known.phase);
            if phase == "Bound" {
                known.said = None;
            }
        });
    }

    /// A claim is gone.
    pub fn gone(&self, namespace: &str, name: &str) {
        self.lock().remove(&(namespace.to_owned(), name.to_owned()));
    }

    /// Somebody said something of it. That it is waited for takes no warning away.
    pub fn said(&self, event: &Event) {
        let (about, is_warning) = (&event.involved_object, event.r#type == "Warning");
        if about.kind != "PersistentVolumeClaim" {
            return;
        }
        self.change(&about.namespace, &about.name, |known| {
            if is_warning || known.said.as_ref().is_none_or(|(was_warning, _, _)| !was_warning) {
                known.said = Some((is_warning, event.reason.clone(), event.message.clone()));
            }
        });
    }

    /// Of these claims those that are known and not bound: name, phase, and reason and message of what was said last.
    pub fn unbound(&self, namespace: &str, names: &[String]) -> Vec<[String; 4]> {
        let known = self.lock();
        let of = |name: &String| {
            let claim = known.get(&(namespace.to_owned(), name.clone()))?;
            if matches!(&*claim.phase, "" | "Bound") {
                return None;
            }
            let (reason, message) =
                claim.said.as_ref().map_or(("", ""), |(_, reason, message)| (&**reason, &**message));
            Some([&**name, &*claim.phase, reason, message].map(str::to_owned))
        };
        names.iter().filter_map(of).collect()
    }
}

/// The claims that a pod mounts, by name.
pub fn claims_of(pod: &Pod) -> Vec<String> {
    let claim = |volume: &Volume| match &*volume.persistent_volume_claim.claim_name {
        // Made for the pod, and named after it.
        "" if volume.ephemeral.is_some() => Some(format!("{}-{}", pod.metadata.name, volume.name)),
        "" => None,
        name => Some(name.to_owned()),
    };
    pod.spec.volumes.iter().filter_map(claim).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T: serde::de::DeserializeOwned>(object: serde_json::Value) -> T {
        serde_json::from_value(object).expect("an object")
    }

    fn said(claims: &KnownClaims, kind: &str, reason: &str) {
        claims.said(&read(serde_json::json!({
            "involvedObject": {"kind": "PersistentVolumeClaim", "namespace": "shop", "name": "data"},
            "type": kind, "reason": reason, "message": "what was said",
        })));
    }

    #[test]
    fn an_unbound_claim_is_known_with_its_last_warning() {
        let (claims, names) = (KnownClaims::default(), ["data".to_owned(), "other".to_owned()]);
        said(&claims, "Normal", "ExternalProvisioning");
        assert_eq!(claims.unbound("shop", &names), [[""; 4]; 0], "nobody has listed it yet");
        claims.seen("shop", "data", "Pending");
        let expected = |reason: &str| [["data", "Pending", reason, "what was said"].map(str::to_owned)];
        assert_eq!(claims.unbound("shop", &names), expected("ExternalProvisioning"));
        for (kind, reason) in [("Warning", "ProvisioningFailed"), ("Normal", "ExternalProvisioning")] {
            said(&claims, kind, reason);
            assert_eq!(claims.unbound("shop", &names), expected("ProvisioningFailed"));
        }
        assert_eq!(claims.unbound("blog", &names), [[""; 4]; 0]);
        claims.seen("shop", "data", "Bound");
        assert_eq!(claims.unbound("shop", &names), [[""; 4]; 0]);
        claims.seen("shop", "data", "Lost");
        assert_eq!(claims.unbound("shop", &names)[0], ["data", "Lost", "", ""]);
        claims.gone("shop", "data");
        assert_eq!(claims.unbound("shop", &names), [[""; 4]; 0]);
    }

    #[test]
    fn named_and_ephemeral_claims_of_a_pod_are_found() {
        let pod = read(serde_json::json!({
            "metadata": {"name": "web-0", "namespace": "shop"},
            "spec": {"volumes": [
                {"name": "data", "persistentVolumeClaim": {"claimName": "data-web-0"}},
                {"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}},
                {"name": "config", "configMap": {"name": "settings"}},
            ]},
        }));
        assert_eq!(claims_of(&pod), ["data-web-0", "web-0-scratch"]);
    }
}
