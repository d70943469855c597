//! From INIT to 64-bit mode: how a vCPU starts that another one wakes (SDM vol. 3,
//! §8.4), through real and 32-bit mode.
//!
//! ```text
//! INIT ─▶ waits ─start-up─▶ real mode ─▶ protected, with or without paging ─▶
//!                           long mode, 32-bit code ─far jump─▶ 64-bit code
//! ```
//!
//! This is an interpreter for what kernels do on that way: integer instructions,
//! flat or segmented, without interrupts. What it lacks ends the machine with an
//! error that names the instruction; a fault, which no handler waits for, is a
//! triple fault.
//!
//! Invariant: every access goes through a segment, and paging where it is on, to
//! memory or nowhere; one call executes a bounded number of instructions.

mod alu;
mod execute;
mod memory;
mod transfer;

use iced_x86::{Decoder, Instruction, Mnemonic};
use x86::control::vector;
use x86::descriptor;
use x86::state::{Segment, VcpuState};

use crate::apic::Startup;
use crate::cpu::{Cpu, Phase, Registers, Run};
use crate::interp::is_locked;
use crate::mmu::walk::Access;

/// Instructions until interrupts and kicks are looked after.
const TURN: u32 = 1000;

/// Why a vCPU cannot go on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// A fault that nobody handles.
    TripleFault,
    /// An instruction that is not known here.
    Engine(String),
}

/// Why an instruction did not complete.
#[derive(Debug, PartialEq, Eq)]
enum Trouble {
    /// An exception.
    Fault(u8),
    /// Unknown here.
    Lacks,
}

const GP: Trouble = Trouble::Fault(vector::GP);

impl From<crate::exceptions::Fault> for Trouble {
    fn from(fault: crate::exceptions::Fault) -> Self {
        match fault {
            crate::exceptions::Fault::Exception(vector, _) => Self::Fault(vector),
            crate::exceptions::Fault::Debug(_) => Self::Fault(vector::DB),
            crate::exceptions::Fault::Page(..) => Self::Fault(vector::PF),
            crate::exceptions::Fault::Engine(_) => Self::Lacks,
        }
    }
}

impl Cpu {
    /// INIT and start-up interrupts came.
    pub(crate) fn take_startup(&mut self, came: Startup) {
        if came.init {
            self.initialize();
        }
        if let (Some(page), Phase::Waits) = (came.start, self.phase) {
            self.regs.segments[VcpuState::CS] = Segment {
                selector: u16::from(page) << 8,
                base: u64::from(page) << 12,
                limit: 0xffff,
                rights: 0x009b,
            };
            self.context.rip = 0;
            self.phase = Phase::Early;
            tracing::debug!(vcpu = self.id, page, "starts");
        }
    }

    /// INIT (SDM vol. 3, table 9-1): as after RESET, but x87, SSE and AVX registers, XCR0,
    /// the TSC and most MSRs stay. The first vCPU would go on in a firmware that is not
    /// there.
    fn initialize(&mut self) {
        let reset = VcpuState::after_reset();
        let old = &self.regs;
        self.regs = Registers {
            star: old.star,
            lstar: old.lstar,
            cstar: old.cstar,
            fmask: old.fmask,
            xcr0: old.xcr0,
            plain_msrs: old.plain_msrs,
            kvm_system_time: old.kvm_system_time,
            kvm_wall_clock: old.kvm_wall_clock,
            ..Registers::at_reset(&reset)
        };
        self.context.gpr = reset.gpr;
        self.context.rip = reset.rip;
        self.context.fs_base = 0;
        self.context.gs_base = 0;
        self.set_rflags(reset.rflags);
        self.apic.initialize();
        self.publish_apic();
        self.halted = false;
        self.nmi_pending = false;
        self.nmi_blocked = false;
        self.flush_all();
        self.units_changed();
        self.phase = if self.id == 0 {
            Phase::Early
        } else {
            Phase::Waits
        };
    }

    /// Bytes of the default operand and address size.
    fn early_bits(&self) -> u32 {
        if self.regs.segments[VcpuState::CS].rights & descriptor::BIG != 0 {
            32
        } else {
            16
        }
    }

    fn early_fetch(&mut self, into: &mut Instruction) -> Result<(), Trouble> {
        let cs = self.regs.segments[VcpuState::CS];
        let ip = self.context.rip;
        if ip > u64::from(cs.limit) {
            return Err(GP);
        }
        let mut bytes = [0; 15];
        let mut len = 0;
        let mut decoded = Err(Trouble::Fault(vector::UD));
        // As many bytes as are there: the next page may not be.
        while len < bytes.len() {
            let at = cs.base.wrapping_add(ip + len as u64) & 0xffff_ffff;
            let room = (4096 - (at & 0xfff) as usize).min(bytes.len() - len);
            let pa = self.early_walk(at, Access::Execute)?;
            if !self.ram.read(pa, &mut bytes[len..len + room]) {
                return Err(GP);
            }
            len += room;
            let options = translator::decoder_options(self.model);
            let mut decoder = Decoder::with_ip(self.early_bits(), &bytes[..len], ip, options);
            decoder.decode_out(into);
            if !into.is_invalid() {
                decoded = Ok(());
                break;
            }
        }
        decoded
    }
}

impl Run<'_> {
    /// Executes some instructions, until 64-bit code begins at the latest.
    pub(crate) fn start_up(&mut self) -> Result<(), Stop> {
        for _ in 0..TURN {
            if self.halted || self.phase != Phase::Early {
                break;
            }
            let mut ins = Instruction::default();
            let done = self.early_fetch(&mut ins).and_then(|()| {
                self.stats.interpreted += 1;
                let locked = is_locked(&ins);
                if locked {
                    self.begin_alone();
                }
                let done = match ins.mnemonic() {
                    Mnemonic::In | Mnemonic::Out => self.early_port(&ins),
                    _ => self.early_execute(&ins),
                };
                if locked {
                    self.end_alone();
                }
                done
            });
            match done {
                Ok(()) => {}
                Err(Trouble::Fault(vector)) => {
                    tracing::warn!(
                        vcpu = self.id,
                        vector,
                        cs = self.regs.segments[VcpuState::CS].selector,
                        rip = self.context.rip,
                        instruction = %ins,
                        "fault before 64-bit mode"
                    );
                    return Err(Stop::TripleFault);
                }
                Err(Trouble::Lacks) => {
                    return Err(Stop::Engine(format!(
                        "`{ins}` is not executed before 64-bit mode, which vCPUs only pass through \
                         real and 32-bit mode to"
                    )));
                }
            }
        }
        Ok(())
    }
}
