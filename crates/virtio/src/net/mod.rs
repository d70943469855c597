//! A network interface (virtio 1.2 §5.1) whose cable leads to a descriptor of the host,
//! such as a TAP device's, and to a [`Neighbour`] within the monitor.
//!
//! ```text
//! guest ──tx──▶ limiter ──▶ for the neighbour? ──no──▶ Link (one write each)
//!                                 └──yes──▶ Neighbour
//! guest ◀──rx── limiter ◀── Link (one read each, straight into the guest's buffers)
//!         ◀──────────────── Neighbour
//! ```
//!
//! Invariant: a frame is given to the guest whole or not at all; one that the link does
//! not take at once is lost, as on any cable. What guest or network send in one go is
//! bounded, so that neither keeps a thread of the monitor for itself.
//!
//! vCPUs do this for short frames; streams of long ones they leave to the event loop.
//!
//! Left to others: opening TAP devices (`tap`), what a neighbour answers (`mmds`).

mod counters;
mod device;
mod receive;
mod saved;
mod spec;
mod transmit;

#[cfg(test)]
mod tests;

pub use counters::Counters;
pub use device::{Link, Neighbour, Net, Offloads, Settings};
pub use saved::SavedNet;
