//! What a virtio device is to its transport and to the event loop.

use std::os::fd::BorrowedFd;

use ram::GuestMemory;

use crate::{Bell, Error, Interrupt, QueueError, SavedDevice, VirtQueue};

/// Device-independent feature bits (virtio 1.2 §6).
pub mod feature {
    /// VIRTIO_F_INDIRECT_DESC: descriptors may point at tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX: both sides say when they next want to be notified.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1: not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Device identifiers (virtio 1.2 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceType {
    /// A network interface.
    Net = 1,
    /// A disk.
    Block = 2,
    /// A source of random bytes.
    Rng = 4,
    /// Memory that the guest gives up.
    Balloon = 5,
    /// Sockets between host and guest.
    Vsock = 19,
    /// Memory that is plugged.
    Mem = 24,
    /// A file in the guest's address space.
    Pmem = 27,
}

/// What a device works with once its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// The machine's memory.
    pub memory: GuestMemory,
    /// One per queue of [`VirtioDevice::queues_in_use`], checked to lie in memory.
    pub queues: Vec<VirtQueue>,
    /// The device's interrupt.
    pub interrupt: Interrupt,
    /// Feature bits that both sides agreed on.
    pub features: u64,
}

/// A virtio device behind any transport. The transport holds the device's mutex
/// during each call; calls come from vCPU threads.
pub trait VirtioDevice: Send {
    /// Which device it is.
    fn device_type(&self) -> DeviceType;

    /// The device-specific feature bits it offers; the transport adds those of
    /// [`feature`].
    fn features(&self) -> u64;

    /// Largest number of entries of each queue: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// How many of the queues, from the first, a driver sets up that accepted
    /// `features`; all by default.
    fn queues_in_use(&self, _features: u64) -> usize {
        self.queue_sizes().len()
    }

    /// Fills `data` from its configuration space; zeros beyond the end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes a store into its configuration space. Read-only by default.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready (DRIVER_OK).
    ///
    /// # Errors
    /// [`Error::Host`]; the transport then asks the driver for a reset.
    fn activate(&mut self, activation: Activation) -> Result<(), Error>;

    /// The driver put buffers into `queue`. The work is done before it returns
    /// where it can be. Ignored while not active.
    ///
    /// # Errors
    /// When the ring is broken; the transport then asks the driver for a reset.
    fn notify(&mut self, queue: u16) -> Result<(), QueueError>;

    /// What is rung in place of [`VirtioDevice::notify`] while another thread works with
    /// the device, so that no vCPU waits for it; the event loop then looks at all queues.
    /// A device without one is waited for.
    fn bell(&self) -> Option<Bell> {
        None
    }

    /// Forgets the driver: back to the state at power-on.
    fn reset(&mut self);

    /// What a snapshot is to keep. Nobody uses the device meanwhile.
    ///
    /// # Errors
    /// [`Error::Saved`]: the driver broke its ring, and was not told yet.
    fn save(&mut self) -> Result<SavedDevice, Error>;

    /// Makes this device, new and made from the same settings, the one that was saved.
    /// `memory` is as it was then; `interrupt` is the transport's. May replace the
    /// descriptor of [`EventSource::fd`].
    ///
    /// # Errors
    /// [`Error::Saved`] where that cannot be; [`Error::Host`].
    fn restore(
        &mut self,
        saved: &SavedDevice,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error>;
}

/// A device that also gets work from the host, by way of one descriptor that is
/// readable whenever there is some (an epoll descriptor, if it has many).
///
/// The event loop adds [`EventSource::fd`] to its poll set level-triggered, once,
/// for as long as the device lives; it locks the device for each call.
pub trait EventSource: Send {
    /// The descriptor to poll for input. The same one every time.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Does the work that made [`EventSource::fd`] readable. Never waits.
    fn on_event(&mut self);
}

/// Reads `data` from a configuration space; zeros beyond its end.
pub(crate) fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let from = usize::try_from(offset)
        .ok()
        .and_then(|at| config.get(at..))
        .unwrap_or_default();
    for (to, from) in data.iter_mut().zip(from) {
        *to = *from;
    }
}
