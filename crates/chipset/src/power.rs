//! What the guest may ask of the machine's power.

/// Told when the guest asks to be reset or switched off. Calls come from vCPU
/// threads, which go on running guest code until the machine stops them.
pub trait PowerEvents: Send + Sync {
    /// The guest asked for a reset.
    fn reset(&self);
    /// The guest asked to be switched off.
    fn power_off(&self);
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    /// Counts what was asked for.
    #[derive(Debug, Default)]
    pub(crate) struct Asked {
        resets: AtomicU32,
        power_offs: AtomicU32,
    }

    impl Asked {
        pub(crate) fn counts(&self) -> (u32, u32) {
            (
                self.resets.load(Ordering::Relaxed),
                self.power_offs.load(Ordering::Relaxed),
            )
        }
    }

    impl super::PowerEvents for Asked {
        fn reset(&self) {
            self.resets.fetch_add(1, Ordering::Relaxed);
        }

        fn power_off(&self) {
            self.power_offs.fetch_add(1, Ordering::Relaxed);
        }
    }
}
