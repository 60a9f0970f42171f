//! A hostile peer: the input is a program that writes positions and bytes into a memfd ring, between drains.
//!
//! No input may make the reader crash, read outside of the ring, loop, or hand out more than was produced. Run with
//! `cargo install cargo-fuzz`, then in `ringbuf/`: `cargo +nightly fuzz run reader -- -max_len=8192 -max_total_time=60`.
//! `ringbuf/tests/hostile.rs` has a seeded version of it that runs in `make test`.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use tapio_ringbuf::layout::{MAGIC, VERSION};
use tapio_ringbuf::{Limits, Reader};

const PAGE_BYTES: u64 = 4096;
const DATA_BYTES: usize = 4096;
/// Steps of one input: a longer one finds nothing that this many do not.
const STEPS_MAX: usize = 64;

/// Takes bytes off the front of the input.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn short(&mut self) -> Option<u64> {
        self.take(2).map(|bytes| u64::from(u16::from_le_bytes([bytes[0], bytes[1]])))
    }

    fn word(&mut self) -> Option<u64> {
        self.take(8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes)
    }
}

fn peer() -> File {
    let memfd = memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
    ftruncate(&memfd, 2 * PAGE_BYTES + DATA_BYTES as u64).expect("it can be sized");
    fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).expect("it can be sealed");
    let file = File::from(memfd);
    let write = |at: u64, bytes: &[u8]| file.write_all_at(bytes, PAGE_BYTES + at).expect("it can be written");
    write(192, &MAGIC.to_ne_bytes());
    write(200, &VERSION.to_ne_bytes());
    write(208, &(DATA_BYTES as u64).to_ne_bytes());
    file
}

/// Drains and checks what a drain promises.
fn drain(reader: &mut Reader, max_records: usize) {
    let pending = reader.pending_bytes();
    assert!(pending <= DATA_BYTES);
    let (before, mut handed_out, mut sum) = (reader.consumed(), 0, 0u64);
    let drained = reader.drain(max_records, |record| {
        handed_out += 1;
        // Touches every byte, so that one outside of the ring is a fault.
        sum += record.iter().map(|&byte| u64::from(byte)).sum::<u64>();
    });
    assert!(handed_out <= max_records && sum <= 255 * DATA_BYTES as u64);
    assert_eq!(reader.consumed().wrapping_sub(before), handed_out as u64);
    match drained {
        Ok(drained) => {
            assert_eq!(drained.records, handed_out);
            assert!(drained.bytes + 8 * (drained.records + drained.discarded) <= pending);
        }
        Err(_) => assert!(reader.is_empty(), "a corrupt ring is empty"),
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let file = peer();
    let start = input.word().unwrap_or(0);
    let mut produced = start;
    let put = |at: u64, value: u64| file.write_all_at(&value.to_ne_bytes(), at).expect("it can be written");
    put(0, start);
    put(PAGE_BYTES, start);
    let fd = file.try_clone().expect("a second descriptor").into();
    let Ok(mut reader) = Reader::from_memfd(fd, Limits::default()) else {
        assert!(start % 8 != 0, "a ring that is empty and sound is accepted");
        return;
    };
    for _ in 0..STEPS_MAX {
        let Some(step) = input.byte() else { break };
        let done = match step % 6 {
            0 => input.short().map(|advance| produced = produced.wrapping_add(advance & !7)),
            1 => input.short().map(|advance| produced = produced.wrapping_add(advance)),
            2 => input.word().map(|position| produced = position),
            3 => input.word().map(|position| put(0, position)),
            4 => (|| {
                let (at, bytes) = (input.short()? % DATA_BYTES as u64, input.byte()?);
                let bytes = input.take(usize::from(bytes).min(DATA_BYTES - at as usize))?;
                file.write_all_at(bytes, 2 * PAGE_BYTES + at).expect("it can be written");
                Some(())
            })(),
            _ => input.byte().map(|max_records| drain(&mut reader, usize::from(max_records))),
        };
        put(PAGE_BYTES, produced);
        if done.is_none() {
            break;
        }
    }
    drain(&mut reader, usize::MAX);
});
