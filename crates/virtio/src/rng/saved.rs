//! What a snapshot keeps of a source of random bytes. None that it gave: each machine that
//! goes on from the snapshot is given others.

use ram::GuestMemory;
use serde::{Deserialize, Serialize};

use super::device::{Rng, State};
use crate::rate_limiter::SavedLimiter;
use crate::{Error, Interrupt, SavedQueue, VirtQueue};

/// A source in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRng {
    /// Its limits and how full they are.
    pub limiter: SavedLimiter,
    /// The queue, while the driver works.
    pub queue: Option<SavedQueue>,
}

impl SavedRng {
    pub(super) fn of(device: &Rng) -> Self {
        Self {
            limiter: device.limiter.save(),
            queue: match &device.state {
                State::Idle => None,
                State::Live { queue, .. } => Some(queue.save()),
            },
        }
    }

    pub(super) fn put_into(
        &self,
        device: &mut Rng,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error> {
        let state = match &self.queue {
            None => State::Idle,
            Some(queue) => State::Live {
                memory: memory.clone(),
                queue: VirtQueue::restore(queue, interrupt.clone())
                    .map_err(|_| Error::Saved { device: "rng" })?,
                interrupt: interrupt.clone(),
            },
        };
        device.limiter.put_back(&self.limiter);
        device.state = state;
        Ok(())
    }
}
