//! Compression of frame bodies, with what it needs kept between frames.

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

use crate::rows;

/// How a frame's body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Events as rows of numbers, smaller and faster than lz4; other text by lz4.
    Rows,
    /// lz4 block format, no size prefix.
    Lz4,
    /// Not at all.
    None,
}

/// Compresses bodies one after another, with lz4's table and the output buffer kept.
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
    /// The compressed archive of a body with `events` events, valid until the next call.
    pub fn compress<'a>(&'a mut self, raw: &'a [u8], events: usize, how: Compression) -> &'a [u8] {
        let written = match how {
            Compression::Rows => rows::pack(raw, events, &mut self.table, &mut self.output),
            Compression::Lz4 => {
                let size_max = get_maximum_output_size(raw.len());
                if self.output.len() < size_max {
                    self.output.resize(size_max, 0);
                }
                compress_into_with_table(raw, &mut self.output, &mut self.table)
                    .expect("the output has the maximal size that lz4 can need")
            }
            Compression::None => return raw,
        };
        &self.output[..written]
    }
}

/// Fills `raw` with what a payload of a body with `events` events was compressed from. `None` when it is none of that size.
pub fn decompress(payload: &[u8], events: usize, how: Compression, raw: &mut [u8]) -> Option<()> {
    match how {
        Compression::Rows => rows::unpack(payload, events, raw),
        Compression::Lz4 => (decompress_into(payload, raw).ok()? == raw.len()).then_some(()),
        Compression::None => (payload.len() == raw.len()).then(|| raw.copy_from_slice(payload)),
    }
}
