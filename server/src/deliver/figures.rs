//! How each sink stands: metrics, and what the status says.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use tapio_wire::service::{DeliveryItem, DeliveryStatus};

use super::chat::cut;
use super::marks::{Known, Mark, MarkState, now_seconds};
use crate::render::clean;

const NS: u64 = 1_000_000_000;

/// The sinks that there are: their series are there before anything is delivered.
const SINKS: [&str; 4] = ["webhook", "alertmanager", "kubernetes-events", "otlp"];

/// What deliveries move, by sink.
#[derive(Clone)]
pub struct DeliverMetrics {
    delivered: IntCounterVec,
    repeated: IntCounterVec,
    failed: IntCounterVec,
    refused: IntCounterVec,
    lost: IntCounterVec,
    waiting: IntGaugeVec,
}

impl DeliverMetrics {
    /// Registers them.
    ///
    /// # Errors
    /// When one of the names is taken.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| {
            let counter = IntCounterVec::new(Opts::new(name, help), &["sink"])?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let waiting = Opts::new(
            "tapio_server_deliveries_waiting",
            "Versions of findings that wait to be delivered, on the server that leads.",
        );
        let waiting = IntGaugeVec::new(waiting, &["sink"])?;
        registry.register(Box::new(waiting.clone()))?;
        let metrics = Self {
            delivered: counter(
                "tapio_server_deliveries_total",
                "Versions of findings that a receiver has accepted, repeated ones included.",
            )?,
            repeated: counter(
                "tapio_server_deliveries_repeated_total",
                "Deliveries sent again under the same id; the receiver may have them twice.",
            )?,
            failed: counter(
                "tapio_server_delivery_failures_total",
                "Attempts to deliver that failed or whose outcome is unknown; the server retries them.",
            )?,
            refused: counter(
                "tapio_server_deliveries_refused_total",
                "Deliveries abandoned because the receiver refused them.",
            )?,
            lost: counter(
                "tapio_server_deliveries_lost_total",
                "Deliveries dropped because the queue was full while the receiver was unreachable; the oldest are dropped first.",
            )?,
            waiting,
        };
        SINKS.iter().for_each(|sink| drop(metrics.of(sink)));
        Ok(metrics)
    }

    pub(super) fn of(&self, sink: &str) -> Figures {
        let labels = [sink];
        Figures {
            sink: sink.to_owned(),
            delivered: self.delivered.with_label_values(&labels),
            repeated: self.repeated.with_label_values(&labels),
            failed: self.failed.with_label_values(&labels),
            refused: self.refused.with_label_values(&labels),
            lost: self.lost.with_label_values(&labels),
            waiting: self.waiting.with_label_values(&labels),
            standing: Mutex::default(),
        }
    }
}

/// Number of deliveries that the status names of each kind.
pub(super) const NAMED_MAX: usize = 20;
/// Characters of a reason.
const REASON_MAX: usize = 300;
/// Bytes of a reason: a mark with all its notes must have room in NATS, or the delivery would never be closed.
const REASON_BYTES_MAX: usize = 600;

#[derive(Default)]
struct Standing {
    trouble: Option<String>,
    delivered_at: u64,
    queued: Vec<DeliveryItem>,
    failure: Option<DeliveryItem>,
    /// The latest first.
    given_up: VecDeque<DeliveryItem>,
}

/// What a status and a mark say of a failure: a receiver's words, without control characters and of bounded length.
pub(super) fn reason(error: &str) -> String {
    let mut reason = cut(&clean(error), REASON_MAX);
    reason.truncate(reason.floor_char_boundary(REASON_BYTES_MAX));
    reason
}

/// A finding that waits.
pub(super) fn queued(finding: &str, published_ns: u64) -> DeliveryItem {
    DeliveryItem { finding: finding.to_owned(), at_ns: published_ns, ..DeliveryItem::default() }
}

/// Figures of one sink.
pub(super) struct Figures {
    sink: String,
    pub delivered: IntCounter,
    pub repeated: IntCounter,
    pub failed: IntCounter,
    pub refused: IntCounter,
    pub lost: IntCounter,
    pub waiting: IntGauge,
    standing: Mutex<Standing>,
}

impl Figures {
    /// A delivery was made.
    pub fn delivered(&self, finding: &str, is_repeat: bool) {
        self.delivered.inc();
        if is_repeat {
            self.repeated.inc();
        }
        let mut standing = self.standing();
        standing.delivered_at = now_seconds();
        standing.given_up.retain(|known| known.finding != finding);
        drop(standing);
        self.set_trouble(None);
    }

    /// This server leads no more: its successor says what waits, and what was given up.
    pub fn ended(&self) {
        self.set_queued(0, Vec::new());
        self.standing().given_up.clear();
        self.set_trouble(None);
    }

    /// What waits, and the first of it: [`NAMED_MAX`] at the most.
    pub fn set_queued(&self, count: usize, first: Vec<DeliveryItem>) {
        self.waiting.set(count as i64);
        self.standing().queued = first;
    }

    /// An attempt failed.
    pub fn failed(&self, finding: &str, revision: u32, error: &str) {
        self.failed.inc();
        let item =
            DeliveryItem { finding: finding.to_owned(), revision, reason: reason(error), at_ns: now_seconds() * NS };
        self.standing().failure = Some(item);
        self.set_trouble(Some(error.to_owned()));
    }

    /// A delivery was given up, now or in an earlier term.
    pub fn gave_up(&self, finding: &str, mark: &Mark) {
        let item = DeliveryItem {
            finding: finding.to_owned(),
            revision: mark.revision,
            reason: mark.reason.clone(),
            // A file may say anything.
            at_ns: mark.at.saturating_mul(NS),
        };
        let mut standing = self.standing();
        standing.given_up.retain(|known| known.finding != item.finding);
        standing.given_up.push_front(item);
        standing.given_up.truncate(NAMED_MAX);
    }

    /// Shows what earlier terms have given up.
    pub fn knows(&self, marks: &HashMap<String, Known>) {
        let refused = marks.iter().filter(|(_, known)| known.mark.state == MarkState::Refused);
        let mut refused: Vec<(&String, &Mark)> = refused.map(|(id, known)| (id, &known.mark)).collect();
        refused.sort_by_key(|(id, mark)| (mark.at, *id));
        self.standing().given_up.clear();
        let skipped = refused.len().saturating_sub(NAMED_MAX);
        refused.into_iter().skip(skipped).for_each(|(id, mark)| self.gave_up(id, mark));
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why nothing is delivered now; it is logged when it is another reason than before.
    pub fn set_trouble(&self, trouble: Option<String>) {
        let mut standing = self.standing();
        if standing.trouble == trouble {
            return;
        }
        match &trouble {
            Some(error) => tracing::warn!(sink = self.sink, error, "cannot deliver findings: retrying"),
            None => tracing::info!(sink = self.sink, "delivering findings again"),
        }
        standing.trouble = trouble;
    }

    pub fn status(&self) -> DeliveryStatus {
        let standing = self.standing();
        DeliveryStatus {
            sink: self.sink.clone(),
            delivered: self.delivered.get(),
            repeated: self.repeated.get(),
            failed: self.failed.get(),
            refused: self.refused.get(),
            lost: self.lost.get(),
            waiting: self.waiting.get().max(0) as u64,
            trouble: standing.trouble.clone().unwrap_or_default(),
            delivered_ns: standing.delivered_at * NS,
            queued: standing.queued.clone(),
            failure: standing.failure.clone(),
            given_up: standing.given_up.iter().cloned().collect(),
            server: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(revision: u32, at: u64) -> Known {
        let mark = Mark { revision, at, state: MarkState::Refused, reason: "HTTP 400".into(), ..Mark::unreadable() };
        Known { mark, place: 1 }
    }

    #[test]
    fn a_reason_is_plain_text_with_room_in_a_mark() {
        assert_eq!(reason("too\u{1b}[2J old"), "too\u{fffd}[2J old");
        let long = reason(&"\u{1f480}".repeat(1000));
        assert!(long.len() <= REASON_BYTES_MAX && long.starts_with('\u{1f480}'), "{long}");
    }

    #[test]
    fn what_was_given_up_is_known_until_it_arrives() {
        let figures = DeliverMetrics::register(&Registry::new()).expect("fresh names").of("webhook");
        let mut marks: HashMap<String, Known> = (1..=30).map(|n| (format!("f{n}"), refused(n, n.into()))).collect();
        marks.insert("odd".into(), refused(1, u64::MAX));
        marks.insert("open".into(), Known { mark: Mark::unreadable(), place: 1 });
        figures.knows(&marks);
        let named = |figures: &Figures| -> Vec<String> {
            figures.status().given_up.into_iter().map(|item| item.finding).collect()
        };
        assert_eq!(named(&figures)[..2], ["odd", "f30"], "the latest first");
        assert_eq!(named(&figures).len(), NAMED_MAX);
        figures.gave_up("f29", &refused(40, 100).mark);
        assert_eq!((figures.status().given_up[0].revision, named(&figures).len()), (40, NAMED_MAX));
        figures.delivered("f29", false);
        assert!(!named(&figures).contains(&"f29".to_owned()), "{:?}", named(&figures));
        figures.ended();
        assert!(named(&figures).is_empty());
    }
}
