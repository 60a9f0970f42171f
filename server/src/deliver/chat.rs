//! Findings as messages of a chat.
//!
//! What enters: versions of findings. What leaves: one message for a finding, and one more when it is over, withdrawn, or says
//! something else. What must hold: names of pods and processes are plain text, whatever they hold. A storm of findings is no storm of
//! messages: they wait, and only the latest version of each comes.
//!
//! ```text
//! slack   {"text", "blocks"}: plain texts, which mention nobody and format nothing
//! teams   {"type": "message", "attachments": [an adaptive card]}: text runs, which hold no Markdown
//! ```
//!
//! Sources: <https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks>,
//! <https://docs.slack.dev/reference/block-kit/blocks>,
//! <https://learn.microsoft.com/microsoftteams/platform/webhooks-and-connectors/how-to/connectors-using>,
//! <https://adaptivecards.io/explorer/TextRun.html>.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tapio_wire::program::token_bucket::TokenBucket;
use tapio_wire::service::Finding;

use super::config::{ChatKind, ChatSection, address};
use super::receiver::Client;
use super::webhook::SinkConfigError;
use super::{Delivering, Delivery, Sink, SinkError};
use crate::render::{clean, pod};

/// Messages at once, before they are paced.
const BURST: u32 = 5;
/// Characters of a heading and of a text, for Slack.
const HEADING_MAX: usize = 150;
const TEXT_MAX: usize = 2900;

/// Posts to one channel.
pub struct Chat {
    name: String,
    section: ChatSection,
    client: Client,
    pace: Mutex<TokenBucket>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Stands,
    Over,
    Withdrawn,
}

impl State {
    fn of(finding: &Finding) -> Self {
        match finding {
            Finding { withdrawn: true, .. } => Self::Withdrawn,
            Finding { resolved_ns: 1.., .. } => Self::Over,
            _ => Self::Stands,
        }
    }
}

/// The parts of a message, without anything that a terminal or a chat would act on.
struct Message {
    heading: String,
    text: String,
    /// What it is about, and how sure it is.
    about: String,
    link: Option<String>,
}

impl Chat {
    /// Reads the TLS files; nobody is connected to.
    ///
    /// # Errors
    /// When the TLS files cannot be used.
    pub fn new(name: &str, section: &ChatSection) -> Result<Self, SinkConfigError> {
        let tls = |source| SinkConfigError::Tls { key: "deliver.chats.*.tls", source };
        let client = Client::new("deliver.chats.*", None, section.tls.clone()).map_err(tls)?;
        let pace = TokenBucket::new(BURST, f64::from(section.per_minute) / 60.0, Instant::now());
        Ok(Self { name: format!("chat-{name}"), section: section.clone(), client, pace: Mutex::new(pace) })
    }

    /// Waits until another message may be sent.
    async fn pace(&self) {
        loop {
            let taken = self.pace.lock().unwrap_or_else(PoisonError::into_inner).take(1, Instant::now());
            match taken {
                Ok(()) => return,
                Err(at) => tokio::time::sleep_until(at.into()).await,
            }
        }
    }

    fn message(&self, finding: &Finding, is_change: bool) -> Message {
        let state = State::of(finding);
        let title = match finding.title.as_str() {
            "" => format!("finding {}", finding.id),
            title => clean(title),
        };
        let heading = match (state, is_change) {
            (State::Withdrawn, _) => format!("Withdrawn: {title}"),
            (State::Over, _) => format!("Over: {title}"),
            (State::Stands, true) => format!("Changed, {}: {title}", finding.severity),
            (State::Stands, false) => format!("{}: {title}", capital(&finding.severity)),
        };
        let verdict = finding.death.as_ref().map_or("", |death| death.verdict.as_str());
        let mut text = clean(if verdict.is_empty() { &finding.summary } else { verdict });
        match state {
            State::Withdrawn if finding.superseded_by.is_empty() => text = "It does not stand any more.".into(),
            State::Withdrawn => text = format!("Finding {} explains it better.", clean(&finding.superseded_by)),
            State::Over => {}
            State::Stands => {
                if let Some(advice) = finding.advice.first() {
                    text.push_str(&format!("\nWhat to do: {}", clean(advice)));
                }
            }
        }
        let entity = finding.entity.clone().unwrap_or_default();
        let node = if entity.node.is_empty() { String::new() } else { format!("node {}", clean(&entity.node)) };
        let possible = if finding.possible { ", possible" } else { "" };
        let sure = match finding.confidence {
            0.0 => String::new(),
            confidence => format!("{:.0} % sure{possible}", confidence * 100.0),
        };
        let subject = pod(&entity).unwrap_or_else(|| clean(&entity.name));
        let mut about = vec![subject, clean(&entity.workload), node, sure, format!("tapioctl finding {}", finding.id)];
        about.retain(|part| !part.is_empty());
        let page = self.section.page_url.as_ref();
        let link = page.map(|page| format!("{}/f/{}", page.trim_end_matches('/'), finding.id));
        Message {
            heading: cut(&heading, HEADING_MAX - 1),
            text: cut(&text, TEXT_MAX - 1),
            about: about.join(" · "),
            link,
        }
    }

    async fn post(&self, delivery: &Delivery) -> Result<(), SinkError> {
        // Whoever deals with it is not called again before it is over.
        let is_dealt_with = delivery.finding.acknowledged.is_some() && State::of(&delivery.finding) == State::Stands;
        if delivery.is_known || is_dealt_with {
            return Ok(());
        }
        let message = self.message(&delivery.finding, !delivery.former.is_empty());
        let body = match self.section.kind {
            ChatKind::Slack => slack(&message),
            ChatKind::Teams => teams(&message),
        };
        let path = self.section.url_file.display();
        let away = |why: &dyn std::fmt::Display| SinkError::Away(format!("url_file {path}: {why}"));
        let url = std::fs::read_to_string(&self.section.url_file).map_err(|error| away(&error))?;
        // The address is a secret: it is in no message.
        let address = address(url.trim(), "nothing").map_err(|_| away(&"it holds no address, as https://host/path"))?;
        let is_here = matches!(address.host.as_str(), "localhost" | "127.0.0.1" | "::1");
        if !address.has_tls && !is_here {
            return Err(away(&"whoever reads it in the clear may write to the chat: use https://"));
        }
        self.pace().await;
        self.client.post(&address, &address.path, body.to_string(), &[]).await
    }
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// The beginning of a text that is too long.
pub(super) fn cut(text: &str, characters_max: usize) -> String {
    match text.char_indices().nth(characters_max - 1) {
        Some((at, _)) if text[at..].chars().count() > 1 => format!("{}…", &text[..at]),
        _ => text.to_owned(),
    }
}

/// Escapes the characters by which Slack's texts mention people and link, within a length that Slack takes.
fn escaped(text: &str, characters_max: usize) -> String {
    let mut out = String::new();
    let mut left = characters_max - 1;
    for letter in text.chars() {
        let mut own = [0; 4];
        let piece = match letter {
            '&' => "&amp;",
            '<' => "&lt;",
            '>' => "&gt;",
            letter => letter.encode_utf8(&mut own),
        };
        let length = piece.chars().count();
        if length > left {
            out.push('…');
            break;
        }
        left -= length;
        out.push_str(piece);
    }
    out
}

fn slack(message: &Message) -> Value {
    let plain = |text: &str, max: usize| json!({"type": "plain_text", "text": escaped(text, max), "emoji": false});
    let mut blocks = vec![json!({"type": "header", "text": plain(&message.heading, HEADING_MAX)})];
    if !message.text.is_empty() {
        blocks.push(json!({"type": "section", "text": plain(&message.text, TEXT_MAX)}));
    }
    blocks.push(json!({"type": "context", "elements": [plain(&message.about, TEXT_MAX)]}));
    if let Some(link) = &message.link {
        let text = json!({"type": "mrkdwn", "text": format!("<{link}|Evidence and timeline>")});
        blocks.push(json!({"type": "section", "text": text}));
    }
    json!({"text": plain(&message.heading, HEADING_MAX)["text"], "blocks": blocks})
}

fn teams(message: &Message) -> Value {
    let run = |text: &str, extra: Value| {
        let mut run = json!({"type": "TextRun", "text": text});
        if let (Some(run), Some(extra)) = (run.as_object_mut(), extra.as_object()) {
            run.extend(extra.clone());
        }
        json!({"type": "RichTextBlock", "inlines": [run]})
    };
    let mut body = vec![run(&message.heading, json!({"size": "Medium", "weight": "Bolder"}))];
    body.extend(message.text.lines().map(|line| run(line, json!({}))));
    body.push(run(&message.about, json!({"isSubtle": true, "size": "Small"})));
    let actions = message
        .link
        .iter()
        .map(|link| json!({"type": "Action.OpenUrl", "title": "Evidence and timeline", "url": link}));
    let card = json!({
        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
        "type": "AdaptiveCard",
        "version": "1.4",
        "body": body,
        "actions": actions.collect::<Vec<_>>(),
    });
    let attachment =
        json!({"contentType": "application/vnd.microsoft.card.adaptive", "contentUrl": null, "content": card});
    json!({"type": "message", "attachments": [attachment]})
}

impl Sink for Chat {
    fn name(&self) -> &str {
        &self.name
    }

    fn timeout(&self) -> Duration {
        // One message may have to wait for its turn.
        self.section.timeout + Duration::from_secs(60) / self.section.per_minute.max(1)
    }

    fn wants(&self, finding: &Finding) -> bool {
        self.section.only.names(finding)
    }

    /// What a reader learns from a message: as long as it is the same, there is no other message.
    fn note(&self, finding: &Finding) -> Option<String> {
        let Finding { pattern, severity, possible, .. } = finding;
        Some(format!("{pattern} {severity} {possible} {:?}", State::of(finding)))
    }

    fn deliver<'a>(&'a self, delivery: &'a Delivery) -> Delivering<'a> {
        Box::pin(self.post(delivery))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(page: Option<&str>) -> Chat {
        Chat::new("oncall", &ChatSection { page_url: page.map(Into::into), ..ChatSection::default() }).expect("no TLS")
    }

    fn hostile() -> Finding {
        Finding {
            id: "23841bace3".into(),
            title: "shop/web <!channel> & *bold* `x`\u{202e}\u{1b}[2J was killed".into(),
            severity: "high".into(),
            summary: "[click](https://evil.example) <@U1>".into(),
            advice: vec!["raise the limit".into()],
            confidence: 0.95,
            ..Finding::default()
        }
    }

    #[test]
    fn hostile_names_mention_nobody_and_format_nothing() {
        let chat = chat(Some("https://tapio.example.com/"));
        let message = chat.message(&hostile(), false);
        assert!(!message.heading.contains(['\u{202e}', '\u{1b}']), "{}", message.heading);
        let posted = slack(&message);
        let texts = posted["blocks"].as_array().expect("a list").iter().flat_map(|block| {
            let of_text = block.get("text").into_iter();
            of_text.chain(block["elements"].as_array().into_iter().flatten()).cloned().collect::<Vec<Value>>()
        });
        let (formatted, plain): (Vec<Value>, Vec<Value>) = texts.partition(|text| text["type"] == "mrkdwn");
        assert_eq!(formatted.len(), 1, "the link alone: {posted:#}");
        assert_eq!(formatted[0]["text"], "<https://tapio.example.com/f/23841bace3|Evidence and timeline>");
        for text in plain.iter().map(|text| &text["text"]).chain([&posted["text"]]) {
            assert!(!text.as_str().expect("a text").contains(['<', '>']), "{text}");
        }
        let card = teams(&message);
        let body = card["attachments"][0]["content"]["body"].as_array().expect("a list");
        assert!(body.iter().all(|block| block["type"] == "RichTextBlock"), "{card:#}");
        assert_eq!(body[1]["inlines"][0]["text"], "[click](https://evil.example) <@U1>");
        assert_eq!(body[2]["inlines"][0]["text"], "What to do: raise the limit");
    }

    #[test]
    fn texts_are_cut_to_what_a_chat_takes() {
        let long = Finding { title: "é".repeat(400), summary: "w".repeat(9000), ..hostile() };
        let message = chat(None).message(&long, false);
        assert_eq!((message.heading.chars().count(), message.text.chars().count()), (HEADING_MAX - 1, TEXT_MAX - 1));
        // Escapes count too, and none is cut in two.
        let heading = escaped(&"<".repeat(100), HEADING_MAX);
        assert!(heading.chars().count() <= HEADING_MAX && heading.ends_with("&lt;…"), "{heading}");
        assert_eq!(escaped("a & b", HEADING_MAX), "a &amp; b");
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("abcd", 3), "ab…");
    }

    #[test]
    fn a_heading_says_what_has_become_of_it() {
        let (chat, finding) = (chat(None), Finding { title: "web hangs".into(), ..hostile() });
        let heading = |finding: &Finding, is_change: bool| chat.message(finding, is_change).heading;
        assert_eq!(heading(&finding, false), "High: web hangs");
        assert_eq!(
            heading(&Finding { severity: "critical".into(), ..finding.clone() }, true),
            "Changed, critical: web hangs"
        );
        assert_eq!(heading(&Finding { resolved_ns: 5, ..finding.clone() }, true), "Over: web hangs");
        let gone = Finding { id: "1a".into(), withdrawn: true, superseded_by: "2b".into(), ..Finding::default() };
        let message = chat.message(&gone, false);
        assert_eq!(
            (message.heading.as_str(), message.text.as_str()),
            ("Withdrawn: finding 1a", "Finding 2b explains it better.")
        );
    }
}
