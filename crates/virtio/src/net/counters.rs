//! What happened, by Firecracker's names (its metrics' group `net`).

use crate::counters::counters;
pub(super) use crate::counters::{add, count};

counters! {
    /// The link refused the offloads that the driver asked for.
    activate_fails,
    /// Frames waited as the guest gave no buffers.
    no_rx_avail_buffer,
    /// The driver spoke of new buffers for frames.
    rx_queue_event_count,
    /// The limiter let frames for the guest go on.
    rx_event_rate_limiter_count,
    /// Frames for the guest that the limiter held back.
    rx_rate_limiter_throttled,
    /// The link had frames.
    rx_tap_event_count,
    /// Bytes given to the guest, headers included.
    rx_bytes_count,
    /// Frames given to the guest.
    rx_packets_count,
    /// Frames that did not fit the guest's buffers.
    rx_fails,
    /// Buffers given back with a frame.
    rx_count,
    /// Reads that failed.
    tap_read_fails,
    /// Writes that failed.
    tap_write_fails,
    /// Bytes of the guest, headers included, that the link took.
    tx_bytes_count,
    /// What was no frame.
    tx_malformed_frames,
    /// Frames of the guest that the link did not take.
    tx_fails,
    /// Requests of the guest that were given back.
    tx_count,
    /// Frames that the link took.
    tx_packets_count,
    /// The driver spoke of new frames.
    tx_queue_event_count,
    /// The limiter let frames of the guest go on.
    tx_rate_limiter_event_count,
    /// Frames of the guest that the limiter held back.
    tx_rate_limiter_throttled,
    /// Frames with another source than the guest's address.
    tx_spoofed_mac_count,
    /// Frames were left for later, as there were too many at once.
    tx_remaining_reqs_count,
}
