//! Guest memory: addresses, the memfd behind it, which page was written when.
//!
//! ```text
//! guest-physical   0 ────── low ─────▶ 3 GiB ── gap ── 4 GiB ── high ──▶
//! host             base + guest-physical, for every byte of both regions
//! memfd            low, then high, without the gap
//! ```
//!
//! Invariants: the host address of a guest byte is [`GuestRam::host_base`] plus
//! its guest-physical address; the mapping lives as long as anything that can
//! reach it; every write through [`GuestMemory`] is recorded in [`PageEpochs`].
//!
//! Left to others: writes of guest code (the engines record those themselves),
//! what the memory is used for (`machine`).

mod epochs;
mod layout;
mod map;
pub mod volatile;

#[cfg(test)]
mod tests;

pub use epochs::{Cursor, EpochSlice, PageEpochs, RegionEpochs};
pub use layout::{ByteSize, HIGH_START, LOW_END, PAGE_SIZE, Region};
pub use map::{GuestMemory, GuestRam, populate, zeroed_u32, zeroed_u64};
pub use vm_memory::GuestAddress as Gpa;

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The size is zero, not a multiple of [`PAGE_SIZE`] or beyond what an
    /// address space can hold.
    #[error("guest memory of {bytes} bytes is not a positive multiple of 4096 up to {most}")]
    Size {
        /// The size asked for.
        bytes: u64,
        /// The largest size.
        most: u64,
    },
    /// The host's kernel refused.
    #[error("failed to {doing} for {bytes} bytes of guest memory")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// The size asked for.
        bytes: u64,
        /// The kernel's answer.
        source: std::io::Error,
    },
}
