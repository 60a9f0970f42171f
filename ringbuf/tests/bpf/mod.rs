//! A BPF ring buffer that the real kernel fills: maps and programs by bare `bpf(2)`, for tests and benches.
//!
//! Each call of [`Program::run`] makes the kernel put records into the ring through the helpers that probes use.

use std::ffi::{c_long, c_uint};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use tapio_ringbuf::{CounterArray, Reader};

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
}

#[cfg(target_arch = "x86_64")]
const SYS_BPF: c_long = 321;
#[cfg(target_arch = "aarch64")]
const SYS_BPF: c_long = 280;

const MAP_CREATE: c_uint = 0;
const MAP_LOOKUP: c_uint = 1;
const MAP_UPDATE: c_uint = 2;
const PROG_LOAD: c_uint = 5;
const PROG_TEST_RUN: c_uint = 10;
const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_RINGBUF: u32 = 27;
const MAP_MMAPABLE: u32 = 1 << 10;
const PROG_TYPE_SOCKET_FILTER: u32 = 1;
const HELPER_RESERVE: u32 = 131;
const HELPER_SUBMIT: u32 = 132;
const HELPER_DISCARD: u32 = 133;

/// `BPF_RB_NO_WAKEUP`.
pub const NO_WAKEUP: u32 = 1;
/// `BPF_RB_FORCE_WAKEUP`.
pub const FORCE_WAKEUP: u32 = 2;

/// `union bpf_attr`, filled in words of four bytes.
#[repr(C, align(8))]
struct Attributes([u32; 32]);

impl Attributes {
    fn new(words: &[(usize, u32)], pointers: &[(usize, u64)]) -> Self {
        let mut attributes = Self([0; 32]);
        for &(index, word) in words {
            attributes.0[index] = word;
        }
        for &(index, pointer) in pointers {
            let bytes = pointer.to_ne_bytes();
            attributes.0[index] = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            attributes.0[index + 1] = u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        }
        attributes
    }
}

fn bpf(command: c_uint, attributes: &mut Attributes) -> io::Result<c_long> {
    // SAFETY: `attributes` is as large as said, and the pointers in it point to buffers that outlive the call.
    let result = unsafe { syscall(SYS_BPF, command, &raw mut *attributes, size_of::<Attributes>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(descriptor: c_long) -> OwnedFd {
    // SAFETY: the kernel just made this descriptor for the caller.
    unsafe { OwnedFd::from_raw_fd(descriptor as i32) }
}

fn map(kind: u32, key_bytes: u32, value_bytes: u32, entries: u32, flags: u32) -> io::Result<OwnedFd> {
    let words = [(0, kind), (1, key_bytes), (2, value_bytes), (3, entries), (4, flags)];
    bpf(MAP_CREATE, &mut Attributes::new(&words, &[])).map(owned)
}

/// A ring buffer map.
pub fn ring(data_bytes: usize) -> io::Result<OwnedFd> {
    map(MAP_TYPE_RINGBUF, 0, 0, data_bytes as u32, 0)
}

/// A mappable array of u64.
pub fn array(entries: usize) -> io::Result<OwnedFd> {
    map(MAP_TYPE_ARRAY, 4, 8, entries as u32, MAP_MMAPABLE)
}

/// Stores an element of an array, by system call.
pub fn update(map: BorrowedFd<'_>, index: u32, value: u64) -> io::Result<()> {
    let pointers = [(2, &raw const index as u64), (4, &raw const value as u64)];
    bpf(MAP_UPDATE, &mut Attributes::new(&[(0, map.as_raw_fd() as u32)], &pointers)).map(drop)
}

/// Loads an element of an array, by system call.
pub fn lookup(map: BorrowedFd<'_>, index: u32) -> io::Result<u64> {
    let mut value = 0u64;
    let pointers = [(2, &raw const index as u64), (4, &raw mut value as u64)];
    bpf(MAP_LOOKUP, &mut Attributes::new(&[(0, map.as_raw_fd() as u32)], &pointers))?;
    Ok(value)
}

/// What a program does with the record it reserves.
#[derive(Clone, Copy)]
pub enum Then {
    /// Writes its first eight bytes and submits it.
    Submit,
    /// Gives it up.
    Discard,
}

/// A loaded program that reserves one record a run.
pub struct Program {
    fd: OwnedFd,
}

impl Program {
    /// Loads a program for records of `record_bytes` whose first eight hold `value`.
    pub fn load(ring: BorrowedFd<'_>, record_bytes: u32, value: u32, then: Then, flags: u32) -> io::Result<Self> {
        let finish = match then {
            Then::Submit => HELPER_SUBMIT,
            Then::Discard => HELPER_DISCARD,
        };
        // code | registers (destination, source) | offset | immediate
        let instruction = |code: u8, registers: u8, offset: i16, immediate: u32| {
            u64::from(code) | u64::from(registers) << 8 | u64::from(offset as u16) << 16 | u64::from(immediate) << 32
        };
        let instructions = [
            instruction(0x18, 0x11, 0, ring.as_raw_fd() as u32), // r1 = ring
            instruction(0, 0, 0, 0),
            instruction(0xb7, 0x02, 0, record_bytes), // r2 = record_bytes
            instruction(0xb7, 0x03, 0, 0),            // r3 = 0
            instruction(0x85, 0, 0, HELPER_RESERVE),  // r0 = reserve(r1, r2, r3)
            instruction(0x55, 0x00, 2, 0),            // if r0 != 0 skip two
            instruction(0xb7, 0x00, 0, 0),            // r0 = 0
            instruction(0x95, 0, 0, 0),               // exit
            instruction(0x7a, 0x00, 0, value),        // *(u64 *)r0 = value
            instruction(0xbf, 0x01, 0, 0),            // r1 = r0
            instruction(0xb7, 0x02, 0, flags),        // r2 = flags
            instruction(0x85, 0, 0, finish),          // finish(r1, r2)
            instruction(0xb7, 0x00, 0, 1),            // r0 = 1
            instruction(0x95, 0, 0, 0),               // exit
        ];
        let words = [(0, PROG_TYPE_SOCKET_FILTER), (1, instructions.len() as u32)];
        let pointers = [(2, instructions.as_ptr() as u64), (4, c"GPL".as_ptr() as u64)];
        bpf(PROG_LOAD, &mut Attributes::new(&words, &pointers)).map(|fd| Self { fd: owned(fd) })
    }

    /// Runs it `times` times; whether the last run got its record.
    pub fn run(&self, times: usize) -> io::Result<bool> {
        let packet = [0u8; 64];
        let words = [(0, self.fd.as_fd().as_raw_fd() as u32), (2, packet.len() as u32), (8, times as u32)];
        let mut attributes = Attributes::new(&words, &[(4, packet.as_ptr() as u64)]);
        bpf(PROG_TEST_RUN, &mut attributes)?;
        Ok(attributes.0[1] == 1)
    }
}

/// Whether this process may use BPF; says so when it may not.
pub fn available() -> bool {
    let probe = ring(4096).and_then(|map| {
        Program::load(map.as_fd(), 8, 0, Then::Submit, 0)?;
        Reader::from_bpf_map(map.as_fd(), 4096, 8).map_err(io::Error::other)?;
        let counters = array(1)?;
        CounterArray::map(counters.as_fd(), 1).map_err(io::Error::other)
    });
    if let Err(error) = &probe {
        let required = std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all");
        assert!(!required, "TAPIO_REQUIRE=all forbids to skip: {error}");
        eprintln!("SKIP: needs CAP_BPF (or root) and a kernel with BPF ring buffers: {error}");
    }
    probe.is_ok()
}
