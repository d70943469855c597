//! The VM clock page: how often the guest's time was disrupted, and how often the
//! machine was copied, in a page that user space can map (Linux,
//! include/uapi/linux/vmclock-abi.h; drivers/ptp/ptp_vmclock.c from 6.13 on).
//!
//! ```text
//! seq_count odd ──▶ disruption_marker, vm_generation_counter ──▶ seq_count even
//! ```
//!
//! Invariant: a reader that finds the same even sequence before and after has read
//! fields of one moment.
//!
//! Deliberately absent, as in Firecracker: the relation of a counter to real time. The
//! page says that it is not known.

use std::sync::atomic::Ordering;

use bus::IrqLine;
use ram::{Gpa, GuestMemory};
use serde::{Deserialize, Serialize};
use vm_memory::Bytes;

use crate::Error;

/// Bytes of the page. Its address is a multiple of it.
pub const VMCLOCK_LEN: u64 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"VCLK");
const VERSION: u16 = 1;
/// VMCLOCK_COUNTER_INVALID: no counter is related to time.
const COUNTER_INVALID: u8 = 0xff;
/// VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT, VMCLOCK_FLAG_NOTIFICATION_PRESENT.
const FLAGS: u64 = 1 << 8 | 1 << 9;

/// Offsets in `struct vmclock_abi`; what is not written is zero, and zero in
/// `clock_status` (34) is VMCLOCK_STATUS_UNKNOWN.
mod offset {
    pub(super) const MAGIC: u64 = 0;
    pub(super) const SIZE: u64 = 4;
    pub(super) const VERSION: u64 = 8;
    pub(super) const COUNTER_ID: u64 = 10;
    pub(super) const SEQ_COUNT: u64 = 12;
    pub(super) const DISRUPTION_MARKER: u64 = 16;
    pub(super) const FLAGS: u64 = 24;
    pub(super) const VM_GENERATION_COUNTER: u64 = 104;
}

/// A VM clock page.
#[derive(Debug)]
pub struct VmClock {
    memory: GuestMemory,
    at: Gpa,
    event: IrqLine,
    sequence: u32,
    disruptions: u64,
    generation: u64,
}

/// What a snapshot keeps of a [`VmClock`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedVmClock {
    /// Guest-physical address of the page.
    pub at: u64,
    /// `seq_count`, even.
    pub sequence: u32,
    /// `disruption_marker`.
    pub disruptions: u64,
    /// `vm_generation_counter`.
    pub generation: u64,
}

impl VmClock {
    /// Writes the page of a new machine to `at`. Each pulse of `event`, an edge-triggered
    /// line, is to notify the guest's ACPI device.
    ///
    /// # Errors
    /// [`Error::GuestMemory`].
    pub fn new(memory: &GuestMemory, at: Gpa, event: IrqLine) -> Result<Self, Error> {
        let saved = SavedVmClock {
            at: at.0,
            sequence: 0,
            disruptions: 0,
            generation: 0,
        };
        let clock = Self::restore(memory, event, &saved);
        clock.put(offset::MAGIC, MAGIC)?;
        clock.put(offset::SIZE, VMCLOCK_LEN as u32)?;
        clock.put(offset::VERSION, VERSION)?;
        clock.put(offset::COUNTER_ID, COUNTER_INVALID)?;
        clock.put(offset::FLAGS, FLAGS)?;
        Ok(clock)
    }

    /// The page of a machine that goes on from a snapshot; it is in guest memory
    /// already.
    #[must_use]
    pub fn restore(memory: &GuestMemory, event: IrqLine, saved: &SavedVmClock) -> Self {
        Self {
            memory: memory.clone(),
            at: Gpa(saved.at),
            event,
            sequence: saved.sequence & !1,
            disruptions: saved.disruptions,
            generation: saved.generation,
        }
    }

    /// What a snapshot is to keep.
    pub fn save(&self) -> SavedVmClock {
        SavedVmClock {
            at: self.at.0,
            sequence: self.sequence,
            disruptions: self.disruptions,
            generation: self.generation,
        }
    }

    /// Counts one disruption and one generation, and notifies the guest.
    ///
    /// # Errors
    /// [`Error::GuestMemory`]; the guest is not notified then.
    pub fn bump(&mut self) -> Result<(), Error> {
        let disruptions = self.disruptions.wrapping_add(1);
        let generation = self.generation.wrapping_add(1);
        self.put(offset::SEQ_COUNT, self.sequence | 1)?;
        self.put(offset::DISRUPTION_MARKER, disruptions)?;
        self.put(offset::VM_GENERATION_COUNTER, generation)?;
        self.put(offset::SEQ_COUNT, self.sequence.wrapping_add(2))?;
        self.sequence = self.sequence.wrapping_add(2);
        self.disruptions = disruptions;
        self.generation = generation;
        self.event.pulse();
        Ok(())
    }

    /// Every store is a release on a host that keeps stores in order: readers see them
    /// as they are written here. The compiler keeps sequentially consistent ones apart.
    fn put<T: vm_memory::AtomicAccess>(&self, offset: u64, value: T) -> Result<(), Error> {
        let at = Gpa(self.at.0.wrapping_add(offset));
        self.memory
            .store(value, at, Ordering::SeqCst)
            .map_err(|source| Error::GuestMemory {
                device: "VMClock",
                source,
            })
    }
}

#[cfg(test)]
mod tests {
    use ram::{ByteSize, GuestRam};

    use super::*;

    const AT: u64 = 0x3000;

    fn quad(ram: &GuestRam, offset: u64) -> u64 {
        ram.memory().read_obj(Gpa(AT + offset)).unwrap()
    }

    fn line() -> (IrqLine, std::sync::mpsc::Receiver<bool>) {
        let (sender, receiver) = std::sync::mpsc::channel();
        (
            IrqLine::new(move |high| sender.send(high).unwrap()),
            receiver,
        )
    }

    #[test]
    fn the_page_of_a_new_machine_says_what_it_has_and_what_it_does_not_know() {
        let ram = GuestRam::new(ByteSize::mib(1)).unwrap();
        let (event, events) = line();
        let clock = VmClock::new(ram.memory(), Gpa(AT), event).unwrap();
        let mut head = [0; 36];
        ram.memory().read_slice(&mut head, Gpa(AT)).unwrap();
        assert_eq!(&head[..12], b"VCLK\x00\x10\x00\x00\x01\x00\xff\x00");
        assert_eq!(head[12..24], [0; 12]);
        assert_eq!(quad(&ram, 24), 0x300);
        assert_eq!(head[34], 0, "clock_status: unknown");
        assert_eq!(clock.save().generation, 0);
        assert!(events.try_recv().is_err());
    }

    #[test]
    fn a_bump_counts_both_and_leaves_an_even_sequence() {
        let ram = GuestRam::new(ByteSize::mib(1)).unwrap();
        let (event, events) = line();
        let saved = VmClock::new(ram.memory(), Gpa(AT), event).unwrap().save();
        assert!(events.try_recv().is_err());
        let (event, events) = line();
        let mut clock = VmClock::restore(ram.memory(), event, &saved);
        for n in 1..=2_u64 {
            clock.bump().unwrap();
            let sequence: u32 = ram.memory().read_obj(Gpa(AT + 12)).unwrap();
            assert_eq!(u64::from(sequence), 2 * n);
            assert_eq!((quad(&ram, 16), quad(&ram, 104)), (n, n));
            assert_eq!([events.recv(), events.recv()], [Ok(true), Ok(false)]);
        }
        let saved = clock.save();
        assert_eq!(
            (saved.sequence, saved.disruptions, saved.generation),
            (4, 2, 2)
        );
    }

    #[test]
    fn an_address_without_memory_is_an_error_and_no_event() {
        let ram = GuestRam::new(ByteSize::mib(1)).unwrap();
        let (event, events) = line();
        assert!(VmClock::new(ram.memory(), Gpa(1 << 40), event).is_err());
        assert!(events.try_recv().is_err());
    }
}
