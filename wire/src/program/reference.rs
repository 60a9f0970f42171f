//! What may be written into a configuration file, derived from the structs that read it.
//!
//! What enters: a type whose fields carry doc comments and defaults. What leaves: a Markdown table of its keys, and YAML with every
//! key. What must hold: nothing here is written by hand, so the reference cannot name a key that is not read, or leave one out.

use std::fmt::{Debug, Display, Write};
use std::time::Duration;

use schemars::{JsonSchema, schema_for};
use serde_json::{Map, Value};

use super::units::{exact_bytes, exact_duration};

/// How deep sections may lie in one another.
const DEPTH_MAX: usize = 8;
/// Where comments of the YAML are wrapped.
const COMMENT_WIDTH: usize = 110;

/// One key of a configuration file.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// Path with dots, as messages name it.
    pub path: String,
    /// What its value is, for people.
    pub kind: String,
    pub meaning: String,
    /// Default as YAML; none where nothing is the default.
    pub default: Option<String>,
    /// Example as YAML.
    pub example: Option<String>,
    /// True in a section that may be missing: the default holds once it is there.
    pub is_optional: bool,
}

impl Key {
    fn section(&self) -> &str {
        self.path.rsplit_once('.').map_or("", |(section, _)| section)
    }

    fn name(&self) -> &str {
        self.path.rsplit_once('.').map_or(&self.path, |(_, name)| name)
    }

    /// What it could look like: the example, else the default.
    fn sample(&self) -> Option<&str> {
        self.example.as_deref().or(self.default.as_deref())
    }
}

/// Every key of `T`, sections in alphabetical order.
pub fn keys<T: JsonSchema>() -> Vec<Key> {
    let schema = schema_for!(T).to_value();
    let mut keys = Vec::new();
    walk(&schema, &schema, "", 0, &mut keys);
    keys
}

/// A table for each section. `live` are the keys that take effect at once.
pub fn markdown(keys: &[Key], live: &[&str]) -> String {
    let mut sections: Vec<&str> = keys.iter().map(Key::section).collect();
    sections.sort_unstable();
    sections.dedup();
    let mut text = String::new();
    for section in sections {
        let _ = writeln!(text, "### `{section}`\n\n| key | value | default | takes effect | meaning | example |");
        text.push_str("|---|---|---|---|---|---|\n");
        for key in keys.iter().filter(|key| key.section() == section) {
            let default = key.default.as_ref().map_or_else(|| "none".to_owned(), |default| format!("`{default}`"));
            let effect = if live.contains(&key.path.as_str()) { "at once" } else { "restart" };
            let name = key.name();
            let sample = key.sample().unwrap_or_default();
            let meaning = key.meaning.replace('|', "\\|");
            let _ =
                writeln!(text, "| `{name}` | {} | {default} | {effect} | {meaning} | `{name}: {sample}` |", key.kind);
        }
        text.push('\n');
    }
    text
}

/// A file with every key at its default and what it means above it; a key that has no default stands as a comment.
pub fn yaml_of_defaults(keys: &[Key]) -> String {
    yaml(keys, true, |key| key.default.as_deref().filter(|_| !key.is_optional))
}

/// A file with every key set, to its example where it has one.
pub fn yaml_of_examples(keys: &[Key]) -> String {
    yaml(keys, false, Key::sample)
}

/// Whether the reference of `T` is complete and true; for the tests of programs, which say what is wrong.
///
/// # Errors
/// A key has no meaning, or neither default nor example. A name in `live` is no key. The defaults are read as something
/// else, or an example is refused.
pub fn verify<T, E>(live: &[&str], read: impl Fn(&str) -> Result<T, E>) -> Result<(), String>
where
    T: JsonSchema + Default + Debug,
    E: Display,
{
    let keys = keys::<T>();
    for key in &keys {
        if key.meaning.is_empty() {
            return Err(format!("{}: say in a doc comment what it means", key.path));
        }
        if key.sample().is_none_or(|sample| sample == "[]") {
            return Err(format!("{}: give it a #[schemars(example)]", key.path));
        }
    }
    if let Some(unknown) = live.iter().find(|live| keys.iter().all(|key| key.path != **live)) {
        return Err(format!("{unknown} is no key"));
    }
    let read = |text: String| read(&text).map_err(|error| format!("{error}\n{text}"));
    let (defaults, expected) = (format!("{:?}", read(yaml_of_defaults(&keys))?), format!("{:?}", T::default()));
    if defaults != expected {
        return Err(format!("the defaults are read as {defaults}\nnot as {expected}"));
    }
    read(yaml_of_examples(&keys)).map(drop)
}

fn yaml(keys: &[Key], are_explained: bool, value: impl Fn(&Key) -> Option<&str>) -> String {
    let mut text = String::new();
    let mut open: Vec<&str> = Vec::new();
    for key in keys {
        let mut parents: Vec<&str> = key.path.split('.').collect();
        let name = parents.pop().unwrap_or_default();
        let same = open.iter().zip(&parents).take_while(|(open, parent)| open == parent).count();
        for depth in same..parents.len() {
            let prefix = format!("{}.", parents[..=depth].join("."));
            let is_set = keys.iter().any(|key| key.path.starts_with(&prefix) && value(key).is_some());
            let mark = if is_set { "" } else { "# " };
            let _ = writeln!(text, "{}{mark}{}:", "  ".repeat(depth), parents[depth]);
        }
        let indent = "  ".repeat(parents.len());
        if are_explained {
            for line in wrap(&format!("{} ({})", key.meaning, key.kind.replace('`', "")), COMMENT_WIDTH) {
                let _ = writeln!(text, "{indent}# {line}");
            }
        }
        let _ = match value(key) {
            Some(value) => writeln!(text, "{indent}{name}: {value}"),
            None => writeln!(text, "{indent}# {name}: {}", key.sample().unwrap_or_default()),
        };
        open = parents;
    }
    text
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("it begins with one and none is taken away");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

fn walk(root: &Value, section: &Value, prefix: &str, depth: usize, keys: &mut Vec<Key>) {
    let Some(properties) = section.get("properties").and_then(Value::as_object) else {
        return;
    };
    for (name, property) in properties {
        let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        let target = resolve(root, property);
        if target.get("properties").is_some() && !is_duration(target) && depth < DEPTH_MAX {
            let first = keys.len();
            walk(root, target, &path, depth + 1, keys);
            if property.get("anyOf").is_some() {
                keys[first..].iter_mut().for_each(|key| key.is_optional = true);
            }
            continue;
        }
        let (kind, choices) = describe(root, target, name);
        let about = property.get("description").or_else(|| target.get("description"));
        let mut meaning = sentence(about.and_then(Value::as_str).unwrap_or_default());
        for (choice, about) in choices {
            let _ = write!(meaning, " `{choice}`: {about}");
        }
        let example = property.get("examples").and_then(|examples| examples.get(0));
        keys.push(Key {
            kind,
            meaning,
            default: property.get("default").and_then(|value| scalar(value, name)),
            example: example.and_then(|value| scalar(value, name)),
            is_optional: false,
            path,
        });
    }
}

/// What a reference, or the alternative that is not null, leads to.
fn resolve<'a>(root: &'a Value, node: &'a Value) -> &'a Value {
    if let Some(reference) = node.get("$ref").and_then(Value::as_str) {
        return reference.strip_prefix('#').and_then(|pointer| root.pointer(pointer)).unwrap_or(node);
    }
    let alternatives = node.get("anyOf").and_then(Value::as_array);
    match alternatives.and_then(|all| all.iter().find(|one| one.get("type").and_then(Value::as_str) != Some("null"))) {
        Some(alternative) => resolve(root, alternative),
        None => node,
    }
}

/// What a value is, and of a choice what each word means.
fn describe(root: &Value, node: &Value, name: &str) -> (String, Vec<(String, String)>) {
    if is_duration(node) {
        return ("duration".into(), Vec::new());
    }
    let mut choices = Vec::new();
    let alternatives = node.get("oneOf").and_then(Value::as_array);
    for one in alternatives.into_iter().flatten().chain([node]) {
        let about = sentence(one.get("description").and_then(Value::as_str).unwrap_or_default());
        let words = one.get("const").into_iter().chain(one.get("enum").and_then(Value::as_array).into_iter().flatten());
        let has_heading = one.get("const").is_some();
        for word in words.filter_map(Value::as_str) {
            choices.push((word.to_owned(), if has_heading { about.clone() } else { String::new() }));
        }
    }
    if !choices.is_empty() {
        let words: Vec<String> = choices.iter().map(|(word, _)| format!("`{word}`")).collect();
        choices.retain(|(_, about)| !about.is_empty());
        return (format!("one of {}", words.join(", ")), choices);
    }
    let kind = match type_of(node) {
        "boolean" => "`true` or `false`".into(),
        "integer" if is_size(name) => "size".into(),
        "integer" => "whole number".into(),
        "number" => "number".into(),
        "string" => "text".into(),
        "array" => {
            let items = node.get("items").unwrap_or(&Value::Null);
            format!("list of {}", describe(root, resolve(root, items), name).0)
        }
        other => other.to_owned(),
    };
    (kind, Vec::new())
}

fn type_of(node: &Value) -> &str {
    match node.get("type") {
        Some(Value::String(name)) => name,
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).find(|name| *name != "null").unwrap_or(""),
        _ => "",
    }
}

/// Bytes, or bytes a second.
fn is_size(name: &str) -> bool {
    name.contains("_bytes")
}

fn is_duration(node: &Value) -> bool {
    let properties = node.get("properties").and_then(Value::as_object);
    properties.is_some_and(|properties| properties.len() == 2 && is_duration_value(properties))
}

fn is_duration_value(map: &Map<String, Value>) -> bool {
    map.contains_key("secs") && map.contains_key("nanos")
}

/// A value as this project's files write it; none for null.
fn scalar(value: &Value, name: &str) -> Option<String> {
    match value {
        Value::Null => None,
        Value::Object(map) if is_duration_value(map) => {
            let part = |key| map.get(key).and_then(Value::as_u64).unwrap_or(0);
            Some(exact_duration(Duration::new(part("secs"), part("nanos") as u32)))
        }
        Value::Number(number) if is_size(name) => Some(exact_bytes(number.as_u64()?)),
        Value::String(text) => Some(text_value(text)),
        Value::Array(values) => {
            let values: Vec<String> = values.iter().filter_map(|value| scalar(value, name)).collect();
            Some(format!("[{}]", values.join(", ")))
        }
        other => Some(other.to_string()),
    }
}

/// Plain where YAML reads it as text anyway, else quoted as in JSON, which is YAML too.
fn text_value(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/_-.:=".contains(c);
    let begins_well = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/');
    let is_word = ["true", "false", "null", "yes", "no", "on", "off"].contains(&text.to_ascii_lowercase().as_str());
    // `off` is text to this project's reader and a boolean to YAML 1.1's.
    if begins_well && text.chars().all(is_plain) && !is_word && !text.ends_with(':') {
        text.to_owned()
    } else {
        Value::from(text).to_string()
    }
}

/// A doc comment as one line.
fn sentence(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::{Deserialize, Serialize};

    #[derive(Debug, Default, Deserialize, JsonSchema)]
    #[serde(default)]
    struct Sample {
        section: Section,
    }

    #[derive(Debug, Deserialize, Serialize, JsonSchema)]
    #[serde(rename_all = "lowercase")]
    enum Mode {
        Lz4,
        /// Content as it is.
        None,
    }

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(default)]
    struct Section {
        /// How long
        /// it may take.
        wait: Duration,
        /// Room.
        room_bytes: u64,
        /// A name.
        #[schemars(example = "*.service")]
        name: Option<String>,
        /// How.
        mode: Mode,
    }

    impl Default for Section {
        fn default() -> Self {
            Self { wait: Duration::from_millis(1500), room_bytes: 64 << 20, name: None, mode: Mode::Lz4 }
        }
    }

    #[test]
    fn keys_are_listed_with_kind_default_and_meaning() {
        let keys = keys::<Sample>();
        let rows: Vec<_> =
            keys.iter().map(|key| (key.path.as_str(), key.kind.as_str(), key.default.as_deref())).collect();
        assert_eq!(
            rows,
            [
                ("section.mode", "one of `lz4`, `none`", Some("lz4")),
                ("section.name", "text", None),
                ("section.room_bytes", "size", Some("64MiB")),
                ("section.wait", "duration", Some("1500ms")),
            ]
        );
        assert_eq!(keys[3].meaning, "How long it may take.");
        assert!(keys[0].meaning.contains("`none`: Content as it is."), "{}", keys[0].meaning);
    }

    #[test]
    fn yaml_has_every_key_and_comments_out_optional_ones() {
        let keys = keys::<Sample>();
        let text = yaml_of_defaults(&keys);
        assert!(text.contains("  # name: \"*.service\"\n") && text.contains("  wait: 1500ms\n"), "{text}");
        let text = yaml_of_examples(&keys);
        assert!(text.contains("  name: \"*.service\"\n") && text.starts_with("section:\n"), "{text}");
    }

    #[test]
    fn a_reference_that_is_not_true_is_found() {
        let default = |_: &str| Ok::<_, String>(Sample::default());
        assert_eq!(verify(&["section.wait"], default), Ok(()));
        assert!(verify(&["section.weight"], default).is_err_and(|problem| problem.contains("section.weight")));
        let other = |_: &str| Ok::<_, String>(Sample { section: Section { room_bytes: 1, ..Section::default() } });
        assert!(verify(&[], other).is_err_and(|problem| problem.contains("room_bytes: 1")));
        let refused = |text: &str| match text.contains("# name") {
            true => Ok(Sample::default()),
            false => Err("no such name"),
        };
        assert!(verify(&[], refused).is_err_and(|problem| problem.contains("no such name")));
    }
}
