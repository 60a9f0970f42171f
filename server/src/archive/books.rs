//! The books: what is durable, of which node and epoch, and whether every collector's ledger closes.
//!
//! What enters: each frame once it is durable, in the order of the archive. What leaves: the durable sequence that streams
//! resume from, the status of every node, the losses for metrics, and the snapshot that starts a segment. What must hold,
//! for each source of each epoch:
//!
//! ```text
//! emitted = archived + Σ dropped{stage, reason} + held + unexplained
//! ```
//!
//! | state  | when                                    | held                        | unexplained                     |
//! |--------|-----------------------------------------|-----------------------------|---------------------------------|
//! | open   | it is the node's newest epoch           | emitted − dropped − shipped | shipped − archived              |
//! | closed | its final frame is durable              | 0                           | the same + held of that frame   |
//! | killed | a newer epoch began without final frame | 0                           | shipped − archived              |
//!
//! What a killed epoch held is counted as dropped{collector, killed}. Where the rings outlived the collector, the next epoch that
//! reads them states what all earlier ones had consumed or dropped (`inherited`). Then the loss is known exactly: inherited by
//! the next − inherited by this one − shipped − dropped. Where that is below 0, a ring of the killed epoch has not come back, and
//! what the epoch last held is all that is known.
//!
//! Frames that another server acknowledged, or this one before it lost its disk, are known by the collector's word alone. Their
//! events are left out of `emitted` and `shipped` above, so that the equation holds for what this server answers for.
//!
//! The counters come from the network: sums are taken in `i128`, so that no peer can make one overflow.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;
use tapio_wire::event::{SOURCES, Source};
use tapio_wire::frame::{HEADER_BYTES, Header};
use tapio_wire::ledger::{Ledger, REASONS, Reason, STAGES, Stage};
use tapio_wire::service;

/// Epochs that are kept of each node.
pub const EPOCHS_MAX: usize = 8;
/// Nodes that are kept.
pub const NODES_MAX: usize = 100_000;
/// Nodes that make room at once when there are too many: those that were silent the longest.
const NODES_EVICTED: usize = NODES_MAX / 100;

/// Losses by stage and reason.
pub type Losses = [[u64; REASONS]; STAGES];

/// How an epoch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EpochState {
    Open,
    Closed,
    Killed,
}

impl EpochState {
    /// The name that status uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Closed => "closed",
            Self::Killed => "killed",
        }
    }
}

/// What a collector says was acknowledged to it, by whomever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Acknowledged {
    /// Every frame up to this one.
    pub seq: u64,
    /// The events in them.
    pub events: [u64; SOURCES],
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// The frame counts; this many frames before it are missing.
    New { missing: u64 },
    /// The frame is already here.
    Duplicate,
}

/// What is known of one epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EpochBooks {
    pub epoch: u64,
    pub durable_seq: u64,
    pub frames: u64,
    /// Frames that the sequence skipped.
    pub missing_frames: u64,
    pub lethal_events: u64,
    pub archived: [u64; SOURCES],
    /// Events of this epoch that were acknowledged, but not out of this archive.
    pub elsewhere: [u64; SOURCES],
    pub is_final: bool,
    /// Clocks of the last frame.
    pub boottime_ns: u64,
    pub realtime_ns: u64,
    /// Events in `archived` that a start found missing on the disk. Each start finds them again, so no snapshot has
    /// them.
    pub(super) lost: [u64; SOURCES],
    /// The last frame's ledger, as it was on the wire: a tenth of its decoded size.
    pub(super) ledger: Vec<u8>,
}

impl EpochBooks {
    /// The last frame's ledger.
    pub fn ledger(&self) -> Ledger {
        Ledger::decode(&self.ledger).unwrap_or_default()
    }
}

/// What is known of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeBooks {
    pub name: Option<Arc<str>>,
    /// Books of each epoch, oldest first; never empty.
    pub epochs: Vec<EpochBooks>,
}

impl NodeBooks {
    fn state(&self, index: usize) -> EpochState {
        if self.epochs[index].is_final {
            EpochState::Closed
        } else if index + 1 < self.epochs.len() {
            EpochState::Killed
        } else {
            EpochState::Open
        }
    }

    fn newest_ns(&self) -> u64 {
        self.epochs.iter().map(|epoch| epoch.realtime_ns).max().unwrap_or(0)
    }
}

/// One source's account of one epoch, settled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Balance {
    pub emitted: u64,
    pub archived: u64,
    pub held: u64,
    pub unexplained: i64,
    pub dropped: Losses,
    pub inherited: u64,
    /// Acknowledged, though not out of this archive; left out of `emitted`.
    pub elsewhere: u64,
}

/// What is left of epochs and nodes that the books no longer list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retired {
    pub emitted: u64,
    pub archived: u64,
    pub unexplained: i64,
    pub dropped: Losses,
}

/// Counts over the whole life of the archive, deleted segments included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub frames: u64,
    pub events: u64,
    pub lethal_events: u64,
    pub duplicates: u64,
    /// Damaged places that were set aside.
    pub quarantined: u64,
}

/// Counts what is durable, by node and epoch, and checks each collector's ledger.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Books {
    pub(super) nodes: HashMap<u64, NodeBooks, RandomState>,
    pub(super) retired: [Retired; SOURCES],
    pub(super) totals: Totals,
    /// [`EpochBooks::lost`] of epochs that the books no longer list.
    pub(super) retired_lost: u64,
}

impl Books {
    /// Counts a frame that is durable. `frame` is the whole frame, checked.
    pub fn record(&mut self, header: &Header, frame: &[u8]) -> Recorded {
        let epoch = self.epoch_entry(header.node, header.epoch);
        if header.seq <= epoch.durable_seq {
            self.totals.duplicates += 1;
            return Recorded::Duplicate;
        }
        let missing = header.seq - epoch.durable_seq - 1;
        epoch.missing_frames = epoch.missing_frames.saturating_add(missing);
        epoch.durable_seq = header.seq;
        epoch.frames += 1;
        epoch.is_final = header.is_final;
        epoch.boottime_ns = header.boottime_ns;
        epoch.realtime_ns = header.realtime_ns;
        epoch.lethal_events += u64::from(header.lethal_events);
        for (sum, &count) in epoch.archived.iter_mut().zip(&header.source_events) {
            *sum += u64::from(count);
        }
        epoch.ledger.clear();
        let ledger_start = HEADER_BYTES + header.payload_bytes as usize;
        epoch.ledger.extend_from_slice(frame.get(ledger_start..).unwrap_or_default());
        self.totals.frames += 1;
        self.totals.events += u64::from(header.events());
        self.totals.lethal_events += u64::from(header.lethal_events);
        Recorded::New { missing }
    }

    /// Lets an epoch go on behind frames that were acknowledged elsewhere. Returns how many events of each source more are
    /// elsewhere now. Nothing changes when the frames are here.
    pub fn resume(&mut self, node: u64, epoch: u64, acknowledged: &Acknowledged) -> [u64; SOURCES] {
        let epoch = self.epoch_entry(node, epoch);
        let mut more = [0; SOURCES];
        if acknowledged.seq <= epoch.durable_seq {
            return more;
        }
        epoch.durable_seq = acknowledged.seq;
        for (source, more) in more.iter_mut().enumerate() {
            let elsewhere = acknowledged.events[source].saturating_sub(epoch.archived[source]);
            *more = elsewhere.saturating_sub(epoch.elsewhere[source]);
            epoch.elsewhere[source] = elsewhere;
        }
        more
    }

    /// Counts damaged places.
    pub(super) fn count_quarantined(&mut self, places: u64) {
        self.totals.quarantined += places;
    }

    /// Remembers what a node is called. A node that has no frame here is not remembered.
    pub fn learn_name(&mut self, node: u64, name: &Arc<str>) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.name = Some(Arc::clone(name));
        }
    }

    /// What a node is called, where its collector said so.
    pub fn name(&self, node: u64) -> Option<&Arc<str>> {
        self.nodes.get(&node)?.name.as_ref()
    }

    /// The last frame of an epoch that is durable, 0 when there is none.
    pub fn durable_seq(&self, node: u64, epoch: u64) -> u64 {
        self.epoch(node, epoch).map_or(0, |epoch| epoch.durable_seq)
    }

    /// Whether a frame that was found on the disk is one of those that count. An epoch that made room for newer ones did count; of a
    /// node that made room for others, beyond [`NODES_MAX`], that is not known any more.
    pub fn counts(&self, node: u64, epoch: u64, seq: u64) -> bool {
        match self.epoch(node, epoch) {
            Some(known) => seq <= known.durable_seq,
            None => self.nodes.get(&node).is_some_and(|node| {
                node.epochs.len() >= EPOCHS_MAX && node.epochs.first().is_some_and(|oldest| epoch < oldest.epoch)
            }),
        }
    }

    /// What is known of an epoch.
    pub fn epoch(&self, node: u64, epoch: u64) -> Option<&EpochBooks> {
        self.node(node)?.epochs.iter().find(|known| known.epoch == epoch)
    }

    /// The newest epoch of a node.
    pub fn newest_epoch(&self, node: u64) -> Option<u64> {
        self.nodes.get(&node)?.epochs.last().map(|epoch| epoch.epoch)
    }

    /// What is known of a node.
    pub fn node(&self, id: u64) -> Option<&NodeBooks> {
        self.nodes.get(&id)
    }

    /// What is known of each node.
    pub fn nodes(&self) -> impl Iterator<Item = (u64, &NodeBooks)> {
        self.nodes.iter().map(|(&id, node)| (id, node))
    }

    /// Counts over the whole life of the archive.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Every source's account of one epoch, and how the epoch stands.
    pub fn balances(&self, node: u64, epoch: u64) -> Option<(EpochState, [Balance; SOURCES])> {
        let node = self.nodes.get(&node)?;
        let index = node.epochs.iter().position(|known| known.epoch == epoch)?;
        let mut balances: [Balance; SOURCES] = Default::default();
        settle(node, index, |source, balance| balances[source as usize] = balance);
        Some((node.state(index), balances))
    }

    /// Events that no counter accounts for, over all nodes: 0 unless something is wrong. Surpluses and shortages do not
    /// cancel each other out.
    pub fn unexplained_total(&self) -> i64 {
        let lost = i64::try_from(self.retired_lost).unwrap_or(i64::MAX);
        let mut sum: i64 = self.retired.iter().fold(lost, |sum, retired| sum.saturating_add(retired.unexplained));
        self.each_balance(|_, balance| {
            sum = sum.saturating_add(balance.unexplained.saturating_abs());
        });
        sum
    }

    /// Every loss that a collector has declared or that its death implies, over all nodes.
    pub fn losses(&self) -> Vec<(Source, Stage, Reason, u64)> {
        let mut sums: [Losses; SOURCES] = std::array::from_fn(|source| self.retired[source].dropped);
        self.each_balance(|source, balance| {
            add_losses(&mut sums[source as usize], &balance.dropped);
        });
        let mut losses = Vec::new();
        for source in Source::ALL {
            for &stage in Stage::ALL {
                for &reason in Reason::ALL {
                    let count = sums[source as usize][stage as usize][reason as usize];
                    if count > 0 {
                        losses.push((source, stage, reason, count));
                    }
                }
            }
        }
        losses
    }

    /// The status of every node, by name. `connected` says whether a node has a stream.
    pub fn status(&self, connected: impl Fn(u64) -> bool) -> Vec<service::NodeStatus> {
        let mut nodes: Vec<_> = self
            .nodes
            .iter()
            .map(|(&id, node)| service::NodeStatus {
                node: node.name.as_deref().unwrap_or_default().to_owned(),
                node_id: id,
                connected: connected(id),
                epochs: (0..node.epochs.len()).map(|index| epoch_status(node, index)).collect(),
                ..service::NodeStatus::default()
            })
            .collect();
        nodes.sort_by(|a, b| (&a.node, a.node_id).cmp(&(&b.node, b.node_id)));
        nodes
    }

    fn epoch_entry(&mut self, id: u64, epoch: u64) -> &mut EpochBooks {
        if !self.nodes.contains_key(&id) && self.nodes.len() >= NODES_MAX {
            self.evict_silent_nodes();
        }
        let node = self.nodes.entry(id).or_default();
        let mut index = node.epochs.partition_point(|known| known.epoch < epoch);
        if node.epochs.get(index).is_none_or(|known| known.epoch != epoch) {
            if node.epochs.len() >= EPOCHS_MAX {
                let retired = &mut self.retired;
                self.retired_lost += std::mem::take(&mut node.epochs[0].lost).iter().sum::<u64>();
                settle(node, 0, |source, balance| retired[source as usize].add(&balance));
                node.epochs.remove(0);
                index = index.saturating_sub(1);
            }
            node.epochs.insert(index, EpochBooks { epoch, ..EpochBooks::default() });
        }
        &mut node.epochs[index]
    }

    fn each_balance(&self, mut each: impl FnMut(Source, Balance)) {
        for node in self.nodes.values() {
            for index in 0..node.epochs.len() {
                settle(node, index, &mut each);
            }
        }
    }

    fn evict_silent_nodes(&mut self) {
        let mut by_age: Vec<(u64, u64)> = self.nodes.iter().map(|(&id, node)| (node.newest_ns(), id)).collect();
        by_age.select_nth_unstable(NODES_EVICTED);
        for (_, id) in by_age.into_iter().take(NODES_EVICTED) {
            let Some(mut node) = self.nodes.remove(&id) else { continue };
            for epoch in &mut node.epochs {
                self.retired_lost += std::mem::take(&mut epoch.lost).iter().sum::<u64>();
            }
            for index in 0..node.epochs.len() {
                let retired = &mut self.retired;
                settle(&node, index, |source, balance| retired[source as usize].add(&balance));
            }
        }
    }
}

impl Retired {
    fn add(&mut self, balance: &Balance) {
        self.emitted = self.emitted.saturating_add(balance.emitted);
        self.archived = self.archived.saturating_add(balance.archived);
        self.unexplained = self.unexplained.saturating_add(balance.unexplained.saturating_abs());
        add_losses(&mut self.dropped, &balance.dropped);
    }
}

fn add_losses(sums: &mut Losses, losses: &Losses) {
    for (sum, &count) in sums.iter_mut().flatten().zip(losses.iter().flatten()) {
        *sum = sum.saturating_add(count);
    }
}

fn settle(node: &NodeBooks, index: usize, mut each: impl FnMut(Source, Balance)) {
    let epoch = &node.epochs[index];
    let ledger = epoch.ledger();
    let state = node.state(index);
    let later: Vec<Ledger> = match state {
        EpochState::Killed => node.epochs[index + 1..].iter().map(EpochBooks::ledger).collect(),
        EpochState::Open | EpochState::Closed => Vec::new(),
    };
    for source in Source::ALL {
        // An epoch that never saw the source cannot have inherited its rings: the one after it may.
        let mut accounts = later.iter().map(|ledger| ledger.account(source));
        let inherited_next = accounts
            .find(|account| account.emitted > 0 || account.inherited > 0)
            .map_or(0, |account| account.inherited);
        each(source, balance(epoch, &ledger, state, inherited_next, source));
    }
}

fn balance(epoch: &EpochBooks, ledger: &Ledger, state: EpochState, inherited_next: u64, source: Source) -> Balance {
    let account = ledger.account(source);
    let archived = epoch.archived[source as usize].saturating_sub(epoch.lost[source as usize]);
    let elsewhere = epoch.elsewhere[source as usize];
    let mut settled = Balance {
        emitted: account.emitted.saturating_sub(elsewhere),
        archived,
        dropped: account.dropped,
        inherited: account.inherited,
        elsewhere,
        ..Balance::default()
    };
    let shipped = i128::from(account.shipped);
    let dropped: i128 = account.dropped.iter().flatten().map(|&count| i128::from(count)).sum();
    let held = i128::from(account.emitted) - dropped - shipped;
    let mut unexplained = shipped - i128::from(elsewhere) - i128::from(archived);
    match state {
        EpochState::Open => {
            settled.held = saturating_u64(held);
            unexplained += held.min(0);
        }
        EpochState::Closed => unexplained += held,
        EpochState::Killed => {
            let consumed = i128::from(inherited_next) - i128::from(account.inherited);
            let exactly = consumed - shipped - dropped;
            // Below 0 it is not the whole story: a ring that this epoch had read did not come back.
            let was_active = account.emitted > 0 || account.inherited > 0;
            let lost = if inherited_next > 0 && was_active && exactly >= 0 {
                settled.emitted = saturating_u64(consumed - i128::from(elsewhere));
                exactly
            } else {
                held
            };
            let killed = &mut settled.dropped[Stage::Collector as usize][Reason::Killed as usize];
            *killed = killed.saturating_add(saturating_u64(lost));
            unexplained += lost.min(0);
        }
    }
    settled.unexplained = unexplained.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64;
    settled
}

fn saturating_u64(value: i128) -> u64 {
    value.clamp(0, i128::from(u64::MAX)) as u64
}

fn epoch_status(node: &NodeBooks, index: usize) -> service::EpochStatus {
    let epoch = &node.epochs[index];
    let mut sources = Vec::new();
    settle(node, index, |source, balance| {
        if balance == Balance::default() {
            return;
        }
        let dropped = Stage::ALL
            .iter()
            .flat_map(|&stage| Reason::ALL.iter().map(move |&reason| (stage, reason)))
            .map(|(stage, reason)| service::LossCount {
                stage: stage.name().to_owned(),
                reason: reason.name().to_owned(),
                events: balance.dropped[stage as usize][reason as usize],
            })
            .filter(|loss| loss.events > 0)
            .collect();
        sources.push(service::SourceLedger {
            source: source.name().to_owned(),
            emitted: balance.emitted,
            archived: balance.archived,
            held: balance.held,
            unexplained: balance.unexplained,
            dropped,
            inherited: balance.inherited,
            elsewhere: balance.elsewhere,
        });
    });
    service::EpochStatus {
        epoch: epoch.epoch,
        durable_seq: epoch.durable_seq,
        state: node.state(index).name().to_owned(),
        sources,
        last_frame_ns: epoch.realtime_ns,
    }
}

#[cfg(test)]
mod tests;
