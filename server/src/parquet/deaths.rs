//! The table of deaths: ends of processes that matter, each with its cause as far as the kernel's events show it.
//!
//! What enters: decoded frames of the lethal lane. What leaves: rows. What must hold: an end is one row, whatever else is known of
//! it; what is remembered of signals and kills is bounded. Findings say more, of containers and units: `findings.death_id` is the
//! id of the row here.

use std::collections::HashMap;

use foldhash::fast::RandomState;
use tapio_wire::event::{ArchivedDetail, ArchivedExit, Role};
use tapio_wire::frame::Frame;
use tapio_wire::wait_status::{Ending, ending};

use super::events::role;
use super::schema::DEATHS;
use super::table::{NONE, Partitions, Written};
use super::{ExportError, SegmentTables};
use crate::archive::index::realtime_ns;
use crate::findings::text::signal_name;

/// Signals and kills that are remembered until their process ends.
const CAUSES_MAX: usize = 65_536;
/// Deaths that wait for what is known of them: frames bring it in any order.
const WAITING_MAX: usize = 65_536;
/// What came longer before an end is not its cause.
const CAUSE_NS: u64 = 120_000_000_000;
const SIGKILL: u32 = 9;
/// SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, SIGSYS: a process that faults.
const FAULTS: [u32; 7] = [4, 5, 6, 7, 8, 11, 31];

const fn at(name: &str) -> usize {
    DEATHS.column(name)
}

#[derive(Clone)]
struct Kill {
    time_ns: u64,
    signal: u32,
    sender_slot: Option<u32>,
    sender_pid: u32,
    sender_comm: u32,
    from_kernel: bool,
}

#[derive(Clone)]
struct Oom {
    time_ns: u64,
    limit_cgroup: u32,
    limit_bytes: u64,
    usage_bytes: u64,
    rss_bytes: u64,
}

/// What may have ended a process.
#[derive(Clone, Default)]
struct Cause {
    kill: Option<Kill>,
    oom: Option<Oom>,
}

struct Death {
    time_ns: u64,
    node: u64,
    epoch: u64,
    seq: u64,
    idx: u32,
    slot: u32,
    pid: u32,
    comm: u32,
    role: u32,
    status: u32,
    lived_ns: Option<u64>,
}

/// Collects deaths.
pub(super) struct Deaths {
    partitions: Partitions,
    /// Causes by node and process.
    causes: HashMap<(u64, u32), Cause, RandomState>,
    waiting: Vec<Death>,
}

impl Deaths {
    pub fn new() -> Result<Self, ExportError> {
        Ok(Self { partitions: Partitions::new(&DEATHS)?, causes: HashMap::default(), waiting: Vec::new() })
    }

    /// Takes in the events of a frame.
    pub fn frame(&mut self, shared: &mut SegmentTables, frame: &Frame) -> Result<(), ExportError> {
        let (header, body) = (frame.header(), frame.body());
        if header.lethal_events == 0 {
            return Ok(());
        }
        let node = header.node;
        for (idx, event) in body.events.iter().enumerate() {
            let time_ns = realtime_ns(header, event.time_ns.to_native());
            let pid = event.pid.to_native();
            match &event.body {
                // What was ignored ended nobody.
                ArchivedDetail::Signal(signal) if signal.result != 1 => {
                    let sender = signal.sender_entity.to_native();
                    let comm = body.name(signal.sender_comm.to_native()).unwrap_or_default();
                    self.cause(node, pid).kill = Some(Kill {
                        time_ns,
                        signal: signal.signal.to_native(),
                        sender_slot: (sender != 0).then(|| shared.catalog.slot(node, sender)),
                        sender_pid: signal.sender_pid.to_native(),
                        sender_comm: shared.texts.number(comm),
                        from_kernel: signal.from_kernel,
                    });
                }
                ArchivedDetail::Oom(oom) => {
                    let cgroup = body.name(oom.limit_cgroup.to_native()).unwrap_or_default();
                    let rss = [&oom.anon_rss_bytes, &oom.file_rss_bytes, &oom.shmem_rss_bytes];
                    self.cause(node, pid).oom = Some(Oom {
                        time_ns,
                        limit_cgroup: shared.texts.number(cgroup),
                        limit_bytes: oom.limit_bytes.to_native(),
                        usage_bytes: oom.usage_bytes.to_native(),
                        rss_bytes: rss.iter().fold(0, |sum, bytes| bytes.to_native().saturating_add(sum)),
                    });
                }
                ArchivedDetail::Exit(exit) if matters(exit) => {
                    let comm = body.name(exit.comm.to_native()).unwrap_or_default();
                    let started = exit.start_time_ns.to_native();
                    let death = Death {
                        time_ns,
                        node,
                        epoch: header.epoch,
                        seq: header.seq,
                        idx: idx as u32,
                        slot: shared.catalog.slot(node, event.entity.to_native()),
                        pid,
                        comm: shared.texts.number(comm),
                        role: shared.texts.number(role(exit.role)),
                        status: exit.status.to_native(),
                        lived_ns: (started != 0).then(|| event.time_ns.to_native().saturating_sub(started)),
                    };
                    self.waiting.push(death);
                }
                _ => {}
            }
        }
        if self.waiting.len() >= WAITING_MAX {
            self.conclude(shared)?;
        }
        Ok(())
    }

    fn cause(&mut self, node: u64, pid: u32) -> &mut Cause {
        if self.causes.len() >= CAUSES_MAX && !self.causes.contains_key(&(node, pid)) {
            self.causes.clear();
        }
        self.causes.entry((node, pid)).or_default()
    }

    /// Writes the deaths that wait, with what is known by now.
    fn conclude(&mut self, shared: &mut SegmentTables) -> Result<(), ExportError> {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.sort_by_key(|death| death.time_ns);
        for death in &waiting {
            let hour = self.partitions.hour(death.time_ns);
            let cause = self.causes.get(&(death.node, death.pid)).cloned().unwrap_or_default();
            self.row(shared, hour, death, &cause)?;
            if self.partitions.batch(&shared.place, hour)?.is_full() {
                self.partitions.flush(hour, &shared.texts, &mut shared.encoder)?;
            }
        }
        Ok(())
    }

    fn row(&mut self, shared: &mut SegmentTables, hour: u64, death: &Death, cause: &Cause) -> Result<(), ExportError> {
        let (code, signal) = match ending(death.status) {
            Ending::Exited(code) => (Some(code), None),
            Ending::Killed(signal) => (None, Some(signal)),
        };
        let is_near = |time_ns: u64| time_ns.abs_diff(death.time_ns) <= CAUSE_NS;
        let oom = cause.oom.as_ref().filter(|oom| is_near(oom.time_ns) && signal == Some(SIGKILL));
        let kill = cause.kill.as_ref().filter(|kill| is_near(kill.time_ns) && signal == Some(kill.signal));
        let word = match (code, signal) {
            _ if oom.is_some() => "oom",
            (_, Some(signal)) if FAULTS.contains(&signal) => "fault",
            (_, Some(_)) => "signal",
            (Some(0), _) => "finished",
            _ => "error",
        };
        let id = format!("{:x}:{:x}:{}:{}", death.node, death.epoch, death.seq, death.idx);
        let sender = kill.and_then(|kill| kill.sender_slot);
        let sender = sender.map_or(NONE, |slot| shared.catalog.named(&mut shared.texts, slot).name);
        let known = shared.catalog.named(&mut shared.texts, death.slot);
        let node = shared.catalog.node_text(&mut shared.texts, death.node);
        let texts = &mut shared.texts;
        let cells = [
            (at("cause"), texts.number(word)),
            (at("node"), node),
            (at("namespace"), known.namespace),
            (at("workload"), known.workload),
            (at("pod"), known.pod),
            (at("container"), known.container),
            (at("entity"), known.name),
            (at("entity_kind"), known.kind),
            (at("comm"), death.comm),
            (at("role"), death.role),
            (at("signal_name"), signal.map_or(NONE, |signal| texts.number(&signal_name(signal)))),
            (at("sender"), sender),
            (at("sender_comm"), kill.map_or(NONE, |kill| kill.sender_comm)),
            (at("limit_cgroup"), oom.map_or(NONE, |oom| oom.limit_cgroup)),
            (at("pod_uid"), known.pod_uid),
            (at("container_id"), known.container_id),
            (at("id"), texts.number(&id)),
            (at("node_id"), texts.number(&format!("{:x}", death.node))),
            (at("epoch"), texts.number(&format!("{:x}", death.epoch))),
            (at("segment"), shared.segment),
        ];
        let batch = self.partitions.batch(&shared.place, hour)?;
        batch.row();
        batch.unsigned(at("time"), death.time_ns);
        cells.into_iter().for_each(|(column, text)| batch.text(column, text));
        batch.unsigned(at("pid"), death.pid.into());
        batch.unsigned(at("seq"), death.seq);
        for (column, value) in [
            (at("exit_code"), code.map(u64::from)),
            (at("signal"), signal.map(u64::from)),
            (at("lived_ns"), death.lived_ns),
            (at("sender_pid"), kill.map(|kill| u64::from(kill.sender_pid)).filter(|&pid| pid != 0)),
            (at("limit_bytes"), oom.map(|oom| oom.limit_bytes).filter(|&bytes| bytes != 0)),
            (at("usage_bytes"), oom.map(|oom| oom.usage_bytes)),
            (at("rss_bytes"), oom.map(|oom| oom.rss_bytes)),
        ] {
            if let Some(value) = value {
                batch.unsigned(column, value);
            }
        }
        if let Some(kill) = kill {
            batch.flag(at("from_kernel"), kill.from_kernel);
        }
        Ok(())
    }

    /// Writes what waits, and ends the files.
    pub fn finish(mut self, shared: &mut SegmentTables) -> Result<Vec<Written>, ExportError> {
        self.conclude(shared)?;
        self.partitions.finish(&shared.place, &shared.texts, &mut shared.encoder)
    }
}

fn matters(exit: &ArchivedExit) -> bool {
    exit.status.to_native() != 0 || Role::from_u8(exit.role) == Role::First
}
