//! `/`: findings, newest first, by what they are about, with filters in the address.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::HeaderMap;
use maud::{Markup, html};
use serde::Deserialize;
use tapio_wire::service::{Finding, ListFindingsRequest};

use super::frame::{self, PageHead};
use super::groups::{self, Group};
use super::{Failure, Page, Pages, now_ns, or_nothing, parts, unknown};
use crate::findings::text;
use crate::query::{self, SEVERITIES};
use crate::render;

/// Groups on a page, findings that each shows, and findings on a page where they are not grouped.
const GROUPS: usize = 20;
const OF_GROUP: usize = 3;
const FINDINGS: usize = 50;
/// Names that a filter suggests.
const NAMES_MAX: usize = 50;
/// How far back the filters offer to look.
const SINCE: [(&str, &str); 5] =
    [("", "any time"), ("1h", "last hour"), ("6h", "6 hours"), ("1d", "day"), ("7d", "week")];

/// What the address asks for. The filters are those of `/api/v1/findings`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Asked {
    since: String,
    severity: String,
    pattern: String,
    namespace: String,
    workload: String,
    node: String,
    pod: String,
    /// `list`: without groups.
    view: String,
    /// Page of groups, from 1.
    page: usize,
    /// Token of the page of findings.
    page_token: String,
}

impl Asked {
    fn request(&self, now_ns: u64) -> Result<ListFindingsRequest, Failure> {
        let since_ns = match self.since.as_str() {
            "" => 0,
            since => render::parse_since(since, now_ns).map_err(Failure::usage)?,
        };
        Ok(ListFindingsRequest {
            since_ns,
            page_token: self.page_token.clone(),
            severity: self.severity.clone(),
            pattern: self.pattern.clone(),
            pod: self.pod.clone(),
            namespace: self.namespace.clone(),
            node: self.node.clone(),
            workload: self.workload.clone(),
            ..ListFindingsRequest::default()
        })
    }

    fn filters(&self) -> [(&'static str, &str); 7] {
        [
            ("since", &self.since),
            ("severity", &self.severity),
            ("pattern", &self.pattern),
            ("namespace", &self.namespace),
            ("workload", &self.workload),
            ("node", &self.node),
            ("pod", &self.pod),
        ]
    }

    fn is_filtered(&self) -> bool {
        self.filters().iter().any(|(_, value)| !value.is_empty())
    }

    /// The address of another view or page with the same filters.
    fn address(&self, more: &[(&str, &str)]) -> String {
        let all = self.filters().into_iter().chain(more.iter().copied());
        let all = all.filter(|(_, value)| !value.is_empty());
        let all: Vec<_> = all.map(|(key, value)| format!("{key}={}", parts::encoded(value))).collect();
        if all.is_empty() { "/".into() } else { format!("/?{}", all.join("&")) }
    }
}

/// The page.
pub async fn page(State(pages): State<Pages>, asked: Result<Query<Asked>, QueryRejection>, headers: HeaderMap) -> Page {
    let Query(asked) = asked.map_err(|rejection| Failure::usage(rejection.body_text()))?;
    let now_ns = now_ns();
    let request = asked.request(now_ns)?;
    let all = ListFindingsRequest { page_token: String::new(), ..request.clone() };
    let all = pages.page(&all, usize::MAX).map_err(Failure::usage)?.findings;
    let listed = match asked.view.as_str() {
        "list" => {
            let page = pages.page(&request, FINDINGS).map_err(Failure::usage)?;
            list(&asked, &page, now_ns)
        }
        _ => grouped(&asked, &groups::of(&all), now_ns),
    };
    let hours = parts::deaths_by_hour(&all, now_ns);
    let status = pages.status(&headers).await;
    let main = html! {
        h1 { "Findings" }
        div #unknown data-fresh { (unknown::notice(status.as_ref(), &pages.unheard(), now_ns)) }
        details.filtering #filtering open[asked.is_filtered()] {
            summary { "Filters" }
            (filters(&asked, &names(&pages)))
        }
        div #list data-fresh {
            (parts::sparkline(&hours, true))
            p.quiet {
                (text::count(all.len() as u64, "finding"))
                @if asked.is_filtered() { " match · " a href="/" { "show all" } }
                " · "
                @if asked.view == "list" { a href=(asked.address(&[])) { "by workload" } }
                @else { a href=(asked.address(&[("view", "list")])) { "one by one" } }
            }
            @if all.is_empty() { (nothing(&asked)) }
            (listed)
        }
    };
    Ok(frame::page(PageHead { title: "Findings", at: "/", follows: "all" }, &main))
}

fn nothing(asked: &Asked) -> Markup {
    html! {
        p {
            @if asked.is_filtered() { "Nothing was found that matches these filters." }
            @else { "Nothing was found to be wrong so far. What is found appears here by itself." }
        }
    }
}

/// Findings by what they are about.
fn grouped(asked: &Asked, groups: &[Group], now_ns: u64) -> Markup {
    let pages = groups.len().div_ceil(GROUPS).max(1);
    let page = asked.page.clamp(1, pages);
    let shown = groups.iter().skip((page - 1) * GROUPS).take(GROUPS);
    html! {
        @for group in shown { (one(asked, group, now_ns)) }
        @if pages > 1 {
            nav.pages aria-label="Pages" {
                @if page > 1 { a rel="prev" href=(asked.address(&[("page", &(page - 1).to_string())])) { "Newer" } }
                span { "Page " (page) " of " (pages) }
                @if page < pages { a rel="next" href=(asked.address(&[("page", &(page + 1).to_string())])) { "Older" } }
            }
        }
    }
}

fn one(asked: &Asked, group: &Group, now_ns: u64) -> Markup {
    let hours = parts::deaths_by_hour(&group.findings, now_ns);
    let more = group.findings.len().saturating_sub(OF_GROUP);
    html! {
        section.group {
            header {
                h2 {
                    @match &group.path {
                        Some(path) => a href=(path) { (parts::cut(&group.called)) },
                        None => { (parts::cut(&group.called)) }
                    }
                }
                p.quiet {
                    (text::count(group.findings.len() as u64, "finding"))
                    @if group.deaths() > 0 { " · " (text::count(group.deaths(), "death")) }
                }
                (parts::sparkline(&hours, false))
            }
            (parts::finding_list(&group.findings[..group.findings.len().min(OF_GROUP)], now_ns, ""))
            @if more > 0 { p.more { a href=(all_of(asked, group)) { "and " (more) " more" } } }
        }
    }
}

/// The list that has all findings of a group.
fn all_of(asked: &Asked, group: &Group) -> String {
    let entity = group.findings.first().and_then(|finding| finding.entity.clone()).unwrap_or_default();
    let mut narrowed = asked.clone();
    if !entity.workload.is_empty() && !entity.namespace.is_empty() {
        (narrowed.namespace, narrowed.workload) = (entity.namespace, entity.workload);
    } else if !entity.pod.is_empty() && !entity.namespace.is_empty() {
        narrowed.pod = format!("{}/{}", entity.namespace, entity.pod);
    } else {
        narrowed.node = entity.node;
    }
    narrowed.address(&[("view", "list")])
}

/// Findings one by one.
fn list(asked: &Asked, page: &query::Page, now_ns: u64) -> Markup {
    html! {
        (parts::finding_list(&page.findings, now_ns, ""))
        @if !page.next_page_token.is_empty() || !asked.page_token.is_empty() {
            nav.pages aria-label="Pages" {
                @if !asked.page_token.is_empty() { a href=(asked.address(&[("view", "list")])) { "Newest" } }
                @if !page.next_page_token.is_empty() {
                    a rel="next" href=(asked.address(&[("view", "list"), ("page_token", &page.next_page_token)])) { "Older" }
                }
            }
        }
    }
}

/// What the filters may be set to.
#[derive(Default)]
struct Names {
    patterns: BTreeSet<String>,
    namespaces: BTreeSet<String>,
    workloads: BTreeSet<String>,
    nodes: BTreeSet<String>,
}

/// The names that are in the findings there are.
fn names(pages: &Pages) -> Names {
    let mut names = Names::default();
    let mut add = |finding: &Arc<Finding>| {
        let insert = |into: &mut BTreeSet<String>, name: &str| {
            if !name.is_empty() && into.len() < NAMES_MAX && !into.contains(name) {
                into.insert(name.to_owned());
            }
        };
        insert(&mut names.patterns, &finding.pattern);
        if let Some(entity) = &finding.entity {
            insert(&mut names.namespaces, &entity.namespace);
            insert(&mut names.workloads, &entity.workload);
            insert(&mut names.nodes, &entity.node);
        }
    };
    let everything = query::page(&pages.store, &ListFindingsRequest::default(), usize::MAX).unwrap_or_default();
    everything.findings.iter().for_each(&mut add);
    names
}

fn filters(asked: &Asked, names: &Names) -> Markup {
    let text = |name: &str, label: &str, value: &str, known: Option<&BTreeSet<String>>| {
        let list = format!("{name}s");
        html! {
            div {
                label for=(name) { (label) }
                input id=(name) name=(name) value=(value) autocomplete="off" spellcheck="false" list=[known.map(|_| &list)];
                (or_nothing(known, |known| html! {
                    datalist id=(list) { @for name in known { option value=(name) {} } }
                }))
            }
        }
    };
    let is_known = SINCE.iter().any(|(since, _)| *since == asked.since);
    html! {
        form.filters #filters method="get" action="/" role="search" aria-label="Filters" {
            div {
                label for="severity" { "Severity" }
                select id="severity" name="severity" {
                    option value="" { "any" }
                    @for severity in SEVERITIES.iter().skip(1) {
                        option value=(severity) selected[asked.severity == *severity] {
                            (severity) @if *severity != "critical" { " or higher" }
                        }
                    }
                }
            }
            div {
                label for="since" { "Time" }
                select id="since" name="since" {
                    @for (since, label) in SINCE { option value=(since) selected[asked.since == since] { (label) } }
                    @if !is_known { option value=(asked.since) selected { "since " (asked.since) } }
                }
            }
            div {
                label for="pattern" { "Pattern" }
                select id="pattern" name="pattern" {
                    option value="" { "any" }
                    @for pattern in &names.patterns { option selected[asked.pattern == *pattern] { (pattern) } }
                    @if !asked.pattern.is_empty() && !names.patterns.contains(&asked.pattern) {
                        option selected { (asked.pattern) }
                    }
                }
            }
            (text("namespace", "Namespace", &asked.namespace, Some(&names.namespaces)))
            (text("workload", "Workload", &asked.workload, Some(&names.workloads)))
            (text("node", "Node", &asked.node, Some(&names.nodes)))
            (text("pod", "Pod", &asked.pod, None))
            @if !asked.view.is_empty() { input type="hidden" name="view" value=(asked.view); }
            button type="submit" { "Filter" }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_stay_in_the_address() {
        let asked = Asked { severity: "high".into(), workload: "Deployment/a&b".into(), ..Asked::default() };
        assert_eq!(asked.address(&[("page", "2")]), "/?severity=high&workload=Deployment%2Fa%26b&page=2");
        assert_eq!(Asked::default().address(&[]), "/");
    }
}
