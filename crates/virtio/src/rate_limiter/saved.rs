//! What a snapshot keeps of a limiter: levels, no times, as no time passes in one.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::bucket::{Bucket, Limit};
use super::limiter::{Buckets, RateLimiter};
use crate::Error;

/// A limiter in a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedLimiter {
    /// Bytes.
    pub bandwidth: Option<SavedBucket>,
    /// Requests or packets.
    pub ops: Option<SavedBucket>,
}

/// A bucket in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedBucket {
    /// As it was set.
    pub limit: Limit,
    /// What is left of the burst.
    pub burst_left: u64,
    /// Parts of tokens, as many to one as it takes nanoseconds to fill the bucket;
    /// below 0, a debt.
    pub level: i128,
}

impl SavedBucket {
    fn of(bucket: &Bucket, now: Instant) -> Self {
        let mut bucket = bucket.clone();
        bucket.refill(now);
        Self {
            limit: bucket.limit,
            burst_left: bucket.burst_left,
            level: bucket.level,
        }
    }

    fn bucket(&self, now: Instant) -> Option<Bucket> {
        let mut bucket = Bucket::new(self.limit, now)?;
        bucket.set(self.level, self.burst_left);
        Some(bucket)
    }
}

impl SavedLimiter {
    pub(super) fn of(buckets: &Buckets, now: Instant) -> Self {
        let saved = |bucket: &Option<Bucket>| bucket.as_ref().map(|it| SavedBucket::of(it, now));
        Self {
            bandwidth: saved(&buckets.bandwidth),
            ops: saved(&buckets.ops),
        }
    }

    pub(super) fn buckets(&self, now: Instant) -> Buckets {
        let bucket = |saved: &Option<SavedBucket>| saved.as_ref().and_then(|it| it.bucket(now));
        Buckets {
            bandwidth: bucket(&self.bandwidth),
            ops: bucket(&self.ops),
        }
    }
}

impl RateLimiter {
    /// What a snapshot is to keep.
    pub fn save(&self) -> SavedLimiter {
        SavedLimiter::of(&self.buckets, Instant::now())
    }

    /// Makes this limiter the one that was saved, with the timer that it has; what it held
    /// up asks anew.
    pub fn put_back(&mut self, saved: &SavedLimiter) {
        self.buckets = saved.buckets(Instant::now());
    }

    /// A limiter as it was saved; what it held up asks anew.
    ///
    /// # Errors
    /// [`Error::Host`]: no timer.
    pub fn restore(saved: &SavedLimiter) -> Result<Self, Error> {
        Self::with(saved.buckets(Instant::now()))
    }
}
