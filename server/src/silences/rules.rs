//! What a silence may say, and when it holds.

use ring::rand::{SecureRandom, SystemRandom};
use tapio_wire::service::{AcknowledgeRequest, AddSilenceRequest, Silence};

/// Characters of a name, and of a reason.
const NAME_CHARS_MAX: usize = 253;
pub const REASON_CHARS_MAX: usize = 500;
const DAY_NS: u64 = 24 * 3600 * 1_000_000_000;
/// The longest silence: what nobody wants to hear of for longer is left out of a sink by `only`.
const LONGEST_DAYS: u64 = 90;

/// Whether it holds at this moment.
pub fn is_active(silence: &Silence, now_ns: u64) -> bool {
    // One that another server's clock has made a moment ahead holds at once.
    now_ns < end_ns(silence)
}

/// When it was over, or will be.
pub(super) fn end_ns(silence: &Silence) -> u64 {
    match silence.ended_ns {
        0 => silence.until_ns,
        ended_ns => ended_ns.min(silence.until_ns),
    }
}

/// What it is about, in a few words.
pub fn summary(silence: &Silence) -> String {
    if !silence.finding.is_empty() {
        return format!("finding {}", silence.finding);
    }
    let parts = [("pattern", &silence.pattern), ("namespace", &silence.namespace), ("workload", &silence.workload)];
    let parts = parts.into_iter().filter(|(_, value)| !value.is_empty());
    parts.map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
}

pub(super) fn silence(request: AddSilenceRequest, by: &str, now_ns: u64) -> Result<Silence, String> {
    let AddSilenceRequest { pattern, namespace, workload, until_ns, reason } = request;
    if pattern.is_empty() && namespace.is_empty() && workload.is_empty() {
        return Err("name a pattern, a namespace or a workload; pattern * silences everything".into());
    }
    for (name, value) in [("pattern", &pattern), ("namespace", &namespace), ("workload", &workload)] {
        if value.chars().count() > NAME_CHARS_MAX || value.chars().any(char::is_control) {
            return Err(format!("{name} has more than {NAME_CHARS_MAX} characters, or control characters"));
        }
    }
    if until_ns == 0 {
        return Err("say until when it holds".into());
    }
    let base = checked(reason, until_ns, by, now_ns)?;
    if base.reason.is_empty() {
        return Err("give a reason: whoever misses a message will ask".into());
    }
    Ok(Silence { pattern, namespace, workload, ..base })
}

pub(super) fn acknowledgement(request: AcknowledgeRequest, by: &str, now_ns: u64) -> Result<Silence, String> {
    let until_ns = if request.until_ns == 0 { now_ns.saturating_add(DAY_NS) } else { request.until_ns };
    Ok(Silence { finding: request.finding, ..checked(request.reason, until_ns, by, now_ns)? })
}

/// What both have.
fn checked(reason: String, until_ns: u64, by: &str, now_ns: u64) -> Result<Silence, String> {
    if until_ns <= now_ns {
        return Err("its end has passed already".into());
    }
    if until_ns - now_ns > LONGEST_DAYS * DAY_NS {
        return Err(format!("it holds for {LONGEST_DAYS} days at most; `only` of a sink leaves out for good"));
    }
    if reason.chars().count() > REASON_CHARS_MAX {
        return Err(format!("a reason has at most {REASON_CHARS_MAX} characters"));
    }
    let mut random = [0; 8];
    SystemRandom::new().fill(&mut random).map_err(|_| "there is no randomness for an id now")?;
    let id = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let reason = reason.trim().to_owned();
    Ok(Silence { id, since_ns: now_ns, until_ns, reason, by: by.to_owned(), ..Silence::default() })
}
