//! The state of one block's emission, and what goes behind its hot part: exits,
//! and the repairs that come before them.
//!
//! S1 and S2 may hold the addends of the shared checks from one instruction to the
//! next: S1 the stack's, S2 an open group's.

use crate::assembler::{Assembler, Memory, context, op};
use crate::block::{Exit, Kind, Request};
use crate::context::{Context, JumpCache, Mode, S1, S2, Tlb};
use crate::groups::{Check, Groups};
use crate::plan::{PAGE, Step};
use crate::relocation::Target;

const RAX: u8 = 0;

/// Most jumps that one cold part takes.
pub(crate) const JUMPS_MAX: usize = 6;

/// What is emitted behind the hot part, and the rel32s that lead there; position
/// 0 stands for none.
pub(crate) struct Cold {
    pub jumps: [u32; JUMPS_MAX],
    pub kind: ColdKind,
}

pub(crate) enum ColdKind {
    /// A TLB check failed.
    Indexed { flags: Flags, tag: i32, exit: Exit },
    /// A check of the stack's slot failed.
    Stack { flags: Flags, tag: i32, exit: Exit },
    /// A check of a constant address failed.
    Constant { va: u64, flags: Flags, exit: Exit },
    /// A shared check failed.
    Group {
        check: Check,
        flags: Flags,
        tag: i32,
        at: u16,
        retry: u32,
    },
    /// A jump within the page, not yet linked.
    Link { target: u16 },
    /// A conditional jump out of the page.
    CrossJump { target: u64 },
    /// An interrupt waited before STI.
    Interrupted { at: u16 },
    /// Nothing to repair but flags.
    Plain { flags: Flags, exit: Exit },
}

/// What a check does about the guest's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flags {
    /// Nobody reads them any more.
    Dead,
    /// It does not touch them.
    Kept,
    /// The instruction of this number, executed again, brings them back.
    Again(u8),
    /// They are in `temp`: see [`Emitter::save_flags`].
    Saved,
}

impl Flags {
    pub(crate) fn at(step: &Step) -> Self {
        match (step.flags_live, step.again.checked_sub(1)) {
            (false, _) => Self::Dead,
            (true, None) => Self::Kept,
            (true, Some(writer)) => Self::Again(writer),
        }
    }

    pub(crate) fn kept(self) -> bool {
        self == Self::Kept
    }
}

/// Exits and cold parts in the making; reused from block to block.
#[derive(Default)]
pub(crate) struct Outcome {
    pub cold: Vec<Cold>,
    pub exits: Vec<Exit>,
}

pub(crate) struct Emitter<'a> {
    pub asm: &'a mut Assembler,
    pub out: &'a mut Outcome,
    pub request: &'a Request,
    pub groups: &'a Groups,
    pub steps: &'a [Step],
    /// Host position at which the current access's check begins again.
    pub start: u32,
    /// The current step's number.
    pub current: usize,
    /// S1 holds the stack's addend.
    pub s1_stack: bool,
    /// S2 holds the addend of the open group on this base.
    pub s2_group: Option<u8>,
    /// The context knows that upper halves of YMM registers are in use.
    pub upper_live: bool,
    /// Where jumps to the block's own start lead, if they may.
    pub own_entry: Option<u32>,
}

/// Offset of a field of the request's TLB.
macro_rules! tlb {
    ($emitter:expr, $field:ident) => {
        $emitter.tlb() + core::mem::offset_of!(Tlb, $field) as i32
    };
}
pub(crate) use tlb;

impl Emitter<'_> {
    pub(crate) fn tlb(&self) -> i32 {
        context!(tlb) + self.request.mode as i32 * size_of::<Tlb>() as i32
    }

    /// Forgets what the scratch registers held.
    pub(crate) fn forget(&mut self) {
        self.s1_stack = false;
        self.s2_group = None;
    }

    pub(crate) fn cold(&mut self, jump: u32, kind: ColdKind) {
        self.out.cold.push(Cold {
            jumps: [jump, 0, 0, 0, 0, 0],
            kind,
        });
    }

    /// Leaves through a new exit: six bytes and five.
    pub(crate) fn exit(&mut self, exit: Exit) {
        let number = self
            .request
            .first_exit
            .wrapping_add(self.out.exits.len() as u32);
        self.out.exits.push(exit);
        self.asm.exit(number, self.request.thunks.exit);
    }

    pub(crate) fn access_exit(&self, step: &Step, size: u8, write: bool, stack: bool) -> Exit {
        Exit::Access {
            at: step.at,
            size,
            write,
            stack,
            retry: self.start,
        }
    }

    /// Between the two accesses of an instruction: the first one's outcome is in
    /// `temp`, and a miss of the second must not do the first again. If their pages
    /// share a TLB entry, each would throw the other out for ever.
    pub(crate) fn retry_from_here(&mut self) {
        self.forget();
        self.start = self.asm.here();
    }

    pub(crate) fn bounces(&self) -> bool {
        self.request.kind == Kind::Bounce
    }

    pub(crate) fn in_own_page(&self, target: u64) -> bool {
        (target ^ self.request.va) & !(PAGE - 1) == 0
    }

    /// Emits all cold parts.
    pub(crate) fn finish(&mut self) {
        let cold = std::mem::take(&mut self.out.cold);
        for part in &cold {
            let here = self.asm.here();
            for jump in part.jumps {
                if jump != 0 {
                    self.asm.patch(jump, here);
                }
            }
            self.cold_part(part);
        }
        self.out.cold = cold;
        self.out.cold.clear();
    }

    fn cold_part(&mut self, part: &Cold) {
        match part.kind {
            ColdKind::Indexed { flags, tag, exit } => {
                self.restore_indexed(flags, tag);
                self.restore_flags(flags);
                self.exit(exit);
            }
            ColdKind::Stack { flags, tag, exit } => {
                self.asm.gs(op::XOR, S1, tag);
                let Exit::Access { retry, .. } = exit else {
                    return;
                };
                self.stack_refill(retry);
                self.restore_flags(flags);
                self.exit(exit);
            }
            ColdKind::Constant { va, flags, exit } => {
                if flags.kept() {
                    self.asm.load(1, context!(saved_rcx));
                }
                self.asm.constant(S1, va);
                self.restore_flags(flags);
                self.exit(exit);
            }
            ColdKind::Group {
                check,
                flags,
                tag,
                at,
                retry,
            } => {
                let mut filled = None;
                if !check.stack {
                    self.restore_indexed(flags, tag);
                } else if flags.kept() {
                    self.asm.load(1, tag);
                    self.asm.add(S1, 1);
                    self.asm.load(1, context!(saved_rcx));
                    // Where a kernel enters and leaves, it changes its stack each time.
                    self.save_flags();
                    filled = Some(self.ask_stack_refill());
                    self.restore_flags(Flags::Saved);
                } else {
                    self.asm.gs(op::XOR, S1, tag);
                    self.stack_refill(retry);
                }
                self.restore_flags(flags);
                let patch = self.asm.here() as u16;
                let Check {
                    len, write, stack, ..
                } = check;
                self.exit(Exit::Group {
                    at,
                    len,
                    write,
                    stack,
                    retry: retry as u16,
                    patch,
                });
                if let Some(filled) = filled {
                    let here = self.asm.here();
                    self.asm.patch(filled, here);
                    self.restore_flags(Flags::Saved);
                    let again = self.asm.jmp();
                    self.asm.patch(again, retry);
                }
            }
            ColdKind::Link { target } => {
                let [patch, ..] = part.jumps;
                self.exit(Exit::Link { target, patch });
            }
            ColdKind::CrossJump { target } => self.cross_jump(target),
            ColdKind::Interrupted { at } => {
                self.asm.load(1, context!(saved_rcx));
                self.exit(Exit::Interpret { at });
            }
            ColdKind::Plain { flags, exit } => {
                self.restore_flags(flags);
                self.exit(exit);
            }
        }
    }

    /// Brings the guest's flags back behind a check.
    pub(crate) fn restore_flags(&mut self, flags: Flags) {
        match flags {
            Flags::Dead | Flags::Kept => {}
            Flags::Again(writer) => {
                if let Some(step) = self.steps.get(usize::from(writer)) {
                    crate::flags::write_again(self.asm, step);
                }
            }
            Flags::Saved => {
                self.asm.load(RAX, context!(temp) + 16);
                // add al, 0x7f; sahf
                self.asm.bytes([0x04, 0x7f, 0x9e]);
                self.asm.load(RAX, context!(temp) + 8);
            }
        }
    }

    /// Puts the status flags into `temp[2]`, as LAHF and SETO give them; `temp[1]` is
    /// lost.
    pub(crate) fn save_flags(&mut self) {
        self.asm.store(RAX, context!(temp) + 8);
        // lahf; seto al
        self.asm.bytes([0x9f, 0x0f, 0x90, 0xc0]);
        self.asm.store(RAX, context!(temp) + 16);
        self.asm.load(RAX, context!(temp) + 8);
    }

    /// Makes S1 the linear address again, RCX the guest's.
    fn restore_indexed(&mut self, flags: Flags, tag: i32) {
        if flags.kept() {
            self.asm.gs_indexed(op::LOAD, 1, S2, tag);
            self.asm.add(S1, 1);
            self.asm.load(1, context!(saved_rcx));
        } else {
            self.asm.gs_indexed(op::XOR, S1, S2, tag);
        }
    }

    /// Asks the stub to fill the stack's slot from the TLB. It goes to `retry` when
    /// it did, to what is right behind when it could not: see `stubs.rs`.
    fn stack_refill(&mut self, retry: u32) {
        let back = self.ask_stack_refill();
        self.asm.patch(back, retry);
    }

    /// As [`Emitter::stack_refill`], but that it gives the jump to be patched. Flags
    /// are lost.
    fn ask_stack_refill(&mut self) -> u32 {
        let stub = self.request.thunks.stack_refill_of(self.request.mode);
        // lea S2, [rip + 10]: past the two jumps
        self.asm.bytes([0x4c, 0x8d, 0x3d, 10, 0, 0, 0]);
        self.asm.jmp_to_thunk(Target::StackRefill, stub);
        self.asm.jmp()
    }

    /// Jumps to a constant address through the jump cache: the block found there
    /// checks S1 against its own address.
    pub(crate) fn cross_jump(&mut self, target: u64) {
        cross_jump(self.asm, target, self.request.mode);
    }

    /// Jumps to the guest address in S1.
    pub(crate) fn jump_indirect(&mut self) {
        jump_indirect(self.asm, self.request.mode);
    }
}

/// Jumps to the guest address in S1, in `mode`.
pub(crate) fn jump_indirect(asm: &mut Assembler, mode: Mode) {
    let cache = jump_cache(mode).to_le_bytes();
    let mask = match mode {
        Mode::Kernel | Mode::User => context!(jump_mask),
        Mode::KernelUserAccess => context!(user_access_jump_mask),
    };
    asm.pext(S2, S1, mask);
    // jmp gs:[S2 * 8 + cache]
    asm.bytes([0x65, 0x42, 0xff, 0x24, 0xc5 | (S2 & 7) << 3]);
    asm.bytes(cache);
}

pub(crate) fn jump_cache(mode: Mode) -> i32 {
    context!(jumps) + mode as i32 * size_of::<JumpCache>() as i32
}

pub(crate) fn cross_jump(asm: &mut Assembler, target: u64, mode: Mode) {
    let index = mode.jump_index(target) as i32;
    asm.constant(S1, target);
    // jmp gs:[entry]
    asm.bytes([0x65, 0xff, 0x24, 0x25]);
    asm.i32(jump_cache(mode) + index * 8);
}

/// A memory operand at the host address in S1.
pub(crate) const AT_S1: Memory = Memory::at(S1, 0);
