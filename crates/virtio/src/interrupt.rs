//! A device's interrupt: the status that the driver reads, then the line.
//!
//! Invariant: the line is high exactly while the interrupt status is not zero;
//! the status is set before the line rises.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bus::IrqLine;

/// virtio 1.2 §4.2.2, InterruptStatus: a used buffer.
const USED_BUFFER: u32 = 1;
/// The same: a change of configuration.
const CONFIG_CHANGE: u32 = 2;

/// Interrupts one device's driver. Clones are handles of the same interrupt.
#[derive(Clone, Debug)]
pub struct Interrupt {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    line: IrqLine,
    status: Mutex<u32>,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
}

impl Interrupt {
    /// An interrupt on `line`, with nothing pending.
    pub fn new(line: IrqLine) -> Self {
        Self {
            shared: Arc::new(Shared {
                line,
                status: Mutex::new(0),
                config_generation: AtomicU32::new(0),
                needs_reset: AtomicBool::new(false),
            }),
        }
    }

    /// Says that buffers were used.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Says that the configuration space changed.
    pub fn config_changed(&self) {
        self.shared.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }

    /// Says that the device gave up until it is reset (virtio 1.2 §2.1.2).
    pub fn needs_reset(&self) {
        if !self.shared.needs_reset.swap(true, Ordering::SeqCst) {
            self.raise(CONFIG_CHANGE);
        }
    }

    pub(crate) fn wants_reset(&self) -> bool {
        self.shared.needs_reset.load(Ordering::SeqCst)
    }

    pub(crate) fn status(&self) -> u32 {
        *self.lock()
    }

    pub(crate) fn config_generation(&self) -> u32 {
        self.shared.config_generation.load(Ordering::SeqCst)
    }

    /// Clears the bits that the driver names, and no others.
    pub(crate) fn acknowledge(&self, bits: u32) {
        let mut status = self.lock();
        let before = *status;
        *status &= !bits;
        if before != 0 && *status == 0 {
            self.shared.line.set(false);
        }
    }

    /// Back to nothing pending.
    pub(crate) fn reset(&self) {
        self.shared.needs_reset.store(false, Ordering::SeqCst);
        self.acknowledge(u32::MAX);
    }

    fn raise(&self, bits: u32) {
        // The lock spans the line, so that a concurrent acknowledgement cannot
        // lower it after it was raised.
        let mut status = self.lock();
        let before = *status;
        *status |= bits;
        if before == 0 {
            self.shared.line.set(true);
        }
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.shared
            .status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
