//! One bucket of tokens, with the time as an argument.
//!
//! Invariant: the level is exact. It counts in parts of a token, of which one
//! nanosecond brings in as many as the bucket has tokens; no fraction is ever lost.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// 146 years: with it, `u64::MAX` tokens and as large a debt fit the level.
const REFILL_NS_MAX: u64 = 1 << 62;
const NS_PER_MS: u64 = 1_000_000;

/// What may be used at once and how fast it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Tokens that the bucket holds. No limit if 0.
    pub size: u64,
    /// Tokens beyond these at the start, which do not come back.
    pub one_time_burst: u64,
    /// Time in which an empty bucket fills. No limit if 0.
    pub refill_ms: u64,
}

/// Tokens, as many as [`Limit::size`] at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bucket {
    pub(super) limit: Limit,
    /// Of the burst.
    pub(super) burst_left: u64,
    /// Parts of tokens, `refill_ns` to one; below 0, a debt.
    pub(super) level: i128,
    /// When the level was true.
    updated: Instant,
}

impl Bucket {
    /// A full bucket; none if `limit` is no limit.
    pub(super) fn new(limit: Limit, now: Instant) -> Option<Self> {
        if limit.size == 0 || limit.refill_ms == 0 {
            return None;
        }
        let mut bucket = Self {
            limit,
            burst_left: limit.one_time_burst,
            level: 0,
            updated: now,
        };
        bucket.level = bucket.full();
        Some(bucket)
    }

    /// How long `tokens` have to wait: no time if they may pass. Nothing is taken.
    pub(super) fn wait(&mut self, tokens: u64, now: Instant) -> Duration {
        self.refill(now);
        let wanted = self.parts(tokens.saturating_sub(self.burst_left));
        // More than fits passes when nothing more can come.
        let missing = wanted.min(self.full()) - self.level;
        if missing <= 0 {
            return Duration::ZERO;
        }
        let per_ns = i128::from(self.limit.size);
        let ns = (missing - 1) / per_ns + 1;
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// Takes what [`Bucket::wait`] let pass.
    pub(super) fn take(&mut self, tokens: u64) {
        let of_burst = tokens.min(self.burst_left);
        self.burst_left -= of_burst;
        let least = -self.parts(u64::MAX);
        self.level = (self.level - self.parts(tokens - of_burst)).max(least);
    }

    /// Puts back what was taken for nothing; what does not fit is lost.
    pub(super) fn give_back(&mut self, tokens: u64) {
        self.level = (self.level + self.parts(tokens)).min(self.full());
    }

    /// Sets a level that was saved, as far as a bucket of this size can have it.
    pub(super) fn set(&mut self, level: i128, burst_left: u64) {
        self.level = level.clamp(-self.parts(u64::MAX), self.full());
        self.burst_left = burst_left.min(self.limit.one_time_burst);
    }

    pub(super) fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.updated).as_nanos();
        let came = i128::try_from(elapsed)
            .unwrap_or(i128::MAX)
            .saturating_mul(i128::from(self.limit.size));
        self.level = self.level.saturating_add(came).min(self.full());
        self.updated = self.updated.max(now);
    }

    fn full(&self) -> i128 {
        self.parts(self.limit.size)
    }

    /// At most 2^126.
    fn parts(&self, tokens: u64) -> i128 {
        let refill_ns = self.limit.refill_ms.saturating_mul(NS_PER_MS);
        i128::from(tokens) * i128::from(refill_ns.min(REFILL_NS_MAX))
    }
}
