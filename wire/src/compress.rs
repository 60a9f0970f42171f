//! lz4 block compression of frame bodies, with the table kept between frames.

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

/// How a frame's body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// lz4 block format, no size prefix.
    Lz4,
    /// As it is.
    None,
}

/// Compresses bodies one after another.
pub struct Compressor {
    table: CompressTable,
}

impl Default for Compressor {
    fn default() -> Self {
        Self { table: CompressTable::large() }
    }
}

impl Compressor {
    /// Appends the compressed `raw` to `out`.
    pub fn append(&mut self, raw: &[u8], out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + get_maximum_output_size(raw.len()), 0);
        let written = compress_into_with_table(raw, &mut out[start..], &mut self.table)
            .expect("the output has the maximal size that lz4 can need");
        out.truncate(start + written);
    }
}
