//! Limits of a device's traffic: two token buckets, for bytes and for operations, and
//! the timer that says when a device that was held up may go on.
//!
//! Invariant: whatever the requests and however they are spread, no more passes in a
//! time than what the buckets held at its start and what flowed in meanwhile, but for
//! one request that is larger than its bucket: what follows it waits for its debt.
//!
//! Left to others: what a request costs, and to keep it until it may pass (the devices).

mod bucket;
mod dropping;
mod limiter;
mod saved;

#[cfg(test)]
mod tests;

pub use bucket::Limit;
pub use dropping::Dropping;
pub use limiter::{Limits, RateLimiter};
pub use saved::{SavedBucket, SavedLimiter};
