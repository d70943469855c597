//! One instruction at a time: single steps (RFLAGS.TF), and the shadows behind STI
//! and loads of SS in which no interrupt comes (SDM vol. 3, §6.8.3 and §17.3.1).
//!
//! ```text
//! begin_step ─▶ block of one instruction ─▶ it is done ─▶ trap: #DB, or go on
//!      └ nothing special ─▶ ordinary block
//! ```
//!
//! Invariant: `single_step` is whether the instruction at hand ends in a trap; what
//! enters a handler meanwhile resets it.

use x86::registers::rflags;

use crate::cpu::Cpu;
use crate::exceptions::Fault;

/// An address that no instruction has.
const NOWHERE: u64 = 1 << 63;

/// DR6 bits.
pub(crate) mod dr6 {
    /// A single step.
    pub(crate) const BS: u64 = 1 << 14;
    /// Breakpoints 0 to 3.
    pub(crate) const BREAKPOINTS: u64 = 0xf;
}

/// DR7: any access to a debug register is a debug exception.
const DR7_GD: u64 = 1 << 13;

/// What the end of the present instruction brings.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stepping {
    single_step: bool,
    /// The shadow is that of a load of SS: it holds debug exceptions back as well.
    stack_loaded: bool,
}

impl Cpu {
    /// Before an instruction: whether it must be executed on its own.
    #[inline]
    pub(crate) fn begin_step(&mut self) -> bool {
        let trap = self.context.rflags_high & rflags::TF != 0;
        self.stepping.single_step = trap;
        let alone = trap || (self.shadowed() && self.context.pending != 0);
        // Read by what comes before the instruction, and by its breakpoint.
        self.resume = false;
        if alone {
            self.context.shadow = NOWHERE;
            self.stepping.stack_loaded = false;
        }
        alone
    }

    /// After an instruction: the debug exception that it ends in.
    #[inline]
    pub(crate) fn trap(&mut self) -> Option<Fault> {
        if self.stepping.single_step {
            self.slow_trap()
        } else {
            None
        }
    }

    #[cold]
    fn slow_trap(&mut self) -> Option<Fault> {
        if self.stepping.stack_loaded && self.shadowed() {
            return None;
        }
        self.stepping.single_step = false;
        self.halted = false;
        Some(Fault::Debug(dr6::BS))
    }

    /// A debug exception is raised.
    pub(crate) fn note_debug(&mut self, why: u64) {
        let [_, _, _, _, dr6, dr7] = &mut self.regs.debug;
        *dr6 = *dr6 & !dr6::BREAKPOINTS | why;
        *dr7 &= !DR7_GD;
    }

    /// A handler was entered: no trap behind what led there.
    pub(crate) fn delivered(&mut self) {
        self.stepping.single_step = false;
    }

    /// SYSCALL and SYSRET trap by the flags that they load.
    pub(crate) fn step_by_new_flags(&mut self) {
        self.stepping.single_step = self.context.rflags_high & rflags::TF != 0;
    }

    /// Whether repeated string instructions stop behind each element.
    pub(crate) fn steps_elements(&self) -> bool {
        self.stepping.single_step
    }

    /// Whether RIP is where no interrupt may come.
    #[inline]
    pub(crate) fn shadowed(&self) -> bool {
        self.context.shadow == self.context.rip
    }

    /// MOV and POP to SS: nothing comes before the instruction at `next` has ended,
    /// so that it can load RSP.
    pub(crate) fn shadow_of_stack_load(&mut self, next: u64) {
        self.context.shadow = next;
        self.stepping.stack_loaded = true;
    }

    pub(crate) fn restore_shadow(&mut self, shadow: bool) {
        self.context.shadow = if shadow { self.context.rip } else { NOWHERE };
        self.stepping = Stepping::default();
    }
}
