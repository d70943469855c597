//! A disk that another process of the host serves, by the vhost-user protocol.
//!
//! ```text
//! driver's ring ──copied──▶ shadow ring, in memory of its own ──▶ back end
//! guest memory  ◀──copied── data of requests ◀──────────────────┘
//! ```
//!
//! Invariant: the back end sees what the guest asks of the disk and no more of its memory, and nothing reaches that
//! memory but by this process: page epochs, memory that was given back and snapshots of others stay right whatever a
//! back end does. One that dies or breaks the rules costs its drive, never the machine.
//!
//! Left to others: what the guest sees of it (`machine` gives it a slot as any disk).

mod counters;
mod device;
mod session;
mod shadow;

#[cfg(test)]
mod fake_back_end;
#[cfg(test)]
mod tests;

pub use counters::Counters;
pub use device::VhostUserBlock;
pub use session::{Connection, Session};
