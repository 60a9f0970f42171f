//! A connection of the gRPC side, counted, and closed when it does not begin.
//!
//! What must hold: there are no more connections than the server is sized for. One that has not sent HTTP/2's preface within
//! [`PREFACE_TIMEOUT`] is closed, since until then nothing pings it.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Sleep, sleep};
use tonic::transport::server::Connected;

/// How long a peer may take to begin.
pub const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);
/// The client's preface, RFC 9113, 3.4.
const PREFACE_BYTES: usize = 24;

/// Counts a connection, and closes it when it does not begin to speak in time.
pub struct Connection<T> {
    io: T,
    /// What is missing of the preface, and until when.
    preface: Option<(usize, Pin<Box<Sleep>>)>,
    _place: OwnedSemaphorePermit,
}

impl<T> Connection<T> {
    /// A connection that holds its place until it is dropped.
    pub fn new(io: T, place: OwnedSemaphorePermit) -> Self {
        Self::within(PREFACE_TIMEOUT, io, place)
    }

    fn within(timeout: Duration, io: T, place: OwnedSemaphorePermit) -> Self {
        Self { io, preface: Some((PREFACE_BYTES, Box::pin(sleep(timeout)))), _place: place }
    }
}

impl<T: Connected> Connected for Connection<T> {
    type ConnectInfo = T::ConnectInfo;

    fn connect_info(&self) -> T::ConnectInfo {
        self.io.connect_info()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Connection<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        if let Some((missing, deadline)) = &mut self.preface {
            *missing = missing.saturating_sub(buffer.filled().len() - before);
            if *missing == 0 {
                self.preface = None;
            } else if read.is_pending() && deadline.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer did not begin in time")));
            }
        }
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Connection<T> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn a_peer_must_begin_in_time_may_then_be_quiet() {
        let places = Arc::new(Semaphore::new(2));
        let timeout = Duration::from_millis(50);
        let connection =
            |io| Connection::within(timeout, io, Arc::clone(&places).try_acquire_owned().expect("a place"));
        let (mut slow, io) = duplex(1024);
        let mut hangs = connection(io);
        slow.write_all(&[0; PREFACE_BYTES - 1]).await.expect("written");
        let mut bytes = [0; 64];
        assert_eq!(hangs.read(&mut bytes).await.expect("read"), PREFACE_BYTES - 1);
        let error = hangs.read(&mut bytes).await.expect_err("too late");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        let (mut quick, io) = duplex(1024);
        let mut lives = connection(io);
        quick.write_all(&[0; PREFACE_BYTES]).await.expect("written");
        assert_eq!(lives.read(&mut bytes).await.expect("read"), PREFACE_BYTES);
        let quiet = tokio::time::timeout(timeout * 4, lives.read(&mut bytes)).await;
        assert!(quiet.is_err(), "it waits");
        assert_eq!(places.available_permits(), 0);
        drop((hangs, lives));
        assert_eq!(places.available_permits(), 2, "their places are free again");
    }
}
