//! GET over HTTP/1.0 from a program on this host: no more is needed for `/readyz`, `/latency` and `/metrics`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::error::Error;

const TIMEOUT: Duration = Duration::from_secs(5);
/// More than this of an answer is not read.
const BODY_BYTES_MAX: u64 = 64 << 20;

/// Status and body of `GET http://127.0.0.1:port path`.
pub fn get(port: u16, path: &str) -> Result<(u16, String), Error> {
    get_from(SocketAddr::from(([127, 0, 0, 1], port)), path)
}

/// Gets a path from any address, as of a pod's.
pub fn get_from(address: SocketAddr, path: &str) -> Result<(u16, String), Error> {
    fetch(address, path).map_err(|message| Error::Http { port: address.port(), path: path.to_owned(), message })
}

fn fetch(address: SocketAddr, path: &str) -> Result<(u16, String), String> {
    let io = |error: std::io::Error| error.to_string();
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT).map_err(io)?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(io)?;
    stream.set_write_timeout(Some(TIMEOUT)).map_err(io)?;
    // 1.0, so that the answer is neither chunked nor kept alive.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", address.ip()).map_err(io)?;
    let mut answer = Vec::new();
    stream.take(BODY_BYTES_MAX).read_to_end(&mut answer).map_err(io)?;
    parse(&String::from_utf8_lossy(&answer))
        .ok_or_else(|| "the answer is not HTTP: is another program on this port?".to_owned())
}

fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn status_and_body_are_split() {
        assert_eq!(
            parse("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 3\r\n\r\nno\n"),
            Some((503, "no\n".to_owned()))
        );
        for wrong in ["", "HTTP/1.1 200", "SSH-2.0-x\r\n\r\n", "HTTP/1.1\r\n\r\n"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
