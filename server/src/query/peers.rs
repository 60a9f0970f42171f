//! What the other servers have, for clients that ask this one.
//!
//! What enters: a request of an operator. What leaves: the parts of all servers as one answer, and whose part is missing. What
//! must hold: a server that does not answer in time costs no more than that time, and is named. A peer is asked for its own part
//! only, so nobody is asked twice. The asker has the same identity at the peers as at this server.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use tapio_wire::program::dial;
use tapio_wire::program::tls::{ClientFiles, Watched};
use tapio_wire::service::query_client::QueryClient;
use tapio_wire::service::{Event, ListEventsRequest, ServerStatus, StatusRequest, StatusResponse, Unanswered};
use tokio::sync::Semaphore;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::events::EventSource;
use crate::auth::ASKED_BY;
use crate::cluster::{Cluster, Other};
use crate::events::Choice;

/// How long a peer may take for an answer, or between two events.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of a peer that is silent in the servers' log too.
const ANSWER_TIMEOUT_OF_SILENT: Duration = Duration::from_secs(2);
const LATE: &str = "it did not answer in time";
const OTHER_VERSION: &str = "its messages in the servers' log cannot be read here: give all servers the same version; if they have it, they are damaged";
const GONE: &str =
    "it has been silent for minutes and had not announced its end: events that only its archive has are missing";
const NAMESAKES: &str = "two servers have this name, and only one of them is asked: give each another cluster.server";
/// Time for which a peer that did not answer is not asked again: one request of an operator asks it several times.
const REST_AFTER_SILENCE: Duration = Duration::from_secs(10);
/// Events of one answer where several servers are asked: they are held until all are there.
const EVENTS_MAX: u64 = 100_000;
/// Maximum number of such answers that are made at a time.
const ANSWERS_MAX: usize = 2;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A status speaks of every node.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Asks the other servers for their parts of an answer.
pub struct Peers {
    cluster: Arc<Cluster>,
    tls: Option<Arc<Watched<ClientFiles>>>,
    /// `cluster.token_without_tls`.
    token_without_tls: bool,
    channels: Mutex<HashMap<String, Channel>>,
    answers: Semaphore,
    silences: Silences,
}

/// When peers did not answer in time, by address.
#[derive(Default)]
struct Silences(Mutex<HashMap<String, Instant>>);

impl Silences {
    /// Whether the peer is not worth a wait at this moment. Silences that are over are forgotten.
    fn holds(&self, address: &str, now: Instant) -> bool {
        let mut silences = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        silences.retain(|_, since| now.saturating_duration_since(*since) < REST_AFTER_SILENCE);
        silences.contains_key(address)
    }

    fn begin(&self, address: &str, now: Instant) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(address.to_owned(), now);
    }
}

/// Events of a peer, or why there are none.
pub type Part = Result<Vec<Event>, Unanswered>;

impl Peers {
    /// The servers that share a log with this one.
    pub fn new(cluster: Arc<Cluster>, tls: Option<Arc<Watched<ClientFiles>>>, token_without_tls: bool) -> Self {
        let (channels, answers) = (Mutex::default(), Semaphore::new(ANSWERS_MAX));
        Self { cluster, tls, token_without_tls, channels, answers, silences: Silences::default() }
    }

    /// Servers whose evidence may be missing in what this one found.
    pub fn unheard(&self) -> Vec<Unanswered> {
        let unread = self.cluster.unread();
        let silent =
            self.cluster.others().into_iter().filter(|other| other.is_silent && !unread.contains(&other.server));
        let mut missing: Vec<Unanswered> =
            silent.map(|other| unanswered(&other, "it has said nothing in the servers' log lately")).collect();
        missing.extend(self.doubts());
        missing
    }

    /// Why this server may not know all that others say, whether they are asked or not.
    fn doubts(&self) -> Vec<Unanswered> {
        let of = |server: String, reason: String| Unanswered { server, reason, ..Unanswered::default() };
        let mut doubts: Vec<Unanswered> =
            self.cluster.unread().into_iter().map(|server| of(server, OTHER_VERSION.to_owned())).collect();
        let namesakes = self.cluster.link().namesakes();
        doubts.extend(namesakes.into_iter().map(|server| of(server, NAMESAKES.to_owned())));
        doubts.extend(self.cluster.link().doubt().map(|reason| of(self.cluster.server().to_owned(), reason)));
        doubts
    }

    /// Names the server whose status it is.
    pub fn introduce(&self, own: &mut StatusResponse) {
        let name = self.cluster.server().to_owned();
        own.nodes.iter_mut().for_each(|node| node.server.clone_from(&name));
        own.deliveries.iter_mut().for_each(|delivery| delivery.server.clone_from(&name));
        let link = self.cluster.link();
        own.servers = vec![ServerStatus {
            server: name,
            alone: link.is_alone(),
            healing_ns: link.healing_for().map_or(0, |lasted| lasted.as_nanos().max(1) as u64),
            log_trouble: link.trouble().unwrap_or_default(),
            log_short_ns: link.short_ns.load(Ordering::Relaxed),
            leads: self.cluster.leadership().term().is_some(),
            ..standing(own)
        }];
    }

    /// Completes this server's status by those of the others.
    pub async fn complete(&self, own: &mut StatusResponse, metadata: &MetadataMap) {
        self.introduce(own);
        let others = self.cluster.others();
        let answers = join_all(others.iter().map(|other| self.status_of(other, metadata))).await;
        for (other, answer) in others.iter().zip(answers) {
            match answer {
                Ok(part) => add(own, other, part),
                Err(missing) => own.incomplete.push(missing),
            }
        }
        own.incomplete.extend(self.doubts());
        own.nodes.sort_by(|a, b| (&a.node, &a.server).cmp(&(&b.node, &b.server)));
        own.servers.sort_by(|a, b| a.server.cmp(&b.server));
    }

    async fn status_of(&self, other: &Other, metadata: &MetadataMap) -> Result<StatusResponse, Unanswered> {
        let asked = async {
            let mut client = self.client(other).await?;
            let request = self.request(StatusRequest { local: true }, metadata);
            client.status(request).await.map(tonic::Response::into_inner)
        };
        self.first_word(other, asked).await
    }

    /// A peer's first word, unless it takes too long or did so a moment ago.
    async fn first_word<T>(
        &self,
        other: &Other,
        asked: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Unanswered> {
        if self.silences.holds(&other.address, Instant::now()) {
            return Err(unanswered(other, "it did not answer in time a moment ago, and was not asked again"));
        }
        let limit = if other.is_silent { ANSWER_TIMEOUT_OF_SILENT } else { ANSWER_TIMEOUT };
        let Ok(answer) = tokio::time::timeout(limit, asked).await else {
            self.silences.begin(&other.address, Instant::now());
            return Err(unanswered(other, LATE));
        };
        answer.map_err(|status| refused(other, &status))
    }

    /// The events of this server's archive and of the others', by time; a last one that is none says whose are missing.
    ///
    /// # Errors
    /// When this server's archive cannot be read, or no server knows what was asked for.
    pub async fn all_events(
        &self,
        own: &EventSource,
        choice: Choice,
        metadata: &MetadataMap,
    ) -> Result<Vec<Event>, Status> {
        let request = &request_of(&choice);
        let Ok(_permit) = self.answers.try_acquire() else {
            return Err(Status::resource_exhausted("other requests read all servers' events: try again in a moment"));
        };
        if choice.limit > EVENTS_MAX {
            return Err(Status::invalid_argument(format!(
                "with several servers at most {EVENTS_MAX} events are returned at once: narrow what you ask for"
            )));
        }
        let (limit, newest, since_ns) = (choice.limit as usize, choice.newest, choice.since_ns);
        let others = self.cluster.others();
        let of_others = join_all(others.iter().map(|other| self.events_of(other, request, metadata)));
        let (own, of_others) = tokio::join!(own_events(own, choice), of_others);
        let (mut parts, mut incomplete) = (Vec::new(), self.doubts());
        let is_asked = |node: &String| request.node.is_empty() || *node == request.node;
        let is_concerned = |other: &Other| other.heard_ns >= since_ns && other.nodes.iter().any(is_asked);
        let gone = self.cluster.gone().into_iter().filter(is_concerned);
        incomplete.extend(gone.map(|other| unanswered(&other, GONE)));
        for (part, other) in of_others.into_iter().zip(&others) {
            match part {
                Ok(mut events) => {
                    incomplete.extend(damaged(&mut events, &other.server));
                    parts.push(events);
                }
                Err(missing) => incomplete.push(missing),
            }
        }
        let mut remote = None;
        match own {
            Ok(mut events) => {
                remote = events.last_mut().and_then(|event| event.remote.take());
                incomplete.extend(damaged(&mut events, self.cluster.server()));
                parts.push(events);
            }
            // Another server may know what this one does not.
            Err(status)
                if status.code() == Code::NotFound
                    && (!incomplete.is_empty() || parts.iter().any(|events| !events.is_empty())) => {}
            Err(status) => return Err(status),
        }
        let mut events = merged(parts, limit, newest);
        if !incomplete.is_empty() || remote.is_some() {
            events.push(Event { incomplete, remote, ..Event::default() });
        }
        Ok(events)
    }

    async fn events_of(&self, other: &Other, request: &ListEventsRequest, metadata: &MetadataMap) -> Part {
        let request = request.clone();
        let opened = async {
            let mut client = self.client(other).await?;
            client.list_events(self.request(request, metadata)).await.map(tonic::Response::into_inner)
        };
        let mut events = Vec::new();
        let mut stream = match self.first_word(other, opened).await {
            Ok(stream) => stream,
            Err(missing) if missing.reason.is_empty() => return Ok(events),
            Err(missing) => return Err(missing),
        };
        loop {
            match within(other, stream.message()).await {
                Ok(Some(event)) => events.push(event),
                Ok(None) => return Ok(events),
                // Of a name that it does not know it has nothing.
                Err(missing) if missing.reason.is_empty() => return Ok(events),
                Err(missing) => return Err(missing),
            }
        }
    }

    fn request<T>(&self, message: T, metadata: &MetadataMap) -> Request<T> {
        let mut request = Request::new(message);
        // An address is what somebody wrote into the log: by default to nobody whose certificate was not looked at.
        if (self.tls.is_some() || self.token_without_tls)
            && let Some(token) = metadata.get("authorization")
        {
            request.metadata_mut().insert("authorization", token.clone());
        }
        if let Ok(name) = self.cluster.server().parse::<MetadataValue<Ascii>>() {
            request.metadata_mut().insert(ASKED_BY, name);
        }
        request
    }

    async fn client(&self, other: &Other) -> Result<QueryClient<Channel>, Status> {
        let known = self.channels.lock().unwrap_or_else(PoisonError::into_inner).get(&other.address).cloned();
        let channel = match known {
            Some(channel) => channel,
            None => {
                let channel = self.connect(other).await.map_err(Status::unavailable)?;
                let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
                // Servers come and go; only those of now are worth a connection.
                let now: HashSet<String> = self.cluster.others().into_iter().map(|other| other.address).collect();
                channels.retain(|address, _| now.contains(address));
                channels.insert(other.address.clone(), channel.clone());
                channel
            }
        };
        Ok(QueryClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX))
    }

    async fn connect(&self, other: &Other) -> Result<Channel, String> {
        let (host, port) = other.address.rsplit_once(':').ok_or("it did not say where it can be reached")?;
        let host = host.trim_matches(['[', ']']);
        let port: u16 = port.parse().map_err(|_| format!("{} is no address", other.address))?;
        let endpoint = dial::endpoint(host, port, self.tls.is_some()).map_err(|error| error.to_string())?;
        let mut found = tokio::net::lookup_host((host, port)).await.map_err(|error| error.to_string())?;
        let address = found.next().ok_or_else(|| format!("{host} has no address"))?;
        let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT);
        dial::dial(&endpoint, address, self.tls.as_ref()).await.map_err(|error| error.to_string())
    }
}

fn request_of(choice: &Choice) -> ListEventsRequest {
    ListEventsRequest {
        since_ns: choice.since_ns,
        until_ns: choice.until_ns.unwrap_or(0),
        node: choice.node.clone(),
        namespace: choice.namespace.clone(),
        pod: choice.pod.clone(),
        entity: choice.entity.clone(),
        kinds: choice.kinds.iter().map(|kind| kind.name().to_owned()).collect(),
        limit: choice.limit as u32,
        newest: choice.newest,
        workload: choice.workload.clone(),
        tells_remote: false,
        local: true,
    }
}

pub(super) async fn own_events(source: &EventSource, choice: Choice) -> Result<Vec<Event>, Status> {
    let (mut receiver, _) = source.stream(choice).map_err(|refused| refused.to_status())?;
    let mut events = Vec::new();
    while let Some(event) = receiver.recv().await {
        events.push(event.map_err(|refused| refused.to_status())?);
    }
    Ok(events)
}

/// What follows the first word. A long search between two events is no silence of the peer: it rests for none.
async fn within<T>(other: &Other, asked: impl Future<Output = Result<T, Status>>) -> Result<T, Unanswered> {
    match tokio::time::timeout(ANSWER_TIMEOUT, asked).await {
        Ok(answer) => answer.map_err(|status| refused(other, &status)),
        Err(_) => Err(unanswered(other, LATE)),
    }
}

fn refused(other: &Other, status: &Status) -> Unanswered {
    match status.code() {
        // What nobody there is called is nothing that is missing.
        Code::NotFound => unanswered(other, ""),
        code => unanswered(other, &format!("{code:?}: {}", status.message())),
    }
}

fn unanswered(other: &Other, reason: &str) -> Unanswered {
    Unanswered {
        server: other.server.clone(),
        reason: reason.into(),
        since_ns: other.heard_ns,
        nodes: other.nodes.clone(),
    }
}

/// Takes what a server's damaged archive left out from its events.
fn damaged(events: &mut Vec<Event>, server: &str) -> Vec<Unanswered> {
    let mut incomplete = Vec::new();
    events.retain_mut(|event| {
        incomplete.append(&mut event.incomplete);
        !event.id.is_empty()
    });
    incomplete.iter_mut().for_each(|damaged| damaged.server = server.to_owned());
    incomplete
}

fn standing(status: &StatusResponse) -> ServerStatus {
    ServerStatus {
        ready: status.ready,
        findings: status.findings,
        revision: status.revision.clone(),
        ..ServerStatus::default()
    }
}

/// Takes a peer's part in.
fn add(own: &mut StatusResponse, other: &Other, part: StatusResponse) {
    let peer = part.servers.first().cloned().unwrap_or_default();
    own.servers.push(ServerStatus {
        server: other.server.clone(),
        address: other.address.clone(),
        alone: peer.alone,
        leads: peer.leads,
        healing_ns: peer.healing_ns,
        log_trouble: peer.log_trouble,
        log_short_ns: peer.log_short_ns,
        ..standing(&part)
    });
    own.nodes.extend(part.nodes.into_iter().map(|mut node| {
        node.server.clone_from(&other.server);
        node
    }));
    own.deliveries.extend(part.deliveries.into_iter().map(|mut delivery| {
        delivery.server.clone_from(&other.server);
        delivery
    }));
    own.events_correlated += part.events_correlated;
    own.unexplained_events += part.unexplained_events;
    let mut kinds: BTreeMap<String, u64> = BTreeMap::new();
    for count in own.kinds.drain(..).chain(part.kinds) {
        *kinds.entry(count.kind).or_default() += count.events;
    }
    own.kinds = kinds.into_iter().map(|(kind, events)| tapio_wire::service::KindCount { kind, events }).collect();
}

/// Makes one list of the events of several servers: by time, each once, bounded as the request asks.
pub fn merged(parts: Vec<Vec<Event>>, limit: usize, newest: bool) -> Vec<Event> {
    let mut seen = HashSet::new();
    let mut all: Vec<Event> = parts.into_iter().flatten().filter(|event| seen.insert(event.id.clone())).collect();
    all.sort_by(|a, b| (a.time_ns, &a.id).cmp(&(b.time_ns, &b.id)));
    if newest {
        let surplus = all.len().saturating_sub(limit);
        all.drain(..surplus);
    }
    all.truncate(limit);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str, time_ns: u64) -> Event {
        Event { id: id.into(), time_ns, ..Event::default() }
    }

    #[test]
    fn what_a_damaged_archive_lacks_is_reported_of_its_server() {
        let missing = Unanswered { reason: "segment 1".into(), ..Unanswered::default() };
        let mut events = vec![event("a", 1), Event { incomplete: vec![missing], ..Event::default() }];
        let incomplete = damaged(&mut events, "b");
        assert_eq!((events.len(), incomplete.len()), (1, 1));
        assert_eq!((incomplete[0].server.as_str(), incomplete[0].reason.as_str()), ("b", "segment 1"));
    }

    #[test]
    fn only_a_peer_that_did_not_answer_rests() {
        let (silences, now) = (Silences::default(), Instant::now());
        silences.begin("b:9090", now);
        assert!(silences.holds("b:9090", now + REST_AFTER_SILENCE / 2) && !silences.holds("c:9090", now));
        assert!(!silences.holds("b:9090", now + REST_AFTER_SILENCE));
    }

    #[test]
    fn events_of_several_servers_come_by_time_and_each_once() {
        let parts = || vec![vec![event("a", 1), event("c", 3)], vec![event("b", 2), event("c", 3), event("d", 4)]];
        let ids = |events: Vec<Event>| events.into_iter().map(|event| event.id).collect::<Vec<_>>().join("");
        assert_eq!(ids(merged(parts(), 10, false)), "abcd");
        assert_eq!(ids(merged(parts(), 2, false)), "ab");
        assert_eq!(ids(merged(parts(), 2, true)), "cd");
    }
}
