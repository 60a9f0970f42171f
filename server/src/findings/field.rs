//! What patterns can ask of a signal, by name.
//!
//! One table: the name, how people read it, and which kinds of signal have it. A pattern that asks a kind for something it
//! does not have is refused when it is loaded.

use tapio_wire::event::EntityKind;

use super::text;
use crate::correlate::signal::{Detail, Signal, SignalKind, SignalKinds};

/// How a field is compared and shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldType {
    Number,
    Bytes,
    Nanoseconds,
    /// A process signal's number, shown by its name.
    Signal,
    Flag,
    Text,
}

/// A field's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    Number(u64),
    Flag(bool),
    Text(&'a str),
}

/// Kinds that name a process.
const PROCESS: &[SignalKind] = &[SignalKind::Exec, SignalKind::Exit, SignalKind::Oom, SignalKind::Kill];
const EXIT: &[SignalKind] = &[SignalKind::Exit];
const OOM: &[SignalKind] = &[SignalKind::Oom];
const KILL: &[SignalKind] = &[SignalKind::Kill];
const BURST: &[SignalKind] = &[
    SignalKind::ReclaimBurst,
    SignalKind::DirectReclaimBurst,
    SignalKind::RefusedBurst,
    SignalKind::RetransmitBurst,
    SignalKind::SyscallErrorBurst,
    SignalKind::SlowIoBurst,
    SignalKind::PacketDropBurst,
    SignalKind::DnsFailureBurst,
    SignalKind::RunQueueBurst,
];

macro_rules! fields {
    ($($(#[$meta:meta])* $name:ident => $text:literal, $type:ident, $kinds:expr;)*) => {
        /// Fields of signals.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Field { $($(#[$meta])* $name,)* }
        impl Field {
            const ALL: &'static [Self] = &[$(Self::$name,)*];
            /// The name that patterns use.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
            /// How it is compared and shown.
            pub fn field_type(self) -> FieldType {
                match self { $(Self::$name => FieldType::$type,)* }
            }
            fn kinds(self) -> &'static [SignalKind] {
                match self { $(Self::$name => $kinds,)* }
            }
        }
    };
}

fields! {
    Entity => "entity", Number, SignalKind::ALL;
    EntityKind => "entity_kind", Text, SignalKind::ALL;
    EntityName => "entity_name", Text, SignalKind::ALL;
    Cgroup => "cgroup", Text, SignalKind::ALL;
    Pid => "pid", Number, SignalKind::ALL;
    Comm => "comm", Text, PROCESS;
    /// The container's init; every process where there is no container.
    Lead => "lead", Flag, PROCESS;
    /// The container's init; in a unit a process that the service manager started.
    Main => "main", Flag, EXIT;
    ExitCode => "exit_code", Number, EXIT;
    Signal => "signal", Signal, &[SignalKind::Exit, SignalKind::Kill];
    /// The signal that ended it, or that its exit code stands for.
    DiedBy => "died_by", Signal, EXIT;
    Failed => "failed", Flag, EXIT;
    Lifetime => "lifetime", Nanoseconds, EXIT;
    LimitHit => "limit_hit", Flag, OOM;
    LimitBytes => "limit_bytes", Bytes, OOM;
    UsageBytes => "usage_bytes", Bytes, OOM;
    RssBytes => "rss_bytes", Bytes, OOM;
    LimitCgroup => "limit_cgroup", Text, OOM;
    AllocatorComm => "allocator_comm", Text, OOM;
    AllocatorPid => "allocator_pid", Number, OOM;
    /// kernel, self, same (entity or pod), runtime or outside.
    Sender => "sender", Text, KILL;
    SenderPid => "sender_pid", Number, KILL;
    SenderComm => "sender_comm", Text, KILL;
    SenderEntity => "sender_entity", Number, KILL;
    SenderKind => "sender_kind", Text, KILL;
    Ignored => "ignored", Flag, KILL;
    Count => "count", Number, BURST;
    Stall => "stall", Nanoseconds, BURST;
    Span => "span", Nanoseconds, BURST;
}

impl Field {
    /// The field of this name, if signals of `kind` have it.
    pub fn of_kind(name: &str, kind: SignalKind) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|field| field.name() == name && field.kinds().iter().copied().collect::<SignalKinds>().contains(kind))
    }

    /// The names of what signals of `kind` have.
    pub fn names_of(kind: SignalKind) -> String {
        let names: Vec<_> =
            Self::ALL.iter().filter(|field| field.kinds().contains(&kind)).map(|field| field.name()).collect();
        names.join(", ")
    }

    /// Its value, if the signal has one.
    pub fn get(self, signal: &Signal) -> Option<Value<'_>> {
        let entity = &signal.entity;
        Some(match (self, &signal.detail) {
            (Self::Entity, _) => Value::Number(signal.entity.id),
            (Self::EntityKind, _) => Value::Text(entity.kind_name()),
            (Self::EntityName, _) => Value::Text(&entity.name),
            (Self::Cgroup, _) => Value::Text(&entity.cgroup),
            (Self::Pid, _) => Value::Number(u64::from(signal.pid)),
            (Self::Comm, _) => Value::Text(signal.comm()?),
            (Self::Lead, _) => Value::Flag(signal.is_lead()),
            (Self::Main, Detail::Exit(exit)) => {
                Value::Flag(signal.is_lead() && (entity.kind != Some(EntityKind::Unit) || exit.parent_pid <= 1))
            }
            (Self::ExitCode, Detail::Exit(exit)) => Value::Number(exit.exit_code()?.into()),
            (Self::Signal, Detail::Exit(exit)) => Value::Number(exit.signal()?.into()),
            (Self::DiedBy, Detail::Exit(exit)) => Value::Number(exit.died_by()?.into()),
            (Self::Failed, Detail::Exit(exit)) => Value::Flag(exit.status != 0),
            (Self::Lifetime, Detail::Exit(exit)) => {
                Value::Number(signal.boottime_ns.saturating_sub(exit.start_time_ns))
            }
            (Self::LimitHit, Detail::Oom(oom)) => Value::Flag(oom.limit_hit()),
            (Self::LimitBytes, Detail::Oom(oom)) => Value::Number(oom.limit_bytes),
            (Self::UsageBytes, Detail::Oom(oom)) => Value::Number(oom.usage_bytes),
            (Self::RssBytes, Detail::Oom(oom)) => Value::Number(oom.rss_bytes),
            (Self::LimitCgroup, Detail::Oom(oom)) => Value::Text(&oom.limit_cgroup),
            (Self::AllocatorComm, Detail::Oom(oom)) => Value::Text(&oom.allocator_comm),
            (Self::AllocatorPid, Detail::Oom(oom)) => Value::Number(oom.allocator_pid.into()),
            (Self::Signal, Detail::Kill(kill)) => Value::Number(kill.signal.into()),
            (Self::Sender, Detail::Kill(kill)) => Value::Text(kill.sender_class.name()),
            (Self::SenderPid, Detail::Kill(kill)) => Value::Number(kill.sender_pid.into()),
            (Self::SenderComm, Detail::Kill(kill)) => Value::Text(&kill.sender_comm),
            (Self::SenderEntity, Detail::Kill(kill)) => Value::Number(kill.sender.id),
            (Self::SenderKind, Detail::Kill(kill)) => Value::Text(kill.sender.kind_name()),
            (Self::Ignored, Detail::Kill(kill)) => Value::Flag(kill.ignored),
            (Self::Count, Detail::Burst(burst)) => Value::Number(burst.count.into()),
            (Self::Stall, Detail::Burst(burst)) => Value::Number(u64::from(burst.stall_us) * 1_000),
            (Self::Span, Detail::Burst(burst)) => Value::Number(u64::from(burst.span_ms) * 1_000_000),
            _ => return None,
        })
    }

    /// Its value for people.
    pub fn show(self, signal: &Signal) -> Option<String> {
        match (self, &signal.detail) {
            (Self::Entity, _) => return Some(signal.entity.to_string()),
            (Self::SenderEntity, Detail::Kill(kill)) => return Some(kill.sender.to_string()),
            _ => {}
        }
        Some(match (self.get(signal)?, self.field_type()) {
            (Value::Number(bytes), FieldType::Bytes) => text::bytes(bytes),
            (Value::Number(ns), FieldType::Nanoseconds) => text::duration(ns),
            (Value::Number(signal), FieldType::Signal) => text::signal_name(signal as u32),
            (Value::Number(number), _) => number.to_string(),
            (Value::Flag(flag), _) => flag.to_string(),
            (Value::Text(""), _) => "?".to_owned(),
            (Value::Text(text), _) => text.to_owned(),
        })
    }
}
