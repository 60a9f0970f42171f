//! Findings of an earlier run that go on.
//!
//! What enters: groups of deaths that this run knows, and what an earlier run found. What leaves: the groups, each with the name,
//! the beginning and the count of the finding that it goes on with. What must hold: a crash loop that is longer than what is replayed
//! after a restart is the same finding as before, on every server.

use std::sync::Arc;

use tapio_wire::service::Finding;

use super::deaths::{Settled, Withdrawn};
use super::pattern::PatternSet;
use super::worker::Worker;
use crate::correlate::clue::EvidenceId;

impl Worker {
    /// Lets what is to be published go on with the findings of an earlier run that have its deaths.
    pub(super) fn go_on_with_formers(&mut self, patterns: &PatternSet, settled: Settled) -> Settled {
        // In a replay it is not known yet which of their deaths are still to come.
        if settled.publish.is_empty() || self.store.is_replaying() || !self.store.has_formers() {
            return settled;
        }
        let mut all = Settled { publish: Vec::new(), ..settled };
        for publication in settled.publish {
            let pattern = &patterns.patterns()[publication.pattern];
            let members = publication.members.iter().map(|death| death.clue.evidence);
            let former = self
                .store
                .former(pattern, members)
                .filter(|(former, _)| *former.id != *publication.id || former.count > publication.count);
            let Some((former, last)) = former else {
                all.publish.push(publication);
                continue;
            };
            let sent_again_ns = self.sent_again_ns();
            match self.memory.deaths.adopt(&publication, &former, (last, sent_again_ns)) {
                Some(adopted) => all.replace(&publication, &former, adopted),
                None => {
                    // This run knows of more.
                    if publication.count >= former.count {
                        let successor = Some(publication.id.clone());
                        all.withdrawn.push(Withdrawn { id: former.id.to_string(), successor });
                    }
                    all.publish.push(publication);
                }
            }
        }
        all
    }

    /// Takes in what other servers found before the log begins. What this one knows of its deaths goes on with it.
    pub(super) fn take_kept(&mut self, finding: Finding) {
        let pattern = finding.pattern.clone();
        let deaths: Vec<_> = finding.evidence.iter().filter_map(|piece| EvidenceId::parse(&piece.id)).collect();
        if self.store.take_in(finding) && !self.store.is_replaying() {
            self.look_again(deaths.into_iter().map(|death| (pattern.clone(), death)));
        }
    }

    /// The archive was replayed. If the log came back meanwhile, reading it is another replay, which ends later.
    pub(super) fn replayed(&mut self) {
        let has_log = self.log.as_mut().map(|log| log.has_replayed = true).is_some();
        if !has_log || self.store.is_alone() {
            self.end_replay();
        }
    }

    /// A replay is over: what an earlier run found goes on. Of what was held back in its favour, the rest stands by itself.
    pub(super) fn end_replay(&mut self) {
        self.rename();
        self.store.set_replaying(false);
        self.look_again(self.store.deaths_of_formers());
        self.store.publish_parts();
    }

    /// Publishes the findings of these deaths again, each given with the pattern that explained it in an earlier run. Leaves out
    /// deaths that only a weaker pattern explains or counts now: this run may have read less evidence than the earlier one.
    fn look_again(&mut self, deaths: impl IntoIterator<Item = (String, EvidenceId)>) {
        let patterns = Arc::clone(&self.patterns);
        for (pattern, death) in deaths {
            // Patterns are sorted, the strongest first.
            let is_as_strong = |place: usize| patterns.patterns()[place..].iter().any(|other| other.id == pattern);
            if let Some(noted) = self.memory.deaths.with_or_counting(death, is_as_strong) {
                self.conclude_again(&patterns, &noted);
            }
        }
    }
}
