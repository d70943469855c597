//! Random bytes for the guest (virtio 1.2 §5.4), from the host's getrandom.

mod counters;
mod device;
mod saved;

#[cfg(test)]
mod tests;

pub use counters::Counters;
pub use device::Rng;
pub use saved::SavedRng;
