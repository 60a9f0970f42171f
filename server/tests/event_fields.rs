//! The fields of events, as JSON and as lines have them. `wire/tests/fields.rs` writes an event of every kind, each field with a
//! value of its own; the golden file here holds what is shown of it.

use std::path::Path;

use serde_json::{Map, Value};
use tapio_server::render::{event_fields, event_text};
use tapio_wire::frame::Frame;

/// Both frames of `wire/tests/golden` with events of every kind, as JSON and as lines.
fn shown() -> String {
    let mut shown = String::new();
    for file in ["fields-v3.bin", "frame-v3.bin"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wire/tests/golden").join(file);
        let frame = std::fs::read(path).expect("the golden frames are part of the repository");
        let frame = Frame::decode(&frame).expect("sound");
        for event in frame.body().events.iter() {
            let fields = event_fields(frame.body(), event);
            let text = event_text(&fields);
            let detail: Map<String, Value> = fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
            shown += &format!("{} {}\n    {text}\n", event.kind().name(), Value::Object(detail));
        }
    }
    shown
}

#[test]
fn every_kind_is_shown_as_the_golden_file_says() {
    let shown = shown();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/event-fields.txt");
    if std::env::var_os("TAPIO_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, &shown).expect("written");
    }
    let golden = std::fs::read_to_string(&path).expect("the golden file is part of the repository");
    for (shown, golden) in shown.lines().zip(golden.lines()) {
        assert_eq!(shown, golden);
    }
    assert_eq!(shown.lines().count(), golden.lines().count());
}
