//! Interrupt controllers: a local APIC per vCPU, owned by its thread, and what all
//! threads share: the IOAPIC and the inboxes between it and the vCPUs.
//!
//! ```text
//! device ─set_line─▶ IoApic ─message─▶ Inbox ─ring─▶ vCPU ─▶ LocalApic ─▶ IDT
//!                      ▲                 ▲                      │
//!                      └─ EOI of level ──┼──────────────────────┤
//!                         interrupts     └── interrupts between CPUs
//! ```

pub(crate) mod ioapic;
pub(crate) mod local;
pub(crate) mod message;
mod vectors;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hv::Interrupts;

use crate::doorbell::{Doorbell, INTERRUPT};
use ioapic::IoApic;
use message::{Address, Message};
pub(crate) use vectors::Vectors;

/// Interrupts on the way to one vCPU.
#[derive(Default)]
pub(crate) struct Inbox {
    requested: [AtomicU32; 8],
    level: [AtomicU32; 8],
    nmi: AtomicBool,
    /// [`INIT_WAITS`], or [`START_WAITS`] and the page.
    startup: AtomicU32,
    /// What the vCPU's APIC answers to, as [`Address::pack`] has it.
    address: AtomicU32,
}

const INIT_WAITS: u32 = 1 << 31;
const START_WAITS: u32 = 1 << 30;

/// What came of INIT and start-up interrupts, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Startup {
    pub(crate) init: bool,
    /// The page to start at.
    pub(crate) start: Option<u8>,
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

    fn put_init(&self) {
        // A start-up interrupt from before it is of no consequence any more.
        self.startup.store(INIT_WAITS, Ordering::SeqCst);
    }

    fn put_start(&self, page: u8) {
        let start = START_WAITS | u32::from(page);
        let _ = self
            .startup
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |waits| {
                Some(waits & INIT_WAITS | start)
            });
    }

    /// INIT and start-up interrupts that came; they are taken.
    pub(crate) fn take_startup(&self) -> Startup {
        if self.startup.load(Ordering::Relaxed) == 0 {
            return Startup::default();
        }
        let waits = self.startup.swap(0, Ordering::SeqCst);
        Startup {
            init: waits & INIT_WAITS != 0,
            start: (waits & START_WAITS != 0).then_some(waits as u8),
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
    /// Where the search for a lowest-priority destination begins.
    turn: AtomicUsize,
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
            turn: AtomicUsize::new(0),
        }
    }

    /// vCPU `cpu`'s APIC answers to `address` from now on.
    pub(crate) fn set_address(&self, cpu: usize, address: Address) {
        if let Some(inbox) = self.inbox(cpu) {
            inbox.address.store(address.pack(), Ordering::SeqCst);
        }
    }

    /// Whether something is on the way that wakes a vCPU without interrupts.
    pub(crate) fn wakes_somebody(&self) -> bool {
        self.cpus
            .iter()
            .any(|(inbox, _)| inbox.nmi() || inbox.startup.load(Ordering::SeqCst) != 0)
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
        self.send(message, None);
    }

    /// The end of a level-triggered interrupt.
    pub(crate) fn end_of_interrupt(&self, vector: u8) {
        let messages = self.ioapic().end_of_interrupt(vector);
        for message in messages {
            self.send(Some(message), None);
        }
    }

    /// Delivers a message of the IOAPIC, or of the vCPU `from`.
    pub(crate) fn send(&self, message: Option<Message>, from: Option<u32>) {
        let Some(message) = message else { return };
        let count = self.cpus.len();
        // All that run have the same priority as far as others know: each in turn.
        let first = if message.delivery == message::LOWEST {
            self.turn.fetch_add(1, Ordering::Relaxed) % count
        } else {
            0
        };
        for id in (first..count).chain(0..first) {
            let (inbox, bell) = &self.cpus[id];
            let address = Address::unpack(inbox.address.load(Ordering::SeqCst));
            if !message.reaches(id as u32, address, from) {
                continue;
            }
            match message.delivery {
                message::FIXED | message::LOWEST => inbox.put(message.vector, message.level),
                message::NMI => inbox.nmi.store(true, Ordering::SeqCst),
                message::INIT => inbox.put_init(),
                message::START_UP => inbox.put_start(message.vector),
                // SMI and ExtINT: there is nothing behind them here.
                _ => continue,
            }
            bell.ring(INTERRUPT);
            if message.delivery == message::LOWEST {
                return;
            }
        }
    }
}

impl Interrupts for Chips {
    fn set_line(&self, gsi: u32, high: bool) {
        let message = self.ioapic().set_line(gsi, high);
        self.send(message, None);
    }
}
