//! How a driver reaches a device: registers for discovery, set-up and kicks.

mod doorbell;
mod mmio;
mod saved;

pub use doorbell::{Doorbell, NOTIFY_AT};
pub use mmio::{MMIO_LEN, MmioTransport};
pub use saved::{SavedQueueSetUp, SavedTransport};

#[cfg(test)]
mod restored;
#[cfg(test)]
mod tests;
