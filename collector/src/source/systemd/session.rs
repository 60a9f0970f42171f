//! One connection to the bus: from the first question to the moment it is lost.
//!
//! What enters: signals of systemd, and answers of it. What leaves: events, through the intake. What must hold: the
//! stream of signals is read while answers are awaited, since the connection delivers neither while the other's queue
//! is full. A signal counts only when systemd sent it: any process on the bus may send a similar one.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::watch;
use zbus::message::{Sequence, Type};
use zbus::names::OwnedUniqueName;
use zbus::{Connection, MatchRule, Message, MessageStream, OwnedObjectPath, Variant};
use zbus_systemd::systemd1::ManagerProxy;

use super::name::{UNITS_PATH, cgroup_prefix, counts_pids_apart, interface_of_unit, path_of_unit, unit_of_path};
use super::units::{Properties, Units};
use super::{DESTINATION, Reporter};

/// Answers under way at the same time.
const QUESTIONS_MAX: usize = 4;
/// Signals that wait to be read, before the connection is read no further.
const SIGNALS_QUEUED: usize = 1024;
/// How often a silent systemd is asked whether it is there.
const KEEPALIVE: Duration = Duration::from_secs(30);

const UNIT_INTERFACE: &str = "org.freedesktop.systemd1.Unit";
const PROPERTIES_INTERFACE: &str = "org.freedesktop.DBus.Properties";

/// Why a connection ended.
#[derive(Debug)]
pub enum End {
    /// The source was asked to stop.
    Stopped,
    /// The connection was lost, for this reason.
    Lost(String),
}

enum Answer {
    Listed(zbus::Result<Listed>),
    Properties(String, zbus::Result<Message>),
    Alive(zbus::Result<()>),
}

/// A unit as `ListUnits` answers: name, description, load, active and sub state, followed unit, path, job.
type UnitOfList = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// A unit of a list: name, `ActiveState`, `SubState`.
type ListedUnit = (String, String, String);

struct Listed {
    /// The list's place among the connection's messages.
    position: Sequence,
    owner: OwnedUniqueName,
    units: Vec<ListedUnit>,
    cgroup_prefix: String,
    counts_pids_apart: bool,
}

/// Subscribes and lists. Signals that come in between are in the stream.
async fn subscribe(connection: Connection) -> zbus::Result<Listed> {
    let bus = zbus::fdo::DBusProxy::new(&connection).await?;
    let signal = || MatchRule::builder().msg_type(Type::Signal);
    let from_systemd = || signal().sender(DESTINATION);
    for rule in [
        from_systemd().interface(PROPERTIES_INTERFACE).path_namespace(UNITS_PATH).build()?,
        from_systemd().interface("org.freedesktop.systemd1.Manager").build()?,
        signal().sender("org.freedesktop.DBus").member("NameOwnerChanged").add_arg(DESTINATION).build()?,
    ] {
        bus.add_match_rule(rule).await?;
    }
    let manager = ManagerProxy::builder(&connection).cache_properties(zbus::proxy::CacheProperties::No).build().await?;
    manager.subscribe().await?;
    let manager = manager.inner();
    let list =
        connection.call_method(Some(DESTINATION), manager.path(), Some(manager.interface()), "ListUnits", &()).await?;
    let units: Vec<UnitOfList> = list.body().deserialize()?;
    let units = units.into_iter().map(|unit| (unit.0, unit.3, unit.4)).collect();
    let position = list.recv_position();
    let pid = connection.peer_creds().await.ok().and_then(|credentials| credentials.process_id());
    let owner = owner(&connection).await?;
    Ok(Listed { position, owner, units, cgroup_prefix: cgroup_prefix(pid), counts_pids_apart: counts_pids_apart(pid) })
}

async fn properties(connection: Connection, unit: String) -> Answer {
    let Some(interface) = interface_of_unit(&unit) else {
        return Answer::Properties(unit, Err(zbus::Error::InterfaceNotFound));
    };
    let path = path_of_unit(&unit);
    let asked = (interface,);
    let answer = connection.call_method(Some(DESTINATION), path, Some(PROPERTIES_INTERFACE), "GetAll", &asked).await;
    Answer::Properties(unit, answer)
}

async fn is_alive(connection: Connection) -> Answer {
    let path = "/org/freedesktop/systemd1";
    let call = connection.call_method(Some(DESTINATION), path, Some("org.freedesktop.DBus.Peer"), "Ping", &());
    Answer::Alive(call.await.map(|_| ()))
}

/// A connection in use.
pub struct Session<'a> {
    connection: Connection,
    owner: OwnedUniqueName,
    units: &'a mut Units,
    reporter: &'a mut Reporter,
    answers: FuturesUnordered<BoxFuture<'static, Answer>>,
    questions_open: usize,
    is_alive_asked: bool,
}

impl<'a> Session<'a> {
    /// Finds systemd on the bus.
    ///
    /// # Errors
    /// When it is not there.
    pub async fn begin(connection: Connection, units: &'a mut Units, reporter: &'a mut Reporter) -> zbus::Result<Self> {
        let owner = owner(&connection).await?;
        let session = Self {
            connection,
            owner,
            units,
            reporter,
            answers: FuturesUnordered::new(),
            questions_open: 0,
            is_alive_asked: false,
        };
        Ok(session)
    }

    /// Runs until the connection is lost or `stop` is set.
    pub async fn run(mut self, stop: &mut watch::Receiver<bool>) -> End {
        let mut stream = MessageStream::from(&self.connection);
        stream.set_max_queued(SIGNALS_QUEUED.try_into().unwrap_or(std::num::NonZeroUsize::MIN));
        self.units.forget_questions();
        self.answers.push(subscribe(self.connection.clone()).map(Answer::Listed).boxed());
        loop {
            if self.reporter.report(self.units, stop).await.is_err() {
                return End::Stopped;
            }
            while self.questions_open < QUESTIONS_MAX
                && let Some(unit) = self.units.question()
            {
                self.questions_open += 1;
                self.answers.push(properties(self.connection.clone(), unit).boxed());
            }
            let now = Instant::now();
            let until_tick = self.units.next_tick().map(|due| due.saturating_duration_since(now));
            let nap = until_tick.into_iter().chain(self.reporter.sleep_limit()).min().unwrap_or(KEEPALIVE);
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return End::Stopped,
                // Signals first: an answer knows its place among those that came before it.
                message = stream.next() => match message {
                    Some(Ok(message)) => {
                        if let Err(lost) = self.message(&message) {
                            return End::Lost(lost);
                        }
                    }
                    Some(Err(error)) => return End::Lost(format!("the bus is lost: {error}")),
                    None => return End::Lost("the bus is lost".into()),
                },
                Some(answer) = self.answers.next() => {
                    if let Err(lost) = self.answer(answer) {
                        return End::Lost(lost);
                    }
                }
                () = tokio::time::sleep(nap) => {
                    if nap == KEEPALIVE && !self.is_alive_asked {
                        self.is_alive_asked = true;
                        self.answers.push(is_alive(self.connection.clone()).boxed());
                    }
                }
            }
            self.units.tick(Instant::now());
        }
    }

    fn answer(&mut self, answer: Answer) -> Result<(), String> {
        let now = Instant::now();
        match answer {
            Answer::Listed(Ok(listed)) => {
                // Before the match on its name nobody would have reported it.
                if listed.owner != self.owner {
                    return Err("systemd has started again".into());
                }
                let is_first = self.reporter.is_first();
                self.units.at(listed.position);
                self.reporter.listed(listed.cgroup_prefix, listed.counts_pids_apart);
                for (name, active, sub) in &listed.units {
                    if self.reporter.selection.skips(name).is_none() {
                        self.units.list(name, active, sub, is_first, now);
                    }
                }
                let names: HashSet<&str> = listed.units.iter().map(|(name, ..)| name.as_str()).collect();
                let gone = self.units.retain_listed(|name| names.contains(name), now);
                self.reporter.resumed(gone);
            }
            Answer::Listed(Err(error)) => return Err(format!("systemd does not list its units: {error}")),
            Answer::Properties(unit, answer) => {
                self.questions_open -= 1;
                match answer {
                    Ok(message) => {
                        let body = message.body();
                        let values: HashMap<&str, Variant<'_>> =
                            body.deserialize().map_err(|error| format!("systemd's answer cannot be read: {error}"))?;
                        self.units.at(message.recv_position());
                        self.units.answer(&unit, Some(&read(&values)), now);
                    }
                    // The unit is gone again, or has none.
                    Err(error) => {
                        tracing::debug!(unit, %error, "cannot read unit properties");
                        self.units.answer(&unit, None, now);
                    }
                }
            }
            Answer::Alive(answer) => {
                self.is_alive_asked = false;
                answer.map_err(|error| format!("systemd does not answer: {error}"))?;
            }
        }
        Ok(())
    }

    fn message(&mut self, message: &Message) -> Result<(), String> {
        if message.message_type() != Type::Signal {
            return Ok(());
        }
        let header = message.header();
        let (Some(sender), Some(member)) = (header.sender(), header.member()) else { return Ok(()) };
        if sender.as_str() == "org.freedesktop.DBus" && member.as_str() == "NameOwnerChanged" {
            let body = message.body();
            let Ok((name, _, new)) = body.deserialize::<(&str, &str, &str)>() else { return Ok(()) };
            return match name == DESTINATION && new != self.owner.as_str() {
                true if new.is_empty() => Err("systemd has left the bus".into()),
                true => Err("systemd has started again".into()),
                false => Ok(()),
            };
        }
        if sender.as_str() != self.owner.as_str() {
            return Ok(());
        }
        let now = Instant::now();
        let body = message.body();
        self.units.at(message.recv_position());
        match member.as_str() {
            "PropertiesChanged" => {
                let Some(unit) = header.path().and_then(|path| unit_of_path(path.as_str())) else { return Ok(()) };
                let Ok((interface, values, _)) = body.deserialize::<(&str, HashMap<&str, Variant<'_>>, Vec<&str>)>()
                else {
                    return Ok(());
                };
                let is_whole = interface == UNIT_INTERFACE;
                match self.reporter.selection.skips(&unit) {
                    Some(skip) => {
                        if is_whole {
                            self.reporter.counts.count_skipped(skip);
                        }
                    }
                    None => self.units.signal(&unit, &read(&values), is_whole, now),
                }
            }
            "UnitRemoved" => {
                if let Ok((unit, _)) = body.deserialize::<(&str, zbus::ObjectPath<'_>)>() {
                    self.units.remove(unit, now);
                }
            }
            "JobRemoved" => {
                if let Ok((_, _, unit, result)) = body.deserialize::<(u32, zbus::ObjectPath<'_>, &str, &str)>()
                    && result != "done"
                {
                    match self.reporter.selection.skips(unit) {
                        Some(skip) => self.reporter.counts.count_skipped(skip),
                        None => self.reporter.job(unit, self.units.cgroup(unit), result, now),
                    }
                }
            }
            "Reloading" if body.deserialize::<bool>().is_ok_and(|begins| !begins) => self.units.reloaded(),
            _ => {}
        }
        Ok(())
    }
}

/// Who is systemd on this bus.
pub async fn owner(connection: &Connection) -> zbus::Result<OwnedUniqueName> {
    let bus = zbus::fdo::DBusProxy::new(connection).await?;
    Ok(bus.get_name_owner(DESTINATION.try_into()?).await?)
}

fn read<'v>(values: &'v HashMap<&'v str, Variant<'v>>) -> Properties<'v> {
    let text = |name: &str| values.get(name).and_then(|value| value.downcast_ref::<&str>().ok());
    let signed = |name: &str| values.get(name).and_then(|value| value.downcast_ref::<i32>().ok());
    let unsigned = |name: &str| values.get(name).and_then(|value| value.downcast_ref::<u32>().ok());
    let time = |name: &str| values.get(name).and_then(|value| value.downcast_ref::<u64>().ok());
    Properties {
        active_state: text("ActiveState"),
        sub_state: text("SubState"),
        result: text("Result"),
        main_code: signed("ExecMainCode"),
        main_status: signed("ExecMainStatus"),
        main_pid: unsigned("MainPID"),
        restarts: unsigned("NRestarts"),
        main_exited_us: time("ExecMainExitTimestampMonotonic"),
        cgroup: text("ControlGroup"),
        slice: text("Slice"),
        changed_us: time("StateChangeTimestampMonotonic"),
    }
}
