//! Persistent memory (virtio 1.2 §5.19): a file of the host that the guest has in its
//! address space, and a queue to make it durable.
//!
//! Invariant: a flush that was answered with success covers every store that came before
//! the request.
//!
//! Left to others: the mapping, also of files that shrink (`ram`).

mod counters;
mod device;
mod saved;
mod spec;

#[cfg(test)]
mod tests;

pub use counters::Counters;
pub use device::Pmem;
pub use saved::SavedPmem;
