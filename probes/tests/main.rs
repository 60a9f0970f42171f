//! The tests of this crate in one executable, since linking each of them alone takes longer than running it. A new file is named
//! here. permission is an executable of its own: its capabilities and the kernel's answers are those of its process.

mod lab;
mod layout;
mod live;
mod live_bulk;
mod live_disk;
mod live_floods;
mod live_network;
mod live_signals;
mod live_tasks;
