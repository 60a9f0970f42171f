//! The CPU and the memory that the collector may use.

pub mod governed;
pub mod governor;
pub mod memory;
pub(crate) mod nap;
