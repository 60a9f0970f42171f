//! What became of each probe, for the log and `/readyz`.
//!
//! All that run on one line, since lines of one place are limited; what does not run on lines of their own, with the reason.

use tapio_probes::{ProgramState, Verdict};

use crate::base::status::Status;

/// Logs the verdicts; the status names the probes that were wanted and do not run.
pub fn report(verdicts: &[Verdict]) -> Status {
    let attached = names(verdicts, |state| *state == ProgramState::Attached);
    let disabled = names(verdicts, |state| *state == ProgramState::Disabled);
    tracing::info!(attached, disabled, "probes");
    let mut off = Vec::new();
    for verdict in verdicts {
        let (ProgramState::NotOnThisKernel(reason) | ProgramState::Refused(reason)) = &verdict.state else { continue };
        tracing::warn!(program = verdict.program, hook = verdict.hook, lane = verdict.lane, reason, "a probe is off");
        off.push(format!("{} ({reason})", verdict.program));
    }
    let status = Status::default();
    if !off.is_empty() {
        status.waits_for(format!("running without {}", off.join(", ")));
    }
    status
}

fn names(verdicts: &[Verdict], is_meant: impl Fn(&ProgramState) -> bool) -> String {
    let meant = verdicts.iter().filter(|verdict| is_meant(&verdict.state));
    meant.map(|verdict| verdict.program).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(program: &'static str, state: ProgramState) -> Verdict {
        Verdict { program, hook: "hook", lane: "bulk", produces: &[], state }
    }

    #[test]
    fn only_wanted_probes_that_do_not_run_are_reported() {
        let mut verdicts = vec![verdict("one", ProgramState::Attached), verdict("two", ProgramState::Disabled)];
        assert_eq!(report(&verdicts).get(), None);
        verdicts.push(verdict("three", ProgramState::Refused("not permitted".into())));
        verdicts.push(verdict("four", ProgramState::NotOnThisKernel("no such tracepoint".into())));
        assert_eq!(
            report(&verdicts).get().as_deref(),
            Some("running without three (not permitted), four (no such tracepoint)")
        );
    }
}
