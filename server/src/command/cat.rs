//! `tapio-server archive cat`.

use std::io::{self, BufWriter, Write};
use std::ops::ControlFlow;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;

use super::{CommandError, Source, Verdict, moment, style, verdict_on};
use crate::events::{self, Choice};
use crate::render;

/// `tapio-server archive cat …`
#[derive(Args)]
pub struct CatArguments {
    #[command(flatten)]
    source: Source,
    /// Only events since: an age (90s, 10m, 2h, 1d) or a date in UTC (2026-01-02T03:04:05Z)
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// Only events until: an age or a date, as in --since
    #[arg(long, value_name = "WHEN")]
    until: Option<String>,
    /// Only events of this node
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    node: Option<String>,
    /// Only events of pods in this namespace
    #[arg(long, short, value_name = "NAMESPACE", value_parser = NonEmptyStringValueParser::new())]
    namespace: Option<String>,
    /// Only events of this pod (name, NAMESPACE/NAME or uid) and its containers
    #[arg(long, value_name = "POD", value_parser = NonEmptyStringValueParser::new())]
    pod: Option<String>,
    /// Only events of entities whose name contains this, whose id is this, or whose container id begins with this
    #[arg(long, value_name = "ENTITY", value_parser = NonEmptyStringValueParser::new())]
    entity: Option<String>,
    /// Only these event kinds, separated by commas: oom, exit, signal, kube_event, …
    #[arg(long, value_name = "KINDS", value_delimiter = ',')]
    kind: Vec<String>,
    /// Maximum number of rows; 0 for all
    #[arg(long, default_value_t = 0)]
    limit: u64,
    /// Print JSON, one object a line
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &CatArguments) -> Result<Verdict, CommandError> {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let choice = Choice {
        since_ns: moment(arguments.since.as_deref())?.unwrap_or(0),
        until_ns: moment(arguments.until.as_deref())?,
        node: text(&arguments.node),
        namespace: text(&arguments.namespace),
        pod: text(&arguments.pod),
        entity: text(&arguments.entity),
        kinds: events::kinds_named(arguments.kind.iter().map(String::as_str)).map_err(CommandError::Usage)?,
        limit: arguments.limit,
        ..Choice::default()
    };
    let folders = arguments.source.folders(choice.since_ns, choice.until_ns.unwrap_or(u64::MAX))?;
    let style = style();
    let mut out = BufWriter::new(io::stdout().lock());
    let mut failed = None;
    let outcome = events::select_from(&Source::reader(&folders), &choice, &mut |event| {
        let written = match arguments.json {
            true => writeln!(out, "{}", render::event_value(&event)),
            false => out.write_all(render::event_row(style, &event).as_bytes()),
        };
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    out.flush()?;
    tracing::debug!(?outcome, "done");
    Ok(verdict_on(&outcome.effort.damages, outcome.effort.undecodable))
}
