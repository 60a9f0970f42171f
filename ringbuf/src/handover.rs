//! Handing a memfd ring to the process that will read it, over a Unix stream socket.
//!
//! ```text
//!  peer → reader   16 bytes, then the name; memfd and eventfd ride on the first byte (SCM_RIGHTS, unix(7))
//!    0             8         12           16
//!    ├─────────────┼─────────┼────────────┼──────────────┤
//!    │ "TPIORING"  │ version │ name bytes │ name (UTF-8) │      integers little endian
//!    └─────────────┴─────────┴────────────┴──────────────┘
//!  reader → peer   one line: "ok", or "error: " and why
//! ```
//!
//! The connection then stays open, silent, for as long as the ring is in use: its end shows each side that the other is
//! gone. A peer may hand the same ring to the next reader; the positions in the ring say where to go on.

use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv,
    recvmsg, sendmsg,
};

const MAGIC: [u8; 8] = *b"TPIORING";
const VERSION: u32 = 1;
const HELLO_BYTES: usize = 16;
/// Bytes of a peer's name.
pub const NAME_BYTES_MAX: usize = 64;
/// How long either side waits for the other during the handover.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a handover failed.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    #[error("cannot reach the collector at {path}: {error}; is it running with the shm source enabled?")]
    Connect { path: std::path::PathBuf, error: std::io::Error },
    #[error("the handover broke off: {0}")]
    Io(#[from] std::io::Error),
    #[error("the collector refused the ring: {0}")]
    Refused(String),
    #[error("the peer does not speak the handover protocol: {0}")]
    Protocol(&'static str),
}

/// A ring that a reader has taken; it reads until this is dropped.
pub struct Publication {
    stream: UnixStream,
}

impl Publication {
    /// Whether the reader is still there.
    pub fn is_alive(&self) -> bool {
        // Nothing is ever sent on the connection, so whatever can be read is its end.
        let peeked = recv(&self.stream, &mut [0u8], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        matches!(peeked, Err(rustix::io::Errno::AGAIN))
    }
}

/// Hands a ring to the reader that listens at `socket`.
///
/// # Errors
/// See [`HandoverError`]; the ring is untouched.
pub fn publish(
    socket: &Path,
    name: &str,
    memfd: BorrowedFd<'_>,
    eventfd: BorrowedFd<'_>,
) -> Result<Publication, HandoverError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(HandoverError::Protocol("a name has 1 to 64 bytes"));
    }
    let stream = UnixStream::connect(socket).map_err(|error| HandoverError::Connect { path: socket.into(), error })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut hello = Vec::with_capacity(HELLO_BYTES + name.len());
    hello.extend_from_slice(&MAGIC);
    hello.extend_from_slice(&VERSION.to_le_bytes());
    hello.extend_from_slice(&(name.len() as u32).to_le_bytes());
    hello.extend_from_slice(name.as_bytes());
    let fds = [memfd, eventfd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(HandoverError::Protocol("no room for two descriptors"));
    }
    let sent =
        sendmsg(&stream, &[IoSlice::new(&hello)], &mut ancillary, SendFlags::empty()).map_err(std::io::Error::from)?;
    (&stream).write_all(&hello[sent..])?;
    let mut answer = String::new();
    BufReader::new((&stream).take(512)).read_line(&mut answer)?;
    match answer.trim_end() {
        "ok" => Ok(Publication { stream }),
        other => Err(HandoverError::Refused(other.strip_prefix("error: ").unwrap_or(other).to_string())),
    }
}

/// What a peer handed over.
pub struct Received {
    pub name: String,
    pub memfd: OwnedFd,
    pub eventfd: OwnedFd,
}

/// Takes a peer's side of the handover; answer with [`answer`] once the ring is mapped or refused.
///
/// # Errors
/// See [`HandoverError`]; a peer that is silent is given up on after five seconds.
pub fn receive(stream: &UnixStream) -> Result<Received, HandoverError> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut bytes = [0; HELLO_BYTES + NAME_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .map_err(std::io::Error::from)?;
    let mut fds = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<OwnedFd>>(),
        _ => Vec::new(),
    });
    let (Some(memfd), Some(eventfd)) = (fds.next(), fds.next()) else {
        return Err(HandoverError::Protocol("it sent no memfd and eventfd"));
    };
    let mut have = message.bytes;
    if have < HELLO_BYTES {
        let mut rest = stream;
        rest.read_exact(&mut bytes[have..HELLO_BYTES])?;
        have = HELLO_BYTES;
    }
    let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    if bytes[..8] != MAGIC || u32_at(8) != VERSION {
        return Err(HandoverError::Protocol("wrong magic or version"));
    }
    let name_bytes = u32_at(12) as usize;
    if name_bytes == 0 || name_bytes > NAME_BYTES_MAX {
        return Err(HandoverError::Protocol("a name has 1 to 64 bytes"));
    }
    let end = HELLO_BYTES + name_bytes;
    if have < end {
        let mut rest = stream;
        rest.read_exact(&mut bytes[have..end])?;
    }
    let name =
        std::str::from_utf8(&bytes[HELLO_BYTES..end]).map_err(|_| HandoverError::Protocol("the name is not UTF-8"))?;
    Ok(Received { name: name.to_string(), memfd, eventfd })
}

/// Tells the peer whether its ring was accepted.
///
/// # Errors
/// When the peer is gone.
pub fn answer(stream: &UnixStream, outcome: Result<(), &str>) -> std::io::Result<()> {
    let line = match outcome {
        Ok(()) => "ok\n".to_string(),
        Err(reason) => format!("error: {}\n", reason.replace('\n', " ")),
    };
    let mut stream = stream;
    stream.write_all(line.as_bytes())
}

impl AsFd for Publication {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::{Limits, Reader, Writer};

    #[test]
    fn a_ring_handed_over_is_read_on_the_other_side() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let socket = directory.path().join("collector.sock");
        let listener = UnixListener::bind(&socket).expect("bound");
        let reader = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a peer");
            let received = receive(&stream).expect("a handover");
            assert_eq!(received.name, "test");
            let mut reader = Reader::from_memfd(received.memfd, Limits::default()).expect("a ring");
            answer(&stream, Ok(())).expect("answered");
            let mut seen = Vec::new();
            while seen.is_empty() {
                reader.drain(8, |record| seen.extend_from_slice(record)).expect("sound");
            }
            seen
        });
        let (mut writer, memfd, eventfd) = Writer::create(4096, "test").expect("a ring");
        let publication = publish(&socket, "test", memfd.as_fd(), eventfd.as_fd()).expect("taken");
        assert!(writer.write(b"12345678"));
        assert_eq!(reader.join().expect("no panic"), b"12345678");
        assert!(!publication.is_alive(), "the reader has ended");
    }

    #[test]
    fn a_refusal_reaches_the_peer_and_strangers_are_rejected() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let socket = directory.path().join("collector.sock");
        let listener = UnixListener::bind(&socket).expect("bound");
        let reader = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a peer");
            receive(&stream).expect("a handover");
            answer(&stream, Err("too many rings")).expect("answered");
            let (stranger, _) = listener.accept().expect("a stranger");
            receive(&stranger).err().expect("refused").to_string()
        });
        let (_writer, memfd, eventfd) = Writer::create(4096, "test").expect("a ring");
        let refusal = publish(&socket, "test", memfd.as_fd(), eventfd.as_fd()).err().expect("refused");
        assert!(refusal.to_string().contains("too many rings"), "{refusal}");
        let mut stranger = UnixStream::connect(&socket).expect("connected");
        stranger.write_all(&[0; 80]).expect("sent");
        assert!(reader.join().expect("no panic").contains("no memfd"));
    }
}
