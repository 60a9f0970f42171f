//! The probes of DNS, dropped packets, full listen queues and lost connections, and the sums of block I/O and reclaim.
//! Each test causes the real thing and reads its record.
//!
//! As root: `TAPIO_REQUIRE=all cargo test -p tapio-probes`. Each victim is in a cgroup and a network namespace of its own,
//! which go with it; each test looks for the records of its cgroup.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::lab::{Container, Disk, Session, can_run, inode};
use tapio_probes::record::{Dns, Histogram, PacketDrop, Reclaim, RecordKind, Tcp, text};
use tapio_probes::{LoadConfig, Tuning, drop_reason_name};

const MIB: u64 = 1 << 20;
const CGROUP_ROOT: u64 = 1;

/// What the victim did in a container of its own; [`None`], after saying so, where it could not.
struct Ran {
    /// Removed only after what was read of it was looked at: its number may be given again.
    _container: Container,
    id: u64,
    pid: u32,
    status: i32,
}

fn run(number: u32, how: &str) -> Option<Ran> {
    let container = Container::make(number);
    let mut child = container.spawn(how);
    let pid = child.0.id();
    let status = child.0.wait().unwrap().code().expect("it was not killed");
    if status == 77 {
        println!("SKIP {how}: needs a network namespace, and nft where packets are to be lost");
        assert!(!std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all"), "TAPIO_REQUIRE=all");
        return None;
    }
    let id = inode(&container.unified());
    Some(Ran { _container: container, id, pid, status })
}

/// Whether the running kernel is at least this one.
fn kernel_is(major: u32, minor: u32) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|number| number.trim().parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap()) >= (major, minor)
}

fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// The histogram of a container's lookups, of all intervals so far.
fn lookups(session: &mut Session, id: u64) -> Histogram {
    const DNS: u8 = 3;
    session.wait_for_sum(RecordKind::Histogram, |sums: &Histogram| sums.header.cgroup_id == id && sums.measure == DNS)
}

#[test]
fn failed_lookups_are_reported_and_good_ones_counted() {
    const AAAA: u16 = 28;
    if !can_run("failed_lookups_are_reported_and_good_ones_counted") {
        return;
    }
    let mut session = Session::start();
    let cases = [("missing.example.org", 3, "127.0.0.1"), ("broken.x.test", 2, "::1"), ("good.example.org", 0, "::1")];
    for (number, (name, rcode, host)) in (30..).zip(cases) {
        let Some(ran) = run(number, &format!("look-up {name} {host}")) else {
            return;
        };
        assert_eq!(ran.status, 0);
        let histogram = lookups(&mut session, ran.id);
        assert_eq!(histogram.counts.iter().sum::<u32>(), 1, "{histogram:?}");
        assert_eq!(histogram.total_ns, histogram.max_ns);
        let reported = session.all_of(RecordKind::Dns, |dns: &Dns| dns.header.cgroup_id == ran.id);
        assert_eq!(reported.len(), usize::from(rcode != 0), "{reported:?}");
        for dns in reported {
            assert_eq!((text(&dns.name).as_ref(), dns.rcode, dns.query_type), (name, rcode, AAAA));
            assert_eq!((dns.header.pid, dns.header.tid, dns.pad, dns.pad2), (ran.pid, ran.pid, 0, 0));
            assert!(dns.name[name.len()..].iter().all(|&byte| byte == 0), "bytes of somebody else: {:?}", dns.name);
            assert_eq!(dns.latency_ns, histogram.max_ns);
            assert!(dns.latency_ns > 0 && dns.latency_ns < 20_000_000_000, "{dns:?}");
        }
    }
}

#[test]
fn a_slow_answer_is_reported_with_its_latency() {
    if !can_run("a_slow_answer_is_reported_with_its_latency") {
        return;
    }
    let tuning = Tuning { dns_slow_ns: 150_000_000, ..Tuning::default() };
    let mut session = Session::start_with(&LoadConfig { tuning, ..LoadConfig::default() });
    let Some(ran) = run(34, "look-up late.example.org 127.0.0.1") else {
        return;
    };
    assert_eq!(ran.status, 0);
    let dns: Dns = session.wait_for(RecordKind::Dns, |dns: &Dns| dns.header.cgroup_id == ran.id);
    assert_eq!((dns.rcode, text(&dns.name).as_ref()), (0, "late.example.org"));
    assert!(dns.latency_ns >= 200_000_000 && dns.latency_ns < 20_000_000_000, "{dns:?}");
}

#[test]
fn an_unanswered_query_is_reported_once_after_the_timeout() {
    if !can_run("an_unanswered_query_is_reported_once_after_the_timeout") {
        return;
    }
    let dns_timeout = Duration::from_millis(300);
    let mut session = Session::start_with(&LoadConfig { dns_timeout, ..LoadConfig::default() });
    // Longer than a record has room for: the first 71 bytes are recorded.
    let long = format!("silent.{}.example.org", "x".repeat(60));
    let cases = [("silent.example.org", 35, "127.0.0.1"), (&long, 36, "::1")];
    for (name, number, host) in cases {
        let Some(ran) = run(number, &format!("look-up {name} {host}")) else {
            return;
        };
        assert_eq!(ran.status, 0);
        let of_container = |dns: &Dns| dns.header.cgroup_id == ran.id;
        let dns: Dns = session.wait_for_sum(RecordKind::Dns, of_container);
        assert_eq!((dns.rcode, dns.query_type, dns.header.pid), (255, 28, ran.pid));
        assert_eq!(text(&dns.name), name[..name.len().min(71)]);
        assert!(dns.latency_ns >= 300_000_000 && dns.latency_ns < 40_000_000_000, "{dns:?}");
        std::thread::sleep(Duration::from_millis(400));
        session.fetch_sums();
        let reported =
            session.sums.iter().filter(|record| record.kind == RecordKind::Dns && of_container(&record.get())).count();
        assert_eq!((reported, session.all_of(RecordKind::Dns, of_container).len()), (1, 0));
    }
}

#[test]
fn a_full_listen_queue_is_reported_with_the_listener() {
    const LISTEN_OVERFLOW: u8 = 9;
    if !can_run("a_full_listen_queue_is_reported_with_the_listener") {
        return;
    }
    let mut session = Session::start();
    for (number, host) in [(37, IpAddr::from(Ipv4Addr::LOCALHOST)), (38, IpAddr::from(Ipv6Addr::LOCALHOST))] {
        let Some(ran) = run(number, &format!("overflow 4243 {host}")) else {
            return;
        };
        assert_eq!(ran.status, 0);
        let of_container = |tcp: &Tcp| tcp.header.cgroup_id == ran.id && tcp.change == LISTEN_OVERFLOW;
        let tcp: Tcp = session.wait_for(RecordKind::Tcp, of_container);
        assert_eq!((tcp.source, tcp.destination), (mapped(host), mapped(host)));
        assert_eq!((tcp.source_port, tcp.active, tcp.header.pid), (4243, 0, ran.pid));
        assert_ne!(tcp.destination_port, 0);
        // The first of the three found room.
        let ports: Vec<_> =
            session.all_of(RecordKind::Tcp, of_container).iter().map(|tcp| tcp.destination_port).collect();
        assert!((1..=2).contains(&ports.len()), "{ports:?}");
    }
}

#[test]
fn dropped_packets_are_counted_exactly_by_reason_and_cgroup() {
    const LOOPBACK: u32 = 1;
    if !can_run("dropped_packets_are_counted_exactly_by_reason_and_cgroup") {
        return;
    }
    let mut session = Session::start();
    let Some(ran) = run(39, "flood") else {
        return;
    };
    assert!((0..100).contains(&ran.status), "{}", ran.status);
    let expected = 100 - ran.status as u64;
    // The socket of a received packet is known since 6.11; until then others' drops are in the same sum.
    let is_known = kernel_is(6, 11);
    let id = if is_known { ran.id } else { CGROUP_ROOT };
    let reason = kernel_is(5, 17).then_some("SOCKET_RCVBUFF");
    let matches = |drops: &PacketDrop| {
        drops.header.cgroup_id == id && drop_reason_name(drops.reason) == reason && drops.interface == LOOPBACK
    };
    let mut count = session.wait_for_sum(RecordKind::PacketDrop, matches).count;
    if is_known {
        assert_eq!(count, expected);
    } else {
        while count < expected {
            session.sums.clear();
            count += session.wait_for_sum(RecordKind::PacketDrop, matches).count;
        }
    }
}

#[test]
fn lost_segments_retransmit_and_drops_say_why() {
    const TIMED_OUT: u8 = 3;
    const RETRANSMITTED: u8 = 5;
    if !can_run("lost_segments_retransmit_and_drops_say_why") {
        return;
    }
    let mut session = Session::start();
    let Some(ran) = run(40, "lost 4245") else {
        return;
    };
    assert_eq!(ran.status, 0);
    for change in [RETRANSMITTED, TIMED_OUT] {
        let tcp: Tcp =
            session.wait_for(RecordKind::Tcp, |tcp: &Tcp| tcp.header.cgroup_id == ran.id && tcp.change == change);
        assert_eq!((tcp.destination_port, tcp.active, tcp.header.pid), (4245, 1, ran.pid));
        assert_eq!((tcp.bytes_sent, tcp.bytes_received), (1000, 0));
        assert!(tcp.duration_ns > 100_000_000, "{tcp:?}");
    }
    // What arrives belongs to no socket yet when it passes nft.
    let reason = kernel_is(5, 17).then_some("NETFILTER_DROP");
    let drops: PacketDrop = session.wait_for_sum(RecordKind::PacketDrop, |drops: &PacketDrop| {
        drops.header.cgroup_id == CGROUP_ROOT && drop_reason_name(drops.reason) == reason && drops.interface == 1
    });
    assert!(drops.count >= 1, "{drops:?}");
}

#[test]
fn the_histogram_of_a_block_device_counts_every_io_once() {
    const BLOCK: u8 = 1;
    const WRITE: u8 = 1;
    if !can_run("the_histogram_of_a_block_device_counts_every_io_once") {
        return;
    }
    let Some(disk) = Disk::make(8 * MIB) else {
        return;
    };
    let number = fs::metadata(&disk.device).unwrap().rdev();
    let device = rustix::fs::major(number) << 20 | rustix::fs::minor(number);
    let mut session = Session::start();
    let written = Command::new("dd")
        .args(["if=/dev/zero", "bs=4096", "count=50", "oflag=direct"])
        .arg(format!("of={}", disk.device.display()))
        .stderr(Stdio::null())
        .status();
    assert!(written.unwrap().success());
    let matches = |sums: &Histogram| (sums.measure, sums.device, sums.operation) == (BLOCK, device, WRITE);
    let mut count = 0;
    while count < 50 {
        let sums = session.wait_for_sum(RecordKind::Histogram, matches);
        count += sums.counts.iter().sum::<u32>();
        assert_eq!((sums.header.cgroup_id, sums.header.pid), (CGROUP_ROOT, 0));
        assert!(sums.total_ns >= sums.max_ns && sums.max_ns > 0 && sums.interval_ns > 0, "{sums:?}");
        session.sums.clear();
    }
    assert_eq!(count, 50);
}

#[test]
fn short_stalls_are_reported_with_the_sums() {
    if !can_run("short_stalls_are_reported_with_the_sums") {
        return;
    }
    let path = std::env::temp_dir().join(format!("tapio-read-{}", std::process::id()));
    let mut file = fs::File::create(&path).unwrap();
    let kind = rustix::fs::fstatfs(&file).unwrap().f_type as u64;
    // ramfs and tmpfs: their pages cannot be dropped.
    let is_memory = [0x8584_58f6, 0x0102_1994].contains(&kind);
    if !is_memory {
        for _ in 0..64 {
            file.write_all(&vec![1; MIB as usize]).unwrap();
        }
        file.sync_all().unwrap();
    }
    let tuning = Tuning { reclaim_burst_ns: u64::MAX >> 1, ..Tuning::default() };
    let mut session = Session::start_with(&LoadConfig { tuning, ..LoadConfig::default() });
    let container = Container::make(41);
    container.limit(false, 16 * MIB);
    let status = (!is_memory).then(|| container.spawn(&format!("read {}", path.display())).0.wait().unwrap());
    fs::remove_file(&path).unwrap();
    let Some(status) = status else {
        println!("SKIP short_stalls_are_reported_with_the_sums: needs a temporary directory on a disk");
        return;
    };
    assert!(status.success());
    let id = inode(&container.unified());
    let reclaim: Reclaim =
        session.wait_for_sum(RecordKind::Reclaim, |reclaim: &Reclaim| reclaim.header.cgroup_id == id);
    assert_eq!((reclaim.memcg, reclaim.header.pid, reclaim.pad), (1, 0, [0; 7]));
    assert!(reclaim.pages_reclaimed > 0 && reclaim.stall_ns < 60_000_000_000, "{reclaim:?}");
    assert!(session.all_of(RecordKind::Reclaim, |reclaim: &Reclaim| reclaim.header.cgroup_id == id).is_empty());
}
