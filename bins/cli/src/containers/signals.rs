//! Signals by name and number.

/// Those behind 31 have no names of their own but these (signal(7), x86-64).
const REALTIME_FIRST: u8 = 34;
const LAST: u8 = 64;

/// A signal as people write it: `TERM`, `SIGTERM`, `15`, `RTMIN+3`.
pub(crate) fn number(text: &str) -> Result<u8, String> {
    let wrong = || format!("{text:?} is no signal; write TERM or 15");
    if let Ok(number) = text.parse::<u8>() {
        return match number {
            1..=LAST => Ok(number),
            _ => Err(wrong()),
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let realtime = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => Some((rest.strip_prefix('+').unwrap_or(rest), REALTIME_FIRST, 1)),
        (_, Some(rest)) => Some((rest.strip_prefix('-').unwrap_or(rest), LAST, -1)),
        _ => None,
    };
    if let Some((distance, from, direction)) = realtime {
        let distance: i32 = match distance {
            "" => 0,
            digits => digits.parse().map_err(|_| wrong())?,
        };
        let number = i32::from(from).checked_add(distance.saturating_mul(direction));
        return number
            .and_then(|number| u8::try_from(number).ok())
            .filter(|number| (REALTIME_FIRST..=LAST).contains(number))
            .ok_or_else(wrong);
    }
    let known =
        (1..=31).find(|number| sandbox::signal_name(i32::from(*number)) == format!("SIG{name}"));
    match (known, name) {
        (Some(number), _) => Ok(number),
        (None, "CLD") => Ok(17),
        (None, "POLL") => Ok(29),
        (None, "IOT") => Ok(6),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, wanted) in [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("sigkill", 9),
            ("15", 15),
            ("USR1", 10),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-2", 62),
            ("64", 64),
        ] {
            assert_eq!(number(text), Ok(wanted), "{text}");
        }
        for text in [
            "", "0", "65", "-1", "256", "SIG", "SIGNONE", "none", "TERMS", "RTMIN+99", "RTMAX-x",
        ] {
            number(text).expect_err(text);
        }
    }
}
