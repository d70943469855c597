//! The devices that a blueprint asks for, placed and wired.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use blueprint::{Blueprint, CacheType, IoEngine, Store};
use bus::IrqLine;
use chipset::{
    I8042, I8042_FIRST_PORT, I8042_PORTS, PowerEvents, SERIAL_PORTS, SLEEP_PORTS, Serial,
    SleepRegisters,
};
use hv::{Interrupts, Partition};
use ram::{Gpa, GuestRam};
use rustix::fs::OFlags;
use virtio::block::{Access, Block, Cache, Completions, Worker};
use virtio::rng::Rng;
use virtio::transport::{Doorbell, MmioTransport, NOTIFY_AT};
use virtio::vsock::Vsock;
use virtio::{EventSource, VirtioDevice};

use crate::Error;
use crate::back_ends::BackEnds;
use crate::console::{Console, Sink};
use crate::control::Control;
use crate::generation::Generation;
use crate::handles::Handles;
use crate::io_space::IoSpace;
use crate::layout::{
    ACPI_PORT, KEYBOARD_GSI, SERIAL_GSI, SERIAL_PORT, VIRTIO_MMIO_LEN, VirtioSlot,
};
use crate::memory::Memory;
use crate::memory_devices::{limit, limits};
use crate::network::Network;

/// A machine's devices.
pub(crate) struct Devices {
    /// What the guest reaches.
    pub(crate) io: IoSpace,
    /// What the event loop serves.
    pub(crate) sources: Vec<Arc<Mutex<dyn EventSource>>>,
    /// Those of them that have threads of their own.
    pub(crate) disk_workers: Vec<Arc<Mutex<Worker>>>,
    /// Takes the console's input.
    pub(crate) serial: Arc<Mutex<Serial>>,
    /// Gives the console's output.
    pub(crate) console: Arc<Console>,
    /// Where the virtio devices sit.
    pub(crate) slots: Vec<VirtioSlot>,
    /// Their registers, in the same order.
    pub(crate) transports: Vec<Arc<Mutex<MmioTransport>>>,
    /// Kicks that come without an exit.
    pub(crate) doorbells: Vec<Arc<Mutex<Doorbell>>>,
    /// What can be asked and changed while the machine runs.
    pub(crate) handles: Handles,
}

/// Makes the devices of `blueprint`; `stdout` takes the console's output unless
/// the blueprint names a file.
pub(crate) fn make(
    blueprint: &Blueprint,
    memory: Memory,
    interrupts: &Arc<dyn Interrupts>,
    control: &Arc<Control>,
    stdout: OwnedFd,
    network: Network,
    mut back_ends: BackEnds,
) -> Result<Devices, Error> {
    let ram = &memory.ram.clone();
    if blueprint.track_dirty_pages() {
        tracing::warn!("track_dirty_pages is not there yet: the machine runs without it");
    }
    let output = blueprint.serial_out().map_or(Ok(stdout), open_serial_out)?;
    let most = blueprint.serial_limiter().copied().map(limit);
    let console = Arc::new(Console::new(output, control.clone(), most)?);
    let serial_line = line(interrupts, SERIAL_GSI);
    let serial = Serial::new(serial_line, Box::new(Sink(console.clone())));
    let serial = Arc::new(Mutex::new(serial));

    let generation = Generation::new(ram.memory(), |gsi| line(interrupts, gsi))?;
    let mut devices = Devices {
        io: IoSpace::default(),
        sources: Vec::new(),
        disk_workers: Vec::new(),
        serial: serial.clone(),
        console,
        slots: Vec::new(),
        transports: Vec::new(),
        doorbells: Vec::new(),
        handles: Handles {
            generation: Some(Arc::new(Mutex::new(generation))),
            ..Handles::default()
        },
    };
    devices.handles.count("uart", devices.console.counters());
    devices.handles.count("vcpu", devices.io.counters());
    let place_failed = |source| Error::Place { source };
    let power: Arc<dyn PowerEvents> = control.clone();
    let i8042 = I8042::new(power.clone(), line(interrupts, KEYBOARD_GSI));
    let i8042 = Arc::new(Mutex::new(i8042));
    devices.handles.keyboard = Some(i8042.clone());
    let sleep = Arc::new(Mutex::new(SleepRegisters::new(power)));
    let io = &mut devices.io;
    io.add_pio(SERIAL_PORT, SERIAL_PORTS, serial)
        .map_err(place_failed)?;
    io.add_pio(I8042_FIRST_PORT, I8042_PORTS, i8042)
        .map_err(place_failed)?;
    io.add_pio(ACPI_PORT, SLEEP_PORTS, sleep)
        .map_err(place_failed)?;

    for drive in blueprint.drives() {
        let cache = match drive.cache {
            CacheType::Unsafe => Cache::Unsafe,
            CacheType::Writeback => Cache::Writeback,
        };
        let (path, read_only, io_engine, limiter) = match &drive.store {
            Store::File {
                path,
                read_only,
                io_engine,
                limiter,
            } => (path, *read_only, *io_engine, limiter),
            Store::BackEnd { socket } => {
                devices.add_back_end(drive, socket, cache, &mut back_ends, ram, interrupts)?;
                continue;
            }
        };
        let access = if read_only {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        };
        let failed = |source| Error::Drive {
            id: drive.id.clone(),
            source,
        };
        let block = Block::open(path, access, cache, limits(limiter));
        let block = block.and_then(|block| match io_engine {
            IoEngine::Sync => Ok(block),
            IoEngine::Async => block.with_rings(),
        });
        let block = Arc::new(Mutex::new(block.map_err(failed)?));
        match Completions::of(&block) {
            Some(completions) => devices.sources.push(Arc::new(Mutex::new(completions))),
            None => {
                let worker = Worker::of(&block).map_err(failed)?;
                let worker = Arc::new(Mutex::new(worker));
                devices.sources.push(worker.clone());
                devices.disk_workers.push(worker);
            }
        }
        devices
            .handles
            .drives
            .push((drive.id.clone(), block.clone()));
        devices.sources.push(block.clone());
        devices.add_virtio(block, ram, interrupts)?;
    }
    devices.add_network(blueprint, network, ram, interrupts)?;
    if let Some(vsock) = blueprint.vsock() {
        let vsock = Vsock::new(vsock.guest_cid, &vsock.uds_path)
            .map_err(|source| Error::Vsock { source })?;
        devices.handles.count("vsock", vsock.counters());
        let vsock = Arc::new(Mutex::new(vsock));
        devices.sources.push(vsock.clone());
        devices.add_virtio(vsock, ram, interrupts)?;
    }
    if let Some(limiter) = blueprint.entropy() {
        let rng = Rng::new(limits(limiter)).map_err(|source| Error::Limiter { source })?;
        devices.handles.count("entropy", rng.counters());
        let rng = Arc::new(Mutex::new(rng));
        devices.sources.push(rng.clone());
        devices.add_virtio(rng, ram, interrupts)?;
    }
    devices.add_memory_devices(blueprint, memory, interrupts)?;
    Ok(devices)
}

impl Devices {
    /// Gives a device the next slot.
    pub(crate) fn add_virtio(
        &mut self,
        device: Arc<Mutex<dyn VirtioDevice>>,
        ram: &GuestRam,
        interrupts: &Arc<dyn Interrupts>,
    ) -> Result<(), Error> {
        // A blueprint has no more devices than slots: far less than 256.
        let slot = VirtioSlot::nth(self.slots.len() as u8);
        let transport = MmioTransport::new(device, ram, line(interrupts, slot.gsi));
        let transport = Arc::new(Mutex::new(transport));
        self.io
            .add_mmio(slot.base, VIRTIO_MMIO_LEN, transport.clone())
            .map_err(|source| Error::Place { source })?;
        self.slots.push(slot);
        self.transports.push(transport);
        Ok(())
    }
}

impl Devices {
    /// Has kicks go to the event loop without an exit, where the engine can do that.
    pub(crate) fn add_doorbells(&mut self, partition: &impl Partition) -> Result<(), Error> {
        for (slot, transport) in self.slots.iter().zip(&self.transports) {
            let doorbell = Doorbell::of(transport).map_err(|source| Error::Doorbell { source })?;
            for queue in 0..doorbell.queues() {
                let at = Gpa(slot.base + NOTIFY_AT);
                let taken = partition.doorbell(at, queue.into(), doorbell.fd());
                if !taken.map_err(|source| Error::Engine { source })? {
                    return Ok(());
                }
            }
            let doorbell = Arc::new(Mutex::new(doorbell));
            self.sources.push(doorbell.clone());
            self.doorbells.push(doorbell);
        }
        Ok(())
    }
}

pub(crate) fn line(interrupts: &Arc<dyn Interrupts>, gsi: u32) -> IrqLine {
    let interrupts = interrupts.clone();
    IrqLine::new(move |high| interrupts.set_line(gsi, high))
}

fn open_serial_out(path: &Path) -> Result<OwnedFd, Error> {
    // A pipe without a reader is an error rather than a wait.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    File::options()
        .append(true)
        .create(true)
        .custom_flags(flags)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|source| Error::SerialOut {
            path: path.into(),
            source,
        })
}
