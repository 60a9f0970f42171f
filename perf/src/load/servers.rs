//! The servers of a run: one or several of its own, or one that runs already.
//!
//! In: how many, and whether they share a log. Out: what all of them have together, and what each of them did. What must hold: every
//! server is asked for its own part only, so nothing is counted twice.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde::Serialize;
use tapio_wire::service::{Finding, StatusResponse};

use super::LoadOptions;
use super::ledger::NodeLedger;
use super::log_watch::LogWatch;
use crate::client::Client;
use crate::clock::pause;
use crate::error::Error;
use crate::processes::group::server_name;
use crate::processes::usage::{self, Usage};
use crate::processes::{GroupOptions, ServerGroup, ServerOptions};

/// How long finders may take until all have found the same.
const AGREE_LIMIT: Duration = Duration::from_secs(60);
const AGREE_INTERVAL: Duration = Duration::from_millis(500);
/// Differences that are named.
const DIFFERENCES_MAX: usize = 20;

/// What several servers did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ClusterReport {
    pub servers: Vec<ServerShare>,
    /// [`None`] where they share none.
    pub log: Option<LogCost>,
    /// [`None`] where they share no log: then each finds what its own nodes report.
    pub findings: Option<Agreement>,
}

/// What one of several servers did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ServerShare {
    pub server: String,
    /// Collectors that shipped to it.
    pub nodes: usize,
    pub events_archived: u64,
    pub events_per_second: f64,
    /// The ledgers of its nodes close, and it can explain all events.
    pub ledger_closes: bool,
    /// 100 is one core for the whole run.
    pub cpu_percent_of_core: f64,
    /// Peak memory.
    pub rss_bytes: u64,
    /// Findings that it has at the end.
    pub findings: u64,
    /// How it stood to the log; [`None`] without one.
    pub log: Option<ReaderShare>,
}

/// How one server stood to the log. Seen a few times a second.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ReaderShare {
    /// Messages in the log that it had not read, at most, and how long the oldest of them had been there.
    pub behind_messages_max: u64,
    pub behind_ms_max: u64,
    /// Messages that it had read and its finder had not dealt with, at most.
    pub finder_queue_max: u64,
    /// Entries that waited to be put into messages, at most.
    pub waiting_entries_max: u64,
    /// Messages that it wrote, and clues that its finder dealt with: its own and the others'.
    pub messages_written: u64,
    pub clues_found: u64,
    /// What found no room, and is sent again from the archive.
    pub entries_left_out: u64,
    /// How often it started to read again from the beginning; then [`Self::behind_messages_max`] is of the time before.
    pub rebuilds: u64,
    /// True if the server was seen to continue without the log.
    pub was_alone: bool,
    /// How often its metrics did not come in time.
    pub unanswered: u64,
}

/// What went through the log, and what NATS cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LogCost {
    /// Messages of all servers in the log, from before the collectors' start to their end.
    pub messages: u64,
    /// Bytes of messages to NATS, and from it to all servers.
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// 100 is one core for the whole run.
    pub nats_cpu_percent_of_core: f64,
    /// Peak memory of the NATS server.
    pub nats_rss_bytes: u64,
}

/// Whether all servers found the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Agreement {
    /// All servers have findings of the same ids, and of the same content but for how often and when each was published.
    pub equal_by_id: bool,
    pub equal: bool,
    /// Findings that all have.
    pub count: u64,
    /// Time from the end of the collectors until all servers agreed.
    pub after_ms: u64,
    /// What differs, for people; at most 20.
    pub differences: Vec<String>,
}

/// The servers that a run loads.
pub(super) struct Servers {
    group: Option<ServerGroup>,
    addresses: Vec<String>,
    clients: Vec<Client>,
}

impl Servers {
    /// Connects to the one that was named, or starts them.
    pub fn start(options: &LoadOptions) -> Result<Self, Error> {
        let group = match &options.server {
            Some(_) => None,
            None => Some(ServerGroup::start(&GroupOptions {
                servers: options.servers.map_or(1, |several| several.count),
                with_log: options.servers.is_some_and(|several| several.with_log),
                server: ServerOptions {
                    bin_dir: options.bin_dir.clone(),
                    extra_config: options.server_config.clone(),
                    ..ServerOptions::default()
                },
            })?),
        };
        let own = group.iter().flat_map(ServerGroup::servers).map(super::Server::address);
        let addresses: Vec<String> = options.server.iter().cloned().chain(own).collect();
        let clients = addresses.iter().map(|address| Client::connect(address)).collect::<Result<_, _>>()?;
        Ok(Self { group, addresses, clients })
    }

    /// Where the collector of node `index` ships to.
    pub fn address_for(&self, index: usize) -> &str {
        &self.addresses[index % self.addresses.len()]
    }

    /// Returns the servers that were started here.
    pub fn group(&self) -> Option<&ServerGroup> {
        self.group.as_ref()
    }

    /// An error when one of them does not run any more.
    pub fn check_running(&mut self) -> Result<(), Error> {
        self.group.as_mut().map_or(Ok(()), ServerGroup::check_running)
    }

    /// What each of them has used; nothing of one that was not started here.
    pub fn usage(&self) -> Vec<Usage> {
        let servers = self.group.iter().flat_map(ServerGroup::servers);
        servers.map(|server| server.pid().and_then(usage::read).unwrap_or_default()).collect()
    }

    /// What each of them says.
    pub fn each_status(&mut self) -> Result<Vec<StatusResponse>, Error> {
        let is_own = self.group.is_some();
        let ask = |client: &mut Client| if is_own { client.own_status() } else { client.status() };
        self.clients.iter_mut().map(ask).collect()
    }

    /// What all of them say together.
    pub fn status(&mut self) -> Result<StatusResponse, Error> {
        Ok(merged(&self.each_status()?))
    }

    /// What each of several servers has at the end.
    pub fn shares(
        &mut self,
        ledger: &[NodeLedger],
        seconds: f64,
        (before, after): (&[Usage], &[Usage]),
    ) -> Result<Vec<ServerShare>, Error> {
        let statuses = self.each_status()?;
        let count = statuses.len();
        let share = |(index, status): (usize, &StatusResponse)| {
            let nodes: Vec<&NodeLedger> = ledger.iter().skip(index).step_by(count).collect();
            let archived = nodes.iter().map(|node| NodeLedger::new(&node.node, node.emitted, status).archived).sum();
            let used = |usage: &[Usage]| usage.get(index).copied().unwrap_or_default();
            let cpu_ns = used(after).cpu_ns.saturating_sub(used(before).cpu_ns);
            ServerShare {
                server: server_name(index),
                nodes: nodes.len(),
                events_archived: archived,
                events_per_second: archived as f64 / seconds.max(1e-9),
                ledger_closes: status.unexplained_events == 0 && nodes.iter().all(|node| node.closes()),
                cpu_percent_of_core: cpu_ns as f64 / (seconds.max(1e-9) * 1e9) * 100.0,
                rss_bytes: used(after).rss_peak_bytes,
                findings: status.findings,
                log: None,
            }
        };
        Ok(statuses.iter().enumerate().map(share).collect())
    }

    /// Waits until all have read the log and have found the same; the report has what differs then.
    pub fn agree(&mut self, log: &mut LogWatch) -> Result<Agreement, Error> {
        let began = Instant::now();
        let mut clues = None;
        let mut agreement = Agreement::default();
        loop {
            let Some(group) = &self.group else { return Ok(agreement) };
            let now = log.sample(group)?;
            let is_settled = now.is_some() && now == clues;
            clues = now;
            if is_settled {
                let findings = self.clients.iter_mut().map(Client::all_findings).collect::<Result<Vec<_>, _>>()?;
                agreement = Agreement { after_ms: began.elapsed().as_millis() as u64, ..compared(&findings) };
            }
            if agreement.equal || began.elapsed() > AGREE_LIMIT {
                if !is_settled && !agreement.equal {
                    agreement.differences.push(format!(
                        "the finders were not through with the log {} s after the collectors' end",
                        AGREE_LIMIT.as_secs()
                    ));
                }
                return Ok(agreement);
            }
            pause(AGREE_INTERVAL)?;
        }
    }

    /// Ends those that were started here.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.group.as_mut().map_or(Ok(()), ServerGroup::stop)
    }
}

/// One status of all parts.
fn merged(parts: &[StatusResponse]) -> StatusResponse {
    let mut all = parts.first().cloned().unwrap_or_default();
    for part in parts.iter().skip(1) {
        all.nodes.extend(part.nodes.iter().cloned());
        all.shards.extend(part.shards.iter().cloned());
        all.events_correlated += part.events_correlated;
        all.unexplained_events += part.unexplained_events;
        if let (Some(archive), Some(more)) = (&mut all.archive, &part.archive) {
            archive.written_bytes += more.written_bytes;
            archive.lethal_events += more.lethal_events;
        }
    }
    all
}

/// Compares what servers found.
fn compared(findings: &[Vec<Finding>]) -> Agreement {
    let plain = |finding: &Finding| Finding { revision: 0, published_ns: 0, ..finding.clone() };
    let by_id: Vec<BTreeMap<&str, &Finding>> =
        findings.iter().map(|of_one| of_one.iter().map(|finding| (&*finding.id, finding)).collect()).collect();
    let ids: BTreeSet<&str> = by_id.iter().flat_map(|of_one| of_one.keys().copied()).collect();
    let mut agreement = Agreement { equal_by_id: true, equal: true, ..Agreement::default() };
    for id in ids {
        let have: Vec<Option<&&Finding>> = by_id.iter().map(|of_one| of_one.get(id)).collect();
        let Some(first) = have.iter().flatten().next() else { continue };
        let lacking = (0..have.len()).filter(|&index| have[index].is_none()).map(server_name);
        let lacking: Vec<String> = lacking.collect();
        let is_same = have.iter().flatten().all(|finding| plain(finding) == plain(first));
        let difference = if !lacking.is_empty() {
            agreement.equal_by_id = false;
            format!("{id} ({}): {} has it not", first.pattern, lacking.join(", "))
        } else if is_same {
            agreement.count += 1;
            continue;
        } else {
            format!("{id} ({}): not the same everywhere", first.pattern)
        };
        agreement.equal = false;
        if agreement.differences.len() < DIFFERENCES_MAX {
            agreement.differences.push(difference);
        }
    }
    agreement
}

#[cfg(test)]
mod tests {
    use super::*;
    use tapio_wire::service::{ArchiveStatus, NodeStatus};

    fn finding(id: &str, title: &str, revision: u32) -> Finding {
        Finding { id: id.into(), title: title.into(), revision, ..Finding::default() }
    }

    #[test]
    fn findings_agree_by_id_and_content() {
        let agreed = compared(&[
            vec![finding("a", "x", 1), finding("b", "y", 1)],
            vec![finding("b", "y", 4), finding("a", "x", 2)],
        ]);
        assert!(agreed.equal && agreed.equal_by_id && agreed.count == 2, "{agreed:?}");
        let other_content = compared(&[vec![finding("a", "x", 1)], vec![finding("a", "z", 1)]]);
        assert!(!other_content.equal && other_content.equal_by_id, "{other_content:?}");
        let lacking = compared(&[vec![finding("a", "x", 1)], vec![]]);
        assert!(!lacking.equal && !lacking.equal_by_id, "{lacking:?}");
        assert!(lacking.differences[0].contains("server-1 has it not"), "{lacking:?}");
    }

    #[test]
    fn what_servers_have_is_added_up() {
        let part = |node: &str, bytes, unexplained_events| StatusResponse {
            nodes: vec![NodeStatus { node: node.into(), ..NodeStatus::default() }],
            archive: Some(ArchiveStatus { written_bytes: bytes, ..ArchiveStatus::default() }),
            unexplained_events,
            events_correlated: 5,
            ..StatusResponse::default()
        };
        let all = merged(&[part("a", 3, 0), part("b", 4, -1)]);
        assert_eq!((all.nodes.len(), all.events_correlated, all.unexplained_events), (2, 10, -1));
        assert_eq!(all.archive.expect("an archive").written_bytes, 7);
    }
}
