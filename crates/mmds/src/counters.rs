//! What happened, by Firecracker's names (its metrics' group `mmds`).

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counts since the start. Shared: endpoints count, whoever writes metrics reads.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        impl Counters {
            /// Each by its name.
            pub fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Frames that were for this service.
    rx_accepted,
    /// Of these, what broke a rule of its protocol.
    rx_accepted_err,
    /// Of these, neither ARP nor TCP.
    rx_accepted_unusual,
    /// Of these, too short for what they say they are, or too long.
    rx_bad_eth,
    /// Requests with a token that is wrong or expired.
    rx_invalid_token,
    /// Requests without a token.
    rx_no_token,
    /// Frames with TCP that were taken.
    rx_count,
    /// Bytes given to the guest.
    tx_bytes,
    /// Frames made.
    tx_count,
    /// Frames that could not be made: the guest fetches too slowly.
    tx_errors,
    /// Frames given to the guest.
    tx_frames,
    /// Connections.
    connections_created,
    /// Connections that ended.
    connections_destroyed,
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
