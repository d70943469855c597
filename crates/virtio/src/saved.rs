//! What a snapshot keeps of every device: its rings and what was negotiated. Each device
//! keeps the rest in its own `saved.rs`.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

use crate::balloon::SavedBalloon;
use crate::block::SavedBlock;
use crate::mem::SavedMem;
use crate::net::SavedNet;
use crate::pmem::SavedPmem;
use crate::queue::VirtQueue;
use crate::rng::SavedRng;
use crate::vsock::SavedVsock;
use crate::{Error, Interrupt, QueueError};

/// What a snapshot keeps of a device behind its transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedDevice {
    /// A disk.
    Block(SavedBlock),
    /// A network interface.
    Net(SavedNet),
    /// A source of random bytes.
    Rng(SavedRng),
    /// Memory that the guest gives up.
    Balloon(SavedBalloon),
    /// Sockets between host and guest.
    Vsock(SavedVsock),
    /// Memory that is plugged.
    Mem(SavedMem),
    /// A file in the guest's address space.
    Pmem(SavedPmem),
}

impl SavedDevice {
    /// The error of a device of another kind.
    pub(crate) fn misplaced(&self) -> Error {
        Error::Saved {
            device: match self {
                Self::Block(_) => "block",
                Self::Net(_) => "net",
                Self::Rng(_) => "rng",
                Self::Balloon(_) => "balloon",
                Self::Vsock(_) => "vsock",
                Self::Mem(_) => "mem",
                Self::Pmem(_) => "pmem",
            },
        }
    }
}

/// What a snapshot keeps of one queue of an active device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    /// Largest number of entries.
    pub max_size: u16,
    /// Number of entries.
    pub size: u16,
    /// Guest-physical address of the descriptors.
    pub descriptors: u64,
    /// Of the available ring.
    pub available: u64,
    /// Of the used ring.
    pub used: u64,
    /// Next available entry that the device takes.
    pub next_available: u16,
    /// Next used entry that it fills.
    pub next_used: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_index: bool,
    /// Something was completed that the driver was not told of.
    pub untold: bool,
    /// The ring cannot be trusted until the device is reset.
    pub broken: bool,
}

impl VirtQueue {
    /// What a snapshot is to keep.
    pub fn save(&self) -> SavedQueue {
        let state = self.ring.state();
        SavedQueue {
            max_size: state.max_size,
            size: state.size,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
            next_available: state.next_avail,
            next_used: state.next_used,
            event_index: state.event_idx_enabled,
            untold: self.untold,
            broken: self.broken,
        }
    }

    /// A queue as it was saved.
    ///
    /// # Errors
    /// [`QueueError::Ring`] for what cannot be a queue. Where the rings lie is checked
    /// with each access.
    pub fn restore(saved: &SavedQueue, interrupt: Interrupt) -> Result<Self, QueueError> {
        let state = QueueState {
            max_size: saved.max_size,
            next_avail: saved.next_available,
            next_used: saved.next_used,
            event_idx_enabled: saved.event_index,
            size: saved.size,
            ready: true,
            desc_table: saved.descriptors,
            avail_ring: saved.available,
            used_ring: saved.used,
        };
        let ring = virtio_queue::Queue::try_from(state).map_err(|_| QueueError::Ring)?;
        let mut queue = Self::new(ring, interrupt);
        if saved.untold {
            queue.set_untold();
        }
        queue.broken = saved.broken;
        Ok(queue)
    }
}
