//! Fields of the keys and values of maps, which have the sizes that their tables declare.

/// Eight bytes.
pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_ne_bytes(field)
}

/// Four bytes.
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_ne_bytes(field)
}
