//! A machine from its making to its end.
//!
//! ```text
//! Blueprint ──build──▶ Machine ──start──▶ Running ──wait──▶ Ended
//!  saved ────restore──▶  (no thread yet)     one thread per vCPU;
//!                                           wait() is the event loop
//! ```
//!
//! Invariant: whichever of these values is dropped, its vCPU threads are gone
//! and its sockets unlinked afterwards.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use blueprint::Blueprint;
use chipset::{BOOT_TIMER_LEN, BootTimer, Moment};
use hv::{Exit, Hypervisor, Interrupts, Io, Partition, Shared, Vcpu};
use ram::GuestRam;

use crate::back_ends::BackEnds;
use crate::control::{Control, Controller, Outcome, StopHandle};
use crate::devices::Devices;
use crate::event_loop::EventLoop;
use crate::handles::Handles;
use crate::io_space::{IoSpace, lock};
use crate::layout::BOOT_TIMER;
use crate::memory::Memory;
use crate::network::Network;
use crate::saved::{SavedMachine, Whole};
use crate::{Error, boot, devices};

/// What the serial console is connected to.
#[derive(Debug)]
pub struct Stdio {
    /// Bytes for the guest; none when `None`. Need not be non-blocking.
    pub input: Option<OwnedFd>,
    /// Takes the guest's output, unless the blueprint names a file.
    pub output: OwnedFd,
}

/// What a machine has of the host besides what its blueprint names.
#[derive(Debug)]
pub struct Outside {
    /// For the console.
    pub stdio: Stdio,
    /// For network interfaces.
    pub network: Network,
    /// For drives that other processes serve: those that were reached already.
    pub back_ends: BackEnds,
}

impl From<Stdio> for Outside {
    fn from(stdio: Stdio) -> Self {
        Self {
            stdio,
            network: Network::default(),
            back_ends: BackEnds::default(),
        }
    }
}

/// What a vCPU's thread does to itself before it runs guest code.
pub type Confine = Arc<dyn Fn() -> std::io::Result<()> + Send + Sync>;

/// A machine with everything in place that has not run yet.
pub struct Machine<P: Partition> {
    vcpus: Vec<P::Vcpu>,
    devices: Devices,
    event_loop: EventLoop,
    control: Arc<Control>,
    confine: Option<Confine>,
    /// Engines and devices hold clones; this one outlives them all.
    ram: GuestRam,
}

impl<P: Partition> Machine<P> {
    /// Makes memory, devices and CPUs, and loads the kernel.
    ///
    /// # Errors
    /// [`Error`] names what is missing, broken or too large.
    pub fn build<H>(
        blueprint: &Blueprint,
        hypervisor: &H,
        outside: impl Into<Outside>,
    ) -> Result<Self, Error>
    where
        H: Hypervisor<Partition = P>,
    {
        let Outside {
            stdio,
            network,
            back_ends,
        } = outside.into();
        let further = (network, back_ends);
        let memory = Memory::make(blueprint)?;
        let ram = memory.ram.clone();
        let mut parts = Parts::make(blueprint, hypervisor, memory, stdio.output, further)?;
        let boot_state = boot::load(&ram, blueprint, &parts.devices.slots)?;
        // The others wait for the first to start them.
        if let Some(first) = parts.vcpus.first_mut() {
            first
                .set_state(&boot_state)
                .map_err(|source| Error::Engine { source })?;
        }
        parts.machine(ram, stdio.input)
    }

    /// Makes the machine of `blueprint` as it was when it was saved, its memory from
    /// `image`. It goes on with [`Machine::start`] or [`Machine::start_paused`].
    ///
    /// # Errors
    /// [`Error`] names what is missing or does not fit.
    pub fn restore<H>(
        blueprint: &Blueprint,
        saved: &SavedMachine,
        image: File,
        hypervisor: &H,
        outside: impl Into<Outside>,
    ) -> Result<Self, Error>
    where
        H: Hypervisor<Partition = P>,
    {
        let Outside {
            stdio,
            network,
            back_ends,
        } = outside.into();
        let further = (network, back_ends);
        let memory = Memory::restore(blueprint, image)?;
        let ram = memory.ram.clone();
        let mut parts = Parts::make(blueprint, hypervisor, memory, stdio.output, further)?;
        saved.check(&ram, blueprint.vcpus(), &parts.devices)?;
        let refused = |source| Error::RestoreVcpu { source };
        parts.shared.set_state(&saved.shared).map_err(refused)?;
        for (vcpu, state) in parts.vcpus.iter_mut().zip(&saved.vcpus) {
            vcpu.set_state(state).map_err(refused)?;
        }
        parts
            .devices
            .restore(&saved.devices, &ram, &parts.interrupts)?;
        parts.machine(ram, stdio.input)
    }

    /// Stops the machine from any thread, also before it started.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle::new(self.control.clone())
    }

    /// The devices that can be asked and changed.
    pub fn handles(&self) -> Handles {
        self.devices.handles.clone()
    }

    /// Adds the boot timer: the log says how long after `started` the guest's init ran.
    ///
    /// # Errors
    /// [`Error::Place`] when it is there already.
    pub fn time_boot(&mut self, started: Moment) -> Result<(), Error> {
        let timer = Arc::new(Mutex::new(BootTimer::new(started)));
        self.devices
            .io
            .add_mmio(BOOT_TIMER, BOOT_TIMER_LEN, timer)
            .map_err(|source| Error::Place { source })
    }

    /// Has each vCPU's thread call `confine` before it runs guest code: to give up what
    /// that needs no longer. A thread that cannot does not run, and ends the machine.
    pub fn confine_vcpus(&mut self, confine: Confine) {
        self.confine = Some(confine);
    }

    /// Starts the threads that wait for disks, and has each call `confine` before it does
    /// anything. Without this they start when they are needed.
    ///
    /// # Errors
    /// [`Error::Host`]: no thread, or one that cannot be confined.
    pub fn confine_disks(&mut self, confine: &Confine) -> Result<(), Error> {
        for worker in &self.devices.disk_workers {
            let confine = confine.clone();
            let started = lock(worker).start_confined(move || confine());
            started.map_err(|source| Error::Host {
                doing: "start a confined thread for a drive",
                source,
            })?;
        }
        Ok(())
    }

    /// Starts one thread per vCPU.
    ///
    /// # Errors
    /// [`Error::Engine`] or [`Error::Host`]; nothing runs then.
    pub fn start(self) -> Result<Running, Error> {
        for vcpu in &self.vcpus {
            self.control.add(vcpu.kicker());
        }
        let handles = self.devices.handles;
        let io = Arc::new(self.devices.io);
        let mut running = Running {
            threads: Vec::new(),
            event_loop: self.event_loop,
            control: self.control,
            handles,
            _ram: self.ram,
        };
        for (index, vcpu) in (0..).zip(self.vcpus) {
            let (io, control) = (io.clone(), running.control.clone());
            let confine = self.confine.clone();
            // A failure drops `running`, which ends the threads made so far.
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || {
                    if let Some(Err(source)) = confine.map(|confine| confine()) {
                        let doing = "confine a vCPU thread";
                        return control.end(Err(Error::Host { doing, source }));
                    }
                    run_vcpu(index, vcpu, &io, &control);
                })
                .map_err(|source| Error::Host {
                    doing: "start a vCPU thread",
                    source,
                })?;
            running.threads.push(thread);
        }
        Ok(running)
    }

    /// As [`Machine::start`], but the vCPUs are held as by [`Controller::pause`].
    ///
    /// # Errors
    /// The same.
    pub fn start_paused(self) -> Result<Running, Error> {
        self.control.hold();
        self.start()
    }

    /// [`Machine::start`], then [`Running::wait`].
    ///
    /// # Errors
    /// Those of [`Machine::start`]; how the machine ended is in [`Ended`].
    pub fn run(self) -> Result<Ended, Error> {
        Ok(self.start()?.wait())
    }
}

/// What is made in the same way for machines that boot and for those that go on.
struct Parts<P: Partition> {
    shared: Arc<dyn Shared>,
    interrupts: Arc<dyn Interrupts>,
    vcpus: Vec<P::Vcpu>,
    devices: Devices,
    control: Arc<Control>,
}

impl<P: Partition> Parts<P> {
    fn make<H>(
        blueprint: &Blueprint,
        hypervisor: &H,
        memory: Memory,
        console: OwnedFd,
        (network, back_ends): (Network, BackEnds),
    ) -> Result<Self, Error>
    where
        H: Hypervisor<Partition = P>,
    {
        let engine_failed = |source| Error::Engine { source };
        let ram = memory.ram.clone();
        let mut partition = hypervisor
            .create(ram.clone(), blueprint.vcpus())
            .map_err(engine_failed)?;
        let control = Arc::new(Control::new()?);
        let interrupts = partition.interrupts();
        let shared = partition.shared();
        let mut devices = devices::make(
            blueprint,
            memory,
            &interrupts,
            &control,
            console,
            network,
            back_ends,
        )?;
        devices.add_doorbells(&partition)?;
        devices.handles.whole = Some(Arc::new(Whole {
            ram,
            shared: shared.clone(),
            serial: devices.serial.clone(),
            transports: devices.transports.clone(),
            doorbells: devices.doorbells.clone(),
        }));
        let vcpus = (0..blueprint.vcpus())
            .map(|index| partition.vcpu(index).map_err(engine_failed))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            shared,
            interrupts,
            vcpus,
            devices,
            control,
        })
    }

    fn machine(self, ram: GuestRam, input: Option<OwnedFd>) -> Result<Machine<P>, Error> {
        let event_loop = EventLoop::new(&self.control, &self.devices, input)?;
        Ok(Machine {
            vcpus: self.vcpus,
            devices: self.devices,
            event_loop,
            control: self.control,
            confine: None,
            ram,
        })
    }
}

/// A machine that runs. Dropping it stops it.
pub struct Running {
    threads: Vec<JoinHandle<()>>,
    event_loop: EventLoop,
    control: Arc<Control>,
    handles: Handles,
    _ram: GuestRam,
}

impl Running {
    /// Changes the machine from any thread.
    pub fn controller(&self) -> Controller {
        Controller::new(self.control.clone(), self.handles.clone())
    }

    /// Stops the machine from any thread.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle::new(self.control.clone())
    }

    /// Serves devices and console until the machine has ended.
    pub fn wait(mut self) -> Ended {
        if let Err(error) = self.event_loop.run() {
            self.control.end(Err(error));
        }
        self.join();
        let console_tail = self.event_loop.finish();
        Ended {
            result: self.control.take(),
            console_tail,
        }
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // run_vcpu reports a panic to `control` itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.control.end(Ok(Outcome::Stopped));
        self.join();
    }
}

/// How a machine ended.
#[derive(Debug)]
pub struct Ended {
    /// Its outcome, or the error that ended it.
    pub result: Result<Outcome, Error>,
    /// The last that the guest wrote to its console.
    pub console_tail: Vec<u8>,
}

impl Ended {
    /// The line with which the guest's kernel gave up, if the end of its console
    /// output has one. A guest can write such a line without meaning it.
    pub fn kernel_panic(&self) -> Option<String> {
        const MARK: &str = "Kernel panic - not syncing";
        let text = String::from_utf8_lossy(&self.console_tail);
        let line = text.lines().rev().find(|line| line.contains(MARK))?;
        let at = line.find(MARK)?;
        let printable = |c: &char| !c.is_control();
        Some(
            line.get(at..)?
                .chars()
                .filter(printable)
                .take(200)
                .collect(),
        )
    }
}

fn run_vcpu(index: u8, mut vcpu: impl Vcpu, io: &IoSpace, control: &Arc<Control>) {
    let _guard = PanicGuard { index, control };
    let io: &dyn Io = io;
    loop {
        control.park_while_paused(index, || vcpu.state());
        if control.is_ending() {
            return;
        }
        match vcpu.run(io) {
            Ok(Exit::Kicked) => {}
            Ok(Exit::Halted) => return control.halted(index, vcpu.state()),
            Ok(Exit::TripleFault) => control.end(Ok(Outcome::TripleFault)),
            Ok(Exit::PowerOff) => control.end(Ok(Outcome::PowerOff)),
            Ok(Exit::Reset) => control.end(Ok(Outcome::Reset)),
            Err(source) => control.end(Err(Error::Engine { source })),
        }
    }
}

/// Ends the machine when its vCPU's thread unwinds.
struct PanicGuard<'a> {
    index: u8,
    control: &'a Control,
}

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.control
                .end(Err(Error::VcpuPanicked { index: self.index }));
        }
    }
}

#[cfg(test)]
mod tests;
