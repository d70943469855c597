//! Kicks without an exit: an engine that can rings an eventfd when the driver kicks, and
//! the event loop has the device look at its queues.
//!
//! Invariant: after a ring, the device looks at each of its queues once more. It may look
//! more often than there were rings.
//!
//! Left to others: which engine can, and that it rings (`hv::Partition::doorbell`).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;

use super::mmio::{MmioTransport, lock};
use crate::{Bell, Error, EventSource};

/// Where drivers kick, in a device's registers: by a store of the queue's number.
pub const NOTIFY_AT: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// The kicks of one device, as the event loop gets them.
#[derive(Debug)]
pub struct Doorbell {
    transport: Arc<Mutex<MmioTransport>>,
    bell: Bell,
    queues: u16,
}

impl Doorbell {
    /// A bell in front of `transport`'s device.
    ///
    /// # Errors
    /// [`Error::Host`]: no descriptor.
    pub fn of(transport: &Arc<Mutex<MmioTransport>>) -> Result<Self, Error> {
        let queues = locked(transport).queue_sizes.len();
        Ok(Self {
            transport: transport.clone(),
            bell: Bell::new()?,
            // No device has more: their sizes are named one by one.
            queues: u16::try_from(queues).unwrap_or(u16::MAX),
        })
    }

    /// How many queues it is rung for.
    pub fn queues(&self) -> u16 {
        self.queues
    }
}

impl Doorbell {
    /// Has the registers know that there was a ring, if the event loop has not seen it. For
    /// a machine that is being saved: rings are not, but restored registers have every queue
    /// looked at. What is to be done stays the event loop's, as the calling thread may not.
    pub fn note(&mut self) {
        if self.bell.silence() {
            drop(locked(&self.transport).rung());
            self.bell.ring();
        }
    }

    /// Does what was rung for.
    fn serve(&mut self) {
        // Before the device looks: what is rung for later is looked at again.
        if !self.bell.silence() {
            return;
        }
        let kicked = locked(&self.transport).rung();
        // vCPUs reach the registers meanwhile.
        let Some(device) = kicked else {
            return;
        };
        for queue in 0..self.queues {
            let served = lock(&device).notify(queue);
            if let Err(error) = served {
                locked(&self.transport).give_up(queue, &error);
                return;
            }
        }
    }
}

impl EventSource for Doorbell {
    fn fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn on_event(&mut self) {
        self.serve();
    }
}

fn locked(transport: &Mutex<MmioTransport>) -> MutexGuard<'_, MmioTransport> {
    transport.lock().unwrap_or_else(PoisonError::into_inner)
}
