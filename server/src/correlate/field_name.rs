//! Names of a fact's fields.
//!
//! What enters: names that this program writes itself, and names out of another server's messages. What must hold: a name is one
//! pointer and is never copied; messages cannot make the program remember more than [`FOREIGN_MAX`] names that it does not know.

use std::collections::HashSet;
use std::ops::Deref;
use std::sync::{Mutex, OnceLock, PoisonError};

use rkyv::rancor::{Fallible, Source};
use rkyv::string::{ArchivedString, StringResolver};
use rkyv::{Archive, Deserialize, Place, Serialize, SerializeUnsized};

/// Names out of messages that are remembered.
const FOREIGN_MAX: usize = 1024;
/// A longer name is none of a field.
const NAME_BYTES_MAX: usize = 64;

/// The name of a field of a [`super::clue::Fact`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FieldName(&'static str);

impl From<&'static str> for FieldName {
    fn from(name: &'static str) -> Self {
        Self(name)
    }
}

impl Deref for FieldName {
    type Target = str;

    fn deref(&self) -> &str {
        self.0
    }
}

impl FieldName {
    /// The name of this text; the empty one, which no pattern asks for, where the text cannot be one or too many were met before.
    pub fn from_message(text: &str) -> Self {
        static NAMES: OnceLock<Mutex<HashSet<&'static str>>> = OnceLock::new();
        let mut names = NAMES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = names.get(text) {
            return Self(known);
        }
        if text.len() > NAME_BYTES_MAX || names.len() >= FOREIGN_MAX {
            return Self("");
        }
        let name: &'static str = Box::leak(Box::from(text));
        names.insert(name);
        Self(name)
    }
}

impl Archive for FieldName {
    type Archived = ArchivedString;
    type Resolver = StringResolver;

    fn resolve(&self, resolver: Self::Resolver, out: Place<Self::Archived>) {
        ArchivedString::resolve_from_str(self.0, resolver, out);
    }
}

impl<S: Fallible<Error: Source> + ?Sized> Serialize<S> for FieldName
where
    str: SerializeUnsized<S>,
{
    fn serialize(&self, serializer: &mut S) -> Result<Self::Resolver, S::Error> {
        ArchivedString::serialize_from_str(self.0, serializer)
    }
}

impl<D: Fallible + ?Sized> Deserialize<FieldName, D> for ArchivedString {
    fn deserialize(&self, _: &mut D) -> Result<FieldName, D::Error> {
        Ok(FieldName::from_message(self.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_from_a_message_equals_the_programs_own() {
        assert_eq!(FieldName::from_message("reason"), FieldName::from("reason"));
        assert_eq!(FieldName::from_message(&"x".repeat(NAME_BYTES_MAX + 1)), FieldName::from(""));
    }
}
