//! What a snapshot keeps of persistent memory. The file stays where it is.

use ram::{GuestMemory, Region};
use serde::{Deserialize, Serialize};

use super::device::{Pmem, State};
use crate::{Error, Interrupt, SavedQueue, VirtQueue};

/// Persistent memory in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPmem {
    /// First guest-physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// The queue, while the driver works.
    pub queue: Option<SavedQueue>,
}

impl SavedPmem {
    pub(super) fn of(device: &Pmem) -> Self {
        Self {
            start: device.region.start.0,
            size: device.region.len,
            queue: match &device.state {
                State::Idle => None,
                State::Live { queue, .. } => Some(queue.save()),
            },
        }
    }

    pub(super) fn state(
        &self,
        region: &Region,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<State, Error> {
        let bad = Error::Saved { device: "pmem" };
        if (self.start, self.size) != (region.start.0, region.len) {
            return Err(bad);
        }
        let Some(queue) = &self.queue else {
            return Ok(State::Idle);
        };
        match VirtQueue::restore(queue, interrupt.clone()) {
            Ok(queue) => Ok(State::Live {
                memory: memory.clone(),
                queue,
                interrupt: interrupt.clone(),
            }),
            Err(_) => Err(bad),
        }
    }
}
