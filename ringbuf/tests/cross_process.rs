//! A writer, or several threads of writers, in a second process: this test binary, run again with its standard input a socket on which it hands over its ring.
#![cfg(not(loom))]

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use tapio_ringbuf::{EventFd, Limits, Poller, Reader, SharedWriter, Writer};

const RECORDS: u64 = 1_000_000;
/// Small enough for the writer to be ahead of the reader by a whole ring, often.
const DATA_BYTES: usize = 1 << 16;
const CHILD: &str = "TAPIO_RINGBUF_TEST_CHILD";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// Drops what does not fit.
    Drop,
    /// Tries again, in batches, until all fit.
    Wait,
}

/// A record of varying length that starts with its number and differs from any other.
fn record(number: u64, buffer: &mut [u8; 64]) -> &[u8] {
    let length = 8 + (number % 57) as usize;
    buffer[..8].copy_from_slice(&number.to_ne_bytes());
    buffer[8..length].fill(number as u8);
    &buffer[..length]
}

/// The number of a record, checked to be whole.
fn number(record: &[u8]) -> u64 {
    let number = u64::from_ne_bytes(*record.first_chunk().expect("eight bytes"));
    assert_eq!(record.len(), 8 + (number % 57) as usize, "record {number}");
    assert!(record[8..].iter().all(|&byte| byte == number as u8), "record {number}");
    number
}

fn send(socket: BorrowedFd<'_>, descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
    rustix::net::sendmsg(socket, &[IoSlice::new(b"r")], &mut ancillary, SendFlags::empty()).unwrap();
}

fn receive(socket: BorrowedFd<'_>) -> [OwnedFd; 2] {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    let descriptors = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    descriptors.collect::<Vec<_>>().try_into().expect("a memfd and an eventfd")
}

/// The second process.
fn write_all(pace: Pace) {
    let (mut writer, memfd, eventfd) = Writer::create(DATA_BYTES, "cross-process").unwrap();
    send(std::io::stdin().as_fd(), &[memfd.as_fd(), eventfd.as_fd()]);
    match pace {
        Pace::Drop => {
            for number in 0..RECORDS {
                writer.write(record(number, &mut [0; 64]));
            }
        }
        Pace::Wait => {
            let mut next = 0;
            while next < RECORDS {
                let mut buffers = [[0; 64]; 100];
                let batch = (next..RECORDS).zip(&mut buffers).map(|(number, buffer)| record(number, buffer));
                let batch: Vec<&[u8]> = batch.collect();
                let mut written = 0;
                while written < batch.len() {
                    written += writer.write_batch(batch[written..].iter().copied());
                    std::thread::yield_now();
                }
                next += written as u64;
            }
        }
    }
    assert_eq!(writer.emitted(), RECORDS);
}

/// Threads of the second process that write to one ring.
const PRODUCERS: u64 = 3;

/// The second process when it has several producers: each writes the numbers that leave its own remainder.
fn write_from_threads(pace: Pace) {
    let (writer, memfd, eventfd) = SharedWriter::create(DATA_BYTES, "cross-process").unwrap();
    send(std::io::stdin().as_fd(), &[memfd.as_fd(), eventfd.as_fd()]);
    std::thread::scope(|scope| {
        for producer in 0..PRODUCERS {
            let writer = writer.clone();
            scope.spawn(move || {
                for number in (producer..RECORDS).step_by(PRODUCERS as usize) {
                    match pace {
                        Pace::Drop => drop(writer.write(record(number, &mut [0; 64]))),
                        Pace::Wait => {
                            while !writer.try_write(record(number, &mut [0; 64])) {
                                std::thread::yield_now();
                            }
                        }
                    }
                }
            });
        }
    });
    assert_eq!(writer.emitted(), RECORDS);
}

struct Peer {
    process: Child,
    socket: UnixStream,
}

fn start(test: &str) -> Peer {
    let (socket, theirs) = UnixStream::pair().unwrap();
    let (_, module) = module_path!().split_once("::").expect("a module of the executable");
    let process = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::{test}"), "--nocapture", "--quiet"])
        .env(CHILD, "1")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    Peer { process, socket }
}

/// Reads until the peer is gone and its ring is empty; gives each record's number to `each`.
fn read_all(peer: &mut Peer, many: bool, mut each: impl FnMut(u64)) -> Reader {
    let [memfd, eventfd] = receive(peer.socket.as_fd());
    let mut reader = Reader::from_memfd(memfd, Limits::default()).unwrap();
    let eventfd = EventFd::from_peer(eventfd).unwrap();
    let mut poller = Poller::new().unwrap();
    poller.add_edge(eventfd.as_fd(), 0).unwrap();
    // The socket's end says that the process is gone.
    poller.add(peer.socket.as_fd(), 1).unwrap();
    let mut gone = false;
    loop {
        let drained = reader.drain(256, |record| each(number(record))).unwrap();
        assert!(many || !drained.stalled, "a writer with one producer never shows a busy record");
        if drained.records > 0 {
            continue;
        }
        if gone {
            break;
        }
        reader.set_need_wakeup(true);
        if reader.is_empty() {
            let ready = poller.wait(Some(Duration::from_secs(30))).unwrap();
            assert!(!ready.is_empty(), "a wakeup was lost: {} bytes are pending", reader.pending_bytes());
            gone = ready.contains(&1);
        }
        reader.set_need_wakeup(false);
    }
    assert!(peer.process.wait().unwrap().success());
    reader
}

#[test]
fn a_million_records_arrive_in_order_or_are_counted_dropped() {
    if std::env::var_os(CHILD).is_some() {
        return write_all(Pace::Drop);
    }
    let mut peer = start("a_million_records_arrive_in_order_or_are_counted_dropped");
    let mut next = 0;
    let mut seen = 0;
    let reader = read_all(&mut peer, false, |number| {
        assert!(number >= next, "record {number} after {next}");
        next = number + 1;
        seen += 1;
    });
    let counters = reader.producer_counters().unwrap();
    assert_eq!(counters.emitted, RECORDS);
    assert_eq!(reader.consumed(), seen);
    assert_eq!(reader.consumed() + counters.dropped, counters.emitted);
    eprintln!("{seen} consumed, {} dropped", counters.dropped);
}

#[test]
fn a_writer_that_waits_for_room_loses_nothing() {
    if std::env::var_os(CHILD).is_some() {
        return write_all(Pace::Wait);
    }
    let mut peer = start("a_writer_that_waits_for_room_loses_nothing");
    let mut next = 0;
    let reader = read_all(&mut peer, false, |number| {
        assert_eq!(number, next);
        next += 1;
    });
    assert_eq!((next, reader.consumed(), reader.producer_counters().unwrap().dropped), (RECORDS, RECORDS, 0));
}

/// Reads what several threads wrote, each in order; returns the reader and the number of records.
fn read_from_threads(test: &str) -> (Reader, u64) {
    let mut peer = start(test);
    let mut next: [u64; PRODUCERS as usize] = std::array::from_fn(|producer| producer as u64);
    let mut seen = 0;
    let reader = read_all(&mut peer, true, |number| {
        let next = &mut next[(number % PRODUCERS) as usize];
        assert!(number >= *next, "record {number} after {next}");
        *next = number + PRODUCERS;
        seen += 1;
    });
    (reader, seen)
}

#[test]
fn a_million_records_of_threads_keep_each_threads_order() {
    if std::env::var_os(CHILD).is_some() {
        return write_from_threads(Pace::Drop);
    }
    let test = "a_million_records_of_threads_keep_each_threads_order";
    let (reader, seen) = read_from_threads(test);
    let counters = reader.producer_counters().unwrap();
    assert_eq!((counters.emitted, reader.consumed()), (RECORDS, seen));
    assert_eq!(reader.consumed() + counters.dropped, counters.emitted);
    eprintln!("{seen} consumed, {} dropped", counters.dropped);
}

#[test]
fn several_threads_that_wait_for_room_lose_nothing() {
    if std::env::var_os(CHILD).is_some() {
        return write_from_threads(Pace::Wait);
    }
    let (reader, seen) = read_from_threads("several_threads_that_wait_for_room_lose_nothing");
    assert_eq!((seen, reader.consumed(), reader.producer_counters().unwrap().dropped), (RECORDS, RECORDS, 0));
}
