//! Decoding: a ring record becomes an event.
//!
//! What enters: one record's bytes, untrusted when a local process wrote them. What leaves: an [`Event`] appended to the batch
//! of its lane. What must hold: the record's declared size is its length, every field is read from a checked copy, and a
//! record that breaks the layout is refused, never guessed at.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use tapio_probes::record::{self, RecordKind, text};
use tapio_wire::event::{
    Body, Detail, EntityId, Event, Exec, Exit, Gap, Histogram, Lane, Measure, NO_NAME, Name, Oom, Signal, Source, Tcp,
};
use zerocopy::FromBytes;

use crate::intake::identity::{Identity, Origin};
use crate::intake::redact::Redactor;

/// A record that broke the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Why events of a cgroup are missing that brought about more than its share, and that there is room again.
const FLOOD: &str = "flood";
const FLOOD_IS_OVER: &str = "flood is over";

/// Bytes of one text. Anybody who may write an Event or a condition may write a long one.
pub const TEXT_BYTES_MAX: usize = 4096;

/// A batch of one lane under construction: a frame's body and the index of its names.
#[derive(Default)]
pub struct Batch {
    pub body: Body,
    comms: HashMap<[u8; record::COMM_BYTES], Name, RandomState>,
    /// The other names, as indices into the body's: only [`Batch::take`] and [`Batch::put_back`] change the body as a whole.
    texts: HashTable<Name>,
    hasher: RandomState,
    redactor: Arc<Redactor>,
}

impl Batch {
    /// A batch whose processes' arguments are redacted so. Those of [`Batch::default`] are too, by the built-in names.
    pub fn redacting(redactor: Arc<Redactor>) -> Self {
        Self { redactor, ..Self::default() }
    }

    /// Hands out the body and starts over with `next`, which must be empty.
    pub fn take(&mut self, next: Body) -> Body {
        self.comms.clear();
        self.texts.clear();
        std::mem::replace(&mut self.body, next)
    }

    /// Takes a body back that [`Batch::take`] handed out; nothing was added in between.
    pub fn put_back(&mut self, body: Body) {
        debug_assert!(self.body.names.is_empty() && self.texts.is_empty(), "nothing was added in between");
        self.body = body;
    }

    /// The name of a `comm`, which is NUL padded.
    pub fn comm(&mut self, comm: &[u8; record::COMM_BYTES]) -> Name {
        if comm[0] == 0 {
            return NO_NAME;
        }
        if let Some(&name) = self.comms.get(comm) {
            return name;
        }
        let name = self.push(text(comm).into_owned());
        self.comms.insert(*comm, name);
        name
    }

    /// The name of a text, of its first [`TEXT_BYTES_MAX`] bytes; [`NO_NAME`] of an empty one.
    pub fn text(&mut self, text: &str) -> Name {
        if text.is_empty() {
            return NO_NAME;
        }
        let text = &text[..text.floor_char_boundary(TEXT_BYTES_MAX)];
        let hash = self.hasher.hash_one(text);
        let names = &self.body.names;
        if let Some(&name) = self.texts.find(hash, |&name| names[name as usize] == text) {
            return name;
        }
        let name = self.push(text.to_owned());
        let (names, hasher) = (&self.body.names, &self.hasher);
        self.texts.insert_unique(hash, name, |&name| hasher.hash_one(names[name as usize].as_str()));
        name
    }

    /// Arguments, each of which ends with a NUL, as one line without what is secret.
    pub fn redacted(&self, arguments: &[u8]) -> String {
        self.redactor.line(arguments)
    }

    /// A line that a program wrote, without what is secret.
    pub fn redacted_text(&self, line: &str) -> String {
        self.redactor.text(line)
    }

    fn push(&mut self, text: String) -> Name {
        self.body.names.push(text);
        (self.body.names.len() - 1) as Name
    }
}

/// The header of a record, when its kind is known and its declared size is its length.
pub fn header(bytes: &[u8]) -> Result<(record::Header, RecordKind), Malformed> {
    let (header, _) = record::Header::read_from_prefix(bytes).map_err(|_| Malformed)?;
    if usize::from(header.size) != bytes.len() {
        return Err(Malformed);
    }
    Ok((header, RecordKind::from_u16(header.kind).ok_or(Malformed)?))
}

/// The lane of a record's kind: that of the event it becomes.
pub fn lane(kind: RecordKind) -> Lane {
    if kind.is_lethal() { Lane::Lethal } else { Lane::Bulk }
}

fn read<T: FromBytes>(bytes: &[u8]) -> Result<T, Malformed> {
    T::read_from_bytes(bytes).map_err(|_| Malformed)
}

/// Decodes one record into `batch`, which must be that of the kind's [`lane`]. True when the event is urgent: something died,
/// or is about to, and its batch must not wait for more. The life of healthy processes and cgroups is not urgent.
///
/// # Errors
/// [`Malformed`]; the batch is then as it was.
#[inline]
pub fn decode(
    bytes: &[u8],
    header: &record::Header,
    kind: RecordKind,
    source: Source,
    identity: &mut Identity,
    batch: &mut Batch,
) -> Result<bool, Malformed> {
    let mut detail = match kind {
        RecordKind::Tcp => tcp(&read(bytes)?),
        RecordKind::Reclaim => {
            let reclaim: record::Reclaim = read(bytes)?;
            Detail::Reclaim { stall_ns: reclaim.stall_ns, pages: reclaim.pages_reclaimed, memcg: reclaim.memcg != 0 }
        }
        RecordKind::BlockIo => {
            let io: record::BlockIo = read(bytes)?;
            Detail::BlockIo {
                latency_ns: io.latency_ns,
                bytes: io.bytes,
                device: io.device,
                error: io.error,
                operation: io.operation,
            }
        }
        RecordKind::SyscallError => {
            let error: record::SyscallError = read(bytes)?;
            Detail::SyscallError { count: error.count, syscall: error.syscall, errno: error.errno }
        }
        RecordKind::Dns => {
            let dns: record::Dns = read(bytes)?;
            Detail::Dns {
                latency_ns: dns.latency_ns,
                name: batch.text(&text(&dns.name)),
                query_type: dns.query_type,
                rcode: dns.rcode,
            }
        }
        RecordKind::RunQueue => Detail::RunQueue { wait_ns: read::<record::RunQueue>(bytes)?.wait_ns },
        RecordKind::PacketDrop => packet_drop(&read(bytes)?, batch),
        RecordKind::LeftOut => left_out(&read(bytes)?, header, batch),
        RecordKind::Histogram => histogram(&read(bytes)?)?,
        RecordKind::Fork => {
            let fork: record::Fork = read(bytes)?;
            let (parent_pid, ns_pid, ns_level) = (fork.parent_pid, fork.ns_pid, fork.ns_level);
            Detail::Fork { parent_pid, ns_pid, ns_level, comm: batch.comm(&fork.comm) }
        }
        RecordKind::FileOpen => {
            let open: record::FileOpen = read(bytes)?;
            Detail::FileOpen { path: batch.text(&text(&open.path)), comm: batch.comm(&open.comm), flags: open.flags }
        }
        RecordKind::SignalDelivered
        | RecordKind::ExecCommand
        | RecordKind::Exec
        | RecordKind::Exit
        | RecordKind::Oom
        | RecordKind::Signal
        | RecordKind::CgroupMkdir
        | RecordKind::CgroupRmdir => lethal(bytes, header, kind, identity, batch)?,
    };
    let entity = identity.resolve(header.cgroup_id, lane(kind), &mut batch.body.entities);
    if kind == RecordKind::CgroupRmdir {
        identity.remove(header.cgroup_id);
    }
    if kind.is_lethal() {
        assign_role(bytes, header, entity, identity, &mut detail)?;
    }
    let is_urgent = detail.is_urgent();
    batch.body.events.push(Event { time_ns: header.time_ns, entity, pid: header.pid, source, body: detail });
    Ok(is_urgent)
}

#[inline]
fn tcp(tcp: &record::Tcp) -> Detail {
    let kib = |bytes: u64| u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
    Detail::Tcp(Tcp {
        source: tcp.source,
        destination: tcp.destination,
        duration_us: u32::try_from(tcp.duration_ns / 1000).unwrap_or(u32::MAX),
        kib_sent: kib(tcp.bytes_sent),
        kib_received: kib(tcp.bytes_received),
        source_port: tcp.source_port,
        destination_port: tcp.destination_port,
        change: tcp.change,
        active: tcp.active != 0,
    })
}

#[inline]
fn packet_drop(drop: &record::PacketDrop, batch: &mut Batch) -> Detail {
    let reason = match tapio_probes::drop_reason_name(drop.reason) {
        Some(name) => batch.text(name),
        // Kernels before 5.17 give none.
        None if drop.reason == 0 => NO_NAME,
        None => batch.text(&format!("reason {:#x}", drop.reason)),
    };
    Detail::PacketDrop { count: drop.count, reason, interface: drop.interface }
}

fn left_out(left_out: &record::LeftOut, header: &record::Header, batch: &mut Batch) -> Detail {
    let is_over = left_out.is_over != 0;
    Detail::Gap(Box::new(Gap {
        what: batch.text("process events"),
        reason: batch.text(if is_over { FLOOD_IS_OVER } else { FLOOD }),
        from_ns: header.time_ns.saturating_sub(left_out.interval_ns),
        until_ns: header.time_ns,
        found_gone: u32::try_from(left_out.count).unwrap_or(u32::MAX),
    }))
}

#[inline]
fn histogram(histogram: &record::Histogram) -> Result<Detail, Malformed> {
    Ok(Detail::Histogram(Box::new(Histogram {
        measure: Measure::from_u8(histogram.measure).ok_or(Malformed)?,
        operation: histogram.operation,
        device: histogram.device,
        interval_ns: histogram.interval_ns,
        total_ns: histogram.total_ns,
        max_ns: histogram.max_ns,
        counts: histogram.counts,
    })))
}

/// When the sender of a signal started, 0 where the record is of something else or does not say.
pub fn sender_start_time_ns(bytes: &[u8], kind: RecordKind) -> u64 {
    if kind != RecordKind::Signal {
        return 0;
    }
    read::<record::Signal>(bytes).map_or(0, |signal| signal.sender_start_time_ns)
}

/// The comm of who started a signal's sender, as the event has it.
fn sender_parent(signal: &record::Signal, batch: &mut Batch) -> u32 {
    let comm = match (signal.from_kernel, signal.sender_parent_pid) {
        // Who was running has nothing to do with it.
        (1.., _) => NO_NAME,
        (0, 1) => batch.comm(b"init\0\0\0\0\0\0\0\0\0\0\0\0"),
        (0, _) => batch.comm(&signal.sender_parent_comm),
    };
    comm.wrapping_add(1)
}

/// Fills in which part the subject has in its container.
fn assign_role(
    bytes: &[u8],
    header: &record::Header,
    entity: EntityId,
    identity: &mut Identity,
    detail: &mut Detail,
) -> Result<(), Malformed> {
    let origin = |comm, start_time_ns, parent_pid| Origin {
        pid: header.pid,
        comm,
        start_time_ns,
        parent_pid,
        ..Origin::default()
    };
    match detail {
        Detail::Exec(exec) => {
            let (start_time_ns, parent_cgroup_id, comm) = if header.kind == RecordKind::Exec as u16 {
                let exec: record::Exec = read(bytes)?;
                (exec.start_time_ns, exec.parent_cgroup_id, exec.comm)
            } else {
                let exec: record::ExecCommand = read(bytes)?;
                (exec.start_time_ns, exec.parent_cgroup_id, exec.comm)
            };
            let comm = text(&comm);
            let (ns_pid, ns_level) = (exec.ns_pid, exec.ns_level);
            let origin = origin(&comm, start_time_ns, exec.parent_pid);
            let origin = Origin { parent_cgroup_id, ns_pid, ns_level, ..origin };
            exec.role = identity.role_of_exec(entity, header.cgroup_id, origin) as u8;
        }
        Detail::Exit(exit) => {
            let comm = read::<record::Exit>(bytes)?.comm;
            let comm = text(&comm);
            exit.role = identity.role_of_exit(entity, origin(&comm, exit.start_time_ns, exit.parent_pid)) as u8;
        }
        Detail::Oom(oom) => {
            let record: record::Oom = read(bytes)?;
            let comm = text(&record.comm);
            oom.role = identity.role(entity, origin(&comm, record.start_time_ns, record.parent_pid)) as u8;
        }
        Detail::Signal(signal) => {
            let comm = read::<record::Signal>(bytes)?.comm;
            signal.role = identity.role(entity, origin(&text(&comm), 0, 0)) as u8;
        }
        _ => {}
    }
    Ok(())
}

fn lethal(
    bytes: &[u8],
    header: &record::Header,
    kind: RecordKind,
    identity: &mut Identity,
    batch: &mut Batch,
) -> Result<Detail, Malformed> {
    Ok(match kind {
        RecordKind::Exec => {
            let exec: record::Exec = read(bytes)?;
            Detail::Exec(Exec {
                parent_pid: exec.parent_pid,
                ns_pid: exec.ns_pid,
                ns_level: exec.ns_level,
                comm: batch.comm(&exec.comm),
                path: NO_NAME,
                arguments: NO_NAME,
                role: 0,
            })
        }
        RecordKind::ExecCommand => {
            let exec: record::ExecCommand = read(bytes)?;
            let arguments = exec.arguments.get(..exec.argument_bytes as usize).ok_or(Malformed)?;
            let arguments = batch.redacted(arguments);
            Detail::Exec(Exec {
                parent_pid: exec.parent_pid,
                ns_pid: exec.ns_pid,
                ns_level: exec.ns_level,
                comm: batch.comm(&exec.comm),
                path: batch.text(&text(&exec.path)),
                arguments: batch.text(&arguments),
                role: 0,
            })
        }
        RecordKind::SignalDelivered => {
            let delivered: record::SignalDelivered = read(bytes)?;
            Detail::SignalDelivered {
                signal: delivered.signal,
                code: delivered.code,
                ns_pid: delivered.ns_pid,
                ns_level: delivered.ns_level,
                comm: batch.comm(&delivered.comm),
            }
        }
        RecordKind::Exit => {
            let exit: record::Exit = read(bytes)?;
            Detail::Exit(Exit {
                start_time_ns: exit.start_time_ns,
                parent_pid: exit.parent_pid,
                ns_pid: exit.ns_pid,
                ns_level: exit.ns_level,
                status: exit.status,
                comm: batch.comm(&exit.comm),
                oom_score_adj: exit.oom_score_adj,
                role: 0,
            })
        }
        RecordKind::Oom => oom(&read(bytes)?, identity, batch),
        RecordKind::Signal => signal(&read(bytes)?, identity, batch),
        _ => {
            let cgroup: record::Cgroup = read(bytes)?;
            let path = text(&cgroup.path);
            if kind == RecordKind::CgroupMkdir {
                // A path that fills its field was cut: the cgroup is found by a scan when it matters.
                if path.len() + 1 < record::CGROUP_PATH_BYTES {
                    identity.learn(header.cgroup_id, &path);
                    identity.begun(header.cgroup_id, cgroup.creator_cgroup_id);
                }
                Detail::CgroupMade { path: batch.text(&path) }
            } else {
                Detail::CgroupRemoved { path: batch.text(&path) }
            }
        }
    })
}

#[inline]
fn oom(oom: &record::Oom, identity: &mut Identity, batch: &mut Batch) -> Detail {
    let known = identity.path(oom.limit_cgroup_id).map(str::to_owned);
    let limit_cgroup = known.unwrap_or_else(|| text(&oom.limit_name).into_owned());
    Detail::Oom(Box::new(Oom {
        comm: batch.comm(&oom.comm),
        ns_pid: oom.ns_pid,
        ns_level: oom.ns_level,
        allocator_pid: oom.allocator_pid,
        allocator_comm: batch.comm(&oom.allocator_comm),
        allocator_entity: identity.resolve_other(oom.allocator_cgroup_id, Lane::Lethal, &mut batch.body.entities),
        total_vm_bytes: oom.total_vm_bytes,
        anon_rss_bytes: oom.anon_rss_bytes,
        file_rss_bytes: oom.file_rss_bytes,
        shmem_rss_bytes: oom.shmem_rss_bytes,
        limit_cgroup: batch.text(&limit_cgroup),
        limit_bytes: oom.limit_bytes,
        usage_bytes: oom.usage_bytes,
        limit_height: oom.limit_height,
        oom_score_adj: oom.oom_score_adj,
        role: 0,
        allocator_inside: oom.allocator_inside.min(3),
    }))
}

#[inline]
fn signal(signal: &record::Signal, identity: &mut Identity, batch: &mut Batch) -> Detail {
    Detail::Signal(Box::new(Signal {
        signal: signal.signal,
        code: signal.code,
        ns_pid: signal.ns_pid,
        ns_level: signal.ns_level,
        comm: batch.comm(&signal.comm),
        sender_pid: signal.sender_pid,
        sender_comm: batch.comm(&signal.sender_comm),
        sender_parent: sender_parent(signal, batch),
        sender_entity: identity.resolve_other(signal.sender_cgroup_id, Lane::Lethal, &mut batch.body.entities),
        from_kernel: signal.from_kernel != 0,
        result: signal.result,
        role: 0,
        over_cpu_limit: u8::from(signal.over_cpu_limit != 0),
        repeats: signal.repeats,
    }))
}

#[cfg(test)]
mod tests;
