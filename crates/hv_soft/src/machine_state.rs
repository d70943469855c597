//! What the vCPUs of a machine share, in the form that no engine owns: IOAPIC and clock.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use hv::{Error, Shared, SharedState};

use crate::apic::Chips;
use crate::clock::Clock;

pub(crate) struct SoftShared {
    chips: Arc<Chips>,
    clock: Clock,
}

impl SoftShared {
    pub(crate) fn new(chips: &Arc<Chips>, clock: &Clock) -> Self {
        Self {
            chips: Arc::clone(chips),
            clock: clock.clone(),
        }
    }
}

impl Shared for SoftShared {
    fn state(&self) -> Result<SharedState, Error> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(SharedState {
            ioapic: self.chips.ioapic().save(),
            clock: self.clock.since_start(),
            time_of_day: since_1970.map_or(0, |time| time.as_nanos() as u64),
        })
    }

    fn set_state(&self, state: &SharedState) -> Result<(), Error> {
        self.clock.set_since_start(state.clock);
        let messages = self.chips.ioapic().load(&state.ioapic);
        for message in messages {
            self.chips.send(Some(message), None);
        }
        Ok(())
    }

    // Each write is recorded when the run that made it ends, whether asked for or not.
    fn log_writes(&self, _: bool) -> Result<(), Error> {
        Ok(())
    }

    fn collect_writes(&self) -> Result<(), Error> {
        Ok(())
    }
}
