//! What happened, by Firecracker's names (its metrics' group `entropy`).

use crate::counters::counters;
pub(super) use crate::counters::{add, count};

counters! {
    /// The ring was broken.
    entropy_event_fails,
    /// Requests that were answered.
    entropy_event_count,
    /// Random bytes that the guest got.
    entropy_bytes,
    /// Requests that the host gave fewer bytes for than asked.
    host_rng_fails,
    /// Requests that the limiter held back.
    entropy_rate_limiter_throttled,
    /// The limiter let requests go on.
    rate_limiter_event_count,
}
