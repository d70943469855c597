//! How quickly writes are taken by a file system that cannot say "not now".
//!
//! Most keep what is written in memory and write it out later; only when too much waits to be written out do they keep
//! the writer waiting. So whoever must not wait writes all the same as long as writes are quick, and leaves them to
//! others for a while after one that was not.
//!
//! Invariant: of the writes in a time of [`REST`], at most one kept somebody waiting who must not wait.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A write that takes longer was waited for.
const QUICK: Duration = Duration::from_millis(1);
/// For so long after a slow write nobody trusts the next one.
const REST: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Pace {
    born: Instant,
    /// In microseconds after the birth.
    slow_until: AtomicU64,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self {
            born: Instant::now(),
            slow_until: AtomicU64::new(0),
        }
    }

    /// Whether the write that begins at `now` may be expected to be quick.
    pub(super) fn is_quick(&self, now: Instant) -> bool {
        self.age(now) >= self.slow_until.load(Ordering::Relaxed)
    }

    /// A write began at `start` and is done.
    pub(super) fn done(&self, start: Instant, now: Instant) {
        if now.saturating_duration_since(start) > QUICK {
            let until = self.age(now + REST);
            self.slow_until.fetch_max(until, Ordering::Relaxed);
        }
    }

    fn age(&self, at: Instant) -> u64 {
        // Longer than anybody runs.
        u64::try_from(at.saturating_duration_since(self.born).as_micros()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_write_makes_the_next_ones_somebody_else_s_for_a_while() {
        let pace = Pace::new();
        let start = pace.born;
        assert!(pace.is_quick(start));
        pace.done(start, start + QUICK);
        assert!(pace.is_quick(start + QUICK));
        let slow = start + Duration::from_millis(20);
        pace.done(start, slow);
        assert!(!pace.is_quick(slow));
        assert!(!pace.is_quick(slow + REST - Duration::from_micros(1)));
        assert!(pace.is_quick(slow + REST));
    }
}
