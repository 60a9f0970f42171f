//! A version of a finding as a log record of OTLP.
//!
//! What enters: a delivery. What leaves: one request with one record. What must hold: names of pods and processes are texts without
//! control characters, of bounded length. The same version has the same `log.record.uid`.
//!
//! The names are those of the semantic conventions where there are any: <https://opentelemetry.io/docs/specs/semconv/registry/>.

use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, ArrayValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs, ScopeLogs, SeverityNumber};
use opentelemetry_proto::tonic::resource::v1::Resource;
use tapio_wire::program::clock::now_ns;
use tapio_wire::service::{EntityRef, Finding};

use super::super::Delivery;
use super::super::chat::cut;
use crate::findings::Severity;
use crate::render::clean;

/// Names the schema of every record.
const EVENT_NAME: &str = "tapio.finding";
/// Characters of one text.
const TEXT_MAX: usize = 4096;
const ADVICE_MAX: usize = 16;

/// Who sends records.
pub(super) struct Origin {
    pub cluster: String,
    pub server: String,
    /// Where people reach the server's page.
    pub page_url: Option<String>,
}

/// Collects attributes; those without a value are left out.
#[derive(Default)]
struct Attributes(Vec<KeyValue>);

impl Attributes {
    fn value(&mut self, key: &str, value: Value) {
        let value = Some(AnyValue { value: Some(value) });
        self.0.push(KeyValue { key: key.into(), value, ..KeyValue::default() });
    }

    fn text(&mut self, key: &str, text: &str) {
        if !text.is_empty() {
            self.value(key, Value::StringValue(shown(text)));
        }
    }
}

/// A text without what a terminal would act on, of bounded length.
fn shown(text: &str) -> String {
    cut(&clean(text), TEXT_MAX)
}

/// The request that delivers a version of a finding.
pub(super) fn request(delivery: &Delivery, origin: &Origin) -> ExportLogsServiceRequest {
    let mut resource = Attributes::default();
    resource.text("service.name", "tapio-server");
    resource.text("service.version", env!("CARGO_PKG_VERSION"));
    resource.text("service.instance.id", &origin.server);
    resource.text("k8s.cluster.name", &origin.cluster);
    let scope = InstrumentationScope {
        name: "tapio".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..InstrumentationScope::default()
    };
    let logs = ScopeLogs { scope: Some(scope), log_records: vec![record(delivery, origin)], ..ScopeLogs::default() };
    let resource = Some(Resource { attributes: resource.0, ..Resource::default() });
    let logs = ResourceLogs { resource, scope_logs: vec![logs], ..ResourceLogs::default() };
    ExportLogsServiceRequest { resource_logs: vec![logs] }
}

fn record(delivery: &Delivery, origin: &Origin) -> LogRecord {
    let finding = &delivery.finding;
    let mut attributes = Attributes::default();
    attributes.text("log.record.uid", &delivery.id);
    about_finding(&mut attributes, delivery, origin);
    about_entity(&mut attributes, &finding.entity.clone().unwrap_or_default());
    let cluster = if finding.cluster.is_empty() { &origin.cluster } else { &finding.cluster };
    attributes.text("k8s.cluster.name", cluster);
    if let Some(code) = finding.death.as_ref().and_then(|death| death.exit_code) {
        attributes.value("process.exit.code", Value::IntValue(code.into()));
    }
    // A finding that was taken over while nobody led has an id, and no times.
    let happened_ns = match state(finding) {
        "over" => finding.resolved_ns,
        "withdrawn" => finding.published_ns,
        _ => finding.started_ns,
    };
    let observed_ns = if finding.published_ns > 0 { finding.published_ns } else { now_ns() };
    LogRecord {
        time_unix_nano: happened_ns,
        observed_time_unix_nano: observed_ns,
        severity_number: severity_number(finding).into(),
        severity_text: finding.severity.clone(),
        body: Some(AnyValue { value: Some(Value::StringValue(body(finding))) }),
        attributes: attributes.0,
        event_name: EVENT_NAME.into(),
        ..LogRecord::default()
    }
}

fn about_finding(attributes: &mut Attributes, delivery: &Delivery, origin: &Origin) {
    let finding = &delivery.finding;
    attributes.text("tapio.finding.id", &finding.id);
    attributes.value("tapio.finding.revision", Value::IntValue(delivery.revision.into()));
    attributes.text("tapio.finding.state", state(finding));
    attributes.text("tapio.finding.superseded_by", &finding.superseded_by);
    if let Some(page) = &origin.page_url {
        attributes.text("tapio.finding.url", &format!("{}/f/{}", page.trim_end_matches('/'), finding.id));
    }
    // Of what was taken over while nobody led, nothing else is known.
    if finding.pattern.is_empty() {
        return;
    }
    attributes.text("tapio.finding.pattern", &finding.pattern);
    attributes.text("tapio.finding.title", &finding.title);
    attributes.text("tapio.finding.summary", &finding.summary);
    attributes.text("tapio.finding.severity", &finding.severity);
    attributes.value("tapio.finding.confidence", Value::DoubleValue(finding.confidence));
    attributes.value("tapio.finding.possible", Value::BoolValue(finding.possible));
    attributes.value("tapio.finding.count", Value::IntValue(finding.count.into()));
    let text = |text: &String| AnyValue { value: Some(Value::StringValue(shown(text))) };
    let values: Vec<AnyValue> = finding.advice.iter().take(ADVICE_MAX).map(text).collect();
    if !values.is_empty() {
        attributes.value("tapio.finding.advice", Value::ArrayValue(ArrayValue { values }));
    }
}

fn about_entity(attributes: &mut Attributes, entity: &EntityRef) {
    attributes.text("k8s.namespace.name", &entity.namespace);
    attributes.text("k8s.pod.name", &entity.pod);
    attributes.text("k8s.pod.uid", &entity.pod_uid);
    attributes.text("k8s.container.name", &entity.container);
    attributes.text("k8s.node.name", &entity.node);
    attributes.text("container.id", &entity.container_id);
    attributes.text("tapio.entity.kind", &entity.kind);
    attributes.text("tapio.entity.name", &entity.name);
    attributes.text("tapio.workload", &entity.workload);
    let Some((kind, name)) = entity.workload.split_once('/') else { return };
    let key = match kind {
        "CronJob" => "k8s.cronjob.name",
        "DaemonSet" => "k8s.daemonset.name",
        "Deployment" => "k8s.deployment.name",
        "Job" => "k8s.job.name",
        "ReplicaSet" => "k8s.replicaset.name",
        "ReplicationController" => "k8s.replicationcontroller.name",
        "StatefulSet" => "k8s.statefulset.name",
        // The conventions have no name for it; `tapio.workload` says it.
        _ => return,
    };
    attributes.text(key, name);
}

fn state(finding: &Finding) -> &'static str {
    match finding {
        Finding { withdrawn: true, .. } => "withdrawn",
        Finding { resolved_ns: 1.., .. } => "over",
        _ => "stands",
    }
}

/// The verdict; of one that is withdrawn, that it is.
fn body(finding: &Finding) -> String {
    if finding.withdrawn {
        return match finding.superseded_by.as_str() {
            "" => "Withdrawn: it does not stand any more.".into(),
            successor => shown(&format!("Withdrawn: finding {successor} explains it better.")),
        };
    }
    let verdict = finding.death.as_ref().map_or("", |death| death.verdict.as_str());
    let texts = [verdict, finding.summary.as_str(), finding.title.as_str()];
    shown(texts.into_iter().find(|text| !text.is_empty()).unwrap_or_default())
}

/// From 13 on somebody should look, from 17 on soon. What is withdrawn alarms nobody.
fn severity_number(finding: &Finding) -> SeverityNumber {
    let severity = Severity::ALL.into_iter().find(|known| known.name() == finding.severity);
    match severity {
        _ if finding.withdrawn => SeverityNumber::Info,
        None => SeverityNumber::Unspecified,
        Some(Severity::Info) => SeverityNumber::Info,
        Some(Severity::Low) => SeverityNumber::Warn,
        Some(Severity::Medium) => SeverityNumber::Warn3,
        Some(Severity::High) => SeverityNumber::Error,
        Some(Severity::Critical) => SeverityNumber::Fatal,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn of(finding: Finding) -> LogRecord {
        let (id, revision, finding) = ("a1.2.0123abcd".to_owned(), 2, Arc::new(finding));
        let delivery = Delivery { id, revision, term: 1, finding, is_known: false, former: Vec::new() };
        let origin = Origin { cluster: "prod".into(), server: "s".into(), page_url: None };
        request(&delivery, &origin).resource_logs.remove(0).scope_logs.remove(0).log_records.remove(0)
    }

    fn text(record: &LogRecord, key: &str) -> Option<String> {
        let found = record.attributes.iter().find(|pair| pair.key == key)?;
        match found.value.as_ref()?.value.as_ref()? {
            Value::StringValue(text) => Some(text.clone()),
            other => panic!("{key}: {other:?}"),
        }
    }

    #[test]
    fn a_workload_is_named_by_its_kind() {
        for (workload, key) in [
            ("Deployment/web", "k8s.deployment.name"),
            ("StatefulSet/web", "k8s.statefulset.name"),
            ("DaemonSet/web", "k8s.daemonset.name"),
            ("ReplicaSet/web", "k8s.replicaset.name"),
            ("Job/web", "k8s.job.name"),
            ("CronJob/web", "k8s.cronjob.name"),
            ("Rollout/web", "none"),
        ] {
            let entity = EntityRef { workload: workload.into(), ..EntityRef::default() };
            let record = of(Finding { id: "a1".into(), entity: Some(entity), ..Finding::default() });
            assert_eq!(text(&record, "tapio.workload").as_deref(), Some(workload));
            let named: Vec<&str> = record.attributes.iter().map(|pair| pair.key.as_str()).collect();
            let kinds = named.iter().filter(|key| key.starts_with("k8s.") && **key != "k8s.cluster.name");
            assert!(kinds.copied().eq((key != "none").then_some(key)), "{named:?}");
        }
    }

    #[test]
    fn severities_rise_and_a_withdrawal_alarms_nobody() {
        let number = |severity: &str, withdrawn| {
            of(Finding { severity: severity.into(), withdrawn, ..Finding::default() }).severity_number
        };
        let numbers: Vec<i32> = Severity::ALL.iter().map(|severity| number(severity.name(), false)).collect();
        assert_eq!(numbers, [9, 13, 15, 17, 21]);
        assert_eq!(number("critical", true), 9);
        assert_eq!(number("", false), 0);
    }

    #[test]
    fn a_record_says_when_its_state_began() {
        let stands = Finding {
            pattern: "stopped".into(),
            started_ns: 5,
            published_ns: 9,
            summary: "it stopped".into(),
            ..Finding::default()
        };
        let over = Finding { resolved_ns: 7, ..stands.clone() };
        let withdrawn = Finding { withdrawn: true, superseded_by: "b2".into(), ..over.clone() };
        for (finding, state, time_ns, body) in [
            (stands, "stands", 5, "it stopped"),
            (over, "over", 7, "it stopped"),
            (withdrawn, "withdrawn", 9, "Withdrawn: finding b2 explains it better."),
        ] {
            let record = of(finding);
            assert_eq!(text(&record, "tapio.finding.state").as_deref(), Some(state));
            assert_eq!((record.time_unix_nano, record.observed_time_unix_nano), (time_ns, 9));
            assert_eq!(record.body, Some(AnyValue { value: Some(Value::StringValue(body.into())) }));
        }
    }

    #[test]
    fn texts_are_bounded_and_have_no_control_characters() {
        let title = format!("\u{1b}[31m\n{}", "é".repeat(10_000));
        let record = of(Finding { pattern: "stopped".into(), title, ..Finding::default() });
        let title = text(&record, "tapio.finding.title").expect("it is there");
        assert!(title.chars().count() == TEXT_MAX && !title.chars().any(char::is_control), "{title}");
    }
}
