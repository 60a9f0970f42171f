//! What the collector reports about itself over HTTP.

pub mod health;
pub mod process;
