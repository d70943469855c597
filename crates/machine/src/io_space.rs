//! The guest's ports and memory-mapped registers, as the engines see them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bus::{Bus, BusError, MmioDevice, PioDevice};
use ram::Gpa;
use virtio::Counted;

/// Every device by its addresses. Reads that nobody answers are all ones.
#[derive(Default)]
pub(crate) struct IoSpace {
    pio: Bus<Arc<Mutex<dyn PioDevice>>>,
    mmio: Bus<Arc<Mutex<dyn MmioDevice>>>,
    counters: Arc<Counters>,
}

/// Accesses of the guest, by Firecracker's names (its metrics' group `vcpu`).
#[derive(Debug, Default)]
pub(crate) struct Counters {
    exit_io_in: AtomicU64,
    exit_io_out: AtomicU64,
    exit_mmio_read: AtomicU64,
    exit_mmio_write: AtomicU64,
}

impl Counted for Counters {
    fn counts(&self) -> Vec<(&'static str, u64)> {
        let all = [
            ("exit_io_in", &self.exit_io_in),
            ("exit_io_out", &self.exit_io_out),
            ("exit_mmio_read", &self.exit_mmio_read),
            ("exit_mmio_write", &self.exit_mmio_write),
        ];
        all.map(|(name, n)| (name, n.load(Ordering::Relaxed)))
            .into()
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl IoSpace {
    /// Places `device` at `ports` ports from `first`.
    pub(crate) fn add_pio(
        &mut self,
        first: u16,
        ports: u64,
        device: Arc<Mutex<dyn PioDevice>>,
    ) -> Result<(), BusError> {
        self.pio.insert(u64::from(first), ports, device)
    }

    /// Places `device` at `len` bytes from `start`.
    pub(crate) fn add_mmio(
        &mut self,
        start: u64,
        len: u64,
        device: Arc<Mutex<dyn MmioDevice>>,
    ) -> Result<(), BusError> {
        self.mmio.insert(start, len, device)
    }

    /// What is counted.
    pub(crate) fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn port(&self, port: u16) -> Option<(u16, MutexGuard<'_, dyn PioDevice + 'static>)> {
        let (offset, device) = self.pio.find(u64::from(port))?;
        Some((u16::try_from(offset).ok()?, lock(device)))
    }

    fn register(&self, at: Gpa) -> Option<(u64, MutexGuard<'_, dyn MmioDevice + 'static>)> {
        let (offset, device) = self.mmio.find(at.0)?;
        Some((offset, lock(device)))
    }
}

impl hv::Io for IoSpace {
    fn mmio_read(&self, at: Gpa, data: &mut [u8]) {
        count(&self.counters.exit_mmio_read);
        match self.register(at) {
            Some((offset, mut device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, at: Gpa, data: &[u8]) {
        count(&self.counters.exit_mmio_write);
        if let Some((offset, mut device)) = self.register(at) {
            device.write(offset, data);
        }
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        count(&self.counters.exit_io_in);
        match self.port(port) {
            Some((offset, mut device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        count(&self.counters.exit_io_out);
        if let Some((offset, mut device)) = self.port(port) {
            device.write(offset, data);
        }
    }
}

/// A device that panicked while locked is left as it was: other devices go on.
pub(crate) fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
