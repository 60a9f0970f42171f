//! How kinds of event and their fields are declared: once, by `kinds!` and `fields!`.
//!
//! In: a kind's lane and name, and its fields with their types and what they mean. Out: the types that travel, [`super::Kind`], and
//! each field by its name as a [`FieldValue`], as the server shows it. What must hold: kinds are numbered, and fields are laid out,
//! in the order of their declaration. `wire/tests/fields.rs` holds the bytes.
//!
//! A new field is one line of a declaration. It takes what was padding before, or the frame needs a new version. A unit ends the
//! field's name (`_ns`, `_bytes`): people are shown the value by it.

use super::{EntityId, Name};

/// The value of an event's field, for whoever shows fields by their names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FieldValue {
    Unsigned(u64),
    Signed(i64),
    Flag(bool),
    /// An index into the names of the event's body.
    Name(Name),
    /// 0 where there is none.
    Entity(EntityId),
    /// IPv6, or IPv4 mapped into it.
    Address([u8; 16]),
    /// A list, or an enum: read it from the event itself.
    Parts,
}

/// The archived form of what `fields!` declares.
pub(super) trait ArchivedFields {
    /// Calls `each` with the name and the value of every field, in the order of their declaration.
    fn each_field(&self, each: &mut dyn FnMut(&'static str, FieldValue));
}

/// The value of an archived field, by the type that it is declared with.
macro_rules! field_value {
    ($field:expr, Name) => {
        FieldValue::Name($field.to_native())
    };
    ($field:expr, EntityId) => {
        FieldValue::Entity($field.to_native())
    };
    ($field:expr, bool) => {
        FieldValue::Flag($field)
    };
    ($field:expr, u8) => {
        FieldValue::Unsigned($field.into())
    };
    ($field:expr, u16) => {
        FieldValue::Unsigned($field.to_native().into())
    };
    ($field:expr, u32) => {
        FieldValue::Unsigned($field.to_native().into())
    };
    ($field:expr, u64) => {
        FieldValue::Unsigned($field.to_native())
    };
    ($field:expr, i16) => {
        FieldValue::Signed($field.to_native().into())
    };
    ($field:expr, i32) => {
        FieldValue::Signed($field.to_native().into())
    };
    ($field:expr, [u8; 16]) => {
        FieldValue::Address($field)
    };
    ($field:expr, $($parts:tt)+) => {
        FieldValue::Parts
    };
}

/// Declares the type of a kind with many fields. `kinds!` names it.
macro_rules! fields {
    ($(#[$meta:meta])* $kind:ident {
        $($(#[$field_meta:meta])* $field:ident: $type:tt $(<$of:tt>)?,)*
    }) => {
        $(#[$meta])*
        #[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize, Clone, Debug, PartialEq)]
        pub struct $kind { $($(#[$field_meta])* pub $field: $type $(<$of>)?,)* }

        impl ArchivedFields for rkyv::Archived<$kind> {
            fn each_field(&self, each: &mut dyn FnMut(&'static str, FieldValue)) {
                $(each(stringify!($field), field_value!(self.$field, $type $(<$of>)?));)*
            }
        }
    };
}

/// Declares the kinds. Each has its fields here, or a type that `fields!` declares.
macro_rules! kinds {
    ($(
        $(#[$meta:meta])*
        $kind:ident $(($($type:tt)+))? $({ $($field:ident: $field_type:tt),* })? => $lane:ident, $name:literal;
    )*) => {
        /// What happened, by kind. Rare kinds with many fields are boxed so that the hot ones stay small.
        #[derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize, Clone, Debug, PartialEq)]
        pub enum Detail { $($(#[$meta])* $kind $(($($type)+))? $({ $($field: $field_type),* })?,)* }

        /// Kinds of event, in the order of [`Detail`]'s variants.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Kind { $($(#[$meta])* $kind,)* }

        impl Kind {
            /// Every kind.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$kind),*];

            /// The one place that decides an event's lane.
            pub fn lane(self) -> Lane {
                match self { $(Self::$kind => Lane::$lane,)* }
            }

            /// The name that metrics and people use.
            pub fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }
        }

        impl Event {
            /// The event's kind.
            pub fn kind(&self) -> Kind {
                match &self.body { $(Detail::$kind { .. } => Kind::$kind,)* }
            }
        }

        impl ArchivedEvent {
            /// The event's kind.
            pub fn kind(&self) -> Kind {
                match &self.body { $(ArchivedDetail::$kind { .. } => Kind::$kind,)* }
            }

            /// Calls `each` with the name and the value of every field of the event's kind, in the order of their declaration.
            pub fn each_field(&self, each: &mut dyn FnMut(&'static str, FieldValue)) {
                match &self.body {$(
                    $(ArchivedDetail::$kind(fields) => {
                        let fields: &rkyv::Archived<$($type)+> = fields;
                        fields.each_field(each);
                    })?
                    $(ArchivedDetail::$kind { $($field),* } => {
                        $(each(stringify!($field), field_value!((*$field), $field_type));)*
                    })?
                )*}
            }
        }
    };
}
