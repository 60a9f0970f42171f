//! `tapioctl ledger`: where every event went, by node, epoch and source.

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use serde_json::Value;
use tapio_server::render;

use super::Printing;
use super::output::print;
use super::server::{self as at, Failure, ServerAt, connect};

#[derive(Args)]
pub struct Arguments {
    /// Only this node
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    node: Option<String>,
}

/// Runs `tapioctl ledger`.
pub async fn run(server: &ServerAt, printing: Printing, arguments: &Arguments) -> Result<(), Failure> {
    let mut client = connect(server, true).await?;
    let mut status = at::status(&mut client, server).await?;
    if let Some(node) = &arguments.node {
        let known: Vec<_> = status.nodes.iter().map(|node| node.node.clone()).collect();
        status.nodes.retain(|known| known.node == *node);
        if status.nodes.is_empty() {
            return Err(Failure::Other(format!("no node is called {node}; known are: {}", known.join(", "))));
        }
        // It is a count of all nodes together.
        status.elsewhere.clear();
    }
    if printing.format.is_table() {
        return print(&render::ledger(printing.style, &status));
    }
    let value = render::status_value(&status);
    let mut text = String::new();
    for node in value["nodes"].as_array().into_iter().flatten() {
        for epoch in node["epochs"].as_array().into_iter().flatten() {
            for source in epoch["sources"].as_array().into_iter().flatten() {
                let mut row = source.clone();
                if let Value::Object(row) = &mut row {
                    row.insert("node".into(), node["node"].clone());
                    row.insert("epoch".into(), epoch["epoch"].clone());
                    row.insert("state".into(), epoch["state"].clone());
                }
                text.push_str(&printing.format.one(&row).unwrap_or_default());
            }
        }
    }
    print(&text)
}
