//! What happened, by Firecracker's names (its metrics' group `memory_hotplug`).

use crate::counters::counters;
pub(super) use crate::counters::{add, count};

counters! {
    /// The driver spoke of new requests.
    queue_event_count,
    /// The ring was broken.
    queue_event_fails,
    /// Requests to plug that were granted.
    plug_count,
    /// Bytes that they plugged.
    plug_bytes,
    /// Requests to plug that were not.
    plug_fails,
    /// Requests to unplug that were granted.
    unplug_count,
    /// Bytes that they unplugged.
    unplug_bytes,
    /// Requests to unplug that were not.
    unplug_fails,
    /// Pieces of memory that the host did not take back.
    unplug_discard_fails,
    /// Requests to unplug everything.
    unplug_all_count,
    /// Requests for the state of blocks that were answered.
    state_count,
    /// Those that were not.
    state_fails,
}
