//! How much an event matters by itself.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tapio_probes::record::Kind;

/// How much an event matters by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    #[default]
    Low,
    Medium,
    High,
    Critical,
}

/// How much a bulk event of a kind matters by itself: the one table.
pub(crate) fn severity(kind: Kind) -> Severity {
    match kind {
        Kind::Oom => Severity::Critical,
        Kind::Exit | Kind::Signal | Kind::SignalDelivered | Kind::LeftOut => Severity::High,
        Kind::Tcp | Kind::BlockIo | Kind::SyscallError | Kind::Dns | Kind::PacketDrop => Severity::Medium,
        Kind::Exec
        | Kind::ExecCommand
        | Kind::Fork
        | Kind::FileOpen
        | Kind::CgroupMkdir
        | Kind::CgroupRmdir
        | Kind::Reclaim
        | Kind::RunQueue
        | Kind::Histogram => Severity::Low,
    }
}
