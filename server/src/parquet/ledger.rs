//! The table of the ledger: what became of every event, by node, epoch, source and interval.
//!
//! What enters: the books that a segment begins with, and each of its frames. What leaves: a row for each account that moved
//! between two looks, at most a minute apart by the node's frames. What must hold: the rows of an account add up to what the books
//! count, over all segments of an archive. `total` is the epoch's sum so far: with it several servers' rows become one account.
//!
//! | account | what | by |
//! |---|---|---|
//! | `emitted` | events that the source produced | the collector |
//! | `shipped` | events put into frames, up to the frame `seq` | the collector |
//! | `dropped` | lost before a frame, by `stage` and `reason` | the collector; `killed` by the server |
//! | `archived` | events in the frames `first_seq` to `seq` of this archive | the server |
//! | `unexplained` | what no counter accounts for | the server |
//! | `damaged` | archived once, and not readable any more | the exporter |

use std::collections::{BTreeMap, HashMap};

use foldhash::fast::RandomState;
use tapio_wire::event::Source;
use tapio_wire::frame::Header;
use tapio_wire::ledger::{Reason, Stage};

use super::schema::LEDGER;
use super::table::{NONE, Partitions, Written};
use super::{ExportError, SegmentTables};
use crate::archive::index::times_ns;
use crate::archive::{Acknowledged, Books};

/// How often a node's account is looked at, by the times of its frames.
const LOOK_NS: u64 = 60_000_000_000;

const fn at(name: &str) -> usize {
    LEDGER.column(name)
}

/// An account, and for losses where and why.
type Account = (u64, u8, &'static str, &'static str, &'static str);

/// What is known of a node as of the last look.
#[derive(Default)]
struct Look {
    at_ns: u64,
    /// Totals by epoch, source and account.
    totals: BTreeMap<Account, i64>,
    /// Last frame of each epoch that the books count.
    seqs: BTreeMap<u64, u64>,
    /// First and last frame of each epoch since that look: a stretch without holes, so that no frame of another archive
    /// lies in it.
    ranges: BTreeMap<u64, (u64, u64)>,
    is_changed: bool,
    /// Whether this segment has had a frame of the node.
    has_frame: bool,
    latest_ns: u64,
}

/// Key of a row.
struct Of {
    node: u64,
    account: Account,
    total: i64,
    first_seq: Option<u64>,
    seq: u64,
}

/// Collects the ledger.
pub(super) struct Ledger {
    partitions: Partitions,
    books: Books,
    looks: HashMap<u64, Look, RandomState>,
    server: String,
    first_ns: u64,
    last_ns: u64,
    /// Frames of this segment are missing, and an index counts them: they are `damaged`, and no riddle.
    has_damage: bool,
}

impl Ledger {
    pub fn new(server: &str) -> Result<Self, ExportError> {
        Ok(Self {
            partitions: Partitions::new(&LEDGER)?,
            books: Books::default(),
            looks: HashMap::default(),
            server: server.to_owned(),
            first_ns: u64::MAX,
            last_ns: 0,
            has_damage: false,
        })
    }

    /// Frames are missing from here on that [`Ledger::finish`] counts.
    pub fn note_damage(&mut self) {
        self.has_damage = true;
    }

    /// What the archive counts so far.
    pub fn begin(&mut self, books: Books) {
        self.books = books;
    }

    /// The books, for the archive's other records.
    pub fn books_mut(&mut self) -> &mut Books {
        &mut self.books
    }

    /// Lets an epoch go on behind frames that another server acknowledged.
    ///
    /// The books leave those events out at once, and only the next frame states that they were shipped. A look taken between the
    /// two would see them as `unexplained`. So the look is taken before, and the next one follows a frame.
    pub fn resume(
        &mut self,
        shared: &mut SegmentTables,
        node: u64,
        epoch: u64,
        acknowledged: &Acknowledged,
    ) -> Result<(), ExportError> {
        if acknowledged.seq <= self.books.durable_seq(node, epoch) {
            return Ok(());
        }
        if self.looks.get(&node).is_some_and(|look| look.is_changed) {
            self.write(shared, node)?;
        }
        self.begin_look(node);
        self.books.resume(node, epoch, acknowledged);
        Ok(())
    }

    /// Takes a node's first look, as of the last frame that the books count. Its time is 0 when they count none.
    fn begin_look(&mut self, node: u64) {
        if !self.looks.contains_key(&node) {
            let known = self.books.node(node);
            let at_ns = known.and_then(|known| known.epochs.iter().map(|epoch| epoch.realtime_ns).max()).unwrap_or(0);
            let look = self.look(node);
            self.looks.insert(node, Look { at_ns, latest_ns: at_ns, ..look });
        }
    }

    /// Counts a frame. False when it was in this archive before.
    pub fn frame(&mut self, shared: &mut SegmentTables, header: &Header, bytes: &[u8]) -> Result<bool, ExportError> {
        let (first_ns, last_ns) = times_ns(header);
        self.begin_look(header.node);
        let look = self.looks.entry(header.node).or_default();
        if !look.has_frame {
            let at_ns = if look.at_ns == 0 { first_ns } else { look.at_ns }.min(header.realtime_ns);
            (look.at_ns, look.latest_ns, look.has_frame) = (at_ns, at_ns, true);
        }
        if header.seq <= self.books.durable_seq(header.node, header.epoch) {
            return Ok(false);
        }
        let range = self.looks.get(&header.node).and_then(|look| look.ranges.get(&header.epoch));
        if range.is_some_and(|&(_, last)| last + 1 != header.seq) {
            self.write(shared, header.node)?;
        }
        self.books.record(header, bytes);
        (self.first_ns, self.last_ns) = (self.first_ns.min(first_ns), self.last_ns.max(last_ns));
        let look = self.looks.entry(header.node).or_default();
        look.is_changed = true;
        look.latest_ns = look.latest_ns.max(header.realtime_ns);
        look.ranges.entry(header.epoch).or_insert((header.seq, header.seq)).1 = header.seq;
        if header.realtime_ns.saturating_sub(look.at_ns) >= LOOK_NS {
            self.write(shared, header.node)?;
        }
        Ok(true)
    }

    /// The accounts of a node now.
    fn look(&self, node: u64) -> Look {
        let mut look = Look::default();
        let Some(known) = self.books.node(node) else { return look };
        for epoch in &known.epochs {
            look.seqs.insert(epoch.epoch, epoch.durable_seq);
            let Some((_, balances)) = self.books.balances(node, epoch.epoch) else { continue };
            let stated = epoch.ledger();
            for source in Source::ALL {
                let balance = &balances[source as usize];
                let mut note = |account, stage, reason, events: i64| {
                    if events != 0 {
                        look.totals.insert((epoch.epoch, source as u8, account, stage, reason), events);
                    }
                };
                let signed = |events: u64| i64::try_from(events).unwrap_or(i64::MAX);
                note("emitted", "", "", signed(balance.emitted.saturating_add(balance.elsewhere)));
                note("shipped", "", "", signed(stated.account(source).shipped));
                note("archived", "", "", signed(epoch.archived[source as usize]));
                note("unexplained", "", "", balance.unexplained);
                for &stage in Stage::ALL {
                    for &reason in Reason::ALL {
                        let events = balance.dropped[stage as usize][reason as usize];
                        note("dropped", stage.name(), reason.name(), signed(events));
                    }
                }
            }
        }
        look
    }

    /// Writes what moved of a node since the last look.
    fn write(&mut self, shared: &mut SegmentTables, node: u64) -> Result<(), ExportError> {
        let now = self.look(node);
        let Some(before) = self.looks.remove(&node) else { return Ok(()) };
        let until_ns = before.latest_ns;
        let hour = self.partitions.hour(until_ns);
        let mut accounts: Vec<Account> = now.totals.keys().copied().collect();
        accounts.extend(before.totals.keys().filter(|account| !now.totals.contains_key(*account)));
        for account in accounts {
            // An epoch that the books let go of has said its last before.
            let Some(&seq) = now.seqs.get(&account.0) else { continue };
            let (was, total) = (before.totals.get(&account), now.totals.get(&account).copied().unwrap_or(0));
            let events = total.saturating_sub(was.copied().unwrap_or(0));
            // Which frames they are is said of those that are here.
            let (first, seq) = match before.ranges.get(&account.0) {
                Some(&(first, last)) if account.2 == "archived" => (Some(first), last),
                _ => (None, seq),
            };
            let is_counted = account.2 == "unexplained" && self.has_damage;
            if events != 0 && !is_counted {
                let of = Of { node, account, total, first_seq: first, seq };
                self.row(shared, hour, (before.at_ns, until_ns), events, Some(of))?;
            }
        }
        self.looks.insert(node, Look { at_ns: until_ns, latest_ns: until_ns, has_frame: true, ..now });
        Ok(())
    }

    fn row(
        &mut self,
        shared: &mut SegmentTables,
        hour: u64,
        (from_ns, until_ns): (u64, u64),
        events: i64,
        of: Option<Of>,
    ) -> Result<(), ExportError> {
        let (mut node_text, mut node_id, mut epoch_text, mut source_text) = (NONE, NONE, NONE, NONE);
        let (mut name, mut stage, mut reason) = ("damaged", "", "");
        if let Some(Of { node, account: (epoch, source, account, of_stage, of_reason), .. }) = of {
            node_text = match self.books.name(node) {
                Some(name) => shared.texts.number(name),
                None => shared.catalog.node_text(&mut shared.texts, node),
            };
            node_id = shared.texts.number(&format!("{node:x}"));
            epoch_text = shared.texts.number(&format!("{epoch:x}"));
            source_text = shared.texts.number(Source::from_u8(source).map_or("", Source::name));
            (name, stage, reason) = (account, of_stage, of_reason);
        }
        let cells = [
            (at("node"), node_text),
            (at("source"), source_text),
            (at("account"), shared.texts.number(name)),
            (at("stage"), shared.texts.number(stage)),
            (at("reason"), shared.texts.number(reason)),
            (at("node_id"), node_id),
            (at("epoch"), epoch_text),
            (at("server"), shared.texts.number(&self.server)),
            (at("segment"), shared.segment),
        ];
        let batch = self.partitions.batch(&shared.place, hour)?;
        batch.row();
        batch.unsigned(at("time"), from_ns);
        batch.unsigned(at("until"), until_ns);
        cells.into_iter().for_each(|(column, text)| batch.text(column, text));
        batch.signed(at("events"), events);
        batch.signed(at("total"), of.as_ref().map_or(events, |of| of.total));
        if let Some(of) = of {
            batch.unsigned(at("seq"), of.seq);
            if let Some(first) = of.first_seq {
                batch.unsigned(at("first_seq"), first);
            }
        }
        if batch.is_full() {
            self.partitions.flush(hour, &shared.texts, &mut shared.encoder)?;
        }
        Ok(())
    }

    /// Writes what moved since the last looks and how many events could not be read, and ends the files. `indexed` are the times
    /// that the segment's index states.
    pub fn finish(
        mut self,
        shared: &mut SegmentTables,
        damaged: u64,
        indexed: Option<(u64, u64)>,
    ) -> Result<Vec<Written>, ExportError> {
        let mut nodes: Vec<u64> =
            self.looks.iter().filter(|(_, look)| look.is_changed).map(|(&node, _)| node).collect();
        nodes.sort_unstable();
        for node in nodes {
            self.write(shared, node)?;
        }
        if damaged > 0 {
            let events = i64::try_from(damaged).unwrap_or(i64::MAX);
            let (first_ns, last_ns) = indexed.unwrap_or((self.first_ns, self.last_ns));
            let hour = self.partitions.hour(last_ns);
            self.row(shared, hour, (first_ns.min(last_ns), last_ns), events, None)?;
        }
        self.partitions.finish(&shared.place, &shared.texts, &mut shared.encoder)
    }
}
