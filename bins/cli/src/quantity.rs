//! Sizes and times as people write them.
//!
//! Invariant: what is not understood, or does not fit, is an error that shows what would be. Left to others: limits.

use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Memory: bytes, or with k, m, g, t (×1024 each), also as `MiB`, `MB` and the like; rounded up to whole MiB.
pub(crate) fn memory_mib(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text:?} is no amount of memory; write 256M or 1G");
    let bytes = bytes(text).map_err(|_| wrong())?;
    u32::try_from(bytes.div_ceil(MIB)).map_err(|_| wrong())
}

/// Bytes, or with k, m, g, t (×1024 each), also as `MiB`, `MB` and the like.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size; write 256M or 1G");
    let (number, unit) = split_unit(text);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let count: u64 = number.parse().map_err(|_| wrong())?;
    count.checked_mul(1 << shift).ok_or_else(wrong)
}

/// Time: seconds, or with ms, s, m, h.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no length of time; write 30s or 500ms");
    let (number, unit) = split_unit(text);
    let millis = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    let count: u64 = number.parse().map_err(|_| wrong())?;
    match count.checked_mul(millis) {
        Some(millis) if millis > 0 => Ok(Duration::from_millis(millis)),
        Some(_) | None => Err(wrong()),
    }
}

/// Processors.
pub(crate) fn cpus(text: &str) -> Result<u8, String> {
    match text.parse() {
        Ok(count) if (1..=sandbox::VCPU_COUNT_MAX).contains(&count) => Ok(count),
        _ => Err(format!(
            "{text:?} is no number of processors; write a whole number from 1 to {}",
            sandbox::VCPU_COUNT_MAX
        )),
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text.split_at(end)
}

/// Bytes for people.
pub(crate) fn human_bytes(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        let whole = bytes >> shift;
        if whole > 0 {
            let tenth = (bytes >> shift.saturating_sub(10)) % 1024 * 10 / 1024;
            return format!("{whole}.{tenth} {unit}");
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_understood_as_docker_understands_it() {
        for (text, mib) in [
            ("256M", 256),
            ("256m", 256),
            ("1g", 1024),
            ("512MiB", 512),
            ("268435456", 256),
            ("1048577", 2),
            ("1024k", 1),
            ("0", 0),
        ] {
            assert_eq!(memory_mib(text), Ok(mib), "{text}");
        }
    }

    #[test]
    fn no_memory_is_refused_with_an_example() {
        for text in [
            "",
            "M",
            "1.5G",
            "-1",
            "256X",
            "99999999999999999999",
            "9999999999T",
            "1 G",
            "5000T0",
        ] {
            let error = memory_mib(text).expect_err(text);
            assert!(error.contains("write 256M"), "{error}");
        }
    }

    #[test]
    fn times_have_units() {
        assert_eq!(duration("60"), Ok(Duration::from_secs(60)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for text in ["", "0", "s", "1d", "-1", "1.5", "99999999999999999999h"] {
            duration(text).expect_err(text);
        }
    }

    #[test]
    fn processors_are_counted_from_one() {
        assert_eq!(cpus("1"), Ok(1));
        assert_eq!(cpus("32"), Ok(32));
        for text in ["0", "33", "1.5", "-1", "", "many"] {
            cpus(text).expect_err(text);
        }
    }

    #[test]
    fn bytes_are_shown_with_one_decimal() {
        assert_eq!(human_bytes(12), "12 B");
        assert_eq!(human_bytes(1536), "1.5 KiB");
        assert_eq!(human_bytes(256 << 20), "256.0 MiB");
        assert_eq!(human_bytes(u64::MAX), "16777215.9 TiB");
    }
}
