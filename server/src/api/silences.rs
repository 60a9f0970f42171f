//! `/api/v1/silences`, and acknowledgements of findings.
//!
//! What must hold: a page of another site cannot make a browser send what is taken here. So a body is JSON and says so: a browser
//! asks first before it sends that elsewhere, and is not answered.

use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::{Value, json};
use tapio_wire::program::clock::now_ns;
use tapio_wire::service::{AcknowledgeRequest, AddSilenceRequest};

use super::{Api, Failure};
use crate::auth::Caller;
use crate::query;
use crate::render;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct ListQuery {
    all: bool,
}

/// `GET /api/v1/silences`
pub async fn list(
    State(api): State<Api>,
    wanted: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<Value>, Failure> {
    let Query(wanted) = wanted?;
    let silences: Vec<Value> = api.silences.list(wanted.all).iter().map(render::silence_value).collect();
    Ok(Json(json!({ "silences": silences })))
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct New {
    pattern: String,
    namespace: String,
    workload: String,
    /// How long, or until when.
    until: String,
    reason: String,
}

fn body<T>(given: Result<Json<T>, JsonRejection>) -> Result<T, Failure> {
    match given {
        Ok(Json(body)) => Ok(body),
        Err(rejection) => Err(Failure { status: rejection.status(), message: rejection.body_text() }),
    }
}

fn until(text: &str) -> Result<u64, Failure> {
    render::parse_until(text, now_ns()).map_err(|error| Failure::usage(format!("until: {error}")))
}

/// `POST /api/v1/silences`
pub async fn add(
    State(api): State<Api>,
    Extension(caller): Extension<Arc<Caller>>,
    given: Result<Json<New>, JsonRejection>,
) -> Result<(StatusCode, Json<Value>), Failure> {
    let New { pattern, namespace, workload, until: text, reason } = body(given)?;
    let request = AddSilenceRequest { pattern, namespace, workload, until_ns: until(&text)?, reason };
    let added = api.silences.add(request, &caller.identity).await;
    let added = added.map_err(|error| Failure::of_status(query::status_of(&error)))?;
    Ok((StatusCode::CREATED, Json(render::silence_value(&added))))
}

/// `DELETE /api/v1/silences/{id}`
pub async fn end(
    State(api): State<Api>,
    Extension(caller): Extension<Arc<Caller>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Failure> {
    let ended = api.silences.end(&id, &caller.identity).await;
    let ended = ended.map_err(|error| Failure::of_status(query::status_of(&error)))?;
    Ok(Json(render::silence_value(&ended)))
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Acknowledgement {
    /// How long, or until when; a day where it is left out.
    until: String,
    reason: String,
}

/// `POST /api/v1/findings/{id}/acknowledge`
pub async fn acknowledge(
    State(api): State<Api>,
    Extension(caller): Extension<Arc<Caller>>,
    Path(finding): Path<String>,
    given: Result<Json<Acknowledgement>, JsonRejection>,
) -> Result<(StatusCode, Json<Value>), Failure> {
    let Acknowledgement { until: text, reason } = body(given)?;
    let until_ns = if text.is_empty() { 0 } else { until(&text)? };
    let request = AcknowledgeRequest { finding, until_ns, reason };
    let taken = query::acknowledge(&api.store, &api.silences, request, &caller.identity).await;
    Ok((StatusCode::CREATED, Json(render::silence_value(&taken.map_err(Failure::of_status)?))))
}
