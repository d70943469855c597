//! The loop around translated code: enter, see why it came back, act.
//!
//! ```text
//! attend ─▶ look RIP up ─▶ enter ─▶ exit ──▶ resume in the block ──▶ enter
//!   ▲                                 └────▶ RIP is set
//!   └──────────────────────────────────────────┘
//! ```
//!
//! Invariant: a resume goes to a block that was live when the exit was handled.
//! Whatever may have dropped it (a store into code, a translation that flushed
//! the cache) goes on by looking RIP up.

use hv::{Error, Exit as Ended, Io};
use iced_x86::{EncodingKind, Instruction, Mnemonic, Register};
use translator::block::{Exit, FAULT_EXIT, INDIRECT_EXIT, Kind};
use x86::control::{cr4, vector};

use crate::blocks::{Id, Key, Record};
use crate::cpu::{Cpu, HOST_FLAGS, Phase, Run};
use crate::doorbell::Doorbell;
use crate::enter::Stay;
use crate::exceptions::{Fault, GP, Raised, SS, UD};
use crate::fault::Armed;
use crate::interrupts::{Attention, HostTimer};
use crate::mmu::access::Place;
use crate::mmu::walk::Access;
use crate::startup::Stop;
use crate::translate::NoBlock;

/// Groups that failed so often are linked to their per-access variant.
const GROUP_FAILURES_MAX: u8 = 4;

/// Where to go on.
pub(crate) enum Next {
    /// At RIP.
    Look,
    /// At a host address in a live block.
    Resume(u64),
}

impl From<NoBlock> for Fault {
    fn from(reason: NoBlock) -> Self {
        match reason {
            NoBlock::Fault(fault) => fault,
            NoBlock::NotBounceable => UD,
        }
    }
}

impl Cpu {
    /// Runs until something ends it.
    pub(crate) fn run(&mut self, io: &dyn Io, bell: &Doorbell) -> Result<Ended, Error> {
        let host = |doing| move |source| Error::Host { doing, source };
        let code = self.blocks.buf.span();
        let exit_thunk = self.blocks.thunks.exit;
        let samples = self.watch.trace.as_ref().map(|trace| trace.samples());
        let armed = Armed::new(&mut self.context, bell, code, exit_thunk, samples)
            .map_err(host("arm the signal handlers"))?;
        let fpu = self.fpu.clone();
        self.load_xmm(&fpu);
        let stay = Stay::begin(&self.context, &fpu).map_err(host("set the GS base"))?;
        self.context.tsc_offset = self.clock.offset();
        self.refresh_crossing();
        let awake = self.awake();
        // Timers, and what came while nobody ran.
        self.context.pending = 1;
        self.collect();
        let ended = self.run_or_tell(io, bell, &stay, &armed);
        stay.end(&mut self.fpu);
        self.save_xmm();
        drop(armed);
        self.record_writes();
        drop(awake);
        self.publish();
        ended
    }

    pub(crate) fn broken(&self, why: String) -> Error {
        Error::Engine {
            engine: crate::NAME,
            rip: self.context.rip,
            why,
        }
    }

    /// Host address for RIP, and S1 as its block expects it.
    fn look(&mut self) -> Result<u64, Fault> {
        let rip = self.context.rip;
        self.context.scratch[0] = rip;
        let mode = self.mode();
        let code = self.context.jumps[mode as usize].code[mode.jump_index(rip)];
        if code != self.jump_miss {
            Ok(code)
        } else {
            self.look_slowly()
        }
    }

    fn look_slowly(&mut self) -> Result<u64, Fault> {
        let rip = self.context.rip;
        let mode = self.mode();
        let walked = self.walk(rip, Access::Execute, mode)?;
        if !self.ram.contains(walked.pa, 1) {
            return Err(GP);
        }
        let mut global = walked.global;
        let key = Key {
            va: rip,
            page: (walked.pa >> 12) as u32,
            mode: self.mode(),
            kind: Kind::Grouped,
        };
        let mut id = self.block(key)?;
        if self.blocks.record(id).crosses() {
            let second = self.walk((rip | 0xfff).wrapping_add(1), Access::Execute, mode)?;
            global &= second.global;
            id = self.with_second(id, key, second.pa)?;
        }
        let code = self.blocks.buf.address(self.blocks.record(id).indirect());
        if !self.breakpoints.stops_at(rip) {
            self.fill_jump(rip, code, global);
            self.fill_jumps_beside(&key, walked.global);
        }
        self.context.scratch[0] = rip;
        Ok(code)
    }

    /// Block `id`, which runs into a second page, or another one in its place if that
    /// page is not the one at `second` any more.
    fn with_second(&mut self, id: Id, key: Key, second: u64) -> Result<Id, Fault> {
        if u64::from(self.blocks.record(id).second) == second >> 12 {
            return Ok(id);
        }
        if let Some(old) = self.blocks.kill(id) {
            let code = self.blocks.buf.address(old.indirect());
            self.drop_jump(old.va, old.mode(), code);
        }
        Ok(self.translate(key)?)
    }

    /// Host address of a block that is the one instruction at RIP.
    pub(crate) fn step_block(&mut self) -> Result<u64, Fault> {
        let (va, mode) = (self.context.rip, self.mode());
        let walked = self.walk(va, Access::Execute, mode)?;
        if !self.ram.contains(walked.pa, 1) {
            return Err(GP);
        }
        let key = Key {
            va,
            page: (walked.pa >> 12) as u32,
            mode,
            kind: Kind::Step,
        };
        let mut id = self.block(key)?;
        if self.blocks.record(id).crosses() {
            let second = self.walk((va | 0xfff).wrapping_add(1), Access::Execute, mode)?;
            id = self.with_second(id, key, second.pa)?;
        }
        Ok(self.blocks.buf.address(self.blocks.record(id).direct()))
    }

    fn save_xmm(&mut self) {
        let mut fpu = self.fpu.clone();
        self.put_xmm(&mut fpu);
        self.fpu = fpu;
    }
}

impl Run<'_> {
    pub(crate) fn run(
        &mut self,
        bell: &Doorbell,
        stay: &Stay,
        armed: &Armed,
    ) -> Result<Ended, Error> {
        if self.alone {
            return self.run_alone(stay);
        }
        let mut timer = HostTimer::default();
        loop {
            if self.context.pending != 0 || bell.rung() {
                match self.attend(bell, &mut timer, armed) {
                    Attention::Run => {}
                    Attention::End(exit) => return Ok(exit),
                    Attention::Broken(why) => return Err(self.broken(why)),
                }
            }
            if self.ram.guest_ram().epochs().watched_write_pending() {
                self.invalidate_device_writes();
            }
            if self.is_wanted() {
                self.serve();
            }
            if self.phase != Phase::Long {
                match self.start_up() {
                    Ok(()) => continue,
                    Err(stop) => return self.stopped(stop),
                }
            }
            let mut next = self.begin();
            loop {
                match next {
                    Ok(Next::Resume(at)) => {
                        let number = self.enter(stay, at);
                        if self.watch.trace.is_some() {
                            self.trace_exit(number);
                        }
                        next = self.handle(number, stay);
                    }
                    Ok(Next::Look) => match self.trap() {
                        Some(fault) => next = Err(fault),
                        None => break,
                    },
                    Err(fault) => match self.raise(fault) {
                        Raised::Delivered => break,
                        Raised::TripleFault => return Ok(Ended::TripleFault),
                        Raised::Engine(why) => return Err(self.broken(why)),
                    },
                }
            }
        }
    }

    /// What is next at RIP.
    #[inline]
    fn begin(&mut self) -> Result<Next, Fault> {
        let at = if !self.begin_step()? {
            self.look()?
        } else {
            if self.checks_alignment() {
                let rip = self.context.rip;
                let ins = self.fetch(rip)?;
                self.check_alignment(&ins)?;
            }
            self.step_block()?
        };
        Ok(Next::Resume(at))
    }

    #[inline]
    pub(crate) fn enter(&mut self, stay: &Stay, at: u64) -> u32 {
        let context = &mut self.cpu.context;
        context.resume = at;
        // TF, NT and AC must not reach the host; IF always reads as set there.
        context.rflags = context.rflags & HOST_FLAGS | 0x202;
        let number = stay.enter(context);
        self.cpu.take_crossing();
        number
    }

    fn stopped(&self, stop: Stop) -> Result<Ended, Error> {
        match stop {
            Stop::TripleFault => Ok(Ended::TripleFault),
            Stop::Engine(why) => Err(self.broken(why)),
        }
    }

    pub(crate) fn handle(&mut self, number: u32, stay: &Stay) -> Result<Next, Fault> {
        if number == INDIRECT_EXIT {
            self.stats.indirect += 1;
            self.context.rip = self.context.scratch[0];
            // The lookup comes first: it replaces the entry that missed. Without it
            // an interrupt that has to wait would make us enter that one for ever.
            let at = self.look_slowly()?;
            let stops = self.breakpoints.stops_at(self.context.rip);
            let next = if self.context.pending == 0 && !stops {
                Next::Resume(at)
            } else {
                Next::Look
            };
            return Ok(next);
        }
        if number == FAULT_EXIT {
            return self.handle_fault();
        }
        let Some((exit, id)) = self.blocks.exit(number) else {
            return Err(Fault::Engine(format!("unknown exit {number}")));
        };
        let record = self.blocks.record(id);
        let at_offset = |at: u16| record.va.wrapping_add(u64::from(at));
        match exit {
            Exit::Link { target, patch } => {
                self.stats.links += 1;
                self.context.rip = record.va & !0xfff | u64::from(target);
                self.link(&record, patch)
            }
            Exit::Goto { next } => {
                self.stats.gotos += 1;
                self.context.rip = at_offset(next);
                Ok(Next::Look)
            }
            Exit::Interpret { at } => {
                self.context.rip = at_offset(at);
                let ins = self.decode(number)?;
                self.execute(&ins)?;
                Ok(Next::Look)
            }
            Exit::Access {
                at,
                size,
                write,
                stack,
                retry,
            } => {
                self.stats.accesses += 1;
                self.context.rip = at_offset(at);
                let access = Missed {
                    number,
                    id,
                    size,
                    write,
                    stack,
                    retry,
                };
                self.access(&record, &access, stay)
            }
            Exit::Group {
                at,
                len,
                write,
                stack,
                retry,
                patch,
            } => {
                self.stats.groups += 1;
                self.context.rip = at_offset(at);
                let va = self.context.scratch[0];
                if self.fill_group(va, u64::from(len), write, stack) {
                    return Ok(Next::Resume(self.blocks.address(&record, u32::from(retry))));
                }
                self.variant(&record, id, number, patch)
            }
            // Only `bounce` enters bounce blocks, and takes this exit itself.
            Exit::Bounced { .. } => Err(Fault::Engine("a bounce block was entered by jump".into())),
            Exit::Stale => {
                self.stats.stale += 1;
                self.context.rip = record.va;
                // An entry that waited with its address space does not know.
                let code = self.blocks.buf.address(record.indirect());
                self.drop_jump(record.va, record.mode(), code);
                if !self.breakpoints.stops_at(record.va) {
                    self.blocks.replace(id);
                }
                Ok(Next::Look)
            }
        }
    }

    /// A host fault in translated code, or the poll page.
    fn handle_fault(&mut self) -> Result<Next, Fault> {
        let pc = self.context.fault_pc;
        let Some((_, rip)) = self.blocks.instruction_at(pc) else {
            return Err(Fault::Engine(format!("a host fault in a stub at {pc:#x}")));
        };
        self.context.rip = rip;
        if self.context.fault_signal == 0 {
            self.stats.polls += 1;
            return Ok(Next::Look);
        }
        self.stats.faults += 1;
        let signal = self.context.fault_signal as i32;
        let trap = self.context.fault_trap as u8;
        match (signal, trap) {
            (libc::SIGFPE, vector::XM) if self.regs.cr4 & cr4::OSXMMEXCPT == 0 => Err(UD),
            (libc::SIGFPE, vector::DE | vector::MF | vector::XM) | (libc::SIGILL, vector::UD) => {
                Err(Fault::Exception(trap, None))
            }
            (libc::SIGSEGV, vector::GP) => Err(GP),
            (libc::SIGBUS, vector::SS) => Err(SS),
            (libc::SIGBUS | libc::SIGSEGV, vector::AC) => {
                Err(Fault::Exception(vector::AC, Some(0)))
            }
            _ => Err(Fault::Engine(format!(
                "host signal {signal}, trap {trap} at {pc:#x}"
            ))),
        }
    }

    /// RIP is a constant target in the record's page.
    fn link(&mut self, record: &Record, patch: u32) -> Result<Next, Fault> {
        // Not the record's mode where STAC or CLAC led here.
        let key = Key {
            va: self.context.rip,
            page: record.page,
            mode: self.mode(),
            kind: Kind::Grouped,
        };
        if self.breakpoints.stops_at(key.va) {
            return Ok(Next::Look);
        }
        let generation = self.blocks.generation;
        let id = self.block(key)?;
        let target = self.blocks.record(id);
        let linkable = self.blocks.generation == generation;
        let from = record.place as usize + patch as usize;
        if !target.crosses() {
            if linkable {
                let entry = target.linked_from(record.va);
                self.blocks.buf.patch_rel32(from, entry);
            }
            return Ok(Next::Resume(self.blocks.buf.address(target.direct())));
        }
        if linkable {
            let place = self.blocks.buf.address(self.blocks.buf.used());
            let stub = translator::cross_jump_stub(key.va, key.mode, place);
            if let Some(stub) = self.blocks.buf.append(&stub) {
                self.blocks.buf.patch_rel32(from, stub);
            }
        }
        Ok(Next::Look)
    }

    /// An access missed the TLB.
    fn access(&mut self, record: &Record, missed: &Missed, stay: &Stay) -> Result<Next, Fault> {
        let va = self.context.scratch[0];
        let mode = self.mode();
        let misaligned = matches!(missed.size, 16 | 32) && va & (u64::from(missed.size) - 1) != 0;
        if misaligned && wants_alignment(&self.decode(missed.number)?) {
            // Before any page fault; where the page is there, the host's CPU finds out.
            return Err(GP);
        }
        if (va & 0xfff) as usize + usize::from(missed.size) > 4096 {
            let stack = missed.stack || on_stack(&self.decode(missed.number)?, missed.write);
            return self
                .slow_access(record, missed, stay)
                .map_err(|fault| fault.on_stack(stack));
        }
        let place = match self.place(va, missed.write, mode) {
            Ok(place) => place,
            Err(fault) => {
                // Only the stack's slot says so by itself; an RBP does not.
                let stack = missed.stack || on_stack(&self.decode(missed.number)?, missed.write);
                return Err(fault.on_stack(stack));
            }
        };
        if self.breakpoints.watches_page(va) {
            let size = usize::from(missed.size);
            self.breakpoints.accessed(va, size, missed.write);
            return self.slow_access(record, missed, stay);
        }
        if let Place::Memory(_) = place
            && (!missed.stack || self.fill_stack_slot(va))
            && self.blocks.record(missed.id).live()
        {
            return Ok(Next::Resume(self.blocks.address(record, missed.retry)));
        }
        self.slow_access(record, missed, stay)
    }

    /// Fills the stack's slot, which also wants to be written; false if it cannot be.
    fn fill_stack_slot(&mut self, va: u64) -> bool {
        let mode = self.mode();
        if !self.fill_ahead(va, true, mode) {
            return false;
        }
        self.fill_stack(va, mode);
        self.context.tlb[mode as usize].stack_tag == va & !0xfff
    }

    /// Makes a group's check succeed, if it can.
    fn fill_group(&mut self, va: u64, len: u64, write: bool, stack: bool) -> bool {
        if (va & 0xfff) + len > 4096 {
            return false;
        }
        if stack {
            return self.fill_stack_slot(va);
        }
        let mode = self.mode();
        self.fill_ahead(va, write, mode)
    }

    /// Goes on at RIP with every access checked on its own.
    fn variant(
        &mut self,
        record: &Record,
        from: Id,
        number: u32,
        patch: u16,
    ) -> Result<Next, Fault> {
        self.stats.variants += 1;
        let key = Key {
            va: self.context.rip,
            page: record.page,
            mode: record.mode(),
            kind: Kind::PerAccess,
        };
        let generation = self.blocks.generation;
        let id = self.block(key)?;
        let target = self.blocks.record(id);
        if target.crosses() {
            return Ok(Next::Look);
        }
        if self.blocks.generation == generation
            && self.blocks.record(from).live()
            && self.blocks.group_failed(number) >= GROUP_FAILURES_MAX
        {
            let at = record.place as usize + usize::from(patch);
            self.blocks.buf.patch_jump(at, target.direct());
        }
        Ok(Next::Resume(self.blocks.buf.address(target.direct())))
    }
}

/// An [`Exit::Access`], and where it came from.
pub(crate) struct Missed {
    pub(crate) number: u32,
    pub(crate) id: Id,
    pub(crate) size: u8,
    pub(crate) write: bool,
    pub(crate) stack: bool,
    pub(crate) retry: u32,
}

/// Does the instruction's read or write go through SS?
fn on_stack(ins: &Instruction, write: bool) -> bool {
    let implied = match ins.mnemonic() {
        Mnemonic::Push | Mnemonic::Pushfq | Mnemonic::Call => write,
        Mnemonic::Pop | Mnemonic::Popfq | Mnemonic::Ret | Mnemonic::Leave => !write,
        _ => false,
    };
    implied || ins.memory_segment() == Register::SS
}

/// Does the instruction refuse a misaligned operand of 16 or 32 bytes? All of legacy
/// SSE does (SDM vol. 1, 14.9.1), but for a few; of VEX-encoded ones only moves that
/// say so. AMD's processors take SHA's operands as they are.
fn wants_alignment(ins: &Instruction) -> bool {
    use Mnemonic as M;
    let is_sha = matches!(
        ins.mnemonic(),
        M::Sha1msg1
            | M::Sha1msg2
            | M::Sha1nexte
            | M::Sha1rnds4
            | M::Sha256msg1
            | M::Sha256msg2
            | M::Sha256rnds2
    );
    if is_sha {
        return !crate::cpuid::host_is_amds();
    }
    if ins.code().encoding() == EncodingKind::VEX {
        return matches!(
            ins.mnemonic(),
            M::Vmovaps
                | M::Vmovapd
                | M::Vmovdqa
                | M::Vmovntps
                | M::Vmovntpd
                | M::Vmovntdq
                | M::Vmovntdqa
        );
    }
    !matches!(
        ins.mnemonic(),
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Pcmpistri
            | M::Pcmpistrm
    )
}
