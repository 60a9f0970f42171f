//! What the tests of exported tables share: an archive with deaths and losses, and real SQL engines.

#![allow(dead_code, reason = "every test uses its part of this module")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::Value;
use tapio_server::archive::{Acknowledged, Append, Archive};
use tapio_wire::compress::Compression;
use tapio_wire::event::{
    Body, ContainerState, Curve, Detail, Entity, EntityKind, Event, Exec, Exit, Lane, NO_NAME, Name, Oom, Point,
    Rollout, Signal, Source, Tcp,
};
use tapio_wire::frame::{Encoder, SealedFrame, Stamp};
use tapio_wire::ledger::{Ledger, Reason, Stage};
pub use tapio_wire::program::clock::now_ns;

use crate::archive_support::{Receiver, append, append_of};
use crate::remote_support::objects;

pub const ENGINES: [&str; 2] = ["duckdb", "datafusion"];
pub const MINUTE_NS: u64 = 60_000_000_000;
const CONTAINER: u64 = 11;
const UNIT: u64 = 12;

/// A node whose clocks are the same: since boot and since 1970.
pub struct Node {
    pub name: Arc<str>,
    pub epoch: u64,
    pub seq: u64,
    pub ledger: Ledger,
    encoder: Encoder,
    receiver: Arc<Receiver>,
}

impl Node {
    pub fn new(name: &str, epoch: u64) -> Self {
        Self {
            name: name.into(),
            epoch,
            seq: 0,
            ledger: Ledger::default(),
            encoder: Encoder::default(),
            receiver: Arc::default(),
        }
    }

    /// The next frame, sent at a moment; its events are shipped by it.
    pub fn frame(&mut self, at_ns: u64, body: &Body, is_final: bool) -> Bytes {
        for event in &body.events {
            let account = self.ledger.account_mut(event.source);
            account.emitted += 1;
            account.shipped += 1;
        }
        let lane = body.events.first().map_or(Lane::Bulk, |event| event.kind().lane());
        let sealed: SealedFrame = self.encoder.seal(body, lane, Compression::Rows).expect("a small body fits");
        self.seq += 1;
        let stamp = Stamp {
            node: tapio_wire::node_id(&self.name),
            epoch: self.epoch,
            seq: self.seq,
            boottime_ns: at_ns,
            realtime_ns: at_ns,
            is_final,
        };
        sealed.stamp(&stamp, &self.ledger)
    }

    /// Loses events on purpose or not.
    pub fn lose(&mut self, stage: Stage, reason: Reason, events: u64) {
        let account = self.ledger.account_mut(Source::Ebpf);
        account.emitted += events;
        account.drop_events(stage, reason, events);
    }

    pub fn append(&self, archive: &Archive, frame: &Bytes) {
        append(archive, append_of(frame, &self.name, &self.receiver));
    }

    /// Appends the first frame after others that another archive has: all frames before it, with their events.
    pub fn append_resumed(&self, archive: &Archive, frame: &Bytes, seq: u64, events: u64) {
        let mut acknowledged = Acknowledged { seq, ..Acknowledged::default() };
        acknowledged.events[Source::Ebpf as usize] = events;
        append(archive, Append { resumed: Some(acknowledged), ..append_of(frame, &self.name, &self.receiver) });
    }

    /// Frames and appends, and waits until it is durable.
    pub fn send(&mut self, archive: &Archive, at_ns: u64, body: &Body) -> Bytes {
        let frame = self.frame(at_ns, body, false);
        self.append(archive, &frame);
        self.receiver.wait_for(self.seq);
        frame
    }
}

/// Makes a body.
#[derive(Default)]
pub struct Bodies {
    pub body: Body,
}

impl Bodies {
    pub fn name(&mut self, text: &str) -> Name {
        self.body.names.push(text.to_owned());
        (self.body.names.len() - 1) as Name
    }

    pub fn event(&mut self, time_ns: u64, entity: u64, pid: u32, detail: Detail) {
        self.body.events.push(Event { time_ns, entity, pid, source: Source::Ebpf, body: detail });
    }

    /// A container of the Deployment web in the namespace shop, and a unit.
    pub fn described() -> Self {
        let mut made = Self::default();
        made.body.entities.push(Entity {
            namespace: "shop".into(),
            pod: "web-1".into(),
            container: "web".into(),
            workload: "Deployment/web".into(),
            pod_uid: "8f1c2d3e-4a5b-6c7d-8e9f-0a1b2c3d4e5f".into(),
            container_id: "ab".repeat(32),
            ..Entity::named(EntityKind::Container, CONTAINER, "shop/web-1/web")
        });
        made.body.entities.push(Entity::named(EntityKind::Unit, UNIT, "backup.service"));
        made
    }

    pub fn exit(&mut self, time_ns: u64, pid: u32, status: u32, role: u8) {
        let comm = self.name("nginx");
        let exit = Exit {
            start_time_ns: time_ns - 5_000_000_000,
            parent_pid: 1,
            ns_pid: 1,
            ns_level: 1,
            status,
            comm,
            oom_score_adj: 0,
            role,
        };
        self.event(time_ns, CONTAINER, pid, Detail::Exit(exit));
    }

    pub fn signal(&mut self, time_ns: u64, pid: u32, signal: u32, from_kernel: bool) {
        let (comm, sender_comm) = (self.name("nginx"), self.name("kill"));
        let signal = Signal {
            signal,
            code: 0,
            ns_pid: 1,
            ns_level: 1,
            comm,
            sender_pid: if from_kernel { 0 } else { 77 },
            sender_comm: if from_kernel { NO_NAME } else { sender_comm },
            sender_parent: 0,
            sender_entity: if from_kernel { 0 } else { UNIT },
            from_kernel,
            result: 0,
            role: 1,
            over_cpu_limit: 0,
            repeats: 0,
        };
        self.event(time_ns, CONTAINER, pid, Detail::Signal(Box::new(signal)));
    }

    pub fn oom(&mut self, time_ns: u64, pid: u32) {
        let (comm, cgroup) = (self.name("nginx"), self.name("/kubepods/pod1/web"));
        let oom = Oom {
            comm,
            ns_pid: 1,
            ns_level: 1,
            allocator_pid: pid,
            allocator_comm: comm,
            allocator_entity: CONTAINER,
            total_vm_bytes: 1 << 30,
            anon_rss_bytes: 60 << 20,
            file_rss_bytes: 2 << 20,
            shmem_rss_bytes: 0,
            limit_cgroup: cgroup,
            limit_bytes: 64 << 20,
            usage_bytes: 64 << 20,
            limit_height: 0,
            oom_score_adj: -3,
            role: 1,
            allocator_inside: 1,
        };
        self.event(time_ns, CONTAINER, pid, Detail::Oom(Box::new(oom)));
    }

    pub fn waits(&mut self, time_ns: u64, events: u64) {
        for index in 0..events {
            self.event(time_ns + index * 1000, CONTAINER, 100, Detail::RunQueue { wait_ns: index });
        }
    }
}

/// An hour of a node: three deaths of the web's container, what came before them, and losses.
pub fn a_bad_hour(archive: &Archive) {
    let start = now_ns() - 40 * MINUTE_NS;
    let at = |minutes: u64| start + minutes * MINUTE_NS;
    let mut node = Node::new("node-1", 100);
    node.send(archive, at(2) + 10, &a_rollout(at(1), at(2)));
    node.lose(Stage::Ring, Reason::Full, 7);
    node.lose(Stage::Filter, Reason::Sampled, 50);
    node.send(archive, at(4) + 10, &refused(at(3), at(4)));
    node.send(archive, at(7) + 10, &three_deaths([at(5), at(6), at(7)]));
}

/// A new image, somebody's shell, and the container that runs.
fn a_rollout(rolled_ns: u64, entered_ns: u64) -> Body {
    let mut bodies = Bodies::described();
    let (object, namespace, name) = (bodies.name("Deployment"), bodies.name("shop"), bodies.name("web"));
    let (images, before) = (bodies.name("web:2"), bodies.name("web:1"));
    let rollout = Rollout {
        kind: object,
        namespace,
        name,
        images,
        images_before: before,
        reason: NO_NAME,
        message: NO_NAME,
        generation: 2,
        observed_generation: 2,
        desired: 1,
        updated: 1,
        ready: 1,
        unavailable: 0,
        is_gone: false,
    };
    bodies.event(rolled_ns, 0, 0, Detail::Rollout(Box::new(rollout)));
    let (comm, path) = (bodies.name("sh"), bodies.name("/bin/sh"));
    let exec = Exec { parent_pid: 1, ns_pid: 9, ns_level: 1, comm, path, arguments: NO_NAME, role: 3 };
    bodies.event(entered_ns, CONTAINER, 150, Detail::Exec(exec));
    let (container, image) = (bodies.name("web"), bodies.name("web:2"));
    let state = ContainerState {
        container,
        image,
        reason: NO_NAME,
        message: NO_NAME,
        exit_code: 0,
        signal: 0,
        restart_count: 1,
        started_ns: rolled_ns,
        finished_ns: 0,
        state: 2,
        is_last: false,
        is_ready: true,
        role: 0,
        memory_limit_bytes: 64 << 20,
        cpu_limit_milli: 0,
    };
    bodies.event(entered_ns + 5, CONTAINER, 0, Detail::ContainerState(Box::new(state)));
    bodies.body
}

/// A thousand waits for a CPU, and two connections that were refused.
fn refused(waited_ns: u64, refused_ns: u64) -> Body {
    let mut bodies = Bodies::default();
    bodies.waits(waited_ns, 1000);
    for port in [5432, 5433] {
        let address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 7];
        let tcp = Tcp {
            source: address,
            destination: address,
            duration_us: 5,
            kib_sent: 0,
            kib_received: 0,
            source_port: 40_000,
            destination_port: port,
            change: 2,
            active: true,
        };
        bodies.event(refused_ns, CONTAINER, 100, Detail::Tcp(tcp));
    }
    bodies.body
}

/// One for memory, with a curve; one by a signal; one with an exit code.
fn three_deaths([first_ns, second_ns, third_ns]: [u64; 3]) -> Body {
    let mut bodies = Bodies::default();
    bodies.signal(first_ns, 100, 9, true);
    bodies.oom(first_ns + 1, 100);
    bodies.exit(first_ns + 1000, 100, 9, 1);
    let cgroup = bodies.name("/kubepods/pod1/web");
    let point = |memory_kib| Point { memory_kib, file_share: 51, shmem_share: 0, cpu_milli: 250, throttled: 3 };
    let curve = Curve {
        cgroup,
        limit_bytes: 64 << 20,
        interval_ns: 10_000_000_000,
        points: (1..=12).map(|step| point(step * 4096)).collect(),
    };
    bodies.event(first_ns + 2000, CONTAINER, 0, Detail::Curve(Box::new(curve)));
    bodies.signal(second_ns, 200, 15, false);
    bodies.exit(second_ns + 1000, 200, 15, 1);
    bodies.exit(third_ns, 300, 3 << 8, 2);
    // Of no interest: a helper that ended well.
    bodies.exit(third_ns + 1, 301, 0, 2);
    bodies.body
}

/// The rows of a table below a folder, read without an engine.
pub fn rows_of(place: &Path, table: &str) -> Vec<HashMap<String, Field>> {
    let files = objects(place).into_iter().filter(|path| path.starts_with(&format!("{table}/")));
    let mut rows = Vec::new();
    for path in files {
        let file = std::fs::File::open(place.join(path)).expect("a file");
        let reader = SerializedFileReader::new(file).expect("Parquet");
        for row in reader.get_row_iter(None).expect("rows") {
            let row = row.expect("a row");
            rows.push(row.get_column_iter().map(|(name, field)| (name.clone(), field.clone())).collect());
        }
    }
    rows
}

/// The sum of an account in rows of the ledger, of one node or of all.
pub fn account(rows: &[HashMap<String, Field>], node: Option<&str>, account: &str) -> i64 {
    let is_text = |row: &HashMap<String, Field>, column: &str, text: &str| row[column] == Field::Str(text.to_owned());
    let wanted = rows
        .iter()
        .filter(|row| is_text(row, "account", account) && node.is_none_or(|node| is_text(row, "node", node)));
    wanted.map(|row| if let Field::Long(events) = row["events"] { events } else { 0 }).sum()
}

/// The interpreter that has the engines. `None` where there is none and it is not required.
pub fn python() -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target folder").join("tools");
    let python = tools.join("sql/bin/python3");
    if python.is_file() {
        return Some(python);
    }
    assert!(
        std::env::var("TAPIO_REQUIRE").as_deref() != Ok("all"),
        "no SQL engines: deploy/local/install.sh sql installs them"
    );
    eprintln!("SKIP: no SQL engines");
    None
}

/// What one query brought.
#[derive(Debug, PartialEq)]
pub struct Answer {
    pub title: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Value>>,
}

impl Answer {
    /// The values of a column.
    pub fn column(&self, name: &str) -> Vec<Value> {
        let at = self.columns.iter().position(|column| column == name);
        let at = at.unwrap_or_else(|| panic!("{name} is not in {:?}", self.columns));
        self.rows.iter().map(|row| row[at].clone()).collect()
    }
}

/// Asks an engine; without queries, those of docs/sql.md.
pub fn ask(python: &Path, engine: &str, environment: &[(&str, String)], place: &str, queries: &[&str]) -> Vec<Answer> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/sql/tapio_sql.py");
    let output = Command::new(python)
        .args([script, "--json", "--engine", engine, place])
        .args(queries)
        .envs(environment.iter().map(|(name, value)| (*name, value.as_str())))
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{engine}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let answer = |line: &str| {
        let value: Value = serde_json::from_str(line).expect("JSON");
        let list = |value: &Value| value.as_array().expect("a list").clone();
        Answer {
            title: value["title"].as_str().expect("a text").to_owned(),
            columns: list(&value["columns"]).iter().map(|name| name.as_str().expect("a text").to_owned()).collect(),
            rows: list(&value["rows"]).iter().map(list).collect(),
        }
    };
    text.lines().map(answer).collect()
}

/// Asks both engines, which must say the same.
pub fn ask_both(python: &Path, environment: &[(&str, String)], place: &str, queries: &[&str]) -> Vec<Answer> {
    let [first, second] = ENGINES.map(|engine| ask(python, engine, environment, place, queries));
    assert_eq!(first, second, "DuckDB and DataFusion differ");
    first
}
