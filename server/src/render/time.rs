//! Moments as people and programs write them: RFC 3339, UTC.

/// Nanoseconds of a second.
const SECOND: u64 = 1_000_000_000;

/// `2026-01-02T03:04:05.000000006Z`.
pub fn rfc3339(ns: u64) -> String {
    let (seconds, fraction) = (ns / SECOND, ns % SECOND);
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{fraction:09}Z")
}

/// `2026-01-02 03:04:05.000 UTC`.
pub fn for_people(ns: u64) -> String {
    let text = rfc3339(ns);
    format!("{} {} UTC", &text[..10], &text[11..23])
}

/// The Gregorian date of a day since 1970. Years run from March in this calculation, so that the leap day is the last.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

/// The day since 1970 of a Gregorian date.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year / 400, year % 400);
    let shifted_month = (month + 9) % 12;
    let day_of_year = (153 * shifted_month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// A moment: `10m` ago, or a date with or without a time (`2026-01-02`, `2026-01-02T03:04:05.5Z`), UTC.
pub fn parse_since(text: &str, now_ns: u64) -> Result<u64, String> {
    if let Ok(ago) = crate::findings::parse_duration(text) {
        let ago_ns = u64::try_from(ago.as_nanos()).unwrap_or(u64::MAX);
        return Ok(now_ns.saturating_sub(ago_ns));
    }
    parse_date(text).ok_or_else(|| {
        format!(
            "\"{text}\" is no moment: write how long ago (90s, 10m, 2h, 1d) or a date in UTC (2026-01-02T03:04:05Z)"
        )
    })
}

fn parse_date(text: &str) -> Option<u64> {
    let (date, time) = match text.split_once(['T', 't', ' ']) {
        Some((date, time)) => (date, Some(time.trim_end_matches(['Z', 'z']))),
        None => (text, None),
    };
    let [year, month, day] = numbers(date, '-')?[..] else {
        return None;
    };
    if !(1970..=2500).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let midnight = days(year, month, day) * 86_400 * SECOND;
    let Some(time) = time else {
        return Some(midnight);
    };
    let (clock, fraction) = time.split_once('.').unwrap_or((time, ""));
    let (hour, minute, second) = match numbers(clock, ':')?[..] {
        [hour, minute] => (hour, minute, 0),
        [hour, minute, second] => (hour, minute, second),
        _ => return None,
    };
    if hour > 23 || minute > 59 || second > 60 || fraction.len() > 9 {
        return None;
    }
    let fraction_ns: u64 = format!("{fraction:0<9}").parse().ok()?;
    Some(midnight + (hour * 3600 + minute * 60 + second) * SECOND + fraction_ns)
}

fn numbers(text: &str, separator: char) -> Option<Vec<u64>> {
    let number = |part: &str| {
        let is_number = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| part.parse().ok()).flatten()
    };
    text.split(separator).map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
    }

    #[test]
    fn every_day_of_four_centuries_survives() {
        for day in 0..146_097 {
            let (year, month, date) = civil(day);
            assert_eq!(days(year, month, date), day);
        }
    }

    #[test]
    fn moments_ago_and_partial_dates_are_read() {
        let now = 1_700_000_000 * SECOND;
        assert_eq!(parse_since("10m", now), Ok(now - 600 * SECOND));
        assert_eq!(parse_since("2023-11-14", now), Ok(1_699_920_000 * SECOND));
        assert_eq!(
            parse_since("2023-11-14 22:13", now),
            Ok(1_699_999_980 * SECOND)
        );
        for wrong in [
            "",
            "10",
            "m",
            "yesterday",
            "2023-13-01",
            "2023-11-14T25:00",
            "-1m",
        ] {
            assert!(parse_since(wrong, now).is_err(), "{wrong}");
        }
    }
}
