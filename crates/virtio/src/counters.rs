//! What devices count, by Firecracker's names: shared between the device, which counts, and
//! whoever writes metrics, who reads.
//!
//! Invariant: counting takes no lock and never fails.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What counts.
pub trait Counted: std::fmt::Debug + Send + Sync {
    /// Counts since the start, each by its name.
    fn counts(&self) -> Vec<(&'static str, u64)>;
}

/// Makes a device's `Counters`: each counter with what it counts.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counts since the start. Shared: the device counts, whoever writes metrics reads.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: std::sync::atomic::AtomicU64,)*
        }

        impl Counters {
            /// Each by its name.
            pub fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
                let relaxed = std::sync::atomic::Ordering::Relaxed;
                [$((stringify!($name), self.$name.load(relaxed)),)*].into_iter()
            }
        }

        impl crate::Counted for Counters {
            fn counts(&self) -> Vec<(&'static str, u64)> {
                self.all().collect()
            }
        }
    };
}
pub(crate) use counters;

pub(crate) fn count(counter: &AtomicU64) {
    add(counter, 1);
}

pub(crate) fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

/// How long requests of one kind took, in microseconds.
#[derive(Debug, Default)]
pub struct Latency {
    /// One more than the shortest, so that 0 is none.
    min_us: AtomicU64,
    max_us: AtomicU64,
    sum_us: AtomicU64,
}

impl Latency {
    /// One more request, which began at `start` and is over.
    pub(crate) fn add(&self, start: Instant) {
        // 2^64 microseconds are longer than a machine lives.
        let took = start.elapsed().as_micros() as u64;
        let shortest = self.min_us.load(Ordering::Relaxed);
        // Two at once may leave the longer one of both: it is a statistic.
        if shortest == 0 || took < shortest - 1 {
            self.min_us.store(took + 1, Ordering::Relaxed);
        }
        if took > self.max_us.load(Ordering::Relaxed) {
            self.max_us.store(took, Ordering::Relaxed);
        }
        self.sum_us.fetch_add(took, Ordering::Relaxed);
    }

    /// The shortest, the longest and all together; zeros before the first.
    pub fn all(&self) -> [(&'static str, u64); 3] {
        let load = |of: &AtomicU64| of.load(Ordering::Relaxed);
        [
            ("min_us", load(&self.min_us).saturating_sub(1)),
            ("max_us", load(&self.max_us)),
            ("sum_us", load(&self.sum_us)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_latency_knows_its_shortest_its_longest_and_their_sum() {
        let latency = Latency::default();
        assert_eq!(latency.all().map(|(_, n)| n), [0; 3]);
        for ms in [30, 10, 20] {
            latency.add(
                Instant::now()
                    .checked_sub(Duration::from_millis(ms))
                    .unwrap(),
            );
        }
        let [min, max, sum] = latency.all().map(|(_, n)| n);
        assert!((10_000..20_000).contains(&min), "{min}");
        assert!(max >= 30_000 && sum >= 60_000, "{max} {sum}");
    }
}
