//! Guest memory: addresses, the memfd behind it, which page was written when.
//!
//! ```text
//! guest-physical   0 ────── low ─────▶ 3 GiB ── gap ── 4 GiB ── high ──▶ further ──▶
//! host             base + guest-physical, for every byte of every region
//! memfd            low, then high, without the gap, then what is pluggable
//! ```
//!
//! Further regions are files of the host, and memory that is plugged in blocks. They are
//! reserved when the machine is made; what of them may be reached changes later.
//!
//! Invariants: the host address of a guest byte is [`GuestRam::host_base`] plus
//! its guest-physical address; the mapping lives as long as anything that can
//! reach it; every write through [`GuestMemory`] is recorded in [`PageEpochs`]; no access
//! to a region's host addresses ends the process, read-only files' excepted.
//!
//! A memory may come from an image, a file that [`GuestRam::write_image`] wrote: it is mapped
//! so that stores stay in this process, and there is no memfd.
//!
//! Left to others: writes of guest code (the engines record those themselves),
//! what the memory is used for (`machine`).

mod access;
mod epochs;
mod image;
mod layout;
mod map;
pub mod ring;
mod vanished;
pub mod volatile;

#[cfg(test)]
mod tests;

pub use access::AccessListener;
pub use epochs::{Cursor, EpochSlice, PageEpochs, RegionEpochs};
pub use layout::{ByteSize, FILE_ALIGNMENT, Further, HIGH_START, Kind, LOW_END, PAGE_SIZE, Region};
pub use map::{GuestMemory, GuestRam, Pages, populate, zeroed_u32, zeroed_u64};
pub use vanished::repair;
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
    /// Blocks that do not make up a region.
    #[error(
        "{len} bytes of pluggable memory are no multiple of {block}, a power of two from 2 MiB"
    )]
    Blocks {
        /// Bytes of the region.
        len: u64,
        /// Bytes of a block.
        block: u64,
    },
    /// The host has too few large pages, or cannot say.
    #[error(
        "{bytes} bytes of guest memory need {} huge pages of 2 MiB, which the host has not got free: \
         reserve them in /proc/sys/vm/nr_hugepages, or leave huge_pages out",
        bytes >> 21
    )]
    HugePages {
        /// The size asked for, pluggable memory included.
        bytes: u64,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A file that is not the image of such a memory.
    #[error("the memory file has {has} bytes, this machine's memory {wants}")]
    Image {
        /// Its length.
        has: u64,
        /// What it should be.
        wants: u64,
    },
    /// A range of addresses that is not what was asked for.
    #[error("guest addresses {at:#x}+{len:#x} are not {wanted}")]
    Range {
        /// First address.
        at: u64,
        /// Bytes.
        len: u64,
        /// What they should be.
        wanted: &'static str,
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
