//! Patterns of names, as a shell has them: `*` stands for any number of characters, `?` for one.
//!
//! What must hold: time is bounded by the lengths' product whatever the pattern is, and nothing is allocated.

/// Whether the whole of `text` is what `pattern` describes.
pub fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut at, mut read) = (0, 0);
    // Where the last star was, and how much of the text it has swallowed so far.
    let mut star: Option<(usize, usize)> = None;
    while read < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, read));
                at += 1;
            }
            Some(b'?') => {
                at += 1;
                read += character_bytes(text[read]);
            }
            Some(&byte) if byte == text[read] => {
                at += 1;
                read += 1;
            }
            _ => {
                let Some((star_at, swallowed)) = star else { return false };
                let swallowed = swallowed + character_bytes(text[swallowed]);
                star = Some((star_at, swallowed));
                at = star_at + 1;
                read = swallowed;
            }
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

/// The length in UTF-8 of the character that begins with `first`.
fn character_bytes(first: u8) -> usize {
    match first {
        0..0xc0 => 1,
        0xc0..0xe0 => 2,
        0xe0..0xf0 => 3,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_match_as_in_a_shell() {
        for (pattern, text, expected) in [
            ("*.service", "web.service", true),
            ("*.service", "web.services", false),
            ("web-?.service", "web-1.service", true),
            ("web-?.service", "web-12.service", false),
            ("web-?", "web-ü", true),
            ("web-??", "web-ü", false),
            ("*?", "€", true),
            ("*?b", "a€b", true),
            ("*a*b*", "xxaxxbxx", true),
            ("*b*", "abc", true),
            ("a*a", "a", false),
            ("a*c", "abd", false),
            ("ab", "abc", false),
            ("b*", "abc", false),
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }
}
