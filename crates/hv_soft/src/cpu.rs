//! One virtual CPU as the engine has it: registers, and everything that runs it.
//!
//! Invariant: between instructions the whole architectural state is here, in the
//! context and in `regs`; x87 and MXCSR are in the host's registers during a run
//! and in `fpu` otherwise.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use hv::Io;
use translations::Translations;
use translator::context::Mode;
use x86::control::cr0;
use x86::cpu_template::CpuTemplate;
use x86::features::{CpuModel, Features};
use x86::registers::rflags;
use x86::state::{DescriptorTable, Segment};

use crate::apic::Chips;
use crate::apic::local::LocalApic;
use crate::blocks::Blocks;
use crate::clock::Clock;
use crate::debug::Breakpoints;
use crate::decoded::Decoded;
use crate::enter::{ContextBox, Fpu, Stay};
use crate::exceptions::{Fault, GP};
use crate::guest_ram::Ram;
use crate::mmu::spaces::Spaces;
use crate::mmu::tlb::{Fills, PageSet};
use crate::partition::Observer;
use crate::peers::Peers;
use crate::rest::Rest;
use crate::stats::EngineStats;
use crate::stepping::Stepping;
use crate::translate::Translating;
use crate::watch::Watch;

/// RFLAGS bits that live in the host's flags, and so in `Context::rflags`.
pub(crate) const HOST_FLAGS: u64 = rflags::STATUS | rflags::DF;
/// RFLAGS bits in `Context::rflags_high`.
pub(crate) const HIGH_FLAGS: u64 = rflags::TF | rflags::IOPL | rflags::NT | rflags::ID;

/// System registers.
#[derive(Clone, Debug)]
pub(crate) struct Registers {
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
    pub(crate) xcr0: u64,
    pub(crate) cpl: u8,
    /// ES, CS, SS, DS, FS, GS. The bases of FS and GS are in the context.
    pub(crate) segments: [Segment; 6],
    pub(crate) tr: Segment,
    pub(crate) ldtr: Segment,
    pub(crate) gdt: DescriptorTable,
    pub(crate) idt: DescriptorTable,
    /// DR0 to DR3, DR6, DR7.
    pub(crate) debug: [u64; 6],
    pub(crate) star: u64,
    pub(crate) lstar: u64,
    pub(crate) cstar: u64,
    pub(crate) fmask: u64,
    /// Registers that only keep what is written, by [`crate::msr`]'s table.
    pub(crate) plain_msrs: [u64; crate::msr::PLAIN.len()],
    pub(crate) kvm_system_time: u64,
    pub(crate) kvm_wall_clock: u64,
}

/// A virtual CPU.
pub(crate) struct Cpu {
    pub(crate) context: ContextBox,
    pub(crate) regs: Registers,
    pub(crate) fpu: Fpu,
    pub(crate) ram: Ram,
    pub(crate) fills: Fills,
    pub(crate) spaces: Spaces,
    /// Pages that may have been written since the last record.
    pub(crate) written: PageSet,
    /// Host address of the stub for empty jump cache entries.
    pub(crate) jump_miss: u64,
    pub(crate) blocks: Blocks,
    pub(crate) decoded: Decoded,
    /// `None` only within a translation.
    pub(crate) translating: Option<Box<Translating>>,
    pub(crate) apic: LocalApic,
    pub(crate) chips: Arc<Chips>,
    pub(crate) clock: Clock,
    pub(crate) id: u32,
    pub(crate) cpu_model: CpuModel,
    /// CPUID shows two threads a core.
    pub(crate) smt: bool,
    /// Changes to what it shows.
    pub(crate) template: Arc<CpuTemplate>,
    /// What the model is on this host.
    pub(crate) model: Features,
    /// Of these, what is not switched off: see `units`.
    pub(crate) executable: Features,
    pub(crate) halted: bool,
    /// RFLAGS.RF: no instruction breakpoint before the next instruction ends.
    pub(crate) resume: bool,
    pub(crate) stepping: Stepping,
    /// It executes single instructions for another engine.
    pub(crate) alone: bool,
    pub(crate) breakpoints: Breakpoints,
    pub(crate) nmi_pending: bool,
    pub(crate) nmi_blocked: bool,
    pub(crate) stats: EngineStats,
    pub(crate) watch: Watch,
    pub(crate) rest: Rest,
    pub(crate) observer: Option<Observer>,
    /// Translations made before.
    pub(crate) kept: Option<Arc<Translations>>,
    /// Writes them, when the guest rests.
    pub(crate) saver: Option<crate::recall::Saver>,
    pub(crate) peers: Arc<Peers>,
    /// Counts what was done for other vCPUs: blocks and write tags may have gone.
    pub(crate) serves: u64,
    /// How far the vCPU is in its start.
    pub(crate) phase: Phase,
}

/// How far a vCPU is on the way from its reset to 64-bit mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// For the INIT and start-up interrupts of another vCPU.
    Waits,
    /// In real or 32-bit mode: see `startup`.
    Early,
    /// In 64-bit mode, which it only leaves by INIT.
    Long,
}

impl Cpu {
    #[inline]
    pub(crate) fn mode(&self) -> Mode {
        if self.regs.cpl == 3 {
            Mode::User
        } else if self.context.alignment_check != 0 {
            Mode::KernelUserAccess
        } else {
            Mode::Kernel
        }
    }

    pub(crate) fn set_cpl(&mut self, cpl: u8) {
        self.regs.cpl = cpl & 3;
        self.refresh_crossing();
    }

    /// #GP unless at CPL 0.
    #[inline]
    pub(crate) fn privileged(&self) -> Result<(), Fault> {
        if self.regs.cpl == 0 { Ok(()) } else { Err(GP) }
    }

    pub(crate) fn rflags(&self) -> u64 {
        let context = &self.context;
        context.rflags & HOST_FLAGS
            | rflags::FIXED
            | context.interrupts_enabled << 9
            | context.rflags_high
            | context.alignment_check
            | u64::from(self.resume) << 16
    }

    pub(crate) fn set_rflags(&mut self, value: u64) {
        let context = &mut self.context;
        context.rflags = value & HOST_FLAGS | rflags::FIXED;
        context.interrupts_enabled = value >> 9 & 1;
        context.direction = value >> 10 & 1;
        context.rflags_high = value & HIGH_FLAGS;
        context.alignment_check = value & rflags::AC;
        self.resume = value & rflags::RF != 0;
    }

    /// #NM where x87, MMX and SSE are switched off.
    pub(crate) fn fpu_available(&self) -> Result<(), Fault> {
        if self.regs.cr0 & (cr0::TS | cr0::EM) != 0 {
            Err(crate::exceptions::NM)
        } else {
            Ok(())
        }
    }
}

/// A CPU while it runs: with the machine's devices at hand.
pub(crate) struct Run<'a> {
    pub(crate) cpu: &'a mut Cpu,
    pub(crate) io: &'a dyn Io,
}

impl Run<'_> {
    /// Calls a device: with the host's MXCSR, and without making other vCPUs wait, or
    /// devices that take memory away.
    pub(crate) fn outside<T>(&mut self, f: impl FnOnce(&dyn Io) -> T) -> T {
        let io = self.io;
        self.quieten();
        let result = Stay::outside(|| f(io));
        self.waken();
        result
    }
}

impl Deref for Run<'_> {
    type Target = Cpu;
    fn deref(&self) -> &Cpu {
        self.cpu
    }
}

impl DerefMut for Run<'_> {
    fn deref_mut(&mut self) -> &mut Cpu {
        self.cpu
    }
}
