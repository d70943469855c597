//! Stream sockets between host and guest (virtio 1.2 §5.10) over Unix sockets,
//! by the host protocol of Firecracker:
//!
//! ```text
//! host ──connect──▶ uds_path          host ◀──connect── uds_path_<port>
//!      ──"CONNECT <guest port>\n"──▶       guest connects to (2, port)
//!      ◀──"OK <host port>\n"──
//! ```
//!
//! What the guest sends reaches the Unix socket inside of its notification; what
//! the host sends reaches the guest with one wake of the event loop.
//!
//! Invariant: at most 1023 connections, each with at most 64 KiB that the host
//! has not taken yet; a guest that takes no packets stops being served, and costs
//! no memory beyond that.
//!
//! Left to others: who connects to which port (`sandbox`, the guest's init).

mod connection;
mod counters;
mod device;
mod listener;
mod muxer;
mod saved;
mod spec;

#[cfg(test)]
mod tests;

pub use counters::Counters;
pub use device::Vsock;
pub use saved::SavedVsock;
