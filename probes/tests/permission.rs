//! The error of a process that may not load BPF programs. In an executable of its own: the BPF library asks the kernel
//! what it supports once a process. A thread without capabilities gets answers that no other test should see.

use std::path::Path;

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use tapio_probes::{Error, LoadConfig, Probes};

#[test]
fn without_capabilities_the_error_says_which_are_needed() {
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        println!("SKIP without_capabilities_the_error_says_which_are_needed: needs a kernel with BTF");
        assert!(!std::env::var("TAPIO_REQUIRE").is_ok_and(|value| value == "all"), "TAPIO_REQUIRE=all");
        return;
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    // Capabilities belong to a thread, and this one is the test's own.
    std::thread::spawn(move || {
        set_capabilities(None, none).expect("capabilities can be given up");
        let error = Probes::load(&LoadConfig::default()).expect_err("nothing is permitted");
        assert!(matches!(error, Error::NotPermitted { .. }), "{error:?}");
        assert!(error.to_string().contains("CAP_BPF"), "{error}");
    })
    .join()
    .expect("the thread ends well");
}
