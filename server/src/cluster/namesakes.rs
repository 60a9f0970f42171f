//! Servers that have the same name.
//!
//! What enters: the ids of messages, in the order of the log. What leaves: names that two servers have at once. What must hold: a
//! server that was started again is one server: its earlier run says nothing any more.

use std::collections::HashMap;

/// Names remembered.
const NAMES_MAX: usize = 1000;
/// How long the messages of an earlier run may be on their way.
const LATE_NS: u64 = 5_000_000_000;
/// Silence after which a run is over: a server says something every two seconds.
const OVER_NS: u64 = 10_000_000_000;

/// The latest run of a server.
struct Run {
    /// When it began, by its own clock.
    number: u64,
    /// When its first message was written, by the log's clock.
    since_ns: u64,
    /// When its last one was.
    heard_ns: u64,
}

/// Notices servers of one name.
#[derive(Default)]
pub(super) struct Namesakes {
    runs: HashMap<String, Run>,
}

/// The id of a message, by which NATS recognises a repeated one.
pub(super) fn message_id(server: &str, run: u64, number: u64) -> String {
    format!("{server}-{run:x}-{number}")
}

impl Namesakes {
    /// Takes in a message of this id that was written at this time. Returns the name where another server has it too.
    pub fn note<'a>(&mut self, id: &'a str, at_ns: u64) -> Option<&'a str> {
        let mut parts = id.rsplitn(3, '-').skip(1);
        let number = u64::from_str_radix(parts.next()?, 16).ok()?;
        let server = parts.next()?;
        let new = Run { number, since_ns: at_ns, heard_ns: at_ns };
        match self.runs.get_mut(server) {
            Some(known) if known.number == number => known.heard_ns = at_ns,
            // Also where the clock was set back before it was started again.
            Some(known) if known.number < number || at_ns > known.heard_ns.saturating_add(OVER_NS) => *known = new,
            Some(known) => return (at_ns > known.since_ns.saturating_add(LATE_NS)).then_some(server),
            None => {
                if self.runs.len() >= NAMES_MAX {
                    self.runs.clear();
                }
                self.runs.insert(server.to_owned(), new);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_runs_at_the_same_time_are_two_servers() {
        const S: u64 = 1_000_000_000;
        let mut namesakes = Namesakes::default();
        let mut note = |run, at| namesakes.note(&message_id("tapio-server-1", run, 7), at).map(str::to_owned);
        assert_eq!((note(10, S), note(10, 9 * S)), (None, None));
        // Started again; what the first one had sent comes late.
        assert_eq!((note(20, 10 * S), note(10, 11 * S), note(20, 30 * S)), (None, None, None));
        assert_eq!(note(10, 31 * S).as_deref(), Some("tapio-server-1"));
        // Only one of them is left, or the clock was set back between two runs.
        assert_eq!((note(10, 45 * S), note(10, 60 * S)), (None, None));
        for id in ["", "x", "x-y-1", "-"] {
            assert_eq!(Namesakes::default().note(id, S), None, "{id}");
        }
    }
}
