//! `tapioctl events`: events out of the server's archive.

use std::collections::HashSet;
use std::time::Duration;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use tapio_server::events::{EVENTS_MAX, kinds_named};
use tapio_server::render;
use tapio_wire::complain;
use tapio_wire::service::{Event, ListEventsRequest};

use super::output::{Format, nobody_reads, print};
use super::server::{Client, Failure, ServerAt, connect};
use super::{Printing, filter, moment, now_ns};

/// How often a follower asks for what is new.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(1);
/// A follower looks back so far again, since frames of nodes arrive late and in turn.
const FOLLOW_OVERLAP_NS: u64 = 5_000_000_000;
const FOLLOW_LIMIT: u32 = 100_000;

#[derive(Args)]
pub struct Arguments {
    /// Only events since: an age (90s, 10m, 2h, 1d) or a date in UTC (2026-01-02T03:04:05Z)
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// Only events until: an age or a date, as in --since
    #[arg(long, value_name = "WHEN", conflicts_with = "watch")]
    until: Option<String>,
    /// Only events of this node
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    node: Option<String>,
    /// Only events of pods in this namespace
    #[arg(long, short, value_parser = NonEmptyStringValueParser::new())]
    namespace: Option<String>,
    /// Only events of this pod (name, NAMESPACE/NAME or uid) and its containers
    #[arg(long, value_name = "POD", value_parser = NonEmptyStringValueParser::new())]
    pod: Option<String>,
    /// Only events of this workload (as Deployment/web), its pods and their containers
    #[arg(long, value_name = "KIND/NAME", value_parser = NonEmptyStringValueParser::new())]
    workload: Option<String>,
    /// Only events of entities whose name contains this, whose id is this, or whose container id begins with this
    #[arg(long, value_name = "ENTITY", value_parser = NonEmptyStringValueParser::new())]
    entity: Option<String>,
    /// Only these event kinds, separated by commas: oom, exit, signal, kube_event, …
    #[arg(long, value_name = "KINDS", value_delimiter = ',', value_parser = kind)]
    kind: Vec<String>,
    /// Maximum number of rows
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=i64::from(EVENTS_MAX)))]
    limit: u32,
    /// Print the last matching events instead of the first
    #[arg(long, conflicts_with = "watch")]
    newest: bool,
    /// Continue with events as they are archived, until interrupted
    #[arg(long, short)]
    watch: bool,
}

fn kind(name: &str) -> Result<String, String> {
    kinds_named([name]).map(|_| name.to_owned())
}

/// Runs `tapioctl events`.
pub async fn run(server: &ServerAt, printing: Printing, arguments: &Arguments) -> Result<(), Failure> {
    let mut request = ListEventsRequest {
        since_ns: moment(arguments.since.as_deref())?,
        until_ns: moment(arguments.until.as_deref())?,
        node: filter(&arguments.node),
        namespace: filter(&arguments.namespace),
        pod: filter(&arguments.pod),
        workload: filter(&arguments.workload),
        entity: filter(&arguments.entity),
        kinds: arguments.kind.clone(),
        limit: arguments.limit,
        newest: arguments.newest,
        ..ListEventsRequest::default()
    };
    if request.until_ns > 0 && request.since_ns > request.until_ns {
        return Err(Failure::Usage("--since is later than --until: no event can lie between them".into()));
    }
    let mut client = connect(server, false).await?;
    if !arguments.watch {
        each(&mut client, server, request, &mut |event| print(&line(printing, event))).await?;
        if let Some(read) = server.remote() {
            complain!("{}", render::remote_read(&read));
        }
        return Ok(());
    }
    if request.since_ns == 0 {
        request.since_ns = now_ns();
    }
    request.limit = FOLLOW_LIMIT;
    let mut seen: HashSet<String> = HashSet::new();
    let mut nobody_reads = std::pin::pin!(nobody_reads());
    loop {
        let mut now_seen = HashSet::new();
        server.ask_anew();
        let round = each(&mut client, server, request.clone(), &mut |event| {
            now_seen.insert(event.id.clone());
            if seen.contains(&event.id) { Ok(()) } else { print(&line(printing, event)) }
        })
        .await;
        match round {
            // What is asked for may still have to happen.
            Ok(()) | Err(Failure::Other(_)) => {}
            // The next round asks from the same moment on.
            Err(failure) if server.may_go_on_after(&failure) => {
                tokio::time::sleep(FOLLOW_INTERVAL).await;
                client = connect(server, false).await?;
                seen.extend(now_seen);
                continue;
            }
            Err(failure) => return Err(failure),
        }
        seen = now_seen;
        request.since_ns = request.since_ns.max(now_ns().saturating_sub(FOLLOW_OVERLAP_NS));
        tokio::select! {
            () = tokio::time::sleep(FOLLOW_INTERVAL) => {}
            failure = &mut nobody_reads => return Err(failure),
        }
    }
}

/// Calls `take` with every event of an answer.
pub async fn each(
    client: &mut Client,
    server: &ServerAt,
    request: ListEventsRequest,
    take: &mut dyn FnMut(&Event) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let request = ListEventsRequest { tells_remote: true, ..request };
    let answer = client.list_events(request).await;
    let mut stream = answer.map_err(|status| Failure::of(server, &status))?.into_inner();
    // Whose part is missing is printed last.
    let mut held = Vec::new();
    while let Some(event) = stream.message().await.map_err(|status| Failure::of(server, &status))? {
        if let Some(remote) = &event.remote {
            server.has_read(remote);
        }
        if !event.incomplete.is_empty() {
            server.lacks(&event.incomplete)?;
        }
        if event.id.is_empty() {
            continue;
        }
        if server.requires_complete() {
            held.push(event);
        } else {
            take(&event)?;
        }
    }
    held.iter().try_for_each(take)
}

fn line(printing: Printing, event: &Event) -> String {
    if let Some(text) = printing.format.one(&render::event_value(event)) {
        return text;
    }
    let row = render::event_row(printing.style, event);
    match printing.format {
        Format::Wide => format!("{} {row}", render::padded(&render::clean(&event.id), 40)),
        _ => row,
    }
}
