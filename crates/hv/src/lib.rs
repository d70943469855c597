//! What an engine is: the traits that the software engine (`hv_soft`) and KVM
//! implement, so that a machine never knows which of them runs it.
//!
//! ```text
//! Hypervisor ──create──▶ Partition ──vcpu(i)──▶ Vcpu ──run(io)──▶ Exit
//!                            │                    │
//!                            └─ interrupts()      └─ kicker(): from any thread
//! ```
//!
//! Port and memory-mapped accesses do not end [`Vcpu::run`]: they are calls of
//! [`Io`], as the engine needs the answer before the next guest instruction.
//! KVM fits by calling it from its own exit loop.
//!
//! Left to others: devices, boot, the threads that vCPUs run on (`machine`).
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use ram::{Gpa, GuestRam};
pub use x86::VcpuState;
pub use x86::state::SharedState;

/// Why an engine could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// More virtual CPUs than the engine runs.
    #[error("the {engine} engine runs at most {most} vCPUs, {asked} were asked for")]
    TooManyVcpus {
        /// Engine name.
        engine: &'static str,
        /// How many were asked for.
        asked: u8,
        /// The engine's limit.
        most: u8,
    },
    /// The host lacks something that the engine cannot do without.
    #[error("the {engine} engine cannot run on this host: {lacks}")]
    HostLacks {
        /// Engine name.
        engine: &'static str,
        /// What is missing, in words.
        lacks: String,
    },
    /// A call of the host's kernel failed.
    #[error("failed to {doing}")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A vCPU index was out of range or taken twice.
    #[error("vCPU {index} does not exist or is already taken")]
    NoSuchVcpu {
        /// The index asked for.
        index: u8,
    },
    /// A vCPU state that the engine cannot represent.
    #[error("the vCPU state is not one that the {engine} engine can run: {why}")]
    State {
        /// Engine name.
        engine: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The engine found itself inconsistent; the machine must stop.
    #[error("the {engine} engine stopped at guest address {rip:#x}: {why}")]
    Engine {
        /// Engine name.
        engine: &'static str,
        /// Guest RIP.
        rip: u64,
        /// What was found.
        why: String,
    },
}

/// An engine that can host machines.
pub trait Hypervisor {
    /// The engine's notion of one machine.
    type Partition: Partition;

    /// Short name, as in `--engine`.
    fn name(&self) -> &'static str;

    /// Makes an empty machine around `memory`, with `vcpus` virtual CPUs.
    ///
    /// # Errors
    /// [`Error::TooManyVcpus`], [`Error::HostLacks`] or [`Error::Host`].
    fn create(&self, memory: GuestRam, vcpus: u8) -> Result<Self::Partition, Error>;
}

/// One machine's CPUs and interrupt controllers.
pub trait Partition {
    /// The engine's virtual CPU.
    type Vcpu: Vcpu + 'static;

    /// Hands out virtual CPU `index`, once.
    ///
    /// # Errors
    /// [`Error::NoSuchVcpu`].
    fn vcpu(&mut self, index: u8) -> Result<Self::Vcpu, Error>;

    /// The interrupt lines, for devices on any thread.
    fn interrupts(&self) -> Arc<dyn Interrupts>;

    /// What its vCPUs share, for whoever pauses, saves and restores the machine.
    fn shared(&self) -> Arc<dyn Shared>;

    /// Has 32-bit stores of `value` to the guest-physical address `at` add one to the
    /// eventfd `bell`, in place of a call of [`Io::mmio_write`], for as long as the
    /// partition or one of its vCPUs lives. `false` when the engine offers no such thing:
    /// the stores come as calls.
    ///
    /// # Errors
    /// [`Error::Host`] when the host's kernel refuses.
    fn doorbell(&self, at: Gpa, value: u32, bell: BorrowedFd<'_>) -> Result<bool, Error> {
        let _ = (at, value, bell);
        Ok(false)
    }
}

/// What the vCPUs of a machine share. All of it is for while no vCPU runs; states are
/// taken before the vCPUs' and replaced before theirs.
pub trait Shared: Send + Sync {
    /// Takes the state.
    ///
    /// # Errors
    /// [`Error::Host`] when the host's kernel refuses.
    fn state(&self) -> Result<SharedState, Error>;

    /// Replaces the state: the clock goes on from there.
    ///
    /// # Errors
    /// [`Error::State`] for one that the engine cannot run.
    fn set_state(&self, state: &SharedState) -> Result<(), Error>;

    /// Begins or ends to notice which pages guest code writes.
    ///
    /// # Errors
    /// [`Error::Host`].
    fn log_writes(&self, yes: bool) -> Result<(), Error>;

    /// Sees to it that what guest code wrote since the last call is in memory's
    /// [`ram::PageEpochs`], of all while writes are logged. It counts as written now:
    /// take a cursor afterwards.
    ///
    /// # Errors
    /// [`Error::Host`], also when nothing is logged.
    fn collect_writes(&self) -> Result<(), Error>;
}

/// Global system interrupts of the machine: 24 IOAPIC pins.
pub trait Interrupts: Send + Sync {
    /// Drives line `gsi` high or low. Edge-triggered lines act on the rise.
    fn set_line(&self, gsi: u32, high: bool);
}

/// Where guest port and memory-mapped accesses go. `data` is 1, 2, 4 or 8 bytes,
/// little-endian; reads that nobody answers are all ones.
pub trait Io {
    /// A load from a guest-physical address without memory behind it.
    fn mmio_read(&self, at: Gpa, data: &mut [u8]);
    /// A store to such an address.
    fn mmio_write(&self, at: Gpa, data: &[u8]);
    /// IN.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// OUT.
    fn pio_write(&self, port: u16, data: &[u8]);
}

/// Why [`Vcpu::run`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Somebody called [`Kick::kick`].
    Kicked,
    /// HLT with interrupts disabled and nothing that could ever wake it: how
    /// Linux stops a CPU for good.
    Halted,
    /// A fault while delivering a double fault: real hardware resets.
    TripleFault,
    /// The guest told its hypervisor that the machine shall be off.
    PowerOff,
    /// The guest told its hypervisor to reset the machine.
    Reset,
}

/// One virtual CPU. Its state stays put between calls of [`Vcpu::run`].
pub trait Vcpu: Send {
    /// Takes the whole state.
    ///
    /// # Errors
    /// [`Error::Host`] when the host's kernel refuses.
    fn state(&self) -> Result<VcpuState, Error>;

    /// Replaces the whole state.
    ///
    /// # Errors
    /// [`Error::State`] for one that the engine cannot run.
    fn set_state(&mut self, state: &VcpuState) -> Result<(), Error>;

    /// A handle that ends [`Vcpu::run`] from any thread.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// Runs guest code on the calling thread until something ends it. Waiting
    /// in HLT happens inside and uses no host CPU.
    ///
    /// # Errors
    /// [`Error::Engine`] when the engine finds itself inconsistent.
    fn run(&mut self, io: &dyn Io) -> Result<Exit, Error>;
}

/// Executes single instructions of a guest, in the place of an engine that cannot.
///
/// The one that completes and the one that is completed share the guest's memory; whoever
/// plugs one into the other makes both of it.
pub trait Completion: Send {
    /// Executes the instruction that RIP of `state` is at, or delivers the exception that
    /// it raises. Interrupts and timers stay as they are: those of `state` are not looked at,
    /// and those of the result mean nothing.
    ///
    /// # Errors
    /// [`Error::State`] for a state that it cannot run, [`Error::Engine`].
    fn complete(&mut self, state: &VcpuState, io: &dyn Io) -> Result<Completed, Error>;
}

/// What became of one instruction.
#[derive(Clone, Debug)]
pub enum Completed {
    /// The guest goes on from here.
    GoesOn(Box<VcpuState>),
    /// The guest's end.
    Ended(Exit),
}

/// Ends a [`Vcpu::run`] soon, with [`Exit::Kicked`]. A kick that comes while the
/// vCPU is not running ends its next run at once, so none is ever lost.
pub trait Kick: Send + Sync {
    /// Kicks.
    fn kick(&self);
}
