//! Findings of an earlier run that go on.
//!
//! What enters: groups of deaths that this run knows, and what an earlier run found. What leaves: the groups, each with the name,
//! the beginning and the count of the finding that it goes on with. What must hold: a crash loop that is longer than what is replayed
//! after a restart is the same finding as before, on every server.

use tapio_wire::service::Finding;

use super::deaths::Settled;
use super::pattern::PatternSet;
use super::worker::Worker;
use crate::correlate::clue::EvidenceId;

impl Worker {
    /// Lets what is to be published go on with the findings of an earlier run that have its deaths.
    pub(super) fn go_on_with_formers(&mut self, patterns: &PatternSet, settled: Settled) -> Settled {
        if !self.store.has_formers() {
            return settled;
        }
        let mut all = Settled { publish: Vec::new(), ..settled };
        for publication in settled.publish {
            let pattern = &patterns.patterns()[publication.pattern];
            let members = publication.members.iter().map(|death| death.clue.evidence);
            let former = self.store.former(pattern, members).filter(|(former, _)| *former.id != *publication.id);
            let adopted = former.and_then(|(former, last)| {
                let adopted = self.memory.deaths.adopt(&publication, &former, last)?;
                Some((former, adopted))
            });
            match adopted {
                Some((former, adopted)) => all.replace(&publication, &former, adopted),
                None => all.publish.push(publication),
            }
        }
        all
    }

    /// Takes in what other servers found before the log begins. What this one knows of its deaths goes on with it.
    pub(super) fn take_kept(&mut self, finding: Finding) {
        let ids = finding.evidence.iter().filter_map(|piece| EvidenceId::parse(&piece.id)).collect::<Vec<_>>();
        self.store.take_in(finding);
        let patterns = std::sync::Arc::clone(&self.patterns);
        for death in ids {
            if let Some(noted) = self.memory.deaths.noted(death).cloned() {
                self.conclude_again(&patterns, &noted);
            }
        }
    }
}
