//! Random bytes for the guest (virtio 1.2 §5.4), from the host's getrandom.

mod device;

#[cfg(test)]
mod tests;

pub use device::Rng;
