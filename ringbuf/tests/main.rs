//! The tests of this crate in one executable, since linking each of them alone takes longer than running it. A new file is named
//! here. loom is an executable of its own: it is built with `--cfg loom`, which these are not.
#![cfg(not(loom))]

mod bpf;
mod cross_process;
mod hostile;
mod kernel;
mod napping;
mod ring;
mod shared;
