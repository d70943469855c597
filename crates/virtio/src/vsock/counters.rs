//! What happened, by Firecracker's names (its metrics' group `vsock`). The guest receives
//! (`rx`) what the host sends.

use crate::counters::counters;
pub(super) use crate::counters::{add, count};

counters! {
    /// The ring of buffers for the guest was broken.
    rx_queue_event_fails,
    /// The ring of the guest's packets was broken.
    tx_queue_event_fails,
    /// The ring of events was broken.
    ev_queue_event_fails,
    /// A ring was broken when the host had something for the guest.
    muxer_event_fails,
    /// The driver spoke of new buffers.
    rx_queue_event_count,
    /// The driver spoke of new packets.
    tx_queue_event_count,
    /// Bytes of data given to the guest.
    rx_bytes_count,
    /// Bytes of data that the guest sent on a connection.
    tx_bytes_count,
    /// Packets given to the guest.
    rx_packets_count,
    /// Packets of the guest.
    tx_packets_count,
    /// Connections that were made, by either side.
    conns_added,
    /// Connections that were ended as the guest did not answer in time.
    conns_killed,
    /// Connections that are no more.
    conns_removed,
}
