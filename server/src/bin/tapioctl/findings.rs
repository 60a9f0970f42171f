//! `tapioctl findings` and `tapioctl finding`.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use tapio_server::findings::PatternSet;
use tapio_server::query::SEVERITIES;
use tapio_server::render;
use tapio_wire::complain;
use tapio_wire::service::{Finding, GetFindingRequest, ListEventsRequest, ListFindingsRequest, WatchFindingsRequest};
use tonic::Code;

use super::output::{Format, nobody_reads, print};
use super::server::{Client, Failure, ServerAt, connect};
use super::{Printing, filter, moment, now_ns};

/// Findings asked for at once.
const PAGE: u32 = 500;
/// Findings whose last version a watcher remembers.
const SHOWN_MAX: usize = 20_000;
/// A death may be found this long after it.
const MOVED_BACK_NS: u64 = 600_000_000_000;
/// Between this machine's clock and those of servers.
const CLOCKS_DIFFER_NS: u64 = 60_000_000_000;
/// Between the loss of a server and the next connection: all of them may be going away.
const MOVE_PAUSE: Duration = Duration::from_millis(500);

#[derive(Args)]
pub struct ListArguments {
    /// Continue with every new or changed finding, until interrupted
    #[arg(long, short)]
    watch: bool,
    /// Only findings that ended since: an age (90s, 10m, 2h, 1d) or a date in UTC (2026-01-02T03:04:05Z)
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// Maximum number of rows
    #[arg(long, default_value_t = 100, conflicts_with = "watch", value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// Only findings of this severity or a higher one: info, low, medium, high, critical
    #[arg(long, value_name = "SEVERITY", conflicts_with = "watch", value_parser = severity)]
    severity: Option<String>,
    /// Only findings of this pattern
    #[arg(long, value_name = "ID", conflicts_with = "watch", value_parser = NonEmptyStringValueParser::new())]
    pattern: Option<String>,
    /// Only findings about this pod (name, NAMESPACE/NAME or uid)
    #[arg(long, value_name = "POD", conflicts_with = "watch", value_parser = NonEmptyStringValueParser::new())]
    pod: Option<String>,
    /// Only findings about pods in this namespace
    #[arg(long, short, conflicts_with = "watch", value_parser = NonEmptyStringValueParser::new())]
    namespace: Option<String>,
    /// Only findings on this node
    #[arg(long, value_name = "NAME", conflicts_with = "watch", value_parser = NonEmptyStringValueParser::new())]
    node: Option<String>,
    /// Only findings about this workload (as Deployment/web) and its pods
    #[arg(long, value_name = "KIND/NAME", conflicts_with = "watch", value_parser = NonEmptyStringValueParser::new())]
    workload: Option<String>,
}

fn severity(name: &str) -> Result<String, String> {
    match SEVERITIES.contains(&name) {
        true => Ok(name.to_owned()),
        false => Err(format!("it is one of {}", SEVERITIES.join(", "))),
    }
}

/// `tapioctl finding ID`
pub async fn show(server: &ServerAt, printing: Printing, id: String) -> Result<(), Failure> {
    let mut client = connect(server, true).await?;
    learn_who_is_missing(&mut client, server).await?;
    let found = client.get_finding(GetFindingRequest { id }).await;
    let finding = found.map_err(|status| Failure::of(server, &status))?.into_inner();
    let text = printing.format.one(&render::finding_value(&finding));
    print(&text.unwrap_or_else(|| render::finding(printing.style, &finding)))
}

/// Asks whose evidence what this server finds may lack.
async fn learn_who_is_missing(client: &mut Client, server: &ServerAt) -> Result<(), Failure> {
    let request = ListFindingsRequest { limit: 1, ..ListFindingsRequest::default() };
    let listed = client.list_findings(request).await.map_err(|status| Failure::of(server, &status))?;
    server.lacks(&listed.into_inner().incomplete)
}

/// `tapioctl findings`
pub async fn list(server: &ServerAt, printing: Printing, arguments: &ListArguments) -> Result<(), Failure> {
    let since_ns = moment(arguments.since.as_deref())?;
    if arguments.watch {
        return watch(server, printing, since_ns).await;
    }
    let mut client = connect(server, true).await?;
    let (mut left, mut count) = (arguments.limit, 0);
    let mut page_token = String::new();
    let mut is_first = true;
    while left > 0 {
        let request = ListFindingsRequest {
            since_ns,
            limit: left.min(PAGE),
            page_token,
            severity: filter(&arguments.severity),
            pattern: filter(&arguments.pattern),
            pod: filter(&arguments.pod),
            namespace: filter(&arguments.namespace),
            node: filter(&arguments.node),
            workload: filter(&arguments.workload),
        };
        let response = client.list_findings(request).await.map_err(|status| Failure::of(server, &status))?.into_inner();
        server.lacks(&response.incomplete)?;
        let mut text = String::new();
        if is_first && printing.format.is_table() {
            text = if response.findings.is_empty() { "No findings.\n".to_owned() } else { header(printing) };
        }
        is_first = false;
        for finding in response.findings.iter().take(left as usize) {
            text.push_str(&line(printing, finding));
        }
        print(&text)?;
        left = left.saturating_sub(response.findings.len() as u32);
        count += response.findings.len();
        page_token = response.next_page_token;
        if page_token.is_empty() || response.findings.is_empty() {
            break;
        }
    }
    if count == 0 {
        for hint in unknown_names(&mut client, server, arguments).await? {
            complain!("tapioctl: {}", render::clean(&hint));
        }
    }
    Ok(())
}

/// Which of the names that were asked for nobody knows, as far as that is known.
async fn unknown_names(
    client: &mut Client,
    server: &ServerAt,
    arguments: &ListArguments,
) -> Result<Vec<String>, Failure> {
    let mut hints = Vec::new();
    if let Some(pattern) = &arguments.pattern
        && !PatternSet::embedded().is_ok_and(|set| set.patterns().iter().any(|one| one.id == *pattern))
    {
        hints.push(format!("no built-in pattern is called {pattern}: docs/patterns.md lists them"));
    }
    if let Some(node) = &arguments.node {
        let status = super::server::status(client, server).await?;
        let known: Vec<_> = status.nodes.iter().map(|node| node.node.as_str()).collect();
        if !known.contains(&node.as_str()) {
            hints.push(format!("no node is called {node}; known are: {}", known.join(", ")));
        }
    }
    let names = [("namespace", &arguments.namespace), ("pod", &arguments.pod), ("workload", &arguments.workload)];
    let names = names.into_iter().filter_map(|(what, name)| Some(format!("{what} {}", name.as_deref()?)));
    let names = names.collect::<Vec<_>>().join(", ");
    if !names.is_empty() {
        let request = ListEventsRequest {
            namespace: filter(&arguments.namespace),
            pod: filter(&arguments.pod),
            workload: filter(&arguments.workload),
            limit: 1,
            ..ListEventsRequest::default()
        };
        match first_event(client, request).await {
            Ok(true) => {}
            Ok(false) => hints.push(format!(
                "no finding and no event in the archive names {names}: `tapioctl findings -o wide` lists what was found, with names"
            )),
            Err(reason) => hints.push(format!("no finding names {names}; whether an event does is not known: {reason}")),
        }
    }
    Ok(hints)
}

/// Whether there is any event of this kind, or why nobody knows.
async fn first_event(client: &mut Client, request: ListEventsRequest) -> Result<bool, String> {
    let answered = async {
        let mut events = client.list_events(request).await?.into_inner();
        events.message().await
    };
    match answered.await {
        Ok(Some(event)) => match event.incomplete.first() {
            Some(missing) => Err(missing.reason.clone()),
            None => Ok(true),
        },
        Ok(None) => Ok(false),
        Err(status) if status.code() == Code::NotFound => Ok(false),
        Err(status) => Err(status.message().to_owned()),
    }
}

fn header(printing: Printing) -> String {
    let header = render::list_header(printing.style);
    match printing.format {
        Format::Wide => format!("{:<14} {:<28} {header}", "NODE", "ENTITY"),
        _ => header,
    }
}

fn line(printing: Printing, finding: &Finding) -> String {
    if let Some(text) = printing.format.one(&render::finding_value(finding)) {
        return text;
    }
    let row = render::list_row(printing.style, finding);
    if printing.format != Format::Wide {
        return row;
    }
    let entity = finding.entity.clone().unwrap_or_default();
    let [node, name] =
        [(&entity.node, 14), (&entity.name, 28)].map(|(text, columns)| render::padded(&render::clean(text), columns));
    format!("{node} {name} {row}")
}

/// Findings that were shown, so that those of another server are not shown again. Servers count revisions and times of
/// publication each by itself; the rest of a finding is the same.
#[derive(Default)]
struct ShownFindings {
    /// The table's first line, until it is printed.
    heading: Option<String>,
    versions: HashMap<String, u64>,
    /// Start of what is shown, by a server's clock; earlier publications are not shown.
    shown_from_ns: u64,
    oldest_first: VecDeque<String>,
}

impl ShownFindings {
    /// Whether this version was not shown.
    fn is_news(&mut self, finding: &Finding) -> bool {
        if finding.published_ns < self.shown_from_ns {
            return false;
        }
        let same_for_all = Finding { published_ns: 0, revision: 0, ..finding.clone() };
        let mut hasher = DefaultHasher::new();
        format!("{same_for_all:?}").hash(&mut hasher);
        let version = hasher.finish();
        match self.versions.insert(finding.id.clone(), version) {
            Some(shown) => shown != version,
            None => {
                self.oldest_first.push_back(finding.id.clone());
                if self.oldest_first.len() > SHOWN_MAX
                    && let Some(oldest) = self.oldest_first.pop_front()
                {
                    self.versions.remove(&oldest);
                }
                true
            }
        }
    }
}

/// Follows one server, and the next one that answers when it goes away.
async fn watch(server: &ServerAt, printing: Printing, since_ns: u64) -> Result<(), Failure> {
    let began_ns = now_ns();
    let heading = printing.format.is_table().then(|| header(printing));
    let (mut shown, mut from_ns) = (ShownFindings { heading, ..ShownFindings::default() }, since_ns);
    loop {
        let mut client = connect(server, false).await?;
        match follow(&mut client, server, printing, from_ns, &mut shown).await {
            Err(failure) if server.may_go_on_after(&failure) => {
                if let Failure::Unreachable(reason) | Failure::Broken(reason) = failure {
                    complain!("tapioctl: {reason}; going on at the first server that answers");
                }
            }
            outcome => return outcome,
        }
        // What was published while the old server was silent. It may be of deaths before this began, and of clocks that differ;
        // what was there before is known by when it was published.
        from_ns = if since_ns > 0 { since_ns } else { began_ns.saturating_sub(MOVED_BACK_NS) };
        shown.shown_from_ns = if since_ns > 0 { 0 } else { began_ns.saturating_sub(CLOCKS_DIFFER_NS) };
        tokio::time::sleep(MOVE_PAUSE).await;
    }
}

async fn follow(
    client: &mut Client,
    server: &ServerAt,
    printing: Printing,
    since_ns: u64,
    shown: &mut ShownFindings,
) -> Result<(), Failure> {
    learn_who_is_missing(client, server).await?;
    // It goes on until it is interrupted: what is missing at its start is said there, and later in each finding.
    server.complain();
    server.ask_anew();
    let mut stream = client
        .watch_findings(WatchFindingsRequest { since_ns })
        .await
        .map_err(|status| Failure::of(server, &status))?
        .into_inner();
    if let Some(heading) = shown.heading.take() {
        print(&heading)?;
    }
    let mut nobody_reads = std::pin::pin!(nobody_reads());
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            failure = &mut nobody_reads => return Err(failure),
        };
        match message {
            Ok(Some(finding)) if shown.is_news(&finding) => print(&line(printing, &finding))?,
            Ok(Some(_)) => {}
            Ok(None) => {
                return Err(Failure::Unreachable(format!("{}: it ended the stream", &**server)));
            }
            Err(status) => return Err(Failure::of(server, &status)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_servers_count_is_no_news_and_another_version_is() {
        let mut shown = ShownFindings::default();
        let finding = Finding { id: "a".into(), summary: "one".into(), revision: 1, ..Finding::default() };
        assert!(shown.is_news(&finding));
        assert!(!shown.is_news(&Finding { revision: 3, published_ns: 9, ..finding.clone() }));
        assert!(shown.is_news(&Finding { summary: "two".into(), ..finding.clone() }));
        shown.shown_from_ns = 8;
        assert!(!shown.is_news(&Finding { id: "old".into(), published_ns: 7, ..finding.clone() }));
        shown.shown_from_ns = 0;
        for number in 0..SHOWN_MAX {
            assert!(shown.is_news(&Finding { id: number.to_string(), ..finding.clone() }));
        }
        assert_eq!((shown.versions.len(), shown.oldest_first.len()), (SHOWN_MAX, SHOWN_MAX), "it is bounded");
    }
}
