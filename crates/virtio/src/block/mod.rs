//! A disk backed by a file or a block device of the host (virtio 1.2 §5.2).

mod device;
mod saved;
mod spec;

#[cfg(test)]
mod tests;

pub use device::{Access, Block, Cache};
pub use saved::{SavedBlock, SavedLive};
