//! lz4 block compression of frame bodies, with the table kept between frames.

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

/// How a frame's body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// lz4 block format, no size prefix.
    Lz4,
    /// As it is.
    None,
}

/// Compresses bodies one after another, with its table and its output buffer kept.
pub struct Compressor {
    table: CompressTable,
    output: Vec<u8>,
}

impl Default for Compressor {
    fn default() -> Self {
        Self { table: CompressTable::large(), output: Vec::new() }
    }
}

impl Compressor {
    /// The compressed `raw`, valid until the next call.
    pub fn compress(&mut self, raw: &[u8]) -> &[u8] {
        let size_max = get_maximum_output_size(raw.len());
        if self.output.len() < size_max {
            self.output.resize(size_max, 0);
        }
        let written = compress_into_with_table(raw, &mut self.output, &mut self.table)
            .expect("the output has the maximal size that lz4 can need");
        &self.output[..written]
    }
}
