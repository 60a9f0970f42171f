//! `/silences`: of what nobody is notified, and who deals with which finding; forms that say so.
//!
//! What enters: forms of this server's own pages, of whoever may silence ([`super::admit`] asks). What leaves: the list, after each form.

use std::sync::Arc;

use axum::extract::rejection::{FormRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::response::Redirect;
use axum::{Extension, Form};
use maud::{Markup, html};
use serde::Deserialize;
use tapio_wire::service::{AcknowledgeRequest, AddSilenceRequest, Finding, Silence};

use super::frame::{self, PageHead};
use super::{Failure, Page, Pages, now_ns, parts};
use crate::auth::Caller;
use crate::query;
use crate::render;
use crate::silences::{REASON_CHARS_MAX, SilenceError, is_active, summary};

/// How long the forms offer to silence.
const FOR: [(&str, &str); 6] = [
    ("30m", "30 minutes"),
    ("2h", "2 hours"),
    ("8h", "8 hours"),
    ("1d", "a day"),
    ("7d", "a week"),
    ("30d", "30 days"),
];

/// What the form is filled with at first.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Prefilled {
    pattern: String,
    namespace: String,
    workload: String,
}

/// The page.
pub async fn page(State(pages): State<Pages>, asked: Result<Query<Prefilled>, QueryRejection>) -> Page {
    let Query(asked) = asked.map_err(|rejection| Failure::usage(rejection.body_text()))?;
    let now_ns = now_ns();
    let all = pages.silences.list(true);
    let (active, over): (Vec<_>, Vec<_>) = all.into_iter().partition(|silence| is_active(silence, now_ns));
    let main = html! {
        h1 { "Silences and acknowledgements" }
        p.quiet {
            "Chats, webhooks and Alertmanager hear nothing of a finding that is silenced. It stays in every list, with a mark."
        }
        section #active {
            h2 { "Hold now" }
            @if active.is_empty() { p { "Nothing is silenced or acknowledged." } }
            @else { (table(&active, true)) }
        }
        (form(&asked))
        @if !over.is_empty() {
            details { summary { "Over in the last days" } (table(&over, false)) }
        }
    };
    Ok(frame::page(PageHead { title: "Silences", at: "/silences", follows: "" }, &main))
}

fn table(silences: &[Silence], may_end: bool) -> Markup {
    html! {
        div.wide tabindex="0" role="region" aria-label=(if may_end { "What holds now" } else { "What is over" }) {
            table {
                thead {
                    tr {
                        th scope="col" { "Of" } th scope="col" { "Until" } th scope="col" { "By" } th scope="col" { "Why" }
                        @if may_end { th scope="col" { "End" } }
                    }
                }
                tbody { @for silence in silences { (row(silence, may_end)) } }
            }
        }
    }
}

fn row(silence: &Silence, may_end: bool) -> Markup {
    let until_ns = if silence.ended_ns > 0 { silence.ended_ns } else { silence.until_ns };
    html! {
        tr {
            td.name {
                @if silence.finding.is_empty() { (parts::cut(&summary(silence))) }
                @else { "dealt with: " a href={ "/f/" (parts::encoded(&silence.finding)) } { "finding " (silence.finding) } }
            }
            td.time {
                (render::for_people(until_ns)[..19])
                @if silence.ended_ns > 0 { " ended" @if !silence.ended_by.is_empty() { " by " (silence.ended_by) } }
            }
            td.name { (if silence.by.is_empty() { "-" } else { &silence.by }) }
            td.text { (silence.reason) }
            @if may_end {
                td {
                    form method="post" action={ "/silences/" (parts::encoded(&silence.id)) "/end" } {
                        button type="submit" aria-label={ "End " (parts::cut(&summary(silence))) } { "End" }
                    }
                }
            }
        }
    }
}

fn form(asked: &Prefilled) -> Markup {
    let text = |name: &str, label: &str, value: &str| {
        html! {
            div {
                label for=(name) { (label) }
                input id=(name) name=(name) value=(value) autocomplete="off" spellcheck="false" maxlength="253";
            }
        }
    };
    html! {
        section {
            h2 { "Silence" }
            form.filters #silence method="post" action="/silences" aria-label="Silence" {
                (text("pattern", "Pattern (* for anything)", &asked.pattern))
                (text("namespace", "Namespace", &asked.namespace))
                (text("workload", "Workload", &asked.workload))
                (lasting("until", "2h"))
                div {
                    label for="reason" { "Why" }
                    input id="reason" name="reason" required autocomplete="off" maxlength=(REASON_CHARS_MAX);
                }
                button type="submit" { "Silence" }
            }
            p.quiet { "What is left empty may be anything; one of the first three is needed. A finding must match all that is given." }
        }
    }
}

fn lasting(id: &str, chosen: &str) -> Markup {
    html! {
        div {
            label for=(id) { "For" }
            select id=(id) name="until" {
                @for (value, label) in FOR { option value=(value) selected[value == chosen] { (label) } }
            }
        }
    }
}

/// What may be said of one finding.
pub fn of_finding(finding: &Finding) -> Markup {
    let entity = finding.entity.clone().unwrap_or_default();
    let filled = [("pattern", &finding.pattern), ("namespace", &entity.namespace), ("workload", &entity.workload)];
    let filled: Vec<_> = filled
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{name}={}", parts::encoded(value)))
        .collect();
    html! {
        section {
            h2 { "Notifications" }
            @if finding.acknowledged.is_none() {
                form.filters #acknowledge method="post" action={ "/f/" (parts::encoded(&finding.id)) "/acknowledge" } {
                    (lasting("acknowledge-until", "1d"))
                    div {
                        label for="acknowledge-reason" { "Note" }
                        input id="acknowledge-reason" name="reason" autocomplete="off" maxlength=(REASON_CHARS_MAX);
                    }
                    button type="submit" { "I deal with it" }
                }
            }
            p { a href={ "/silences?" (filled.join("&")) } { "Silence what is like this" } }
        }
    }
}

/// What a form sends.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Sent {
    pattern: String,
    namespace: String,
    workload: String,
    until: String,
    reason: String,
}

type Answer = Result<Redirect, Failure>;

fn read(sent: Result<Form<Sent>, FormRejection>) -> Result<(Sent, u64), Failure> {
    let Form(sent) =
        sent.map_err(|rejection| Failure { status: rejection.status(), message: rejection.body_text() })?;
    let until_ns = render::parse_until(&sent.until, now_ns()).map_err(Failure::usage)?;
    Ok((sent, until_ns))
}

fn failure(error: &SilenceError) -> Failure {
    of_status(&query::status_of(error))
}

fn of_status(status: &tonic::Status) -> Failure {
    let code = match status.code() {
        tonic::Code::NotFound => axum::http::StatusCode::NOT_FOUND,
        tonic::Code::InvalidArgument => axum::http::StatusCode::BAD_REQUEST,
        _ => axum::http::StatusCode::SERVICE_UNAVAILABLE,
    };
    Failure { status: code, message: status.message().to_owned() }
}

/// `POST /silences`
pub async fn add(
    State(pages): State<Pages>,
    Extension(caller): Extension<Arc<Caller>>,
    sent: Result<Form<Sent>, FormRejection>,
) -> Answer {
    let (Sent { pattern, namespace, workload, reason, .. }, until_ns) = read(sent)?;
    let trimmed = |text: String| text.trim().to_owned();
    let request = AddSilenceRequest {
        pattern: trimmed(pattern),
        namespace: trimmed(namespace),
        workload: trimmed(workload),
        until_ns,
        reason,
    };
    pages.silences.add(request, &caller.identity).await.map_err(|error| failure(&error))?;
    Ok(Redirect::to("/silences"))
}

/// `POST /silences/ID/end`
pub async fn end(
    State(pages): State<Pages>,
    Extension(caller): Extension<Arc<Caller>>,
    Path(id): Path<String>,
) -> Answer {
    pages.silences.end(&id, &caller.identity).await.map_err(|error| failure(&error))?;
    Ok(Redirect::to("/silences"))
}

/// `POST /f/ID/acknowledge`
pub async fn acknowledge(
    State(pages): State<Pages>,
    Extension(caller): Extension<Arc<Caller>>,
    Path(finding): Path<String>,
    sent: Result<Form<Sent>, FormRejection>,
) -> Answer {
    let (Sent { reason, .. }, until_ns) = read(sent)?;
    let request = AcknowledgeRequest { finding, until_ns, reason };
    let taken = query::acknowledge(&pages.store, &pages.silences, request, &caller.identity).await;
    let taken = taken.map_err(|status| of_status(&status))?;
    Ok(Redirect::to(&format!("/f/{}", parts::encoded(&taken.finding))))
}
