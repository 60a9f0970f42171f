//! A split-block bloom filter, as Parquet has them: 32 bytes a block, one bit of each of its eight words for a key.
//!
//! What must hold: a key that was put in is always found. Of others about one in a hundred is, at [`BITS_PER_KEY`].

/// Bytes of one block.
pub const BLOCK_BYTES: usize = 32;
const BITS_PER_KEY: usize = 10;
/// Parquet's: odd, and chosen at random.
const SALT: [u32; 8] =
    [0x47b6_137b, 0x4497_4d91, 0x8824_ad5b, 0xa2b7_289d, 0x7054_95c7, 0x2df1_424b, 0x9efc_4947, 0x5c6b_fb31];

/// The key of an entity of a node. It is on disk: it must not change.
#[inline]
pub fn key(node: u64, entity: u64) -> u64 {
    let mixed = (node.rotate_left(32) ^ entity).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// The filter of some keys.
pub fn build(keys: impl ExactSizeIterator<Item = u64>) -> Vec<u8> {
    let blocks = (keys.len() * BITS_PER_KEY).div_ceil(BLOCK_BYTES * 8).max(1);
    let mut filter = vec![0; blocks * BLOCK_BYTES];
    for key in keys {
        let block = block_of(key, blocks);
        for (word, bit) in bits(key).enumerate() {
            filter[block * BLOCK_BYTES + word * 4 + (bit / 8) as usize] |= 1 << (bit % 8);
        }
    }
    filter
}

/// Whether a key may have been put in. A filter without a block may hold anything.
pub fn may_hold(filter: &[u8], key: u64) -> bool {
    let blocks = filter.len() / BLOCK_BYTES;
    if blocks == 0 {
        return true;
    }
    let block = block_of(key, blocks);
    bits(key)
        .enumerate()
        .all(|(word, bit)| filter[block * BLOCK_BYTES + word * 4 + (bit / 8) as usize] & (1 << (bit % 8)) != 0)
}

fn block_of(key: u64, blocks: usize) -> usize {
    (((key >> 32) * blocks as u64) >> 32) as usize
}

fn bits(key: u64) -> impl Iterator<Item = u32> {
    SALT.into_iter().map(move |salt| (key as u32).wrapping_mul(salt) >> 27)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_found_and_few_others_are() {
        let inside: Vec<u64> = (0..5000).map(|entity| key(1, entity)).collect();
        let filter = build(inside.iter().copied());
        assert!(inside.iter().all(|&key| may_hold(&filter, key)));
        let wrong = (0..100_000).filter(|&entity| may_hold(&filter, key(2, entity))).count();
        assert!(wrong < 3000, "{wrong} of 100,000");
    }

    #[test]
    fn the_bits_on_disk_do_not_change() {
        let filter = build([key(1, 2)].into_iter());
        let set: Vec<u32> = (0..256u32).filter(|bit| filter[(bit / 8) as usize] & (1 << (bit % 8)) != 0).collect();
        assert_eq!(set.len(), 8);
        assert_eq!(key(1, 2), GOLDEN_KEY);
        assert_eq!(set, GOLDEN_BITS);
    }

    const GOLDEN_KEY: u64 = 0xb50c_0224_efe1_3c2d;
    const GOLDEN_BITS: [u32; 8] = [7, 34, 91, 121, 159, 188, 216, 226];
}
