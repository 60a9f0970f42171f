//! Which server: every address behind the configured names is a candidate, and a rendezvous hash picks one for this node.
//!
//! What enters: `grpc.server_endpoints`, and what the names resolve to. What leaves: candidates in the order of
//! attempts. What must hold: all collectors and all builds rank alike, so that a server that comes or goes moves only
//! its own nodes. A candidate that failed a moment ago comes after those that did not. A name that cannot be resolved
//! keeps its last addresses.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::time::{Duration, Instant};

use crate::settings::server_name::ServerName;

/// How long a candidate that failed stands behind those that did not.
const PENALTY: Duration = Duration::from_secs(30);
/// How long a name may take to resolve.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Addresses that are looked at.
const CANDIDATES_MAX: usize = 1024;

/// The addresses of a name.
pub type Resolved<'a> = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'a>>;

/// Resolves names.
pub trait Resolve: Send + Sync {
    /// Every address of `host`, with `port`.
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> Resolved<'a>;
}

/// The system's resolver.
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> Resolved<'a> {
        Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
    }
}

/// One address, and the name that led to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub name: ServerName,
    pub address: SocketAddr,
}

/// Resolves the configured names and picks one address for this node.
pub struct Endpoints {
    names: Vec<ServerName>,
    resolver: Box<dyn Resolve>,
    node: u64,
    /// What each name stood for last.
    known: Vec<Vec<SocketAddr>>,
    failed: HashMap<SocketAddr, Instant>,
}

impl Endpoints {
    /// Nothing resolved yet.
    pub fn new(names: Vec<ServerName>, resolver: Box<dyn Resolve>, node: u64) -> Self {
        let known = vec![Vec::new(); names.len()];
        Self { names, resolver, node, known, failed: HashMap::new() }
    }

    /// Resolves every name again. The last failure, when nothing is known at all.
    pub async fn resolve(&mut self) -> Option<String> {
        let mut failure = None;
        for (name, known) in self.names.iter().zip(&mut self.known) {
            let resolved = tokio::time::timeout(RESOLVE_TIMEOUT, self.resolver.resolve(&name.host, name.port)).await;
            match resolved {
                Ok(Ok(addresses)) if !addresses.is_empty() => {
                    *known = addresses.into_iter().map(canonical).take(CANDIDATES_MAX).collect();
                }
                Ok(Ok(_)) => failure = Some(format!("{} has no address", name.host)),
                Ok(Err(error)) => failure = Some(format!("cannot resolve {}: {error}", name.host)),
                Err(_) => failure = Some(format!("cannot resolve {}: no answer", name.host)),
            }
        }
        self.failed.retain(|address, at| at.elapsed() < PENALTY && self.known.iter().flatten().any(|a| a == address));
        failure.filter(|_| self.known.iter().all(Vec::is_empty))
    }

    /// All candidates, the preferred one first, whatever failed lately.
    pub fn ranked(&self) -> Vec<Candidate> {
        let mut candidates: Vec<Candidate> = Vec::new();
        for (name, addresses) in self.names.iter().zip(&self.known) {
            for &address in addresses {
                if !candidates.iter().any(|candidate| candidate.address == address) {
                    candidates.push(Candidate { name: name.clone(), address });
                }
            }
        }
        candidates.sort_by_key(|candidate| (std::cmp::Reverse(score(self.node, candidate.address)), candidate.address));
        candidates
    }

    /// The candidate to try now: the first that did not fail lately, else the one that failed first.
    pub fn next(&self) -> Option<Candidate> {
        let mut candidates = self.ranked();
        let failed = |candidate: &Candidate| self.failed.get(&candidate.address).filter(|at| at.elapsed() < PENALTY);
        // Stable: those that did not fail stay in their order, and before all others.
        candidates.sort_by_key(|candidate| failed(candidate).copied());
        candidates.into_iter().next()
    }

    /// A candidate did not let us in, or its stream broke.
    pub fn failed(&mut self, candidate: &Candidate) {
        self.failed.insert(candidate.address, Instant::now());
    }

    /// Marks a server as healthy after it has proved so.
    pub fn recovered(&mut self, candidate: &Candidate) {
        self.failed.remove(&candidate.address);
    }

    /// Whether all candidates have failed lately, so that a pause is due.
    pub fn are_exhausted(&self) -> bool {
        self.ranked().iter().all(|candidate| self.failed.contains_key(&candidate.address))
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A candidate's weight for a node: the highest wins (highest random weight, Thaler and Ravishankar 1998). Its constants are
/// part of the contract between builds and must never change.
fn score(node: u64, address: SocketAddr) -> u64 {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    let ip = u128::from_be_bytes(ip);
    [(ip >> 64) as u64, ip as u64, u64::from(address.port())].iter().fold(mix(node), |hash, word| mix(hash ^ word))
}

/// Returns the next number of splitmix64.
fn mix(value: u64) -> u64 {
    tapio_wire::mix(value.wrapping_add(tapio_wire::MIX_STEP))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Names(Arc<Mutex<Vec<SocketAddr>>>);

    impl Resolve for Names {
        fn resolve<'a>(&'a self, _host: &'a str, _port: u16) -> Resolved<'a> {
            let addresses = self.0.lock().expect("no panic").clone();
            let is_empty = addresses.is_empty();
            Box::pin(async move { if is_empty { Err(io::Error::other("NXDOMAIN")) } else { Ok(addresses) } })
        }
    }

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 9090))
    }

    fn endpoints(names: &Names, node: u64) -> Endpoints {
        let name = ServerName { host: "tapio-server".into(), port: 9090 };
        Endpoints::new(vec![name], Box::new(names.clone()), node)
    }

    #[test]
    fn the_hash_is_the_same_in_every_build() {
        assert_eq!(score(1, address(1)), 0x9928_7767_1d8c_f235);
        assert_eq!(
            score(tapio_wire::node_id("node-1"), "[2001:db8::1]:9090".parse().expect("an address")),
            0x068e_e9c0_4d52_0d9f
        );
    }

    #[tokio::test]
    async fn only_a_leaving_servers_nodes_move_and_they_spread() {
        let names = Names::default();
        let all: Vec<SocketAddr> = (1..=5).map(address).collect();
        let mut own = HashMap::<SocketAddr, u32>::new();
        for node in 0..1000 {
            *names.0.lock().expect("no panic") = all.clone();
            let mut endpoints = endpoints(&names, mix(node));
            assert_eq!(endpoints.resolve().await, None);
            let before = endpoints.next().expect("a candidate").address;
            *own.entry(before).or_default() += 1;
            names.0.lock().expect("no panic").retain(|&candidate| candidate != address(3));
            endpoints.resolve().await;
            let after = endpoints.next().expect("a candidate").address;
            assert!(before == address(3) || before == after);
            assert_ne!(after, address(3));
        }
        assert!(own.len() == 5 && own.values().all(|nodes| (150..250).contains(nodes)), "{own:?}");
    }

    #[tokio::test]
    async fn what_failed_stands_behind_the_others_and_all_take_turns() {
        let names = Names::default();
        *names.0.lock().expect("no panic") = (1..=3).map(address).collect();
        let mut endpoints = endpoints(&names, 7);
        endpoints.resolve().await;
        let ranked = endpoints.ranked();
        for candidate in &ranked {
            assert!(!endpoints.are_exhausted());
            assert_eq!(endpoints.next().as_ref(), Some(candidate));
            endpoints.failed(candidate);
        }
        assert!(endpoints.are_exhausted());
        assert_eq!(endpoints.next(), Some(ranked[0].clone()), "the one that failed first");
        endpoints.recovered(&ranked[2]);
        assert_eq!(endpoints.next(), Some(ranked[2].clone()));
    }

    #[tokio::test]
    async fn a_name_that_stops_resolving_keeps_its_addresses() {
        let names = Names::default();
        let mut endpoints = endpoints(&names, 7);
        assert!(endpoints.resolve().await.is_some_and(|failure| failure.contains("NXDOMAIN")));
        assert_eq!(endpoints.next(), None);
        names.0.lock().expect("no panic").push(address(1));
        endpoints.resolve().await;
        names.0.lock().expect("no panic").clear();
        assert_eq!(endpoints.resolve().await, None);
        assert_eq!(endpoints.next().map(|candidate| candidate.address), Some(address(1)));
    }
}
