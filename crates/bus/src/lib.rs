//! How devices meet the machine: address ranges, interrupt lines, lifecycle.
//!
//! A device implements [`MmioDevice`] or [`PioDevice`] (calls come from vCPU
//! threads) and [`Lifecycle`]; it raises interrupts through an [`IrqLine`] that
//! `machine` made for it. The [`Bus`] finds the device for an address.
//!
//! Left to others: which device sits where (`machine`), what it does (`virtio`,
//! `chipset`).
#![forbid(unsafe_code)]

mod irq;
mod range;

pub use irq::IrqLine;
pub use range::{Bus, BusError};

/// A device behind memory-mapped registers. `offset` counts from its range's
/// start; `data` is 1, 2, 4 or 8 bytes, little-endian.
pub trait MmioDevice: Send {
    /// Answers a load by filling `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes a store.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device behind I/O ports. `offset` counts from its first port.
pub trait PioDevice: Send {
    /// Answers IN by filling `data`.
    fn read(&mut self, offset: u16, data: &mut [u8]);
    /// Takes OUT.
    fn write(&mut self, offset: u16, data: &[u8]);
}

/// What every device can be asked while its machine is not running guest code.
pub trait Lifecycle {
    /// Stops starting new work and ends what is in flight.
    fn pause(&mut self);
    /// Goes on after [`Lifecycle::pause`].
    fn resume(&mut self);
    /// Returns to the state at power-on.
    fn reset(&mut self);
}
