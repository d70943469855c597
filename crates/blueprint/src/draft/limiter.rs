//! Limits of a device's traffic, as they are asked for and as they are used: every
//! number is allowed, so there is nothing to check.

use serde::{Deserialize, Serialize};

/// A limiter: bytes and operations are counted apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bytes.
    #[serde(default)]
    pub bandwidth: Option<TokenBucket>,
    /// Requests or packets.
    #[serde(default)]
    pub ops: Option<TokenBucket>,
}

/// What may be used at once, and how fast it comes back. No limit if the size or the
/// time is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucket {
    /// Tokens that the bucket holds.
    pub size: u64,
    /// Tokens beyond these at the start, which do not come back.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket fills.
    pub refill_time: u64,
}

impl TokenBucket {
    /// Whether it limits anything.
    pub fn limits(&self) -> bool {
        self.size != 0 && self.refill_time != 0
    }
}
