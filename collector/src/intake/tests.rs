use tapio_probes::record;
use tapio_wire::compress::Compression;
use tapio_wire::event::{Detail, Event};
use tapio_wire::ledger::{Reason, Stage};
use zerocopy::{FromZeros, IntoBytes};

use super::*;
use crate::intake::pass::PATIENCE;
use crate::outbox::Outbox;
use crate::outbox::pack::{NodeDescription, PackState, Packer};
use crate::outbox::queue::OpenLanes;
use crate::settings::config::Config;
use crate::settings::live::Filter;
use crate::settings::severity::Severity;

fn intake(batch_events: usize, queue_batches: usize) -> Intake {
    let mut config = Config::default();
    config.grpc.max_batch_size = batch_events;
    config.grpc.batch_timeout = Duration::from_secs(5);
    config.collector.max_events_per_sec = 0;
    let (queues, _parker) = Queues::new(queue_batches);
    Intake::new(SourceContext::for_config(&config, queues), Source::Shm, Identity::new(Vec::new()))
}

fn bulk() -> Vec<u8> {
    let mut record = record::RunQueue::new_zeroed();
    record.header.kind = RecordKind::RunQueue as u16;
    record.header.size = size_of_val(&record) as u16;
    record.as_bytes().to_vec()
}

fn exit(status: u32) -> Vec<u8> {
    let mut record = record::Exit::new_zeroed();
    record.header.kind = RecordKind::Exit as u16;
    record.header.size = size_of_val(&record) as u16;
    record.status = status;
    record.as_bytes().to_vec()
}

fn dropped(intake: &Intake, stage: Stage, reason: Reason) -> u64 {
    let ledger = intake.context.books.snapshot(&Default::default());
    ledger.account(Source::Shm).dropped[stage as usize][reason as usize]
}

#[test]
fn urgent_batches_leave_at_once_and_healthy_ends_wait() {
    let mut intake = intake(10, 4);
    let mut pass = intake.begin();
    pass.accept(&exit(0));
    pass.finish();
    assert!(intake.context.queues.pop(OpenLanes::Both).is_none());
    let mut pass = intake.begin();
    pass.accept(&exit(9));
    pass.finish();
    let (lane, body) = intake.context.queues.pop(OpenLanes::Both).expect("it is urgent");
    assert_eq!((lane, body.events.len()), (Lane::Lethal, 2));
    assert!(intake.is_empty());
}

#[test]
fn old_bulk_leaves_together_with_an_urgent_batch() {
    let mut intake = intake(10, 4);
    let mut lanes = |since: Duration| {
        let mut pass = intake.begin();
        pass.accept(&bulk());
        pass.accept(&exit(9));
        drop(pass);
        intake.bulk_since = intake.now.checked_sub(since);
        intake.flush(false);
        std::iter::from_fn(|| intake.context.queues.pop(OpenLanes::Both)).map(|(lane, _)| lane).collect::<Vec<_>>()
    };
    assert_eq!(lanes(Duration::from_secs(2)), [Lane::Lethal]);
    assert_eq!(lanes(Duration::from_secs(3)), [Lane::Lethal, Lane::Bulk], "more than half of its 5 s are over");
}

#[test]
fn a_nap_counts_as_age_of_a_full_batch() {
    let mut intake = intake(1000, 4);
    assert_eq!(intake.missing(), 1000, "while few come, a full batch");
    intake.expect(MANY_PER_SECOND);
    let mut pass = intake.begin();
    for _ in 0..FRAME_WORTH - 1 {
        pass.accept(&bulk());
    }
    assert_eq!(pass.missing(), 1);
    drop(pass);
    intake.napped(FRAME_AGE);
    intake.flush(false);
    assert!(!intake.is_empty(), "it came before the nap");
    intake.begin().accept(&bulk());
    intake.bulk_since = Some(intake.now);
    intake.flush(false);
    assert!(!intake.is_empty(), "the oldest has not waited");
    intake.bulk_since = None;
    intake.napped(FRAME_AGE);
    let mut pass = intake.begin();
    pass.accept(&bulk());
    pass.finish();
    let (lane, body) = intake.context.queues.pop(OpenLanes::Both).expect("it is worth a frame");
    assert_eq!((lane, body.events.len()), (Lane::Bulk, FRAME_WORTH + 1));
}

#[test]
fn without_room_bulk_yields_to_lethal_after_a_while() {
    let mut intake = intake(2, 1);
    for _ in 0..2 {
        let mut pass = intake.begin();
        assert_eq!(pass.room(), 2);
        pass.accept(&bulk());
        pass.accept(&bulk());
        pass.finish();
    }
    assert_eq!(intake.begin().room(), 0, "one batch fills the queue, one waits here");
    assert_eq!(intake.room_of(Lane::Lethal), 2, "a lethal ring is drained all the same");
    intake.blocked_since = Some(Instant::now() - PATIENCE);
    let mut pass = intake.begin();
    assert_eq!(pass.room(), 2);
    pass.accept(&bulk());
    pass.accept(&exit(9));
    pass.finish();
    assert_eq!(dropped(&intake, Stage::Queue, Reason::Full), 1);
    let (lane, _) = intake.context.queues.pop(OpenLanes::Lethal).expect("the lethal event got through");
    assert_eq!(lane, Lane::Lethal);
    intake.context.queues.pop(OpenLanes::Both).expect("the batch that filled the queue");
    intake.begin().finish();
    assert_eq!(intake.begin().room(), 2, "there is room again, and nothing is dropped any more");
}

#[test]
fn filtered_events_are_bulk_and_counted_by_reason() {
    let mut intake = intake(100, 4);
    intake.context.filter = Filter { min_severity: Severity::Low, sampling_rate: 0.5, events_per_second: 3 };
    intake.allowance = Allowance::new(3, Instant::now());
    let mut pass = intake.begin();
    for _ in 0..10 {
        pass.accept(&bulk());
        pass.accept(&exit(0));
    }
    pass.accept(&[0; 5]);
    pass.finish_all();
    let bodies: Vec<_> = std::iter::from_fn(|| intake.context.queues.pop(OpenLanes::Both)).collect();
    let events =
        |of: Lane| bodies.iter().filter(|(lane, _)| *lane == of).map(|(_, body)| body.events.len()).sum::<usize>();
    assert_eq!((events(Lane::Lethal), events(Lane::Bulk)), (10, 3));
    assert_eq!(dropped(&intake, Stage::Filter, Reason::Sampled), 5);
    assert_eq!(dropped(&intake, Stage::Filter, Reason::RateLimited), 2);
    assert_eq!(dropped(&intake, Stage::Decode, Reason::Malformed), 1);
}

#[test]
fn batches_are_packed_by_the_source_or_a_woken_thread() {
    let (queues, parker) = Queues::new(64);
    let mut context = SourceContext::for_config(&Config::default(), queues);
    let packer = Arc::new(Packer {
        queues: Arc::clone(&context.queues),
        outbox: Arc::new(Outbox::new(7, 1, 64 << 20, &context.links())),
        compression: Compression::None,
        counts: Arc::default(),
        books: Arc::clone(&context.books),
        sources_ended: Arc::default(),
        state: PackState::new(NodeDescription::new("node".into(), Arc::default())),
    });
    context.packer = Some(Arc::clone(&packer));
    let mut intake = Intake::new(context.clone(), Source::Collector, Identity::new(Vec::new()));
    let mut bring = |events_per_second: f64| {
        intake.expect(events_per_second);
        let mut pass = intake.begin();
        pass.observe(|batch, _| {
            let path = batch.text("/a");
            let body = Detail::CgroupMade { path };
            Event { time_ns: 1, entity: 1, pid: 1, source: Source::Collector, body }
        });
        pass.finish_all();
    };
    let frames = || std::iter::from_fn(|| packer.outbox.next(u64::MAX)).count();
    let is_woken_within = |limit: Duration| {
        let asked = Instant::now();
        parker.park_timeout(limit);
        asked.elapsed() < limit
    };
    bring(0.0);
    assert_eq!(frames(), 1);
    assert!(!is_woken_within(Duration::from_millis(10)));
    let state = packer.state.lock().expect("no panic");
    bring(0.0);
    drop(state);
    assert_eq!(frames(), 0, "somebody was at it");
    assert!(is_woken_within(Duration::from_secs(10)));
    bring(1e6);
    assert_eq!(frames(), 0, "much comes");
    assert!(is_woken_within(Duration::from_secs(10)));
}

#[test]
fn a_dropped_pass_leaves_its_events_to_the_next() {
    let mut intake = intake(10, 4);
    let mut pass = intake.begin();
    pass.accept(&exit(9));
    pass.accept(&[0; 5]);
    drop(pass);
    assert_eq!(dropped(&intake, Stage::Decode, Reason::Malformed), 1);
    assert!(intake.context.queues.pop(OpenLanes::Both).is_none(), "it was not finished");
    intake.begin().finish();
    let (_, body) = intake.context.queues.pop(OpenLanes::Both).expect("it is urgent");
    assert_eq!(body.events.len(), 1);
}
