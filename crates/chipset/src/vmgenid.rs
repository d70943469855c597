//! The generation identifier: 16 random bytes in guest memory that change whenever a
//! machine goes on from a snapshot, and an event that says so (Microsoft, "Virtual
//! Machine Generation ID"; Linux, drivers/virt/vmgenid.c reseeds its random numbers).
//!
//! Invariant: what the guest finds at the identifier's address was never seen by any
//! other guest, from the moment [`VmGenId::new`] or [`VmGenId::bump`] returned.
//!
//! Left to others: the ACPI device that names address and event (`machine`).

use bus::IrqLine;
use ram::{Gpa, GuestMemory};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use vm_memory::Bytes;

use crate::Error;

/// Bytes of an identifier. Its address is a multiple of 8.
pub const VMGENID_LEN: u64 = 16;

/// A generation identifier.
#[derive(Debug)]
pub struct VmGenId {
    memory: GuestMemory,
    at: Gpa,
    event: IrqLine,
    id: [u8; VMGENID_LEN as usize],
}

/// What a snapshot keeps of a [`VmGenId`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedVmGenId {
    /// Guest-physical address of the identifier.
    pub at: u64,
    /// The identifier that the guest has seen.
    pub id: [u8; VMGENID_LEN as usize],
}

impl VmGenId {
    /// Writes a fresh identifier to `at`. Each pulse of `event`, an edge-triggered line,
    /// is to notify the guest's ACPI device.
    ///
    /// # Errors
    /// [`Error::Random`], [`Error::GuestMemory`].
    pub fn new(memory: &GuestMemory, at: Gpa, event: IrqLine) -> Result<Self, Error> {
        let mut device = Self {
            memory: memory.clone(),
            at,
            event,
            id: [0; VMGENID_LEN as usize],
        };
        device.renew()?;
        Ok(device)
    }

    /// The device of a machine that goes on from a snapshot. Its identifier is the old
    /// one until [`VmGenId::bump`].
    #[must_use]
    pub fn restore(memory: &GuestMemory, event: IrqLine, saved: &SavedVmGenId) -> Self {
        Self {
            memory: memory.clone(),
            at: Gpa(saved.at),
            event,
            id: saved.id,
        }
    }

    /// What a snapshot is to keep.
    pub fn save(&self) -> SavedVmGenId {
        SavedVmGenId {
            at: self.at.0,
            id: self.id,
        }
    }

    /// Replaces the identifier and notifies the guest.
    ///
    /// # Errors
    /// As [`VmGenId::new`]; the guest is not notified then.
    pub fn bump(&mut self) -> Result<(), Error> {
        self.renew()?;
        self.event.pulse();
        Ok(())
    }

    fn renew(&mut self) -> Result<(), Error> {
        let mut id = [0; VMGENID_LEN as usize];
        // Reads of up to 256 bytes are neither short nor interrupted (getrandom(2)).
        getrandom(&mut id, GetRandomFlags::empty()).map_err(|errno| Error::Random {
            source: errno.into(),
        })?;
        self.memory
            .write_slice(&id, self.at)
            .map_err(|source| Error::GuestMemory {
                device: "VMGenID",
                source,
            })?;
        self.id = id;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use ram::{ByteSize, GuestRam};

    use super::*;

    const AT: Gpa = Gpa(0x1000);

    fn line() -> (IrqLine, Arc<AtomicU32>) {
        let rises = Arc::new(AtomicU32::new(0));
        let counter = rises.clone();
        let count = move |high| {
            counter.fetch_add(u32::from(high), Ordering::SeqCst);
        };
        (IrqLine::new(count), rises)
    }

    fn id(ram: &GuestRam) -> [u8; 16] {
        ram.memory().read_obj(AT).unwrap()
    }

    #[test]
    fn each_bump_is_a_new_identifier_and_one_event() {
        let ram = GuestRam::new(ByteSize::mib(1)).unwrap();
        let (event, rises) = line();
        let mut device = VmGenId::new(ram.memory(), AT, event).unwrap();
        let first = id(&ram);
        assert_ne!(first, [0; 16]);
        assert_eq!(
            rises.load(Ordering::SeqCst),
            0,
            "a new machine has seen none"
        );
        device.bump().unwrap();
        assert_ne!(id(&ram), first);
        assert_eq!(device.save().id, id(&ram));
        assert_eq!(rises.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_restored_machine_keeps_its_identifier_until_it_is_bumped() {
        let ram = GuestRam::new(ByteSize::mib(1)).unwrap();
        let saved = VmGenId::new(ram.memory(), AT, line().0).unwrap().save();
        let (event, rises) = line();
        let mut device = VmGenId::restore(ram.memory(), event, &saved);
        assert_eq!(device.save(), saved);
        device.bump().unwrap();
        assert_ne!(id(&ram), saved.id);
        assert_eq!(rises.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn an_address_without_memory_is_an_error_and_no_event() {
        let ram = GuestRam::new(ByteSize::mib(1)).unwrap();
        let (event, rises) = line();
        let saved = SavedVmGenId {
            at: 1 << 40,
            id: [1; 16],
        };
        let mut device = VmGenId::restore(ram.memory(), event, &saved);
        assert!(matches!(device.bump(), Err(Error::GuestMemory { .. })));
        assert_eq!((device.save(), rises.load(Ordering::SeqCst)), (saved, 0));
    }
}
