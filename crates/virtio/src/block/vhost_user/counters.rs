//! What happened to a drive of a back end's, by Firecracker's names (its metrics' group `vhost_user_block_<id>`).

use crate::counters::counters;

counters! {
    /// A driver was ready, and the back end was gone.
    activate_fails,
    /// The back end did not say how its disk is.
    cfg_fails,
    /// How long it took to agree with the back end on what it offers, in microseconds.
    init_time_us,
    /// How long it took to hand it memory and ring, in microseconds.
    activate_time_us,
    /// How long it took to ask it anew how its disk is, in microseconds.
    config_change_time_us,
}
