//! Names: which are allowed, and some for those who give none.

use crate::Error;

/// Bytes.
const LENGTH_MAX: usize = 64;

const ADJECTIVES: [&str; 32] = [
    "amber", "ample", "blithe", "bold", "brisk", "calm", "clear", "crisp", "deft", "eager",
    "early", "fair", "fleet", "fond", "fresh", "gentle", "glad", "hardy", "keen", "kind", "lively",
    "lucid", "mellow", "merry", "noble", "plain", "quick", "quiet", "ready", "sunny", "swift",
    "tidy",
];
const NOUNS: [&str; 32] = [
    "alder", "aspen", "badger", "beech", "birch", "brook", "cedar", "crane", "dune", "falcon",
    "fern", "finch", "fjord", "gull", "hare", "hazel", "heron", "ibis", "juniper", "lark",
    "linden", "lynx", "maple", "marten", "otter", "plover", "rowan", "sable", "swallow", "thrush",
    "willow", "wren",
];

/// Checks a name that a user gave: docker's rule, `[a-zA-Z0-9][a-zA-Z0-9_.-]+`.
pub(crate) fn check(name: &str) -> Result<(), Error> {
    let begins_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if begins_well && name.chars().all(known) && (2..=LENGTH_MAX).contains(&name.len()) {
        Ok(())
    } else {
        Err(Error::BadName {
            name: name.to_owned(),
        })
    }
}

/// A name that `is_taken` does not know, made of `random` bits.
pub(crate) fn make(random: u64, is_taken: impl Fn(&str) -> bool) -> String {
    let pick = |words: &[&'static str; 32], bits: u64| words[(bits & 31) as usize];
    let plain = format!(
        "{}_{}",
        pick(&ADJECTIVES, random),
        pick(&NOUNS, random >> 5)
    );
    if !is_taken(&plain) {
        return plain;
    }
    let numbered = (1_u32..).map(|n| format!("{plain}{n}"));
    // Containers are finite.
    numbered
        .into_iter()
        .find(|name| !is_taken(name))
        .unwrap_or(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_docker_s() {
        for name in [
            "",
            "a",
            ".a",
            "-ab",
            "a b",
            "a/b",
            "ä2",
            "../x",
            &"a".repeat(65),
        ] {
            check(name).expect_err(name);
        }
        for name in ["ab", "web-1", "A.b_c", "0x", &"a".repeat(64)] {
            check(name).expect(name);
        }
    }

    #[test]
    fn made_names_are_names_and_are_not_taken() {
        for random in 0..1024 {
            let name = make(random, |_| false);
            check(&name).expect("a name");
            let other = make(random, |taken| taken == name || taken == format!("{name}1"));
            assert_eq!(other, format!("{name}2"));
        }
    }
}
