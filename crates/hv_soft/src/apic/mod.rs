//! Interrupt controllers: a local APIC per vCPU, owned by its thread, and what all
//! threads share: the IOAPIC and the inboxes between it and the vCPUs.
//!
//! ```text
//! device ─set_line─▶ IoApic ─message─▶ Inbox ─ring─▶ vCPU ─▶ LocalApic ─▶ IDT
//!                      ▲                                        │
//!                      └──────────── EOI of level interrupts ───┘
//! ```

pub(crate) mod ioapic;
pub(crate) mod local;
mod vectors;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hv::Interrupts;

use crate::doorbell::{Doorbell, INTERRUPT};
use ioapic::{IoApic, Message};
pub(crate) use vectors::Vectors;

/// Interrupts on the way to one vCPU.
#[derive(Default)]
pub(crate) struct Inbox {
    requested: [AtomicU32; 8],
    level: [AtomicU32; 8],
    nmi: AtomicBool,
}

impl Inbox {
    fn put(&self, vector: u8, level: bool) {
        let (word, bit) = (usize::from(vector / 32), 1 << (vector % 32));
        if level {
            self.level[word].fetch_or(bit, Ordering::SeqCst);
        } else {
            self.level[word].fetch_and(!bit, Ordering::SeqCst);
        }
        self.requested[word].fetch_or(bit, Ordering::SeqCst);
    }

    /// Calls `f` with (vector, level) of everything that came, and takes it.
    pub(crate) fn drain(&self, f: impl FnMut(u8, bool)) {
        self.each(|requested| requested.swap(0, Ordering::SeqCst), f);
    }

    /// As `drain`, but everything stays.
    pub(crate) fn peek(&self, f: impl FnMut(u8, bool)) {
        self.each(|requested| requested.load(Ordering::SeqCst), f);
    }

    fn each(&self, take: impl Fn(&AtomicU32) -> u32, mut f: impl FnMut(u8, bool)) {
        for (word, requested) in self.requested.iter().enumerate() {
            if requested.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut left = take(requested);
            let level = self.level[word].load(Ordering::SeqCst);
            while left != 0 {
                let bit = left.trailing_zeros();
                left &= left - 1;
                f((word as u32 * 32 + bit) as u8, level >> bit & 1 != 0);
            }
        }
    }

    /// Whether an NMI waits.
    pub(crate) fn nmi(&self) -> bool {
        self.nmi.load(Ordering::SeqCst)
    }

    /// Whether an NMI came; it is taken.
    pub(crate) fn take_nmi(&self) -> bool {
        self.nmi.swap(false, Ordering::SeqCst)
    }
}

/// What all threads share of a machine's interrupt controllers.
pub(crate) struct Chips {
    ioapic: Mutex<IoApic>,
    cpus: Vec<(Inbox, Arc<Doorbell>)>,
}

impl Chips {
    pub(crate) fn new(doorbells: Vec<Arc<Doorbell>>) -> Self {
        let cpus = doorbells
            .into_iter()
            .map(|bell| (Inbox::default(), bell))
            .collect();
        Self {
            ioapic: Mutex::new(IoApic::new()),
            cpus,
        }
    }

    pub(crate) fn inbox(&self, cpu: usize) -> Option<&Inbox> {
        self.cpus.get(cpu).map(|(inbox, _)| inbox)
    }

    pub(crate) fn ioapic(&self) -> MutexGuard<'_, IoApic> {
        self.ioapic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest's store to the IOAPIC.
    pub(crate) fn ioapic_write(&self, at: u64, value: u32) {
        if let Some(vector) = ioapic::ends(at, value) {
            return self.end_of_interrupt(vector);
        }
        let message = self.ioapic().write(at, value);
        self.send(message);
    }

    /// The end of a level-triggered interrupt.
    pub(crate) fn end_of_interrupt(&self, vector: u8) {
        let messages = self.ioapic().end_of_interrupt(vector);
        for message in messages {
            self.send(Some(message));
        }
    }

    fn send(&self, message: Option<Message>) {
        let Some(message) = message else { return };
        for (id, (inbox, bell)) in self.cpus.iter().enumerate() {
            if !message.reaches(id as u32) {
                continue;
            }
            match message.delivery {
                ioapic::FIXED | ioapic::LOWEST => inbox.put(message.vector, message.level),
                ioapic::NMI => inbox.nmi.store(true, Ordering::SeqCst),
                // SMI, INIT and ExtINT: nobody sends them by an IOAPIC here.
                _ => continue,
            }
            bell.ring(INTERRUPT);
            if message.delivery == ioapic::LOWEST {
                return;
            }
        }
    }
}

impl Interrupts for Chips {
    fn set_line(&self, gsi: u32, high: bool) {
        let message = self.ioapic().set_line(gsi, high);
        self.send(message);
    }
}
