//! `tapioctl silence` and `tapioctl ack`.

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};
use clap_complete::engine::ArgValueCompleter;
use tapio_server::render;
use tapio_wire::program::clock::now_ns;
use tapio_wire::service::{
    AcknowledgeRequest, AddSilenceRequest, EndSilenceRequest, ListSilencesRequest, ListSilencesResponse, Silence,
};
use tonic::{Code, Response, Status};

use super::output::print;
use super::server::{Failure, ServerAt, connect_silences};
use super::{Printing, complete, filter};

#[derive(Subcommand)]
pub enum Command {
    /// Silence findings of a pattern, a namespace or a workload; they stay in lists, with a mark
    Add(AddArguments),
    /// List what is silenced and acknowledged
    List {
        /// Also what is over
        #[arg(long)]
        all: bool,
    },
    /// End a silence or an acknowledgement
    End {
        /// Id of it, or the beginning of the id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        id: String,
    },
}

#[derive(Args)]
pub struct AddArguments {
    /// Pattern by id; * stands for anything
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    pattern: Option<String>,
    /// Namespace; * stands for anything
    #[arg(long, short, value_parser = NonEmptyStringValueParser::new())]
    namespace: Option<String>,
    /// Workload (as Deployment/web); * stands for anything
    #[arg(long, value_name = "KIND/NAME", value_parser = NonEmptyStringValueParser::new())]
    workload: Option<String>,
    /// How long (30m, 2h, 1d), or until when: a date in UTC (2026-01-02T03:04:05Z)
    #[arg(long = "for", value_name = "WHEN")]
    lasts: String,
    /// Why, for whoever misses a message
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    reason: String,
}

#[derive(Args)]
pub struct AckArguments {
    /// Id of the finding, or the beginning of the id
    #[arg(value_parser = NonEmptyStringValueParser::new(), add = ArgValueCompleter::new(complete::ids))]
    id: String,
    /// How long (30m, 2h, 1d), or until when: a date in UTC
    #[arg(long = "for", value_name = "WHEN", default_value = "1d")]
    lasts: String,
    /// A note for others
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
}

fn until(text: &str) -> Result<u64, Failure> {
    render::parse_until(text, now_ns()).map_err(Failure::Usage)
}

fn answer<T>(server: &ServerAt, answered: Result<Response<T>, Status>) -> Result<T, Failure> {
    match answered {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) if status.code() == Code::Unimplemented => {
            Err(Failure::Other(format!("{} is of a version that has no silences", &**server)))
        }
        Err(status) if status.code() == Code::InvalidArgument => Err(Failure::Usage(status.message().to_owned())),
        Err(status) => Err(Failure::of(server, &status)),
    }
}

fn show(printing: Printing, what: &str, silence: &Silence) -> Result<(), Failure> {
    let text = printing.format.one(&render::silence_value(silence));
    let said = || format!("{what} {}\n", render::clean(&silence.id));
    print(&text.unwrap_or_else(said))
}

/// `tapioctl silence`
pub async fn run(server: &ServerAt, printing: Printing, command: Command) -> Result<(), Failure> {
    match command {
        Command::Add(arguments) => {
            let AddArguments { pattern, namespace, workload, lasts, reason } = arguments;
            let (pattern, namespace, workload) = (filter(&pattern), filter(&namespace), filter(&workload));
            let request = AddSilenceRequest { pattern, namespace, workload, until_ns: until(&lasts)?, reason };
            let mut client = connect_silences(server).await?;
            show(printing, "silenced:", &answer(server, client.add_silence(request).await)?)
        }
        Command::List { all } => {
            let mut client = connect_silences(server).await?;
            let listed = client.list_silences(ListSilencesRequest { all }).await;
            let ListSilencesResponse { silences } = answer(server, listed)?;
            if printing.format.is_table() {
                return print(&render::silences(printing.style, &silences));
            }
            let lines = silences.iter().filter_map(|silence| printing.format.one(&render::silence_value(silence)));
            print(&lines.collect::<String>())
        }
        Command::End { id } => {
            let mut client = connect_silences(server).await?;
            show(printing, "ended:", &answer(server, client.end_silence(EndSilenceRequest { id }).await)?)
        }
    }
}

/// `tapioctl ack ID`
pub async fn acknowledge(server: &ServerAt, printing: Printing, arguments: AckArguments) -> Result<(), Failure> {
    let AckArguments { id: finding, lasts, reason } = arguments;
    let request = AcknowledgeRequest { finding, until_ns: until(&lasts)?, reason };
    let mut client = connect_silences(server).await?;
    show(printing, "acknowledged:", &answer(server, client.acknowledge(request).await)?)
}
