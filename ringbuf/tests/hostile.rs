//! A peer that writes whatever it likes into its memfd, through the file. No byte of it may make the reader crash, read
//! outside of the ring, loop, or hand out what was not produced.
#![cfg(not(loom))]

use std::fs::File;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use proptest::prelude::{Strategy, any, prop, proptest};
use rustix::fs::{MemfdFlags, SealFlags};
use tapio_ringbuf::layout::{BUSY_BIT, DISCARD_BIT, LENGTH_MASK, MAGIC, VERSION};
use tapio_ringbuf::{Corruption, Drained, Error, Limits, Reader, Refusal};

const PAGE_BYTES: usize = 4096;
const DATA_BYTES: usize = 4096;
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// The peer's side: a file.
struct Peer(File);

impl Peer {
    fn new() -> Self {
        Self::with(2 * PAGE_BYTES + DATA_BYTES, SEALS)
    }

    fn with(file_bytes: usize, seals: SealFlags) -> Self {
        let memfd = rustix::fs::memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&memfd, file_bytes as u64).unwrap();
        let peer = Self(File::from(memfd));
        peer.producer(192, &MAGIC.to_ne_bytes());
        peer.producer(200, &VERSION.to_ne_bytes());
        peer.producer(208, &(file_bytes as u64).saturating_sub(2 * PAGE_BYTES as u64).to_ne_bytes());
        rustix::fs::fcntl_add_seals(&peer.0, seals).unwrap();
        peer
    }

    fn producer(&self, offset: usize, bytes: &[u8]) {
        // Where a sealed file is too small for a producer page, there is nothing to say in it.
        let _ = self.0.write_at(bytes, (PAGE_BYTES + offset) as u64);
    }

    fn produced(&self, position: u64) {
        self.producer(0, &position.to_ne_bytes());
    }

    fn consumed(&self, position: u64) {
        self.0.write_all_at(&position.to_ne_bytes(), 0).unwrap();
    }

    fn header(&self, offset: usize, word: u32) {
        self.data(offset, &u64::from(word).to_le_bytes());
    }

    fn data(&self, offset: usize, bytes: &[u8]) {
        self.0.write_all_at(bytes, (2 * PAGE_BYTES + offset) as u64).unwrap();
    }

    fn fd(&self) -> OwnedFd {
        self.0.try_clone().unwrap().into()
    }

    fn attach(&self) -> Result<Reader, Error> {
        Reader::from_memfd(self.fd(), Limits::default())
    }

    /// A reader that has consumed one record of eight bytes, so that positions are at 16.
    fn after_one_record(&self) -> Reader {
        self.header(0, 8);
        self.produced(16);
        let mut reader = self.attach().unwrap();
        assert_eq!(reader.drain(9, |_| {}).unwrap().records, 1);
        reader
    }
}

fn drain(reader: &mut Reader) -> Result<Drained, Error> {
    reader.drain(usize::MAX, |_| {})
}

fn corruption(result: Result<Drained, Error>) -> Corruption {
    match result {
        Err(Error::Corrupt { what, .. }) => what,
        other => panic!("not corrupt: {other:?}"),
    }
}

#[test]
fn a_memfd_without_all_seals_is_refused() {
    for missing in [SealFlags::SHRINK, SealFlags::GROW, SealFlags::SEAL] {
        let peer = Peer::with(2 * PAGE_BYTES + DATA_BYTES, SEALS.difference(missing));
        assert_eq!(peer.attach().err(), Some(Error::Refused(Refusal::Unsealed)), "{missing:?}");
    }
    assert!(Peer::new().attach().is_ok());
}

#[test]
fn what_is_no_memfd_is_refused() {
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    let refused = Reader::from_memfd(pipe, Limits::default()).err();
    assert_eq!(refused, Some(Error::Refused(Refusal::NotMemfd)));
    let file = File::open(std::env::current_exe().unwrap()).unwrap();
    assert!(matches!(Reader::from_memfd(file.into(), Limits::default()), Err(Error::Refused(_))));
}

#[test]
fn a_wrong_size_is_refused() {
    let pages = |count: usize| count * PAGE_BYTES;
    for file_bytes in [0, 1, pages(1), pages(2), pages(3) - 1, pages(3) + 8, pages(5), pages(2) + 2048] {
        let refused = Peer::with(file_bytes, SEALS).attach().err();
        assert!(matches!(refused, Some(Error::Refused(Refusal::Size { .. }))), "{file_bytes}: {refused:?}");
    }
    let limits = Limits { data_bytes_min: 8192, data_bytes_max: 16384, ..Limits::default() };
    let accepted = [4096, 8192, 16384, 32768]
        .map(|data_bytes| Reader::from_memfd(Peer::with(pages(2) + data_bytes, SEALS).fd(), limits).is_ok());
    assert_eq!(accepted, [false, true, true, false]);
}

#[test]
fn a_memfd_of_another_layout_is_refused() {
    let wrong = (u64::MAX).to_ne_bytes();
    for (offset, length) in [(192, 8), (200, 4), (204, 4), (208, 8)] {
        let peer = Peer::new();
        peer.producer(offset, &wrong[..length]);
        assert_eq!(peer.attach().err(), Some(Error::Refused(Refusal::Identity)), "{offset}");
    }
}

#[test]
fn a_peer_need_not_wake_a_napping_reader() {
    let peer = Peer::new();
    assert!(!peer.attach().unwrap().is_woken_when_filling());
    peer.producer(204, &1u32.to_ne_bytes());
    assert!(peer.attach().unwrap().is_woken_when_filling());
}

#[test]
fn positions_that_make_no_sense_at_attach_are_corrupt() {
    let cases = [
        (8, 0, Corruption::OutOfReach),
        (0, DATA_BYTES as u64 + 8, Corruption::OutOfReach),
        (u64::MAX - 7, DATA_BYTES as u64, Corruption::OutOfReach),
        (4, 12, Corruption::Misaligned),
        (0, 12, Corruption::Misaligned),
    ];
    for (consumed, produced, what) in cases {
        let peer = Peer::new();
        peer.consumed(consumed);
        peer.produced(produced);
        assert_eq!(peer.attach().err(), Some(Error::Corrupt { position: consumed, what }));
    }
}

#[test]
fn positions_may_pass_the_end_of_their_type() {
    let peer = Peer::new();
    peer.consumed(u64::MAX - 15);
    peer.produced(8);
    peer.header(DATA_BYTES - 16, 8);
    peer.header(0, 0);
    let mut reader = peer.attach().unwrap();
    assert_eq!(drain(&mut reader).unwrap().records, 2);
    assert!(reader.is_empty());
}

#[test]
fn a_length_beyond_the_produced_bytes_is_corrupt() {
    for length in [9, 16, DATA_BYTES as u32, BUSY_BIT | 9, DISCARD_BIT | 9, u32::MAX >> 2] {
        let peer = Peer::new();
        peer.header(0, 8);
        peer.header(16, length & !BUSY_BIT);
        peer.produced(32);
        let mut reader = peer.attach().unwrap();
        let mut seen = 0;
        let result = reader.drain(9, |_| seen += 1);
        assert_eq!(result, Err(Error::Corrupt { position: 16, what: Corruption::Overlong }), "{length:x}");
        assert_eq!((seen, reader.consumed()), (1, 1));
    }
}

#[test]
fn a_record_over_the_limit_is_corrupt() {
    let peer = Peer::new();
    peer.header(0, 100);
    peer.header(112, 101);
    peer.produced(224);
    let mut reader = Reader::from_memfd(peer.fd(), Limits { record_bytes_max: 100, ..Limits::default() }).unwrap();
    let mut lengths = Vec::new();
    let result = reader.drain(9, |record| lengths.push(record.len()));
    assert_eq!(result, Err(Error::Corrupt { position: 112, what: Corruption::OverLimit }));
    assert_eq!((lengths, reader.consumed()), (vec![100], 1));
}

#[test]
fn a_corrupt_ring_stays_corrupt_and_empty() {
    let peer = Peer::new();
    let mut reader = peer.after_one_record();
    peer.produced(20);
    assert!(!reader.is_empty());
    let first = drain(&mut reader);
    assert_eq!(corruption(first.clone()), Corruption::Misaligned);
    peer.produced(32);
    assert_eq!(drain(&mut reader), first);
    assert!(reader.is_empty());
}

#[test]
fn a_producer_that_goes_backwards_or_jumps_is_corrupt() {
    for (position, what) in [
        (0, Corruption::OutOfReach),
        (8, Corruption::OutOfReach),
        (16 + DATA_BYTES as u64 + 8, Corruption::OutOfReach),
        (u64::MAX - 7, Corruption::OutOfReach),
    ] {
        let peer = Peer::new();
        let mut reader = peer.after_one_record();
        peer.produced(position);
        assert!(reader.pending_bytes() <= DATA_BYTES);
        assert_eq!(corruption(drain(&mut reader)), what, "{position}");
    }
    // Backwards, and still ahead of the consumer.
    let peer = Peer::new();
    let mut reader = peer.after_one_record();
    peer.produced(48);
    peer.header(16, BUSY_BIT | 8);
    assert!(drain(&mut reader).unwrap().stalled);
    peer.produced(32);
    assert_eq!(corruption(drain(&mut reader)), Corruption::Rewound);
}

#[test]
fn a_busy_record_stalls_each_drain_and_never_longer() {
    let peer = Peer::new();
    peer.header(0, 8);
    peer.header(16, BUSY_BIT | 8);
    peer.produced(32);
    let mut reader = peer.attach().unwrap();
    let first = drain(&mut reader).unwrap();
    assert_eq!((first.records, first.stalled, first.more), (1, true, false));
    for _ in 0..1000 {
        assert_eq!(drain(&mut reader), Ok(Drained { stalled: true, ..Drained::default() }));
    }
    assert!(!reader.is_empty());
    peer.header(16, 8);
    assert_eq!(drain(&mut reader).unwrap().records, 1);
}

#[test]
fn discarded_records_are_skipped_and_bounded() {
    let peer = Peer::new();
    for offset in (0..DATA_BYTES).step_by(8) {
        peer.header(offset, DISCARD_BIT);
    }
    peer.produced(DATA_BYTES as u64);
    let mut reader = peer.attach().unwrap();
    let bounded = reader.drain(100, |_| unreachable!()).unwrap();
    assert_eq!((bounded.discarded, bounded.records, bounded.more), (100, 0, true));
    assert_eq!(drain(&mut reader).unwrap().discarded, DATA_BYTES / 8 - 100);
    assert_eq!(reader.consumed(), 0);
}

#[test]
fn later_writes_of_a_peer_do_not_change_held_bytes() {
    let peer = Peer::new();
    peer.header(0, 16);
    peer.data(8, &[1; 16]);
    peer.header(24, 8);
    peer.data(32, &[3; 8]);
    peer.produced(40);
    let mut reader = peer.attach().unwrap();
    let mut seen = Vec::new();
    let drained = reader.drain(9, |record| {
        if seen.is_empty() {
            // Inside of the callback: its payload, its header, the next record and header, and both positions.
            peer.data(8, &[2; 16]);
            peer.header(0, u32::MAX);
            peer.header(24, 1 << 20);
            peer.data(32, &[2; 8]);
            peer.consumed(u64::MAX);
            peer.produced(u64::MAX);
        }
        seen.push(record.to_vec());
    });
    assert_eq!((drained.unwrap().records, seen), (2, vec![vec![1; 16], vec![3; 8]]));
    assert_eq!(corruption(drain(&mut reader)), Corruption::OutOfReach);
}

#[test]
fn changed_headers_are_checked_as_the_reader_finds_them() {
    // More bytes than are copied at once: the last records are looked at after the callback wrote.
    const LARGE_BYTES: usize = 1 << 16;
    const RECORDS: usize = LARGE_BYTES / 64;
    for (header, what) in
        [(1 << 20, Corruption::Overlong), (LENGTH_MASK, Corruption::Overlong), (1016, Corruption::OverLimit)]
    {
        let peer = Peer::with(2 * PAGE_BYTES + LARGE_BYTES, SEALS);
        for record in 0..RECORDS {
            peer.header(64 * record, 56);
        }
        peer.produced(LARGE_BYTES as u64);
        let limits = Limits { record_bytes_max: 1000, ..Limits::default() };
        let mut reader = Reader::from_memfd(peer.fd(), limits).unwrap();
        let mut seen = 0;
        let result = reader.drain(RECORDS, |_| {
            if seen == 0 {
                peer.header(64 * (RECORDS - 100), header);
            }
            seen += 1;
        });
        assert_eq!((corruption(result), seen), (what, RECORDS - 100));
        assert_eq!(reader.consumed(), seen as u64);
    }
}

#[test]
fn a_file_cannot_shrink_under_the_reader() {
    let peer = Peer::new();
    let mut reader = peer.after_one_record();
    assert!(peer.0.set_len(0).is_err());
    // What a peer can do is punch holes, which read as zeros: records of no bytes.
    rustix::fs::fallocate(
        &peer.0,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        2 * PAGE_BYTES as u64,
        DATA_BYTES as u64,
    )
    .unwrap();
    peer.produced(48);
    let drained = drain(&mut reader).unwrap();
    assert_eq!((drained.records, drained.bytes), (4, 0));
}

/// Words that a hostile peer would try: mostly plausible, some wild.
fn word() -> impl Strategy<Value = u32> {
    prop::strategy::Union::new([
        (0u32..256).boxed(),
        (0u32..8192).boxed(),
        (0u32..256).prop_map(|length| length | DISCARD_BIT).boxed(),
        (0u32..256).prop_map(|length| length | BUSY_BIT).boxed(),
        any::<u32>().boxed(),
    ])
}

proptest! {
    #[test]
    fn random_bytes_never_make_a_drain_leave_its_bounds(
        words in prop::collection::vec(word(), DATA_BYTES / 8),
        start in any::<u64>().prop_map(|start| start & !7),
        steps in prop::collection::vec((0u64..DATA_BYTES as u64 + 64, 0usize..600, any::<bool>()), 1..20),
    ) {
        let peer = Peer::new();
        let data: Vec<u8> = words.iter().flat_map(|word| u64::from(*word).to_le_bytes()).collect();
        peer.data(0, &data);
        peer.consumed(start);
        peer.produced(start);
        let mut reader = peer.attach().unwrap();
        let mut produced = start;
        for (advance, max_records, stop) in steps {
            produced = produced.wrapping_add(if advance % 5 == 0 { advance } else { advance & !7 });
            peer.produced(produced);
            let pending = reader.pending_bytes();
            assert!(pending <= DATA_BYTES);
            let before = reader.consumed();
            let mut handed_out = 0;
            let mut sum = 0u64;
            let drained = reader.drain_while(max_records, |record| {
                handed_out += 1;
                // Touches every byte, so that one outside of the ring would be a fault.
                sum += record.iter().map(|&byte| u64::from(byte)).sum::<u64>();
                if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert!(handed_out <= max_records && sum <= 255 * DATA_BYTES as u64);
            assert_eq!(reader.consumed() - before, handed_out as u64);
            if let Ok(drained) = drained {
                assert_eq!(drained.records, handed_out);
                assert!(drained.records + drained.discarded <= max_records);
                assert!(drained.bytes + 8 * (drained.records + drained.discarded) <= pending);
                assert!(reader.pending_bytes() <= pending);
            } else {
                assert!(reader.is_empty());
            }
        }
    }
}
