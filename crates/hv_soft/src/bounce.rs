//! Accesses that the hot path cannot do: over a page's end, to devices, to pages with
//! translated code. The instruction is executed on its own, in memory where its operand
//! is in one page of it, on a copy of the operand otherwise, or by the interpreter.
//!
//! Invariant: a copy is written back only after the instruction completed, and its
//! page was checked before it began; locked instructions on a copy run while no other
//! vCPU does.

use iced_x86::{Instruction, InstructionInfoFactory, OpAccess, OpKind};
use translator::block::{Exit, Kind};

use crate::blocks::{Id, Key, Record};
use crate::cpu::Run;
use crate::dispatch::{Missed, Next};
use crate::enter::Stay;
use crate::exceptions::{Fault, GP};
use crate::interp;
use crate::mmu::access::Place;
use crate::translate::NoBlock;

/// The bounce page's spare bytes before an operand.
const BOUNCE_MARGIN: usize = 64;
const BOUNCE_MAX: usize = 64;

impl Run<'_> {
    /// One instruction whose access the hot path cannot do.
    pub(crate) fn slow_access(
        &mut self,
        record: &Record,
        missed: &Missed,
        stay: &Stay,
    ) -> Result<Next, Fault> {
        let ins = self.decode(missed.number)?;
        if interp::prefers(&ins) && !interp::is_locked(&ins) {
            self.execute(&ins)?;
            return Ok(Next::Look);
        }
        let key = Key {
            va: self.context.rip,
            page: record.page,
            mode: record.mode(),
            kind: Kind::Bounce,
        };
        match self.block(key) {
            Ok(id) => self.bounce(id, &ins, missed, stay),
            Err(NoBlock::NotBounceable) => self.execute(&ins).map(|()| Next::Look),
            Err(NoBlock::Fault(fault)) => Err(fault),
        }
    }

    /// Executes one instruction on its own: on memory, where the operand is in one
    /// page of it, so that locked ones are as atomic as they should be; otherwise on
    /// a copy of its operand.
    fn bounce(
        &mut self,
        id: Id,
        ins: &Instruction,
        missed: &Missed,
        stay: &Stay,
    ) -> Result<Next, Fault> {
        self.stats.bounces += 1;
        let va = self.context.scratch[0];
        let (size, mode) = (usize::from(missed.size).min(BOUNCE_MAX), self.mode());
        if (va & 0xfff) as usize + size <= 4096 {
            match self.place(va, missed.write, mode)? {
                Place::Memory(pa) => return self.bounce_in_place(id, pa, size, false, stay),
                Place::Code(pa) => return self.bounce_in_place(id, pa, size, true, stay),
                Place::Device(_) => {}
            }
        }
        if !interp::is_locked(ins) {
            return self.bounce_copy(id, ins, missed, stay);
        }
        self.begin_alone();
        let next = if self.blocks.record(id).live() {
            self.bounce_copy(id, ins, missed, stay)
        } else {
            Ok(Next::Look)
        };
        self.end_alone();
        next
    }

    /// Executes one instruction whose operand is `size` bytes of memory at `pa`,
    /// within a page, which holds code if `code`.
    fn bounce_in_place(
        &mut self,
        id: Id,
        pa: u64,
        size: usize,
        code: bool,
        stay: &Stay,
    ) -> Result<Next, Fault> {
        if !self.ram.contains(pa, size as u64) {
            return Err(GP);
        }
        if code {
            self.begin_code_store(pa, size as u64);
        }
        let record = self.blocks.record(id);
        let number = record.live().then(|| {
            self.context.bounce_at = self.ram.host(pa);
            self.enter(stay, self.blocks.buf.address(record.direct()))
        });
        if code {
            self.end_code_store(pa, size as u64);
        }
        match number.map(|number| (number, self.blocks.exit(number))) {
            Some((_, Some((Exit::Bounced { next }, _)))) => {
                self.context.rip = record.va.wrapping_add(u64::from(next));
                Ok(Next::Look)
            }
            Some((number, _)) => self.handle(number, stay),
            None => Ok(Next::Look),
        }
    }

    fn bounce_copy(
        &mut self,
        id: Id,
        ins: &Instruction,
        missed: &Missed,
        stay: &Stay,
    ) -> Result<Next, Fault> {
        let va = self.context.scratch[0];
        let (size, mode) = (usize::from(missed.size).min(BOUNCE_MAX), self.mode());
        if missed.write {
            self.check_write(va, size as u64, mode)?;
        }
        let mut operand = [0; BOUNCE_MAX];
        let operand = &mut operand[..size];
        if !(missed.write && writes_only(ins)) {
            self.read_bytes(va, operand)?;
        }
        // Same alignment as in the guest, for instructions that want it.
        let offset = BOUNCE_MARGIN + (va & 63) as usize;
        self.context.bounce.0[offset..][..size].copy_from_slice(operand);
        self.context.bounce_at = self.context.bounce_page() + offset as u64;
        let record = self.blocks.record(id);
        let number = self.enter(stay, self.blocks.buf.address(record.direct()));
        let Some((Exit::Bounced { next }, exited)) = self.blocks.exit(number) else {
            return self.handle(number, stay);
        };
        if exited != id {
            return Err(Fault::Engine(
                "a bounce block left through another's exit".into(),
            ));
        }
        if missed.write {
            operand.copy_from_slice(&self.context.bounce.0[offset..][..size]);
            self.write_bytes(va, operand)?;
        }
        self.context.rip = record.va.wrapping_add(u64::from(next));
        Ok(Next::Look)
    }
}

/// Whether an instruction overwrites its memory operand without reading it.
fn writes_only(ins: &Instruction) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(ins);
    (0..ins.op_count())
        .filter(|k| ins.op_kind(*k) == OpKind::Memory)
        .all(|k| info.op_access(k) == OpAccess::Write)
}
