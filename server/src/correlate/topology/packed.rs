//! A description in few bytes: a container of kubelet has some 300 bytes of names, of which 50 distinguish it from others.
//!
//! What enters: a description as a frame has it. What leaves: bytes, and the description again. What must hold: what comes out is
//! what went in, whatever text it is. The same description gives the same bytes, so that they can be compared. [`Phrases`] is
//! bounded, and a text that finds no place there is stored in place.
//!
//! ```text
//! flags u8 · kind u8 · [node u64] · [parent u64] · [n u8 · n addresses of 16 bytes] · texts present u16 · texts
//! text = number of pieces u8 · pieces; piece = one of
//!   LITERAL length u8, bytes        PHRASE u24                 HEX bytes u8, the digits' bytes
//!   UUID 16 bytes (by separator)    OLD_UUID (by separator)    OLD_HEX which u8, digits u8
//! ```
//!
//! An old one is an earlier piece of the same description: a container's cgroup repeats its id and its pod's uid.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;
use tapio_wire::event::{EntityId, EntityKind};

/// Texts of one description, in the order in which they are packed: what others repeat comes first.
pub const TEXTS: usize = 9;

/// Different phrases kept.
const PHRASES_MAX: usize = 16_384;
/// A shorter one is stored in place.
const PHRASE_BYTES_MIN: usize = 5;
/// A shorter run of digits is no number of its own.
const HEX_DIGITS_MIN: usize = 16;
const UUID_DIGITS: usize = 36;
const PIECE_BYTES_MAX: usize = u8::MAX as usize;

const LITERAL: u8 = 0;
const PHRASE: u8 = 1;
const HEX: u8 = 2;
const OLD_HEX: u8 = 3;
const UUID: [u8; 2] = [4, 5];
const OLD_UUID: [u8; 2] = [6, 7];
const SEPARATORS: [u8; 2] = *b"-_";

const HAS_NODE: u8 = 1;
const HAS_PARENT: u8 = 2;
/// The parent is the pod of this uid.
const PARENT_BY_UID: u8 = 4;
const HAS_ADDRESSES: u8 = 8;

/// Phrases that descriptions have in common, by number: parts of cgroups' paths, namespaces, images.
#[derive(Default)]
pub struct Phrases {
    numbers: HashMap<Arc<str>, u32, RandomState>,
    texts: Vec<Arc<str>>,
}

impl Phrases {
    fn number(&mut self, text: &str) -> Option<u32> {
        if text.len() < PHRASE_BYTES_MIN {
            return None;
        }
        if let Some(&number) = self.numbers.get(text) {
            return Some(number);
        }
        if self.texts.len() >= PHRASES_MAX {
            return None;
        }
        let (text, number) = (Arc::<str>::from(text), self.texts.len() as u32);
        self.texts.push(Arc::clone(&text));
        self.numbers.insert(text, number);
        Some(number)
    }
}

/// A description as it is packed and unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description<T> {
    pub kind: u8,
    /// Set where the key does not say it.
    pub node: Option<u64>,
    pub parent: EntityId,
    pub addresses: Vec<[u8; 16]>,
    /// Container id, pod uid, cgroup, name, namespace, pod, container, image, workload.
    pub texts: [T; TEXTS],
}

/// Texts whose parts are unlikely to be another's as well.
const fn is_own(text: usize) -> bool {
    matches!(text, 0 | 1 | 3 | 5)
}

/// What a description has said so far.
#[derive(Default)]
struct Said {
    hex: Vec<Vec<u8>>,
    uuid: Option<[u8; 16]>,
}

/// Appends a description.
pub fn pack(description: &Description<&str>, phrases: &mut Phrases, out: &mut Vec<u8>) {
    let by_uid = description.parent != 0 && description.parent == pod_of(description.texts[1]);
    let mut flags = 0;
    for (flag, is_set) in [
        (HAS_NODE, description.node.is_some()),
        (HAS_PARENT, description.parent != 0 && !by_uid),
        (PARENT_BY_UID, by_uid),
        (HAS_ADDRESSES, !description.addresses.is_empty()),
    ] {
        flags |= if is_set { flag } else { 0 };
    }
    out.extend_from_slice(&[flags, description.kind]);
    if let Some(node) = description.node {
        out.extend_from_slice(&node.to_le_bytes());
    }
    if flags & HAS_PARENT != 0 {
        out.extend_from_slice(&description.parent.to_le_bytes());
    }
    if flags & HAS_ADDRESSES != 0 {
        let addresses = &description.addresses[..description.addresses.len().min(PIECE_BYTES_MAX)];
        out.push(addresses.len() as u8);
        out.extend(addresses.iter().flatten());
    }
    let present = description.texts.iter().enumerate().filter(|(_, text)| !text.is_empty());
    let mask = present.clone().fold(0u16, |mask, (index, _)| mask | 1 << index);
    out.extend_from_slice(&mask.to_le_bytes());
    let mut said = Said::default();
    for (index, text) in present {
        pack_text(text, is_own(index), phrases, &mut said, out);
    }
}

fn pod_of(uid: &str) -> EntityId {
    if uid.is_empty() { 0 } else { tapio_wire::entity_id(EntityKind::Pod, uid) }
}

fn pack_text(text: &str, is_own: bool, phrases: &mut Phrases, said: &mut Said, out: &mut Vec<u8>) {
    let count_at = out.len();
    out.push(0);
    let mut pieces = 0u8;
    let mut begin = |out: &mut Vec<u8>, tag: u8| {
        pieces = pieces.saturating_add(1);
        out.push(tag);
    };
    let mut literal_from = 0;
    let mut at = 0;
    let bytes = text.as_bytes();
    while at < bytes.len() {
        let run = bytes[at..].iter().take_while(|byte| is_digit(**byte)).count();
        // `pod` before a uid ends with what is a digit as well.
        if run > 8 && uuid(&bytes[at + run - 8..]).is_some() {
            at += run - 8;
            continue;
        }
        let Some((number, digits)) = number_at(&bytes[at..], run, said) else {
            at += run.max(1);
            continue;
        };
        pack_literal(&text[literal_from..at], is_own, phrases, out, &mut begin);
        match number {
            Number::Uuid(uuid, separator) if said.uuid == Some(uuid) => begin(out, OLD_UUID[separator]),
            Number::Uuid(uuid, separator) => {
                begin(out, UUID[separator]);
                out.extend_from_slice(&uuid);
                said.uuid = Some(uuid);
            }
            Number::Old(which) => {
                begin(out, OLD_HEX);
                out.extend_from_slice(&[which, digits as u8]);
            }
            Number::Hex(hex) => {
                begin(out, HEX);
                out.push(hex.len() as u8);
                out.extend_from_slice(&hex);
                said.hex.push(hex);
            }
        }
        at += digits;
        literal_from = at;
    }
    pack_literal(&text[literal_from..], is_own, phrases, out, &mut begin);
    out[count_at] = pieces;
}

fn pack_literal(
    text: &str,
    is_own: bool,
    phrases: &mut Phrases,
    out: &mut Vec<u8>,
    begin: &mut impl FnMut(&mut Vec<u8>, u8),
) {
    if text.is_empty() {
        return;
    }
    if !is_own && let Some(number) = phrases.number(text) {
        begin(out, PHRASE);
        out.extend_from_slice(&number.to_le_bytes()[..3]);
        return;
    }
    for part in text.as_bytes().chunks(PIECE_BYTES_MAX) {
        begin(out, LITERAL);
        out.push(part.len() as u8);
        out.extend_from_slice(part);
    }
}

enum Number {
    Uuid([u8; 16], usize),
    Hex(Vec<u8>),
    /// The first digits of an earlier one.
    Old(u8),
}

fn is_digit(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

fn digit(byte: u8) -> u8 {
    if byte <= b'9' { byte - b'0' } else { byte - b'a' + 10 }
}

/// The number that `rest` begins with, and how many characters it has; `run` of them are digits.
fn number_at(rest: &[u8], run: usize, said: &Said) -> Option<(Number, usize)> {
    if run < 8 {
        return None;
    }
    if run == 8
        && let Some((uuid, separator)) = uuid(rest)
    {
        return Some((Number::Uuid(uuid, separator), UUID_DIGITS));
    }
    let begins = |hex: &[u8]| {
        run <= 2 * hex.len()
            && run <= PIECE_BYTES_MAX
            && rest[..run].iter().enumerate().all(|(index, &byte)| {
                let pair = hex[index / 2];
                digit(byte) == if index % 2 == 0 { pair >> 4 } else { pair & 15 }
            })
    };
    if let Some(which) = said.hex.iter().take(PIECE_BYTES_MAX).position(|hex| begins(hex)) {
        return Some((Number::Old(which as u8), run));
    }
    let digits = (run & !1).min(PIECE_BYTES_MAX & !1);
    if digits < HEX_DIGITS_MIN {
        return None;
    }
    let pairs = rest[..digits].chunks_exact(2);
    Some((Number::Hex(pairs.map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()), digits))
}

/// `8-4-4-4-12` digits with one separator throughout.
fn uuid(rest: &[u8]) -> Option<([u8; 16], usize)> {
    let text = rest.first_chunk::<UUID_DIGITS>()?;
    let separator = SEPARATORS.iter().position(|&separator| separator == text[8])?;
    let mut digits = [0u8; 32];
    let mut filled = 0;
    for (index, &byte) in text.iter().enumerate() {
        if matches!(index, 8 | 13 | 18 | 23) {
            if byte != SEPARATORS[separator] {
                return None;
            }
        } else if is_digit(byte) {
            digits[filled] = digit(byte);
            filled += 1;
        } else {
            return None;
        }
    }
    // One more digit would make it another number.
    if rest.get(UUID_DIGITS).is_some_and(|&byte| is_digit(byte)) {
        return None;
    }
    Some((std::array::from_fn(|index| digits[2 * index] << 4 | digits[2 * index + 1]), separator))
}

/// Reads what [`pack`] wrote; bytes of another origin give some description or none.
pub fn unpack(bytes: &[u8], phrases: &Phrases) -> Option<Description<String>> {
    let mut reader = Reader { bytes };
    let [flags, kind] = reader.array()?;
    let node = if flags & HAS_NODE != 0 { Some(u64::from_le_bytes(reader.array()?)) } else { None };
    let mut parent = if flags & HAS_PARENT != 0 { u64::from_le_bytes(reader.array()?) } else { 0 };
    let mut addresses = Vec::new();
    if flags & HAS_ADDRESSES != 0 {
        for _ in 0..reader.byte()? {
            addresses.push(reader.array()?);
        }
    }
    let mask = u16::from_le_bytes(reader.array()?);
    let mut said = Said::default();
    let mut texts: [String; TEXTS] = Default::default();
    for (index, text) in texts.iter_mut().enumerate() {
        if mask & 1 << index != 0 {
            *text = unpack_text(&mut reader, phrases, &mut said)?;
        }
    }
    if flags & PARENT_BY_UID != 0 {
        parent = pod_of(&texts[1]);
    }
    Some(Description { kind, node, parent, addresses, texts })
}

fn unpack_text(reader: &mut Reader<'_>, phrases: &Phrases, said: &mut Said) -> Option<String> {
    let mut text = Vec::new();
    for _ in 0..reader.byte()? {
        match reader.byte()? {
            LITERAL => {
                let length = reader.byte()?;
                text.extend_from_slice(reader.take(length.into())?);
            }
            PHRASE => {
                let [low, middle, high] = reader.array()?;
                let number = u32::from_le_bytes([low, middle, high, 0]);
                text.extend_from_slice(phrases.texts.get(number as usize)?.as_bytes());
            }
            HEX => {
                let length = reader.byte()?;
                let hex = reader.take(length.into())?;
                put_hex(&mut text, hex, 2 * hex.len());
                said.hex.push(hex.to_vec());
            }
            OLD_HEX => {
                let [which, digits] = reader.array()?;
                put_hex(&mut text, said.hex.get(usize::from(which))?, digits.into());
            }
            tag => {
                let is_new = UUID.contains(&tag);
                if is_new {
                    said.uuid = Some(reader.array()?);
                }
                let separator = SEPARATORS[usize::from(tag & 1)];
                let mut from = 0;
                for bytes in [4, 2, 2, 2, 6] {
                    if from > 0 {
                        text.push(separator);
                    }
                    put_hex(&mut text, &said.uuid?[from..from + bytes], 2 * bytes);
                    from += bytes;
                }
            }
        }
    }
    String::from_utf8(text).ok()
}

fn put_hex(text: &mut Vec<u8>, hex: &[u8], digits: usize) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let both = hex.iter().flat_map(|&pair| [pair >> 4, pair & 15]);
    text.extend(both.take(digits).map(|digit| DIGITS[usize::from(digit)]));
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(count)?;
        self.bytes = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn byte(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "9f1c2b3a-0d4e-4f5a-8b6c-7d8e9fa0b1c2";

    fn container(id: &str) -> Description<String> {
        let slice = UID.replace('-', "_");
        let cgroup = format!(
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice/cri-containerd-{id}.scope"
        );
        let texts = [id, UID, &cgroup, &id[..12], "", "", "", "", ""].map(str::to_owned);
        Description { kind: 1, node: None, parent: pod_of(UID), addresses: Vec::new(), texts }
    }

    fn packed(description: &Description<String>, phrases: &mut Phrases) -> Vec<u8> {
        let mut out = Vec::new();
        let texts = description.texts.each_ref().map(String::as_str);
        let Description { kind, node, parent, ref addresses, .. } = *description;
        pack(&Description { kind, node, parent, addresses: addresses.clone(), texts }, phrases, &mut out);
        out
    }

    #[test]
    fn a_container_of_kubelet_is_small_and_comes_back() {
        let mut phrases = Phrases::default();
        for number in 0..3u64 {
            let container = container(&format!("{:016x}", number.wrapping_mul(0xd134_2543_de82_ef95)).repeat(4));
            let bytes = packed(&container, &mut phrases);
            assert!(bytes.len() <= 84, "{}", bytes.len());
            assert_eq!(unpack(&bytes, &phrases), Some(container));
        }
        assert_eq!(phrases.texts.len(), 3, "{:?}", phrases.texts);
    }

    #[test]
    fn a_full_table_of_phrases_takes_no_more_loses_nothing() {
        let mut phrases = Phrases::default();
        for number in 0..PHRASES_MAX + 10 {
            let mut description = container(&"0123456789abcdef".repeat(4));
            description.texts[7] = format!("registry/image-{number}");
            let bytes = packed(&description, &mut phrases);
            assert_eq!(unpack(&bytes, &phrases), Some(description));
        }
        assert_eq!(phrases.texts.len(), PHRASES_MAX);
    }

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            "[0-9a-fg_-]{0,80}",
            "([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{11,13}|pod|[0-9a-f]{64}|é){0,4}",
            Just(UID.replace('-', "_")),
            Just("0123456789abcdef".repeat(4)),
            "\\PC{0,400}",
        ]
    }

    proptest! {
        #[test]
        fn what_comes_out_is_what_went_in(
            texts in prop::array::uniform9(text()),
            node in proptest::option::of(any::<u64>()),
            parent in any::<u64>(),
            addresses in prop::collection::vec(any::<[u8; 16]>(), 0..5),
        ) {
            let mut phrases = Phrases::default();
            let description = Description { kind: 3, node, parent, addresses, texts };
            let bytes = packed(&description, &mut phrases);
            prop_assert_eq!(&packed(&description, &mut phrases), &bytes);
            prop_assert_eq!(unpack(&bytes, &phrases), Some(description));
        }

        #[test]
        fn other_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = unpack(&bytes, &Phrases::default());
        }
    }
}
