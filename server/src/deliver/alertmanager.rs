//! Findings as alerts of Alertmanager.
//!
//! What enters: versions of findings. What leaves: one alert for each, by the API that Prometheus uses. What must hold: an alert
//! fires while its finding stands, also after Alertmanager has forgotten it, and is resolved when the finding is withdrawn, over, or
//! silenced.
//!
//! ```text
//! POST <url>/api/v2/alerts   [{"labels", "annotations", "startsAt", "endsAt", "generatorURL"}]
//! ```
//!
//! Source: <https://github.com/prometheus/alertmanager/blob/v0.25.0/api/v2/openapi.yaml>. Labels tell alerts apart, so the finding's id is
//! among them. When a better cause is found for the same death, the labels change: then the former alert is resolved by the same request.
//! The labels are kept with the marks, so that the next leader resolves what this one had sent.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use serde_json::{Value, json};
use tapio_wire::service::{Finding, Silence};

use super::config::AlertmanagerSection;
use super::marks::now_seconds;
use super::receiver::Receiver;
use super::webhook::SinkConfigError;
use super::{Delivering, Delivery, Sink, SinkError, WhenSilenced};
use crate::render::{clean, rfc3339};

const NS: u64 = 1_000_000_000;
/// Minimum time for which a late alert fires: a group waits before it notifies.
const FIRES_AT_LEAST: Duration = Duration::from_secs(300);
/// How long the others may take once an instance has an alert.
const OTHERS_TIMEOUT: Duration = Duration::from_secs(1);
/// Number of pauses within which a standing alert must be sent again.
const PAUSES: u32 = 4;

/// Posts to each of the configured instances.
pub struct Alertmanager {
    receivers: Vec<Receiver>,
    section: AlertmanagerSection,
    cluster: String,
}

type Labels = BTreeMap<String, String>;

impl Alertmanager {
    /// Reads the TLS files; nobody is connected to.
    ///
    /// # Errors
    /// When an address or the TLS files cannot be used.
    pub fn new(section: &AlertmanagerSection, cluster: &str) -> Result<Self, SinkConfigError> {
        let url = |problem| SinkConfigError::Url { key: "deliver.alertmanager.urls", problem };
        let tls = |source| SinkConfigError::Tls { key: "deliver.alertmanager.tls", source };
        let mut receivers = Vec::new();
        for address in section.addresses().map_err(url)? {
            let (token_file, files) = (section.token_file.clone(), section.tls.clone().filter(|_| address.has_tls));
            receivers.push(Receiver::new("deliver.alertmanager", address, token_file, files).map_err(tls)?);
        }
        Ok(Self { receivers, section: section.clone(), cluster: cluster.into() })
    }

    fn labels(&self, finding: &Finding) -> Labels {
        let entity = finding.entity.clone().unwrap_or_default();
        let mut labels = BTreeMap::from([
            ("alertname".to_owned(), alert_name(&finding.pattern)),
            ("pattern".to_owned(), finding.pattern.clone()),
            ("finding".to_owned(), finding.id.clone()),
            ("severity".to_owned(), finding.severity.clone()),
            ("cluster".to_owned(), self.cluster.clone()),
            ("namespace".to_owned(), entity.namespace),
            ("workload".to_owned(), entity.workload),
            ("pod".to_owned(), entity.pod),
            ("container".to_owned(), entity.container),
            ("node".to_owned(), entity.node),
        ]);
        // Outside of Kubernetes nothing else says what it is about.
        if labels["pod"].is_empty() {
            labels.insert("entity".into(), entity.name);
        }
        labels.extend(self.section.labels.clone());
        labels.retain(|_, value| !value.is_empty());
        labels
    }

    fn alert(&self, finding: &Finding, labels: &Labels, now_ns: u64, is_known: bool) -> Value {
        let mut annotations = json!({
            "title": finding.title,
            "summary": finding.summary,
            "verdict": finding.death.as_ref().map_or("", |death| death.verdict.as_str()),
            "advice": finding.advice.first().map_or("", String::as_str),
            "certainty": format!("{:.0} %{}", finding.confidence * 100.0, if finding.possible { ", possible" } else { "" }),
            "count": finding.count.to_string(),
            "silenced": finding.silence.as_ref().map_or_else(String::new, said),
            "acknowledged": finding.acknowledged.as_ref().map_or_else(String::new, said),
        });
        if let Some(annotations) = annotations.as_object_mut() {
            annotations.retain(|_, value| value != "");
        }
        json!({
            "labels": labels,
            "annotations": annotations,
            "startsAt": rfc3339(if finding.pattern.is_empty() { now_ns } else { finding.started_ns.min(now_ns) }),
            "endsAt": rfc3339(self.ends_ns(finding, now_ns, is_known)),
            "generatorURL": self.section.page_url.as_ref().map_or_else(String::new, |page| {
                format!("{}/f/{}", page.trim_end_matches('/'), finding.id)
            }),
        })
    }

    /// Until when it fires. A state fires until it is over; an event for a while.
    fn ends_ns(&self, finding: &Finding, now_ns: u64, is_known: bool) -> u64 {
        if finding.withdrawn || finding.resolved_ns > 0 || finding.silence.is_some() {
            return now_ns;
        }
        let sent_again = now_ns.saturating_add((self.section.repeat * PAUSES).as_nanos() as u64);
        if finding.ongoing {
            return sent_again;
        }
        let fires = self.section.fires_for.as_nanos() as u64;
        let ends_ns = finding.published_ns.saturating_add(fires);
        let at_least = now_ns.saturating_add(FIRES_AT_LEAST.min(self.section.fires_for).as_nanos() as u64);
        if is_known { ends_ns.max(now_ns) } else { ends_ns.max(at_least) }
    }

    /// The alerts of one request: the finding's, and the end of what it was before.
    fn alerts(&self, delivery: &Delivery, now_ns: u64) -> Vec<Value> {
        let finding = &delivery.finding;
        let mut alerts = Vec::new();
        // Of what was taken over while nobody led, the id alone is known, and by which labels it fires.
        if !finding.pattern.is_empty() {
            alerts.push(self.alert(finding, &self.labels(finding), now_ns, delivery.is_known));
        }
        let over = Finding { withdrawn: true, ..(**finding).clone() };
        let former = delivery.former.iter().filter_map(|note| serde_json::from_str(note).ok());
        alerts.extend(former.map(|labels: Labels| self.alert(&over, &labels, now_ns, true)));
        alerts
    }

    /// Posts to every instance. They share what they notify, and each gets what stands again: one that has it is enough.
    async fn post(&self, body: &str) -> Result<(), SinkError> {
        // Before the whole delivery is given up for one that does not answer.
        let limit = self.section.timeout / 2;
        let late = |_| Err(SinkError::Away(format!("no answer within {limit:?}")));
        let mut answers: FuturesUnordered<_> = self
            .receivers
            .iter()
            .map(|receiver| async move {
                let post = receiver.post("/api/v2/alerts", body.to_owned(), &[]);
                tokio::time::timeout(limit, post).await.unwrap_or_else(late)
            })
            .collect();
        let mut failed = SinkError::Away("there is no address".into());
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(()) => {
                    let others = async { while answers.next().await.is_some() {} };
                    // Whoever is late gets it with the next repeat.
                    let _ = tokio::time::timeout(OTHERS_TIMEOUT, others).await;
                    return Ok(());
                }
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }
}

/// Who said so, until when, and why.
fn said(silence: &Silence) -> String {
    let by = if silence.by.is_empty() { String::new() } else { format!("by {}, ", clean(&silence.by)) };
    let why = if silence.reason.is_empty() { String::new() } else { format!(": {}", clean(&silence.reason)) };
    format!("{by}until {}{why}", rfc3339(silence.until_ns))
}

/// `TapioMemoryLimitKill` for `memory-limit-kill`.
pub(super) fn alert_name(pattern: &str) -> String {
    let words = pattern.split(['-', '_']).map(|word| {
        let mut letters = word.chars();
        letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
    });
    std::iter::once("Tapio".to_owned()).chain(words).collect()
}

impl Sink for Alertmanager {
    fn name(&self) -> &str {
        "alertmanager"
    }

    fn timeout(&self) -> Duration {
        self.section.timeout
    }

    fn deliver<'a>(&'a self, delivery: &'a Delivery) -> Delivering<'a> {
        Box::pin(async move {
            match self.alerts(delivery, now_seconds() * NS) {
                // An earlier version of Tapio kept no labels: the alert runs out by itself.
                alerts if alerts.is_empty() => Ok(()),
                alerts => self.post(&Value::Array(alerts).to_string()).await,
            }
        })
    }

    fn wants(&self, finding: &Finding) -> bool {
        self.section.only.names(finding)
    }

    fn takes_unknown_withdrawals(&self) -> bool {
        true
    }

    fn when_silenced(&self) -> WhenSilenced {
        WhenSilenced::End
    }

    /// The labels, by which Alertmanager knows an alert.
    fn note(&self, finding: &Finding) -> Option<String> {
        // Texts by texts: nothing that JSON cannot hold.
        (!finding.pattern.is_empty()).then(|| serde_json::to_string(&self.labels(finding)).unwrap_or_default())
    }

    fn repeats(&self) -> Option<Duration> {
        Some(self.section.repeat)
    }

    fn stands(&self, finding: &Finding) -> bool {
        let fires_ns = self.section.fires_for.as_nanos() as u64;
        let is_on = finding.ongoing
            || finding.resolved_ns == 0 && finding.published_ns.saturating_add(fires_ns) > now_seconds() * NS;
        is_on && finding.silence.is_none()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use tapio_wire::service::EntityRef;

    fn delivery(finding: Finding, former: Vec<String>) -> Delivery {
        Delivery { id: "a.1".into(), revision: 1, term: 1, finding: Arc::new(finding), is_known: false, former }
    }

    #[tokio::test]
    async fn a_withdrawal_that_names_nothing_is_no_alert() {
        let section = AlertmanagerSection { urls: vec!["http://127.0.0.1:1".into()], ..AlertmanagerSection::default() };
        let sink = Alertmanager::new(&section, "prod").expect("a good address");
        let of = |pattern: &str| {
            let finding = Finding { id: "a".into(), pattern: pattern.into(), withdrawn: true, ..Finding::default() };
            delivery(finding, Vec::new())
        };
        assert_eq!(sink.deliver(&of("")).await, Ok(()));
        assert!(matches!(sink.deliver(&of("crashed")).await, Err(SinkError::Away(_))));
        let former = delivery(Finding { withdrawn: true, ..Finding::default() }, vec![r#"{"alertname":"A"}"#.into()]);
        assert!(matches!(sink.deliver(&former).await, Err(SinkError::Away(_))), "by its labels its end can be said");
    }

    #[test]
    fn an_alert_fires_while_its_finding_stands() {
        let section = AlertmanagerSection { urls: vec!["http://a:9093".into()], ..AlertmanagerSection::default() };
        let sink = Alertmanager::new(&section, "prod").expect("a good address");
        let entity =
            EntityRef { namespace: "shop".into(), pod: "web-0".into(), node: "n1".into(), ..EntityRef::default() };
        let now_ns = 1_000_000 * NS;
        let death = Finding {
            pattern: "memory-limit-kill".into(),
            severity: "high".into(),
            entity: Some(entity),
            published_ns: now_ns - 60 * NS,
            ..Finding::default()
        };
        let labels = sink.labels(&death);
        assert_eq!(labels["alertname"], "TapioMemoryLimitKill");
        assert_eq!((labels["pod"].as_str(), labels.get("workload"), labels.get("entity")), ("web-0", None, None));
        assert_eq!(sink.ends_ns(&death, now_ns, false), death.published_ns + 900 * NS);
        // Alertmanager was away for an hour: nobody would hear of one that is over when it comes.
        let late = Finding { published_ns: now_ns - 3600 * NS, ..death.clone() };
        assert_eq!(sink.ends_ns(&late, now_ns, false), now_ns + 300 * NS);
        assert_eq!(sink.ends_ns(&late, now_ns, true), now_ns);
        let state = Finding { ongoing: true, ..death.clone() };
        assert_eq!(sink.ends_ns(&state, now_ns, true), now_ns + 240 * NS);
        // Who silences it here wants it to end there, and not to fire until it runs out.
        let silence = Silence { by: "jane\u{1b}[2J".into(), reason: "a rehearsal".into(), ..Silence::default() };
        let silenced = Finding { silence: Some(silence), ..state.clone() };
        assert!(sink.ends_ns(&silenced, now_ns, true) == now_ns && !sink.stands(&silenced) && sink.stands(&state));
        let said = sink.alert(&silenced, &labels, now_ns, true)["annotations"]["silenced"].to_string();
        assert!(said.contains("by jane\u{fffd}[2J, until") && said.contains(": a rehearsal"), "{said}");
        for over in [Finding { resolved_ns: 1, ..death.clone() }, Finding { withdrawn: true, ..death.clone() }] {
            assert_eq!(sink.ends_ns(&over, now_ns, false), now_ns);
        }
        // A better cause of the same death takes the place of the former one.
        let former = sink.note(&death).into_iter().collect();
        let better = Finding { pattern: "pod-limit-kill".into(), ..death };
        let alerts = sink.alerts(&delivery(better, former), now_ns);
        let of = |at: usize, part: &str, key: &str| alerts[at][part][key].as_str().map(str::to_owned);
        assert_eq!(of(0, "labels", "alertname").as_deref(), Some("TapioPodLimitKill"));
        assert_eq!(of(1, "labels", "alertname").as_deref(), Some("TapioMemoryLimitKill"));
        assert_eq!(alerts[1]["endsAt"], rfc3339(now_ns));
    }
}
