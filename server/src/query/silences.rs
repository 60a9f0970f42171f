//! The service of silences and acknowledgements.
//!
//! What enters: requests that the gate let in, with the name of who sent them. What leaves: silences. What must hold: an
//! acknowledgement is about a finding that there is.

use std::sync::Arc;

use tapio_wire::service::silences_server::{Silences as Service, SilencesServer};
use tapio_wire::service::{
    AcknowledgeRequest, AddSilenceRequest, EndSilenceRequest, ListSilencesRequest, ListSilencesResponse, Silence,
};
use tonic::{Request, Response, Status};

use super::bounded;
use crate::auth::Caller;
use crate::findings::{FindingStore, LookupError};
use crate::silences::{SilenceError, Silences};

/// See [`silences_service`].
pub struct SilencesService {
    store: Arc<FindingStore>,
    silences: Arc<Silences>,
}

/// The service over what is silenced, and the findings that may be acknowledged.
pub fn silences_service(store: Arc<FindingStore>, silences: Arc<Silences>) -> SilencesServer<SilencesService> {
    SilencesServer::new(SilencesService { store, silences })
}

/// Acknowledges the finding of an id, or of a prefix that only one has.
///
/// # Errors
/// A status for a client that names none, or asks for what cannot be.
pub(crate) async fn acknowledge(
    store: &FindingStore,
    silences: &Arc<Silences>,
    request: AcknowledgeRequest,
    by: &str,
) -> Result<Silence, Status> {
    let finding = match store.get(bounded(&request.finding)?) {
        Ok(found) => found.id.clone(),
        Err(error @ LookupError::NotFound(_)) => return Err(Status::not_found(error.to_string())),
        Err(error) => return Err(Status::invalid_argument(error.to_string())),
    };
    silences.acknowledge(AcknowledgeRequest { finding, ..request }, by).await.map_err(|error| status_of(&error))
}

/// What a client is answered with.
pub(crate) fn status_of(error: &SilenceError) -> Status {
    let text = error.to_string();
    match error {
        SilenceError::Wrong(_) => Status::invalid_argument(text),
        SilenceError::NotFound(_) => Status::not_found(text),
        SilenceError::Full => Status::resource_exhausted(text),
        // The server is there: another request may be answered.
        SilenceError::NotKept(_) => Status::aborted(text),
    }
}

fn name<T>(request: &Request<T>) -> String {
    request.extensions().get::<Arc<Caller>>().map(|caller| caller.identity.clone()).unwrap_or_default()
}

#[tonic::async_trait]
impl Service for SilencesService {
    async fn list_silences(
        &self,
        request: Request<ListSilencesRequest>,
    ) -> Result<Response<ListSilencesResponse>, Status> {
        Ok(Response::new(ListSilencesResponse { silences: self.silences.list(request.get_ref().all) }))
    }

    async fn add_silence(&self, request: Request<AddSilenceRequest>) -> Result<Response<Silence>, Status> {
        let by = name(&request);
        let added = self.silences.add(request.into_inner(), &by).await;
        added.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn end_silence(&self, request: Request<EndSilenceRequest>) -> Result<Response<Silence>, Status> {
        let by = name(&request);
        let ended = self.silences.end(bounded(&request.get_ref().id)?, &by).await;
        ended.map(Response::new).map_err(|error| status_of(&error))
    }

    async fn acknowledge(&self, request: Request<AcknowledgeRequest>) -> Result<Response<Silence>, Status> {
        let by = name(&request);
        acknowledge(&self.store, &self.silences, request.into_inner(), &by).await.map(Response::new)
    }
}
