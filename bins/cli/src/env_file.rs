//! Environment variables from files and from our own environment, as docker reads them.
//!
//! A file has one `NAME=value` a line; values are taken as they are, quotes included. `NAME` alone takes our own value,
//! and is skipped when we have none. Empty lines and lines that start with `#` are skipped, blanks before a name too.
//!
//! Invariant: every setting has a name without blanks. Left to others: joining with the image's.

use std::path::Path;

use crate::complaint::Complaint;

/// Longest file, in bytes.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Settings of one file.
pub(crate) fn read(
    path: &Path,
    own: impl Fn(&str) -> Option<String>,
) -> Result<Vec<String>, Complaint> {
    const WAY_OUT: &str = "check --env-file";
    let failed = |error: std::io::Error| {
        Complaint::caused(&error, Some(WAY_OUT)).about(format!("environment file {path:?}"))
    };
    let bytes = read_bounded(path).map_err(failed)?;
    let wrong = |line: usize, what: &str| {
        Complaint::new(
            format!("environment file {path:?}: line {line} {what}"),
            "write NAME=value",
        )
    };
    let mut settings = Vec::new();
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let number = index.saturating_add(1);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let line = std::str::from_utf8(line).map_err(|_| wrong(number, "is not UTF-8"))?;
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, value) = match line.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (line, None),
        };
        if name.is_empty() {
            return Err(wrong(number, "has no name before its ="));
        }
        if name.contains(char::is_whitespace) || line.contains('\0') {
            return Err(wrong(number, "has a name with blanks, or a zero"));
        }
        match value {
            Some(_) => settings.push(line.to_owned()),
            None => settings.extend(own(name).map(|value| format!("{name}={value}"))),
        }
    }
    Ok(settings)
}

fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)?;
    let read = file
        .take(FILE_BYTES_MAX.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if u64::try_from(read).unwrap_or(u64::MAX) > FILE_BYTES_MAX {
        return Err(std::io::Error::other("more than 16 MiB"));
    }
    Ok(bytes)
}

/// One `--env` as given: `NAME` alone takes our own value; when we have none it stays alone, and removes the image's.
pub(crate) fn option(
    given: &str,
    own: impl Fn(&str) -> Option<String>,
) -> Result<String, Complaint> {
    let name = given.split_once('=').map_or(given, |(name, _)| name);
    if name.is_empty() {
        return Err(Complaint::new(
            format!("environment variable {given:?} has no name"),
            "write --env NAME=value or --env NAME",
        ));
    }
    if given.contains('=') {
        return Ok(given.to_owned());
    }
    Ok(own(name).map_or_else(|| given.to_owned(), |value| format!("{name}={value}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(name: &str) -> Option<String> {
        (name == "HERE").then(|| "value of ours".to_owned())
    }

    fn read_text(text: &[u8]) -> Result<Vec<String>, String> {
        let temp = tempfile::NamedTempFile::new().expect("temporary file");
        std::fs::write(temp.path(), text).expect("written");
        read(temp.path(), own).map_err(|complaint| complaint.line())
    }

    #[test]
    fn files_are_read_as_docker_reads_them() {
        let text = b"\xef\xbb\xbfA=1\r\n\n# comment\n  B=two words # not a comment\nC=\"quoted\"\nHERE\nABSENT\nD=\n";
        let settings = read_text(text).expect("fine");
        assert_eq!(
            settings,
            [
                "A=1",
                "B=two words # not a comment",
                "C=\"quoted\"",
                "HERE=value of ours",
                "D="
            ]
        );
    }

    #[test]
    fn a_bad_line_is_named() {
        for text in [
            &b"A=1\n=x\n"[..],
            b"A=1\nB C=x\n",
            b"A=1\nB=\xff\n",
            b"A=1\nB=\0\n",
        ] {
            let error = read_text(text).expect_err("bad");
            assert!(error.contains("line 2"), "{error}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read(Path::new("/nowhere"), own)
            .expect_err("missing")
            .line();
        assert_eq!(
            error,
            "kombi: environment file \"/nowhere\": No such file or directory (os error 2); check --env-file"
        );
    }

    #[test]
    fn a_name_alone_takes_our_value_or_removes_the_images() {
        assert_eq!(option("A=b=c", own).expect("fine"), "A=b=c");
        assert_eq!(option("HERE", own).expect("fine"), "HERE=value of ours");
        assert_eq!(option("ABSENT", own).expect("fine"), "ABSENT");
        option("=x", own).expect_err("no name");
    }
}
