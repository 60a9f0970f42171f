//! The table of units: what systemd said of each, what was reported of it, and whether the difference matters.
//!
//! What enters: properties, as signals and answers carry them. What leaves: [`UnitReport`]s, each the state of one unit
//! that is worth an event. What must hold: the table is bounded. A unit that changes without end is reported a bounded
//! number of times a second, its last state always. Changes that were merged into a later report are counted.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use tapio_wire::program::token_bucket::TokenBucket;
use zbus::message::Sequence;

use super::name::derived_cgroup;
use super::words::{Word, Words};

/// Units remembered at the same time, at the most.
pub const UNITS_MAX: usize = 20_000;
/// How long a unit that systemd has unloaded is remembered: a reload unloads and loads every one of them.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Reports of one unit at once, and a second after that.
const BURST: u32 = 20;
const PER_SECOND: f64 = 10.0;
/// How long the second half of a change is waited for: systemd sends a unit's own properties first, then those all units have.
const HALF: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct UnitStatus {
    active: Word,
    sub: Word,
    result: Word,
    main_code: i32,
    main_status: i32,
    main_pid: u32,
    restarts: u32,
    /// `CLOCK_MONOTONIC`, microseconds.
    main_exited_us: u64,
}

impl Default for UnitStatus {
    fn default() -> Self {
        Self {
            active: Words::INACTIVE,
            sub: Words::EMPTY,
            result: Words::SUCCESS,
            main_code: 0,
            main_status: 0,
            main_pid: 0,
            restarts: 0,
            main_exited_us: 0,
        }
    }
}

/// What a signal or an answer says of a unit; what it does not mention is [`None`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Properties<'a> {
    pub active_state: Option<&'a str>,
    pub sub_state: Option<&'a str>,
    pub result: Option<&'a str>,
    pub main_code: Option<i32>,
    pub main_status: Option<i32>,
    pub main_pid: Option<u32>,
    pub restarts: Option<u32>,
    pub main_exited_us: Option<u64>,
    pub cgroup: Option<&'a str>,
    pub slice: Option<&'a str>,
    pub changed_us: Option<u64>,
}

/// A unit's state that is worth an event. Times are `CLOCK_MONOTONIC`, microseconds, 0 when not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitReport {
    pub unit: String,
    /// Below systemd's own cgroup.
    pub cgroup: String,
    pub active_state: String,
    pub sub_state: String,
    pub result: String,
    pub main_code: i32,
    pub main_status: i32,
    pub main_pid: u32,
    pub restarts: u32,
    pub main_exited_us: u64,
    /// When it came to be in this state.
    pub changed_us: u64,
}

/// What is known of a unit's properties that no signal carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Knowledge {
    None,
    /// Asked for; until the answer is here nothing is reported.
    Asked,
    /// Known, or not to be had.
    Settled,
}

struct Unit {
    cgroup: String,
    now: UnitStatus,
    reported: UnitStatus,
    /// Restarts at the main process's last end: a failure after a later restart is a refused start.
    restarts_at_exit: u32,
    changed_us: u64,
    knowledge: Knowledge,
    /// The first that is heard of it is where it starts from, and is not reported unless it has failed.
    is_baseline: bool,
    is_waiting: bool,
    /// Where in the connection's order the last signal of it was.
    heard: Option<Sequence>,
    gone: Option<Instant>,
    report_budget: TokenBucket,
}

impl Unit {
    fn has_heard_after(&self, position: Option<Sequence>) -> bool {
        self.heard.zip(position).is_some_and(|(heard, position)| heard > position)
    }
}

/// Remembers each unit's last state and decides whether a change is an event.
pub struct Units {
    units: HashMap<String, Unit, foldhash::fast::RandomState>,
    words: Words,
    /// Units to look at again, each once.
    waiting: VecDeque<(Instant, String)>,
    questions: VecDeque<String>,
    reports: VecDeque<UnitReport>,
    coalesced: u64,
    forgot: Instant,
    /// Position of the message that is being processed.
    position: Option<Sequence>,
}

impl Default for Units {
    fn default() -> Self {
        Self {
            units: HashMap::default(),
            words: Words::new(),
            waiting: VecDeque::new(),
            questions: VecDeque::new(),
            reports: VecDeque::new(),
            coalesced: 0,
            forgot: Instant::now(),
            position: None,
        }
    }
}

/// Whether every change of a unit may matter: of a service. Of mounts, scopes and the rest, which come and go by the hundred
/// with every pod, only failures and what follows them.
fn is_service(name: &str) -> bool {
    name.ends_with(".service")
}

impl Units {
    /// Units in the table.
    pub fn len(&self) -> usize {
        self.units.len()
    }

    /// The next message's place in the connection's order. Answers and signals are read from different queues, and an
    /// answer older than a signal does not undo it.
    pub fn at(&mut self, position: Sequence) {
        self.position = Some(position);
    }

    /// Takes what a list of all units says of one; `now` is the time. The first list makes the start: only what has failed is
    /// reported.
    pub fn list(&mut self, name: &str, active: &str, sub: &str, is_first: bool, now: Instant) {
        let has_failed = active == "failed";
        if !is_service(name) && !has_failed && !self.units.contains_key(name) {
            return;
        }
        let (active, sub) = (self.words.index(active), self.words.index(sub));
        let position = self.position;
        let unit = self.unit(name, now);
        unit.gone = None;
        // What a signal said before the first list is news, and no part of the start.
        unit.is_baseline |= is_first && unit.heard.is_none();
        if !unit.has_heard_after(position) {
            unit.now.active = active;
            unit.now.sub = sub;
        }
        if unit.knowledge == Knowledge::Settled {
            unit.knowledge = Knowledge::None;
        }
        self.ask(name);
    }

    /// Units that a complete list did not name are gone; how many there were.
    pub fn retain_listed(&mut self, is_listed: impl Fn(&str) -> bool, now: Instant) -> usize {
        let mut gone = 0;
        for (name, unit) in &mut self.units {
            if unit.gone.is_none() && !is_listed(name) {
                unit.gone = Some(now);
                gone += 1;
            }
        }
        gone
    }

    /// A unit was unloaded.
    pub fn remove(&mut self, name: &str, now: Instant) {
        if let Some(unit) = self.units.get_mut(name) {
            unit.gone = Some(now);
        }
    }

    /// Unit files were read again: a unit's slice may be another.
    pub fn reloaded(&mut self) {
        for unit in self.units.values_mut().filter(|unit| unit.knowledge == Knowledge::Settled) {
            unit.knowledge = Knowledge::None;
        }
    }

    /// Takes what a signal says. `is_whole` when the change is complete with it.
    pub fn signal(&mut self, name: &str, properties: &Properties<'_>, is_whole: bool, now: Instant) {
        let concerns = is_service(name) || self.units.contains_key(name) || properties.active_state == Some("failed");
        if !concerns {
            return;
        }
        let position = self.position;
        self.apply(name, properties, now);
        let Some(unit) = self.units.get_mut(name) else { return };
        unit.gone = None;
        unit.heard = position;
        if unit.knowledge == Knowledge::None {
            self.ask(name);
        } else if is_whole {
            self.evaluate(name, now);
        } else {
            self.wait(name, now + HALF);
        }
    }

    /// Takes the answer to a question; [`None`] when there was none to be had.
    pub fn answer(&mut self, name: &str, properties: Option<&Properties<'_>>, now: Instant) {
        let Some(unit) = self.units.get(name) else { return };
        let is_old = unit.has_heard_after(self.position);
        match properties {
            Some(properties) if is_old => {
                let place = Properties { cgroup: properties.cgroup, slice: properties.slice, ..Properties::default() };
                self.apply(name, &place, now);
            }
            Some(properties) => self.apply(name, properties, now),
            None => {}
        }
        let Some(unit) = self.units.get_mut(name) else { return };
        unit.knowledge = Knowledge::Settled;
        if std::mem::take(&mut unit.is_baseline) {
            unit.restarts_at_exit = unit.now.restarts;
            unit.reported = unit.now;
            if unit.now.active == Words::FAILED {
                // Reported as if it had just happened: it was not reported before.
                unit.reported.active = Words::ACTIVE;
            }
        }
        self.evaluate(name, now);
    }

    /// The next unit whose properties are wanted.
    pub fn question(&mut self) -> Option<String> {
        self.questions.pop_front()
    }

    /// Asks again for everything that was asked for on a connection that is lost.
    pub fn forget_questions(&mut self) {
        self.questions.clear();
        self.position = None;
        for unit in self.units.values_mut() {
            unit.heard = None;
            if unit.knowledge == Knowledge::Asked {
                unit.knowledge = Knowledge::None;
            }
        }
    }

    /// Whether there is a state that is worth an event.
    pub fn has_report(&self) -> bool {
        !self.reports.is_empty()
    }

    /// The next state that is worth an event.
    pub fn next_report(&mut self) -> Option<UnitReport> {
        self.reports.pop_front()
    }

    /// Changes that were merged into a later report since this was asked last.
    pub fn take_coalesced(&mut self) -> u64 {
        std::mem::take(&mut self.coalesced)
    }

    /// When [`Units::tick`] has something to do.
    pub fn next_tick(&self) -> Option<Instant> {
        self.waiting.iter().map(|(due, _)| *due).min()
    }

    /// Looks at the units whose time has come.
    pub fn tick(&mut self, now: Instant) {
        if now.saturating_duration_since(self.forgot) >= REMEMBERED {
            self.forgot = now;
            self.forget_gone(now);
        }
        for _ in 0..self.waiting.len() {
            let Some((due, name)) = self.waiting.pop_front() else { break };
            if due > now {
                self.waiting.push_back((due, name));
                continue;
            }
            if let Some(unit) = self.units.get_mut(&name) {
                unit.is_waiting = false;
                self.evaluate(&name, now);
            }
        }
    }

    /// The cgroup of a unit, below systemd's own.
    pub fn cgroup(&self, name: &str) -> String {
        let known = self.units.get(name).map(|unit| unit.cgroup.as_str()).filter(|cgroup| !cgroup.is_empty());
        known.map_or_else(|| derived_cgroup(name, ""), str::to_owned)
    }

    fn unit(&mut self, name: &str, now: Instant) -> &mut Unit {
        if !self.units.contains_key(name) && self.units.len() >= UNITS_MAX {
            self.make_room(now);
        }
        self.units.entry(name.to_owned()).or_insert_with(|| Unit {
            cgroup: String::new(),
            now: UnitStatus::default(),
            reported: UnitStatus::default(),
            restarts_at_exit: 0,
            changed_us: 0,
            knowledge: Knowledge::None,
            is_baseline: false,
            is_waiting: false,
            heard: None,
            gone: None,
            report_budget: TokenBucket::new(BURST, PER_SECOND, now),
        })
    }

    fn forget_gone(&mut self, now: Instant) {
        self.units.retain(|_, unit| unit.gone.is_none_or(|gone| now.saturating_duration_since(gone) < REMEMBERED));
    }

    fn make_room(&mut self, now: Instant) {
        self.forget_gone(now);
        if self.units.len() >= UNITS_MAX {
            self.units.retain(|_, unit| unit.gone.is_none());
        }
        if self.units.len() >= UNITS_MAX
            && let Some(any) = self.units.keys().next().cloned()
        {
            // At worst its present state is reported once more.
            self.units.remove(&any);
        }
    }

    fn apply(&mut self, name: &str, properties: &Properties<'_>, now: Instant) {
        let mut word = |text: Option<&str>| text.map(|text| self.words.index(text));
        let (active, sub) = (word(properties.active_state), word(properties.sub_state));
        let result = word(properties.result);
        let unit = self.unit(name, now);
        let state = &mut unit.now;
        state.active = active.unwrap_or(state.active);
        state.sub = sub.unwrap_or(state.sub);
        state.result = result.unwrap_or(state.result);
        state.main_code = properties.main_code.unwrap_or(state.main_code);
        state.main_status = properties.main_status.unwrap_or(state.main_status);
        state.main_pid = properties.main_pid.unwrap_or(state.main_pid);
        let exited_us = properties.main_exited_us.unwrap_or(state.main_exited_us);
        if exited_us != state.main_exited_us {
            state.main_exited_us = exited_us;
            unit.restarts_at_exit = properties.restarts.unwrap_or(state.restarts);
        }
        state.restarts = properties.restarts.unwrap_or(state.restarts);
        unit.changed_us = properties.changed_us.unwrap_or(unit.changed_us);
        match (properties.cgroup, properties.slice) {
            (Some(cgroup), _) if !cgroup.is_empty() => cgroup.clone_into(&mut unit.cgroup),
            // It is gone with the last process: what it was is remembered, or derived.
            (_, Some(slice)) if unit.cgroup.is_empty() => unit.cgroup = derived_cgroup(name, slice),
            _ => {}
        }
    }

    fn ask(&mut self, name: &str) {
        let Some(unit) = self.units.get_mut(name) else { return };
        if unit.knowledge == Knowledge::Asked {
            return;
        }
        if self.questions.len() >= UNITS_MAX {
            // Rather reported with what the signals said than not at all.
            unit.knowledge = Knowledge::Settled;
            return;
        }
        unit.knowledge = Knowledge::Asked;
        self.questions.push_back(name.to_owned());
    }

    fn wait(&mut self, name: &str, until: Instant) {
        if let Some(unit) = self.units.get_mut(name)
            && !unit.is_waiting
        {
            unit.is_waiting = true;
            self.waiting.push_back((until, name.to_owned()));
        }
    }

    fn evaluate(&mut self, name: &str, now: Instant) {
        let Some(unit) = self.units.get_mut(name) else { return };
        match unit.knowledge {
            Knowledge::Settled => {}
            Knowledge::Asked => return,
            // Unit files were read again while it waited: no further signal may come that would cause the question.
            Knowledge::None => return self.ask(name),
        }
        let mut state = unit.now;
        // systemd leaves the last failure's result where it refuses an automatic restart: no process has ended since the
        // restart was counted, so none was started.
        let was_refused = state.active == Words::FAILED && state.restarts > unit.restarts_at_exit;
        if was_refused && state.main_exited_us != 0 && self.words.0[usize::from(state.result)] != "resources" {
            state.result = Words::START_LIMIT_HIT;
        }
        if !matters(&unit.reported, &state, &self.words, is_service(name)) {
            return;
        }
        if let Err(due) = unit.report_budget.take(1, now) {
            self.coalesced += 1;
            self.wait(name, due);
            return;
        }
        unit.reported = state;
        let word = |word: Word| self.words.0[usize::from(word)].clone();
        self.reports.push_back(UnitReport {
            unit: name.to_owned(),
            cgroup: if unit.cgroup.is_empty() { derived_cgroup(name, "") } else { unit.cgroup.clone() },
            active_state: word(state.active),
            sub_state: word(state.sub),
            result: word(state.result),
            main_code: state.main_code,
            main_status: state.main_status,
            main_pid: state.main_pid,
            restarts: state.restarts,
            main_exited_us: state.main_exited_us,
            changed_us: unit.changed_us,
        });
        if !is_service(name) && state.active != Words::FAILED {
            self.units.remove(name);
        }
    }
}

/// Whether a server that knows `before` needs a report of `after`.
fn matters(before: &UnitStatus, after: &UnitStatus, words: &Words, is_service: bool) -> bool {
    let standing = |state: &UnitStatus| match state.active {
        Words::FAILED | Words::ACTIVE | Words::INACTIVE => Some(state.active),
        Words::ACTIVATING if words.0[usize::from(state.sub)].starts_with("auto-restart") => Some(Words::ACTIVATING),
        // On its way to one of these.
        _ => None,
    };
    let is_same_standing = standing(after).is_none_or(|standing_after| standing(before) == Some(standing_after));
    if !is_service {
        return !is_same_standing && (before.active == Words::FAILED || after.active == Words::FAILED);
    }
    let rest = |state: &UnitStatus| {
        (state.result, state.main_code, state.main_status, state.main_pid, state.restarts, state.main_exited_us)
    };
    !is_same_standing || rest(before) != rest(after)
}

#[cfg(test)]
mod tests;
