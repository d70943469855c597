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

/// DR6: a single step.
const DR6_BS: u64 = 1 << 14;

/// What the end of the present instruction brings.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stepping {
    single_step: bool,
    /// The shadow is that of a load of SS: it holds debug exceptions back as well.
    stack_loaded: bool,
}

impl Cpu {
    /// Before an instruction: whether it must be executed on its own.
    ///
    /// # Errors
    /// The debug exception of a breakpoint at RIP.
    #[inline]
    pub(crate) fn begin_step(&mut self) -> Result<bool, Fault> {
        let trap = self.context.rflags_high & rflags::TF != 0;
        self.stepping.single_step = trap;
        let breakpoint = self.breakpoints.at(self.context.rip);
        let resumed = std::mem::take(&mut self.resume);
        if breakpoint != 0 && !resumed && !self.held_back() {
            self.stepping.single_step = false;
            return Err(Fault::Debug(breakpoint));
        }
        let shadowed = self.shadowed() && (self.context.pending | self.breakpoints.hit) != 0;
        let alone = trap || shadowed || breakpoint != 0 || self.checks_alignment();
        if alone {
            self.context.shadow = NOWHERE;
            self.stepping.stack_loaded = false;
        }
        Ok(alone)
    }

    /// After an instruction: the debug exception that it ends in.
    #[inline]
    pub(crate) fn trap(&mut self) -> Option<Fault> {
        if self.stepping.single_step || self.breakpoints.hit != 0 {
            self.slow_trap()
        } else {
            None
        }
    }

    #[cold]
    fn slow_trap(&mut self) -> Option<Fault> {
        if self.held_back() {
            return None;
        }
        let stepped = std::mem::take(&mut self.stepping.single_step);
        let hit = std::mem::take(&mut self.breakpoints.hit);
        self.halted = false;
        Some(Fault::Debug(hit | if stepped { DR6_BS } else { 0 }))
    }

    /// Whether debug exceptions wait for the instruction behind a load of SS.
    fn held_back(&self) -> bool {
        self.stepping.stack_loaded && self.shadowed()
    }

    /// A handler was entered: no trap behind what led there.
    pub(crate) fn delivered(&mut self) {
        self.stepping.single_step = false;
    }

    /// SYSCALL and SYSRET trap by the flags that they load.
    pub(crate) fn step_by_new_flags(&mut self) {
        self.stepping.single_step = self.context.rflags_high & rflags::TF != 0;
    }

    /// Whether repeated string instructions go element by element.
    pub(crate) fn steps_elements(&self) -> bool {
        self.stepping.single_step || self.breakpoints.watches()
    }

    /// Whether the present instruction ends in a trap, also between its elements.
    pub(crate) fn will_trap(&self) -> bool {
        self.stepping.single_step || self.breakpoints.hit != 0
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
