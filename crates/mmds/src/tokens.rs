//! Session tokens: what a guest shows to be served by version 2.
//!
//! A token says when it expires, and proves with HMAC-SHA-256 under a key of this
//! machine's that it was given out here: nothing is kept for it. As hexadecimal digits:
//!
//! ```text
//! expiry in milliseconds (8 bytes) | random (8) | HMAC of both and the machine's id (32)
//! ```
//!
//! Invariant: the key is made with this object and never leaves it. It is in no saved
//! state, so that a restored machine takes none of its original's tokens.

use std::io;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::Sha256;

/// How long a token may be good for, as in EC2 and Firecracker.
pub const TTL_SECONDS: RangeInclusive<u32> = 1..=21_600;

const EXPIRY_BYTES: usize = 8;
const SIGNED_BYTES: usize = EXPIRY_BYTES + 8;
const TOKEN_BYTES: usize = SIGNED_BYTES + 32;

/// A time to live out of bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a token's time to live is from {} to {} seconds, not {asked}", TTL_SECONDS.start(), TTL_SECONDS.end())]
pub struct TtlError {
    asked: u32,
}

/// Gives out tokens and knows them again.
pub struct Tokens {
    keyed: Hmac<Sha256>,
    start: Instant,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").finish_non_exhaustive()
    }
}

impl Tokens {
    /// For the machine `id`, with a key of its own.
    ///
    /// # Errors
    /// The host's: it has no random bytes.
    pub fn new(id: &str, now: Instant) -> io::Result<Self> {
        let mut keyed = Hmac::new(&random::<64>()?.into());
        // The id's length first, so that no id runs into what follows.
        keyed.update(&(id.len() as u64).to_le_bytes());
        keyed.update(id.as_bytes());
        Ok(Self { keyed, start: now })
    }

    /// A new token for `ttl_seconds` from now on.
    ///
    /// # Errors
    /// [`TtlError`].
    pub fn issue(&self, ttl_seconds: u32, now: Instant) -> Result<String, TtlError> {
        if !TTL_SECONDS.contains(&ttl_seconds) {
            return Err(TtlError { asked: ttl_seconds });
        }
        let expiry = self.milliseconds(now) + u64::from(ttl_seconds) * 1000;
        let mut token = expiry.to_le_bytes().to_vec();
        // Makes tokens differ; the proof does not depend on it.
        token.extend(random::<8>().unwrap_or_default());
        let proof = self.keyed.clone().chain_update(&token).finalize();
        token.extend(proof.into_bytes());
        Ok(token.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Whether `token` was given out here and has not expired. Takes as long for any
    /// wrong proof.
    #[must_use]
    pub fn knows(&self, token: &str, now: Instant) -> bool {
        let Some(token) = bytes(token) else {
            return false;
        };
        let (signed, proof) = token.split_at(SIGNED_BYTES);
        let proven = self.keyed.clone().chain_update(signed).verify_slice(proof);
        let mut expiry = [0; EXPIRY_BYTES];
        expiry.copy_from_slice(&signed[..EXPIRY_BYTES]);
        proven.is_ok() && u64::from_le_bytes(expiry) > self.milliseconds(now)
    }

    fn milliseconds(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.start);
        u64::try_from(since.min(Duration::from_secs(u32::MAX.into())).as_millis())
            .unwrap_or(u64::MAX)
    }
}

/// From exactly as many hexadecimal digits as a token has.
fn bytes(token: &str) -> Option<[u8; TOKEN_BYTES]> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let mut bytes = [0; TOKEN_BYTES];
    let token = token.as_bytes();
    if token.len() != 2 * TOKEN_BYTES {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(token.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// Random bytes from the kernel, without a file: a jail may have no /dev/urandom.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(more) => filled += more,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens(id: &str) -> (Tokens, Instant) {
        let now = Instant::now();
        (Tokens::new(id, now).unwrap(), now)
    }

    #[test]
    fn a_token_is_known_until_it_expires() {
        let (tokens, now) = tokens("a");
        let later = now + Duration::from_secs(100);
        let token = tokens.issue(60, later).unwrap();
        for (after, known) in [(0, true), (59_999, true), (60_000, false), (99_999, false)] {
            let at = later + Duration::from_millis(after);
            assert_eq!(tokens.knows(&token, at), known, "{after}");
        }
    }

    #[test]
    fn a_time_to_live_has_bounds() {
        let (tokens, now) = tokens("a");
        for ttl in [1, 21_600] {
            assert!(tokens.knows(&tokens.issue(ttl, now).unwrap(), now));
        }
        for ttl in [0, 21_601, u32::MAX] {
            let error = tokens.issue(ttl, now).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("a token's time to live is from 1 to 21600 seconds, not {ttl}")
            );
        }
    }

    #[test]
    fn another_machines_token_is_not_known() {
        let (mine, now) = tokens("a");
        let (other, _) = tokens("a");
        let token = other.issue(60, now).unwrap();
        assert!(!mine.knows(&token, now));
        assert_ne!(mine.issue(60, now).unwrap(), mine.issue(60, now).unwrap());
    }

    #[test]
    fn the_id_is_part_of_the_proof() {
        let key = [7_u8; 64];
        let with = |id: &str| {
            let mut keyed: Hmac<Sha256> = Hmac::new(&key.into());
            keyed.update(&(id.len() as u64).to_le_bytes());
            keyed.update(id.as_bytes());
            let start = Instant::now();
            Tokens { keyed, start }
        };
        let (a, b) = (with("a"), with("b"));
        let token = a.issue(60, a.start).unwrap();
        assert!(with("a").knows(&token, a.start) && !b.knows(&token, a.start));
    }

    proptest! {
        #[test]
        fn any_change_of_a_token_makes_it_unknown(at in 0..2 * TOKEN_BYTES, to in "[0-9a-f]") {
            let (tokens, now) = tokens("a");
            let token = tokens.issue(60, now).unwrap();
            let mut changed = token.clone();
            changed.replace_range(at..=at, &to);
            prop_assert_eq!(tokens.knows(&changed, now), changed == token);
        }

        #[test]
        fn any_text_as_token_is_unknown(text in ".{0,120}") {
            let (tokens, now) = tokens("a");
            prop_assert!(!tokens.knows(&text, now));
        }
    }
}
