//! The balloon (virtio 1.2 §5.5): the guest gives memory back to the host, because it was
//! asked to (inflating), as its pages become free (reporting), or once for all that is
//! free (hinting); and says how it is doing (statistics).
//!
//! Invariant: whatever the guest names, only pages of its own memory are given back.

mod device;
mod saved;
mod spec;
mod statistics;

#[cfg(test)]
mod tests;

pub use device::{Balloon, Counts, Hinting, Settings};
pub use saved::SavedBalloon;
pub use statistics::Statistics;

/// Why the balloon cannot do what its owner asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BalloonError {
    /// The guest has no driver for it, or none yet.
    #[error("the guest has not activated the balloon")]
    Inactive,
    /// More than the guest has.
    #[error("a balloon of {asked} MiB does not fit into {memory} MiB of memory")]
    TooLarge {
        /// MiB.
        asked: u32,
        /// MiB.
        memory: u64,
    },
    /// Statistics were not asked for when the machine was made.
    #[error("balloon statistics are not enabled: set stats_polling_interval_s before the start")]
    NoStatistics,
    /// Statistics are on or off for good.
    #[error("balloon statistics cannot be switched on or off after the start")]
    StatisticsFixed,
    /// Hinting was not asked for when the machine was made.
    #[error("free page hinting is not enabled: set free_page_hinting before the start")]
    NoHinting,
}
