//! Metadata for guests: what the host puts in a [`Store`], guests fetch over HTTP from
//! 169.254.169.254, as from Firecracker's microVM metadata service.
//!
//! ```text
//! API: PUT, PATCH, GET ──▶ Metadata { Store, Tokens, version } ◀── answer() ◀── Endpoint ◀─▶ frames
//! ```
//!
//! Invariant: pure. No clock is read, no descriptor opened but for random bytes when
//! [`Metadata`] and [`Endpoint`] are made; time is an argument. What a guest sends costs
//! bounded memory and never panics.
//!
//! Where it differs from Firecracker: tokens are longer (96 digits), a request that is too long is answered (413)
//! before its connection ends, HTTP/1.0 and `Connection: close` end it too, Accept may be a list.
//!
//! Left to others: which network device's frames come here and when it is polled
//! (`machine`), the API (`api`).
#![forbid(unsafe_code)]

mod answer;
mod counters;
mod endpoint;
mod http;
mod metadata;
mod store;
mod tokens;
mod wire;

pub use counters::Counters;
pub use endpoint::{Address, Endpoint};
pub use metadata::{Metadata, Version};
pub use store::{Store, StoreError};
pub use tokens::{TTL_SECONDS, Tokens, TtlError};

#[cfg(test)]
mod tests;
