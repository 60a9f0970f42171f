//! A status as `wait(2)` reports it: signal in bits 0 to 6, core dump in bit 7, exit code in bits 8 to 15.

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The process exited with this code.
    Exited(u32),
    /// This signal killed the process.
    Killed(u32),
}

/// Reads how a process ended from its status.
pub fn ending(status: u32) -> Ending {
    match status & 0x7f {
        0 => Ending::Exited(status >> 8 & 0xff),
        signal => Ending::Killed(signal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_a_code_or_a_signal() {
        assert_eq!(ending(0), Ending::Exited(0));
        assert_eq!(ending(3 << 8), Ending::Exited(3));
        assert_eq!(ending(11 | 0x80), Ending::Killed(11), "with a core dump");
    }
}
