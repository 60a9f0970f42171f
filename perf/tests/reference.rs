//! The references that the programs themselves write: docs/configuration.md and docs/metrics.md. `make docs` rewrites them.

#[path = "docs/metrics.rs"]
mod metrics;

use crate::docs::pages;

#[test]
fn the_configuration_reference_is_what_the_programs_read() {
    for program in ["tapio-server", "tapio-collector"] {
        let command = format!("{program} config --reference");
        pages::check_generated("docs/configuration.md", &command, &pages::printed(program, &["config", "--reference"]));
    }
}

#[test]
fn a_configuration_is_checked_without_a_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.yaml");
    let file = path.to_str().expect("a path");
    for program in ["tapio-server", "tapio-collector"] {
        std::fs::write(&path, pages::printed(program, &["config"])).expect("written");
        assert!(pages::printed(program, &["check", "--config", file]).contains("accepted"), "{program}");
        std::fs::write(&path, "logging:\n  levle: info\n").expect("written");
        let output = pages::program(program, &["check", "--config", file]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{program}: {said}");
        assert!(said.contains("levle") && said.contains("line 2"), "{program}: {said}");
    }
}

#[test]
fn the_metrics_reference_is_what_the_programs_expose() {
    let _turn = crate::lab::alone();
    metrics::check();
}
