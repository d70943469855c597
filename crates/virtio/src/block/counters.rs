//! What happened to a drive, by Firecracker's names (its metrics' group `block`).

use crate::counters::{Latency, counters};

counters! {
    /// A driver that was ready could not be served.
    activate_fails,
    /// The driver spoke of requests, and there were none.
    no_avail_buffer,
    /// The ring was broken, or an event of the host's could not be taken.
    event_fails,
    /// Requests that failed on the host's side.
    execute_fails,
    /// Requests that cannot be: no header, no room for a status, off the disk.
    invalid_reqs_count,
    /// Flushes that were done.
    flush_count,
    /// The driver spoke of new requests.
    queue_event_count,
    /// The limiter let requests go on.
    rate_limiter_event_count,
    /// The file or the limits were replaced.
    update_count,
    /// They were to be, and were not.
    update_fails,
    /// Bytes read.
    read_bytes,
    /// Bytes written.
    write_bytes,
    /// Reads that were done.
    read_count,
    /// Writes that were done.
    write_count,
    /// Requests that the limiter held back.
    rate_limiter_throttled_events,
    /// How often requests waited as the kernel had as many of the drive as may be in flight.
    io_engine_throttled_events,
    /// Requests that would have had a vCPU wait: a turn of the drive's own thread begins with each,
    /// or the kernel does them (io_uring).
    handed_over_count,
}

/// What is counted of one drive.
#[derive(Debug, Default)]
pub struct Metrics {
    /// How often.
    pub counters: Counters,
    /// How long reads took.
    pub read_agg: Latency,
    /// How long writes took.
    pub write_agg: Latency,
}
