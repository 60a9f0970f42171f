//! Rows: a body's archive whose events travel as rows of numbers, each by those of its bytes that changed.
//!
//! What enters: the archive of a [`Body`](crate::event::Body), which ends with its events, side by side, and its root.
//! What leaves: a payload, and the same archive again. What must hold: any archive comes back byte for byte, whatever
//! is in it. A payload from a hostile peer is refused or fills exactly the room that it was given.
//!
//! ```text
//! ├───────────┬──────────────────────────────┬──────────┬──────────────────┬────────────────────┤
//! │ text bytes│ text: what stands before the │ root     │ control          │ words              │
//! │ u32       │ events, lz4 or as it is      │ 24 bytes │ 5 bytes an event │ 0, 1, 2 or 4 bytes │
//! ```
//!
//! The text is as it is when it takes as many bytes as the archive has there, and an lz4 block otherwise. An event is 20 words
//! of 32 bits, little endian. Before its words are written,
//!
//! - its time (words 0 and 1) becomes the difference from the event before, in ZigZag encoding (Protocol Buffers, "Signed
//!   integers");
//! - its entity (words 2 and 3) changes places with its slot, if it is the last one seen there: a number below 1,024. See
//!   [`Entities`];
//! - the fields of its kind (words 7 to 19; word 6 begins with the kind) are combined by exclusive or with the last event of that
//!   kind.
//!
//! Then the words are written as in Stream VByte (Lemire, Kurz, Rupp: "Stream VByte: Faster byte-oriented integer
//! compression", 2018), in its variant with lengths of 0, 1, 2 and 4. Each word has two bits of the control bytes, low
//! bits first, and only that many of its low bytes are written.

#[cfg(target_arch = "x86_64")]
mod shuffle;

use std::mem::{offset_of, size_of};

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

use crate::event::{ArchivedBody, ArchivedEvent};

const WORD_BYTES: usize = 4;
const WORDS: usize = 20;
const ROW_BYTES: usize = WORDS * WORD_BYTES;
const CONTROL_BYTES: usize = WORDS / 4;
const KIND_WORD: usize = 6;
const ROOT_BYTES: usize = 24;
const TEXT_LENGTH_BYTES: usize = 4;
/// A word is written with all its bytes, of which the next one overwrites those that it does not need.
const SLACK: usize = WORD_BYTES;
const ROOM_BYTES: usize = ROW_BYTES + SLACK;
/// Shorter text is not worth the setting up of lz4's table.
const TEXT_BYTES_LZ4_MIN: usize = 512;

// The layout belongs to the frame's version: a change here needs a new one.
const _: () = assert!(size_of::<ArchivedEvent>() == ROW_BYTES && size_of::<ArchivedBody>() == ROOT_BYTES);
const _: () = assert!(offset_of!(ArchivedEvent, time_ns) == 0 && offset_of!(ArchivedEvent, entity) == 2 * WORD_BYTES);
const _: () = assert!(offset_of!(ArchivedEvent, body) == KIND_WORD * WORD_BYTES);

/// The entities seen last, by slot: the low bits of their ids, which are hashes.
///
/// A cached id is encoded as its slot number. An id below [`SLOTS`] is swapped with its slot's content, so decoding is
/// unambiguous: that content by itself is never written. At first each slot holds its own number.
struct Entities([u64; SLOTS]);

const SLOTS: usize = 1024;

const FRESH: [u64; SLOTS] = {
    let mut slots = [0; SLOTS];
    let mut slot = 0;
    while slot < SLOTS {
        slots[slot] = slot as u64;
        slot += 1;
    }
    slots
};

impl Entities {
    fn slot(entity: u64) -> usize {
        entity as usize % SLOTS
    }

    #[inline]
    fn write(&mut self, entity: u64) -> u64 {
        let last = std::mem::replace(&mut self.0[Self::slot(entity)], entity);
        match entity {
            _ if last == entity => entity % SLOTS as u64,
            0..SLOTS_END => last,
            _ => entity,
        }
    }

    #[inline]
    fn read(&mut self, written: u64) -> u64 {
        let last = self.0[Self::slot(written)];
        let entity = match written {
            0..SLOTS_END => last,
            _ if last == written => written % SLOTS as u64,
            _ => written,
        };
        self.0[Self::slot(written)] = entity;
        entity
    }
}

const SLOTS_END: u64 = SLOTS as u64;

/// What both sides remember of the rows so far. It starts again with each frame, so that each can be read by itself.
struct Before {
    time_ns: u64,
    entities: Entities,
    /// Slots by the low bits of the kind's word.
    of_kind: [[u32; WORDS]; KINDS],
}

/// A power of two. Kinds past it share a row with others, which costs bytes and nothing else.
const KINDS: usize = 64;

impl Before {
    fn new() -> Self {
        Self { time_ns: 0, entities: Entities(FRESH), of_kind: [[0; WORDS]; KINDS] }
    }

    #[inline]
    fn write(&mut self, row: [u32; WORDS]) -> [u32; WORDS] {
        let time_ns = join(row[0], row[1]);
        let difference = time_ns.wrapping_sub(self.time_ns) as i64;
        self.time_ns = time_ns;
        let mut written = row;
        [written[0], written[1]] = split((difference << 1 ^ difference >> 63) as u64);
        [written[2], written[3]] = split(self.entities.write(join(row[2], row[3])));
        let like = &mut self.of_kind[row[KIND_WORD] as usize % KINDS];
        for word in KIND_WORD + 1..WORDS {
            written[word] ^= like[word];
        }
        *like = row;
        written
    }

    #[inline]
    fn read(&mut self, written: [u32; WORDS]) -> [u32; WORDS] {
        let zigzag = join(written[0], written[1]);
        self.time_ns = self.time_ns.wrapping_add(zigzag >> 1 ^ (zigzag & 1).wrapping_neg());
        let mut row = written;
        [row[0], row[1]] = split(self.time_ns);
        [row[2], row[3]] = split(self.entities.read(join(written[2], written[3])));
        let like = &mut self.of_kind[row[KIND_WORD] as usize % KINDS];
        for word in KIND_WORD + 1..WORDS {
            row[word] ^= like[word];
        }
        *like = row;
        row
    }
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn split(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// Bytes of a word by its two bits of control.
const fn word_bytes(code: u32) -> usize {
    (1 << code >> 1) as usize
}

/// Packs the archive of a body with `events` events into `output`, which grows when it must. Returns the payload's length.
pub(crate) fn pack(raw: &[u8], events: usize, table: &mut CompressTable, output: &mut Vec<u8>) -> usize {
    let text_bytes = raw.len() - ROOT_BYTES - events * ROW_BYTES;
    let (text, rest) = raw.split_at(text_bytes);
    let (rows, root) = rest.split_at(events * ROW_BYTES);
    let rows_max = events * (CONTROL_BYTES + ROW_BYTES) + SLACK;
    let bytes_max = TEXT_LENGTH_BYTES + get_maximum_output_size(text.len()) + ROOT_BYTES + rows_max;
    if output.len() < bytes_max {
        output.resize(bytes_max, 0);
    }
    let (length, output) = output.split_at_mut(TEXT_LENGTH_BYTES);
    let text_written = pack_text(text, table, output);
    length.copy_from_slice(&(text_written as u32).to_le_bytes());
    let output = &mut output[text_written..];
    output[..ROOT_BYTES].copy_from_slice(root);
    TEXT_LENGTH_BYTES + text_written + ROOT_BYTES + pack_rows(rows, &mut output[ROOT_BYTES..])
}

fn pack_text(text: &[u8], table: &mut CompressTable, output: &mut [u8]) -> usize {
    if text.len() >= TEXT_BYTES_LZ4_MIN {
        let written = compress_into_with_table(text, output, table).expect("room for all that lz4 can need");
        if written < text.len() {
            return written;
        }
    }
    output[..text.len()].copy_from_slice(text);
    text.len()
}

fn pack_rows(rows: &[u8], output: &mut [u8]) -> usize {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("ssse3") {
        // SAFETY: the processor has the instructions that the function needs.
        return unsafe { shuffle::pack_rows(rows, output) };
    }
    pack_rows_by(rows, output, pack_row)
}

#[inline(always)]
fn pack_rows_by(
    rows: &[u8],
    output: &mut [u8],
    pack_row: impl Fn(&[u32; WORDS], &mut [u8; CONTROL_BYTES], &mut [u8; ROOM_BYTES]) -> usize,
) -> usize {
    let (rows, _) = rows.as_chunks::<ROW_BYTES>();
    let (control, words) = output.split_at_mut(rows.len() * CONTROL_BYTES);
    let (controls, _) = control.as_chunks_mut::<CONTROL_BYTES>();
    let mut before = Before::new();
    let mut written = 0;
    for (row, control) in rows.iter().zip(controls) {
        let (bytes, _) = row.as_chunks::<WORD_BYTES>();
        let row = before.write(std::array::from_fn(|word| u32::from_le_bytes(bytes[word])));
        let room = words[written..].first_chunk_mut().expect("room for as many bytes as a row has, and the slack");
        written += pack_row(&row, control, room);
    }
    control.len() + written
}

/// Writes the words of a row and their control. Returns their bytes.
#[inline]
fn pack_row(row: &[u32; WORDS], control: &mut [u8; CONTROL_BYTES], room: &mut [u8; ROOM_BYTES]) -> usize {
    let mut at = 0;
    for (control, four) in control.iter_mut().zip(row.as_chunks::<4>().0) {
        let mut codes = 0;
        for (place, word) in four.iter().enumerate() {
            let code = u32::from(*word != 0) + u32::from(*word > 0xff) + u32::from(*word > 0xffff);
            codes |= code << (2 * place);
            room[at..at + WORD_BYTES].copy_from_slice(&word.to_le_bytes());
            at += word_bytes(code);
        }
        *control = codes as u8;
    }
    at
}

/// Where the time of a payload's first row is, in as many bytes as it took.
pub(crate) struct FirstTime {
    at: usize,
    bytes: [usize; 2],
}

/// Finds the time of the first of `events` rows. `None` without a row.
pub(crate) fn first_time(payload: &[u8], events: usize) -> Option<FirstTime> {
    let text_written = u32::from_le_bytes(*payload.first_chunk()?) as usize;
    let control = TEXT_LENGTH_BYTES + text_written + ROOT_BYTES;
    let codes = u32::from(*payload.get(control).filter(|_| events > 0)?);
    let bytes = [codes & 3, codes >> 2 & 3].map(word_bytes);
    let at = control + events * CONTROL_BYTES;
    (at + bytes[0] + bytes[1] <= payload.len()).then_some(FirstTime { at, bytes })
}

impl FirstTime {
    /// Puts another time in its place, and with it moves those of all rows. `None` when it needs more bytes.
    pub fn put(&self, payload: &mut [u8], time_ns: u64) -> Option<()> {
        let words = split(time_ns.checked_mul(2)?);
        let mut at = self.at;
        for (word, bytes) in words.into_iter().zip(self.bytes) {
            let word = word.to_le_bytes();
            if word[bytes..].iter().any(|&byte| byte != 0) {
                return None;
            }
            payload.get_mut(at..at + bytes)?.copy_from_slice(&word[..bytes]);
            at += bytes;
        }
        Some(())
    }
}

/// Fills `raw` with the archive that a payload was packed from, whose body has `events` events. `None` when the payload is none
/// of such an archive; then `raw` holds anything.
pub(crate) fn unpack(payload: &[u8], events: usize, raw: &mut [u8]) -> Option<()> {
    let (length, payload) = payload.split_first_chunk::<TEXT_LENGTH_BYTES>()?;
    let (text_written, payload) = payload.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let (root_written, payload) = payload.split_at_checked(ROOT_BYTES)?;
    let (control, words) = payload.split_at_checked(events * CONTROL_BYTES)?;
    let text_bytes = raw.len().checked_sub(ROOT_BYTES + events * ROW_BYTES)?;
    let (text, rest) = raw.split_at_mut(text_bytes);
    let (rows, root) = rest.split_at_mut(events * ROW_BYTES);
    if text_written.len() == text.len() {
        text.copy_from_slice(text_written);
    } else if decompress_into(text_written, text).ok()? != text.len() {
        return None;
    }
    root.copy_from_slice(root_written);
    unpack_rows(control, words, rows)
}

fn unpack_rows(control: &[u8], words: &[u8], rows: &mut [u8]) -> Option<()> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("ssse3") {
        // SAFETY: the processor has the instructions that the function needs.
        return unsafe { shuffle::unpack_rows(control, words, rows) };
    }
    unpack_rows_by(control, words, rows, unpack_row)
}

#[inline(always)]
fn unpack_rows_by(
    control: &[u8],
    mut words: &[u8],
    rows: &mut [u8],
    unpack_row: impl Fn(&[u8; CONTROL_BYTES], &[u8; ROOM_BYTES]) -> ([u32; WORDS], usize),
) -> Option<()> {
    let (controls, _) = control.as_chunks::<CONTROL_BYTES>();
    let mut before = Before::new();
    for (row, control) in rows.as_chunks_mut::<ROW_BYTES>().0.iter_mut().zip(controls) {
        let mut last = [0; ROOM_BYTES];
        let bytes = words.first_chunk().unwrap_or_else(|| {
            last[..words.len()].copy_from_slice(words);
            &last
        });
        let (written, length) = unpack_row(control, bytes);
        words = words.get(length..)?;
        let read = before.read(written);
        for (bytes, word) in row.as_chunks_mut::<WORD_BYTES>().0.iter_mut().zip(read) {
            *bytes = word.to_le_bytes();
        }
    }
    words.is_empty().then_some(())
}

/// Reads words by their control. Returns how many bytes they had, too.
#[inline]
fn unpack_row(control: &[u8; CONTROL_BYTES], bytes: &[u8; ROOM_BYTES]) -> ([u32; WORDS], usize) {
    let mut row = [0; WORDS];
    let mut at = 0;
    for (control, four) in control.iter().zip(row.as_chunks_mut::<4>().0) {
        for (place, word) in four.iter_mut().enumerate() {
            let length = word_bytes(u32::from(*control) >> (2 * place) & 3);
            let all = u32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
            *word = all & ((1u64 << (8 * length)) - 1) as u32;
            at += length;
        }
    }
    (row, at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packed(raw: &[u8], events: usize) -> Vec<u8> {
        let mut output = Vec::new();
        let written = pack(raw, events, &mut CompressTable::large(), &mut output);
        output.truncate(written);
        output
    }

    fn unpacked(payload: &[u8], events: usize, bytes: usize) -> Option<Vec<u8>> {
        let mut raw = vec![0; bytes];
        unpack(payload, events, &mut raw).map(|()| raw)
    }

    /// Numbers as events have them: few different ones, small and large, those at the edges, and any at all.
    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![
            4 => 0u64..4,
            2 => 1020u64..1030,
            2 => (0u64..3).prop_map(|high| high << 10 | 7),
            1 => Just(u64::MAX),
            1 => any::<u64>(),
        ]
    }

    proptest! {
        #[test]
        fn any_archive_comes_back_byte_for_byte(
            text in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..300),
                (any::<u8>(), 0usize..3000).prop_map(|(byte, length)| vec![byte; length]),
            ],
            rows in proptest::collection::vec(proptest::array::uniform10(number()), 0..50),
            root in any::<[u8; ROOT_BYTES]>(),
        ) {
            let bytes = rows.iter().flatten().flat_map(|number| number.to_le_bytes());
            let raw: Vec<u8> = text.into_iter().chain(bytes).chain(root).collect();
            let payload = packed(&raw, rows.len());
            prop_assert_eq!(unpacked(&payload, rows.len(), raw.len()), Some(raw));
        }

        #[test]
        fn word_by_word_the_bytes_are_the_same(
            rows in proptest::collection::vec(proptest::array::uniform10(number()), 0..50),
            damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..3),
            cut in 0usize..3,
        ) {
            let raw: Vec<u8> = rows.iter().flatten().flat_map(|number| number.to_le_bytes()).collect();
            let room = rows.len() * (CONTROL_BYTES + ROW_BYTES) + SLACK;
            let mut written = [vec![0; room], vec![0; room]];
            let lengths = [pack_rows(&raw, &mut written[0]), pack_rows_by(&raw, &mut written[1], pack_row)];
            prop_assert_eq!(&written[0][..lengths[0]], &written[1][..lengths[1]]);
            let mut payload = written[0][..lengths[0] - cut.min(lengths[0] - rows.len() * CONTROL_BYTES)].to_vec();
            for (at, byte) in damage {
                if !payload.is_empty() {
                    let at = at % payload.len();
                    payload[at] = byte;
                }
            }
            let (control, words) = payload.split_at(rows.len() * CONTROL_BYTES);
            let mut read = [vec![0; raw.len()], vec![0; raw.len()]];
            let outcome = unpack_rows(control, words, &mut read[0]);
            prop_assert_eq!(outcome, unpack_rows_by(control, words, &mut read[1], unpack_row));
            prop_assert!(outcome.is_none() || read[0] == read[1]);
        }

        #[test]
        fn any_payload_is_refused_or_fills_its_room(
            payload in proptest::collection::vec(prop_oneof![Just(0), any::<u8>()], 0..400),
            events in 0usize..20,
            bytes in 0usize..2000,
        ) {
            let _ = unpacked(&payload, events, bytes);
        }
    }

    #[test]
    fn a_payload_of_another_length_is_refused() {
        let raw: Vec<u8> = (0..3 * ROW_BYTES + ROOT_BYTES).map(|byte| byte as u8).collect();
        let payload = packed(&raw, 3);
        for length in 0..payload.len() {
            assert_eq!(unpacked(&payload[..length], 3, raw.len()), None, "cut to {length}");
        }
        let longer: Vec<u8> = payload.iter().copied().chain([0]).collect();
        assert_eq!(unpacked(&longer, 3, raw.len()), None);
        for (events, bytes) in [(2, raw.len()), (4, raw.len()), (3, raw.len() - 1), (3, raw.len() + 1), (3, 10)] {
            assert_eq!(unpacked(&payload, events, bytes), None, "{events} events in {bytes} bytes");
        }
    }

    #[test]
    fn what_repeats_takes_little_room() {
        let row = |number: u64| [(1 << 50) + number * 6000, 0x9e37_79b9_7f4a_7c15, 4000, 1, 77, 78, 79, 80, 81, 82];
        let bytes = (0..100).flat_map(row).flat_map(u64::to_le_bytes);
        let raw: Vec<u8> = bytes.chain([0; ROOT_BYTES]).collect();
        // Of each but the first: control, two bytes of time, two of the slot, two of the pid, one of the kind.
        let first = 200;
        assert!(packed(&raw, 100).len() < 99 * (CONTROL_BYTES + 7) + first);
    }
}
