//! Servers beside this one, where no log joins them.
//!
//! In: the name that stands for all servers, `cluster.headless`. Out: the others' addresses, to the store of findings and to the
//! program's log. What must hold: a lookup that fails now and then changes nothing, and this machine's own addresses are no others.

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::lookup_host;
use tokio::sync::watch;

use crate::cluster::ClusterSection;
use crate::findings::FindingStore;
use crate::vitals::Vitals;

/// How often the name is looked up.
const INTERVAL: Duration = Duration::from_secs(30);
/// Lookups that fail one after the other until what was known is forgotten.
const FAILURES_MAX: u32 = 10;
/// Others that are named at the most.
const NAMED_MAX: usize = 16;

/// Looks for other servers from time to time until `ended`, where no log joins them. `port` is for a name without one.
pub fn watch(
    config: &ClusterSection,
    port: u16,
    store: &Arc<FindingStore>,
    vitals: &Vitals,
    mut ended: watch::Receiver<bool>,
) {
    let Some(headless) = config.headless.clone().filter(|_| !config.is_on()) else { return };
    let (store, remarked) = (Arc::clone(store), Arc::clone(store));
    vitals.remark(move || remark(&remarked));
    tokio::spawn(async move {
        let mut failures = 0;
        loop {
            match others(&headless, port).await {
                Ok(others) => {
                    failures = 0;
                    note(&headless, &store, others);
                }
                Err(error) => {
                    failures += 1;
                    if failures == 1 {
                        tracing::warn!(%error, headless, "cannot look up cluster.headless");
                    } else if failures == FAILURES_MAX {
                        note(&headless, &store, Vec::new());
                    }
                }
            }
            tokio::select! {
                _ = ended.wait_for(|end| *end) => return,
                () = tokio::time::sleep(INTERVAL) => {}
            }
        }
    });
}

/// The addresses behind the name that are not this machine's.
async fn others(headless: &str, port: u16) -> io::Result<Vec<String>> {
    let has_port = headless.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let name = if has_port { headless.to_owned() } else { format!("{headless}:{port}") };
    let addresses = lookup_host(&name).await?;
    let mut found: Vec<String> =
        addresses.filter(|address| !is_own(address.ip())).map(|address| address.to_string()).collect();
    found.sort_unstable();
    found.dedup();
    found.truncate(NAMED_MAX);
    Ok(found)
}

/// Only an address of this machine can be bound to. Where it is not known, nobody is accused.
fn is_own(address: IpAddr) -> bool {
    !matches!(UdpSocket::bind((address, 0)), Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable)
}

fn note(headless: &str, store: &FindingStore, others: Vec<String>) {
    let text = others.join(", ");
    if !store.set_unjoined(others) {
        return;
    }
    if !text.is_empty() {
        tracing::warn!(
            headless,
            others = text,
            "other servers run, and no log joins them: each explains only what its own nodes report; set cluster.url"
        );
    } else {
        tracing::info!(headless, "this server is the only one again");
    }
}

/// What `/readyz` remarks of them.
fn remark(store: &FindingStore) -> Option<String> {
    let others = store.unjoined().join(", ");
    (!others.is_empty()).then(|| format!("other servers run, and no log joins them (cluster.url is empty): {others}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_addresses_of_other_machines_are_others() {
        let of = async |name| others(name, 9090).await.expect("looked up");
        assert_eq!(of("127.0.0.1").await, [""; 0]);
        assert_eq!(of("192.0.2.7").await, ["192.0.2.7:9090"]);
        assert_eq!(of("192.0.2.7:99").await, ["192.0.2.7:99"]);
        others("no such name", 9090).await.expect_err("it is none");
    }

    #[test]
    fn a_finding_names_the_servers_that_no_log_joins() {
        let store = FindingStore::new(10);
        let finding = |id: &str| tapio_wire::service::Finding { id: id.into(), ..Default::default() };
        assert!(store.publish(finding("a")).expect("it is new").missing_servers.is_empty() && remark(&store).is_none());
        note("tapio", &store, vec!["192.0.2.7:9090".into()]);
        assert_eq!(store.publish(finding("b")).expect("it is new").missing_servers, ["192.0.2.7:9090"]);
        assert!(remark(&store).expect("there is one").contains("192.0.2.7:9090"));
        note("tapio", &store, Vec::new());
        assert!(store.publish(finding("c")).expect("it is new").missing_servers.is_empty() && remark(&store).is_none());
    }
}
