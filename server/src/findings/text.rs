//! Numbers as people read them.

use std::net::Ipv6Addr;

use tapio_wire::event::Role;

use crate::correlate::clue::{About, Burst, Kill, SenderClass};

/// `1 node`, `2 nodes`.
pub fn count(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// `nginx (pid 7)`.
pub fn process(comm: &str, pid: u32) -> String {
    format!("{} (pid {pid})", if comm.is_empty() { "?" } else { comm })
}

const SIGPIPE: u32 = 13;
const SIGALRM: u32 = 14;
const SIGXFSZ: u32 = 25;
const SIGVTALRM: u32 = 26;
const SIGPROF: u32 = 27;
const SIGIO: u32 = 29;
/// The first of the real-time signals. The kernel sends one only where a process asked for it.
const SIGRTMIN: u32 = 32;

/// Codes of signals that the kernel sends because a process asked for them: sigaction(2).
const SI_ASYNCNL: i32 = -60;
const SI_SIGIO: i32 = -5;
const SI_ASYNCIO: i32 = -4;
const SI_MESGQ: i32 = -3;
const SI_TIMER: i32 = -2;

const BY_TIMER: &str = "the kernel, because a timer that it had set ran out";
const BY_FILE: &str = "the kernel, because a file that it watches (O_ASYNC) was ready";

/// How the kernel came to send a signal: `the kernel, while nginx (pid 7) was running`. It sends on nobody's behalf, whoever was
/// running; who runs when a timer runs out says nothing.
pub fn by_kernel(signal: u32, comm: &str, pid: u32) -> String {
    match (signal, pid) {
        (SIGPIPE, _) => "the kernel, because it wrote to a pipe or socket that nobody reads".to_owned(),
        (SIGXFSZ, _) => "the kernel, because it wrote beyond its limit for files (RLIMIT_FSIZE)".to_owned(),
        (SIGALRM | SIGVTALRM | SIGPROF, _) => BY_TIMER.to_owned(),
        (SIGIO, _) => BY_FILE.to_owned(),
        (SIGRTMIN.., _) => "the kernel, because a timer, file or queue that it watches asked for it".to_owned(),
        (_, 0) => "the kernel".to_owned(),
        (_, pid) => format!("the kernel, while {} was running", process(comm, pid)),
    }
}

/// What made the kernel send a signal that the process had asked for: whoever was running then has nothing to do with it.
pub fn asked_for(kill: &Kill) -> Option<&'static str> {
    match kill.code {
        _ if kill.sender_class != SenderClass::Kernel => None,
        SI_TIMER => Some(BY_TIMER),
        SI_MESGQ => Some("the kernel, because a message queue that it watches was written to"),
        SI_ASYNCIO | SI_ASYNCNL => Some("the kernel, because a request of its own was done"),
        SI_SIGIO => Some(BY_FILE),
        // The reason why a file was ready, as POLL_IN, where the process chose a signal for it (F_SETSIG).
        1..=6 if kill.signal >= SIGRTMIN => Some(BY_FILE),
        _ if kill.signal == SIGIO => Some(BY_FILE),
        _ if matches!(kill.signal, SIGALRM | SIGVTALRM | SIGPROF) => Some(BY_TIMER),
        _ => None,
    }
}

/// Whether the kernel sent it. What a write brings about is stamped as if the writer had sent it to itself.
pub fn is_by_kernel(kill: &Kill) -> bool {
    let is_of_write = kill.code == 0 && matches!(kill.signal, SIGPIPE | SIGXFSZ);
    kill.sender_class == SenderClass::Kernel || kill.sender_class == SenderClass::Itself && is_of_write
}

/// Who sent a signal.
pub fn sent_by(kill: &Kill) -> String {
    if let Some(because) = asked_for(kill) {
        return because.to_owned();
    }
    match kill.sender_class {
        _ if is_by_kernel(kill) => by_kernel(kill.signal, &kill.sender_comm, kill.sender_pid),
        // As C libraries do.
        SenderClass::Itself if matches!(kill.code, SI_ASYNCIO | SI_ASYNCNL) => {
            "itself, because a request of its own was done".to_owned()
        }
        SenderClass::Itself => "itself".to_owned(),
        _ => process(&kill.sender_comm, kill.sender_pid),
    }
}

/// The pod that a controller names: `Deleted pod: web-1`, or `delete Pod web-1 in StatefulSet web successful`. An Event that stands
/// for several names the last one.
pub fn deleted_pod(message: &str) -> Option<&str> {
    let name = message.split_once("Deleted pod: ").or_else(|| message.split_once("delete Pod "))?.1;
    name.split_whitespace().next()
}

/// What a process's part in its container is called.
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Unknown => "unknown",
        Role::First => "first",
        Role::Member => "member",
        Role::Session => "session",
        Role::Sandbox => "sandbox",
        Role::Runtime => "runtime",
    }
}

/// What the kind of an entity is called before its name: a plain cgroup of the host is a host group.
pub fn kind_called(kind: &str) -> &str {
    match kind {
        "host" => "host group",
        kind => kind,
    }
}

const SIGNALS: [&str; 31] = [
    "SIGHUP",
    "SIGINT",
    "SIGQUIT",
    "SIGILL",
    "SIGTRAP",
    "SIGABRT",
    "SIGBUS",
    "SIGFPE",
    "SIGKILL",
    "SIGUSR1",
    "SIGSEGV",
    "SIGUSR2",
    "SIGPIPE",
    "SIGALRM",
    "SIGTERM",
    "SIGSTKFLT",
    "SIGCHLD",
    "SIGCONT",
    "SIGSTOP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGXCPU",
    "SIGXFSZ",
    "SIGVTALRM",
    "SIGPROF",
    "SIGWINCH",
    "SIGIO",
    "SIGPWR",
    "SIGSYS",
];

/// `SIGKILL`; numbers without a name read `signal 40`. The numbers are those of x86 and Arm.
pub fn signal_name(signal: u32) -> String {
    match (signal as usize).checked_sub(1).and_then(|index| SIGNALS.get(index)) {
        Some(name) => (*name).to_owned(),
        None => format!("signal {signal}"),
    }
}

/// The number of a signal's name.
pub fn signal_number(name: &str) -> Option<u64> {
    let index = SIGNALS.iter().position(|&known| known == name)?;
    Some(index as u64 + 1)
}

/// `ENOSPC`; `other` for a number that no pattern speaks of.
pub fn errno_name(errno: u32) -> &'static str {
    match errno {
        1 => "EPERM",
        2 => "ENOENT",
        5 => "EIO",
        11 => "EAGAIN",
        12 => "ENOMEM",
        13 => "EACCES",
        16 => "EBUSY",
        23 => "ENFILE",
        24 => "EMFILE",
        28 => "ENOSPC",
        30 => "EROFS",
        32 => "EPIPE",
        52 => "EBADE",
        61 => "ENODATA",
        84 => "EILSEQ",
        104 => "ECONNRESET",
        110 => "ETIMEDOUT",
        111 => "ECONNREFUSED",
        113 => "EHOSTUNREACH",
        121 => "EREMOTEIO",
        122 => "EDQUOT",
        _ => "other",
    }
}

/// `SERVFAIL`; what is no code of DNS (they have 4 bits) stands for no answer.
pub fn rcode_name(rcode: u8) -> &'static str {
    match rcode {
        0 => "NOERROR",
        1 => "FORMERR",
        2 => "SERVFAIL",
        3 => "NXDOMAIN",
        4 => "NOTIMP",
        5 => "REFUSED",
        6..=15 => "other",
        _ => "unanswered",
    }
}

/// `10.0.0.7`, `fd00::7`
pub fn address(address: [u8; 16]) -> String {
    let address = Ipv6Addr::from(address);
    address.to_ipv4_mapped().map_or_else(|| address.to_string(), |address| address.to_string())
}

/// `10.0.0.7:5432`
pub fn peer_address(about: About) -> Option<String> {
    let About::Peer { address, port } = about else {
        return None;
    };
    let address = Ipv6Addr::from(address);
    Some(match address.to_ipv4_mapped() {
        Some(address) => format!("{address}:{port}"),
        None => format!("[{address}]:{port}"),
    })
}

/// `service shop/db`, or its address.
pub fn peer(burst: &Burst) -> String {
    match &burst.peer {
        Some(peer) => peer.to_string(),
        None => peer_address(burst.about).unwrap_or_else(|| "?".to_owned()),
    }
}

/// `8:16`, as the kernel numbers devices.
pub fn device(about: About) -> Option<String> {
    let (About::Device { device, .. } | About::Share { device, .. }) = about else {
        return None;
    };
    Some(format!("{}:{}", device >> 20, device & 0xf_ffff))
}
