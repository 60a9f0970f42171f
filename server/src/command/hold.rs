//! `tapio-server archive hold`: what must not be deleted, and why.

use clap::{Args, Subcommand};
use serde_json::json;
use tapio_wire::program::clock::now_ns;

use super::place::Place;
use super::{CommandError, Verdict, moment, print};
use crate::archive::holds::{self, Hold};
use crate::render::{self, padded, rfc3339};

/// `tapio-server archive hold …`
#[derive(Subcommand)]
pub enum HoldCommand {
    /// Keep a time, or a namespace in it: retention and erase do not delete it
    Add(AddArguments),
    /// End a hold, by its id
    Remove(RemoveArguments),
    /// List the holds
    List(ListArguments),
}

/// What to keep.
#[derive(Args)]
pub struct AddArguments {
    #[command(flatten)]
    place: Place,
    /// Keep events since: an age (90s, 10m, 2h, 1d) or a date in UTC (2026-01-02T03:04:05Z); default: all
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// Keep events until: an age or a date, as in --since; default: all, also those to come
    #[arg(long, value_name = "WHEN")]
    until: Option<String>,
    /// Keep only segments with events of this namespace
    #[arg(long, short)]
    namespace: Option<String>,
    /// Why it must be kept
    #[arg(long)]
    reason: String,
}

/// What to end.
#[derive(Args)]
pub struct RemoveArguments {
    #[command(flatten)]
    place: Place,
    /// The hold's id, as list prints it
    id: String,
}

/// What to list.
#[derive(Args)]
pub struct ListArguments {
    #[command(flatten)]
    place: Place,
    /// Print JSON, one object a line
    #[arg(long)]
    json: bool,
}

pub(super) fn run(command: &HoldCommand) -> Result<Verdict, CommandError> {
    match command {
        HoldCommand::Add(arguments) => add(arguments),
        HoldCommand::Remove(arguments) => remove(arguments),
        HoldCommand::List(arguments) => list(arguments),
    }
}

/// The holds of a place.
pub(super) fn of(place: &Place) -> Result<Vec<Hold>, CommandError> {
    match place.directory() {
        Some(dir) => Ok(holds::load(dir)?),
        None => Ok(place.keeping()?.holds()?),
    }
}

fn add(arguments: &AddArguments) -> Result<Verdict, CommandError> {
    let now = now_ns();
    let hold = Hold {
        id: format!("{}-{:05x}", now / 1_000_000_000, now & 0xf_ffff),
        since_ns: moment(arguments.since.as_deref())?.unwrap_or(0),
        until_ns: moment(arguments.until.as_deref())?.unwrap_or(u64::MAX),
        namespace: arguments.namespace.clone(),
        reason: arguments.reason.clone(),
        by: arguments.place.by()?,
        made_ns: now,
    };
    if hold.since_ns > hold.until_ns {
        return Err(CommandError::Usage("--since is later than --until: nothing would be kept".into()));
    }
    match arguments.place.directory() {
        Some(dir) => {
            if !dir.is_dir() {
                return Err(CommandError::Usage(format!("{} is no directory", dir.display())));
            }
            holds::add(dir, &hold)?;
        }
        None => arguments.place.keeping()?.add_hold(&hold)?,
    }
    arguments.place.audit(&record("hold add", &hold, &hold.by))?;
    print(&format!("{}\n", hold.id))?;
    Ok(Verdict::Done)
}

fn remove(arguments: &RemoveArguments) -> Result<Verdict, CommandError> {
    let (place, id) = (&arguments.place, arguments.id.as_str());
    let by = place.by()?;
    let known = of(place)?.into_iter().find(|hold| hold.id == id);
    let hold = known.ok_or_else(|| CommandError::Other(format!("no hold has the id {id}")))?;
    if !holds::is_id(id) {
        return Err(CommandError::Other(format!("{id} is no name of a hold: look at the file, and delete it by hand")));
    }
    // Who ends it is written down before it ends.
    place.audit(&record("hold remove", &hold, &by))?;
    let was_there = match place.directory() {
        Some(dir) => holds::remove(dir, id)?,
        None => place.keeping()?.remove_hold(id)?,
    };
    if !was_there {
        return Err(CommandError::Other(format!("the hold {id} has gone meanwhile: list them again")));
    }
    Ok(Verdict::Done)
}

fn record(what: &str, hold: &Hold, by: &str) -> serde_json::Value {
    json!({
        "at": rfc3339(now_ns()), "what": what, "by": by, "id": hold.id, "reason": hold.reason,
        "namespace": hold.namespace, "since": rfc3339(hold.since_ns), "until": until(hold),
    })
}

fn until(hold: &Hold) -> Option<String> {
    (hold.until_ns < u64::MAX).then(|| rfc3339(hold.until_ns))
}

fn list(arguments: &ListArguments) -> Result<Verdict, CommandError> {
    for hold in of(&arguments.place)? {
        if arguments.json {
            print(&format!("{}\n", record("hold", &hold, &hold.by)))?;
            continue;
        }
        let until = until(&hold).unwrap_or_else(|| "for ever".to_owned());
        print(&format!(
            "{} {} to {}  namespace {}  by {}: {}\n",
            padded(&hold.id, 18),
            rfc3339(hold.since_ns),
            until,
            render::clean(hold.namespace.as_deref().unwrap_or("(all)")),
            render::clean(&hold.by),
            render::clean(&hold.reason),
        ))?;
    }
    Ok(Verdict::Done)
}
