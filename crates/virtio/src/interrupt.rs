//! A device's interrupt: the status that the driver reads, then the line.
//!
//! Invariant: the line is high exactly while the interrupt status is not zero;
//! the status is set before the line rises.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bus::IrqLine;
use serde::{Deserialize, Serialize};

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

/// What a snapshot keeps of an interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedInterrupt {
    /// What the driver has not acknowledged.
    pub status: u32,
    /// How often the configuration changed.
    pub config_generation: u32,
    /// The device gave up until it is reset.
    pub needs_reset: bool,
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

    /// What a snapshot is to keep.
    pub(crate) fn save(&self) -> SavedInterrupt {
        SavedInterrupt {
            status: self.status(),
            config_generation: self.config_generation(),
            needs_reset: self.wants_reset(),
        }
    }

    /// Is as it was saved, and drives its line accordingly. `None` where it cannot have
    /// been like that.
    pub(crate) fn restore(&self, saved: &SavedInterrupt) -> Option<()> {
        if saved.status & !(USED_BUFFER | CONFIG_CHANGE) != 0 {
            return None;
        }
        let shared = &self.shared;
        let generation = &shared.config_generation;
        generation.store(saved.config_generation, Ordering::SeqCst);
        let mut status = self.lock();
        *status = saved.status;
        shared.line.set(saved.status != 0);
        shared
            .needs_reset
            .store(saved.needs_reset, Ordering::SeqCst);
        Some(())
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
