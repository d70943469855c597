//! Content digests, and readers that compute them while data flows.
//!
//! Invariant: a [`Digest`] is one of the two algorithms the OCI image specification registers (descriptor.md §digests),
//! with lower-case hexadecimal of the right length, so it is safe as a file name. Left to others: deciding what a
//! mismatch means.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use sha2::{Digest as _, Sha256, Sha512};

use crate::error::ImageError;

/// The algorithms that are checked here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DigestAlgorithm {
    /// SHA-256, 64 hexadecimal digits.
    Sha256,
    /// SHA-512, 128 hexadecimal digits.
    Sha512,
}

impl DigestAlgorithm {
    pub(crate) fn name(self) -> &'static str {
        match self {
            DigestAlgorithm::Sha256 => "sha256",
            DigestAlgorithm::Sha512 => "sha512",
        }
    }

    fn hex_digits(self) -> usize {
        match self {
            DigestAlgorithm::Sha256 => 64,
            DigestAlgorithm::Sha512 => 128,
        }
    }
}

/// A checked `algorithm:hex` digest.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: DigestAlgorithm,
    hex: String,
}

impl Digest {
    /// Which algorithm.
    pub fn algorithm(&self) -> DigestAlgorithm {
        self.algorithm
    }

    /// Lower-case hexadecimal digits.
    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// The SHA-256 digest of `bytes`.
    pub fn sha256_of(bytes: &[u8]) -> Digest {
        let mut hasher = Hasher::new(DigestAlgorithm::Sha256);
        hasher.update(bytes);
        hasher.finish()
    }

    /// Whether `bytes` have this digest.
    ///
    /// # Errors
    ///
    /// [`ImageError::DigestMismatch`].
    pub fn check(&self, bytes: &[u8]) -> Result<(), ImageError> {
        let found = self.same_kind_of(bytes);
        match found == *self {
            true => Ok(()),
            false => Err(ImageError::DigestMismatch {
                expected: self.clone(),
                found,
            }),
        }
    }

    /// The digest of `bytes` by the same algorithm as `self`.
    pub(crate) fn same_kind_of(&self, bytes: &[u8]) -> Digest {
        let mut hasher = Hasher::new(self.algorithm);
        hasher.update(bytes);
        hasher.finish()
    }

    /// Sixteen bytes that follow from the digest, for a file system's UUID (version 8, RFC 9562 §5.8).
    pub(crate) fn uuid(&self) -> [u8; 16] {
        let full = Sha256::digest(self.to_string().as_bytes());
        let mut uuid = [0; 16];
        for (to, from) in uuid.iter_mut().zip(full.iter()) {
            *to = *from;
        }
        uuid[6] = (uuid[6] & 0x0f) | 0x80;
        uuid[8] = (uuid[8] & 0x3f) | 0x80;
        uuid
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Digest, ImageError> {
        let bad = || ImageError::BadDigest {
            given: text.chars().take(200).collect(),
        };
        let (name, hex) = text.split_once(':').ok_or_else(bad)?;
        let algorithm = match name {
            "sha256" => DigestAlgorithm::Sha256,
            "sha512" => DigestAlgorithm::Sha512,
            _ => return Err(bad()),
        };
        let digits = hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if hex.len() != algorithm.hex_digits() || !digits {
            return Err(bad());
        }
        Ok(Digest {
            algorithm,
            hex: hex.to_owned(),
        })
    }
}

/// Computes a digest piece by piece.
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    pub(crate) fn new(algorithm: DigestAlgorithm) -> Hasher {
        match algorithm {
            DigestAlgorithm::Sha256 => Hasher::Sha256(Sha256::new()),
            DigestAlgorithm::Sha512 => Hasher::Sha512(Sha512::new()),
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::Sha512(hasher) => hasher.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect();
        match self {
            Hasher::Sha256(hasher) => Digest {
                algorithm: DigestAlgorithm::Sha256,
                hex: hex(hasher.finalize().as_slice()),
            },
            Hasher::Sha512(hasher) => Digest {
                algorithm: DigestAlgorithm::Sha512,
                hex: hex(hasher.finalize().as_slice()),
            },
        }
    }
}

/// Passes data through while counting and hashing it; refuses to give more than `bytes_max`.
pub(crate) struct HashingReader<R> {
    inner: R,
    hasher: Hasher,
    bytes_read: u64,
    bytes_max: u64,
}

/// The text of the error [`HashingReader`] gives past its bound.
pub(crate) const TOO_MANY_BYTES: &str = "more bytes than allowed";

impl<R: Read> HashingReader<R> {
    pub(crate) fn new(inner: R, algorithm: DigestAlgorithm, bytes_max: u64) -> Self {
        HashingReader {
            inner,
            hasher: Hasher::new(algorithm),
            bytes_read: 0,
            bytes_max,
        }
    }

    /// Whether the bound was reached with data left.
    pub(crate) fn is_over(&self) -> bool {
        self.bytes_read > self.bytes_max
    }

    /// Reads to the end, so that the digest covers everything.
    pub(crate) fn drain(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; 64 * 1024];
        while self.read(&mut buffer)? != 0 {}
        Ok(())
    }

    pub(crate) fn finish(self) -> Digest {
        self.hasher.finish()
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_over() {
            return Err(io::Error::other(TOO_MANY_BYTES));
        }
        let count = self.inner.read(buffer)?;
        self.bytes_read = self.bytes_read.saturating_add(count as u64);
        if self.is_over() {
            return Err(io::Error::other(TOO_MANY_BYTES));
        }
        self.hasher.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_of_nothing_is_the_well_known_one() {
        let known = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::sha256_of(b"").to_string(), known);
    }

    #[test]
    fn digests_that_could_be_paths_are_refused() {
        let hex = "e".repeat(64);
        assert!(format!("sha256:{hex}").parse::<Digest>().is_ok());
        let bad = [
            "",
            "sha256",
            "sha256:",
            "sha256:../../etc/passwd",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
        ];
        for text in bad {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
        assert!(
            format!("sha256:{}", hex.to_uppercase())
                .parse::<Digest>()
                .is_err()
        );
        assert!(format!("sha512:{hex}").parse::<Digest>().is_err());
    }

    #[test]
    fn reader_stops_at_its_bound() {
        let mut reader = HashingReader::new(&[0_u8; 100][..], DigestAlgorithm::Sha256, 99);
        assert!(reader.drain().is_err());
        assert!(reader.is_over());
        let mut exact = HashingReader::new(&[0_u8; 100][..], DigestAlgorithm::Sha256, 100);
        exact.drain().expect("a bound that is just met is met");
        assert_eq!(exact.finish(), Digest::sha256_of(&[0; 100]));
    }
}
