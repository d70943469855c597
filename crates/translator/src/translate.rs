//! One block from request to host code.

use crate::assembler::{Assembler, context};
use crate::block::{Block, Consulted, Exit, GuestCode, Kind, Refused, Request};
use crate::context::{Context, Mode, S1};
use crate::emitter::{Emitter, Outcome};
use crate::flags;
use crate::groups::Groups;
use crate::plan::{self, STEPS_MAX, Step};
use crate::table::Class;

/// What all translations have in common.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Keep [`crate::context::Context::instructions`]: each block adds its length
    /// when it is entered.
    pub count_instructions: bool,
}

impl Options {
    /// A number that is another for options that make other code.
    #[must_use]
    pub fn shape(&self) -> u64 {
        let Self { count_instructions } = *self;
        u64::from(count_instructions)
    }
}

/// Translates blocks. Holds nothing between calls but memory to work in.
#[derive(Default)]
pub struct Translator {
    options: Options,
    steps: Vec<Step>,
    groups: Groups,
    asm: Assembler,
    out: Outcome,
}

impl Translator {
    /// A translator.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            steps: Vec::with_capacity(STEPS_MAX),
            ..Self::default()
        }
    }

    /// Translates what `request` asks for into `block`, whose former contents are
    /// lost.
    ///
    /// # Errors
    /// [`Refused`], with `block` in no particular state.
    pub fn translate(
        &mut self,
        request: &Request,
        guest: &dyn GuestCode,
        block: &mut Block,
    ) -> Result<(), Refused> {
        let decoded = plan::decode(request, guest, &mut self.steps)?;
        if request.kind == Kind::Bounce && !self.steps.iter().all(can_bounce) {
            return Err(Refused::NotBounceable);
        }
        block.consulted.clear();
        flags::mark(request, guest, &mut self.steps, &mut block.consulted);
        if request.kind == Kind::Grouped && !decoded.crosses_page {
            self.groups.plan(&self.steps);
        } else {
            self.groups.clear();
        }
        block.positions.clear();
        block.crosses_page = decoded.crosses_page;
        block.guest_len = decoded.guest_len;
        block.instructions = self.steps.len() as u16;
        std::mem::swap(&mut self.asm.code, &mut block.code);
        std::mem::swap(&mut self.asm.relocations, &mut block.relocations);
        std::mem::swap(&mut self.out.exits, &mut block.exits);
        self.asm.code.clear();
        self.asm.relocations.clear();
        self.asm.place = request.place;
        self.out.exits.clear();
        self.out.cold.clear();
        let next_byte = self.byte_behind(request, guest, &mut block.consulted);
        let stops = guest.stops().contains(&request.va);
        self.emit(request, next_byte, stops, block);
        std::mem::swap(&mut self.asm.code, &mut block.code);
        std::mem::swap(&mut self.asm.relocations, &mut block.relocations);
        std::mem::swap(&mut self.out.exits, &mut block.exits);
        Ok(())
    }

    /// The byte behind a final STI, in the same page.
    fn byte_behind(
        &self,
        request: &Request,
        guest: &dyn GuestCode,
        consulted: &mut Vec<Consulted>,
    ) -> Option<u8> {
        let last = self
            .steps
            .last()
            .filter(|step| step.class == Class::InterruptsOn)?;
        let next = usize::from(last.next());
        let byte = guest.tail(request.va)?.get(next).copied()?;
        let va = request.va.wrapping_add(next as u64);
        consulted.push(Consulted { va, len: 1 });
        Some(byte)
    }

    fn emit(&mut self, request: &Request, next_byte: Option<u8>, stops: bool, block: &mut Block) {
        let mut emitter = Emitter {
            asm: &mut self.asm,
            out: &mut self.out,
            request,
            groups: &self.groups,
            steps: &self.steps,
            start: 0,
            current: 0,
            s1_stack: false,
            s2_group: None,
            upper_live: false,
            own_entry: None,
        };
        block.positions.push((0, 0));
        block.indirect_entry = 0;
        if request.kind == Kind::Grouped {
            emitter.indirect_entry();
        }
        if request.kind == Kind::Grouped {
            if !block.crosses_page && !stops {
                emitter.own_entry = Some(emitter.asm.here());
            }
            emitter.asm.load(S1, context!(poll));
        }
        let entry = emitter.asm.here();
        block.direct_entry = entry as u16;
        if self
            .steps
            .first()
            .is_some_and(|first| is_linked(first.class))
        {
            emitter.asm.nop5();
        }
        if self.options.count_instructions && request.kind != Kind::Bounce {
            let counter = context!(instructions) + i32::from(request.mode.is_user()) * 8;
            emitter.asm.load(S1, counter);
            let m = crate::assembler::Memory::at(S1, i32::from(block.instructions));
            emitter.asm.lea(S1, m);
            emitter.asm.store(S1, counter);
        }
        let mut checks = self.groups.checks.iter().peekable();
        for (i, step) in self.steps.iter().enumerate() {
            if i != 0 {
                emitter.asm.lengthen(entry, PATCH_BYTES);
                block.positions.push((emitter.asm.here() as u16, step.at));
            }
            while let Some(check) = checks.next_if(|check| check.step == i) {
                emitter.shared_check(*check, step);
            }
            emitter.current = i;
            emitter.start = emitter.asm.here();
            if request.kind == Kind::Step && plan::jumps(step.class) {
                emitter.exit(Exit::Interpret { at: step.at });
            } else {
                emitter.step(step, next_byte);
            }
        }
        if let Some(last) = self.steps.last()
            && !plan::ends_block(last.class)
        {
            let next = last.next();
            emitter.asm.lengthen(entry, PATCH_BYTES);
            match request.kind {
                Kind::Bounce => emitter.exit(Exit::Bounced { next }),
                Kind::Step => emitter.exit(Exit::Goto { next }),
                Kind::Grouped | Kind::PerAccess => emitter.jump(last.ins.next_ip()),
            }
        }
        block.stale = emitter.asm.here();
        emitter.exit(Exit::Stale);
        emitter.finish();
    }
}

impl Emitter<'_> {
    fn step(&mut self, step: &Step, next_byte: Option<u8>) {
        match step.class {
            Class::Nothing => {}
            Class::Copy => self.copy(step),
            Class::Direction => {
                let down = step.row.opcode == STD;
                self.asm
                    .store_immediate(context!(direction), i32::from(down));
                self.asm.byte(step.row.opcode);
            }
            Class::BitString => self.bit_string(step),
            Class::Lea => self.load_effective_address(step),
            Class::Jcc => self.jcc(step),
            Class::Jrcxz => self.jrcxz(step),
            Class::Jump => self.jump(step.ins.near_branch_target()),
            Class::JumpIndirect => self.jmp_indirect(step),
            Class::Call => self.call(step),
            Class::CallIndirect => self.call_indirect(step),
            Class::Return => self.ret(step),
            Class::Push => self.push(step),
            Class::Pop => self.pop(step),
            Class::Leave => self.leave(step),
            Class::PushFlags => self.push_flags(step),
            Class::InterruptsOff => self.interrupts_off(),
            Class::InterruptsOn => self.interrupts_on(step, next_byte),
            Class::UserAccessOn => self.user_access(step, Mode::KernelUserAccess),
            Class::UserAccessOff => self.user_access(step, Mode::Kernel),
            Class::SwapGs => self.swap_gs(),
            Class::ZeroUpper => self.zero_upper(step),
            Class::ReadTsc => self.read_tsc(),
            Class::ReadTscAux => self.read_tsc_aux(step),
            Class::ReadBase => self.read_base(step),
            Class::SystemCall => self.system_call(step),
            Class::SystemReturn => self.system_return(step),
            Class::String => self.string(step),
            Class::RepString => self.repeated_string(step),
            Class::Interpret => self.exit(Exit::Interpret { at: step.at }),
        }
    }
}

const STD: u8 = 0xfd;

/// What the engine may overwrite at the direct entry. Nothing may jump into it, and no
/// link may be in it: the engine would patch one over the other.
const PATCH_BYTES: u32 = 5;

/// Does the code of such an instruction begin with a jump that may become a link?
fn is_linked(class: Class) -> bool {
    matches!(class, Class::Jcc | Class::Jrcxz | Class::Jump)
}

/// Has the instruction exactly one memory operand, and ends in the next one?
fn can_bounce(step: &Step) -> bool {
    match step.class {
        Class::Copy | Class::BitString => step.memory,
        Class::Push | Class::Pop => !step.memory,
        Class::Leave | Class::PushFlags => true,
        _ => false,
    }
}
