//! virtio over MMIO, version 2 (virtio 1.2 §4.2.2).
//!
//! ```text
//! 0 ──▶ ACKNOWLEDGE ──▶ DRIVER ──▶ FEATURES_OK ──▶ DRIVER_OK
//!           ack of features ▲         ▲ queue set-up    ▲ device works
//! any state: FAILED (stays), write of 0 resets; NEEDS_RESET is set by the device
//! ```
//!
//! Invariant: the status moves one bit at a time; a write at the wrong time, of
//! the wrong width or to a register that cannot be written changes nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use bus::{IrqLine, Lifecycle, MmioDevice};
use ram::{Gpa, GuestMemory, GuestRam};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryBackend;

use crate::{
    Activation, Bell, DeviceType, Interrupt, QueueError, VirtQueue, VirtioDevice, feature,
};

/// Bytes of address space per device.
pub const MMIO_LEN: u64 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// "KMBI": Linux shows it and otherwise does not care.
const VENDOR: u32 = u32::from_le_bytes(*b"KMBI");

pub(super) const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
pub(super) const DRIVER: u32 = ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
pub(super) const FEATURES_OK: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
pub(super) const DRIVER_OK: u32 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
pub(super) const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

/// One device's registers. The range it answers is [`MMIO_LEN`] bytes long.
pub struct MmioTransport {
    pub(super) device: Arc<Mutex<dyn VirtioDevice>>,
    /// What is rung while another thread works with the device.
    bell: Option<Bell>,
    pub(super) device_type: DeviceType,
    /// What is offered.
    pub(super) features: u64,
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    pub(super) status: u32,
    pub(super) device_features_page: u32,
    pub(super) driver_features_page: u32,
    pub(super) accepted: u64,
    pub(super) queue_sizes: Vec<u16>,
    pub(super) selected_queue: u32,
    /// The driver's set-up; an active device owns queues made from it.
    pub(super) queues: Vec<Queue>,
    /// Queues kicked before the device was active, one bit each.
    pub(super) early_kicks: u64,
}

impl MmioTransport {
    /// Puts registers in front of `device`. It interrupts on `line`, which it
    /// holds high until the driver acknowledged: level-triggered, active high.
    pub fn new(device: Arc<Mutex<dyn VirtioDevice>>, ram: &GuestRam, line: IrqLine) -> Self {
        let (device_type, features, queue_sizes, bell) = {
            let device = lock(&device);
            (
                device.device_type(),
                device.features(),
                device.queue_sizes().to_vec(),
                device.bell(),
            )
        };
        let common = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;
        Self {
            device,
            bell,
            device_type,
            features: features | common,
            memory: ram.memory().clone(),
            interrupt: Interrupt::new(line),
            status: 0,
            device_features_page: 0,
            driver_features_page: 0,
            accepted: 0,
            queues: fresh_queues(&queue_sizes),
            queue_sizes,
            selected_queue: 0,
            early_kicks: 0,
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let Ok(offset) = u32::try_from(offset) else {
            return 0;
        };
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device_type as u32,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_page {
                0 => self.features as u32,
                1 => (self.features >> 32) as u32,
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |q| q.max_size().into()),
            reg::VIRTIO_MMIO_QUEUE_READY => self.queue().map_or(0, |q| q.ready().into()),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            reg::VIRTIO_MMIO_STATUS => self.status(),
            // §4.2.2: a region of shared memory that does not exist has length -1.
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let Ok(offset) = u32::try_from(offset) else {
            return;
        };
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_page = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_page = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.selected_queue = value,
            reg::VIRTIO_MMIO_QUEUE_NUM => {
                // Sizes beyond 16 bits are beyond every maximum.
                let size = u16::try_from(value).unwrap_or(0);
                self.set_up(|queue| queue.set_size(size));
            }
            reg::VIRTIO_MMIO_QUEUE_READY => self.set_up(|queue| queue.set_ready(value == 1)),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => {
                self.set_up(|queue| queue.set_desc_table_address(Some(value), None));
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                self.set_up(|queue| queue.set_desc_table_address(None, Some(value)));
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                self.set_up(|queue| queue.set_avail_ring_address(Some(value), None));
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                self.set_up(|queue| queue.set_avail_ring_address(None, Some(value)));
            }
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => {
                self.set_up(|queue| queue.set_used_ring_address(Some(value), None));
            }
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => {
                self.set_up(|queue| queue.set_used_ring_address(None, Some(value)));
            }
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => self.kick(value),
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => tracing::debug!(offset, value, "write to a virtio register that takes none"),
        }
    }

    fn status(&self) -> u32 {
        let needs_reset = if self.interrupt.wants_reset() {
            NEEDS_RESET
        } else {
            0
        };
        self.status | needs_reset
    }

    /// The one place where the state moves.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset_device();
            return;
        }
        // The device alone sets NEEDS_RESET; drivers write back what they read.
        let value = value & !NEEDS_RESET;
        if value == self.status || self.status & FAILED != 0 {
            return;
        }
        match (self.status, value) {
            (before, after) if after == before | FAILED => self.status = after,
            (0, ACKNOWLEDGE) | (ACKNOWLEDGE, DRIVER) => self.status = value,
            // §3.1.1: the driver reads back whether FEATURES_OK stayed. We do not
            // speak to legacy drivers.
            (DRIVER, FEATURES_OK) if self.accepted & feature::VERSION_1 != 0 => {
                self.status = value;
            }
            (FEATURES_OK, DRIVER_OK) => {
                self.status = value;
                self.activate();
            }
            (before, after) => {
                tracing::debug!(before, after, "virtio status does not move like that");
            }
        }
    }

    /// Accepted only between DRIVER and FEATURES_OK; what was not offered is
    /// masked out.
    fn accept_features(&mut self, value: u32) {
        if self.status != DRIVER {
            return;
        }
        let (shift, page) = match self.driver_features_page {
            0 => (0, 0xffff_ffff),
            1 => (32, 0xffff_ffff << 32),
            _ => return,
        };
        let bits = u64::from(value) << shift & self.features;
        self.accepted = self.accepted & !page | bits;
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.selected_queue).ok()?)
    }

    /// Changes the selected queue, while queues may be set up.
    fn set_up(&mut self, change: impl FnOnce(&mut Queue)) {
        if self.status != FEATURES_OK {
            return;
        }
        let selected = usize::try_from(self.selected_queue).ok();
        if let Some(queue) = selected.and_then(|index| self.queues.get_mut(index)) {
            change(queue);
        }
    }

    fn activate(&mut self) {
        let event_idx = self.accepted & feature::EVENT_IDX != 0;
        let in_use = lock(&self.device).queues_in_use(self.accepted);
        let mut queues = Vec::with_capacity(self.queues.len());
        for queue in self.queues.iter().take(in_use) {
            let copy = Queue::try_from(queue.state())
                .ok()
                .filter(|q| q.is_valid(&self.memory) && is_reachable(q, &self.memory));
            let Some(mut ring) = copy else {
                tracing::warn!(device = ?self.device_type, "driver is ready but a queue is not");
                self.interrupt.needs_reset();
                return;
            };
            ring.set_event_idx(event_idx);
            queues.push(VirtQueue::new(ring, self.interrupt.clone()));
        }
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features: self.accepted,
        };
        let activated = lock(&self.device).activate(activation);
        if let Err(error) = activated {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(device = ?self.device_type, %error, cause, "device did not start");
            self.interrupt.needs_reset();
            return;
        }
        let kicks = std::mem::take(&mut self.early_kicks);
        for queue in (0..self.queues.len().min(64)).filter(|queue| kicks & (1 << queue) != 0) {
            self.kick(queue as u32);
        }
    }

    fn kick(&mut self, queue: u32) {
        let Some(queue) = u16::try_from(queue)
            .ok()
            .filter(|&q| usize::from(q) < self.queues.len())
        else {
            return;
        };
        if self.status != DRIVER_OK {
            if self.status & FAILED == 0 && queue < 64 {
                self.early_kicks |= 1 << queue;
            }
            return;
        }
        if self.interrupt.wants_reset() {
            return;
        }
        let served = match (self.device.try_lock(), &self.bell) {
            (Ok(mut device), _) => device.notify(queue),
            (Err(TryLockError::Poisoned(device)), _) => device.into_inner().notify(queue),
            (Err(TryLockError::WouldBlock), Some(bell)) => {
                bell.ring();
                Ok(())
            }
            (Err(TryLockError::WouldBlock), None) => lock(&self.device).notify(queue),
        };
        if let Err(error) = served {
            self.give_up(queue, &error);
        }
    }

    /// The device, if it works: its queues were kicked by other ways than a store that
    /// arrived here, nobody knows which.
    pub(super) fn rung(&mut self) -> Option<Arc<Mutex<dyn VirtioDevice>>> {
        if self.status == DRIVER_OK {
            return (!self.interrupt.wants_reset()).then(|| self.device.clone());
        }
        if self.status & FAILED == 0 {
            let queues = self.queues.len().min(64);
            self.early_kicks |= (0..queues).fold(0, |bits, queue| bits | 1 << queue);
        }
        None
    }

    /// The driver broke a ring.
    pub(super) fn give_up(&self, queue: u16, error: &QueueError) {
        // It may have been reset meanwhile.
        if self.status == DRIVER_OK {
            tracing::warn!(device = ?self.device_type, queue, %error, "device needs a reset");
            self.interrupt.needs_reset();
        }
    }

    fn reset_device(&mut self) {
        lock(&self.device).reset();
        self.interrupt.reset();
        self.status = 0;
        self.device_features_page = 0;
        self.driver_features_page = 0;
        self.accepted = 0;
        self.selected_queue = 0;
        self.queues = fresh_queues(&self.queue_sizes);
        self.early_kicks = 0;
    }
}

impl MmioDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let config = u64::from(reg::VIRTIO_MMIO_CONFIG);
        if let Some(at) = offset.checked_sub(config) {
            lock(&self.device).read_config(at, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            // §4.2.2.2: registers are accessed by aligned 32-bit loads and stores.
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let config = u64::from(reg::VIRTIO_MMIO_CONFIG);
        if let Some(at) = offset.checked_sub(config) {
            if self.status & VIRTIO_CONFIG_S_DRIVER != 0 && self.status & FAILED == 0 {
                lock(&self.device).write_config(at, data);
            }
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

impl Lifecycle for MmioTransport {
    /// Devices finish each request inside of the call that brought it, so that
    /// nothing is in flight once vCPUs and event loop stand still.
    fn pause(&mut self) {}

    /// Serves requests whose kick may have been lost while standing still.
    fn resume(&mut self) {
        if self.status == DRIVER_OK {
            for queue in 0..self.queues.len() {
                self.kick(queue as u32);
            }
        }
    }

    fn reset(&mut self) {
        self.reset_device();
    }
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device_type", &self.device_type)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

/// A device is consistent between calls even if one panicked.
pub(super) fn lock(device: &Mutex<dyn VirtioDevice>) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the rings lie in memory that the guest may reach now: not all that is mapped
/// may be, nor be written.
fn is_reachable(queue: &Queue, memory: &GuestMemory) -> bool {
    let size = usize::from(queue.size());
    let reach = |at, len, write| {
        memory
            .get_slice(Gpa(at), len)
            .is_ok_and(|ring| ring.bitmap().allows(len, write))
    };
    reach(queue.desc_table(), 16 * size, false)
        && reach(queue.avail_ring(), 6 + 2 * size, false)
        && reach(queue.used_ring(), 6 + 8 * size, true)
}

fn fresh_queues(sizes: &[u16]) -> Vec<Queue> {
    // Devices name powers of two; what is not becomes a queue of one entry.
    sizes
        .iter()
        .map(|&size| Queue::new(size).unwrap_or_default())
        .collect()
}
