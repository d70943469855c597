//! A disk backed by a file or a block device of the host (virtio 1.2 §5.2).

mod counters;
mod device;
mod disk;
mod flight;
mod pace;
mod plan;
mod rings;
mod saved;
mod spec;
pub mod vhost_user;
mod worker;

#[cfg(test)]
mod gate;
#[cfg(test)]
mod slow_disks;
#[cfg(test)]
mod slow_rings;
#[cfg(test)]
mod tests;

pub use counters::{Counters, Metrics};
pub use device::{Access, Block, Cache, InHand};
pub use rings::Completions;
pub use saved::{SavedBlock, SavedLive};
pub use worker::Worker;
