//! The token of a browser: pasted once, then in a cookie that scripts and other sites do not get.
//!
//! What must hold: the cookie is worth what a bearer token is worth, not more. Each request's token is decided upon by [`Auth`], in
//! constant time where it is the shared one. A token is in no address and in no log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Form;
use axum::extract::rejection::FormRejection;
use axum::extract::{ConnectInfo, Query, State};
use axum::http::{Extensions, HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use maud::html;
use serde::Deserialize;

use super::frame::{self, Html, PageHead};
use crate::api;
use crate::auth::{Auth, Purpose, Record, Shown};

/// The browser keeps a cookie of this name only when it came over TLS, or from this machine.
const COOKIE: &str = "__Host-tapio";
const ATTRIBUTES: &str = "Path=/; Secure; HttpOnly; SameSite=Strict";
/// A form that takes longer than this to come is given up.
const FORM_TIMEOUT: Duration = Duration::from_secs(10);

/// Puts the cookie's token where a bearer token would be, unless there is one. Returns whether there was such a cookie.
pub fn bear(auth: &Auth, headers: &mut HeaderMap) -> bool {
    if !auth.wants_token() {
        return false;
    }
    let token = headers.get_all(header::COOKIE).iter().find_map(|line| {
        let cookies = line.to_str().ok()?.split(';').filter_map(|cookie| cookie.trim().split_once('='));
        cookies.filter(|(name, _)| *name == COOKIE).find_map(|(_, value)| decoded(value))
    });
    let Some(mut bearer) = token.and_then(|token| HeaderValue::from_str(&format!("Bearer {token}")).ok()) else {
        return false;
    };
    bearer.set_sensitive(true);
    // A proxy's own credentials are not for this server.
    let has_bearer =
        |value: &HeaderValue| value.as_bytes().get(..7).is_some_and(|word| word.eq_ignore_ascii_case(b"bearer "));
    if !headers.get(header::AUTHORIZATION).is_some_and(has_bearer) {
        headers.insert(header::AUTHORIZATION, bearer);
    }
    true
}

/// A token as a cookie may hold it: a shared token may have any visible character.
fn encoded(token: &str) -> String {
    let mut text = String::with_capacity(token.len());
    for byte in token.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => text.push(char::from(byte)),
            _ => text.push_str(&format!("%{byte:02x}")),
        }
    }
    text
}

fn decoded(value: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                bytes.push((digit(rest.next()?)? << 4 | digit(rest.next()?)?) as u8);
            }
            byte => bytes.push(byte),
        }
    }
    String::from_utf8(bytes).ok().filter(|token| token.bytes().all(|byte| byte.is_ascii_graphic()))
}

/// A path of this server, for after the login; anything else is the first page.
fn inner(to: &str) -> &str {
    let is_inner =
        to.starts_with('/') && !to.starts_with("//") && to.bytes().all(|b| b.is_ascii_graphic() && b != b'\\');
    if is_inner { to } else { "/" }
}

fn login(status: StatusCode, message: &str, to: &str) -> Html {
    let main = html! {
        h1 { "Tapio asks for a token" }
        @if !message.is_empty() { p.notice.bad role="alert" { (message) } }
        form.login method="post" action="/login" {
            input type="hidden" name="to" value=(inner(to));
            label for="token" { "Token" }
            input id="token" name="token" type="password" autocomplete="current-password" required autofocus spellcheck="false";
            button type="submit" { "Open" }
        }
        p.quiet {
            "It is kept in a cookie that neither scripts nor other sites get. The browser keeps it only over HTTPS, or where the "
            "address is this machine's own, as with " code { "kubectl port-forward" } "."
        }
    };
    frame::with_status(status, PageHead { title: "Token", at: "", follows: "" }, &main)
}

/// The form, for whoever was not let in.
pub fn refusal(status: StatusCode, message: &str, to: &str, has_cookie: bool) -> Response {
    if status != StatusCode::UNAUTHORIZED {
        return frame::message(status, "Not let in", message).into_response();
    }
    let message = if has_cookie { "The token that this browser had is not valid any more." } else { message };
    ([(header::WWW_AUTHENTICATE, "Bearer")], login(status, message, to)).into_response()
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub struct To {
    to: String,
}

/// The form.
pub async fn form(State(auth): State<Arc<Auth>>, Query(to): Query<To>) -> Response {
    match auth.wants_token() {
        true => login(StatusCode::OK, "", &to.to).into_response(),
        false => Redirect::to("/").into_response(),
    }
}

#[derive(Deserialize)]
struct Pasted {
    token: String,
    #[serde(default)]
    to: String,
}

/// Takes a pasted token.
pub async fn submit(State(auth): State<Arc<Auth>>, request: axum::extract::Request) -> Response {
    let (headers, extensions) = (request.headers().clone(), request.extensions().clone());
    if is_of_another_site(&headers) {
        return frame::message(StatusCode::FORBIDDEN, "Not let in", "another site sent this form").into_response();
    }
    let read = tokio::time::timeout(FORM_TIMEOUT, read(request));
    let pasted = match read.await {
        Ok(Ok(Form(pasted))) => pasted,
        Ok(Err(rejection)) => return login(rejection.status(), &rejection.body_text(), "/").into_response(),
        Err(_) => return login(StatusCode::REQUEST_TIMEOUT, "The form did not come in time.", "/").into_response(),
    };
    match check(&auth, pasted.token.trim(), &extensions).await {
        Ok(cookie) => ([(header::SET_COOKIE, cookie)], Redirect::to(inner(&pasted.to))).into_response(),
        Err((status, message)) => login(status, &message, &pasted.to).into_response(),
    }
}

async fn read(request: axum::extract::Request) -> Result<Form<Pasted>, FormRejection> {
    <Form<Pasted> as axum::extract::FromRequest<()>>::from_request(request, &()).await
}

/// Whether a browser says that another site's page sent it. Older ones say it by the origin; what is no browser says nothing.
pub fn is_of_another_site(headers: &HeaderMap) -> bool {
    if let Some(site) = headers.get("sec-fetch-site") {
        return site != "same-origin" && site != "none";
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return false };
    let host = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, host)| host);
    host.is_none() || host != headers.get(header::HOST).and_then(|host| host.to_str().ok())
}

/// The cookie of a token that may query, or why it gets none.
async fn check(auth: &Auth, token: &str, extensions: &Extensions) -> Result<HeaderValue, (StatusCode, String)> {
    let began = Instant::now();
    let peer = extensions.get::<ConnectInfo<std::net::SocketAddr>>().map(|peer| peer.0);
    let bearer = format!("Bearer {token}");
    let admitted =
        auth.admit(Purpose::Query, Shown { authorization: Some(bearer.as_bytes()), peer, ..Shown::default() });
    let admitted = admitted.await;
    let identity = admitted.as_ref().map(|caller| caller.identity.clone()).unwrap_or_default();
    auth.audit().record(&Record {
        purpose: Purpose::Query,
        call: "POST /login",
        peer,
        identity: &identity,
        asked_by: "",
        outcome: if admitted.is_ok() { "ok" } else { "denied" },
        is_denied: admitted.is_err(),
        took: began.elapsed(),
    });
    admitted.map_err(|denied| api::denial(&denied))?;
    let cookie = HeaderValue::from_str(&format!("{COOKIE}={}; {ATTRIBUTES}", encoded(token)));
    cookie.map_err(|_| (StatusCode::BAD_REQUEST, "This is no token.".to_owned()))
}

/// Forgets the token.
pub async fn leave(headers: HeaderMap) -> Response {
    if is_of_another_site(&headers) {
        return frame::message(StatusCode::FORBIDDEN, "Not done", "another site sent this form").into_response();
    }
    let gone = HeaderValue::from_static("__Host-tapio=; Max-Age=0; Path=/; Secure; HttpOnly; SameSite=Strict");
    ([(header::SET_COOKIE, gone)], Redirect::to("/login")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_token_survives_the_cookie_and_nothing_else_does() {
        let all: String = (b'!'..=b'~').map(char::from).collect();
        assert_eq!(decoded(&encoded(&all)).as_deref(), Some(all.as_str()));
        assert!(encoded(&all).bytes().all(|byte| !b";,\" \\".contains(&byte)));
        for wrong in ["%", "%4", "%zz", "%0a", "%c3%28", "a b"] {
            assert_eq!(decoded(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_form_of_another_site_is_known_and_refused() {
        let of = |lines: &[(&'static str, &'static str)]| {
            let lines = lines
                .iter()
                .map(|(name, value)| (header::HeaderName::from_static(name), HeaderValue::from_static(value)));
            is_of_another_site(&lines.collect())
        };
        assert!(!of(&[]) && !of(&[("sec-fetch-site", "same-origin"), ("origin", "null")]));
        for site in ["cross-site", "same-site"] {
            assert!(of(&[("sec-fetch-site", site), ("origin", "https://a"), ("host", "a")]), "{site}");
        }
        assert!(!of(&[("origin", "https://a:1"), ("host", "a:1")]));
        for origin in ["null", "https://b:1", "https://a:2", ""] {
            assert!(of(&[("origin", origin), ("host", "a:1")]), "{origin}");
        }
    }

    #[test]
    fn after_the_login_one_stays_on_this_server() {
        assert_eq!(inner("/f/1?x=y"), "/f/1?x=y");
        for to in ["", "//evil", "https://evil", "/\\evil", "/a\r\nb", "javascript:1"] {
            assert_eq!(inner(to), "/", "{to}");
        }
    }
}
