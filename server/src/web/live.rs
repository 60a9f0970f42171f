//! A word to an open page whenever a finding is published or changes: it then reloads itself.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};

use super::Pages;
use crate::query;

/// Ids of findings as they change. A browser that was cut off reloads its page, so nothing is sent again.
pub async fn changes(State(pages): State<Pages>) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let (sender, receiver) = mpsc::channel(query::WATCHER_QUEUE);
    tokio::spawn(query::watch(Arc::clone(&pages.store), 0, None, sender));
    let changes = ReceiverStream::new(receiver).filter_map(Result::ok).map(|finding| {
        let word = json!({ "id": finding.id, "revision": finding.revision, "withdrawn": finding.withdrawn });
        Ok(Event::default().event("finding").data(word.to_string()))
    });
    Sse::new(changes).keep_alive(KeepAlive::default())
}
