//! Sources: each runs on a thread of its own, drains its rings through an [`crate::intake::Intake`] and sleeps when there is
//! nothing to do.

pub mod ebpf;
pub mod shm;
pub mod systemd;
