//! What the server and the collector need as programs, beside what travels between them: configuration files, TLS, tokens,
//! connections, units, back-off, rate limits, settings of the process.
//!
//! Both are long-running programs with the same key names, units, certificates and messages; one implementation keeps them equal.
//! What must hold: nothing here uses what travels (the modules beside this folder), and those use nothing of this folder. So
//! either half can be read without the other.

pub mod backoff;
pub mod clock;
pub mod config_file;
pub mod descriptors;
pub mod dial;
pub mod glob;
pub mod heap;
pub mod http;
pub mod output;
pub mod process;
pub mod reference;
pub mod tls;
pub mod token;
pub mod token_bucket;
pub mod units;
pub mod yaml;

/// The component of the Kubernetes Events that a server writes; collectors leave them out by it.
pub const EVENTS_COMPONENT: &str = "tapio";
