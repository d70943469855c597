//! What tells the guest that it is another machine than before.
//!
//! Left to others: when that is so (whoever restores a machine).

use chipset::{SavedVmClock, SavedVmGenId, VmClock, VmGenId};
use ram::GuestMemory;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::layout::{VMCLOCK, VMCLOCK_GSI, VMGENID, VMGENID_GSI};

/// Generation identifier and VM clock of one machine.
#[derive(Debug)]
pub struct Generation {
    identifier: VmGenId,
    clock: VmClock,
}

/// What a snapshot keeps of [`Generation`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedGeneration {
    /// Of the identifier.
    pub identifier: SavedVmGenId,
    /// Of the clock.
    pub clock: SavedVmClock,
}

impl Generation {
    /// Of a new machine; `line` makes the line of a GSI.
    pub(crate) fn new(
        memory: &GuestMemory,
        line: impl Fn(u32) -> bus::IrqLine,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Generation { source };
        Ok(Self {
            identifier: VmGenId::new(memory, VMGENID, line(VMGENID_GSI)).map_err(failed)?,
            clock: VmClock::new(memory, VMCLOCK, line(VMCLOCK_GSI)).map_err(failed)?,
        })
    }

    /// Of a machine that goes on from a snapshot; [`Generation::bump`] is to follow
    /// before it runs.
    #[must_use]
    pub fn restore(
        memory: &GuestMemory,
        line: impl Fn(u32) -> bus::IrqLine,
        saved: &SavedGeneration,
    ) -> Self {
        Self {
            identifier: VmGenId::restore(memory, line(VMGENID_GSI), &saved.identifier),
            clock: VmClock::restore(memory, line(VMCLOCK_GSI), &saved.clock),
        }
    }

    /// What a snapshot is to keep.
    pub fn save(&self) -> SavedGeneration {
        SavedGeneration {
            identifier: self.identifier.save(),
            clock: self.clock.save(),
        }
    }

    /// Gives the guest a new identifier, counts a generation and a disruption, and
    /// notifies the guest of both.
    ///
    /// # Errors
    /// [`Error::Generation`].
    pub fn bump(&mut self) -> Result<(), Error> {
        let failed = |source| Error::Generation { source };
        self.identifier.bump().map_err(failed)?;
        self.clock.bump().map_err(failed)
    }
}
