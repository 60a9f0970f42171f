//! Exported tables, read by real SQL engines: every query of docs/sql.md, on files and on S3.

use std::path::Path;

use serde_json::{Value, json};

use crate::archive_support::*;
use crate::parquet_support::*;
use crate::remote_support::*;

fn export(environment: &[(&str, String)], arguments: &[&str]) -> Value {
    let output = crate::programs::server(&["archive", "export", "--json"])
        .args(arguments)
        .envs(environment.iter().map(|(name, value)| (*name, value.as_str())))
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn answer<'a>(answers: &'a [Answer], title: &str) -> &'a Answer {
    answers.iter().find(|answer| answer.title.starts_with(title)).unwrap_or_else(|| panic!("no query {title}"))
}

/// What the queries of the page say of [`a_bad_hour`].
fn check_page(answers: &[Answer]) {
    let deaths = answer(answers, "Deaths by workload");
    assert_eq!(deaths.column("cause"), [json!("error"), json!("oom"), json!("signal")]);
    assert_eq!(deaths.column("deaths"), [json!(1), json!(1), json!(1)]);
    assert_eq!(deaths.column("lost_events"), [json!(7), json!(7), json!(7)], "sampled ones are no death");
    assert_eq!(deaths.column("workload"), vec![json!("Deployment/web"); 3]);
    let lost = answer(answers, "How much was lost");
    assert_eq!(lost.column("reason"), [json!("full"), json!("sampled")]);
    assert_eq!(lost.column("events"), [json!(7), json!(50)]);
    let trust = answer(answers, "Can a count");
    assert_eq!((trust.rows.len(), &trust.column("lost")[0]), (1, &json!(7)));
    assert_eq!(trust.column("emitted")[0], json!(3 + 1002 + 57 + 8));
    assert_eq!(trust.column("archived")[0], json!(3 + 1002 + 8));
    assert_eq!((&trust.column("unexplained")[0], &trust.column("not_here")[0]), (&json!(0), &json!(0)));
    let signals = answer(answers, "Who sends signals");
    assert_eq!(signals.column("sent_by"), [json!("backup.service"), json!("the kernel")]);
    let changes = answer(answers, "What changed");
    assert_eq!(changes.column("images_before"), vec![json!("web:1"); 3], "of each of the three deaths");
    let room = answer(answers, "Memory head-room");
    assert_eq!(room.column("peak_bytes"), [json!(48 << 20)]);
    assert_eq!(room.column("headroom_percent"), [json!(25)]);
    let pod = answer(answers, "One pod");
    assert_eq!(pod.rows.len(), 500);
    let limits = answer(answers, "Memory limits");
    assert_eq!(limits.rows.len(), 1);
    assert_eq!(limits.column("largest_victim_bytes"), [json!(62 << 20)]);
    assert_eq!(answer(answers, "Who entered").column("path"), [json!("/bin/sh")]);
    assert_eq!(answer(answers, "Connections that").column("destination_port"), [json!(5432), json!(5433)]);
}

#[test]
fn every_documented_query_gives_its_answer_in_two_engines() {
    let Some(python) = python() else { return };
    let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let archive = open(plain(dir.path()));
    a_bad_hour(&archive);
    archive.shutdown();
    let (from, place) = (dir.path().to_str().expect("UTF-8"), to.path().to_str().expect("UTF-8"));
    let said = export(&[], &["--to", place, from]);
    assert_eq!((&said["segments"], &said["events"]), (&json!(1), &json!(3 + 1002 + 8)));
    assert_eq!(said["tables"]["deaths"]["rows"], json!(3));
    let answers = ask_both(&python, &[], place, &[]);
    assert!(answers.len() >= 12, "a dozen queries, not {}", answers.len());
    check_page(&answers);
    // A second export finds all files there. With `--again` it writes the same files once more.
    let files = objects(to.path());
    assert_eq!(export(&[], &["--to", place, from])["segments_there"], json!(1));
    export(&[], &["--to", place, "--again", from]);
    assert_eq!(objects(to.path()), files);
    let queries = ["SELECT count(*) AS n, count(DISTINCT id) AS ids FROM events", "SELECT count(*) AS n FROM deaths"];
    let counts = ask_both(&python, &[], place, &queries);
    assert_eq!(counts[0].rows, [[json!(1013), json!(1013)]]);
    assert_eq!(counts[1].rows, [[json!(3)]]);
}

#[test]
fn both_engines_read_a_remote_archive_exported_to_s3() {
    let (Some(python), Some(server)) = (python(), S3::start()) else { return };
    let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let section = s3(server.port(), cache.path());
    let uploaded = Uploaded::open(small(dir.path()), &section);
    a_bad_hour(&uploaded.archive);
    uploaded.end(GRACE);
    let environment = s3_environment(server.port());
    let cache = cache.path().join("cache");
    let arguments = ["--cache", cache.to_str().expect("UTF-8"), "--to", "s3://archive/tables", &section.url];
    let said = export(&environment, &arguments);
    assert_eq!(said["events"], json!(3 + 1002 + 8));
    let answers = ask_both(&python, &environment, "s3://archive/tables", &[]);
    check_page(&answers);
    // The kill for memory is explained, and its finding names its death.
    let query = "SELECT f.pattern, d.cause, f.workload, f.cluster FROM findings f JOIN deaths d ON d.id = f.death_id ORDER BY 1, 2";
    let explained = ask_both(&python, &environment, "s3://archive/tables", &[query]);
    let oom = [json!("memory-limit-kill"), json!("oom"), json!("Deployment/web"), json!("test")];
    assert!(explained[0].rows.iter().any(|row| *row == oom), "{explained:?}");
}

#[test]
fn one_pod_of_ten_minutes_is_found_by_reading_little() {
    let Some(python) = python() else { return };
    let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let archive = open(plain(dir.path()));
    a_bad_hour(&archive);
    archive.shutdown();
    let place = to.path().to_str().expect("UTF-8");
    export(&[], &["--to", place, dir.path().to_str().expect("UTF-8")]);
    let file = objects(to.path()).into_iter().find(|path| path.starts_with("events") && !path.contains("1970"));
    let file = Path::new(place).join(file.expect("a file of events"));
    // The filters know what is in a row group, and what is not.
    let pods: Vec<String> =
        ["web-1".into()].into_iter().chain((0..10).map(|number| format!("nobody-{number}"))).collect();
    let probe =
        |pod| format!("SELECT bloom_filter_excludes FROM parquet_bloom_probe('{}', 'pod', '{pod}')", file.display());
    let queries: Vec<String> = pods.iter().map(probe).collect();
    let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
    let answers: Vec<_> = ask(&python, "duckdb", &[], place, &queries).into_iter().map(|answer| answer.rows).collect();
    assert_eq!(answers[0], [[json!(false)]]);
    // A filter may take a name in a hundred for one that it has.
    let excluded = answers[1..].iter().filter(|rows| **rows == [[json!(true)]]).count();
    assert!(excluded >= 8, "{answers:?}");
    let query = format!(
        "SELECT count(*) AS n FROM parquet_metadata('{}') WHERE path_in_schema = 'time' AND stats_min_value IS NOT NULL",
        file.display()
    );
    assert_eq!(ask(&python, "duckdb", &[], place, &[&query])[0].rows, [[json!(1)]]);
}
