//! What a snapshot keeps of a machine besides its memory, both ways.
//!
//! ```text
//! save:     vCPUs, event loop, drives' threads held ─▶ devices locked: state ─▶ shared
//!           ─▶ each vCPU ─▶ devices unlocked ─▶ memory ─▶ all let go
//! restore:  new devices ─▶ shared ─▶ vCPU 0, 1, … ─▶ devices: state, lines ─▶ new generation
//! ```
//!
//! Invariant: what is saved is of one moment: whoever may lock a device while memory is
//! written (a client that changes it) does not write to the guest's memory. A device may
//! interrupt while it is saved and restored, and neither is lost, as controllers are saved
//! after it and restored before.

use std::sync::{Arc, Mutex, MutexGuard};

use bus::Lifecycle;
use chipset::{SavedI8042, SavedSerial, Serial};
use hv::{Interrupts, Shared, SharedState, VcpuState};
use ram::{GuestRam, Kind};
use serde::{Deserialize, Serialize};
use virtio::VirtioDevice;
use virtio::transport::{Doorbell, MmioTransport, SavedTransport};

use crate::Error;
use crate::devices::{Devices, line};
use crate::generation::{Generation, SavedGeneration};
use crate::handles::Handles;
use crate::io_space::lock;

/// A machine in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMachine {
    /// Where its memory lies, files of the host included.
    pub memory: Vec<SavedRegion>,
    /// What the vCPUs share.
    pub shared: SharedState,
    /// From the first.
    pub vcpus: Vec<VcpuState>,
    /// Its devices.
    pub devices: SavedDevices,
}

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRegion {
    /// First guest-physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// It is a file of the host, whose content stays where it is.
    pub is_file: bool,
}

/// The devices of a machine in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDevices {
    /// The console.
    pub serial: SavedSerial,
    /// The keyboard controller.
    pub keyboard: SavedI8042,
    /// Generation identifier and VM clock.
    pub generation: SavedGeneration,
    /// virtio devices, by slot.
    pub virtio: Vec<SavedTransport>,
}

/// What a snapshot is made of and [`Handles`] do not name.
pub(crate) struct Whole {
    pub(crate) ram: GuestRam,
    pub(crate) shared: Arc<dyn Shared>,
    pub(crate) serial: Arc<Mutex<Serial>>,
    pub(crate) transports: Vec<Arc<Mutex<MmioTransport>>>,
    pub(crate) doorbells: Vec<Arc<Mutex<Doorbell>>>,
}

impl std::fmt::Debug for Whole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Whole")
    }
}

impl Whole {
    /// What the machine is, whose vCPUs, event loop and drives' threads are held.
    pub(crate) fn save(
        &self,
        handles: &Handles,
        vcpus: impl FnOnce() -> Result<Vec<VcpuState>, Error>,
    ) -> Result<SavedMachine, Error> {
        let (Some(keyboard), Some(generation)) = (&handles.keyboard, &handles.generation) else {
            return Err(Error::Gone);
        };
        // Doorbells first, as in the event loop.
        let mut doorbells: Vec<_> = self.doorbells.iter().map(|one| lock(&**one)).collect();
        for doorbell in &mut doorbells {
            doorbell.note();
        }
        // Registers before devices, as on the vCPUs' threads, which hold none now.
        let transports: Vec<_> = self.transports.iter().map(|one| lock(one)).collect();
        let behind: Vec<Arc<Mutex<dyn VirtioDevice>>> =
            transports.iter().map(|one| one.device()).collect();
        let mut devices: Vec<MutexGuard<'_, dyn VirtioDevice>> =
            behind.iter().map(|one| lock(&**one)).collect();
        let (serial, keyboard) = (lock(&self.serial), lock(keyboard));
        let generation = lock(generation);

        let virtio = transports.iter().zip(&mut devices).enumerate();
        let virtio = virtio
            .map(|(index, (transport, device))| {
                let saved = transport.save(&mut **device);
                saved.map_err(|source| Error::SaveDevice { index, source })
            })
            .collect::<Result<_, _>>()?;
        let engine = |source| Error::Engine { source };
        Ok(SavedMachine {
            memory: regions(&self.ram).collect(),
            devices: SavedDevices {
                serial: serial.save(),
                keyboard: keyboard.save(),
                generation: generation.save(),
                virtio,
            },
            shared: self.shared.state().map_err(engine)?,
            vcpus: vcpus()?,
        })
    }
}

fn regions(ram: &GuestRam) -> impl Iterator<Item = SavedRegion> {
    ram.regions().map(|region| SavedRegion {
        start: region.start.0,
        len: region.len,
        is_file: matches!(region.kind, Kind::File { .. }),
    })
}

impl SavedMachine {
    /// Whether a machine with this memory, so many vCPUs and these devices may have been
    /// saved so.
    pub(crate) fn check(&self, ram: &GuestRam, vcpus: u8, devices: &Devices) -> Result<(), Error> {
        let mismatch = |what| Err(Error::Mismatch { what });
        if !regions(ram).eq(self.memory.iter().copied()) {
            return mismatch("its memory lies elsewhere; did a file of persistent memory change?");
        }
        if self.vcpus.len() != usize::from(vcpus) {
            return mismatch("it has another number of vCPUs");
        }
        if self.devices.virtio.len() != devices.transports.len() {
            return mismatch("it has another number of devices");
        }
        Ok(())
    }
}

impl Devices {
    /// Makes these devices, new ones, those that were saved, and looks at what the guest
    /// asked of them. The guest learns that it was copied.
    pub(crate) fn restore(
        &mut self,
        saved: &SavedDevices,
        ram: &GuestRam,
        interrupts: &Arc<dyn Interrupts>,
    ) -> Result<(), Error> {
        let chipset = |source| Error::RestoreChipset { source };
        lock(&self.serial).restore(&saved.serial).map_err(chipset)?;
        if let Some(keyboard) = &self.handles.keyboard {
            lock(keyboard).restore(&saved.keyboard).map_err(chipset)?;
        }
        let devices = self.transports.iter().zip(&saved.virtio);
        for (index, (transport, saved)) in devices.enumerate() {
            let mut transport = lock(transport);
            let failed = |source| Error::RestoreDevice { index, source };
            transport.restore(saved).map_err(failed)?;
            transport.resume();
        }
        let line = |gsi| line(interrupts, gsi);
        let mut generation = Generation::restore(ram.memory(), line, &saved.generation);
        generation.bump()?;
        self.handles.generation = Some(Arc::new(Mutex::new(generation)));
        Ok(())
    }
}
