//! What this kernel calls the reasons for which it drops packets.
//!
//! In: the kernel's type information (BTF), which has `enum skb_drop_reason` since 5.17; its numbers differ between kernels.
//! Out: [`drop_reason_name`], and the set of those that are no loss. What holds: bytes that are no BTF give no names, never a
//! panic.

use std::sync::OnceLock;

/// Numbers from here on belong to other parts of the kernel, which name them in tables of their own.
const WITH_NAME: usize = 256;
const PREFIX: &str = "SKB_DROP_REASON_";

/// Not lost: used up, never meant for this machine, already received, or dropped by its own receiver.
const HARMLESS: &[&str] = &[
    "SKB_NOT_DROPPED_YET",
    "SKB_CONSUMED",
    "OTHERHOST",
    "SOCKET_CLOSE",
    "SOCKET_FILTER",
    "UNIX_DISCONNECT",
    "UNIX_SKIP_OOB",
    "QUEUE_PURGE",
    "TCP_OLD_DATA",
    "TCP_OLD_ACK",
    "TCP_OFOMERGE",
    "PACKET_SOCK_ERROR",
];

static NAMES: OnceLock<Vec<String>> = OnceLock::new();

/// The name of a reason in the kernel that the probes were last loaded into: `NETFILTER_DROP`, `SOCKET_RCVBUFF`.
///
/// [`None`] if it has no such reason, none at all (before 5.17), or before any probes were loaded.
pub fn drop_reason_name(reason: u32) -> Option<&'static str> {
    NAMES.get()?.get(reason as usize).map(String::as_str).filter(|name| !name.is_empty())
}

/// Remembers the names, and returns the set of harmless reasons, a bit each.
pub(crate) fn learn(btf: &[u8]) -> [u64; WITH_NAME / 64] {
    let names = NAMES.get_or_init(|| names(btf).unwrap_or_default());
    let mut set = [0; WITH_NAME / 64];
    for (reason, name) in names.iter().enumerate() {
        if HARMLESS.contains(&name.as_str()) {
            set[reason / 64] |= 1 << (reason % 64);
        }
    }
    set
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..offset.checked_add(4)?)?.try_into().ok().map(u32::from_ne_bytes)
}

/// Reads the names by number; empty where there is none.
fn names(btf: &[u8]) -> Option<Vec<String>> {
    let header_bytes = u32_at(btf, 4)? as usize;
    let section = |at| Some((header_bytes.checked_add(u32_at(btf, at)? as usize)?, u32_at(btf, at + 4)? as usize));
    let (types, types_bytes) = section(8)?;
    let (strings, _) = section(16)?;
    let text = |offset: u32| {
        let rest = btf.get(strings.checked_add(offset as usize)?..)?;
        std::str::from_utf8(&rest[..rest.iter().position(|&byte| byte == 0)?]).ok()
    };
    let mut at = types;
    while at < types.checked_add(types_bytes)? {
        let info = u32_at(btf, at + 4)?;
        let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        let members = at + 12;
        if kind == 6 && text(u32_at(btf, at)?) == Some("skb_drop_reason") {
            let mut names = vec![String::new(); WITH_NAME];
            for member in 0..count {
                let name = text(u32_at(btf, members + 8 * member)?)?;
                let number = u32_at(btf, members + 8 * member + 4)? as usize;
                // The first of two with one number is its own; the second a mark such as the end of the list.
                if let Some(place) = names.get_mut(number).filter(|place| place.is_empty()) {
                    *place = name.strip_prefix(PREFIX).unwrap_or(name).to_owned();
                }
            }
            return Some(names);
        }
        // The kinds of BTF that have something behind their first twelve bytes.
        at = members
            + match kind {
                1 | 14 | 17 => 4,
                3 => 12,
                4 | 5 | 15 | 19 => 12 * count,
                6 | 13 => 8 * count,
                _ => 0,
            };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two types: an integer, and the enum.
    fn btf() -> Vec<u8> {
        let strings =
            b"\0int\0skb_drop_reason\0SKB_NOT_DROPPED_YET\0SKB_DROP_REASON_NO_SOCKET\0SKB_DROP_REASON_OTHERHOST\0";
        let offset = |name: &str| strings.windows(name.len()).position(|part| part == name.as_bytes()).unwrap() as u32;
        let types = [
            [offset("int"), 1 << 24, 4, 32].as_slice(),
            &[offset("skb_drop_reason"), 6 << 24 | 3, 4],
            &[offset("SKB_NOT_DROPPED_YET"), 0, offset("SKB_DROP_REASON_NO_SOCKET"), 2],
            &[offset("SKB_DROP_REASON_OTHERHOST"), 70],
        ]
        .concat();
        let header = [0x0001_eb9f, 24, 0, 4 * types.len() as u32, 4 * types.len() as u32, strings.len() as u32];
        let mut bytes: Vec<u8> = header.iter().chain(&types).flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend_from_slice(strings);
        bytes
    }

    #[test]
    fn reasons_have_the_numbers_of_this_kernel_and_no_prefix() {
        let names = names(&btf()).unwrap();
        assert_eq!((names[0].as_str(), names[1].as_str()), ("SKB_NOT_DROPPED_YET", ""));
        assert_eq!((names[2].as_str(), names[70].as_str()), ("NO_SOCKET", "OTHERHOST"));
    }

    #[test]
    fn what_is_cut_or_no_btf_gives_no_names() {
        let whole = btf();
        // The last string's end is the last byte.
        for length in 0..whole.len() {
            assert_eq!(names(&whole[..length]), None, "{length}");
        }
        assert_eq!(names(&[0xff; 200]), None);
    }
}
