//! IN, OUT and their string forms.

use iced_x86::{Instruction, Mnemonic, OpKind};
use translator::context::Mode;
use x86::registers::{RCX, RDI, RDX, RSI, rflags};

use super::Flow;
use crate::cpu::Run;
use crate::exceptions::{Fault, GP, UD};

impl Run<'_> {
    pub(super) fn port(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use Mnemonic as M;
        let port_of = |run: &Self, k| match ins.op_kind(k) {
            OpKind::Register => run.context.gpr[RDX] as u16,
            _ => u16::from(ins.immediate8()),
        };
        match ins.mnemonic() {
            M::In => {
                let register = ins.op0_register();
                let port = port_of(self, 1);
                self.port_allowed(port, register.size())?;
                let value = self.port_read(port, register.size());
                self.set_register(register, value);
                Ok(Flow::Next)
            }
            M::Out => {
                let register = ins.op1_register();
                let port = port_of(self, 0);
                self.port_allowed(port, register.size())?;
                let value = self.register(register);
                self.port_write(port, register.size(), value);
                Ok(Flow::Next)
            }
            _ => self.port_string(ins),
        }
    }

    fn port_string(&mut self, ins: &Instruction) -> Result<Flow, Fault> {
        use Mnemonic as M;
        let (input, size) = match ins.mnemonic() {
            M::Insb => (true, 1),
            M::Insw => (true, 2),
            M::Insd => (true, 4),
            M::Outsb => (false, 1),
            M::Outsw => (false, 2),
            M::Outsd => (false, 4),
            _ => return Err(UD),
        };
        let port = self.context.gpr[RDX] as u16;
        self.port_allowed(port, size)?;
        let repeat = ins.has_rep_prefix() || ins.has_repne_prefix();
        if repeat && self.context.gpr[RCX] == 0 {
            return Ok(Flow::Next);
        }
        let down = self.context.rflags & rflags::DF != 0;
        let step = if down {
            (size as u64).wrapping_neg()
        } else {
            size as u64
        };
        // One element a turn: interrupts come between.
        if input {
            let to = self.context.gpr[RDI];
            let mode = self.mode();
            self.check_write(to, size as u64, mode)?;
            let value = self.port_read(port, size);
            self.store(to, size, value)?;
            self.context.gpr[RDI] = to.wrapping_add(step);
        } else {
            let from = self.context.gpr[RSI];
            let at = from.wrapping_add(self.segment_base(ins.memory_segment()));
            let value = self.load(at, size)?;
            self.port_write(port, size, value);
            self.context.gpr[RSI] = from.wrapping_add(step);
        }
        if !repeat {
            return Ok(Flow::Next);
        }
        self.context.gpr[RCX] = self.context.gpr[RCX].wrapping_sub(1);
        Ok(if self.context.gpr[RCX] == 0 {
            Flow::Next
        } else {
            Flow::Jumped
        })
    }

    /// IOPL, or the permission bitmap of the task (SDM vol. 1, §19.5.2).
    fn port_allowed(&mut self, port: u16, size: usize) -> Result<(), Fault> {
        let iopl = (self.context.rflags_high & rflags::IOPL) >> 12;
        if u64::from(self.regs.cpl) <= iopl {
            return Ok(());
        }
        let tr = self.regs.tr;
        if tr.limit < 0x67 {
            return Err(GP);
        }
        let mut map = [0; 2];
        self.read_memory(tr.base.wrapping_add(0x66), &mut map, Mode::Kernel)?;
        let byte = u32::from(u16::from_le_bytes(map)) + u32::from(port / 8);
        if byte + 1 > tr.limit {
            return Err(GP);
        }
        let mut bits = [0; 2];
        self.read_memory(
            tr.base.wrapping_add(u64::from(byte)),
            &mut bits,
            Mode::Kernel,
        )?;
        let wanted = ((1u16 << size) - 1) << (port % 8);
        if u16::from_le_bytes(bits) & wanted == 0 {
            Ok(())
        } else {
            Err(GP)
        }
    }

    pub(crate) fn port_read(&mut self, port: u16, size: usize) -> u64 {
        self.stats.pio += 1;
        self.breakpoints.port(port, size);
        let mut bytes = [0; 8];
        self.outside(|io| io.pio_read(port, &mut bytes[..size.min(4)]));
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn port_write(&mut self, port: u16, size: usize, value: u64) {
        self.stats.pio += 1;
        self.breakpoints.port(port, size);
        self.outside(|io| io.pio_write(port, &value.to_le_bytes()[..size.min(4)]));
    }
}
