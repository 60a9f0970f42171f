//! Ctrl-C, SIGTERM and SIGHUP set a flag; every wait looks at it, so that guards clean up on the ordinary way out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use tokio::signal::unix::{SignalKind, signal};

use crate::error::{Context, Error};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Starts to listen, from a thread of its own; to be called once, by a `main`.
pub fn listen() -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context(|| "start listening for signals".into())?;
    let (mut interrupt, mut terminate, mut hang_up) = {
        let _context = runtime.enter();
        let on = |kind| signal(kind).context(|| "install a signal handler".into());
        (on(SignalKind::interrupt())?, on(SignalKind::terminate())?, on(SignalKind::hangup())?)
    };
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                        _ = hang_up.recv() => {}
                    }
                    INTERRUPTED.store(true, Ordering::Relaxed);
                }
            });
        })
        .context(|| "start the signal thread".into())?;
    Ok(())
}

/// Whether a signal came.
pub fn came() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// An error once a signal came.
pub fn check() -> Result<(), Error> {
    if came() { Err(Error::Interrupted) } else { Ok(()) }
}
