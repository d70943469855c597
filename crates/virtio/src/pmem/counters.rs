//! What happened, by Firecracker's names (its metrics' group `pmem`).

pub(super) use crate::counters::count;
use crate::counters::counters;

counters! {
    /// The ring was broken.
    event_fails,
    /// The driver spoke of new requests.
    queue_event_count,
    /// Requests that the limiter held back.
    rate_limiter_throttled_events,
    /// The limiter let requests go on.
    rate_limiter_event_count,
    /// The file was made durable.
    flush_count,
    /// It was to be, and was not.
    flush_fails,
}
