//! Moments as people and programs write them: RFC 3339, UTC.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use tapio_wire::program::units::parse_duration;

/// `2026-01-02T03:04:05.000000006Z`.
pub fn rfc3339(ns: u64) -> String {
    let moment = Timestamp::from_nanosecond(i128::from(ns)).expect("64 bits of nanoseconds end in the year 2554");
    format!("{moment:.9}")
}

/// `2026-01-02 03:04:05.000 UTC`.
pub fn for_people(ns: u64) -> String {
    let text = rfc3339(ns);
    format!("{} {} UTC", &text[..10], &text[11..23])
}

/// A moment: `10m` ago, or a date with or without a time (`2026-01-02`, `2026-01-02T03:04:05.5Z`), UTC.
pub fn parse_since(text: &str, now_ns: u64) -> Result<u64, String> {
    if let Ok(ago) = parse_duration(text) {
        let ago_ns = u64::try_from(ago.as_nanos()).unwrap_or(u64::MAX);
        return Ok(now_ns.saturating_sub(ago_ns));
    }
    parse_date(text).ok_or_else(|| {
        format!(
            "\"{text}\" is no moment: write how long ago (90s, 10m, 2h, 1d) or a date in UTC (2026-01-02T03:04:05Z)"
        )
    })
}

/// When something ends: in `2h`, or at a date, as [`parse_since`] reads them.
pub fn parse_until(text: &str, now_ns: u64) -> Result<u64, String> {
    if let Ok(lasts) = parse_duration(text) {
        return Ok(now_ns.saturating_add(u64::try_from(lasts.as_nanos()).unwrap_or(u64::MAX)));
    }
    parse_date(text).ok_or_else(|| {
        format!("\"{text}\" is no end: write how long (30m, 2h, 1d) or a date in UTC (2026-01-02T03:04:05Z)")
    })
}

fn parse_date(text: &str) -> Option<u64> {
    let moment = match text.parse::<Timestamp>() {
        Ok(moment) => moment,
        // A time zone's name would be read over.
        Err(_) if text.contains('[') => return None,
        Err(_) => text.parse::<DateTime>().ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp(),
    };
    u64::try_from(moment.as_nanosecond()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn known_moments_are_written_and_read() {
        for (ns, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400 * SECOND, "2000-02-29T00:00:00.000000000Z"),
            (1_700_000_000 * SECOND + 5, "2023-11-14T22:13:20.000000005Z"),
            (4_102_444_799 * SECOND, "2099-12-31T23:59:59.000000000Z"),
        ] {
            assert_eq!(rfc3339(ns), text);
            assert_eq!(parse_since(text, 0), Ok(ns));
        }
        assert_eq!(for_people(1_700_000_000 * SECOND + 5_999_999), "2023-11-14 22:13:20.005 UTC");
        assert!(rfc3339(u64::MAX).starts_with("2554-"));
    }

    #[test]
    fn an_end_is_a_while_from_now_or_a_date() {
        let now = 1_700_000_000 * SECOND;
        assert_eq!(parse_until("2h", now), Ok(now + 7200 * SECOND));
        assert_eq!(parse_until("2023-11-15", now), Ok(1_700_006_400 * SECOND));
        assert_eq!(parse_until("1d", u64::MAX - 5), Ok(u64::MAX));
        for wrong in ["", "2", "tomorrow", "-2h"] {
            assert!(parse_until(wrong, now).is_err(), "{wrong}");
        }
    }

    #[test]
    fn moments_ago_and_partial_dates_are_read() {
        let now = 1_700_000_000 * SECOND;
        assert_eq!(parse_since("10m", now), Ok(now - 600 * SECOND));
        assert_eq!(parse_since("1.5h", now), Ok(now - 5400 * SECOND));
        assert_eq!(parse_since("2023-11-14", now), Ok(1_699_920_000 * SECOND));
        assert_eq!(parse_since("2023-11-14 22:13", now), Ok(1_699_999_980 * SECOND));
        assert_eq!(parse_since("2023-11-14T22:13:20.5z", now), Ok(now + SECOND / 2));
        assert_eq!(parse_since("2023-11-14T23:13:20+01:00", now), Ok(now));
        for wrong in [
            "",
            "10",
            "m",
            "yesterday",
            "2023-13-01",
            "2023-02-30",
            "1969-12-31",
            "2023-11-14T25:00",
            "2023-11-14T22:13[Europe/Helsinki]",
            "-1m",
        ] {
            assert!(parse_since(wrong, now).is_err(), "{wrong}");
        }
    }
}
