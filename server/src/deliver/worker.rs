//! Delivers to one sink while this server leads.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tapio_wire::program::backoff::doubled;
use tapio_wire::service::Finding;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::figures::{Figures, NAMED_MAX, queued, reason};
use super::marks::{Known, Mark, MarkState, Marks, MarksError, content, noted, now_seconds};
use super::queue::{Queue, UNANSWERED_MAX, Waiting};
use super::standing::{Changes, Standing};
use super::{Delivery, Sink, SinkError, Source, WhenSilenced};
use crate::cluster::Term;

/// Shortest pause between two attempts of a sink that is away, or whose marks cannot be written.
const BACK_OFF_MIN: Duration = Duration::from_millis(250);
const BACK_OFF_MAX: Duration = Duration::from_secs(60);
/// Longest pause that a receiver may ask for.
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// How often it is looked whether this server leads still, while nothing else happens.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How often a delivery that its receiver refuses is sent before it is given up.
const REFUSALS_MAX: u32 = 5;
/// A finding that was published longer ago, is over and has no mark is not news: it is not delivered.
const NEWS_SECONDS: u64 = 7 * 24 * 3600;
/// Time for which marks of removed findings are kept: longer than news, since a finding without a mark must not be news.
const GONE_SECONDS: u64 = 2 * NEWS_SECONDS;
/// Marks of findings that are gone, and how often it is looked for old ones.
const GONE_MAX: usize = 50_000;
const PURGE_INTERVAL: Duration = Duration::from_secs(3600);
/// Pause of a sink whose receiver forgets nothing.
const REPEAT_NEVER: Duration = Duration::from_secs(24 * 3600);

pub(super) struct Worker<M> {
    source: Source,
    sink: Box<dyn Sink>,
    marks: M,
    /// When the place of the marks was made that this server saw first.
    marks_began_ns: Option<u64>,
    figures: Arc<Figures>,
}

/// What came of one attempt.
enum Outcome {
    Settled,
    /// The delivery must be repeated, or another leader has it.
    Open,
    Failed(SinkError),
}

fn back_off(failures: u32) -> Duration {
    doubled(BACK_OFF_MIN, failures.saturating_sub(1), BACK_OFF_MAX)
}

impl<M: Marks> Worker<M> {
    pub(super) fn new(source: Source, sink: Box<dyn Sink>, marks: M, figures: Arc<Figures>) -> Self {
        Self { source, sink, marks, marks_began_ns: None, figures }
    }

    /// Delivers until `ended`, whenever this server leads.
    pub(super) async fn run(mut self, mut ended: watch::Receiver<bool>) {
        tokio::select! {
            () = self.serve() => {}
            _ = ended.wait_for(|is| *is) => {}
        }
    }

    async fn serve(&mut self) {
        let mut failures = 0;
        loop {
            if self.marks_began_ns.is_none() {
                // Also who does not lead is to know when they are lost.
                self.marks_began_ns = self.marks.began_ns().await.ok();
            }
            let term = self.source.leadership.led().await;
            let began = Instant::now();
            let outcome = self.lead(&term).await;
            if began.elapsed() > BACK_OFF_MAX {
                failures = 0;
            }
            match outcome {
                // The term is over.
                Ok(()) => {
                    failures = 0;
                    self.figures.ended();
                }
                Err(error) => {
                    failures += 1;
                    if !term.is_valid_now() {
                        self.figures.ended();
                    }
                    self.figures.set_trouble(Some(error.to_string()));
                    sleep(back_off(failures)).await;
                }
            }
        }
    }

    /// Delivers what has no confirmed mark until the term is over, or the marks cannot be had.
    async fn lead(&mut self, term: &Term) -> Result<(), MarksError> {
        let (mut changes, _) = self.source.store.watch();
        if !self.can_deliver(term).await {
            return Ok(());
        }
        let began_ns = self.marks.began_ns().await?;
        let is_as_ever = *self.marks_began_ns.get_or_insert(began_ns) == began_ns;
        let mut standing = Standing {
            known: self.marks.load().await?,
            lost_before_ns: if is_as_ever { 0 } else { began_ns },
            queue: Queue::new(self.source.store.findings_max()),
            seen_ns: 0,
            heard: Vec::new(),
            // What was there before this term.
            is_behind: true,
            purge_at: Instant::now(),
            // Another leader's receiver may have forgotten.
            repeat_at: Instant::now(),
            silences: None,
        };
        self.figures.knows(&standing.known);
        self.find_gone(&mut standing);
        let (mut failures, mut next) = (0, Instant::now());
        while self.can_deliver(term).await {
            self.look(&mut changes, &mut standing);
            if Instant::now() >= standing.purge_at {
                self.purge(&mut standing).await?;
            }
            let now = Instant::now();
            let taken = if now >= next { standing.queue.take(now) } else { None };
            let Some(waiting) = taken else {
                if now >= standing.repeat_at.max(next) {
                    self.repeat(term, &mut standing).await;
                    continue;
                }
                let due = standing.queue.next_due().map(|due| due.max(next));
                self.rest(&mut changes, &mut standing, due).await;
                continue;
            };
            match self.deliver(term, &waiting, &mut changes, &mut standing).await? {
                Outcome::Settled => {
                    failures = 0;
                    self.show(&standing, None);
                }
                Outcome::Open => standing.queue.put_back(waiting),
                Outcome::Failed(error @ SinkError::Away(_)) => {
                    failures += 1;
                    next = Instant::now() + back_off(failures);
                    self.failed(&waiting, &standing, &error);
                    let unanswered = waiting.unanswered + 1;
                    // The receiver may stumble over just this one: others are tried before it comes again.
                    let due = if unanswered >= UNANSWERED_MAX { next + BACK_OFF_MAX } else { waiting.due };
                    standing.queue.put_back(Waiting { unanswered, due, ..waiting });
                }
                Outcome::Failed(error @ SinkError::Busy { .. }) => {
                    failures += 1;
                    next = Instant::now() + error.pause().min(PAUSE_MAX).max(back_off(failures));
                    self.failed(&waiting, &standing, &error);
                    standing.queue.put_back(waiting);
                }
                Outcome::Failed(error @ (SinkError::Refused(_) | SinkError::Rejected(_))) => {
                    // It takes others meanwhile.
                    self.failed(&waiting, &standing, &error);
                    let refusals = waiting.refusals + 1;
                    if refusals >= REFUSALS_MAX || matches!(error, SinkError::Rejected(_)) {
                        self.give_up(term, &waiting, &error, &mut standing.known).await?;
                    } else {
                        standing.queue.put_back(Waiting {
                            refusals,
                            due: Instant::now() + back_off(refusals),
                            ..waiting
                        });
                    }
                }
            }
        }
        Ok(())
    }

    fn failed(&self, waiting: &Waiting, standing: &Standing, error: &SinkError) {
        let id = &waiting.finding.id;
        let revision = standing.known.get(id).map_or(0, |known| known.mark.revision);
        self.figures.failed(id, revision, &error.to_string());
    }

    /// Shows what waits. The one in hand waits too.
    fn show(&self, standing: &Standing, in_hand: Option<&Finding>) {
        let in_hand = in_hand.map(|finding| queued(&finding.id, finding.published_ns));
        let count = standing.queue.len() + usize::from(in_hand.is_some());
        let first = in_hand.into_iter().chain(standing.queue.first(NAMED_MAX)).take(NAMED_MAX);
        self.figures.set_queued(count, first.collect());
    }

    /// Waits until this server knows what all servers say. False when the term is over before.
    async fn can_deliver(&self, term: &Term) -> bool {
        let Some(link) = &self.source.link else { return term.is_valid_now() };
        // What was found alone may be withdrawn when the archive was gone through.
        let waits_for_healing = link.is_healing();
        if waits_for_healing {
            self.figures
                .set_trouble(Some("the servers' log lacks what the archive has: deliveries wait for it".into()));
        }
        while term.is_valid_now() && !link.is_confirmed() {
            // Whether the term is valid still is to be looked at.
            let _ = timeout(LOOK_INTERVAL, link.confirmed()).await;
        }
        if waits_for_healing {
            self.figures.set_trouble(None);
        }
        term.is_valid_now()
    }

    /// Waits until something is published, or due.
    async fn rest(&self, changes: &mut Changes, standing: &mut Standing, due: Option<Instant>) {
        let look_at = Instant::now() + LOOK_INTERVAL;
        tokio::select! {
            received = changes.recv() => standing.hear(received),
            () = sleep_until(due.map_or(look_at, |due| due.min(look_at))) => {}
        }
    }

    /// Takes up what was published since it was looked last.
    fn look(&self, changes: &mut Changes, standing: &mut Standing) {
        let news_since = now_seconds().saturating_sub(NEWS_SECONDS);
        for finding in standing.news(changes, &self.source) {
            let finding = self.marked(finding);
            let known = standing.known.get(&finding.id);
            let content = content(&finding);
            let is_held =
                finding.silence.is_some() && (known.is_none() || self.sink.when_silenced() == WhenSilenced::Hold);
            let is_news = match known {
                _ if is_held => false,
                Some(known) => !known.mark.settles(&content, finding.withdrawn),
                None if !self.sink.wants(&finding) => false,
                None if finding.withdrawn => {
                    self.sink.takes_unknown_withdrawals() && standing.may_be_delivered(&finding, news_since)
                }
                // What was silenced when it was found, and is over, is no news when the silence ends.
                None => finding.ongoing || self.is_recent(&finding, news_since),
            };
            if is_news {
                self.put(standing, finding, content);
            } else {
                standing.queue.remove(&finding.id);
            }
        }
        self.show(standing, None);
    }

    fn is_recent(&self, finding: &Finding, news_since: u64) -> bool {
        let is_covered = || self.sink.when_silenced() != WhenSilenced::Record && self.source.silences.covered(finding);
        finding.published_ns / 1_000_000_000 >= news_since && !is_covered()
    }

    /// The finding with what holds for it, where its sink minds.
    fn marked(&self, finding: Arc<Finding>) -> Arc<Finding> {
        match self.sink.when_silenced() {
            WhenSilenced::Record => finding,
            WhenSilenced::Hold | WhenSilenced::End => self.source.silences.marked(finding),
        }
    }

    fn put(&self, standing: &mut Standing, finding: Arc<Finding>, content: String) {
        if let Some(lost) = standing.queue.put(finding, content) {
            self.figures.lost.inc();
            tracing::error!(finding = lost.finding.id, "delivery dropped: queue full");
        }
    }

    fn find_gone(&self, standing: &mut Standing) {
        for finding in standing.gone(&self.source) {
            let content = content(&finding);
            self.put(standing, Arc::new(finding), content);
        }
    }

    /// Makes one attempt.
    async fn deliver(
        &mut self,
        term: &Term,
        waiting: &Waiting,
        changes: &mut Changes,
        standing: &mut Standing,
    ) -> Result<Outcome, MarksError> {
        let finding = &waiting.finding;
        if self.marked(Arc::clone(finding)).silence != finding.silence {
            // It was silenced since it was put here, or is not any more.
            standing.silences = None;
            return Ok(Outcome::Settled);
        }
        let before = standing.known.get(&finding.id).map(|known| known.mark.clone());
        let is_settled =
            |mark: Option<&Mark>| mark.is_some_and(|mark| mark.settles(&waiting.content, finding.withdrawn));
        if is_settled(before.as_ref()) {
            return Ok(Outcome::Settled);
        }
        let is_repeat =
            before.as_ref().is_some_and(|mark| mark.state == MarkState::Intent && mark.content == waiting.content);
        let revision = match &before {
            Some(mark) if is_repeat => mark.revision,
            // The server's own count goes on also where marks were lost.
            Some(mark) => mark.revision.saturating_add(1).max(finding.revision),
            None => finding.revision.max(1),
        };
        let note = self.sink.note(finding);
        let notes = before.as_ref().map_or(&[][..], |mark| &mark.notes);
        let is_known = note.as_ref().is_some_and(|note| notes.contains(note))
            && before.as_ref().is_some_and(|mark| mark.state == MarkState::Confirmed);
        let former = notes.iter().filter(|known| Some(*known) != note.as_ref()).cloned().collect();
        let intent = Mark {
            notes: noted(notes, note.as_ref()),
            revision,
            content: waiting.content.clone(),
            term: term.number(),
            state: MarkState::Intent,
            withdrawn: finding.withdrawn,
            at: now_seconds(),
            reason: String::new(),
        };
        let is_written = is_repeat && before.is_some_and(|mark| mark.term == intent.term);
        if !is_written && !self.write(&finding.id, &intent, &mut standing.known).await? {
            // Another leader was here: what it did is looked at first.
            let mark = standing.known.get(&finding.id).map(|known| &known.mark);
            return Ok(if is_settled(mark) { Outcome::Settled } else { Outcome::Open });
        }
        let left = term.left();
        if left.is_zero() {
            return Ok(Outcome::Open);
        }
        let delivery = Delivery {
            id: format!("{}.{revision}.{}", finding.id, &waiting.content[..8]),
            revision,
            term: intent.term,
            finding: Arc::clone(finding),
            is_known,
            former,
        };
        let allowed = self.sink.timeout().min(left);
        if let Err(error) = self.attempt(&delivery, allowed, changes, standing).await {
            return Ok(Outcome::Failed(error));
        }
        self.figures.delivered(&finding.id, is_repeat);
        let notes = note.filter(|_| !finding.withdrawn).into_iter().collect();
        let confirmed = Mark { state: MarkState::Confirmed, notes, ..intent };
        self.close(term, &finding.id, &confirmed, &mut standing.known).await?;
        Ok(Outcome::Settled)
    }

    /// Lets the sink deliver. What is published meanwhile waits here, so that none of it goes unnoticed.
    async fn attempt(
        &self,
        delivery: &Delivery,
        allowed: Duration,
        changes: &mut Changes,
        standing: &mut Standing,
    ) -> Result<(), SinkError> {
        let mut attempt = Box::pin(timeout(allowed, self.sink.deliver(delivery)));
        loop {
            tokio::select! {
                answer = &mut attempt => {
                    return answer.unwrap_or_else(|_| Err(SinkError::Away(format!("no answer within {allowed:?}"))));
                }
                received = changes.recv() => {
                    standing.hear(received);
                    self.look(changes, standing);
                    self.show(standing, Some(&delivery.finding));
                }
            }
        }
    }

    /// Sends again what the receiver was given and may have forgotten, until one attempt fails. No mark is moved by it.
    async fn repeat(&self, term: &Term, standing: &mut Standing) {
        let pause = self.sink.repeats().unwrap_or(REPEAT_NEVER);
        standing.repeat_at = Instant::now() + pause;
        if self.sink.repeats().is_none() {
            return;
        }
        let (findings, _) = self.source.store.everything();
        let marked = findings.into_iter().map(|finding| self.marked(finding));
        for finding in marked.filter(|finding| self.sink.stands(finding)) {
            let Some(mark) = standing.known.get(&finding.id).map(|known| &known.mark) else { continue };
            let content = content(&finding);
            if mark.state != MarkState::Confirmed || mark.content != content {
                continue;
            }
            let id = format!("{}.{}.{}", finding.id, mark.revision, &content[..8]);
            let (revision, term_number, former) = (mark.revision, term.number(), Vec::new());
            let delivery = Delivery { id, revision, term: term_number, finding, is_known: true, former };
            let allowed = self.sink.timeout().min(term.left());
            if allowed.is_zero() || !matches!(timeout(allowed, self.sink.deliver(&delivery)).await, Ok(Ok(()))) {
                return;
            }
        }
    }

    /// Abandons a delivery that the receiver refuses: it counts as done, and is logged.
    async fn give_up(
        &mut self,
        term: &Term,
        waiting: &Waiting,
        error: &SinkError,
        known: &mut HashMap<String, Known>,
    ) -> Result<(), MarksError> {
        let id = &waiting.finding.id;
        tracing::error!(finding = id, sink = self.sink.name(), %error, "delivery abandoned: its receiver refuses it");
        self.figures.refused.inc();
        let Some(Known { mark, .. }) = known.get(id) else { return Ok(()) };
        let reason = reason(&error.to_string());
        let mark = Mark { state: MarkState::Refused, at: now_seconds(), reason, ..mark.clone() };
        self.figures.gave_up(id, &mark);
        self.close(term, id, &mark, known).await
    }

    /// Writes what came of a delivery, again and again while the term lasts: without, it would be made once more.
    async fn close(
        &mut self,
        term: &Term,
        id: &str,
        mark: &Mark,
        known: &mut HashMap<String, Known>,
    ) -> Result<(), MarksError> {
        let (mut failures, mut is_anew) = (0, false);
        loop {
            match self.write(id, mark, known).await {
                // It was lost, and is rewritten, once: a key that somebody deleted by hand takes none.
                Ok(false) if !is_anew && known.get(id).is_some_and(|known| known.place == 0) => is_anew = true,
                // Also where another leader was here meanwhile: it goes on with it.
                Ok(_) => return Ok(()),
                Err(error) if !term.is_valid_now() => return Err(error),
                Err(error) => {
                    failures += 1;
                    self.figures.set_trouble(Some(error.to_string()));
                    sleep(back_off(failures).min(LOOK_INTERVAL)).await;
                }
            }
        }
    }

    /// Writes a mark in the place of the one that is known. False where there is another, which is known then.
    async fn write(&mut self, id: &str, mark: &Mark, known: &mut HashMap<String, Known>) -> Result<bool, MarksError> {
        let place = known.get(id).map_or(0, |known| known.place);
        if let Some(place) = self.marks.write(id, mark, place).await? {
            known.insert(id.to_owned(), Known { mark: mark.clone(), place });
            return Ok(true);
        }
        let found = self.marks.read(id).await?;
        // Of an attempt whose answer did not come.
        let is_own = found.as_ref().is_some_and(|found| found.mark == *mark);
        match found {
            Some(found) => drop(known.insert(id.to_owned(), found)),
            // It is lost; what it said is known here still.
            None => known.get_mut(id).into_iter().for_each(|known| known.place = 0),
        }
        Ok(is_own)
    }

    /// Forgets marks of findings that are gone, the oldest.
    async fn purge(&mut self, standing: &mut Standing) -> Result<(), MarksError> {
        standing.purge_at = Instant::now() + PURGE_INTERVAL;
        let is_gone = |id: &str| self.source.store.current(id).is_none();
        let mut gone: Vec<(u64, String)> = standing
            .known
            .iter()
            .filter(|(id, _)| is_gone(id))
            .map(|(id, known)| (known.mark.at, id.clone()))
            .collect();
        gone.sort_unstable();
        let surplus = gone.len().saturating_sub(GONE_MAX);
        let old = now_seconds().saturating_sub(GONE_SECONDS);
        let forgotten: Vec<String> = gone
            .into_iter()
            .enumerate()
            .filter(|(n, (at, _))| *n < surplus || *at < old)
            .map(|(_, (_, id))| id)
            .collect();
        if forgotten.is_empty() {
            return Ok(());
        }
        self.marks.purge(&forgotten).await?;
        forgotten.iter().for_each(|id| drop(standing.known.remove(id)));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_get_rarer_and_never_stop() {
        let waits: Vec<Duration> = (1..12).map(back_off).collect();
        assert_eq!(waits[0], BACK_OFF_MIN);
        assert!(waits.windows(2).all(|pair| pair[0] <= pair[1]) && waits[10] == BACK_OFF_MAX, "{waits:?}");
        assert_eq!(back_off(u32::MAX), BACK_OFF_MAX);
    }
}
