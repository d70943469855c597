//! What a snapshot keeps of a disk. Its data are not in it: the file stays where it is.

use ram::GuestMemory;
use serde::{Deserialize, Serialize};

use super::device::{Block, Cache, Flushing, Live, State, Turn};
use crate::rate_limiter::SavedLimiter;
use crate::{Error, Interrupt, SavedQueue, VirtQueue};

/// A disk in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedBlock {
    /// Its capacity, as the guest knows it.
    pub sectors: u64,
    /// Its limits and how full they are.
    pub limiter: SavedLimiter,
    /// What there is only while the driver works.
    pub live: Option<SavedLive>,
}

/// What there is only while the driver works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedLive {
    /// Requests.
    pub queue: SavedQueue,
    /// Requests that were taken and not given back, by name, in their order: they are done
    /// again. The driver does not touch their data before they are given back.
    pub begun: Vec<u16>,
    /// The driver knows no flush: each write is one.
    pub flushes_each_write: bool,
}

impl SavedBlock {
    pub(super) fn of(disk: &Block) -> Self {
        Self {
            sectors: disk.disk.sectors,
            limiter: disk.limiter.save(),
            live: match &disk.state {
                State::Idle => None,
                State::Live(live) => Some(SavedLive {
                    queue: live.queue.save(),
                    begun: disk.begun(live),
                    flushes_each_write: disk.flushing == Flushing::EachWrite,
                }),
            },
        }
    }

    pub(super) fn put_into(
        &self,
        disk: &mut Block,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error> {
        let Some(live) = &self.live else {
            disk.limiter.put_back(&self.limiter);
            disk.state = State::Idle;
            return Ok(());
        };
        let refused = || Error::Saved { device: "block" };
        let queue = VirtQueue::restore(&live.queue, interrupt.clone());
        let mut queue = queue.map_err(|_| refused())?;
        if live.begun.iter().any(|head| *head >= live.queue.size) {
            return Err(refused());
        }
        if queue.put_back(memory, &live.begun).is_err() {
            interrupt.needs_reset();
        }
        disk.limiter.put_back(&self.limiter);
        disk.flushing = match disk.cache {
            Cache::Unsafe => Flushing::Never,
            Cache::Writeback if live.flushes_each_write => Flushing::EachWrite,
            Cache::Writeback => Flushing::Asked,
        };
        disk.state = State::Live(Live::new(memory.clone(), queue, interrupt.clone()));
        if disk.disk.sectors != self.sectors {
            // The file is another length than it was: the driver looks anew.
            interrupt.config_changed();
        }
        Ok(())
    }
}

impl Block {
    /// The names of requests that were taken and not given back.
    fn begun(&self, live: &Live) -> Vec<u16> {
        if live.queue.broken {
            return Vec::new();
        }
        let in_hand = match live.turn {
            Turn::InHand { head } => Some(head),
            Turn::Ours | Turn::Handed | Turn::Workers => None,
        };
        let in_flight = self.rings.iter().flat_map(|rings| rings.heads());
        in_hand.into_iter().chain(in_flight).collect()
    }
}
