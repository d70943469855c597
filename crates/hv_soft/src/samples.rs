//! Which translated code runs: host addresses that a timer of the thread's own processor
//! time interrupted, while a trace is written.
//!
//! ```text
//! signal handler: note(pc) ──▶ ring ──next()──▶ vCPU's thread, once it left translated code
//! ```
//!
//! Invariant: one thread both notes, in its signal handler, and takes; nothing is
//! allocated and nothing waits.
//!
//! Left to others: the timer (`fault`), which block an address is in (`trace`).

use std::sync::atomic::{AtomicU64, Ordering};

/// Processor time between samples. A kernel whose tick is longer takes them at its tick
/// (timer_create(2), CLOCK_THREAD_CPUTIME_ID).
pub(crate) const PERIOD_NANOSECONDS: u64 = 1_000_000;

const SLOTS: usize = 64;

/// A vCPU's.
#[derive(Debug)]
pub(crate) struct Samples {
    slots: [AtomicU64; SLOTS],
    noted: AtomicU64,
    taken: AtomicU64,
    elsewhere: AtomicU64,
}

impl Default for Samples {
    fn default() -> Self {
        Self {
            slots: [const { AtomicU64::new(0) }; SLOTS],
            noted: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            elsewhere: AtomicU64::new(0),
        }
    }
}

impl Samples {
    /// Notes an address in the code cache; true when it is time to take what was noted.
    /// Async-signal-safe.
    pub(crate) fn note(&self, pc: u64) -> bool {
        let noted = self.noted.load(Ordering::SeqCst);
        if let Some(slot) = self.slots.get(noted as usize % SLOTS) {
            slot.store(pc, Ordering::SeqCst);
        }
        self.noted.store(noted + 1, Ordering::SeqCst);
        let taken = self.taken.load(Ordering::SeqCst);
        noted + 1 - taken >= SLOTS as u64 / 2
    }

    /// Notes that other code ran. Async-signal-safe.
    pub(crate) fn note_elsewhere(&self) {
        self.elsewhere.fetch_add(1, Ordering::SeqCst);
    }

    /// Takes an address.
    pub(crate) fn next(&self) -> Option<u64> {
        let noted = self.noted.load(Ordering::SeqCst);
        let mut taken = self.taken.load(Ordering::Relaxed);
        if taken == noted {
            return None;
        }
        // The older ones were overwritten.
        taken = taken.max(noted.saturating_sub(SLOTS as u64));
        self.taken.store(taken + 1, Ordering::SeqCst);
        let slot = self.slots.get(taken as usize % SLOTS)?;
        Some(slot.load(Ordering::SeqCst))
    }

    /// How many were noted in the code cache, and elsewhere.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let count = |of: &AtomicU64| of.load(Ordering::SeqCst);
        (count(&self.noted), count(&self.elsewhere))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_in_their_order_and_the_oldest_are_lost_when_nobody_takes_them() {
        let samples = Samples::default();
        assert_eq!(samples.next(), None);
        assert!(!samples.note(7));
        assert_eq!((samples.next(), samples.next()), (Some(7), None));
        let wanted: Vec<bool> = (0..100).map(|pc| samples.note(pc)).collect();
        let first = wanted.iter().position(|wanted| *wanted);
        assert_eq!(first, Some(SLOTS / 2 - 1));
        let taken: Vec<u64> = std::iter::from_fn(|| samples.next()).collect();
        assert_eq!(taken, (36..100).collect::<Vec<u64>>());
        samples.note_elsewhere();
        assert_eq!(samples.counts(), (101, 1));
    }
}
