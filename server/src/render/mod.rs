//! Findings and status as text for people and as JSON for programs: what `tapioctl` prints.
//!
//! What enters: messages of the query service, whose texts come from nodes and may be hostile. What leaves: text. What must
//! hold: no control character of a message reaches a terminal; JSON is one object a line.

mod deliveries;
mod event;
mod finding;
mod json;
mod layout;
mod silence;
mod status;
mod time;

pub use deliveries::{deliveries, deliveries_values};
pub use event::{Fields, event_fields, event_row, event_text};
pub use finding::{
    causes, certificate_rows, finding, is_state, list_header, list_row, loss, offset, percent, pod, span, withdrawal,
};
pub use json::{
    event_value, finding_json, finding_value, incomplete_value, remote_read, remote_value, silence_value, status_json,
    status_value,
};
pub use layout::{Style, clean, clean_lines, padded, table};
pub use silence::{held, silences};
pub use status::{Ledger, ledger_of, ledger_text as ledger, status, unwatched, where_of};
pub use time::{for_people, parse_since, parse_until, rfc3339};
