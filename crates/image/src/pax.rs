//! PAX extended headers (POSIX.1-2017 `pax`, "pax Extended Header"): `LENGTH KEY=VALUE\n` records.
//!
//! Invariant: a record is taken only when its length, its key and its newline agree; values may hold any byte
//! (`security.capability` does). Left to others: applying the values to an entry.

/// Attributes of one entry. A header of many tiny ones would cost time that grows with their square.
const XATTRS_MAX: usize = 1024;

/// What the records of one entry say, as far as it matters to a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PaxRecords {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link_path: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<u64>,
    pub(crate) gid: Option<u64>,
    /// Seconds and nanoseconds since the epoch.
    pub(crate) mtime: Option<(i64, u32)>,
    /// Full names (`user.x`) and values, from `SCHILY.xattr.`.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) sparse: SparseRecords,
}

/// GNU's sparse records (`GNU.sparse.*`, versions 0.0 to 1.0).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SparseRecords {
    pub(crate) major: Option<u64>,
    pub(crate) name: Option<Vec<u8>>,
    pub(crate) real_size: Option<u64>,
    /// Offsets and lengths in turn, from `GNU.sparse.map` or the 0.0 pairs.
    pub(crate) numbers: Vec<u64>,
}

/// Reads all records of one header; the error says what is wrong with it.
pub(crate) fn parse(mut data: &[u8]) -> Result<PaxRecords, &'static str> {
    let mut records = PaxRecords::default();
    while !data.is_empty() {
        // Some writers pad the header with zeros.
        if data.iter().all(|b| *b == 0) {
            break;
        }
        let space = data
            .iter()
            .position(|b| *b == b' ')
            .ok_or("has a PAX record without a length")?;
        let digits = data.get(..space).unwrap_or_default();
        let length = decimal(digits).ok_or("has a PAX record with a bad length")?;
        let length = usize::try_from(length).map_err(|_| "has a PAX record with a bad length")?;
        let record = data
            .get(..length)
            .ok_or("has a PAX record longer than its header")?;
        data = data.get(length..).unwrap_or_default();
        let body = record.get(space.saturating_add(1)..).unwrap_or_default();
        let body = body
            .strip_suffix(b"\n")
            .ok_or("has a PAX record without an end")?;
        let equals = body
            .iter()
            .position(|b| *b == b'=')
            .ok_or("has a PAX record without a value")?;
        let (key, value) = body.split_at(equals);
        apply(&mut records, key, value.get(1..).unwrap_or_default())?;
    }
    Ok(records)
}

fn apply(records: &mut PaxRecords, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
    let number = || decimal(value).ok_or("has a PAX number that is none");
    // An empty value withdraws what a global header said; there is nothing to withdraw here.
    match key {
        b"path" => records.path = Some(value.to_vec()),
        b"linkpath" => records.link_path = Some(value.to_vec()),
        b"size" => records.size = Some(number()?),
        b"uid" => records.uid = Some(number()?),
        b"gid" => records.gid = Some(number()?),
        b"mtime" => records.mtime = Some(time(value).ok_or("has a PAX time that is none")?),
        b"GNU.sparse.major" => records.sparse.major = Some(number()?),
        b"GNU.sparse.name" => records.sparse.name = Some(value.to_vec()),
        b"GNU.sparse.size" | b"GNU.sparse.realsize" => records.sparse.real_size = Some(number()?),
        b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => records.sparse.numbers.push(number()?),
        b"GNU.sparse.map" => {
            for part in value.split(|b| *b == b',') {
                records
                    .sparse
                    .numbers
                    .push(decimal(part).ok_or("has a bad sparse map")?);
            }
        }
        other => {
            if let Some(name) = other.strip_prefix(b"SCHILY.xattr.") {
                if records.xattrs.len() >= XATTRS_MAX {
                    return Err("has more extended attributes than any file system keeps");
                }
                records.xattrs.retain(|(known, _)| known != name);
                records.xattrs.push((name.to_vec(), value.to_vec()));
            }
        }
    }
    Ok(())
}

/// Decimal digits only, in 64 bits.
pub(crate) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// `[-]SECONDS[.FRACTION]`, rounded down to nanoseconds.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let dot = text.iter().position(|b| *b == b'.');
    let (whole, fraction) = match dot {
        Some(at) => (text.get(..at)?, text.get(at.checked_add(1)?..)?),
        None => (text, &b""[..]),
    };
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    let mut nanos: u32 = 0;
    let mut lost = false;
    for at in 0..9 {
        let digit = fraction.get(at).copied().unwrap_or(b'0');
        if !digit.is_ascii_digit() {
            return None;
        }
        nanos = nanos
            .checked_mul(10)?
            .checked_add(u32::from(digit.wrapping_sub(b'0')))?;
    }
    for digit in fraction.iter().skip(9) {
        if !digit.is_ascii_digit() {
            return None;
        }
        lost |= *digit != b'0';
    }
    if !negative {
        return Some((seconds, nanos));
    }
    if lost {
        nanos = nanos.checked_add(1)?;
    }
    if nanos == 0 {
        return Some((seconds.checked_neg()?, 0));
    }
    Some((
        seconds.checked_neg()?.checked_sub(1)?,
        1_000_000_000_u32.checked_sub(nanos)?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let mut length = body + 1;
        while length != body + length.to_string().len() {
            length = body + length.to_string().len();
        }
        let mut out = format!("{length} {key}=").into_bytes();
        out.extend_from_slice(value);
        out.push(b'\n');
        out
    }

    #[test]
    fn values_may_hold_newlines_and_zeros() {
        let mut data = record("SCHILY.xattr.security.capability", b"\x01\n\0=\n");
        data.extend(record("path", b"a/b"));
        let records = parse(&data).expect("good records");
        assert_eq!(
            records.xattrs,
            [(b"security.capability".to_vec(), b"\x01\n\0=\n".to_vec())]
        );
        assert_eq!(records.path.as_deref(), Some(&b"a/b"[..]));
    }

    #[test]
    fn thousands_of_attributes_are_refused() {
        let data: Vec<u8> = (0..2000)
            .flat_map(|n| record(&format!("SCHILY.xattr.user.{n}"), b""))
            .collect();
        assert!(parse(&data).is_err());
    }

    #[test]
    fn lying_lengths_are_refused() {
        for bad in [
            &b"99 path=a\n"[..],
            b"path=a\n",
            b"5 a=b",
            b"0 path=a\n",
            b"18446744073709551616 a=b\n",
            b" ",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn times_round_towards_the_past() {
        assert_eq!(time(b"1.5"), Some((1, 500_000_000)));
        assert_eq!(time(b"-1.5"), Some((-2, 500_000_000)));
        assert_eq!(time(b"-1"), Some((-1, 0)));
        assert_eq!(time(b"0.0000000019"), Some((0, 1)));
        assert_eq!(time(b"-0.0000000001"), Some((-1, 999_999_999)));
        assert_eq!(time(b"x"), None);
        assert_eq!(time(b"1.x"), None);
    }
}
