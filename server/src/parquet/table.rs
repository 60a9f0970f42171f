//! A table: its columns, and files of its rows, one for each hour.
//!
//! What enters: rows, cell by cell. What leaves: `<table>/cluster=…/date=…/hour=…/<name>.parquet` below a folder. What must hold: a
//! table's columns are the same in every file of one version of the schema; rows wait in memory up to a row group.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use foldhash::fast::RandomState;
use jiff::Timestamp;
use parquet::basic::{LogicalType, Repetition, TimeUnit, Type as Physical};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::{Type, TypePtr};

use super::pages::{ChunkEncoder, ROWS_MAX, Values};
use super::{ExportError, SCHEMA_VERSION};

pub(super) const HOUR_NS: u64 = 3_600_000_000_000;
/// Hours that one segment fills files for. Clocks that jump could make any number of them.
const HOURS_MAX: usize = 96;
/// No text.
pub const NONE: u32 = u32::MAX;

/// What a column holds. Any of them may be empty in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColumnType {
    Text,
    /// A text that people ask for by its value: row groups without it are left out.
    Key,
    Integer,
    /// Nanoseconds since 1970, UTC.
    Moment,
    Number,
    Flag,
}

impl ColumnType {
    /// Name in SQL.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text | Self::Key => "VARCHAR",
            Self::Integer => "BIGINT",
            Self::Moment => "TIMESTAMP",
            Self::Number => "DOUBLE",
            Self::Flag => "BOOLEAN",
        }
    }
}

/// A column's name and what it holds.
pub type Column = (&'static str, ColumnType);

/// A table.
pub struct Table {
    pub name: &'static str,
    pub columns: &'static [Column],
}

impl Table {
    /// The place of a column.
    pub const fn column(&self, name: &str) -> usize {
        let mut at = 0;
        while at < self.columns.len() {
            if is_same(self.columns[at].0.as_bytes(), name.as_bytes()) {
                return at;
            }
            at += 1;
        }
        panic!("the table has no such column")
    }

    fn schema(&self) -> Result<TypePtr, ParquetError> {
        let column = |&(name, kind): &Column| {
            let physical = match kind {
                ColumnType::Text | ColumnType::Key => Physical::BYTE_ARRAY,
                ColumnType::Integer | ColumnType::Moment => Physical::INT64,
                ColumnType::Number => Physical::DOUBLE,
                ColumnType::Flag => Physical::BOOLEAN,
            };
            let logical = match kind {
                ColumnType::Text | ColumnType::Key => Some(LogicalType::String),
                ColumnType::Moment => Some(LogicalType::timestamp(true, TimeUnit::NANOS)),
                _ => None,
            };
            let builder = Type::primitive_type_builder(name, physical).with_repetition(Repetition::OPTIONAL);
            builder.with_logical_type(logical).build().map(Arc::new)
        };
        let columns: Result<Vec<_>, _> = self.columns.iter().map(column).collect();
        Ok(Arc::new(Type::group_type_builder(self.name).with_fields(columns?).build()?))
    }
}

const fn is_same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut at = 0;
    while at < a.len() {
        if a[at] != b[at] {
            return false;
        }
        at += 1;
    }
    true
}

/// Texts by number: each is kept once, however many rows have it.
#[derive(Default)]
pub struct Texts {
    numbers: HashMap<Arc<str>, u32, RandomState>,
    texts: Vec<Arc<str>>,
}

impl Texts {
    /// A text's number; [`NONE`] for an empty one.
    pub fn number(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return NONE;
        }
        if let Some(&number) = self.numbers.get(text) {
            return number;
        }
        let (number, text): (_, Arc<str>) = (self.texts.len() as u32, text.into());
        self.texts.push(Arc::clone(&text));
        self.numbers.insert(text, number);
        number
    }
}

/// Rows that wait to be written: the cells of each column that are not empty.
pub struct Batch {
    rows: u32,
    cells: Vec<Cells>,
}

#[derive(Default)]
struct Cells {
    rows: Vec<u32>,
    /// Numbers of texts, integers, bits of numbers, flags.
    values: Vec<u64>,
}

impl Batch {
    fn new(table: &Table) -> Self {
        Self { rows: 0, cells: table.columns.iter().map(|_| Cells::default()).collect() }
    }

    /// Begins a row; cells that are put from now on are its.
    pub fn row(&mut self) {
        self.rows += 1;
    }

    /// A cell as it is stored.
    #[inline]
    pub fn raw(&mut self, column: usize, value: u64) {
        let cells = &mut self.cells[column];
        cells.rows.push(self.rows - 1);
        cells.values.push(value);
    }

    /// A text's number; [`NONE`] leaves the cell empty.
    #[inline]
    pub fn text(&mut self, column: usize, number: u32) {
        if number != NONE {
            self.raw(column, number.into());
        }
    }

    /// A count or a moment; what no signed 64 bits hold stands for "none" everywhere, and leaves the cell empty.
    pub fn unsigned(&mut self, column: usize, value: u64) {
        if i64::try_from(value).is_ok() {
            self.raw(column, value);
        }
    }

    pub fn signed(&mut self, column: usize, value: i64) {
        self.raw(column, value as u64);
    }

    pub fn number(&mut self, column: usize, value: f64) {
        self.raw(column, value.to_bits());
    }

    pub fn flag(&mut self, column: usize, value: bool) {
        self.raw(column, value.into());
    }

    /// Whether it is a row group.
    pub fn is_full(&self) -> bool {
        self.rows as usize >= ROWS_MAX
    }
}

/// What the files of one source have in common.
#[derive(Clone, Debug)]
pub struct FileTarget {
    /// The folder that tables are below.
    pub dir: PathBuf,
    pub cluster: String,
    /// The last part of each file's path, without its suffix.
    pub name: String,
    /// Notes in each file's footer.
    pub notes: Vec<(String, String)>,
}

/// A file that was written.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Written {
    pub table: String,
    /// Below the folder, with slashes.
    pub path: String,
    pub rows: u64,
    pub bytes: u64,
}

struct Open {
    batch: Batch,
    path: String,
    writer: SerializedFileWriter<File>,
    rows: u64,
}

/// The rows of one table, by hour.
pub struct Partitions {
    table: &'static Table,
    schema: TypePtr,
    open: BTreeMap<u64, Open>,
    /// Place of each text in the dictionary of the chunk that is encoded, and the turn of that place.
    places: Vec<(u32, u32)>,
    turn: u32,
}

impl Partitions {
    pub fn new(table: &'static Table) -> Result<Self, ExportError> {
        Ok(Self { table, schema: table.schema()?, open: BTreeMap::new(), places: Vec::new(), turn: 0 })
    }

    /// The hour whose file takes what happened at a moment.
    pub fn hour(&self, time_ns: u64) -> u64 {
        let hour = time_ns / HOUR_NS;
        match self.open.contains_key(&hour) || self.open.len() < HOURS_MAX {
            true => hour,
            false => self.open.keys().next_back().copied().unwrap_or(hour),
        }
    }

    /// The rows of an hour that wait. Its file is made when it is not there yet.
    pub fn batch(&mut self, place: &FileTarget, hour: u64) -> Result<&mut Batch, ExportError> {
        match self.open.entry(hour) {
            std::collections::btree_map::Entry::Occupied(open) => Ok(&mut open.into_mut().batch),
            std::collections::btree_map::Entry::Vacant(free) => {
                let path = path(self.table.name, place, hour);
                let full = place.dir.join(&path);
                let failed = |source| ExportError::Write { path: full.clone(), source };
                if let Some(parent) = full.parent() {
                    fs::create_dir_all(parent).map_err(failed)?;
                }
                let file = File::create(&full).map_err(failed)?;
                let version = KeyValue::new("tapio.schema".to_owned(), SCHEMA_VERSION.to_string());
                let notes = place.notes.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
                let properties = WriterProperties::builder()
                    .set_created_by(format!("tapio {}", env!("CARGO_PKG_VERSION")))
                    .set_key_value_metadata(Some(std::iter::once(version).chain(notes).collect()))
                    .build();
                let writer = SerializedFileWriter::new(file, Arc::clone(&self.schema), Arc::new(properties))?;
                Ok(&mut free.insert(Open { batch: Batch::new(self.table), path, writer, rows: 0 }).batch)
            }
        }
    }

    /// Writes the rows of an hour that wait, as one row group.
    pub fn flush(&mut self, hour: u64, texts: &Texts, encoder: &mut ChunkEncoder) -> Result<(), ExportError> {
        let Some(open) = self.open.get_mut(&hour).filter(|open| open.batch.rows > 0) else { return Ok(()) };
        let rows = open.batch.rows as usize;
        self.places.resize(texts.texts.len(), (0, 0));
        let descriptor = open.writer.schema_descr().columns().to_vec();
        let mut group = open.writer.next_row_group()?;
        for ((cells, &(_, kind)), column) in open.batch.cells.iter_mut().zip(self.table.columns).zip(&descriptor) {
            self.turn += 1;
            let (mut indexes, mut distinct) = (Vec::new(), Vec::new());
            let (integers, numbers, flags): (Vec<i64>, Vec<f64>, Vec<bool>);
            let values = match kind {
                ColumnType::Text | ColumnType::Key => {
                    indexes.reserve(cells.values.len());
                    for &number in &cells.values {
                        let (turn, place) = &mut self.places[number as usize];
                        if *turn != self.turn {
                            (*turn, *place) = (self.turn, distinct.len() as u32);
                            distinct.push(&*texts.texts[number as usize]);
                        }
                        indexes.push(*place);
                    }
                    Values::Texts { indexes: &indexes, distinct: &distinct }
                }
                ColumnType::Integer | ColumnType::Moment => {
                    integers = cells.values.iter().map(|&value| value as i64).collect();
                    Values::Integers(&integers)
                }
                ColumnType::Number => {
                    numbers = cells.values.iter().map(|&bits| f64::from_bits(bits)).collect();
                    Values::Numbers(&numbers)
                }
                ColumnType::Flag => {
                    flags = cells.values.iter().map(|&flag| flag != 0).collect();
                    Values::Flags(&flags)
                }
            };
            let (bytes, closed) = encoder.chunk(column, rows, &cells.rows, &values, kind == ColumnType::Key)?;
            group.append_column(&bytes, closed)?;
            cells.rows.clear();
            cells.values.clear();
        }
        group.close()?;
        open.rows += rows as u64;
        open.batch.rows = 0;
        Ok(())
    }

    /// Writes what waits, and ends the files.
    pub fn finish(
        mut self,
        place: &FileTarget,
        texts: &Texts,
        encoder: &mut ChunkEncoder,
    ) -> Result<Vec<Written>, ExportError> {
        for hour in self.open.keys().copied().collect::<Vec<_>>() {
            self.flush(hour, texts, encoder)?;
        }
        let mut written = Vec::new();
        for open in self.open.into_values() {
            let Open { path, mut writer, rows, .. } = open;
            writer.finish()?;
            let bytes = writer.bytes_written() as u64;
            let full = place.dir.join(&path);
            writer.inner().sync_data().map_err(|source| ExportError::Write { path: full, source })?;
            written.push(Written { table: self.table.name.to_owned(), path, rows, bytes });
        }
        Ok(written)
    }
}

fn path(table: &str, place: &FileTarget, hour: u64) -> String {
    let start = i64::try_from(hour.saturating_mul(3600)).ok().and_then(|second| Timestamp::from_second(second).ok());
    let date = start.unwrap_or(Timestamp::UNIX_EPOCH).strftime("date=%Y-%m-%d/hour=%H");
    format!("{table}/cluster={}/{date}/{}.parquet", place.cluster, place.name)
}

/// Where a file of a table lies in a folder.
pub fn below(dir: &Path, written: &Written) -> PathBuf {
    dir.join(&written.path)
}

#[cfg(test)]
mod tests {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::Field;
    use proptest::prelude::*;

    use super::*;

    const TABLE: Table = Table {
        name: "test",
        columns: &[
            ("a", ColumnType::Integer),
            ("b", ColumnType::Key),
            ("c", ColumnType::Flag),
            ("d", ColumnType::Number),
            ("e", ColumnType::Text),
        ],
    };

    type Row = (Option<i64>, Option<u8>, Option<bool>, Option<f64>, Option<u16>);

    fn text(number: impl Into<u64>) -> String {
        format!("text {}", number.into())
    }

    fn written(rows: &[Row], dir: &Path) -> PathBuf {
        let place = FileTarget { dir: dir.to_owned(), cluster: "c".into(), name: "n".into(), notes: Vec::new() };
        let (mut texts, mut encoder) = (Texts::default(), ChunkEncoder::new().expect("zstd"));
        let mut partitions = Partitions::new(&TABLE).expect("a schema");
        for &(a, b, c, d, e) in rows {
            let batch = partitions.batch(&place, 500_000).expect("a file");
            batch.row();
            a.into_iter().for_each(|value| batch.signed(0, value));
            b.into_iter().for_each(|value| batch.text(1, texts.number(&text(value))));
            c.into_iter().for_each(|value| batch.flag(2, value));
            d.into_iter().for_each(|value| batch.number(3, value));
            e.into_iter().for_each(|value| batch.text(4, texts.number(&text(value))));
        }
        partitions.batch(&place, 500_000).expect("a file");
        let files = partitions.finish(&place, &texts, &mut encoder).expect("written");
        assert_eq!((files.len(), files[0].rows as usize), (1, rows.len()));
        assert_eq!(files[0].path, "test/cluster=c/date=2027-01-15/hour=08/n.parquet");
        below(dir, &files[0])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_rows_come_back_from_a_file_as_they_were(rows in prop::collection::vec(any::<Row>(), 0..700), repeat in 1..4_usize) {
            let rows: Vec<Row> = rows.iter().flat_map(|row| std::iter::repeat_n(*row, repeat * repeat)).collect();
            let dir = tempfile::tempdir().expect("a folder");
            let file = File::open(written(&rows, dir.path())).expect("a file");
            let reader = SerializedFileReader::new(file).expect("Parquet");
            let mut found = 0;
            for (row, read) in rows.iter().zip(reader.get_row_iter(None).expect("rows")) {
                let read = read.expect("a row");
                let wanted = [
                    row.0.map_or(Field::Null, Field::Long),
                    row.1.map_or(Field::Null, |value| Field::Str(text(value))),
                    row.2.map_or(Field::Null, Field::Bool),
                    row.3.map_or(Field::Null, Field::Double),
                    row.4.map_or(Field::Null, |value| Field::Str(text(value))),
                ];
                for (wanted, (_, read)) in wanted.iter().zip(read.get_column_iter()) {
                    match (wanted, read) {
                        (Field::Double(wanted), Field::Double(read)) => prop_assert_eq!(wanted.to_bits(), read.to_bits()),
                        _ => prop_assert_eq!(wanted, read),
                    }
                }
                found += 1;
            }
            prop_assert_eq!(found, rows.len());
            if let Some(group) = reader.metadata().row_groups().first() {
                let least = rows.iter().filter_map(|row| row.0).min();
                let statistics = group.column(0).statistics().expect("statistics");
                prop_assert_eq!(statistics.min_bytes_opt().map(<[u8]>::to_vec), least.map(|value| value.to_le_bytes().to_vec()));
            }
        }
    }
}
