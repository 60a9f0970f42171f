//! Pages of Parquet columns, encoded from what the exporter holds.
//!
//! What enters: the values of one column of one row group, and the rows that have one. What leaves: a column chunk of one data
//! page, behind a dictionary where the column has texts. What must hold: it is what the Parquet format says, for any values.
//!
//! The crate's own writer of columns looks each value up in a dictionary and takes a level for each row. Here texts are numbered
//! already and most columns are empty in most rows, so neither is needed: a column without values costs nothing a row.

use bytes::Bytes;
use parquet::basic::{Compression, Encoding, EncodingMask, PageType, ZstdLevel};
use parquet::bloom_filter::Sbbf;
use parquet::column::page::{CompressedPage, Page, PageWriter};
use parquet::column::writer::ColumnCloseResult;
use parquet::data_type::ByteArray;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ColumnChunkMetaData, PageEncodingStats};
use parquet::file::statistics::Statistics;
use parquet::file::writer::{SerializedPageWriter, TrackedWrite};
use parquet::schema::types::ColumnDescPtr;

/// Rows of one row group at most: what DuckDB's threads take at a time, and one page.
pub const ROWS_MAX: usize = 122_880;
/// zstd's, measured: higher levels take longer than they save.
const LEVEL: i32 = 1;
/// Longer texts are in no statistics.
const STATISTICS_TEXT_MAX: usize = 64;
/// How often a filter says yes though a row group has no such value.
const FALSE_POSITIVES: f64 = 0.01;
/// Values of a block of deltas, and of each of its four parts.
const DELTA_BLOCK: usize = 128;
const DELTA_PART: usize = 32;

/// The values of a column, without the rows that have none.
pub enum Values<'a> {
    /// Indexes into distinct texts.
    Texts {
        indexes: &'a [u32],
        distinct: &'a [&'a str],
    },
    Integers(&'a [i64]),
    Numbers(&'a [f64]),
    Flags(&'a [bool]),
}

impl Values<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Texts { indexes, .. } => indexes.len(),
            Self::Integers(values) => values.len(),
            Self::Numbers(values) => values.len(),
            Self::Flags(values) => values.len(),
        }
    }

    fn statistics(&self, nulls: u64) -> Statistics {
        let nulls = Some(nulls);
        match self {
            Self::Texts { distinct, .. } => {
                let is_short = distinct.iter().all(|text| text.len() <= STATISTICS_TEXT_MAX);
                let bound = |text: Option<&&str>| text.filter(|_| is_short).map(|text| ByteArray::from(*text));
                Statistics::byte_array(bound(distinct.iter().min()), bound(distinct.iter().max()), None, nulls, false)
            }
            Self::Integers(values) => {
                Statistics::int64(values.iter().copied().min(), values.iter().copied().max(), None, nulls, false)
            }
            Self::Numbers(values) => {
                let least = values.iter().copied().min_by(f64::total_cmp);
                let most = values.iter().copied().max_by(f64::total_cmp);
                Statistics::double(least, most, None, nulls, false)
            }
            Self::Flags(values) => {
                Statistics::boolean(values.iter().copied().min(), values.iter().copied().max(), None, nulls, false)
            }
        }
    }
}

/// Encodes and compresses column chunks, with its buffers kept.
pub struct ChunkEncoder {
    zstd: zstd::bulk::Compressor<'static>,
    page: Vec<u8>,
}

impl ChunkEncoder {
    /// Makes one.
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { zstd: zstd::bulk::Compressor::new(LEVEL)?, page: Vec::new() })
    }

    /// The chunk of an optional column: its bytes, and what the file's footer says of it. `present` are the rows that have the
    /// values, in order.
    ///
    /// # Errors
    /// When the page cannot be compressed.
    pub fn chunk(
        &mut self,
        column: &ColumnDescPtr,
        rows: usize,
        present: &[u32],
        values: &Values<'_>,
        with_bloom_filter: bool,
    ) -> Result<(Bytes, ColumnCloseResult)> {
        debug_assert_eq!(present.len(), values.len());
        let mut out = TrackedWrite::new(Vec::new());
        let mut writer = SerializedPageWriter::new(&mut out);
        let mut page = std::mem::take(&mut self.page);
        let (mut encodings, mut statistics) = (vec![Encoding::RLE], Vec::new());
        let (mut uncompressed, mut dictionary_bytes) = (0, 0);
        let mut bloom_filter = None;
        if let Values::Texts { distinct, .. } = values
            && !distinct.is_empty()
        {
            let dictionary = self.dictionary(&mut page, distinct)?;
            let spec = writer.write_page(CompressedPage::new(dictionary, page.len()))?;
            uncompressed += spec.uncompressed_size;
            dictionary_bytes = spec.bytes_written;
            encodings.push(Encoding::PLAIN);
            let (page_type, encoding) = (PageType::DICTIONARY_PAGE, Encoding::PLAIN);
            statistics.push(PageEncodingStats { page_type, encoding, count: 1 });
            if with_bloom_filter {
                let mut filter = Sbbf::new_with_ndv_fpp(distinct.len() as u64, FALSE_POSITIVES)?;
                distinct.iter().for_each(|text| filter.insert(*text));
                bloom_filter = Some(filter);
            }
        }
        page.clear();
        levels(&mut page, rows, present);
        let encoding = encode(&mut page, values);
        let data = Page::DataPage {
            buf: self.compressed(&page)?,
            num_values: rows as u32,
            encoding,
            def_level_encoding: Encoding::RLE,
            rep_level_encoding: Encoding::RLE,
            statistics: None,
        };
        let spec = writer.write_page(CompressedPage::new(data, page.len()))?;
        uncompressed += spec.uncompressed_size;
        encodings.push(encoding);
        statistics.push(PageEncodingStats { page_type: PageType::DATA_PAGE, encoding, count: 1 });
        writer.close()?;
        self.page = page;
        let bytes = Bytes::from(out.into_inner()?);
        let metadata = ColumnChunkMetaData::builder(column.clone())
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(LEVEL)?))
            .set_encodings_mask(EncodingMask::new_from_encodings(encodings.iter()))
            .set_page_encoding_stats(statistics)
            .set_total_compressed_size(bytes.len() as i64)
            .set_total_uncompressed_size(uncompressed as i64)
            .set_num_values(rows as i64)
            .set_data_page_offset(dictionary_bytes as i64)
            .set_dictionary_page_offset((dictionary_bytes > 0).then_some(0))
            .set_statistics(values.statistics((rows - present.len()) as u64))
            .build()?;
        let closed = ColumnCloseResult {
            bytes_written: bytes.len() as u64,
            rows_written: rows as u64,
            metadata,
            bloom_filter,
            column_index: None,
            offset_index: None,
        };
        Ok((bytes, closed))
    }

    /// The page of a dictionary; `page` becomes its bytes before they are compressed.
    fn dictionary(&mut self, page: &mut Vec<u8>, distinct: &[&str]) -> Result<Page> {
        page.clear();
        for text in distinct {
            page.extend_from_slice(&(text.len() as u32).to_le_bytes());
            page.extend_from_slice(text.as_bytes());
        }
        Ok(Page::DictionaryPage {
            buf: self.compressed(page)?,
            num_values: distinct.len() as u32,
            encoding: Encoding::PLAIN,
            is_sorted: false,
        })
    }

    fn compressed(&mut self, page: &[u8]) -> Result<Bytes> {
        let compressed = self.zstd.compress(page);
        compressed.map(Bytes::from).map_err(|error| ParquetError::General(format!("zstd: {error}")))
    }
}

/// Which rows have a value: their number of bytes, then runs of ones and zeros.
fn levels(out: &mut Vec<u8>, rows: usize, present: &[u32]) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    let mut hybrid = Hybrid::new(out, 1);
    let mut next = 0;
    for &row in present {
        if row > next {
            hybrid.push(0, (row - next) as usize);
        }
        hybrid.push(1, 1);
        next = row + 1;
    }
    hybrid.push(0, rows - next as usize);
    hybrid.finish();
    let length = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

fn encode(out: &mut Vec<u8>, values: &Values<'_>) -> Encoding {
    match values {
        Values::Texts { distinct: [], .. } => Encoding::PLAIN,
        Values::Texts { indexes, distinct } => {
            let width = (u32::BITS - (distinct.len() as u32 - 1).leading_zeros()).max(1);
            out.push(width as u8);
            let mut hybrid = Hybrid::new(out, width);
            indexes.iter().for_each(|&index| hybrid.push(index, 1));
            hybrid.finish();
            Encoding::RLE_DICTIONARY
        }
        Values::Integers([]) => Encoding::PLAIN,
        Values::Integers(values) => {
            deltas(out, values);
            Encoding::DELTA_BINARY_PACKED
        }
        Values::Numbers(values) => {
            values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
            Encoding::PLAIN
        }
        Values::Flags(values) => {
            for eight in values.chunks(8) {
                out.push(eight.iter().enumerate().fold(0, |byte, (bit, &flag)| byte | u8::from(flag) << bit));
            }
            Encoding::PLAIN
        }
    }
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn zigzag(value: i64) -> u64 {
    (value.wrapping_shl(1) ^ (value >> 63)) as u64
}

/// Appends values of `width` bits, the first in the lowest ones.
fn pack(out: &mut Vec<u8>, width: u32, values: impl IntoIterator<Item = u64>) {
    let (mut bits, mut held) = (0_u128, 0);
    for value in values {
        bits |= u128::from(value) << held;
        held += width;
        while held >= 64 {
            out.extend_from_slice(&(bits as u64).to_le_bytes());
            bits >>= 64;
            held -= 64;
        }
    }
    let rest = held.div_ceil(8) as usize;
    out.extend_from_slice(&(bits as u64).to_le_bytes()[..rest]);
}

/// DELTA_BINARY_PACKED: each value as the difference from the one before, in as many bits as 32 of them need.
fn deltas(out: &mut Vec<u8>, values: &[i64]) {
    varint(out, DELTA_BLOCK as u64);
    varint(out, (DELTA_BLOCK / DELTA_PART) as u64);
    varint(out, values.len() as u64);
    varint(out, zigzag(values[0]));
    let mut before = values[0];
    let mut block = [0_i64; DELTA_BLOCK];
    for chunk in values[1..].chunks(DELTA_BLOCK) {
        for (delta, &value) in block.iter_mut().zip(chunk) {
            *delta = value.wrapping_sub(before);
            before = value;
        }
        let used = &block[..chunk.len()];
        let least = used.iter().copied().min().unwrap_or(0);
        varint(out, zigzag(least));
        let widths = out.len();
        out.extend_from_slice(&[0; DELTA_BLOCK / DELTA_PART]);
        for (part, deltas) in used.chunks(DELTA_PART).enumerate() {
            let above = |delta: i64| delta.wrapping_sub(least) as u64;
            let width = u64::BITS - deltas.iter().fold(0, |all, &delta| all | above(delta)).leading_zeros();
            out[widths + part] = width as u8;
            // A part is written whole, also the last one.
            let padding = std::iter::repeat_n(0, DELTA_PART - deltas.len());
            pack(out, width, deltas.iter().map(|&delta| above(delta)).chain(padding));
        }
    }
}

/// The format's mixture of runs and packed groups of eight.
struct Hybrid<'a> {
    out: &'a mut Vec<u8>,
    width: u32,
    value: u32,
    run: usize,
    group: [u32; 8],
    grouped: usize,
    /// Where the header of the open packed stretch stands, and how many groups it has.
    stretch: Option<(usize, u8)>,
}

/// Groups that a header of one byte can count.
const GROUPS_MAX: u8 = 63;

impl<'a> Hybrid<'a> {
    fn new(out: &'a mut Vec<u8>, width: u32) -> Self {
        Self { out, width, value: 0, run: 0, group: [0; 8], grouped: 0, stretch: None }
    }

    #[inline]
    fn push(&mut self, value: u32, times: usize) {
        if value != self.value && self.run > 0 {
            self.end_run();
        }
        self.value = value;
        self.run += times;
    }

    fn end_run(&mut self) {
        // What is in a group already goes with seven others.
        while self.run > 0 && self.grouped > 0 {
            self.put(self.value);
            self.run -= 1;
        }
        if self.run >= 8 {
            self.stretch = None;
            varint(self.out, (self.run as u64) << 1);
            let bytes = self.width.div_ceil(8) as usize;
            self.out.extend_from_slice(&self.value.to_le_bytes()[..bytes]);
            self.run = 0;
        }
        while self.run > 0 {
            self.put(self.value);
            self.run -= 1;
        }
    }

    #[inline]
    fn put(&mut self, value: u32) {
        self.group[self.grouped] = value;
        self.grouped += 1;
        if self.grouped == 8 {
            self.end_group();
        }
    }

    fn end_group(&mut self) {
        let (header, groups) = match self.stretch {
            Some((header, groups)) if groups < GROUPS_MAX => (header, groups + 1),
            _ => {
                self.out.push(0);
                (self.out.len() - 1, 1)
            }
        };
        self.stretch = Some((header, groups));
        self.out[header] = groups << 1 | 1;
        pack(self.out, self.width, self.group.map(u64::from));
        self.grouped = 0;
    }

    fn finish(mut self) {
        self.end_run();
        if self.grouped > 0 {
            self.group[self.grouped..].fill(0);
            self.end_group();
        }
    }
}
