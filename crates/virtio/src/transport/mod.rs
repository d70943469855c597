//! How a driver reaches a device: registers for discovery, set-up and kicks.

mod mmio;

pub use mmio::{MMIO_LEN, MmioTransport};

#[cfg(test)]
mod tests;
