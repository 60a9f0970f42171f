//! Compiles `bpf/tapio.bpf.c`, which includes every question, into `OUT_DIR/tapio.bpf.o`, and `bpf/empty.bpf.c` and
//! `bpf/bare.bpf.c` likewise.
//!
//! Needs clang (or what `CLANG` names) and the headers of libbpf; the library itself is not used.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const INSTALL: &str = "install both with: apt-get install -y clang libbpf-dev (Fedora: dnf install clang libbpf-devel)";

fn main() {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    println!("cargo::rerun-if-env-changed=CLANG");
    println!("cargo::rerun-if-changed=bpf");
    for object in ["tapio", "empty", "bare"] {
        compile(&manifest, object);
    }
}

fn compile(manifest: &Path, name: &str) {
    let object = Path::new(&variable("OUT_DIR")).join(format!("{name}.bpf.o"));
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let (arch, multiarch) = match variable("CARGO_CFG_TARGET_ARCH").as_str() {
        "x86_64" => ("x86", "x86_64-linux-gnu"),
        "aarch64" => ("arm64", "aarch64-linux-gnu"),
        other => fail(&format!("the probes know x86_64 and aarch64, not {other}")),
    };
    let mut compile = Command::new(&clang);
    compile
        .args(["-target", "bpf", "-g", "-O2", "-mcpu=v2", "-Wall", "-Werror"])
        .arg(format!("-D__TARGET_ARCH_{arch}"))
        // The debug information, and with it the object, must not depend on where the source lies.
        .arg(format!("-fdebug-prefix-map={}=.", manifest.display()))
        .arg("-I")
        .arg(manifest.join("bpf/include"));
    // Where Debian keeps asm/types.h; elsewhere it is in /usr/include.
    let multiarch = Path::new("/usr/include").join(multiarch);
    if multiarch.is_dir() {
        compile.arg("-idirafter").arg(multiarch);
    }
    compile.arg("-c").arg(manifest.join(format!("bpf/{name}.bpf.c"))).arg("-o").arg(&object);

    let output = match compile.output() {
        Ok(output) => output,
        Err(error) => {
            fail(&format!("cannot run {clang}: {error}. The probes need clang and bpf/bpf_helpers.h; {INSTALL}"))
        }
    };
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        if messages.contains("bpf_helpers.h' file not found") {
            fail(&format!("bpf/bpf_helpers.h is missing. The probes need clang and the headers of libbpf; {INSTALL}"));
        }
        fail(&format!("{clang} cannot compile bpf/{name}.bpf.c:\n{messages}"));
    }
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| fail(&format!("cargo did not set {name}")))
}

fn fail(message: &str) -> ! {
    for line in message.lines() {
        println!("cargo::error={line}");
    }
    exit(1)
}
