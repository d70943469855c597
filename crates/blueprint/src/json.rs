//! JSON from outside.
//!
//! Invariant: what is said about text that is not understood is one line without control
//! characters, whatever the text: it goes into logs and answers that are read by lines.

use serde::de::{DeserializeOwned, Error as _};

/// Reads `text`.
///
/// # Errors
/// The parser's, with line and column.
pub fn from_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(text).map_err(one_line)
}

/// The parser quotes names of unknown fields as they came.
fn one_line(error: serde_json::Error) -> serde_json::Error {
    let said = error.to_string();
    if !said.contains(char::is_control) {
        return error;
    }
    let mut line = String::with_capacity(said.len());
    for character in said.chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    // Takes line and column out of the text again.
    serde_json::Error::custom(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Draft;

    #[test]
    fn an_unknown_field_with_a_line_break_in_its_name_is_told_in_one_line() {
        let error = from_json::<Draft>(b"{\n\"a\\nfault\\u0007\": 1}").unwrap_err();
        let said = error.to_string();
        assert!(
            said.starts_with("unknown field `a\\nfault\\u{7}`"),
            "{said}"
        );
        assert_eq!((error.line(), error.column()), (2, 16), "{said}");
    }

    #[test]
    fn an_error_without_control_characters_stays_the_parsers() {
        let error = from_json::<Draft>(b"{\"a\": ").unwrap_err();
        assert!(error.is_eof() || error.is_data());
        assert!(error.to_string().ends_with("at line 1 column 4"), "{error}");
    }
}
