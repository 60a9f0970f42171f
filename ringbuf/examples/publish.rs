//! Publishes events of a local process to a running tapio-collector: `publish SOCKET [COUNT]`. The record is laid out by hand, as
//! `docs/records.md` describes it; a program that depends on `tapio-probes` has the structs.

use std::error::Error;
use std::os::fd::AsFd;
use std::path::Path;

use tapio_ringbuf::{Writer, handover};

const BLOCK_IO: u16 = 34;
const WRITE: u8 = 1;

fn slow_write(latency_ns: u64) -> Vec<u8> {
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let time_ns = boot.tv_sec as u64 * 1_000_000_000 + boot.tv_nsec as u64;
    let pid = std::process::id();
    let mut record = Vec::with_capacity(64);
    record.extend(BLOCK_IO.to_ne_bytes());
    record.extend(64u16.to_ne_bytes());
    record.extend(0u32.to_ne_bytes());
    record.extend(time_ns.to_ne_bytes());
    // The root cgroup.
    record.extend(1u64.to_ne_bytes());
    record.extend(pid.to_ne_bytes());
    record.extend(pid.to_ne_bytes());
    record.extend(latency_ns.to_ne_bytes());
    record.extend(4096u64.to_ne_bytes());
    record.extend((8u32 << 20).to_ne_bytes());
    record.extend(0i32.to_ne_bytes());
    record.extend([WRITE, 0, 0, 0, 0, 0, 0, 0]);
    record
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments.next().ok_or("give the path of the collector's socket")?;
    let count = arguments.next().map_or(Ok(100), |text| text.parse::<u64>())?;
    let (mut writer, memfd, eventfd) = Writer::create(1 << 16, "publish")?;
    // Kept for as long as the ring is in use.
    let publication = handover::publish(Path::new(&socket), "publish", memfd.as_fd(), eventfd.as_fd())?;
    for number in 0..count {
        // False when the ring is full: the writer counts the drop, the collector declares it.
        writer.write(&slow_write(200_000_000 + number));
    }
    while writer.consumed() + writer.dropped() < writer.emitted() {
        if !publication.is_alive() {
            return Err("the collector is gone".into());
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    println!("emitted {} dropped {}", writer.emitted(), writer.dropped());
    Ok(())
}
