//! A collector that gets no more than 10 thousandths of a core: bulk is sampled away, what is lethal arrives, health answers.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::lab::FedNode;
use tapio_perf::clock::wait_for;
use tapio_perf::processes::{Collector, CollectorOptions, Server, ServerOptions, http};

/// The cpu controller of cgroup version 1.
const CONTROLLER: &str = "/sys/fs/cgroup/cpu";
const LIMIT: Duration = Duration::from_secs(90);

/// A cgroup with a CPU quota; its processes go back to the root when it is dropped.
struct Quota(PathBuf);

impl Quota {
    fn new(milli: u64, pid: u32) -> Self {
        let path = Path::new(CONTROLLER).join(format!("tapio-governor-{}", std::process::id()));
        fs::create_dir(&path).expect("a cgroup");
        let quota = Self(path);
        let put = |file: &str, value: u64| fs::write(quota.0.join(file), value.to_string()).expect("written");
        put("cpu.cfs_period_us", 100_000);
        put("cpu.cfs_quota_us", milli * 100);
        put("cgroup.procs", pid.into());
        quota
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        let procs = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines() {
            let _ = fs::write(Path::new(CONTROLLER).join("cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.0);
    }
}

fn sum(text: &str, prefix: &str, label: &str) -> f64 {
    let lines = text.lines().filter(|line| line.starts_with(prefix) && line.contains(label));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[test]
fn with_ten_milli_cpu_bulk_is_sampled_and_lethal_arrives() {
    let _turn = crate::lab::alone();
    let is_root = rustix::process::geteuid().is_root();
    if !is_root || !Path::new(CONTROLLER).join("cpu.cfs_quota_us").parent().is_some_and(Path::is_dir) {
        println!("SKIP with_ten_milli_cpu: needs root and the cpu controller of cgroup version 1");
        assert!(std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"), "TAPIO_REQUIRE=all");
        return;
    }
    let server = Server::start(&ServerOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    let options = CollectorOptions { node: "quota".into(), server: server.address(), ..CollectorOptions::default() };
    let mut collector = Collector::prepare(&options).expect("prepared");
    let text = fs::read_to_string(collector.config_path()).expect("readable");
    fs::write(collector.config_path(), text.replace("max_cpu_milli: 0", "max_cpu_milli: 10")).expect("written");
    collector.restart().unwrap_or_else(|error| panic!("{error}"));
    let port = collector.port();
    let mut node = FedNode::feed(collector, 30_000.0);
    let quota = Quota::new(10, node.collector.process().expect("it runs").pid());

    let lethal = |text: &str| sum(text, "tapio_collector_events_decoded_total", "lane=\"lethal\"");
    let (mut first_lethal, mut healthy) = (None, 0);
    wait_for("the governor to sample", LIMIT, |seen| {
        let Ok((status, _)) = http::get(port, "/healthz") else { return Ok(None) };
        assert_eq!(status, 200);
        healthy += 1;
        let Ok((200, text)) = http::get(port, "/metrics") else { return Ok(None) };
        let begun = *first_lethal.get_or_insert(lethal(&text));
        let sampled = sum(&text, "tapio_collector_events_dropped_total", "reason=\"sampled\"");
        let keep = sum(&text, "tapio_collector_governor_keep_one_in", "");
        *seen = format!("keeps 1 in {keep}, {sampled} sampled away, {} lethal", lethal(&text) - begun);
        Ok((keep > 1.0 && sampled > 1000.0 && lethal(&text) > begun).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", node.collector.output()));
    assert!(healthy > 0);
    let mut archived = node.archived(&server);
    node.wait_for_progress(&server, &mut archived, 100);
    // With its CPU back it ends in time, and every event is accounted for: by the generator's own count.
    drop(quota);
    let (ledger, _) = node.finish(&server);
    assert!(ledger.losses.contains_key("filter/sampled"), "{ledger}");
}
