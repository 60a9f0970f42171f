//! Correlation, step two: cool. Patterns over clues, findings for people.
//!
//! What enters: clues, from any number of shards, in any order between entities. What leaves: findings in a [`FindingStore`].
//! What must hold: the outcome does not depend on the order in which evidence arrives. One death has one explanation, the best.
//! Ids depend on the evidence alone, so a replay finds the same; everything is bounded.

mod absorb;
mod checks;
mod clue_history;
mod clue_store;
mod compose;
mod confidence;
mod deaths;
mod doubts;
mod embedded;
mod endings;
mod facts;
mod field;
mod finder;
mod finder_metrics;
mod formers;
mod from_log;
mod growing;
mod joins;
pub mod journal;
mod journal_metrics;
mod load;
mod matching;
mod missing;
mod moment;
mod over;
mod pattern;
mod plan;
mod regular_file;
mod rejoin;
mod restored;
mod schema;
mod series;
mod step_mask;
mod store;
mod template;
pub mod text;
mod touched;
mod unjoined;
mod words;
mod worker;

pub use confidence::Certainty;
pub use finder::{Finder, FinderConfig, StartError};
pub use finder_metrics::FinderMetrics;
pub use load::{OwnPattern, PatternError};
pub use pattern::PatternSet;
pub use schema::Severity;
pub use store::{Change, FindingStore, LookupError, Position};
