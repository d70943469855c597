//! Counters of what the engine did, for tuning, metrics and tests.

/// [`EngineStats`], and what is done with all of its fields alike.
macro_rules! counters {
    ($($(#[$doc:meta])* pub $name:ident: u64,)*) => {
        /// Counts since the machine was made. Not part of a machine's saved state.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct EngineStats {
            $($(#[$doc])* pub $name: u64,)*
            /// Guest instructions executed in kernel and user mode, where counting is on.
            pub instructions: [u64; 2],
        }

        impl EngineStats {
            fn zip(&self, other: &Self, f: impl Fn(u64, u64) -> u64) -> Self {
                Self {
                    $($name: f(self.$name, other.$name),)*
                    instructions: [0, 1].map(|i| f(self.instructions[i], other.instructions[i])),
                }
            }
        }
    };
}

counters! {
    /// Exits to link a jump.
    pub links: u64,
    /// Jump cache misses.
    pub indirect: u64,
    /// Exits to a constant address.
    pub gotos: u64,
    /// Instructions interpreted.
    pub interpreted: u64,
    /// Accesses that missed the TLB.
    pub accesses: u64,
    /// Accesses through the bounce page.
    pub bounces: u64,
    /// Group checks that missed.
    pub groups: u64,
    /// Groups that had to be run access by access.
    pub variants: u64,
    /// Poll page faults.
    pub polls: u64,
    /// Host faults that became the guest's.
    pub faults: u64,
    /// Entries into invalidated blocks.
    pub stale: u64,
    /// Translations made.
    pub translations: u64,
    /// Translations that had been kept and were placed again.
    pub recalled: u64,
    /// Of both, those thrown away, as another vCPU changed the code meanwhile.
    pub retranslations: u64,
    /// Guest instructions of both.
    pub translated_instructions: u64,
    /// Guest bytes of both.
    pub guest_bytes: u64,
    /// Host bytes of both.
    pub host_bytes: u64,
    /// TSC ticks spent on both.
    pub translation_ticks: u64,
    /// Pages whose translations were dropped because of a store.
    pub invalidations: u64,
    /// Stores that overlapped translations, which were dropped alone.
    pub patched: u64,
    /// Times the whole code cache was dropped: it was full, or the guest first
    /// rested.
    pub code_flushes: u64,
    /// Page walks.
    pub walks: u64,
    /// TLB flushes.
    pub flushes: u64,
    /// Loads of CR3 that changed between process-context identifiers.
    pub space_switches: u64,
    /// Exceptions delivered.
    pub exceptions: u64,
    /// Page faults among them.
    pub page_faults: u64,
    /// External interrupts delivered.
    pub interrupts: u64,
    /// Host timer settings.
    pub timer_sets: u64,
    /// Requests to other vCPUs that were waited for.
    pub asked: u64,
    /// Requests of other vCPUs.
    pub requests: u64,
    /// Times that no other vCPU ran, for a locked access.
    pub alone: u64,
    /// HLT instructions that slept.
    pub sleeps: u64,
    /// Memory-mapped accesses.
    pub mmio: u64,
    /// Port accesses.
    pub pio: u64,
}

impl EngineStats {
    /// These and the other ones: of several vCPUs.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        self.zip(other, u64::wrapping_add)
    }

    /// What was counted after `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        self.zip(earlier, u64::wrapping_sub)
    }

    /// Accesses and group checks that found no entry in the TLB.
    #[must_use]
    pub fn tlb_misses(&self) -> u64 {
        self.accesses.wrapping_add(self.groups)
    }
}
