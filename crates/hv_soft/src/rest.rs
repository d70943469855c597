//! Giving memory back when the guest first rests.
//!
//! Most of what a boot executes runs once. When the guest has come to rest after
//! it, every translation is dropped and its memory returned to the host; what
//! the guest still needs is translated again as it runs, or comes back from the
//! translations that are kept, which are saved now. This happens once in a
//! machine's life, so that a service that rests between requests stays warm.
//! What the kept translations' file occupies in this process goes at each later rest
//! as well: it comes back by itself, from the host's cache.

use std::time::Duration;

use crate::cpu::Cpu;

/// A guest that translates hardly anything for so long rests.
const REST: Duration = Duration::from_millis(500);
/// Translations that still count as hardly anything: timers and kernel threads.
const HARDLY_ANY: u64 = 64;

/// Whether the guest rested yet.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rest {
    /// Since when, in guest TSC ticks, and how much had been translated then.
    Waited { since: u64, translations: u64 },
    /// It did. When the kept translations' memory was last given back, and how much
    /// had been translated then.
    Over { since: u64, translations: u64 },
}

impl Rest {
    pub(crate) fn new() -> Self {
        Self::Waited {
            since: 0,
            translations: 0,
        }
    }
}

impl Cpu {
    /// Called before each sleep: drops translations once the guest rests. Gives
    /// how long to sleep at most before looking again; `None` is no limit.
    pub(crate) fn rest(&mut self) -> Option<Duration> {
        let now = self.clock.now();
        let so_far = self.stats.translations + self.stats.recalled;
        let (since, translations, over) = match self.rest {
            Rest::Waited {
                since,
                translations,
            } => (since, translations, false),
            Rest::Over {
                since,
                translations,
            } => (since, translations, true),
        };
        if over && so_far == translations {
            return None;
        }
        if !over && so_far > translations + HARDLY_ANY {
            self.rest = Rest::Waited {
                since: now,
                translations: so_far,
            };
            return Some(REST);
        }
        let quiet = self.clock.nanoseconds(now.saturating_sub(since));
        match REST.checked_sub(Duration::from_nanos(quiet)) {
            Some(left) if !left.is_zero() => Some(left),
            Some(_) | None => {
                if over {
                    // A block that is looked for maps 64 KiB of the file at each place
                    // that is read: a hundred of them map all of it.
                    if let Some(kept) = &self.kept {
                        kept.release();
                    }
                } else {
                    self.flush_code();
                    self.blocks.release();
                    self.save_translations();
                }
                self.rest = Rest::Over {
                    since: now,
                    translations: so_far,
                };
                None
            }
        }
    }
}
