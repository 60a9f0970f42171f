//! Compiles proto/tapio.proto with protox, so that no protoc is needed.

use std::collections::BTreeSet;
use std::path::PathBuf;

use prost::Message;

/// A finding is kept on disk as JSON, and with it every message in it.
const KEPT: &str = ".tapio.v1.Finding";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/tapio.proto");
    let descriptors = protox::compile(["proto/tapio.proto"], ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    // What gRPC reflection shows.
    std::fs::write(out.join("tapio.bin"), descriptors.encode_to_vec())?;
    let mut kept = BTreeSet::from([KEPT.to_owned()]);
    loop {
        let messages = descriptors.file.iter().flat_map(|file| &file.message_type);
        let inside: Vec<String> = messages
            .filter(|message| kept.contains(&format!(".tapio.v1.{}", message.name())))
            .flat_map(|message| &message.field)
            .filter_map(|field| field.type_name.clone())
            .filter(|name| !kept.contains(name))
            .collect();
        if inside.is_empty() {
            break;
        }
        kept.extend(inside);
    }
    let mut builder = tonic_prost_build::configure().bytes(".");
    for message in &kept {
        builder = builder
            .type_attribute(message, "#[derive(serde::Serialize, serde::Deserialize)]")
            .message_attribute(message, "#[serde(default)]");
    }
    builder.compile_fds(descriptors)?;
    Ok(())
}
