//! Loads every program into the kernel that runs and prints how each fares. Ends with 1 when one does not run that should: its
//! row in `PROGRAMS` says since which kernel it does. `perf/lab/kernels.sh` runs this on other kernels.

use std::process::ExitCode;

use tapio_probes::{LoadConfig, PROGRAMS, Probes, ProgramState};

/// The first two numbers of a kernel's version.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim().split(|character: char| !character.is_ascii_digit()).map(|part| part.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// How many instructions the verifier went through; kernels before 5.16 do not say.
fn verified_instructions(name: &str) -> Option<u32> {
    // The newest is this program's own: other collectors may run here.
    let loaded = aya::programs::loaded_programs().filter_map(Result::ok);
    loaded.filter(|program| program.name_as_str() == Some(name)).last()?.verified_instruction_count()
}

fn main() -> ExitCode {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let probes = match Probes::load(&LoadConfig::default()) {
        Ok(probes) => probes,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let mut missing = 0;
    for (program, verdict) in PROGRAMS.iter().zip(probes.verdicts()) {
        let is_due = version(&release) >= version(program.since);
        let said = match &verdict.state {
            ProgramState::Attached => "attached".to_owned(),
            ProgramState::NotOnThisKernel(reason) => format!("not on this kernel: {reason}"),
            ProgramState::Refused(reason) => format!("refused: {reason}"),
            ProgramState::Disabled => "disabled".to_owned(),
        };
        let is_missing = match verdict.state {
            ProgramState::Attached | ProgramState::Disabled => false,
            ProgramState::NotOnThisKernel(_) => is_due,
            ProgramState::Refused(_) => true,
        };
        missing += u32::from(is_missing);
        let verified = verified_instructions(program.name).map_or_else(String::new, |count| count.to_string());
        let missing_mark = if is_missing { "MISSING, " } else { "" };
        println!("{:<20} {:<32} {verified:>7} {missing_mark}{said}", program.name, program.hook);
    }
    println!("{missing} of {} programs are missing on Linux {}", PROGRAMS.len(), release.trim());
    if missing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
