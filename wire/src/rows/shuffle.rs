//! Four words at once, by a shuffle of bytes, as in Stream VByte (see [`super`]). For x86-64 with SSSE3, which all but the oldest
//! have: word by word it takes more than twice as long.
//!
//! What must hold: the bytes are those that [`super::pack_row`] and [`super::unpack_row`] make and read.

use std::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_cmpeq_epi32, _mm_cvtsi128_si32, _mm_cvtsi128_si64, _mm_packs_epi32, _mm_packus_epi16,
    _mm_set_epi64x, _mm_set1_epi32, _mm_setr_epi32, _mm_setzero_si128, _mm_shuffle_epi8, _mm_srli_epi32,
    _mm_unpackhi_epi64,
};

use super::{CONTROL_BYTES, ROOM_BYTES, WORDS, pack_rows_by, unpack_rows_by, word_bytes};

const FOUR_BYTES: usize = 16;
/// Index in a shuffle of a byte that becomes 0.
const NONE: u8 = 0x80;

/// What a byte of control, which is of four words, stands for.
struct Fours {
    /// Bytes that the words are written with.
    lengths: [u8; 256],
    /// Which byte of the words each written one is; little endian.
    pack: [u128; 256],
    /// Which written byte each one of the words is.
    unpack: [u128; 256],
}

static FOURS: Fours = {
    let mut fours = Fours { lengths: [0; 256], pack: [0; 256], unpack: [0; 256] };
    let mut control = 0;
    while control < 256 {
        let mut pack = [NONE; FOUR_BYTES];
        let mut unpack = [NONE; FOUR_BYTES];
        let mut written = 0;
        let mut word = 0;
        while word < 4 {
            let mut byte = 0;
            while byte < word_bytes(control as u32 >> (2 * word) & 3) {
                pack[written] = (4 * word + byte) as u8;
                unpack[4 * word + byte] = written as u8;
                written += 1;
                byte += 1;
            }
            word += 1;
        }
        fours.lengths[control] = written as u8;
        fours.pack[control] = u128::from_le_bytes(pack);
        fours.unpack[control] = u128::from_le_bytes(unpack);
        control += 1;
    }
    fours
};

/// [`super::pack_rows`].
#[target_feature(enable = "ssse3")]
pub(super) fn pack_rows(rows: &[u8], output: &mut [u8]) -> usize {
    pack_rows_by(rows, output, |row, control, room| pack_row(row, control, room))
}

/// [`super::unpack_rows`].
#[target_feature(enable = "ssse3")]
pub(super) fn unpack_rows(control: &[u8], words: &[u8], rows: &mut [u8]) -> Option<()> {
    unpack_rows_by(control, words, rows, |control, bytes| unpack_row(control, bytes))
}

#[inline]
#[target_feature(enable = "ssse3")]
fn pack_row(row: &[u32; WORDS], control: &mut [u8; CONTROL_BYTES], room: &mut [u8; ROOM_BYTES]) -> usize {
    let mut at = 0;
    for (control, &[a, b, c, d]) in control.iter_mut().zip(row.as_chunks::<4>().0) {
        let four = _mm_setr_epi32(a as i32, b as i32, c as i32, d as i32);
        let codes = codes(four);
        let written = _mm_shuffle_epi8(four, vector(FOURS.pack[codes]));
        room[at..at + FOUR_BYTES].copy_from_slice(&bytes(written));
        *control = codes as u8;
        at += usize::from(FOURS.lengths[codes]);
    }
    at
}

/// The byte of control of four words.
#[inline]
#[target_feature(enable = "ssse3")]
fn codes(four: __m128i) -> usize {
    let zero = _mm_setzero_si128();
    // A comparison that holds is -1.
    let is_zero = _mm_cmpeq_epi32(four, zero);
    let is_one_byte = _mm_cmpeq_epi32(_mm_srli_epi32(four, 8), zero);
    let are_two_bytes = _mm_cmpeq_epi32(_mm_srli_epi32(four, 16), zero);
    let less = _mm_add_epi32(is_zero, _mm_add_epi32(is_one_byte, are_two_bytes));
    let codes = _mm_add_epi32(_mm_set1_epi32(3), less);
    let halves = _mm_packs_epi32(codes, codes);
    let bytes = _mm_cvtsi128_si32(_mm_packus_epi16(halves, halves)) as u32;
    // A multiplication adds up the four, each moved to its place in the highest byte.
    (bytes.wrapping_mul(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6) >> 24) as usize
}

#[inline]
#[target_feature(enable = "ssse3")]
fn unpack_row(control: &[u8; CONTROL_BYTES], bytes_written: &[u8; ROOM_BYTES]) -> ([u32; WORDS], usize) {
    let mut row = [0; WORDS];
    let mut at = 0;
    for (&control, four) in control.iter().zip(row.as_chunks_mut::<4>().0) {
        let mut written = [0; FOUR_BYTES];
        written.copy_from_slice(&bytes_written[at..at + FOUR_BYTES]);
        let codes = usize::from(control);
        let words = bytes(_mm_shuffle_epi8(vector(u128::from_le_bytes(written)), vector(FOURS.unpack[codes])));
        for (word, bytes) in four.iter_mut().zip(words.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        at += usize::from(FOURS.lengths[codes]);
    }
    (row, at)
}

#[inline]
#[target_feature(enable = "ssse3")]
fn vector(bytes: u128) -> __m128i {
    _mm_set_epi64x((bytes >> 64) as i64, bytes as i64)
}

#[inline]
#[target_feature(enable = "ssse3")]
fn bytes(vector: __m128i) -> [u8; FOUR_BYTES] {
    let low = _mm_cvtsi128_si64(vector) as u64;
    let high = _mm_cvtsi128_si64(_mm_unpackhi_epi64(vector, vector)) as u64;
    (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows;

    /// All the bytes of control that words of each length, at the edges, can have.
    #[test]
    fn four_words_are_written_and_read_as_one_by_one() {
        if !is_x86_feature_detected!("ssse3") {
            return;
        }
        let edges = [0u32, 1, 0xff, 0x100, 0xffff, 0x1_0000, u32::MAX];
        for number in 0..edges.len().pow(4) {
            let four: [u32; 4] = std::array::from_fn(|word| edges[number / edges.len().pow(word as u32) % edges.len()]);
            let row = std::array::from_fn(|word| four[word % 4].rotate_left(word as u32 / 4 * 8));
            let (mut control, mut room) = ([[0; CONTROL_BYTES]; 2], [[0; ROOM_BYTES]; 2]);
            let one_by_one = rows::pack_row(&row, &mut control[0], &mut room[0]);
            // SAFETY: the processor has the instructions.
            let four_at_once = unsafe { pack_row(&row, &mut control[1], &mut room[1]) };
            assert_eq!((control[0], &room[0][..one_by_one]), (control[1], &room[1][..four_at_once]));
            assert_eq!(rows::unpack_row(&control[0], &room[0]), (row, one_by_one));
            // SAFETY: as above.
            assert_eq!(unsafe { unpack_row(&control[0], &room[0]) }, (row, one_by_one));
        }
    }
}
