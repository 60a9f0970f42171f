//! What a worker knows of its sink in one term: marks, what waits, and what was published since it looked last.

use std::collections::HashMap;
use std::sync::Arc;

use tapio_wire::service::Finding;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::time::Instant;

use super::Source;
use super::marks::{Known, MarkState};
use super::queue::Queue;

pub(super) type Changes = broadcast::Receiver<Arc<Finding>>;

/// What is known in one term.
pub(super) struct Standing {
    pub known: HashMap<String, Known>,
    /// Marks of before this moment are lost, nanoseconds since 1970; 0: none.
    pub lost_before_ns: u64,
    pub queue: Queue,
    /// The last publication that was looked at.
    pub seen_ns: u64,
    /// Publications that were received since.
    pub heard: Vec<Arc<Finding>>,
    /// Something was missed: the store is asked, which costs it a walk over all that it has.
    pub is_behind: bool,
    pub purge_at: Instant,
    pub repeat_at: Instant,
    /// The silences that the queue is made by; [`None`]: it is to be made again.
    pub silences: Option<(u64, usize)>,
}

impl Standing {
    pub fn hear(&mut self, received: Result<Arc<Finding>, RecvError>) {
        match received {
            Ok(finding) => self.heard.push(finding),
            Err(RecvError::Lagged(_)) => self.is_behind = true,
            Err(RecvError::Closed) => {}
        }
    }

    /// What was delivered and taken over by another finding meanwhile, as far as the store still says so.
    pub fn gone(&self, source: &Source) -> Vec<Finding> {
        let announced =
            self.known.iter().filter(|(_, known)| !known.mark.withdrawn || known.mark.state == MarkState::Intent);
        let gone = announced.filter_map(|(id, _)| {
            let successor = source.store.current(id).filter(|finding| finding.id != *id)?;
            let superseded_by = successor.id.clone();
            Some(Finding { id: id.clone(), withdrawn: true, superseded_by, ..Finding::default() })
        });
        gone.collect()
    }

    /// Whether a finding without a mark may have been delivered before the marks were lost. It is news that was published since
    /// `news_since`, seconds since 1970.
    pub fn may_be_delivered(&self, finding: &Finding, news_since: u64) -> bool {
        // Of what an earlier run withdrew only the id is known.
        let is_known = finding.ended_ns > 0 && finding.published_ns / 1_000_000_000 >= news_since;
        is_known && finding.ended_ns < self.lost_before_ns
    }

    /// What was published since the last look, in that order; everything where other silences hold than then.
    pub fn news(&mut self, changes: &mut Changes, source: &Source) -> Vec<Arc<Finding>> {
        let silences = source.silences.state();
        if self.silences != Some(silences) {
            (self.silences, self.is_behind, self.seen_ns) = (Some(silences), true, 0);
        }
        loop {
            match changes.try_recv() {
                Ok(finding) => self.heard.push(finding),
                Err(TryRecvError::Lagged(_)) => self.is_behind = true,
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
        }
        let mut news = std::mem::take(&mut self.heard);
        if std::mem::take(&mut self.is_behind) {
            news = source.store.changed_after(self.seen_ns);
        }
        news.retain(|finding| finding.published_ns > self.seen_ns);
        self.seen_ns = news.last().map_or(self.seen_ns, |finding| finding.published_ns);
        news
    }
}
