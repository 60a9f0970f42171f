//! The frame: what travels, and what is archived byte for byte.
//!
//! What enters: a [`Body`] on the sending side, untrusted bytes on the receiving side. What leaves: bytes, or a [`Frame`] whose
//! body was checked once and is then read in place. What must hold: nothing is allocated by a declared size before the
//! size was checked against the limits, and [`Frame`] cannot exist with an unchecked body.
//!
//! ```text
//!   0     4     6     8        16       24      32            40            48      52
//!   ├─────┼─────┼─────┼────────┼────────┼───────┼─────────────┼─────────────┼───────┼──────┤
//!   │magic│vers.│flags│ node   │ epoch  │  seq  │ boottime_ns │ realtime_ns │lethal │ bulk │
//!   ├─────┴┬────┴───┬─┴───────┬┴────────┼───────┴──┬──────────┼─────────────┴───────┴──────┘
//!   │ raw  │payload │ payload │ header  │ ledger   │ reserved │
//!   │bytes │ bytes  │ crc32c  │ crc32c  │ entries  │ 0        │
//!   56     60       64        68        72         76         80
//!   ├──────────────────────────┬──────────────┬──────────────┬────────────┐
//!   │ events by source, 5 × u32│ first_time_ns│ last_time_ns │ reserved 0 │
//!   80                         100            108            116          128
//!   payload (rows, an lz4 block, or the archive itself) · ledger entries of 16 bytes
//! ```
//!
//! Little endian throughout. The header's checksum (crc32c, RFC 3720) covers header and ledger with its own field as
//! zero. The payload's checksum is computed when the frame is packed. The header's is computed when the frame gets its
//! place in the sequence, right before it is first sent.

mod replay;

use bytes::Bytes;
use rkyv::api::low;
use rkyv::rancor::Failure;
use rkyv::ser::allocator::Arena;
use rkyv::util::AlignedVec;

use crate::compress::{self, Compression, Compressor};
use crate::error::FrameError;
use crate::event::{ArchivedBody, Body, Lane, SOURCES};
use crate::ledger::{ENTRIES_MAX, ENTRY_BYTES, Ledger};
use crate::limits::{EXPANSION_MAX, FRAME_BYTES_MAX, FRAME_EVENTS_MAX, RAW_BYTES_MAX};

pub use replay::{REPLAY_BASE_NS, ReplayFrame};

/// The first four bytes of a frame.
pub const MAGIC: [u8; 4] = *b"TPIO";
/// The version that this build writes.
///
/// Version 2 added [`crate::event::CgroupUse`] and, in bytes that were zero before, [`crate::event::Role`] and two more; version 3
/// [`crate::event::Trouble`], [`crate::event::Curve`] and [`crate::event::LogLines`].
pub const VERSION: u16 = if cfg!(feature = "next-version") { 4 } else { 3 };
/// The oldest version that this build reads.
pub const VERSION_OLDEST: u16 = 1;
/// Bytes of the fixed header.
pub const HEADER_BYTES: usize = 128;

/// The payload is lz4.
const FLAG_LZ4: u16 = 1;
/// The epoch ends with this frame; nothing may be held any more.
const FLAG_FINAL: u16 = 2;
/// An event of it is urgent.
const FLAG_URGENT: u16 = 4;
/// The payload is rows: see [`crate::rows`].
const FLAG_ROWS: u16 = 8;

const SOURCE_EVENTS: usize = 80;
const FIRST_TIME: usize = SOURCE_EVENTS + SOURCES * 4;
const LAST_TIME: usize = FIRST_TIME + 8;
const HEADER_CRC: usize = 68;
const _: () = assert!(LAST_TIME + 8 <= HEADER_BYTES);
const _: () = assert!(HEADER_BYTES + ENTRIES_MAX * ENTRY_BYTES < FRAME_BYTES_MAX);

/// A frame's header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub node: u64,
    pub epoch: u64,
    pub seq: u64,
    /// `CLOCK_BOOTTIME` and `CLOCK_REALTIME` at one moment, nanoseconds.
    pub boottime_ns: u64,
    pub realtime_ns: u64,
    pub lethal_events: u32,
    pub bulk_events: u32,
    pub raw_bytes: u32,
    pub payload_bytes: u32,
    pub compression: Compression,
    /// The last frame of its epoch.
    pub is_final: bool,
    /// An event of it is urgent: see [`crate::event::Detail::is_urgent`].
    pub is_urgent: bool,
    /// Events of this frame by source.
    pub source_events: [u32; SOURCES],
    /// Times of the earliest and the latest event, 0 when there is none.
    pub first_time_ns: u64,
    pub last_time_ns: u64,
    payload_crc: u32,
    ledger_entries: u16,
}

impl Header {
    /// Reads and checks a header, and returns the length of the frame it belongs to. `bytes` may be longer or shorter than the
    /// frame, so that a scanner of a segment can use it.
    ///
    /// The header's checksum is not part of this, since it needs the ledger at the frame's end: see [`Header::check`].
    pub fn peek(bytes: &[u8]) -> Result<(Self, usize), FrameError> {
        let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(FrameError::Truncated { bytes: bytes.len() });
        };
        let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        if head[..4] != MAGIC {
            return Err(FrameError::NotAFrame);
        }
        let version = u16_at(4);
        if !(VERSION_OLDEST..=VERSION).contains(&version) {
            return Err(FrameError::Version { version, oldest: VERSION_OLDEST, newest: VERSION });
        }
        let flags = u16_at(6);
        let compression = match flags & (FLAG_LZ4 | FLAG_ROWS) {
            0 => Compression::None,
            FLAG_LZ4 => Compression::Lz4,
            FLAG_ROWS => Compression::Rows,
            _ => return Err(FrameError::Compression),
        };
        let header = Self {
            node: u64_at(8),
            epoch: u64_at(16),
            seq: u64_at(24),
            boottime_ns: u64_at(32),
            realtime_ns: u64_at(40),
            lethal_events: u32_at(48),
            bulk_events: u32_at(52),
            raw_bytes: u32_at(56),
            payload_bytes: u32_at(60),
            payload_crc: u32_at(64),
            ledger_entries: u16_at(72),
            compression,
            is_final: flags & FLAG_FINAL != 0,
            is_urgent: flags & FLAG_URGENT != 0,
            source_events: std::array::from_fn(|source| u32_at(SOURCE_EVENTS + 4 * source)),
            first_time_ns: u64_at(FIRST_TIME),
            last_time_ns: u64_at(LAST_TIME),
        };
        let length = header.frame_bytes();
        if length > FRAME_BYTES_MAX || usize::from(header.ledger_entries) > ENTRIES_MAX {
            return Err(FrameError::TooLong { bytes: length, limit: FRAME_BYTES_MAX });
        }
        Ok((header, length))
    }

    /// Checks everything about a frame that can be checked without decompressing it: length, both checksums, declared sizes.
    /// `bytes` must be exactly one frame.
    pub fn check(bytes: &[u8]) -> Result<(Self, Ledger), FrameError> {
        let (header, ledger_start) = Self::check_length(bytes)?;
        if crc32c::crc32c(&bytes[HEADER_BYTES..ledger_start]) != header.payload_crc {
            return Err(FrameError::PayloadChecksum);
        }
        let (raw, payload) = (header.raw_bytes as usize, header.payload_bytes as usize);
        let possible = match header.compression {
            Compression::Rows | Compression::Lz4 => raw <= payload.saturating_mul(EXPANSION_MAX),
            Compression::None => raw == payload,
        };
        if raw > RAW_BYTES_MAX || !possible {
            return Err(FrameError::DeclaredSize { raw: header.raw_bytes, payload: header.payload_bytes });
        }
        let events = u64::from(header.lethal_events) + u64::from(header.bulk_events);
        if events > FRAME_EVENTS_MAX as u64 {
            return Err(FrameError::Contradiction { what: "more events than a frame may carry" });
        }
        if events != header.source_events.iter().map(|&count| u64::from(count)).sum::<u64>() {
            return Err(FrameError::Contradiction { what: "events by lane and by source differ" });
        }
        let ledger = Ledger::decode(&bytes[ledger_start..]).ok_or(FrameError::Ledger)?;
        Ok((header, ledger))
    }

    /// Header and ledger of a frame whose payload may be damaged: they match their own checksum. `bytes` must be exactly one frame.
    pub fn check_without_payload(bytes: &[u8]) -> Result<(Self, Ledger), FrameError> {
        let (header, ledger_start) = Self::check_length(bytes)?;
        let ledger = Ledger::decode(&bytes[ledger_start..]).ok_or(FrameError::Ledger)?;
        Ok((header, ledger))
    }

    /// Checks length and header; also returns where the ledger begins.
    fn check_length(bytes: &[u8]) -> Result<(Self, usize), FrameError> {
        if bytes.len() > FRAME_BYTES_MAX {
            return Err(FrameError::TooLong { bytes: bytes.len(), limit: FRAME_BYTES_MAX });
        }
        let (header, length) = Self::peek(bytes)?;
        if bytes.len() != length {
            return Err(FrameError::Truncated { bytes: bytes.len() });
        }
        let ledger_start = HEADER_BYTES + header.payload_bytes as usize;
        let declared = u32::from_le_bytes(std::array::from_fn(|i| bytes[HEADER_CRC + i]));
        if header_crc(bytes, ledger_start) != declared {
            return Err(FrameError::HeaderChecksum);
        }
        Ok((header, ledger_start))
    }

    /// Events in the frame.
    pub fn events(&self) -> u32 {
        self.lethal_events + self.bulk_events
    }

    fn frame_bytes(&self) -> usize {
        HEADER_BYTES + self.payload_bytes as usize + usize::from(self.ledger_entries) * ENTRY_BYTES
    }
}

fn header_crc(bytes: &[u8], ledger_start: usize) -> u32 {
    let crc = crc32c::crc32c(&bytes[..HEADER_CRC]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    let crc = crc32c::crc32c_append(crc, &bytes[HEADER_CRC + 4..HEADER_BYTES]);
    crc32c::crc32c_append(crc, &bytes[ledger_start..])
}

/// A frame whose bytes were checked from the length to the archive.
pub struct Frame {
    header: Header,
    ledger: Ledger,
    raw: AlignedVec,
}

impl Frame {
    /// Checks a frame completely and decompresses it: length, checksums, declared sizes, compression, archive, in this order.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let (header, ledger) = Header::check(bytes)?;
        Self::decode_checked(header, ledger, bytes)
    }

    /// The second half of [`Frame::decode`], for a caller that has [`Header::check`]ed these very bytes.
    pub fn decode_checked(header: Header, ledger: Ledger, bytes: &[u8]) -> Result<Self, FrameError> {
        let payload = bytes
            .get(HEADER_BYTES..HEADER_BYTES + header.payload_bytes as usize)
            .ok_or(FrameError::Truncated { bytes: bytes.len() })?;
        let mut raw = AlignedVec::with_capacity(header.raw_bytes as usize);
        raw.resize(header.raw_bytes as usize, 0);
        compress::decompress(payload, header.events() as usize, header.compression, &mut raw)
            .ok_or(FrameError::Compression)?;
        let body = low::access::<ArchivedBody, Failure>(&raw).map_err(|_| FrameError::Archive)?;
        if body.events.len() != header.events() as usize {
            return Err(FrameError::Contradiction { what: "header and body count different events" });
        }
        Ok(Self { header, ledger, raw })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The collector's counters as of this frame.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The events, in place.
    #[inline]
    pub fn body(&self) -> &ArchivedBody {
        // SAFETY: `decode_checked`, the only constructor, had `low::access` validate an `ArchivedBody` at the root of exactly
        // these bytes; `raw` is private, never changed afterwards, and keeps its alignment.
        unsafe { rkyv::access_unchecked::<ArchivedBody>(&self.raw) }
    }
}

impl Frame {
    /// A copy of what it carries, to be changed and packed again.
    ///
    /// # Errors
    /// None but those of a checked body: it was valid when it was decoded.
    pub fn to_body(&self) -> Result<Body, FrameError> {
        rkyv::deserialize::<Body, Failure>(self.body()).map_err(|_| FrameError::Archive)
    }
}

/// Packs bodies into frames, one after another, with its buffers kept.
#[derive(Default)]
pub struct Encoder {
    compressor: Compressor,
    arena: Arena,
    raw: AlignedVec,
}

impl Encoder {
    /// Packs a body whose events are all of `lane`. Its place in the sequence comes later: [`SealedFrame::stamp`].
    ///
    /// # Errors
    /// [`FrameError::TooLong`] when the body exceeds the limits; the caller then splits it.
    pub fn seal(&mut self, body: &Body, lane: Lane, compression: Compression) -> Result<SealedFrame, FrameError> {
        if body.events.len() > FRAME_EVENTS_MAX {
            return Err(FrameError::TooLong { bytes: body.events.len(), limit: FRAME_EVENTS_MAX });
        }
        let mut raw = std::mem::take(&mut self.raw);
        raw.clear();
        let raw = low::to_bytes_in_with_alloc::<_, _, Failure>(body, raw, self.arena.acquire())
            .map_err(|_| FrameError::Archive)?;
        let result = self.seal_raw(&raw, body, lane, compression);
        self.raw = raw;
        result
    }

    fn seal_raw(
        &mut self,
        raw: &[u8],
        body: &Body,
        lane: Lane,
        compression: Compression,
    ) -> Result<SealedFrame, FrameError> {
        if raw.len() > RAW_BYTES_MAX {
            return Err(FrameError::TooLong { bytes: raw.len(), limit: RAW_BYTES_MAX });
        }
        let ledger_room = ENTRIES_MAX * ENTRY_BYTES;
        let payload = self.compressor.compress(raw, body.events.len(), compression);
        let payload_bytes = payload.len();
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload_bytes + ledger_room);
        bytes.resize(HEADER_BYTES, 0);
        bytes.extend_from_slice(payload);
        if bytes.len() + ledger_room > FRAME_BYTES_MAX {
            return Err(FrameError::TooLong { bytes: bytes.len(), limit: FRAME_BYTES_MAX });
        }
        let mut source_events = [0u32; SOURCES];
        let (mut first, mut last) = (u64::MAX, 0);
        for event in &body.events {
            source_events[event.source as usize] += 1;
            first = first.min(event.time_ns);
            last = last.max(event.time_ns);
        }
        let events = body.events.len() as u32;
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(4, &VERSION.to_le_bytes());
        let is_urgent = lane == Lane::Lethal && body.events.iter().any(|event| event.body.is_urgent());
        let flags = match compression {
            Compression::Rows => FLAG_ROWS,
            Compression::Lz4 => FLAG_LZ4,
            Compression::None => 0,
        } | if is_urgent { FLAG_URGENT } else { 0 };
        put(6, &flags.to_le_bytes());
        put(if lane == Lane::Lethal { 48 } else { 52 }, &events.to_le_bytes());
        put(56, &(raw.len() as u32).to_le_bytes());
        put(60, &(payload_bytes as u32).to_le_bytes());
        for (source, count) in source_events.iter().enumerate() {
            put(SOURCE_EVENTS + 4 * source, &count.to_le_bytes());
        }
        put(FIRST_TIME, &(if events == 0 { 0 } else { first }).to_le_bytes());
        put(LAST_TIME, &last.to_le_bytes());
        let payload_crc = crc32c::crc32c(&bytes[HEADER_BYTES..]);
        bytes[64..68].copy_from_slice(&payload_crc.to_le_bytes());
        Ok(SealedFrame { bytes, lane, source_events, raw_bytes: raw.len() as u32 })
    }
}

/// A packed frame that has no place in the sequence yet.
#[derive(Debug)]
pub struct SealedFrame {
    bytes: Vec<u8>,
    lane: Lane,
    source_events: [u32; SOURCES],
    raw_bytes: u32,
}

/// What a frame gets when it is sent first.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    pub node: u64,
    pub epoch: u64,
    pub seq: u64,
    pub boottime_ns: u64,
    pub realtime_ns: u64,
    /// The last frame of the epoch.
    pub is_final: bool,
}

impl SealedFrame {
    /// The lane of all its events.
    pub fn lane(&self) -> Lane {
        self.lane
    }

    /// Events by source.
    pub fn source_events(&self) -> &[u32; SOURCES] {
        &self.source_events
    }

    /// Bytes it occupies now.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Never: a frame has at least its header.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Bytes of its body before compression.
    pub fn raw_bytes(&self) -> u32 {
        self.raw_bytes
    }

    /// Gives it its place in the sequence and the counters as of now, and finishes its bytes.
    pub fn stamp(self, stamp: &Stamp, ledger: &Ledger) -> Bytes {
        let mut bytes = self.bytes;
        let ledger_start = bytes.len();
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(8, &stamp.node.to_le_bytes());
        put(32, &stamp.boottime_ns.to_le_bytes());
        put(40, &stamp.realtime_ns.to_le_bytes());
        if stamp.is_final {
            bytes[6] |= FLAG_FINAL as u8;
        }
        place(bytes, ledger_start, stamp.epoch, stamp.seq, ledger)
    }
}

/// Gives a stamped frame another place: epoch, `seq` and counters change; what it carries, and when it was stamped, stay.
/// `change` makes the new counters from the old ones.
///
/// # Errors
/// As [`Header::check`]: a damaged frame would be given a sound checksum otherwise.
pub fn restamp(
    bytes: &[u8],
    epoch: u64,
    seq: u64,
    change: impl FnOnce(&Ledger) -> Ledger,
) -> Result<Bytes, FrameError> {
    let (header, ledger) = Header::check(bytes)?;
    let ledger_start = HEADER_BYTES + header.payload_bytes as usize;
    let mut out = Vec::with_capacity(ledger_start + ENTRIES_MAX * ENTRY_BYTES);
    out.extend_from_slice(&bytes[..ledger_start]);
    Ok(place(out, ledger_start, epoch, seq, &change(&ledger)))
}

/// Finishes a frame that ends with its payload: place in the sequence, counters, and the checksum over both.
fn place(mut bytes: Vec<u8>, ledger_start: usize, epoch: u64, seq: u64, ledger: &Ledger) -> Bytes {
    let entries = ledger.encode(&mut bytes) as u16;
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(16, &epoch.to_le_bytes());
    put(24, &seq.to_le_bytes());
    put(72, &entries.to_le_bytes());
    let crc = header_crc(&bytes, ledger_start);
    bytes[HEADER_CRC..HEADER_CRC + 4].copy_from_slice(&crc.to_le_bytes());
    Bytes::from(bytes)
}
