//! Sources: each runs on a thread of its own, hands what it gathers to an [`crate::intake::Intake`] and sleeps when there is
//! nothing to do.

pub mod conntrack;
pub mod ebpf;
pub mod ended_epochs;
pub mod evidence;
pub mod kube;
pub mod probe_report;
pub mod shm;
pub mod stop;
pub mod systemd;
