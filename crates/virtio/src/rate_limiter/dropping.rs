//! A limit for what does not wait: what is too much is lost.

use std::time::Instant;

use super::bucket::{Bucket, Limit};

/// Says what may pass; whoever is refused drops it.
#[derive(Clone, Debug)]
pub struct Dropping(Option<Bucket>);

impl Dropping {
    /// A full bucket; everything passes if `limit` is no limit.
    pub fn new(limit: Limit) -> Self {
        Self(Bucket::new(limit, Instant::now()))
    }

    /// Whether `tokens` may pass now; they are taken then.
    pub fn allow(&mut self, tokens: u64) -> bool {
        self.0.as_mut().is_none_or(|bucket| {
            let passes = bucket.wait(tokens, Instant::now()).is_zero();
            if passes {
                bucket.take(tokens);
            }
            passes
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(size: u64, one_time_burst: u64, refill_ms: u64) -> Limit {
        Limit {
            size,
            one_time_burst,
            refill_ms,
        }
    }

    #[test]
    fn what_the_bucket_holds_passes_and_the_rest_is_refused() {
        let mut dropping = Dropping::new(limit(3, 2, 3_600_000));
        let passed: Vec<bool> = (0..7).map(|_| dropping.allow(1)).collect();
        assert_eq!(passed, [true, true, true, true, true, false, false]);
        let mut none = Dropping::new(limit(0, 0, 1));
        assert!((0..1000).all(|_| none.allow(1)));
    }
}
