//! The files of the page: style, script and icon, out of the binary. Whoever may connect may have them; they say nothing.

use std::sync::LazyLock;

use axum::Router;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;

const STYLE: &str = include_str!("assets/tapio.css");
const SCRIPT: &str = include_str!("assets/tapio.js");
const ICON: &str = include_str!("assets/tapio.svg");

/// The address of a file, which is another one when the file is another one: a browser may keep it.
fn address(name: &str, text: &str) -> String {
    format!("/assets/{name}?{:08x}", crc32c::crc32c(text.as_bytes()))
}

/// The style sheet's.
pub fn style() -> &'static str {
    static ADDRESS: LazyLock<String> = LazyLock::new(|| address("tapio.css", STYLE));
    &ADDRESS
}

/// The script's.
pub fn script() -> &'static str {
    static ADDRESS: LazyLock<String> = LazyLock::new(|| address("tapio.js", SCRIPT));
    &ADDRESS
}

/// The icon's.
pub fn icon() -> &'static str {
    static ADDRESS: LazyLock<String> = LazyLock::new(|| address("tapio.svg", ICON));
    &ADDRESS
}

fn file(kind: &'static str, text: &'static str) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "public, max-age=86400")], text)
}

/// The files.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/assets/tapio.css", get(|| async { file("text/css; charset=utf-8", STYLE) }))
        .route("/assets/tapio.js", get(|| async { file("text/javascript; charset=utf-8", SCRIPT) }))
        .route("/assets/tapio.svg", get(|| async { file("image/svg+xml", ICON) }))
}
