use zerocopy::{FromZeros, IntoBytes};

use super::*;

fn run(bytes: &[u8], batch: &mut Batch) -> Result<bool, Malformed> {
    let (header, kind) = header(bytes)?;
    decode(bytes, &header, kind, Source::Shm, &mut Identity::new(Vec::new()), batch)
}

fn exec(size: usize) -> record::Exec {
    let mut exec = record::Exec::new_zeroed();
    exec.header.kind = RecordKind::Exec as u16;
    exec.header.size = size as u16;
    exec.comm = record::comm("web");
    exec
}

#[test]
fn a_record_becomes_an_event_with_interned_names() {
    let mut batch = Batch::default();
    let record = exec(size_of::<record::Exec>());
    run(record.as_bytes(), &mut batch).expect("well formed");
    run(record.as_bytes(), &mut batch).expect("well formed");
    assert_eq!(batch.body.names, ["web"]);
    assert!(batch.body.events.iter().all(|event| matches!(&event.body, Detail::Exec(exec) if exec.comm == 0)));
}

#[test]
fn records_that_break_the_layout_are_refused_and_leave_nothing() {
    let mut batch = Batch::default();
    let good = exec(size_of::<record::Exec>());
    let lying = exec(8);
    let mut unknown = good;
    unknown.header.kind = 999;
    let mut short = good.as_bytes()[..40].to_vec();
    short[2..4].copy_from_slice(&40u16.to_ne_bytes());
    for bytes in [lying.as_bytes(), unknown.as_bytes(), &short, &[], &[0; 31]] {
        assert_eq!(run(bytes, &mut batch), Err(Malformed));
    }
    assert!(batch.body.events.is_empty() && batch.body.names.is_empty());
}

#[test]
fn a_reason_without_a_name_is_shown_as_its_number() {
    let mut drops = record::PacketDrop::new_zeroed();
    drops.header.kind = RecordKind::PacketDrop as u16;
    drops.header.size = size_of::<record::PacketDrop>() as u16;
    // Of another part of the kernel.
    (drops.reason, drops.count, drops.interface) = (0x2_0001, 7, 3);
    let mut batch = Batch::default();
    run(drops.as_bytes(), &mut batch).expect("well formed");
    let reason = batch.text("reason 0x20001");
    assert_eq!(batch.body.events[0].body, Detail::PacketDrop { count: 7, reason, interface: 3 });
    assert_eq!(batch.body.names.len(), 1);
}

#[test]
fn every_kind_has_the_lane_of_its_event() {
    for kind in RecordKind::ALL {
        let mut bytes = vec![0; record::RECORD_BYTES_MAX];
        // A histogram's measure: 0 is none.
        bytes[size_of::<record::Header>()] = 1;
        let size = (32..=record::RECORD_BYTES_MAX).step_by(8).find(|&size| {
            bytes[..2].copy_from_slice(&(kind as u16).to_ne_bytes());
            bytes[2..4].copy_from_slice(&(size as u16).to_ne_bytes());
            run(&bytes[..size], &mut Batch::default()).is_ok()
        });
        let size = size.expect("some size is the kind's");
        bytes[2..4].copy_from_slice(&(size as u16).to_ne_bytes());
        let mut batch = Batch::default();
        run(&bytes[..size], &mut batch).expect("well formed");
        assert_eq!(batch.body.events[0].kind().lane(), lane(kind), "{kind:?}");
    }
}

#[test]
fn a_signal_by_a_process_names_its_senders_parent() {
    let mut signal = record::Signal::new_zeroed();
    signal.header.kind = RecordKind::Signal as u16;
    signal.header.size = size_of::<record::Signal>() as u16;
    (signal.sender_comm, signal.sender_parent_comm) = (record::comm("runc"), record::comm("bash"));
    let mut parent = |pid: u32, from_kernel: u8| {
        (signal.sender_parent_pid, signal.from_kernel) = (pid, from_kernel);
        let mut batch = Batch::default();
        run(signal.as_bytes(), &mut batch).expect("well formed");
        let Detail::Signal(sent) = &batch.body.events[0].body else { panic!("a signal") };
        let name = sent.sender_parent.checked_sub(1)?;
        Some(batch.body.names[name as usize].clone())
    };
    assert_eq!(parent(55, 0).as_deref(), Some("bash"));
    assert_eq!(parent(1, 0).as_deref(), Some("init"), "whatever the first process is called");
    assert_eq!(parent(55, 1), None);
}
