//! Loops over loopback: connections, queries, datagrams that nobody takes.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;

use super::workload::Loop;
use crate::error::{Context, Error};

/// Number of addresses that share the ports: closed connections keep their pair of ports for a minute.
const LISTENERS: u8 = 16;
/// A datagram over loopback that has not come by then does not come.
const PATIENCE: Duration = Duration::from_secs(5);

pub(super) struct TcpLoop {
    listeners: Vec<(TcpListener, SocketAddr)>,
    next: usize,
    reset: bool,
}

impl TcpLoop {
    /// Makes the loop; with `reset`, the side that connected ends it by a reset.
    pub fn new(reset: bool) -> Result<Self, Error> {
        let mut listeners = Vec::new();
        for number in 0..LISTENERS {
            let address = Ipv4Addr::new(127, 0, 77, number + 1);
            let listener = TcpListener::bind((address, 0)).context(|| format!("listen on {address}"))?;
            let address = listener.local_addr().context(|| "find the port".into())?;
            listeners.push((listener, address));
        }
        Ok(Self { listeners, next: 0, reset })
    }
}

impl Loop for TcpLoop {
    fn run(&mut self, operations: u64) -> Result<(), Error> {
        for _ in 0..operations {
            let (listener, address) = &self.listeners[self.next];
            self.next = (self.next + 1) % self.listeners.len();
            let client = TcpStream::connect(address).context(|| format!("connect to {address}"))?;
            let (server, _) = listener.accept().context(|| "accept a connection".into())?;
            if self.reset {
                set_socket_linger(&client, Some(Duration::ZERO)).context(|| "set SO_LINGER".into())?;
            }
            drop(client);
            drop(server);
        }
        Ok(())
    }
}

const DNS_PORT: u16 = 53;
/// One question, `tapio.test` A IN, recursion desired.
const QUERY: &[u8] = b"\0\0\x01\0\0\x01\0\0\0\0\0\0\x05tapio\x04test\0\0\x01\0\x01";
/// The answer to it: a pointer to the name, A IN, 60 s, 192.0.2.1.
const ANSWER: &[u8] = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\xc0\0\x02\x01";

/// Asks and answers itself.
pub(super) struct DnsLoop {
    resolver: UdpSocket,
    client: UdpSocket,
    id: u16,
}

impl DnsLoop {
    pub fn new() -> Result<Self, Error> {
        let address = Ipv4Addr::new(127, 0, 77, 53);
        let resolver =
            UdpSocket::bind((address, DNS_PORT)).context(|| format!("answer at {address}:{DNS_PORT} (root may)"))?;
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).context(|| "make a UDP socket".into())?;
        client.connect((address, DNS_PORT)).context(|| "connect a UDP socket".into())?;
        for socket in [&resolver, &client] {
            socket.set_read_timeout(Some(PATIENCE)).context(|| "set a timeout".into())?;
        }
        Ok(Self { resolver, client, id: 0 })
    }
}

impl Loop for DnsLoop {
    fn run(&mut self, operations: u64) -> Result<(), Error> {
        let what = || "ask and answer".into();
        let mut buffer = [0; 512];
        let mut query = QUERY.to_vec();
        for _ in 0..operations {
            self.id = self.id.wrapping_add(1);
            query[..2].copy_from_slice(&self.id.to_be_bytes());
            self.client.send(&query).context(what)?;
            let (bytes, from) = self.resolver.recv_from(&mut buffer).context(what)?;
            let mut answer = buffer[..bytes].to_vec();
            // An answer, recursion available, one record.
            (answer[2], answer[3], answer[7]) = (0x81, 0x80, 1);
            answer.extend_from_slice(ANSWER);
            self.resolver.send_to(&answer, from).context(what)?;
            self.client.recv(&mut buffer).context(what)?;
        }
        Ok(())
    }
}

pub(super) struct DropLoop {
    socket: UdpSocket,
    nobody: SocketAddr,
}

impl DropLoop {
    pub fn new() -> Result<Self, Error> {
        let bind = || UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).context(|| "make a UDP socket".into());
        let nobody = bind()?.local_addr().context(|| "find the port".into())?;
        Ok(Self { socket: bind()?, nobody })
    }
}

impl Loop for DropLoop {
    fn run(&mut self, operations: u64) -> Result<(), Error> {
        for _ in 0..operations {
            self.socket.send_to(&[0; 64], self.nobody).context(|| "send a datagram".into())?;
        }
        Ok(())
    }
}
