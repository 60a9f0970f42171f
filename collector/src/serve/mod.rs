//! What the collector tells about itself over HTTP.

pub mod health;
pub mod process;
