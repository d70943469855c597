//! Faults, and their delivery through the IDT (SDM vol. 3, §6.12 to §6.15).
//!
//! Invariant: a delivery that faults leaves registers as they were, so that the
//! double fault pushes the original ones.

use translator::context::Mode;
use x86::control::{efer, vector};
use x86::descriptor::{self, Descriptor, Gate};
use x86::paging;
use x86::registers::{RSP, rflags};
use x86::state::{Segment, VcpuState};

use crate::cpu::Cpu;

/// Why an instruction did not complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// An exception, with its error code if it has one.
    Exception(u8, Option<u32>),
    /// A page fault: linear address and error code.
    Page(u64, u32),
    /// A debug exception: the bits of DR6 that say why.
    Debug(u64),
    /// The engine cannot go on.
    Engine(String),
}

/// #UD
pub(crate) const UD: Fault = Fault::Exception(vector::UD, None);
/// #GP(0)
pub(crate) const GP: Fault = Fault::Exception(vector::GP, Some(0));
/// #SS(0)
pub(crate) const SS: Fault = Fault::Exception(vector::SS, Some(0));
/// #NM
pub(crate) const NM: Fault = Fault::Exception(vector::NM, None);

impl Fault {
    /// The same fault for a stack access: #GP becomes #SS.
    pub(crate) fn on_stack(self, stack: bool) -> Self {
        if stack && self == GP { SS } else { self }
    }
}

/// What became of an exception.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Raised {
    /// Its handler runs next.
    Delivered,
    /// So did three in a row.
    TripleFault,
    /// The engine cannot go on.
    Engine(String),
}

/// Where a delivery comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A fault of the CPU, or an interrupt from outside.
    Hardware,
    /// INT n, INT3: the gate's DPL counts.
    Software,
}

impl Cpu {
    /// Raises `fault` at the present RIP.
    pub(crate) fn raise(&mut self, fault: Fault) -> Raised {
        let mut now = fault;
        let mut before: Option<u8> = None;
        loop {
            let (vector, code) = match now {
                Fault::Exception(vector, code) => (vector, code),
                Fault::Page(va, code) => {
                    self.regs.cr2 = va;
                    self.stats.page_faults += 1;
                    (vector::PF, Some(code))
                }
                Fault::Debug(why) => {
                    self.note_debug(why);
                    (vector::DB, None)
                }
                Fault::Engine(why) => return Raised::Engine(why),
            };
            // What an instruction accessed that did not complete does not count.
            self.breakpoints.hit = 0;
            let (vector, code) = match before {
                Some(vector::DF) => return Raised::TripleFault,
                Some(first) if makes_double_fault(first, vector) => (vector::DF, Some(0)),
                Some(_) | None => (vector, code),
            };
            self.stats.exceptions += 1;
            tracing::trace!(
                vector,
                code,
                rip = self.context.rip,
                cpl = self.regs.cpl,
                cr2 = self.regs.cr2,
                "exception"
            );
            // SDM vol. 3, §17.3.1.1: what a fault pushes has RF set, so that its
            // instruction does not hit its breakpoint twice.
            self.resume |= is_fault(vector);
            match self.deliver(vector, code, Source::Hardware) {
                Ok(()) => return Raised::Delivered,
                Err(next) => {
                    now = next;
                    before = Some(vector);
                }
            }
        }
    }

    /// Enters the handler of `vector`: RIP is what will be pushed.
    pub(crate) fn deliver(
        &mut self,
        vector: u8,
        code: Option<u32>,
        source: Source,
    ) -> Result<(), Fault> {
        let external = u32::from(source == Source::Hardware);
        let bad_gate = |exception| {
            Err(Fault::Exception(
                exception,
                Some(u32::from(vector) * 8 + 2 + external),
            ))
        };
        let offset = u64::from(vector) * 16;
        if self.regs.efer & efer::LMA == 0 {
            return Err(Fault::Engine("an exception outside of long mode".into()));
        }
        if offset + 15 > u64::from(self.regs.idt.limit) {
            return bad_gate(vector::GP);
        }
        let at = self.regs.idt.base.wrapping_add(offset);
        let gate = Gate {
            low: self.load_system(at)?,
            high: self.load_system(at.wrapping_add(8))?,
        };
        if !matches!(
            gate.kind(),
            descriptor::TYPE_INTERRUPT_GATE | descriptor::TYPE_TRAP_GATE
        ) || (source == Source::Software && gate.dpl() < self.regs.cpl)
        {
            return bad_gate(vector::GP);
        }
        if !gate.present() {
            return bad_gate(vector::NP);
        }
        let bad_code = |exception| {
            Err(Fault::Exception(
                exception,
                Some(u32::from(gate.selector() & !3) | external),
            ))
        };
        if gate.selector() & !3 == 0 {
            return Err(Fault::Exception(vector::GP, Some(external)));
        }
        if !paging::is_canonical(gate.offset()) {
            return Err(Fault::Exception(vector::GP, Some(external)));
        }
        let Some(code_descriptor) = self.descriptor(gate.selector())? else {
            return bad_code(vector::GP);
        };
        let rights = code_descriptor.rights();
        if rights & (descriptor::NOT_SYSTEM | descriptor::CODE | descriptor::LONG | descriptor::BIG)
            != descriptor::NOT_SYSTEM | descriptor::CODE | descriptor::LONG
            || code_descriptor.dpl() > self.regs.cpl
        {
            return bad_code(vector::GP);
        }
        if !code_descriptor.present() {
            return bad_code(vector::NP);
        }
        let conforming = rights & descriptor::CONFORMING != 0;
        let cpl = if conforming {
            self.regs.cpl
        } else {
            code_descriptor.dpl()
        };
        let old_rsp = self.context.gpr[RSP];
        let base = match gate.ist() {
            0 if cpl == self.regs.cpl => old_rsp,
            0 => self.stack_of_task(4 + 8 * u64::from(cpl), external)?,
            ist => self.stack_of_task(0x24 + 8 * u64::from(ist - 1), external)?,
        };
        let rsp = base & !15;
        let flags = self.rflags();
        let mut frame = [0u8; 48];
        let words = [
            u64::from(code.unwrap_or(0)),
            self.context.rip,
            u64::from(self.regs.segments[VcpuState::CS].selector),
            flags,
            old_rsp,
            u64::from(self.regs.segments[VcpuState::SS].selector),
        ];
        for (bytes, word) in frame.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let frame = if code.is_some() {
            &frame[..]
        } else {
            &frame[8..]
        };
        let rsp = rsp.wrapping_sub(frame.len() as u64);
        // Pushed as code of the new privilege does: EFLAGS.AC counts, it stays.
        let mode = match (cpl, self.context.alignment_check) {
            (3, _) => Mode::User,
            (_, 0) => Mode::Kernel,
            (_, _) => Mode::KernelUserAccess,
        };
        self.write_memory(rsp, frame, mode)
            .map_err(|fault| match fault {
                GP => Fault::Exception(vector::SS, Some(external)),
                other => other,
            })?;

        self.context.gpr[RSP] = rsp;
        self.context.rip = gate.offset();
        if cpl != self.regs.cpl {
            // A null SS with the new RPL (SDM vol. 3, §6.14.2).
            self.regs.segments[VcpuState::SS] = Segment {
                selector: u16::from(cpl),
                ..Segment::default()
            };
        }
        self.regs.segments[VcpuState::CS] =
            code_descriptor.segment(gate.selector() & !3 | u16::from(cpl), 0);
        self.set_cpl(cpl);
        if gate.kind() == descriptor::TYPE_INTERRUPT_GATE {
            self.context.interrupts_enabled = 0;
        }
        self.context.rflags_high &= !(rflags::TF | rflags::NT);
        self.resume = false;
        self.delivered();
        Ok(())
    }

    /// A stack pointer in the task state segment.
    fn stack_of_task(&mut self, offset: u64, external: u32) -> Result<u64, Fault> {
        let task = self.regs.tr;
        if offset + 7 > u64::from(task.limit) {
            let code = u32::from(task.selector & !3) | external;
            return Err(Fault::Exception(vector::TS, Some(code)));
        }
        self.load_system(task.base.wrapping_add(offset))
    }

    /// The code, data or system descriptor of a selector, if its table has one.
    pub(crate) fn descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Fault> {
        match self.descriptor_address(selector, 8) {
            Some(at) => Ok(Some(Descriptor(self.load_system(at)?))),
            None => Ok(None),
        }
    }

    /// Linear address of a selector's descriptor of `size` bytes.
    pub(crate) fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let (base, limit) = if selector & 4 == 0 {
            (self.regs.gdt.base, u64::from(self.regs.gdt.limit))
        } else {
            (self.regs.ldtr.base, u64::from(self.regs.ldtr.limit))
        };
        let offset = u64::from(selector & !7);
        (offset + size - 1 <= limit).then(|| base.wrapping_add(offset))
    }
}

/// Whether an exception is of the fault class, debug exceptions aside (SDM vol. 3,
/// table 6-1).
fn is_fault(exception: u8) -> bool {
    !matches!(
        exception,
        vector::DB | vector::NMI | vector::BP | vector::OF | vector::DF
    )
}

/// SDM vol. 3, table 6-5.
fn makes_double_fault(first: u8, second: u8) -> bool {
    let contributory = |v| {
        matches!(
            v,
            vector::DE | vector::TS | vector::NP | vector::SS | vector::GP
        )
    };
    (contributory(first) && contributory(second))
        || (first == vector::PF && (contributory(second) || second == vector::PF))
}
