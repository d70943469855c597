//! What a snapshot keeps of a device's registers, and of the device behind them.
//!
//! Invariant: registers that a driver cannot have left like that are refused; where a
//! queue lies is checked with each access to it.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

use super::mmio::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, MmioTransport, lock};
use crate::interrupt::SavedInterrupt;
use crate::{Error, SavedDevice, VirtioDevice};

/// A device with its registers in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedTransport {
    /// The device status.
    pub status: u32,
    /// DeviceFeaturesSel.
    pub device_features_page: u32,
    /// DriverFeaturesSel.
    pub driver_features_page: u32,
    /// What the driver accepted so far.
    pub accepted: u64,
    /// QueueSel.
    pub selected_queue: u32,
    /// As the driver set them up.
    pub queues: Vec<SavedQueueSetUp>,
    /// Queues that were kicked before the device was active, a bit for each.
    pub early_kicks: u64,
    /// Its interrupt.
    pub interrupt: SavedInterrupt,
    /// What is behind the registers.
    pub device: SavedDevice,
}

/// A queue as its driver set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueueSetUp {
    /// Number of entries.
    pub size: u16,
    /// It is ready.
    pub ready: bool,
    /// Guest-physical address of the descriptors.
    pub descriptors: u64,
    /// Of the available ring.
    pub available: u64,
    /// Of the used ring.
    pub used: u64,
}

impl SavedQueueSetUp {
    fn of(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            size: state.size,
            ready: state.ready,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
        }
    }

    fn queue(&self, max_size: u16) -> Option<Queue> {
        Queue::try_from(QueueState {
            max_size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: false,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        })
        .ok()
    }
}

impl MmioTransport {
    /// What is behind the registers.
    pub fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        self.device.clone()
    }

    /// What a snapshot is to keep of registers and device: `device` is
    /// [`MmioTransport::device`], locked by who keeps it still for longer than this call.
    ///
    /// # Errors
    /// Those of [`VirtioDevice::save`].
    pub fn save(&self, device: &mut dyn VirtioDevice) -> Result<SavedTransport, Error> {
        // First: it may still interrupt.
        let device = device.save()?;
        Ok(SavedTransport {
            status: self.status,
            device_features_page: self.device_features_page,
            driver_features_page: self.driver_features_page,
            accepted: self.accepted,
            selected_queue: self.selected_queue,
            queues: self.queues.iter().map(SavedQueueSetUp::of).collect(),
            early_kicks: self.early_kicks,
            interrupt: self.interrupt.save(),
            device,
        })
    }

    /// Makes registers and device, both new, those that were saved. The interrupt line is
    /// driven as it was; the driver's requests are looked at with
    /// [`bus::Lifecycle::resume`].
    ///
    /// # Errors
    /// [`Error::Saved`] for what cannot have been; [`Error::Host`]. The device is of no
    /// use then.
    pub fn restore(&mut self, saved: &SavedTransport) -> Result<(), Error> {
        let bad = || Error::Saved {
            device: "transport of a",
        };
        let reachable = [0, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
        let kicks_of_none = match self.queues.len() {
            n @ 0..64 => saved.early_kicks >> n != 0,
            _ => false,
        };
        if !reachable.contains(&(saved.status & !FAILED))
            || saved.accepted & !self.features != 0
            || saved.queues.len() != self.queue_sizes.len()
            || kicks_of_none
        {
            return Err(bad());
        }
        let queues = saved.queues.iter().zip(&self.queue_sizes);
        let queues: Option<Vec<Queue>> = queues.map(|(saved, max)| saved.queue(*max)).collect();
        self.queues = queues.ok_or_else(bad)?;
        self.status = saved.status;
        self.device_features_page = saved.device_features_page;
        self.driver_features_page = saved.driver_features_page;
        self.accepted = saved.accepted;
        self.selected_queue = saved.selected_queue;
        self.early_kicks = saved.early_kicks;
        // Before the device, which may have something new to say.
        self.interrupt.restore(&saved.interrupt).ok_or_else(bad)?;
        lock(&self.device).restore(&saved.device, &self.memory, &self.interrupt)
    }
}
