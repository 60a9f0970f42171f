//! A log that begins within a series of deaths: older messages were deleted, since they took too much room.

use async_nats::jetstream::stream::Stream;
use futures::future::join_all;

use crate::cluster_support::*;
use crate::cluster_whole::{findings, findings_when, member, member_at, ship};
use crate::correlate_node::{Node, Process, SECOND};
use crate::whole_server::Whole;
use tapio_wire::program::clock::now_ns;
use tapio_wire::service::Finding;
use tempfile::TempDir;

/// A container that keeps crashing now, and the frames of its deaths.
struct Loop {
    node: Node,
    shipped: usize,
    deaths: u32,
}

impl Loop {
    fn new() -> Self {
        let mut node = Node::new("n1");
        node.booted_ns = now_ns() - 100 * SECOND;
        Self { node, shipped: 0, deaths: 0 }
    }

    /// Ships so many deaths more to the first of these servers. Each is a message of its own, which all have read.
    async fn ship(&mut self, servers: &[&Whole], deaths: u32) {
        for _ in 0..deaths {
            self.deaths += 1;
            let at = now_ns() - self.node.booted_ns;
            let web = self.node.container_of("shop/web-1", &format!("web{}", self.deaths), "web-1/web");
            self.node.exit(at, Process::init(web, 100 + self.deaths, "app"), 1 << 8);
            self.node.lethal(at);
            ship(servers[0], &self.node, self.shipped).await;
            self.shipped = self.node.bytes.len();
            self.is_counted(servers).await;
        }
    }

    async fn is_counted(&self, servers: &[&Whole]) {
        for server in servers {
            findings_when(server, |found| counts(found).iter().sum::<u32>() == self.deaths).await;
        }
    }

    /// Waits until all servers have it as one finding, and all the same.
    async fn is_on(&self, servers: &[&Whole]) {
        for server in servers {
            server.until_metric("tapio_server_log_healing_seconds", &[], |value| value == 0.0).await;
        }
        self.is_counted(servers).await;
        let all = join_all(servers.iter().map(|server| findings(server))).await;
        assert!(all.iter().all(|found| counts(found) == [self.deaths]), "{all:#?}");
        assert!(all.iter().all(|found| found[0].id == all[0][0].id), "{all:#?}");
    }
}

fn counts(found: &[Finding]) -> Vec<u32> {
    found.iter().map(|finding| finding.count).collect()
}

/// Deletes all messages of the log but the last ones.
fn cut(nats: &Nats, keep: u64) {
    let purge = || {
        beside(nats, async |context| {
            let stream: Stream = context.get_stream("TAPIO_default_LOG").await.expect("it is there");
            stream.purge().keep(keep).await.expect("purged");
        });
    };
    std::thread::scope(|scope| scope.spawn(purge).join()).expect("purged");
}

/// Two servers that know a crash loop, of whose log only the last messages are left.
async fn two_over_a_cut_log(nats: &Nats, keep: u64) -> (Whole, Whole, Loop) {
    let (a, b) = tokio::join!(Whole::start(member(nats, "a")), Whole::start(member(nats, "b")));
    let mut deaths = Loop::new();
    deaths.ship(&[&a, &b], 24).await;
    deaths.is_on(&[&a, &b]).await;
    cut(nats, keep);
    (a, b, deaths)
}

async fn start_again(nats: &Nats, name: &str, dir: TempDir) -> Whole {
    let again = Whole::start(member_at(nats, name, dir.path())).await;
    Whole { dir, ..again }
}

async fn end(server: Whole) -> TempDir {
    server.pipeline.shutdown().await.expect("a good end");
    server.dir
}

async fn restart(nats: &Nats, name: &str, server: Whole) -> Whole {
    start_again(nats, name, end(server).await).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_over_a_cut_log_counts_once() {
    let Some(nats) = Nats::start() else { return };
    let (mut a, mut b, mut deaths) = two_over_a_cut_log(&nats, 8).await;
    deaths.ship(&[&a, &b], 12).await;
    deaths.is_on(&[&a, &b]).await;
    b = restart(&nats, "b", b).await;
    deaths.ship(&[&a, &b], 3).await;
    deaths.is_on(&[&a, &b]).await;
    let c = Whole::start(member(&nats, "c")).await;
    deaths.is_on(&[&a, &b, &c]).await;
    // The one that has the frames.
    a = restart(&nats, "a", a).await;
    deaths.ship(&[&a, &b, &c], 3).await;
    deaths.is_on(&[&a, &b, &c]).await;
    for server in [a, b, c] {
        server.pipeline.shutdown().await.expect("a good end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_over_an_emptied_log_count_once() {
    let Some(nats) = Nats::start() else { return };
    let (mut a, mut b, mut deaths) = two_over_a_cut_log(&nats, 0).await;
    deaths.ship(&[&a, &b], 3).await;
    deaths.is_on(&[&a, &b]).await;
    for is_empty in [false, true] {
        let dirs = (end(a).await, end(b).await);
        if is_empty {
            cut(&nats, 0);
        }
        (a, b) = tokio::join!(start_again(&nats, "a", dirs.0), start_again(&nats, "b", dirs.1));
        deaths.is_on(&[&a, &b]).await;
    }
    deaths.ship(&[&a, &b], 3).await;
    deaths.is_on(&[&a, &b]).await;
    for server in [a, b] {
        server.pipeline.shutdown().await.expect("a good end");
    }
}
