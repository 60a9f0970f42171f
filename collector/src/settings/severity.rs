//! How much an event matters by itself.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tapio_probes::record::RecordKind;

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
pub(crate) fn severity(kind: RecordKind) -> Severity {
    match kind {
        RecordKind::Oom => Severity::Critical,
        RecordKind::Exit | RecordKind::Signal | RecordKind::SignalDelivered | RecordKind::LeftOut => Severity::High,
        RecordKind::Tcp | RecordKind::BlockIo | RecordKind::SyscallError | RecordKind::Dns | RecordKind::PacketDrop => {
            Severity::Medium
        }
        RecordKind::Exec
        | RecordKind::ExecCommand
        | RecordKind::Fork
        | RecordKind::FileOpen
        | RecordKind::CgroupMkdir
        | RecordKind::CgroupRmdir
        | RecordKind::Reclaim
        | RecordKind::RunQueue
        | RecordKind::Histogram => Severity::Low,
    }
}
