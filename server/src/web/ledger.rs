//! `/ledger`: what was lost, and where.

use axum::extract::State;
use axum::http::HeaderMap;
use maud::{Markup, html};
use tapio_wire::service::StatusResponse;

use super::frame::{self, PageHead};
use super::{Page, Pages, now_ns, parts, unknown};
use crate::render;

/// The page.
pub async fn page(State(pages): State<Pages>, headers: HeaderMap) -> Page {
    let status = pages.status(&headers).await;
    let main = html! {
        h1 { "Ledger" }
        p { "For every source of every node: emitted = archived + dropped + held. What is not in this sum is unexplained." }
        (unknown::notice(status.as_ref(), &pages.unheard(), now_ns()))
        @if let Some(status) = &status { (ledger(status)) }
    };
    Ok(frame::page(PageHead { title: "Ledger", at: "/ledger", follows: "" }, &main))
}

/// The table of a status.
pub fn ledger(status: &StatusResponse) -> Markup {
    let ledger = render::ledger_of(status);
    html! {
        p.notice.good[ledger.closes].bad[!ledger.closes] { (ledger.sum) }
        @if ledger.rows.is_empty() { p.quiet { "Nothing was emitted yet." } }
        @else {
            div.wide tabindex="0" role="region" aria-label="Ledger" {
                table.ledger {
                    caption { "Events by node, epoch and source" }
                    thead { tr { @for (name, is_number) in &ledger.headings {
                        @if name.is_empty() { td {} } @else { th.number[*is_number] scope="col" { (name.to_lowercase()) } }
                    } } }
                    tbody { @for row in &ledger.rows { tr {
                        @for (cell, (_, is_number)) in row.iter().zip(&ledger.headings) {
                            td.number[*is_number] { (parts::cut(cell)) }
                        }
                    } } }
                }
            }
        }
        @for remark in &ledger.remarks { p { (remark.trim()) } }
    }
}
