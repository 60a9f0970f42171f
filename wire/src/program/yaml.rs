//! YAML into types, with the place of what is refused.
//!
//! What enters: the text of one document that a person wrote. What leaves: a value, or a [`YamlError`] with key, reason, line and
//! column. What must hold: depth, size and aliases are bounded by the parser's budget; a key that stands twice is refused; `on`,
//! `off`, `yes` and `no` are text (YAML 1.2).

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;

use serde::de::{DeserializeOwned, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_saphyr::{Location, MessageFormatter, Options, Spanned, UserMessageFormatter};

/// Where something is written, from 1. The default is nowhere: what is said is about the file as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TextPosition {
    pub line: u64,
    pub column: u64,
}

impl From<Location> for TextPosition {
    fn from(location: Location) -> Self {
        Self { line: location.line(), column: location.column() }
    }
}

impl fmt::Display for TextPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// A value that knows where it is written. Only what this module reads has one.
#[derive(Clone, Debug)]
pub struct Placed<T>(Spanned<T>);

impl<T> Placed<T> {
    /// Where the value begins; for an alias, where the alias is.
    pub fn place(&self) -> TextPosition {
        self.0.referenced.into()
    }

    /// The value alone.
    pub fn into_inner(self) -> T {
        self.0.value
    }
}

impl<T> Deref for Placed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Placed<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Spanned::deserialize(deserializer).map(Self)
    }
}

/// Where the keys of a text are written, whatever their types.
#[derive(Debug, Default)]
pub struct Places(BTreeMap<String, Placed<Places>>);

impl Places {
    /// Where the value of a key with dots begins, or of the section nearest to it that is written.
    pub fn of(&self, key: &str) -> TextPosition {
        let (mut section, mut place) = (self, TextPosition::default());
        for name in key.split('.') {
            let Some(found) = section.0.get(name) else { break };
            section = found;
            place = found.place();
        }
        place
    }
}

impl<'de> Deserialize<'de> for Places {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PlacesVisitor)
    }
}

struct PlacesVisitor;

/// A value without keys.
macro_rules! keyless {
    ($($visit:ident: $type:ty),*) => {
        $(fn $visit<E>(self, _: $type) -> Result<Places, E> {
            Ok(Places::default())
        })*
    };
}

impl<'de> Visitor<'de> for PlacesVisitor {
    type Value = Places;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any value")
    }

    keyless!(visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_f64: f64, visit_str: &str);

    fn visit_none<E>(self) -> Result<Places, E> {
        Ok(Places::default())
    }

    fn visit_unit<E>(self) -> Result<Places, E> {
        Ok(Places::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Places, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Places::default())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Places, A::Error> {
        let mut places = BTreeMap::new();
        while let Some((name, value)) = entries.next_entry()? {
            places.insert(name, value);
        }
        Ok(Places(places))
    }
}

/// Why a text was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct YamlError {
    /// Path with dots; empty at the root.
    path: String,
    reason: String,
    place: TextPosition,
}

impl YamlError {
    fn new(path: String, error: &serde_saphyr::Error, text: &str) -> Self {
        let error = error.without_snippet();
        let location = error.location();
        let written = location.and_then(|location| Some(text.get(range_of(location)?)?.trim_end()));
        let reason = match (error, written) {
            (serde_saphyr::Error::InvalidScalar { ty, .. }, Some(written)) => {
                format!("invalid value `{written}`, expected {ty}")
            }
            (serde_saphyr::Error::QuotingRequired { .. }, Some(written)) => {
                format!("`{written}` is no text: write one, or \"{written}\" in quotes where this is what it says")
            }
            _ => UserMessageFormatter.format_message(error).into_owned(),
        };
        // What is quoted from the file reaches terminals and logs.
        let reason = reason.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect();
        Self { path, reason, place: location.map(TextPosition::from).unwrap_or_default() }
    }

    /// Where the problem is.
    pub fn place(&self) -> TextPosition {
        self.place
    }

    /// The key and what is wrong, without the place.
    pub fn reason(&self) -> String {
        if self.path.is_empty() { self.reason.clone() } else { format!("{}: {}", self.path, self.reason) }
    }
}

impl fmt::Display for YamlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason())?;
        match self.place {
            TextPosition { line: 0, .. } => Ok(()),
            place => write!(f, " at line {} column {}", place.line, place.column),
        }
    }
}

impl std::error::Error for YamlError {}

fn range_of(location: Location) -> Option<std::ops::Range<usize>> {
    let span = location.span();
    let (start, length) = (span.byte_offset()?, span.byte_len()?);
    let (start, length) = (usize::try_from(start).ok()?, usize::try_from(length).ok()?);
    Some(start..start.checked_add(length)?)
}

fn options() -> Options {
    serde_saphyr::options! {
        strict_booleans: true,
        // As YAML 1.2 has them: `0755` and `1_000` are text where a type does not ask for a number.
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        // A number or a truth value where a text belongs is a slip more often than a name.
        no_schema: true,
        with_snippet: false,
    }
}

/// Reads the one document of a text.
///
/// # Errors
/// [`YamlError`] names the key, the reason and the place.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, YamlError> {
    let mut path = String::new();
    let read = serde_saphyr::with_deserializer_from_str_with_options(text, options(), |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            path = error.path().to_string();
            error.into_inner()
        })
    });
    // Of a key that is refused itself, as one that stands twice, the path ends in `?`; the reason names it.
    read.map_err(|error| {
        let known = path.trim_end_matches('?').trim_end_matches('.');
        YamlError::new(known.to_owned(), &error, text)
    })
}

/// Deserializes with a default where a key has no value, as a section has whose keys are all comments. For
/// `deserialize_with`.
///
/// # Errors
/// Those of `T`.
pub fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Deserializes a section that may be left out, for `deserialize_with`. A section without keys is refused: it would
/// silently turn nothing on.
///
/// # Errors
/// When it has no keys, and those of `T`.
pub fn named<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    match Option::deserialize(deserializer)? {
        Some(section) => Ok(Some(section)),
        None => Err(D::Error::custom("it has no keys: write those that it needs, or leave it out")),
    }
}

/// Writes a value as one document, without `---`.
///
/// # Errors
/// What the value's own serialization says.
pub fn to_string<T: Serialize>(value: &T) -> Result<String, serde_saphyr::SerializeError> {
    serde_saphyr::to_string(value)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct File {
        #[serde(deserialize_with = "or_default")]
        server: Section,
        #[serde(deserialize_with = "or_default")]
        names: Vec<String>,
        needed: Section,
        #[serde(deserialize_with = "named")]
        spool: Option<Section>,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Section {
        port: u16,
        is_on: bool,
        #[serde(deserialize_with = "super::super::units::bytes")]
        room: u64,
        #[serde(deserialize_with = "super::super::units::duration")]
        wait: std::time::Duration,
        mode: Mode,
        name: Option<String>,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Mode {
        #[default]
        Auto,
        Off,
    }

    #[test]
    fn refusals_name_key_line_and_column() {
        for (text, says) in [
            ("server:\n  prot: 1\n", &["server", "unknown field `prot`", "port", "line 2 column 3"][..]),
            ("sever: {}\n", &["unknown field `sever`", "server", "line 1 column"]),
            ("server:\n  port: high\n", &["server.port: ", "`high`", "u16", "line 2 column 9"]),
            ("server:\n  port: 99999\n", &["server.port: ", "`99999`", "u16", "line 2 column 9"]),
            ("server: {is_on: on}\n", &["server.is_on: ", "true or false", "line 1 column 17"]),
            ("server:\n  room: lots\n", &["server.room: ", "`lots`", "64MiB", "line 2 column 9"]),
            ("server:\n  wait: 100\n", &["server.wait: ", "100", "100ms", "line 2 column"]),
            ("server:\n  wait: -1\n", &["server.wait: ", "-1", "line 2 column"]),
            ("server:\n  mode: sometimes\n", &["server.mode: ", "`sometimes`", "auto", "line 2 column"]),
            ("names:\n  - {a: 1}\n", &["names[0]: ", "line 2 column"]),
            ("server:\n  port: 1\n  port: 2\n", &["server: duplicate", "port", "line 3 column 3"]),
            ("server: {}\nnames: []\nserver: {}\n", &["duplicate", "`server`", "line 3 column 1"]),
            ("needed:\n", &["needed: ", "line 1"]),
            ("spool:\n  # name: a\n", &["spool: ", "it has no keys", "leave it out", "line 1"]),
            ("server:\n  name: 5\n", &["server.name: ", "`5` is no text", "\"5\" in quotes", "line 2 column 9"]),
            ("server: {name: true}\n", &["server.name: ", "`true` is no text", "line 1 column 16"]),
            ("names: [a, 0755]\n", &["names[1]: ", "`0755`", "line 1 column 12"]),
            ("names: [\n", &["names", "line"]),
            ("server: *unknown\n", &["line 1 column"]),
        ] {
            let said = from_str::<File>(text).expect_err(text).to_string();
            for part in says {
                assert!(said.contains(part), "{text}: {said}");
            }
            assert!(!said.contains('?'), "{text}: {said}");
        }
    }

    #[test]
    fn values_are_those_of_yaml_1_2() {
        let text =
            "server: {port: 1, is_on: true, room: 64MiB, wait: 5m, mode: off, name: off}\nnames: [no, '1', '0755']\n";
        let file: File = from_str(text).expect("accepted");
        assert_eq!((file.server.port, file.server.is_on, file.server.room), (1, true, 64 << 20));
        assert_eq!((file.server.mode, file.server.name.as_deref()), (Mode::Off, Some("off")));
        assert_eq!((file.names, file.server.wait.as_secs()), (vec!["no".into(), "1".into(), "0755".to_owned()], 300));
        let room: File = from_str("server: {room: 4096, name: ~}").expect("accepted");
        assert_eq!((room.server.room, room.server.name), (4096, None));
    }

    #[test]
    fn a_section_or_list_without_a_value_is_its_default() {
        let file: File = from_str("server:\n  # port: 1\nnames:\n").expect("accepted");
        assert_eq!((file.server.port, file.names.len()), (0, 0));
        let file: File = from_str("server: {port: 2}\nnames: [a]\n").expect("accepted");
        assert_eq!((file.server.port, file.names), (2, vec!["a".to_owned()]));
    }

    #[test]
    fn a_value_knows_its_place() {
        type Lists = BTreeMap<String, Placed<Vec<Placed<String>>>>;
        let lists: Lists = from_str("a: [x,\n  y]\nb:\n  - z\n").expect("accepted");
        let place = |line, column| TextPosition { line, column };
        assert_eq!((lists["a"].place(), lists["b"].place()), (place(1, 4), place(4, 3)));
        assert_eq!((lists["a"][1].place(), lists["b"][0].place()), (place(2, 3), place(4, 5)));
        assert_eq!(*lists["a"][1], "y");
    }

    #[test]
    fn aliases_and_depth_are_bounded() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let before = format!("*a{}, ", level - 1).repeat(10);
            bomb += &format!("a{level}: &a{level} [{before}]\n");
        }
        from_str::<serde_json::Value>(&bomb).expect_err("ten to the twelfth");
        for opened in ["[", "{", "- ", "? ", "[{a: ", "a: {"] {
            let began = std::time::Instant::now();
            from_str::<serde_json::Value>(&opened.repeat(100_000)).expect_err("too deep");
            assert!(began.elapsed().as_secs() < 5, "{opened}: {:?}", began.elapsed());
        }
    }

    #[test]
    fn keys_have_places_whatever_their_values_are() {
        let text = "a: 1\nb: {c: [x, {y: 1}], d: ~}\ne:\n  f: yes\n";
        let places: Places = from_str(text).expect("accepted");
        let place = |line, column| TextPosition { line, column };
        for (key, at) in [
            ("a", place(1, 4)),
            ("b.c", place(2, 8)),
            ("b.d", place(2, 24)),
            ("b.missing.too", place(2, 4)),
            ("e.f", place(4, 6)),
            ("missing", TextPosition::default()),
        ] {
            assert_eq!(places.of(key), at, "{key}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let value =
            serde_json::json!({"a": ["off", "1", 1, 1.5, null, "a: b", "x\ny"], "b": {}, "c": [], "d": {"e": true}});
        let text = to_string(&value).expect("written");
        assert_eq!(from_str::<serde_json::Value>(&text).expect("YAML"), value, "{text}");
    }
}
