//! What is said when the engine failed: guest and host code, registers, and the block
//! that ran last.
//!
//! ```text
//! the engine failed on vCPU 0: host signal 5, trap 3 at 0x7f2a…
//!   guest rip 0x1000023, kernel, rflags 0x2, cr0 …
//!   rax 0x… rcx 0x… …
//!   code at rip: b0 6c ee …
//!   host pc 0x7f2a…, signal 5, trap 3, address 0x0, r14 0x… r15 0x…
//!   block of 31 bytes at 0x1000023 (grouped, kernel), host code at 0x7f2a…:
//!     65 48 8b …
//! ```
//!
//! Invariant: reading all this changes nothing that a guest sees, and a report that
//! fails itself takes nothing with it.
//!
//! Left to others: ending the machine.

use std::any::Any;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use hv::{Error, Exit as Ended, Io};
use translator::block::{FAULT_EXIT, INDIRECT_EXIT};

use crate::blocks::Id;
use crate::cpu::{Cpu, Phase, Run};
use crate::doorbell::Doorbell;
use crate::enter::Stay;
use crate::fault::Armed;
use crate::mmu::walk::Access;
use crate::trace::{describe, kind_name, mode_name};

/// Guest code that is shown: more than two instructions of the greatest length.
const GUEST_CODE_MAX: usize = 32;
/// Host code that is shown, and how much of it before the place in question.
const HOST_CODE_MAX: usize = 512;
const HOST_CODE_BEFORE: usize = 256;
const LINE: usize = 32;

/// Of a host fault, what the context does not hold.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FaultDetails {
    /// What was accessed, for signals that say so.
    pub(crate) address: u64,
    /// r15, which leaves translated code as the exit's number.
    pub(crate) r15: u64,
}

impl Cpu {
    /// Runs; a failure of the engine, a panic included, is told before it goes on its
    /// way.
    pub(crate) fn run_or_tell(
        &mut self,
        io: &dyn Io,
        bell: &Doorbell,
        stay: &Stay,
        armed: &Armed,
    ) -> Result<Ended, Error> {
        let run = AssertUnwindSafe(|| Run { cpu: self, io }.run(bell, stay, armed));
        match catch_unwind(run) {
            Ok(ended) => {
                if let Err(Error::Engine { why, .. }) = &ended {
                    self.tell(why, armed);
                }
                ended
            }
            Err(panic) => {
                self.tell(&format!("panic: {}", words(&*panic)), armed);
                resume_unwind(panic)
            }
        }
    }

    fn tell(&self, why: &str, armed: &Armed) {
        Stay::outside(|| {
            let report = AssertUnwindSafe(|| self.report(why, armed.fault_details()));
            match catch_unwind(report) {
                Ok(report) => tracing::error!("{report}"),
                Err(_) => tracing::error!("the engine failed on vCPU {}: {why}", self.id),
            }
        });
    }

    fn report(&self, why: &str, fault: FaultDetails) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write_report(&mut text, why, fault);
        text
    }

    fn write_report(
        &self,
        text: &mut String,
        why: &str,
        fault: FaultDetails,
    ) -> Result<(), std::fmt::Error> {
        let (context, regs) = (&self.context, &self.regs);
        writeln!(text, "the engine failed on vCPU {}: {why}", self.id)?;
        writeln!(
            text,
            "  guest rip {:#x}, {}, rflags {:#x}, cr0 {:#x}, cr2 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x}",
            context.rip,
            if self.phase == Phase::Long {
                mode_name(self.mode())
            } else {
                "starting"
            },
            self.rflags(),
            regs.cr0,
            regs.cr2,
            regs.cr3,
            regs.cr4,
            regs.efer,
        )?;
        const NAMES: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ];
        for (names, values) in NAMES.chunks(4).zip(context.gpr.chunks(4)) {
            text.push(' ');
            for (name, value) in names.iter().zip(values) {
                write!(text, " {name} {value:#x}")?;
            }
            text.push('\n');
        }
        match self.code_at(context.rip) {
            Some(code) => writeln!(text, "  code at rip: {}", hex(&code))?,
            None => writeln!(text, "  code at rip: not in memory")?,
        }
        self.write_host_side(text, fault)
    }

    fn write_host_side(
        &self,
        text: &mut String,
        fault: FaultDetails,
    ) -> Result<(), std::fmt::Error> {
        let context = &self.context;
        // As the exit thunk left it.
        let number = context.scratch[1] as u32;
        let entered = |pc| self.blocks.instruction_at(pc).map(|(id, _)| id);
        let (id, pc): (Option<Id>, u64) = match number {
            _ if context.resume == 0 => (None, 0),
            INDIRECT_EXIT => {
                writeln!(
                    text,
                    "  translated code was entered at {:#x} and left by a jump to {:#x}",
                    context.resume, context.scratch[0]
                )?;
                (entered(context.resume), context.resume)
            }
            FAULT_EXIT => {
                writeln!(
                    text,
                    "  host pc {:#x}, signal {}, trap {}, address {:#x}, r14 {:#x}, r15 {:#x}",
                    context.fault_pc,
                    context.fault_signal,
                    context.fault_trap,
                    fault.address,
                    context.scratch[0],
                    fault.r15,
                )?;
                (entered(context.fault_pc), context.fault_pc)
            }
            _ => match self.blocks.exit(number) {
                Some((exit, id)) => {
                    let (name, at) = describe(&exit);
                    writeln!(
                        text,
                        "  translated code was left by exit {number}: {name} at +{at:#x}"
                    )?;
                    (Some(id), 0)
                }
                None => (None, 0),
            },
        };
        let Some(id) = id else {
            return write!(text, "  no block is known to have run");
        };
        let record = self.blocks.record(id);
        write!(
            text,
            "  block of {} bytes at {:#x} ({}, {}), ",
            record.guest_len,
            record.va,
            kind_name(record.kind()),
            mode_name(record.mode()),
        )?;
        if let Some(code) = self.code_at(record.va) {
            let len = usize::from(record.guest_len).min(code.len());
            write!(text, "{}, ", hex(&code[..len]))?;
        }
        let (at, code) = self.blocks.code(id);
        let inside = usize::try_from(pc.saturating_sub(at)).unwrap_or(0);
        let from = inside.saturating_sub(HOST_CODE_BEFORE).min(code.len());
        let to = code.len().min(from + HOST_CODE_MAX);
        write!(text, "host code at {:#x}:", at + from as u64)?;
        for line in code[from..to].chunks(LINE) {
            write!(text, "\n    {}", hex(line))?;
        }
        Ok(())
    }

    /// Guest code at a linear address, to the end of its page.
    fn code_at(&self, va: u64) -> Option<Vec<u8>> {
        // While it starts, a vCPU has no page tables, or may have none.
        let pa = if self.phase == Phase::Long {
            let mode = self.mode();
            let walked = self.paging().walk(&self.ram, va, Access::Execute, mode);
            walked.ok()?.pa
        } else {
            let cs = self.regs.segments[x86::state::VcpuState::CS];
            cs.base.wrapping_add(va) & 0xffff_ffff
        };
        let len = GUEST_CODE_MAX.min(4096 - (pa & 0xfff) as usize);
        let mut code = vec![0; len];
        (self.ram.contains(pa, len as u64) && self.ram.read(pa, &mut code)).then_some(code)
    }
}

fn hex(bytes: &[u8]) -> String {
    let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    let string = || panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(string).unwrap_or("without words")
}

/// Text in a buffer of its own: for signal handlers. What does not fit is left out.
pub(crate) struct Words {
    bytes: [u8; 2048],
    len: usize,
}

impl Words {
    /// Async-signal-safe.
    pub(crate) fn new() -> Self {
        Self {
            bytes: [0; 2048],
            len: 0,
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    pub(crate) fn hex(&mut self, bytes: &[u8]) {
        for byte in bytes {
            // What does not fit is left out.
            let _ = write!(self, " {byte:02x}");
        }
    }
}

/// Async-signal-safe, as is the formatting of numbers into it.
impl std::fmt::Write for Words {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = self.bytes.get_mut(self.len..self.len + text.len());
        room.ok_or(std::fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.len += text.len();
        Ok(())
    }
}
