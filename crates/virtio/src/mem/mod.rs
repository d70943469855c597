//! Pluggable memory (virtio 1.2 §5.15): the guest plugs and unplugs blocks of a region,
//! as the host asks.
//!
//! ```text
//! owner: requested size ──▶ configuration changed ──▶ guest: plug or unplug, block by
//!                                                     block, as far as it can
//! ```
//!
//! Invariant: never more is plugged than was requested at some time since it was; what is
//! not plugged is the host's, and nobody reaches it.

mod counters;
mod device;
mod saved;
mod spec;

#[cfg(test)]
mod tests;

pub use counters::Counters;
pub use device::{Mem, Status};
pub use saved::SavedMem;

/// Why the memory cannot become what its owner asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemError {
    /// The guest has no driver for it, or none yet.
    #[error("the guest has not activated the hotplug memory device")]
    Inactive,
    /// No multiple of a block, or more than there is.
    #[error("{asked} MiB cannot be requested: give a multiple of {block} MiB up to {total}")]
    Size {
        /// MiB.
        asked: u32,
        /// MiB of a block.
        block: u64,
        /// MiB at most.
        total: u64,
    },
}
