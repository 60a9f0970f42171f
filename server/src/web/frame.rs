//! What is around every page: head, navigation, foot.
//!
//! What must hold: no control character and no mark that turns the direction of writing reaches a browser, whoever forgot to
//! take it out.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use maud::{DOCTYPE, Markup, html};

use super::assets;
use crate::render;

/// A page that is ready to be sent.
pub struct Html {
    status: StatusCode,
    text: String,
}

impl IntoResponse for Html {
    fn into_response(self) -> Response {
        (self.status, [(header::CONTENT_TYPE, "text/html; charset=utf-8")], self.text).into_response()
    }
}

/// Where a page is in the navigation, and what makes it reload.
#[derive(Clone, Copy)]
pub struct PageHead<'a> {
    /// What the browser's tab says.
    pub title: &'a str,
    /// The path of the link that is the current one.
    pub at: &'a str,
    /// `all`: any finding that changes; an id: this one; nothing: the page stays as it is.
    pub follows: &'a str,
}

/// A whole page.
pub fn page(place: PageHead<'_>, main: &Markup) -> Html {
    with_status(StatusCode::OK, place, main)
}

/// A page that says one thing.
pub fn message(status: StatusCode, title: &str, text: &str) -> Html {
    let main = html! {
        h1 { (title) }
        p { (text) }
        p { a href="/" { "All findings" } }
    };
    with_status(status, PageHead { title, at: "", follows: "" }, &main)
}

/// Renders a page with another code than 200.
pub fn with_status(status: StatusCode, place: PageHead<'_>, main: &Markup) -> Html {
    let link = |path: &str, text: &str| {
        html! { a href=(path) aria-current=[(place.at == path).then_some("page")] { (text) } }
    };
    let text = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (place.title) " · Tapio" }
                link rel="stylesheet" href=(assets::style());
                link rel="icon" href=(assets::icon());
                script src=(assets::script()) defer {}
            }
            body data-follows=[(!place.follows.is_empty()).then_some(place.follows)] {
                a.skip href="#main" { "Skip to the content" }
                header.top {
                    a.brand href="/" { "Tapio" }
                    nav aria-label="Main" { (link("/", "Findings")) (link("/silences", "Silences")) (link("/ledger", "Ledger")) }
                    p.live id="live" role="status" {}
                }
                main id="main" tabindex="-1" { (main) }
                footer {
                    p { "Times are UTC, by the node's clock." }
                    p.keys hidden { kbd { "j" } " " kbd { "k" } " next and previous finding · " kbd { "/" } " filters" }
                }
            }
        }
    };
    Html { status, text: text.into_string().lines().map(render::clean).collect::<Vec<_>>().join("\n") }
}
