//! The bulk part of the mixed profile: one record of a kind, with values as they occur.

use tapio_probes::record::{BlockIo, Dns, PacketDrop, Reclaim, RecordKind, RunQueue, SyscallError, Tcp};
use zerocopy::IntoBytes;

use super::pool::Pool;
use super::profile::{Profile, ipv4};

impl Profile {
    /// Appends a record of a bulk kind, about a container.
    pub(super) fn one(&mut self, kind: RecordKind, pool: &mut Pool) {
        let container = self.draw();
        match kind {
            RecordKind::Tcp => pool.push(self.tcp(container).as_bytes()),
            RecordKind::Dns => pool.push(self.dns(container).as_bytes()),
            RecordKind::BlockIo => pool.push(self.block_io(container).as_bytes()),
            RecordKind::Reclaim => pool.push(self.reclaim(container).as_bytes()),
            RecordKind::SyscallError => pool.push(self.syscall_error(container).as_bytes()),
            RecordKind::RunQueue => pool.push(self.run_queue(container).as_bytes()),
            _ => pool.push(self.packet_drop(container).as_bytes()),
        }
    }

    fn tcp(&mut self, container: usize) -> Tcp {
        let header = self.header::<Tcp>(RecordKind::Tcp, container);
        let random = &mut self.random;
        let change = random.weighted(&[(1, 400), (4, 450), (5, 80), (2, 20), (3, 5), (6, 15), (7, 15), (8, 15)]);
        let service = self.services.draw(random) as u8;
        let closed = change == 4;
        Tcp {
            header,
            duration_ns: random.log_uniform(50_000, if closed { 30_000_000_000 } else { 200_000_000 }),
            source: self.containers[container].address,
            destination: ipv4([10, 96, service / 8, 10 + service]),
            source_port: 32_768 + random.below(28_000) as u16,
            destination_port: random.weighted(&[(443, 4), (8080, 4), (5432, 2), (6379, 2), (9092, 1)]),
            change,
            active: random.weighted(&[(1, 3), (0, 1)]),
            pad: [0; 2],
            bytes_sent: if closed { random.log_uniform(100, 1 << 20) } else { 0 },
            bytes_received: if closed { random.log_uniform(100, 8 << 20) } else { 0 },
        }
    }

    fn dns(&mut self, container: usize) -> Dns {
        let header = self.header::<Dns>(RecordKind::Dns, container);
        let service = self.services.draw(&mut self.random);
        let random = &mut self.random;
        let rcode = random.weighted(&[(0, 70), (3, 22), (2, 5), (255, 3)]);
        let text = format!("service-{service}.team-{}.svc.cluster.local", service % 7);
        let mut name = [0; 72];
        name[..text.len()].copy_from_slice(text.as_bytes());
        Dns {
            header,
            latency_ns: if rcode == 255 { 5_000_000_000 } else { random.log_uniform(200_000, 2_000_000_000) },
            rcode,
            pad: 0,
            query_type: random.weighted(&[(1, 3), (28, 2)]),
            pad2: 0,
            name,
        }
    }

    fn block_io(&mut self, container: usize) -> BlockIo {
        let header = self.header::<BlockIo>(RecordKind::BlockIo, container);
        let random = &mut self.random;
        BlockIo {
            header,
            latency_ns: random.log_uniform(64_000, 2_000_000_000),
            bytes: 4096 << random.below(8),
            device: random.weighted(&[(259 << 20, 3), (259 << 20 | 1, 1), (253 << 20, 1)]),
            error: random.weighted(&[(0, 499), (-5, 1)]),
            operation: random.weighted(&[(0, 50), (1, 45), (2, 4), (3, 1)]),
            pad: [0; 7],
        }
    }

    fn reclaim(&mut self, container: usize) -> Reclaim {
        let header = self.header::<Reclaim>(RecordKind::Reclaim, container);
        let random = &mut self.random;
        Reclaim {
            header,
            stall_ns: random.log_uniform(10_000, 200_000_000),
            pages_reclaimed: random.log_uniform(1, 4096),
            memcg: random.weighted(&[(1, 9), (0, 1)]),
            pad: [0; 7],
        }
    }

    fn syscall_error(&mut self, container: usize) -> SyscallError {
        let header = self.header::<SyscallError>(RecordKind::SyscallError, container);
        let random = &mut self.random;
        // openat ENOENT, read EAGAIN, sendto ECONNRESET, recvfrom EAGAIN, connect ECONNREFUSED, access ENOENT
        let (syscall, errno) = random.weighted(&[
            ((257, 2), 40),
            ((0, 11), 20),
            ((44, 104), 5),
            ((45, 11), 20),
            ((42, 111), 5),
            ((21, 2), 10),
        ]);
        SyscallError { header, syscall, errno, count: random.log_uniform(1, 500) }
    }

    fn run_queue(&mut self, container: usize) -> RunQueue {
        RunQueue {
            header: self.header::<RunQueue>(RecordKind::RunQueue, container),
            wait_ns: self.random.log_uniform(1_000_000, 500_000_000),
        }
    }

    fn packet_drop(&mut self, container: usize) -> PacketDrop {
        let header = self.header::<PacketDrop>(RecordKind::PacketDrop, container);
        PacketDrop {
            header,
            reason: self.random.weighted(&[(3, 5), (6, 3), (8, 2), (16, 1), (77, 1)]),
            interface: 2 + self.random.below(30) as u32,
            count: self.random.log_uniform(1, 64),
        }
    }
}
