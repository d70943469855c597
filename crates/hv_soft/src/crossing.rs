//! SYSCALL and SYSRET that translated code does itself: what it needs to know for
//! that, and what the engine learns of it afterwards.
//!
//! Invariant: outside of translated code `Context::crossed` is [`Crossed::No`] and
//! CPL, CS and SS are up to date; whenever code is entered, the targets and bars in the
//! context are those of the present MSRs and CPL.

use translator::context::{Context, Crossed};
use x86::control::efer;
use x86::descriptor as rights;
use x86::registers::rflags;
use x86::state::{Segment, VcpuState};

use crate::cpu::{Cpu, HOST_FLAGS};

/// What a kernel's FMASK must clear for the stub to do it without looking.
const CLEARED: u64 = HOST_FLAGS | rflags::IF;
/// Flags in R11 that the stub for SYSRET loads; bit 1 is always set.
const LOADED: u64 = rflags::STATUS | rflags::IF | rflags::FIXED;

/// Sets up a zeroed context.
pub(crate) fn initialize(context: &mut Context) {
    context.upper_half_mask = !0 << 47;
    context.odd_flags_mask = !LOADED;
    context.interrupts_mask = rflags::IF;
    context.overflow_mask = rflags::OF;
    context.calls_barred = 1;
    context.returns_barred = 1;
}

impl Cpu {
    /// EFER, LSTAR, FMASK or CPL may have changed.
    pub(crate) fn refresh_crossing(&mut self) {
        let off = self.regs.efer & efer::SCE == 0;
        let between = matches!(self.regs.cpl, 1 | 2);
        self.context.call_target = self.regs.lstar;
        self.context.calls_barred = u64::from(off || self.regs.fmask & CLEARED != CLEARED);
        self.context.returns_barred = u64::from(off || between);
    }

    /// Takes over what translated code did.
    #[inline]
    pub(crate) fn take_crossing(&mut self) {
        if self.context.crossed != Crossed::No as u64 {
            self.take_crossing_that_was();
        }
    }

    fn take_crossing_that_was(&mut self) {
        let crossed = std::mem::replace(&mut self.context.crossed, Crossed::No as u64);
        if crossed == Crossed::Called as u64 {
            self.load_call_segments();
        } else {
            self.load_return_segments();
        }
    }

    /// CS and SS as SYSCALL loads them.
    pub(crate) fn load_call_segments(&mut self) {
        let cs = (self.regs.star >> 32) as u16 & !3;
        self.flat_segments(cs, cs.wrapping_add(8), 0);
    }

    /// CS and SS as SYSRET to 64-bit code loads them.
    pub(crate) fn load_return_segments(&mut self) {
        let base = (self.regs.star >> 48) as u16;
        self.flat_segments(base.wrapping_add(16) | 3, base.wrapping_add(8) | 3, 3);
    }

    /// Neither looks at the GDT.
    fn flat_segments(&mut self, cs: u16, ss: u16, cpl: u8) {
        let common = rights::PRESENT | rights::NOT_SYSTEM | rights::PAGES | u16::from(cpl) << 5;
        let code = common | rights::CODE | rights::READ_WRITE | rights::ACCESSED | rights::LONG;
        let data = common | rights::READ_WRITE | rights::ACCESSED | rights::BIG;
        let flat = |selector, rights| Segment {
            selector,
            base: 0,
            limit: !0,
            rights,
        };
        self.regs.segments[VcpuState::CS] = flat(cs, code);
        self.regs.segments[VcpuState::SS] = flat(ss, data);
        self.set_cpl(cpl);
    }
}
