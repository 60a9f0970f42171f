//! A program of a few instructions that writes to address 0: the kernel itself sends it SIGSEGV, as it does to a container
//! whose code is wrong. It is an ELF file of one segment, since a safe program cannot commit the fault itself.

/// The program for this architecture; `None` when it is not known here.
pub fn program() -> Option<Vec<u8>> {
    let (machine, code): (u16, &[u8]) = if cfg!(target_arch = "x86_64") {
        // xor eax, eax; mov [rax], eax
        (62, &[0x31, 0xc0, 0x89, 0x00])
    } else if cfg!(target_arch = "aarch64") {
        // mov x0, #0; str w0, [x0]
        (183, &[0x00, 0x00, 0x80, 0xd2, 0x00, 0x00, 0x00, 0xb9])
    } else {
        return None;
    };
    Some(elf(machine, code))
}

/// A program that ends at once, and well: what a fork+exec+exit loop runs, so that little else is measured.
pub fn quiet_program() -> Option<Vec<u8>> {
    let (machine, code): (u16, &[u8]) = if cfg!(target_arch = "x86_64") {
        // mov eax, 60; xor edi, edi; syscall
        (62, &[0xb8, 0x3c, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05])
    } else if cfg!(target_arch = "aarch64") {
        // mov x8, #93; mov x0, #0; svc #0
        (183, &[0xa8, 0x0b, 0x80, 0xd2, 0x00, 0x00, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4])
    } else {
        return None;
    };
    Some(elf(machine, code))
}

/// A program that makes its first argument a sparse file of 4 MiB, maps it and writes a byte to each page. Where the
/// file system is full, the kernel sends it SIGBUS. Only for x86-64.
pub fn bus_error_program() -> Option<Vec<u8>> {
    #[rustfmt::skip]
    let code: &[u8] = &[
        0x48, 0x8b, 0x7c, 0x24, 0x10,       // mov rdi, [rsp+16]: the first argument
        0xbe, 0x42, 0, 0, 0,                // mov esi, O_RDWR | O_CREAT
        0xba, 0x80, 1, 0, 0,                // mov edx, 0600
        0xb8, 2, 0, 0, 0, 0x0f, 0x05,       // open
        0x89, 0xc7, 0x41, 0x89, 0xc0,       // mov edi, eax; mov r8d, eax
        0xbe, 0, 0, 0x40, 0,                // mov esi, 4 MiB
        0xb8, 0x4d, 0, 0, 0, 0x0f, 0x05,    // ftruncate
        0x31, 0xff,                         // xor edi, edi
        0xbe, 0, 0, 0x40, 0,                // mov esi, 4 MiB
        0xba, 3, 0, 0, 0,                   // mov edx, PROT_READ | PROT_WRITE
        0x41, 0xba, 1, 0, 0, 0,             // mov r10d, MAP_SHARED
        0x45, 0x31, 0xc9,                   // xor r9d, r9d
        0xb8, 9, 0, 0, 0, 0x0f, 0x05,       // mmap
        0xc6, 0x00, 0x01,                   // mov byte [rax], 1
        0x48, 0x05, 0, 0x10, 0, 0,          // add rax, 4096
        0xeb, 0xf5,                         // and again
    ];
    cfg!(target_arch = "x86_64").then(|| elf(62, code))
}

/// A program that forbids itself sync(2) by a seccomp filter, and calls it: the kernel sends it SIGSYS. Only for x86-64. See seccomp(2).
pub fn forbidden_call_program() -> Option<Vec<u8>> {
    #[rustfmt::skip]
    let code: &[u8] = &[
        0xb8, 0x9d, 0, 0, 0, 0xbf, 38, 0, 0, 0,         // mov eax, prctl; mov edi, PR_SET_NO_NEW_PRIVS
        0xbe, 1, 0, 0, 0, 0x31, 0xd2,                   // mov esi, 1; xor edx, edx
        0x45, 0x31, 0xd2, 0x45, 0x31, 0xc0, 0x0f, 0x05, // xor r10d, r10d; xor r8d, r8d; prctl
        0x48, 0x8d, 0x05, 42, 0, 0, 0, 0x50, 0x6a, 4,   // lea rax, [the filter]; push rax; push 4: its instructions
        0x48, 0x89, 0xe2,                               // mov rdx, rsp
        0xb8, 0x9d, 0, 0, 0, 0xbf, 22, 0, 0, 0,         // mov eax, prctl; mov edi, PR_SET_SECCOMP
        0xbe, 2, 0, 0, 0, 0x0f, 0x05,                   // mov esi, SECCOMP_MODE_FILTER; prctl
        0xb8, 162, 0, 0, 0, 0x0f, 0x05,                 // sync
        0xb8, 60, 0, 0, 0, 0xbf, 99, 0, 0, 0,           // mov eax, exit; mov edi, 99
        0x0f, 0x05,                                     // exit
        0x20, 0, 0, 0, 0, 0, 0, 0,                      // the filter: load the number of the call
        0x15, 0, 1, 0, 162, 0, 0, 0,                    // skip one where it is sync
        0x06, 0, 0, 0, 0, 0, 0xff, 0x7f,                // return SECCOMP_RET_ALLOW
        0x06, 0, 0, 0, 0, 0, 0, 0x80,                   // return SECCOMP_RET_KILL_PROCESS
    ];
    cfg!(target_arch = "x86_64").then(|| elf(62, code))
}

/// A program that asks for SIGNAL when the FIFO named by its first argument has something to read, and waits: fcntl(2), `F_SETSIG`
/// and `O_ASYNC`. 0 stands for SIGIO. Only for x86-64.
pub fn asynchronous_reader_program(signal: u8) -> Option<Vec<u8>> {
    #[rustfmt::skip]
    let code: &[u8] = &[
        0x48, 0x8b, 0x7c, 0x24, 0x10,                   // mov rdi, [rsp+16]: the first argument
        0xbe, 2, 0, 0, 0,                               // mov esi, O_RDWR: it waits for no writer
        0xb8, 2, 0, 0, 0, 0x0f, 0x05,                   // open
        0x41, 0x89, 0xc4,                               // mov r12d, eax
        0xb8, 39, 0, 0, 0, 0x0f, 0x05,                  // getpid
        0x89, 0xc2,                                     // mov edx, eax
        0xbe, 8, 0, 0, 0, 0x44, 0x89, 0xe7,             // mov esi, F_SETOWN; mov edi, r12d
        0xb8, 72, 0, 0, 0, 0x0f, 0x05,                  // fcntl
        0xba, signal, 0, 0, 0,                          // mov edx, SIGNAL
        0xbe, 10, 0, 0, 0, 0x44, 0x89, 0xe7,            // mov esi, F_SETSIG; mov edi, r12d
        0xb8, 72, 0, 0, 0, 0x0f, 0x05,                  // fcntl
        0xba, 0, 0x20, 0, 0,                            // mov edx, O_ASYNC
        0xbe, 4, 0, 0, 0, 0x44, 0x89, 0xe7,             // mov esi, F_SETFL; mov edi, r12d
        0xb8, 72, 0, 0, 0, 0x0f, 0x05,                  // fcntl
        0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7,      // pause, and again
    ];
    cfg!(target_arch = "x86_64").then(|| elf(62, code))
}

/// A program that lets a timer of its own send it SIGNAL after half a second: timer_create(2). Only for x86-64.
pub fn timer_program(signal: u8) -> Option<Vec<u8>> {
    #[rustfmt::skip]
    let code: &[u8] = &[
        0x48, 0x81, 0xec, 128, 0, 0, 0,                 // sub rsp, 128: a sigevent, then an itimerspec; the timer's id at 112
        0xc7, 0x44, 0x24, 8, signal, 0, 0, 0,           // mov dword [rsp+8], SIGNAL
        0xc7, 0x44, 0x24, 12, 0, 0, 0, 0,               // mov dword [rsp+12], SIGEV_SIGNAL
        0x31, 0xff, 0x48, 0x89, 0xe6,                   // xor edi, edi: CLOCK_REALTIME; mov rsi, rsp
        0x48, 0x8d, 0x54, 0x24, 112,                    // lea rdx, [rsp+112]
        0xb8, 222, 0, 0, 0, 0x0f, 0x05,                 // timer_create
        0xc7, 0x44, 0x24, 24, 0x00, 0x65, 0xcd, 0x1d,   // mov dword [rsp+24], 500,000,000 ns
        0x8b, 0x7c, 0x24, 112, 0x31, 0xf6,              // mov edi, [rsp+112]; xor esi, esi
        0x48, 0x89, 0xe2, 0x45, 0x31, 0xd2,             // mov rdx, rsp; xor r10d, r10d
        0x48, 0xc7, 0x04, 0x24, 0, 0, 0, 0,             // mov qword [rsp], 0: it rings once
        0x48, 0xc7, 0x44, 0x24, 8, 0, 0, 0, 0,          // mov qword [rsp+8], 0
        0x48, 0xc7, 0x44, 0x24, 16, 0, 0, 0, 0,         // mov qword [rsp+16], 0 s
        0xb8, 223, 0, 0, 0, 0x0f, 0x05,                 // timer_settime
        0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7,      // pause, and again
    ];
    cfg!(target_arch = "x86_64").then(|| elf(62, code))
}

/// A program that queues SIGNAL with a CODE of its own making to the process whose id is its first argument: rt_sigqueueinfo(2).
/// Only for x86-64.
pub fn forger_program(signal: u8, code: i8) -> Option<Vec<u8>> {
    #[rustfmt::skip]
    let code: &[u8] = &[
        0x48, 0x8b, 0x74, 0x24, 0x10,                   // mov rsi, [rsp+16]: the first argument
        0x31, 0xff,                                     // xor edi, edi
        0x0f, 0xb6, 0x06, 0x84, 0xc0, 0x74, 0x0c,       // movzx eax, byte [rsi]; test al, al; jz to the end of the number
        0x6b, 0xff, 0x0a, 0x8d, 0x7c, 0x07, 0xd0,       // imul edi, edi, 10; lea edi, [rdi+rax-'0']
        0x48, 0xff, 0xc6, 0xeb, 0xed,                   // inc rsi, and again
        0x48, 0x81, 0xec, 128, 0, 0, 0,                 // sub rsp, 128: a siginfo
        0xc7, 0x44, 0x24, 8, code as u8, 0xff, 0xff, 0xff, // mov dword [rsp+8], CODE, which is negative
        0xbe, signal, 0, 0, 0, 0x48, 0x89, 0xe2,        // mov esi, SIGNAL; mov rdx, rsp
        0xb8, 129, 0, 0, 0, 0x0f, 0x05,                 // rt_sigqueueinfo
        0x89, 0xc7, 0xb8, 60, 0, 0, 0, 0x0f, 0x05,      // mov edi, eax; exit
    ];
    cfg!(target_arch = "x86_64").then(|| elf(62, code))
}

/// A program that keeps the first 48 MiB of the file named by its first argument in memory, and waits. Only for x86-64.
pub fn file_locking_program() -> Option<Vec<u8>> {
    #[rustfmt::skip]
    let code: &[u8] = &[
        0x48, 0x8b, 0x7c, 0x24, 0x10,                   // mov rdi, [rsp+16]: the first argument
        0x31, 0xf6,                                     // xor esi, esi: O_RDONLY
        0xb8, 2, 0, 0, 0, 0x0f, 0x05,                   // open
        0x41, 0x89, 0xc0,                               // mov r8d, eax
        0x31, 0xff, 0xbe, 0, 0, 0, 3,                   // xor edi, edi; mov esi, 48 MiB
        0xba, 1, 0, 0, 0, 0x41, 0xba, 1, 0x20, 0, 0,    // mov edx, PROT_READ; mov r10d, MAP_SHARED | MAP_LOCKED
        0x45, 0x31, 0xc9,                               // xor r9d, r9d
        0xb8, 9, 0, 0, 0, 0x0f, 0x05,                   // mmap
        0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7,      // pause, and again
    ];
    cfg!(target_arch = "x86_64").then(|| elf(62, code))
}

const BASE: u64 = 0x40_0000;
const FILE_HEADER_BYTES: u16 = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;
const CODE_AT: u64 = FILE_HEADER_BYTES as u64 + PROGRAM_HEADER_BYTES as u64;

/// An executable whose only segment is the whole file, readable and executable.
fn elf(machine: u16, code: &[u8]) -> Vec<u8> {
    let length = CODE_AT + code.len() as u64;
    let mut file = Vec::new();
    // 64 bits, little endian, version 1.
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let half = |file: &mut Vec<u8>, values: &[u16]| {
        for value in values {
            file.extend_from_slice(&value.to_le_bytes());
        }
    };
    // ET_EXEC
    half(&mut file, &[2, machine]);
    file.extend_from_slice(&1u32.to_le_bytes());
    for value in [BASE + CODE_AT, u64::from(FILE_HEADER_BYTES), 0] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(&0u32.to_le_bytes());
    half(&mut file, &[FILE_HEADER_BYTES, PROGRAM_HEADER_BYTES, 1, 0, 0, 0]);
    // PT_LOAD, readable and executable.
    file.extend_from_slice(&1u32.to_le_bytes());
    file.extend_from_slice(&5u32.to_le_bytes());
    for value in [0, BASE, BASE, length, length, 0x1_0000] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(code);
    file
}

#[cfg(test)]
mod tests {
    use super::{CODE_AT, forbidden_call_program, forger_program, program, timer_program};
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    #[test]
    fn they_die_by_a_real_fault_filter_and_timer() {
        for (bytes, signal) in [(program(), 11), (forbidden_call_program(), 31), (timer_program(14), 14)] {
            let Some(bytes) = bytes else { continue };
            assert!(bytes.len() as u64 > CODE_AT && bytes.len() < 320);
            assert_eq!(ending_of(&bytes, "").signal(), Some(signal));
        }
    }

    #[test]
    fn the_forger_signals_the_process_that_it_is_told() {
        let Some(bytes) = forger_program(9, -2) else { return };
        let mut target = Command::new("/bin/sleep").arg("60").spawn().expect("it starts");
        assert!(ending_of(&bytes, &target.id().to_string()).success());
        assert_eq!(target.wait().expect("it ends").signal(), Some(9));
    }

    /// How a program with this argument ends.
    fn ending_of(bytes: &[u8], argument: &str) -> ExitStatus {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("crash");
        let mut file = std::fs::File::create(&path).expect("a file");
        file.write_all(bytes).expect("written");
        file.set_permissions(PermissionsExt::from_mode(0o755)).expect("executable");
        drop(file);
        // A child forked by another test at this moment may still hold the file open for writing.
        loop {
            match Command::new(&path).arg(argument).status() {
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {}
                other => break other.expect("it runs"),
            }
        }
    }
}
