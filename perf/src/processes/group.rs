//! Several real servers, with the log that they share or without one.
//!
//! In: how many. Out: servers that know of one another. What must hold: NATS is there before the first server starts and until the
//! last one has ended.

use std::time::Duration;

use super::nats::Nats;
use super::{Server, ServerOptions};
use crate::clock::wait_for;
use crate::error::Error;

/// The most servers of a group: as many as the deployment guide has.
pub const SERVERS_MAX: usize = 10;
/// `cluster.name` of a group with a log.
pub const CLUSTER: &str = "perf";
/// How long servers may take until they know of one another.
const ACQUAINTED_LIMIT: Duration = Duration::from_secs(30);

/// What a group is started with.
#[derive(Clone, Debug, Default)]
pub struct GroupOptions {
    pub servers: usize,
    /// Whether they share a log; where there is only one server, it has none.
    pub with_log: bool,
    /// What each of them is started with.
    pub server: ServerOptions,
}

/// Servers that end when this is dropped.
pub struct ServerGroup {
    // Before NATS: they say their last words to it.
    servers: Vec<Server>,
    nats: Option<Nats>,
}

/// The name of a group's server.
pub fn server_name(index: usize) -> String {
    format!("server-{index}")
}

impl ServerGroup {
    /// Starts them and waits until all are ready and know of one another.
    ///
    /// # Errors
    /// [`Error::NatsMissing`] where a log is wanted and there is no `nats-server`; otherwise when one of them does not start.
    pub fn start(options: &GroupOptions) -> Result<Self, Error> {
        if !(1..=SERVERS_MAX).contains(&options.servers) {
            return Err(Error::Invalid(format!("--servers must be from 1 to {SERVERS_MAX}")));
        }
        let has_log = options.with_log && options.servers > 1;
        let nats = if has_log { Some(Nats::start()?) } else { None };
        let mut group = Self { servers: Vec::new(), nats };
        for index in 0..options.servers {
            let mut one = options.server.clone();
            if let Some(nats) = &group.nats {
                let (url, name) = (nats.url(), server_name(index));
                one.extra_config += &format!("cluster: {{name: {CLUSTER}, url: \"{url}\", server: {name}}}\n");
            }
            let mut server = Server::prepare(&one)?;
            server.spawn()?;
            group.servers.push(server);
        }
        for server in &mut group.servers {
            server.wait_ready()?;
        }
        if has_log {
            group.wait_acquainted()?;
        }
        Ok(group)
    }

    fn wait_acquainted(&mut self) -> Result<(), Error> {
        for index in 0..self.servers.len() {
            let mut client = self.servers[index].client()?;
            wait_for("the servers' knowing of one another", ACQUAINTED_LIMIT, |seen| {
                self.check_running()?;
                let status = client.status()?;
                let named: Vec<&str> = status.servers.iter().map(|server| server.server.as_str()).collect();
                *seen = format!("one knows of {}; missing {:?}", named.join(", "), status.incomplete);
                Ok((named.len() == self.servers.len() && status.incomplete.is_empty()).then_some(()))
            })?;
        }
        Ok(())
    }

    /// The servers.
    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// What carries their log.
    pub fn nats(&self) -> Option<&Nats> {
        self.nats.as_ref()
    }

    /// An error when one of them does not run any more.
    pub fn check_running(&mut self) -> Result<(), Error> {
        for server in &mut self.servers {
            server.check_running()?;
        }
        self.nats.as_mut().map_or(Ok(()), Nats::check_running)
    }

    /// SIGTERM for the servers, then for NATS.
    pub fn stop(&mut self) -> Result<(), Error> {
        for server in &mut self.servers {
            server.stop()?;
        }
        self.nats.as_mut().map_or(Ok(()), Nats::stop)
    }
}
