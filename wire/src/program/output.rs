//! What programs print.
//!
//! What must hold: nothing that is printed ends a program with a panic. A reader may go at any time, as `head` does: then what is
//! left to print is left out.

use std::fmt;
use std::io::{self, ErrorKind, Write};

/// Writes to standard output, at once. What goes on until it is interrupted ends with the error [`ErrorKind::BrokenPipe`].
///
/// # Errors
/// What writing says.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes to standard output, at once. A reader that has gone has seen enough, which is no error.
///
/// # Errors
/// What writing says otherwise.
pub fn print_while_read(text: &str) -> io::Result<()> {
    match print(text) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

/// Writes a line to standard error, and ignores a failure, as when no reader is left: see [`complain!`](crate::complain).
pub fn complain(text: fmt::Arguments<'_>) {
    let mut err = io::stderr().lock();
    let _ = err.write_fmt(text).and_then(|()| err.write_all(b"\n"));
}

/// Prints as `eprintln!`, without its panic where standard error is a pipe that nobody reads.
#[macro_export]
macro_rules! complain {
    ($($part:tt)*) => {
        $crate::program::output::complain(format_args!($($part)*))
    };
}
