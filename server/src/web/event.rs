//! `/e/ID?at=TIME`: the raw record of one event.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::HeaderMap;
use maud::html;
use serde::Deserialize;
use tapio_wire::service::Event;

use super::frame::{self, PageHead};
use super::{Failure, Page, Pages, or_nothing, parts};
use crate::events::{Choice, NEWEST_MAX};
use crate::render;

/// How far before and after its moment a record is searched.
const AROUND_NS: u64 = 1_000_000;

#[derive(Deserialize, Default)]
#[serde(default)]
pub struct At {
    /// Moment of the event, nanoseconds since 1970.
    at: Option<u64>,
}

/// The page.
pub async fn page(
    State(pages): State<Pages>,
    Path(id): Path<String>,
    at: Result<Query<At>, QueryRejection>,
    headers: HeaderMap,
) -> Page {
    let Query(At { at }) = at.map_err(|rejection| Failure::usage(rejection.body_text()))?;
    let Some(at) = at else {
        return Err(Failure::usage("the address of an event has its moment: ?at=NANOSECONDS since 1970"));
    };
    let node = id.split(':').next().and_then(|node| u64::from_str_radix(node, 16).ok());
    let Some(node) = node else {
        return Err(Failure::usage("an event's id is node:epoch:seq:index, as evidence is cited"));
    };
    let choice = Choice {
        since_ns: at.saturating_sub(AROUND_NS),
        until_ns: Some(at.saturating_add(AROUND_NS)),
        node: format!("{node:016x}"),
        limit: u64::from(NEWEST_MAX),
        ..Choice::default()
    };
    let read = pages.read(choice, &headers).await;
    let Some(event) = read.events.iter().find(|event| event.id == id) else {
        let why = match read.missing.is_empty() {
            true => "it is not in the archive, or not any more".to_owned(),
            false => read.missing.join(" "),
        };
        return Err(Failure::not_found(format!("The event {id} cannot be shown: {why}")));
    };
    Ok(shown(event))
}

fn shown(event: &Event) -> frame::Html {
    // Pretty printing of a value cannot fail.
    let record = serde_json::to_string_pretty(&render::event_value(event)).unwrap_or_default();
    let main = html! {
        h1 { (event.kind.replace('_', " ")) }
        p.quiet { (render::for_people(event.time_ns)) " · by the node's clock · " (event.source) " · " (event.lane) " lane" }
        (or_nothing(event.entity.as_ref(), |entity| html! {
            p {
                (parts::called(entity)) " · node " a href={ "/n/" (parts::encoded(&entity.node)) } { (entity.node) }
                (or_nothing(parts::owner(entity), |(path, called)| html! { " · " a href=(path) { (called) } }))
            }
        }))
        p { (event.text) }
        h2 { "Record" }
        pre.record tabindex="0" { (record) }
    };
    frame::page(PageHead { title: &event.id, at: "", follows: "" }, &main)
}
