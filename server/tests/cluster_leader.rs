//! At most one server leads, whatever happens to it, to the others and to NATS.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::cluster_support::*;
use tapio_server::cluster::{ClusterSection, Leadership};

/// Short, and long enough that a busy machine does not miss a renewal.
fn member(nats: &Nats, server: &str) -> Member {
    Member::begin_with(section(nats, server), timing())
}

fn leadership(member: &Member) -> Arc<Leadership> {
    Arc::clone(member.cluster.leadership())
}

fn leads(member: &Member) -> Option<u64> {
    member.cluster.leadership().term().map(|term| term.number())
}

/// Which of them leads.
fn the_leader<'a>(members: &[&'a Member]) -> &'a Member {
    until("a leader", || members.iter().find(|member| leads(member).is_some()).copied())
}

/// Looks all the time how many lead.
struct Watch {
    is_over: Arc<AtomicBool>,
    looking: Option<JoinHandle<()>>,
}

impl Watch {
    fn over(members: &[&Member]) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let (over, leaderships) = (Arc::clone(&is_over), members.iter().map(|member| leadership(member)).collect());
        let looking = std::thread::spawn(move || {
            let leaderships: Vec<Arc<Leadership>> = leaderships;
            while !over.load(Ordering::Acquire) {
                let terms: Vec<_> = leaderships.iter().filter_map(|one| one.term()).collect();
                // A term that was there when it was looked, and is there when all were looked at.
                let valid = terms.iter().filter(|term| term.is_valid_now()).count();
                assert!(valid <= 1, "{terms:?} at once");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self { is_over, looking: Some(looking) }
    }

    fn end(mut self) {
        self.is_over.store(true, Ordering::Release);
        self.looking.take().expect("it runs").join().expect("at most one led at any moment");
    }
}

#[test]
fn a_leader_is_succeeded_at_its_end_or_lapsed_lease() {
    let Some(nats) = Nats::start() else { return };
    let (a, b, c) = (member(&nats, "a"), member(&nats, "b"), member(&nats, "c"));
    let all = [&a, &b, &c];
    let watch = Watch::over(&all);
    let first = the_leader(&all);
    let term = leads(first).expect("it leads");
    for member in all {
        until("everybody knows who", || {
            (member.cluster.leadership().leader().as_deref() == Some(first.cluster.server())).then_some(())
        });
    }
    let ended = Instant::now();
    first.cluster.stop();
    let left: Vec<&Member> =
        all.into_iter().filter(|member| member.cluster.server() != first.cluster.server()).collect();
    let second = the_leader(&left);
    assert!(ended.elapsed() < timing().lease, "{:?}: it said that it ends", ended.elapsed());
    assert!(leads(second).is_some_and(|later| later > term));

    second.cluster.freeze();
    let third: Vec<&Member> =
        left.into_iter().filter(|member| member.cluster.server() != second.cluster.server()).collect();
    let led = leads(the_leader(&third));
    assert!(leads(second).is_none() && led > Some(term + 1), "{led:?}");
    assert!(third[0].cluster.leadership().changes() >= 3);
    watch.end();
}

#[test]
fn a_server_that_saw_no_term_waits_for_a_lease() {
    let Some(nats) = Nats::start() else { return };
    let a = member(&nats, "a");
    the_leader(&[&a]);
    a.cluster.stop();
    // NATS may have lost what came after the release: somebody else may be in a later term.
    let began = Instant::now();
    let b = member(&nats, "b");
    the_leader(&[&b]);
    assert!(began.elapsed() >= timing().lease, "{:?}", began.elapsed());
}

#[test]
fn leadership_ends_without_nats_and_resumes_with_even_empty_nats() {
    let Some(mut nats) = Nats::start() else { return };
    let (a, b) = (member(&nats, "a"), member(&nats, "b"));
    let watch = Watch::over(&[&a, &b]);
    the_leader(&[&a, &b]);
    nats.kill();
    until("nobody", || (leads(&a).is_none() && leads(&b).is_none()).then_some(()));
    nats.restart();
    let term = leads(the_leader(&[&a, &b]));
    // The lease is lost with all the rest. Its holder may be in its term still.
    nats.restart_empty();
    let emptied = Instant::now();
    until("a leader by a lease that is in the new bucket", || {
        let is_led = leads(&a).is_some() || leads(&b).is_some();
        (emptied.elapsed() > timing().lease && is_led).then_some(())
    });
    assert!(leads(the_leader(&[&a, &b])) >= term);
    watch.end();
}

#[test]
fn a_cut_off_leader_gives_up_before_another_takes_over() {
    let Some(nats) = Nats::start() else { return };
    let proxy = Proxy::start(nats.port());
    let section = ClusterSection { url: proxy.url(), server: Some("a".into()), ..ClusterSection::default() };
    let a = Member::begin_with(section, timing());
    the_leader(&[&a]);
    let b = member(&nats, "b");
    until("b knows of it", || (b.cluster.leadership().leader().as_deref() == Some("a")).then_some(()));
    let watch = Watch::over(&[&a, &b]);
    proxy.hold(true);
    the_leader(&[&b]);
    assert!(leads(&a).is_none());
    // What it had sent comes through late, and changes nothing.
    proxy.hold(false);
    until("a knows of b", || (a.cluster.leadership().leader().as_deref() == Some("b")).then_some(()));
    assert!(leads(&b).is_some() && leads(&a).is_none());
    watch.end();
}

const NATS_VARIABLE: &str = "TAPIO_TEST_LEADER_NATS";
const PEER_VARIABLE: &str = "TAPIO_TEST_LEADER_PEER";

/// A server's election in a process of its own: it says when it acts as the leader, waits for an answer, and says what the term
/// is worth then.
#[test]
#[ignore = "the next test runs it"]
fn a_leader_in_a_process_of_its_own() {
    let url = std::env::var(NATS_VARIABLE).expect("run by the next test");
    let peer = TcpStream::connect(std::env::var(PEER_VARIABLE).expect("run by the next test")).expect("it listens");
    let section = ClusterSection { url, server: Some("child".into()), ..ClusterSection::default() };
    let member = Member::begin_with(section, timing());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut answers = BufReader::new(peer.try_clone().expect("a descriptor")).lines();
    let mut peer = peer;
    loop {
        let term = runtime.block_on(member.cluster.leadership().led());
        if writeln!(peer, "acts {}", term.number()).is_err() || answers.next().is_none() {
            return;
        }
        let worth = if term.is_valid_now() { "valid" } else { "void" };
        if writeln!(peer, "{worth} {}", term.number()).is_err() {
            return;
        }
    }
}

#[test]
fn a_leader_resumed_after_its_term_does_not_act() {
    let Some(nats) = Nats::start() else { return };
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "--nocapture", "cluster_leader::a_leader_in_a_process_of_its_own"])
        .env(NATS_VARIABLE, nats.url())
        .env(PEER_VARIABLE, listener.local_addr().expect("it is bound").to_string())
        .spawn()
        .expect("this program starts");
    let child = Process(child);
    let (peer, _) = listener.accept().expect("the child connects");
    peer.set_read_timeout(Some(LIMIT)).expect("set");
    let mut lines = BufReader::new(peer.try_clone().expect("a descriptor")).lines();
    let mut peer = peer;
    let mut next = || lines.next().expect("the child runs").expect("a line");
    assert_eq!(next(), "acts 1");
    writeln!(peer, "go on").expect("sent");
    assert_eq!((next().as_str(), next().as_str()), ("valid 1", "acts 1"));
    let b = member(&nats, "b");
    until("b knows of it", || (b.cluster.leadership().leader().as_deref() == Some("child")).then_some(()));

    // In the middle of what only the leader may do.
    child.signal(libc::SIGSTOP);
    the_leader(&[&b]);
    let led = leads(&b).expect("b leads");
    child.signal(libc::SIGCONT);
    writeln!(peer, "go on").expect("sent");
    assert_eq!(next(), "void 1");
    // It renews nothing and acts again only when b has ended.
    until("b renews its lease twice", {
        let before = Instant::now();
        let b = &b;
        move || (leads(b) == Some(led) && before.elapsed() > timing().lease).then_some(())
    });
    b.cluster.stop();
    assert_eq!(next(), format!("acts {}", led + 1));
}
