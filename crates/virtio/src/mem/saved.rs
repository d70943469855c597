//! What a snapshot keeps of pluggable memory. Its content is with the rest of memory's.

use ram::{Gpa, GuestRam};
use serde::{Deserialize, Serialize};

use super::device::{Mem, State};
use crate::{Interrupt, SavedQueue, VirtQueue};

/// Pluggable memory in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMem {
    /// First guest-physical address.
    pub start: u64,
    /// Bytes of the region.
    pub size: u64,
    /// Bytes of a block.
    pub block: u64,
    /// Bytes of a slot.
    pub slot: u64,
    /// Bytes in which the guest may plug.
    pub usable: u64,
    /// Bytes that the guest is asked to have.
    pub requested: u64,
    /// What is plugged: address and bytes.
    pub plugged: Vec<(u64, u64)>,
    /// The queue, while the driver works.
    pub queue: Option<SavedQueue>,
}

impl SavedMem {
    pub(super) fn of(device: &Mem) -> Self {
        let plug = &device.plug;
        let run = |(at, len): (Gpa, u64)| (at.0, len);
        Self {
            start: plug.region.start.0,
            size: plug.region.len,
            block: plug.block,
            slot: device.status().slot_mib << 20,
            usable: plug.usable,
            requested: plug.requested,
            plugged: plug.plugged_runs().into_iter().map(run).collect(),
            queue: match &device.state {
                State::Idle => None,
                State::Live { queue, .. } => Some(queue.save()),
            },
        }
    }

    /// Nothing where it does not fit.
    pub(super) fn put_into(&self, device: &mut Mem, interrupt: &Interrupt) -> Option<()> {
        let plug = &mut device.plug;
        let fits = (self.start, self.size, self.block)
            == (plug.region.start.0, plug.region.len, plug.block)
            && self.usable <= self.size
            && self.requested <= self.size;
        if !fits {
            return None;
        }
        let ram: GuestRam = plug.ram.clone();
        for &(at, len) in &self.plugged {
            ram.plug(Gpa(at), len).ok()?;
            plug.plugged += len;
        }
        plug.usable = self.usable;
        plug.requested = self.requested;
        if let Some(queue) = &self.queue {
            device.state = State::Live {
                memory: ram.memory().clone(),
                queue: VirtQueue::restore(queue, interrupt.clone()).ok()?,
                interrupt: interrupt.clone(),
            };
        }
        Some(())
    }
}
