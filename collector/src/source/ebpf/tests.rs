use std::net::{TcpListener, TcpStream};

use tapio_probes::{ExecCommand, Tuning};
use tapio_wire::event::{Detail, SOURCES, Source};

use super::*;
use crate::intake::identity::Identity;
use crate::intake::source_context::SourceContext;
use crate::outbox::queue::{OpenLanes, Queues};
use crate::settings::config::Config;

#[test]
fn bulk_events_arrive_while_the_kernel_samples() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP bulk_events_arrive_while_the_kernel_samples: needs root and BPF");
        assert!(!std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all"), "TAPIO_REQUIRE=all");
        return;
    }
    let (queues, _parker) = Queues::new(1024);
    let context = SourceContext::for_config(&Config::default(), queues);
    let tuning = Tuning { bulk_sampling: 2, ..Tuning::default() };
    let load = LoadConfig { own_pid: None, tuning, ..LoadConfig::default() };
    let stop = Arc::new(Stop::new().expect("an eventfd"));
    let source = EbpfSource::load(&load, Duration::from_millis(1), Duration::from_millis(50), Arc::clone(&stop));
    let source = source.expect("the probes load");
    let controls = source.controls().expect("it was not stopped");
    let intake = Intake::new(context.clone(), Source::Ebpf, Identity::of_this_machine(Arc::clone(&context.directory)));
    let running = std::thread::spawn(move || source.run(intake));

    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let server = listener.local_addr().expect("it is bound");
    for _ in 0..100 {
        drop(TcpStream::connect(server).expect("it listens"));
        drop(listener.accept().expect("it connected"));
    }
    controls.set(Tuning { bulk_sampling: 1, ..tuning }).expect("it can be set");
    drop(TcpStream::connect(server).expect("it listens"));
    stop.set();
    running.join().expect("no panic").expect("no error");

    let (mut popped, mut connections) = (0, 0);
    while let Some((_, body)) = context.queues.pop(OpenLanes::Both) {
        popped += body.events.len() as u64;
        let of_server = |detail: &Detail| matches!(detail, Detail::Tcp(tcp) if tcp.destination_port == server.port());
        connections += body.events.iter().filter(|event| of_server(&event.body)).count();
    }
    assert!((50..=200).contains(&connections), "{connections}");
    let ledger = context.books.snapshot(&[0; SOURCES]);
    let account = ledger.account(Source::Ebpf);
    let dropped = account.dropped.iter().flatten().sum::<u64>();
    assert!(account.dropped[Stage::Filter as usize][Reason::Sampled as usize] >= 150, "{account:?}");
    assert_eq!(account.emitted, popped + dropped, "{account:?}");
}

#[test]
fn fetched_sums_are_counted_and_arguments_are_redacted() {
    if !rustix::process::geteuid().is_root() {
        println!(
            "SKIP fetched_sums_are_counted_and_arguments_are_redacted: \
             needs root and BPF"
        );
        assert!(!std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all"), "TAPIO_REQUIRE=all");
        return;
    }
    let (queues, _parker) = Queues::new(1024);
    let mut config = Config::default();
    config.collectors.ebpf.dns_timeout = Duration::from_millis(200);
    let context = SourceContext::for_config(&config, queues);
    // What the probes sample, user space has not to sample again, and sums are never sampled.
    let tuning = Tuning { exec_command: ExecCommand::Full, ..Tuning::default() };
    let load = LoadConfig { own_pid: None, disabled: Vec::new(), tuning, ..LoadConfig::default() };
    let stop = Arc::new(Stop::new().expect("an eventfd"));
    let source = EbpfSource::load(&load, Duration::from_millis(1), Duration::from_millis(20), Arc::clone(&stop));
    let source = source.expect("the probes load");
    let intake = Intake::new(context.clone(), Source::Ebpf, Identity::of_this_machine(Arc::clone(&context.directory)));
    let running = std::thread::spawn(move || source.run(intake));
    let arguments = ["--user", "me", "--password", "hunter2", "API_TOKEN=hunter2"];
    let mut child = std::process::Command::new("/bin/true").args(arguments).spawn().expect("it runs");
    let pid = child.id();
    child.wait().expect("it ends");

    // Nobody answers there, and the kernel says why the query was dropped.
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend(b"\x05tapio\x07invalid\0\0\x01\0\x01");
    socket.send_to(&query, "127.9.9.9:53").expect("it is sent");

    let (mut popped, mut histograms, mut command, mut unanswered, mut drops) = (0, 0, None, 0, 0);
    let mut take = |context: &SourceContext| {
        while let Some((_, body)) = context.queues.pop(OpenLanes::Both) {
            popped += body.events.len() as u64;
            assert!(body.names.iter().all(|name| !name.contains("hunter2")), "a secret left");
            for event in &body.events {
                match &event.body {
                    Detail::Histogram(_) => histograms += 1,
                    Detail::PacketDrop { count, .. } => drops += count,
                    Detail::Dns { name, rcode: 255, .. } if body.names[*name as usize] == "tapio.invalid" => {
                        unanswered += 1;
                    }
                    Detail::Exec(exec) if event.pid == pid => {
                        let name = |index: u32| body.names[index as usize].clone();
                        command = Some((name(exec.path), name(exec.arguments)));
                    }
                    _ => {}
                }
            }
        }
        histograms > 0 && command.is_some() && unanswered > 0 && drops > 0
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !take(&context) {
        assert!(Instant::now() < deadline, "nothing was summed up");
        std::thread::sleep(Duration::from_millis(5));
    }
    stop.set();
    running.join().expect("no panic").expect("no error");
    take(&context);
    let line = "/bin/true --user me --password [redacted] API_TOKEN=[redacted]";
    assert_eq!(command, Some(("/bin/true".into(), line.into())));
    let ledger = context.books.snapshot(&[0; SOURCES]);
    let account = ledger.account(Source::Ebpf);
    let dropped = account.dropped.iter().flatten().sum::<u64>();
    assert_eq!(account.emitted, popped + dropped, "{account:?}");
}
