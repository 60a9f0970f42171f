//! The bulk lane's probes in a real kernel: each test causes the real thing and reads its record.
//!
//! As root: `TAPIO_REQUIRE=all cargo test -p tapio-probes`. Other processes' records are everywhere in between; each test
//! looks for those of the sockets, cgroups and devices that it made.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use crate::lab::{Container, Disk, Hierarchies, Killed, Session, can_run, inode, victim_without_neighbours};
use rustix::net::{AddressFamily, SocketType};
use tapio_probes::record::{BlockIo, Oom, Reclaim, RecordKind, Tcp};
use tapio_probes::{Counter, LoadConfig, Tuning, off_by_default};
use tapio_ringbuf::{Poller, WakeupFlag};

const MIB: u64 = 1 << 20;

/// Everybody's connections, this process's included.
fn start_with_own_traffic() -> Session {
    Session::start_with(&LoadConfig { own_pid: None, ..LoadConfig::default() })
}

/// An address that is taken, but where nobody listens, for as long as the socket lives.
fn nobody(own: SocketAddr) -> (OwnedFd, SocketAddr) {
    let family = if own.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket(family, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &own).unwrap();
    let address = rustix::net::getsockname(&socket).unwrap().try_into().unwrap();
    (socket, address)
}

/// Maps an address as records have it.
fn mapped(address: SocketAddr) -> [u8; 16] {
    match address {
        SocketAddr::V4(address) => address.ip().to_ipv6_mapped().octets(),
        SocketAddr::V6(address) => address.ip().octets(),
    }
}

const ESTABLISHED: u8 = 1;
const REFUSED: u8 = 2;
const TIMED_OUT: u8 = 3;
const CLOSED: u8 = 4;
const SYN_RETRANSMITTED: u8 = 6;
const RESET_SENT: u8 = 7;
const RESET_RECEIVED: u8 = 8;

#[test]
fn a_refused_connection_names_who_tried_and_where() {
    if !can_run("a_refused_connection_names_who_tried_and_where") {
        return;
    }
    let mut session = start_with_own_traffic();
    for own in [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), SocketAddr::from((Ipv6Addr::LOCALHOST, 0))] {
        let (_socket, nobody) = nobody(own);
        TcpStream::connect(nobody).unwrap_err();
        let tcp: Tcp = session
            .wait_for(RecordKind::Tcp, |tcp: &Tcp| tcp.destination_port == nobody.port() && tcp.change == REFUSED);
        assert_eq!(tcp.destination, mapped(nobody));
        assert_eq!(tcp.source, mapped(own));
        assert_ne!(tcp.source_port, 0);
        assert_eq!((tcp.header.pid, tcp.active), (std::process::id(), 1));
        assert_eq!(tcp.header.cgroup_id, Hierarchies::find().own_id());
        assert!(tcp.duration_ns > 0 && tcp.duration_ns < 10_000_000_000, "{tcp:?}");
        assert_eq!((tcp.bytes_sent, tcp.bytes_received, tcp.pad), (0, 0, [0; 2]));
    }
}

#[test]
fn both_sides_report_a_connection_made_and_closed() {
    if !can_run("both_sides_report_a_connection_made_and_closed") {
        return;
    }
    let mut session = start_with_own_traffic();
    for own in [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), SocketAddr::from((Ipv6Addr::LOCALHOST, 0))] {
        let listener = TcpListener::bind(own).unwrap();
        let server = listener.local_addr().unwrap();
        let mut stream = TcpStream::connect(server).unwrap();
        let client = stream.local_addr().unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        stream.write_all(&[1; 1000]).unwrap();
        accepted.read_exact(&mut [0; 1000]).unwrap();
        accepted.write_all(&[2; 70]).unwrap();
        stream.read_exact(&mut [0; 70]).unwrap();
        drop(stream);
        assert_eq!(accepted.read(&mut [0; 1]).unwrap(), 0);
        drop(accepted);

        for (active, source, destination) in [(1, client, server), (0, server, client)] {
            let mut wait = |change| {
                session.wait_for(RecordKind::Tcp, |tcp: &Tcp| {
                    tcp.change == change
                        && (tcp.source_port, tcp.destination_port) == (source.port(), destination.port())
                })
            };
            let (made, closed): (Tcp, Tcp) = (wait(ESTABLISHED), wait(CLOSED));
            for tcp in [made, closed] {
                assert_eq!((tcp.source, tcp.destination), (mapped(source), mapped(destination)));
                assert_eq!(tcp.active, active);
                assert_eq!(tcp.header.pid, std::process::id(), "{tcp:?}");
                assert_eq!(tcp.header.cgroup_id, Hierarchies::find().own_id());
            }
            assert!(active == 0 || made.duration_ns > 0);
            assert_eq!((made.bytes_sent, made.bytes_received), (0, 0));
            assert!(closed.duration_ns > made.duration_ns && closed.header.time_ns > made.header.time_ns);
            let (sent, received) = if active == 1 { (1000, 70) } else { (70, 1000) };
            assert_eq!((closed.bytes_sent, closed.bytes_received), (sent, received));
        }
    }
}

#[test]
fn an_unanswered_connection_is_tried_again_and_times_out() {
    if !can_run("an_unanswered_connection_is_tried_again_and_times_out") {
        return;
    }
    let mut session = Session::start();
    let Ok(child) = victim_without_neighbours("connect 4242 192.0.2.7").spawn() else {
        println!("SKIP: needs unshare");
        assert!(!std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all"), "TAPIO_REQUIRE=all");
        return;
    };
    let mut child = Killed(child);
    let pid = child.0.id();
    let code = child.0.wait().unwrap().code();
    if code == Some(77) && !std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all") {
        println!("SKIP: needs a network namespace with a veth pair (iproute2)");
        return;
    }
    assert_eq!(code, Some(1));
    for change in [SYN_RETRANSMITTED, TIMED_OUT] {
        let tcp: Tcp = session.wait_for(RecordKind::Tcp, |tcp: &Tcp| tcp.header.pid == pid && tcp.change == change);
        assert_eq!(tcp.destination, Ipv4Addr::new(192, 0, 2, 7).to_ipv6_mapped().octets());
        assert_eq!((tcp.destination_port, tcp.active), (4242, 1));
        assert!(tcp.duration_ns > 900_000_000, "{tcp:?}");
    }
}

#[test]
fn a_connection_that_is_reset_is_reported_by_both_sides() {
    if !can_run("a_connection_that_is_reset_is_reported_by_both_sides") {
        return;
    }
    let mut session = start_with_own_traffic();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    // Again and again: what the probes remember of the two sides must not get in each other's way, whatever their hashes.
    for _ in 0..100 {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let client = stream.local_addr().unwrap().port();
        let (accepted, _) = listener.accept().unwrap();
        stream.write_all(b"never read").unwrap();
        // Unread data makes it a reset.
        drop(accepted);
        let mut wait = |source, destination, change| {
            session.wait_for(RecordKind::Tcp, |tcp: &Tcp| {
                (tcp.source_port, tcp.destination_port, tcp.change) == (source, destination, change)
            })
        };
        let (sent, received): (Tcp, Tcp) = (wait(port, client, RESET_SENT), wait(client, port, RESET_RECEIVED));
        assert_eq!((sent.active, received.active), (0, 1));
        assert_eq!((sent.header.pid, received.header.pid), (std::process::id(), std::process::id()));
    }
}

#[test]
fn a_connection_of_a_container_is_known_by_its_cgroup() {
    if !can_run("a_connection_of_a_container_is_known_by_its_cgroup") {
        return;
    }
    let mut session = Session::start();
    let container = Container::make(6);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut client = container.spawn(&format!("connect {port}"));
    assert!(client.0.wait().unwrap().success());
    let tcp: Tcp =
        session.wait_for(RecordKind::Tcp, |tcp: &Tcp| tcp.destination_port == port && tcp.change == ESTABLISHED);
    assert_eq!(tcp.header.pid, client.0.id());
    assert_eq!(tcp.header.cgroup_id, inode(&container.unified()));
}

#[test]
fn the_readers_own_connections_are_not_recorded() {
    if !can_run("the_readers_own_connections_are_not_recorded") {
        return;
    }
    let mut session = Session::start();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(TcpStream::connect(("127.0.0.1", port)).unwrap());
    drop(listener.accept().unwrap());
    let of_port = |tcp: &Tcp| tcp.source_port == port || tcp.destination_port == port;
    let own = session.all_of(RecordKind::Tcp, of_port);
    assert!(own.is_empty(), "{own:?}");
}

#[test]
fn a_container_at_its_limit_reclaims_before_it_dies() {
    if !can_run("a_container_at_its_limit_reclaims_before_it_dies") {
        return;
    }
    let burst_ns = 20_000;
    let reclaims = stalls_before_the_oom_kill(7, burst_ns);
    assert!(reclaims[0].stall_ns >= burst_ns, "{reclaims:?}");
}

#[test]
fn short_stalls_are_reported_when_the_oom_killer_comes() {
    if can_run("short_stalls_are_reported_when_the_oom_killer_comes") {
        let reclaims = stalls_before_the_oom_kill(8, u64::MAX >> 1);
        assert_eq!(reclaims.len(), 1);
    }
}

fn stalls_before_the_oom_kill(number: u32, reclaim_burst_ns: u64) -> Vec<Reclaim> {
    let tuning = Tuning { reclaim_burst_ns, ..Tuning::default() };
    let mut session = Session::start_with(&LoadConfig { tuning, ..LoadConfig::default() });
    let container = Container::make(number);
    container.limit(false, 32 * MIB);
    let mut child = container.spawn("eat");
    let pid = child.0.id();
    assert_eq!(child.0.wait().unwrap().signal(), Some(9), "the OOM killer came");
    let oom: Oom = session.wait_for(RecordKind::Oom, |oom: &Oom| oom.header.pid == pid);
    let id = inode(&container.unified());
    let mut reclaims = session.all_of(RecordKind::Reclaim, |reclaim: &Reclaim| reclaim.header.cgroup_id == id);
    assert!(!reclaims.is_empty());
    // Each CPU has a ring of its own, and the victim may have run on several.
    reclaims.sort_by_key(|reclaim| reclaim.header.time_ns);
    for reclaim in &reclaims {
        assert_eq!((reclaim.memcg, reclaim.pad), (1, [0; 7]));
        assert!(reclaim.stall_ns > 0 && reclaim.stall_ns < 60_000_000_000, "{reclaim:?}");
    }
    assert_eq!(reclaims[0].header.pid, pid);
    assert!(reclaims[0].header.time_ns < oom.header.time_ns, "{reclaims:?} {oom:?}");
    reclaims
}

#[test]
fn sampled_events_are_counted_and_sampling_can_change() {
    if !can_run("sampled_events_are_counted_and_sampling_can_change") {
        return;
    }
    let others = ["tcp_retransmit", "tcp_reset_sent", "tcp_reset_recv"].map(str::to_owned).to_vec();
    let disabled = [off_by_default(), others].concat();
    let mut session = Session::start_with(&LoadConfig { own_pid: None, disabled, ..LoadConfig::default() });
    let controls = session.probes().controls();
    let (_socket, nobody) = nobody(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    let mut refusals = |bulk_sampling| {
        controls.set(Tuning { bulk_sampling, ..controls.get() }).unwrap();
        let before = session.seen.len();
        for _ in 0..100 {
            TcpStream::connect(nobody).unwrap_err();
        }
        session.all_of(RecordKind::Tcp, |_: &Tcp| true);
        let of_port = |tcp: Tcp| tcp.destination_port == nobody.port() && tcp.change == REFUSED;
        session.seen[before..].iter().filter(|record| record.kind == RecordKind::Tcp && of_port(record.get())).count()
    };
    assert_eq!(refusals(1), 100);
    assert_eq!(refusals(0), 0);
    let some = refusals(10);
    assert!((1..=35).contains(&some), "{some}");
    assert_eq!(refusals(1), 100);
    assert!(session.counted(RecordKind::Tcp, Counter::Sampled) >= 165);
    session.close_ledger();
}

#[test]
fn the_ledger_closes_exactly_when_tiny_bulk_rings_overflow() {
    if !can_run("the_ledger_closes_exactly_when_tiny_bulk_rings_overflow") {
        return;
    }
    let config = LoadConfig { bulk_ring_bytes: 4096, own_pid: None, ..LoadConfig::default() };
    let session = Session::start_with(&config);
    let capacity = session.probes().bulk_ring_bytes();
    let rings = session.probes().bulk_rings().count();
    assert_eq!(rings, session.probes().possible_cpus());
    let (_socket, nobody) = nobody(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    for _ in 0..rings * capacity / size_of::<Tcp>() + 1 {
        TcpStream::connect(nobody).unwrap_err();
    }
    let drops = session.close_ledger();
    assert!(drops[&RecordKind::Tcp] > 0, "{drops:?}");
}

#[test]
fn a_bulk_record_wakes_the_reader_only_when_it_sleeps() {
    if !can_run("a_bulk_record_wakes_the_reader_only_when_it_sleeps") {
        return;
    }
    let mut session = start_with_own_traffic();
    let flag = WakeupFlag::map(session.probes().control_map()).unwrap();
    let mut poller = Poller::new().unwrap();
    for ring in session.probes().bulk_rings() {
        poller.add_edge(ring, 7).unwrap();
    }
    session.drain();
    let _ = poller.wait(Some(Duration::ZERO)).unwrap();
    let (_socket, nobody) = nobody(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    TcpStream::connect(nobody).unwrap_err();
    assert!(poller.wait(Some(Duration::from_millis(200))).unwrap().is_empty(), "nobody sleeps");
    session.drain();
    flag.set(true);
    session.drain();
    TcpStream::connect(nobody).unwrap_err();
    assert_eq!(poller.wait(Some(Duration::from_secs(20))).unwrap()[0], 7);
}

#[test]
fn slow_block_io_and_failed_block_io_name_the_device() {
    // Which of them a full file system becomes differs between kernels.
    const EIO: i32 = 5;
    const ENOSPC: i32 = 28;
    const WRITE: u8 = 1;
    if !can_run("slow_block_io_and_failed_block_io_name_the_device") {
        return;
    }
    let Some(disk) = Disk::make(4 * MIB) else {
        return;
    };
    let number = fs::metadata(&disk.device).unwrap().rdev();
    let device = rustix::fs::major(number) << 20 | rustix::fs::minor(number);
    let mut session = Session::start();
    let of_device = |io: &BlockIo| io.device == device;
    let write = |offset, bytes: usize| {
        let mut file = fs::File::options().write(true).open(&disk.device).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        file.write_all(&vec![1; bytes]).unwrap();
        file.sync_all()
    };

    write(0, 8192).unwrap();
    let quick = session.all_of(RecordKind::BlockIo, |io: &BlockIo| of_device(io) && io.latency_ns < 100_000_000);
    assert!(quick.is_empty(), "{quick:?}");

    let controls = session.probes().controls();
    controls.set(Tuning { block_io_slow_ns: 1, ..controls.get() }).unwrap();
    write(0, 8192).unwrap();
    let slow: BlockIo = session.wait_for(RecordKind::BlockIo, |io: &BlockIo| of_device(io) && io.operation == WRITE);
    assert_eq!((slow.error, slow.bytes, slow.pad), (0, 8192, [0; 7]));
    assert!(slow.latency_ns > 1000 && slow.latency_ns < 60_000_000_000, "{slow:?}");

    controls.set(Tuning { block_io_slow_ns: u64::MAX, ..controls.get() }).unwrap();
    // The file system below is full by then.
    write(6 * MIB, 8 << 20).unwrap_err();
    let failed: BlockIo = session.wait_for(RecordKind::BlockIo, |io: &BlockIo| of_device(io) && io.error != 0);
    assert_eq!(failed.operation, WRITE);
    assert!([-EIO, -ENOSPC].contains(&failed.error), "{failed:?}");
}
