//! Sizes and times as docker shows them to people (its package `go-units`).

use chrono::{DateTime, Utc};

/// Bytes, in powers of 1000, with three digits: `4.26MB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    // C's %.3g.
    let decimals = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    let mut text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.truncate(text.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{text}{}", UNITS.get(unit).unwrap_or(&"B"))
}

/// `3 weeks ago`; `N/A` where nobody said when.
pub(crate) fn since(created: Option<&str>, now: DateTime<Utc>) -> String {
    let Some(then) = created.and_then(parsed) else {
        return "N/A".to_owned();
    };
    let seconds = now.signed_duration_since(then).num_seconds().max(0);
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    let text = match (seconds, minutes, hours) {
        (0, ..) => "Less than a second".to_owned(),
        (1, ..) => "1 second".to_owned(),
        (..60, ..) => format!("{seconds} seconds"),
        (_, 1, _) => "About a minute".to_owned(),
        (_, ..60, _) => format!("{minutes} minutes"),
        (_, _, 1) => "About an hour".to_owned(),
        (_, _, ..48) => format!("{hours} hours"),
        (_, _, ..336) => format!("{} days", hours / 24),
        (_, _, ..1440) => format!("{} weeks", hours / 24 / 7),
        (_, _, ..17520) => format!("{} months", hours / 24 / 30),
        _ => format!("{} years", hours / 24 / 365),
    };
    format!("{text} ago")
}

/// As Go prints a time: `2026-01-02 03:04:05 +0000 UTC`.
pub(crate) fn at(created: Option<&str>) -> String {
    match created.and_then(parsed) {
        Some(then) => then.format("%Y-%m-%d %H:%M:%S +0000 UTC").to_string(),
        None => "N/A".to_owned(),
    }
}

fn parsed(text: &str) -> Option<DateTime<Utc>> {
    let then = DateTime::parse_from_rfc3339(text).ok()?;
    Some(then.with_timezone(&Utc))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0B"),
            (999, "999B"),
            (1000, "1kB"),
            (1234, "1.23kB"),
            (4_261_550, "4.26MB"),
            (187_000_000, "187MB"),
            (28_140_373, "28.1MB"),
            (1_500_000_000, "1.5GB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn ages_are_docker_s() {
        let now = parsed("2026-11-23T12:00:00Z").expect("a time");
        for (then, text) in [
            ("2026-11-23T12:00:00Z", "Less than a second ago"),
            ("2026-11-23T11:59:30Z", "30 seconds ago"),
            ("2026-11-23T11:58:59Z", "About a minute ago"),
            ("2026-11-23T11:15:00Z", "45 minutes ago"),
            ("2026-11-23T10:30:00Z", "About an hour ago"),
            ("2026-11-22T01:00:00Z", "35 hours ago"),
            ("2026-11-18T12:00:00+00:00", "5 days ago"),
            ("2026-10-30T12:00:00Z", "3 weeks ago"),
            ("2026-05-23T12:00:00Z", "6 months ago"),
            ("2020-05-23T12:00:00Z", "6 years ago"),
            ("2030-01-01T00:00:00Z", "Less than a second ago"),
        ] {
            assert_eq!(since(Some(then), now), text);
        }
        assert_eq!(since(None, now), "N/A");
        assert_eq!(since(Some("once upon a time"), now), "N/A");
        assert_eq!(
            at(Some("2026-11-23T13:00:00+01:00")),
            "2026-11-23 12:00:00 +0000 UTC"
        );
    }
}
