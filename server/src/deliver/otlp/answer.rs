//! What a receiver's answer means, by the specification of OTLP.
//!
//! What enters: answers over gRPC and HTTP. What leaves: that the receiver has the record, or why not. What must hold: a record that
//! is refused is not sent again, and what may succeed later is. Answers are hostile texts.
//!
//! ```text
//!             gRPC                                          HTTP
//! has it      OK                                            2xx
//! later       CANCELLED DEADLINE_EXCEEDED ABORTED           429 502 503 504
//!             OUT_OF_RANGE UNAVAILABLE DATA_LOSS
//!             RESOURCE_EXHAUSTED with RetryInfo
//! settings    UNAUTHENTICATED PERMISSION_DENIED             3xx 401 403 404 405
//!             UNIMPLEMENTED
//! for good    all else, rejected_log_records > 0            all else, rejected_log_records > 0
//! ```
//!
//! Source: <https://opentelemetry.io/docs/specs/otlp/#failures>. It calls the codes of the third row final too. They are about this
//! server's settings, and about no single record: those wait until somebody has mended the settings.

use std::error::Error as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use jiff::fmt::rfc2822;
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceResponse;
use prost::Message as _;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::super::SinkError;
use super::super::chat::cut;
use super::super::receiver::Answer;
use crate::render::clean;

pub(super) const PROTOBUF: &str = "application/x-protobuf";
/// Characters of a receiver's reason.
const REASON_MAX: usize = 300;

fn reason(text: &str) -> String {
    cut(&clean(text), REASON_MAX)
}

/// Fails where the receiver took the request and not the record. Returns a warning of the receiver's, where there is one.
pub(super) fn of_response(response: ExportLogsServiceResponse) -> Result<Option<String>, SinkError> {
    let Some(partial) = response.partial_success else { return Ok(None) };
    let said = reason(&partial.error_message);
    match partial.rejected_log_records {
        ..=0 => Ok((!said.is_empty()).then_some(said)),
        _ if said.is_empty() => Err(SinkError::Rejected("rejected_log_records without a reason".into())),
        _ => Err(SinkError::Rejected(format!("rejected_log_records: {said}"))),
    }
}

/// What a status other than OK means.
pub(super) fn of_status(status: &Status) -> SinkError {
    // What tonic says of a connection that broke has a cause, or lacks what every answer has.
    let cause = std::iter::successors(status.source(), |&error| error.source()).last();
    if let Some(cause) = cause {
        return SinkError::Away(reason(&format!("{}: {cause}", status.message())));
    }
    if status.message().contains("grpc-status header missing") {
        return SinkError::Away(reason(status.message()));
    }
    let why = reason(&format!("gRPC {:?}: {}", status.code(), status.message()));
    let pause = status.get_details_retry_info().map(|info| info.retry_delay.unwrap_or_default());
    match status.code() {
        Code::ResourceExhausted if pause.is_none() => SinkError::Rejected(why),
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss
        | Code::ResourceExhausted => later(why, pause),
        Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented => SinkError::Away(why),
        _ => SinkError::Rejected(why),
    }
}

/// The same of an answer over HTTP.
pub(super) fn of_answer(answer: &Answer) -> Result<Option<String>, SinkError> {
    let content_type = answer.headers.get(CONTENT_TYPE).map_or(&b""[..], |value| value.as_bytes());
    let is_protobuf = content_type.starts_with(PROTOBUF.as_bytes());
    if answer.status.is_success() {
        let response = ExportLogsServiceResponse::decode(answer.body.clone());
        return of_response(response.ok().filter(|_| is_protobuf).unwrap_or_default());
    }
    let said = tonic_types::pb::Status::decode(answer.body.clone()).ok().filter(|_| is_protobuf);
    let said = said.map_or_else(String::new, |status| format!(": {}", status.message));
    let why = reason(&format!("HTTP {}{said}", answer.status));
    Err(match answer.status {
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => later(why, retry_after(&answer.headers)),
        status if status.is_redirection() => SinkError::Away(format!("{why}: redirects are not followed")),
        // Of settings, not of this record.
        StatusCode::UNAUTHORIZED
        | StatusCode::FORBIDDEN
        | StatusCode::NOT_FOUND
        | StatusCode::METHOD_NOT_ALLOWED
        | StatusCode::PROXY_AUTHENTICATION_REQUIRED
        | StatusCode::UNSUPPORTED_MEDIA_TYPE => SinkError::Away(why),
        _ => SinkError::Rejected(why),
    })
}

fn later(why: String, pause: Option<Duration>) -> SinkError {
    match pause {
        Some(pause) if !pause.is_zero() => SinkError::Busy { why, pause },
        _ => SinkError::Away(why),
    }
}

/// Reads `retry-after`: seconds, or a date (RFC 9110, 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?.as_second();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    u64::try_from(at).ok()?.checked_sub(now).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use hyper::header::HeaderValue;
    use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsPartialSuccess;
    use tonic_types::ErrorDetails;

    use super::*;

    fn kind(error: &SinkError) -> &'static str {
        match error {
            SinkError::Away(_) => "away",
            SinkError::Busy { .. } => "busy",
            SinkError::Refused(_) => "refused",
            SinkError::Rejected(_) => "rejected",
        }
    }

    fn answer(code: u16, headers: &[(&'static str, &str)], body: impl Into<Bytes>) -> Answer {
        let status = StatusCode::from_u16(code).expect("a code");
        let mut answer = Answer { status, headers: HeaderMap::new(), body: body.into() };
        for (name, value) in headers {
            answer.headers.insert(*name, HeaderValue::try_from(*value).expect("text"));
        }
        answer
    }

    #[test]
    fn only_codes_that_the_specification_names_are_retried() {
        for (code, wanted) in [
            (Code::Cancelled, "away"),
            (Code::Unknown, "rejected"),
            (Code::InvalidArgument, "rejected"),
            (Code::DeadlineExceeded, "away"),
            (Code::NotFound, "rejected"),
            (Code::AlreadyExists, "rejected"),
            (Code::PermissionDenied, "away"),
            (Code::ResourceExhausted, "rejected"),
            (Code::FailedPrecondition, "rejected"),
            (Code::Aborted, "away"),
            (Code::OutOfRange, "away"),
            (Code::Unimplemented, "away"),
            (Code::Internal, "rejected"),
            (Code::Unavailable, "away"),
            (Code::DataLoss, "away"),
            (Code::Unauthenticated, "away"),
        ] {
            let error = of_status(&Status::new(code, "because"));
            assert_eq!(kind(&error), wanted, "{code:?}");
            assert!(error.to_string().contains("because"), "{error}");
        }
        for (code, wanted) in [
            (307, "away"),
            (400, "rejected"),
            (401, "away"),
            (403, "away"),
            (404, "away"),
            (413, "rejected"),
            (429, "away"),
            (500, "rejected"),
            (502, "away"),
            (503, "away"),
            (504, "away"),
        ] {
            assert_eq!(kind(&of_answer(&answer(code, &[], "")).expect_err("no success")), wanted, "{code}");
        }
    }

    #[test]
    fn a_receiver_that_asks_for_a_pause_gets_it() {
        let details = ErrorDetails::with_retry_info(Some(Duration::from_secs(7)));
        for code in [Code::ResourceExhausted, Code::Unavailable] {
            let error = of_status(&Status::with_error_details(code, "slow down", details.clone()));
            assert_eq!((kind(&error), error.pause()), ("busy", Duration::from_secs(7)), "{code:?}");
        }
        let pause = |text: &str| of_answer(&answer(503, &[("retry-after", text)], "")).expect_err("busy").pause();
        assert_eq!(pause("120"), Duration::from_secs(120));
        assert_eq!(pause("0"), Duration::ZERO);
        assert_eq!(pause("Sun, 06 Nov 1994 08:49:37 GMT"), Duration::ZERO);
        assert!(pause("Fri, 31 Dec 2100 23:59:59 GMT") > Duration::from_secs(24 * 3600));
        assert_eq!(pause("soon"), Duration::ZERO);
    }

    #[test]
    fn a_reason_is_told_without_what_a_terminal_obeys() {
        let partial = |rejected_log_records, message: &str| ExportLogsServiceResponse {
            partial_success: Some(ExportLogsPartialSuccess { rejected_log_records, error_message: message.into() }),
        };
        let error = of_response(partial(1, "too \u{1b}[31mold")).expect_err("it is refused");
        assert!(kind(&error) == "rejected" && error.to_string().ends_with("too \u{fffd}[31mold"), "{error}");
        assert_eq!(of_response(partial(0, "")), Ok(None));
        assert_eq!(of_response(partial(0, "use TLS")), Ok(Some("use TLS".into())));
        let long = of_response(partial(1, &"x".repeat(10_000))).expect_err("it is refused").to_string();
        assert!(long.chars().count() < 400, "{long}");
        let body = partial(2, "no such tenant").encode_to_vec();
        let with_type = |content_type| of_answer(&answer(200, &[("content-type", content_type)], body.clone()));
        assert_eq!(kind(&with_type(PROTOBUF).expect_err("refused")), "rejected");
        assert_eq!(with_type("text/html"), Ok(None));
        let status = tonic_types::pb::Status { message: "no such field".into(), ..Default::default() };
        let refused = answer(400, &[("content-type", PROTOBUF)], status.encode_to_vec());
        assert!(of_answer(&refused).expect_err("refused").to_string().contains("no such field"));
    }
}
