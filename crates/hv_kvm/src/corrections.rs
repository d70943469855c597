//! What a KVM played by software gets wrong without saying so (seen with `kvm_pvm` of Linux
//! 6.18; docs/kvm.md): found at breakpoints and from time to time, and put right.
//!
//! SYSCALL. User code runs on the processor, which takes SYSCALL to the host's kernel. What
//! plays KVM puts RIP and RFLAGS where they belong, masks RFLAGS and goes on at the entry,
//! but at CPL 3:
//!
//! ```text
//! SYSCALL ─▶ entry at CPL 3 ─▶ #PF, as it is the kernel's page ─▶ handler of #PF
//!                                                                  │ breakpoint
//!             entry at CPL 0 ◀── frame dropped, rest of SYSCALL ◀───┘
//! ```
//!
//! VMCALL and VMMCALL in the guest's kernel are replaced by the one that suits the host and
//! begun anew, without end. A timer of the thread's CPU time ends runs; a vCPU that
//! stands at one has it completed.
//!
//! Invariant: only where instructions are completed anyway. The breakpoint is KVM's: the guest
//! does not see it, but it takes the place of its own.

use hv::{Error, Exit, Gpa, Io};
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug, kvm_guest_debug_arch,
    kvm_segment, kvm_sregs,
};
use ram::PAGE_SIZE;
use vm_memory::Bytes;
use x86::control::vector;
use x86::msr;
use x86::paging;
use x86::registers::rflags;

use crate::failed;
use crate::vcpu::KvmVcpu;

/// DR7: breakpoint 0, on execution, in every task.
const FIRST_ON_EXECUTION: u64 = 1 << 10 | 1 << 1;
const USER: u8 = 3;
const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];

/// What an exception with an error code pushes (SDM vol. 3, §7.14.2).
struct Frame {
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
}

impl Frame {
    /// Whether user code is at `entry` of the kernel, as SYSCALL leaves it, which cleared
    /// those flags of `r11` that `masked` has. Had it jumped there, interrupts were on:
    /// kernels mask them.
    fn is_system_call(&self, entry: u64, r11: u64, masked: u64) -> bool {
        // That it was a fetch is said only where pages can forbid it; RIP says it too.
        self.rip == entry
            && self.error & u64::from(paging::ERROR_USER) != 0
            && self.cs as u8 & 3 == USER
            && (self.rflags ^ r11 & !masked) & !rflags::RF == 0
    }
}

impl KvmVcpu {
    /// Has runs end at the guest's handler of page faults, which may have moved.
    pub(crate) fn watch_page_faults(&mut self) -> Result<(), Error> {
        let special = self.special()?;
        let handler = match self.register(msr::LSTAR)? {
            0 => 0,
            _ => self.handler(&special).unwrap_or(0),
        };
        if handler == self.watched {
            return Ok(());
        }
        let mut debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
            pad: 0,
            arch: kvm_guest_debug_arch::default(),
        };
        if handler == 0 {
            debug.control = 0;
        } else {
            debug.arch.debugreg[0] = handler;
            debug.arch.debugreg[7] = FIRST_ON_EXECUTION;
        }
        self.fd
            .set_guest_debug(&debug)
            .map_err(failed("watch a guest's page faults"))?;
        self.watched = handler;
        Ok(())
    }

    /// At a breakpoint: the rest of SYSCALL, or the instruction there.
    pub(crate) fn at_breakpoint(&mut self, io: &dyn Io) -> Result<Option<Exit>, Error> {
        if self.system_call()? {
            return Ok(None);
        }
        self.complete(io)
    }

    /// Whether this page fault was a system call, which then is in the guest's kernel.
    fn system_call(&mut self) -> Result<bool, Error> {
        let doing = "have a system call enter the guest's kernel";
        let mut special = self.special()?;
        let mut general = self.fd.get_regs().map_err(failed(doing))?;
        let entry = self.register(msr::LSTAR)?;
        if general.rip != self.watched || special.cr2 != entry {
            return Ok(false);
        }
        let Some(frame) = self.frame(general.rsp) else {
            return Ok(false);
        };
        let masked = self.register(msr::FMASK)?;
        if !frame.is_system_call(entry, general.r11, masked) {
            return Ok(false);
        }
        // SDM vol. 2B, SYSCALL: but for RCX and R11, which are as they should be.
        let code = (self.register(msr::STAR)? >> 32) as u16 & !3;
        let flat = kvm_segment {
            limit: !0,
            present: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        special.cs = kvm_segment {
            selector: code,
            type_: 0xb,
            l: 1,
            ..flat
        };
        special.ss = kvm_segment {
            selector: code + 8,
            type_: 3,
            db: 1,
            ..flat
        };
        general.rip = entry;
        general.rsp = frame.rsp;
        general.rflags = frame.rflags & !rflags::RF;
        self.fd.set_sregs(&special).map_err(failed(doing))?;
        self.fd.set_regs(&general).map_err(failed(doing))?;
        self.system_calls += 1;
        Ok(true)
    }

    /// From time to time: completes a hypercall that the vCPU stands at.
    pub(crate) fn look_for_hypercall(&mut self, io: &dyn Io) -> Result<Option<Exit>, Error> {
        let doing = "look where a virtual CPU is";
        let special = self.special()?;
        let general = self.fd.get_regs().map_err(failed(doing))?;
        let events = self.fd.get_vcpu_events().map_err(failed(doing))?;
        // An event on its way in is not to come behind the instruction.
        let busy = [
            events.exception.injected,
            events.exception.pending,
            events.interrupt.injected,
            events.nmi.injected,
        ];
        let mut code = [0; 3];
        let read =
            special.ss.dpl != USER && busy == [0; 4] && self.read_virtual(general.rip, &mut code);
        if read && [VMCALL, VMMCALL].contains(&code) {
            return self.complete(io);
        }
        Ok(None)
    }

    /// Where gate 14 of the IDT leads.
    fn handler(&self, special: &kvm_sregs) -> Option<u64> {
        let gate = special.idt.base + 16 * u64::from(vector::PF);
        let [low, high] = [self.word(gate)?, self.word(gate + 8)?];
        Some(low & 0xffff | low >> 32 & 0xffff_0000 | high << 32)
    }

    fn frame(&self, rsp: u64) -> Option<Frame> {
        Some(Frame {
            error: self.word(rsp)?,
            rip: self.word(rsp.wrapping_add(8))?,
            cs: self.word(rsp.wrapping_add(16))?,
            rflags: self.word(rsp.wrapping_add(24))?,
            rsp: self.word(rsp.wrapping_add(32))?,
        })
    }

    fn word(&self, at: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read_virtual(at, &mut bytes)
            .then(|| u64::from_le_bytes(bytes))
    }

    /// Reads guest memory by the guest's page tables: whole, or byte for byte across pages.
    fn read_virtual(&self, at: u64, into: &mut [u8]) -> bool {
        if at % PAGE_SIZE + into.len() as u64 > PAGE_SIZE {
            let mut bytes = into.chunks_mut(1).zip(at..);
            return bytes.all(|(byte, at)| self.read_virtual(at, byte));
        }
        let found = self.fd.translate_gva(at).ok();
        let found = found.filter(|found| found.valid != 0);
        let memory = self.vm.ram().memory();
        found.is_some_and(|found| memory.read_slice(into, Gpa(found.physical_address)).is_ok())
    }

    fn special(&self) -> Result<kvm_sregs, Error> {
        self.fd
            .get_sregs()
            .map_err(failed("read a virtual CPU's registers"))
    }

    fn register(&self, index: u32) -> Result<u64, Error> {
        let found = self.read_msrs(&[index])?;
        Ok(found.first().map_or(0, |(_, value)| *value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_to_the_kernels_entry_is_no_system_call() {
        const ENTRY: u64 = 0xffff_ffff_8180_0040;
        const MASKED: u64 = 0x4_7700;
        let frame = |error, cs, flags| Frame {
            error,
            rip: ENTRY,
            cs,
            rflags: flags,
            rsp: 0,
        };
        let is_one = |frame: Frame, at, r11| frame.is_system_call(at, r11, MASKED);
        assert!(is_one(frame(0x15, 0x33, 0x1_0046), ENTRY, 0x246));
        assert!(is_one(frame(5, 0x33, 2), ENTRY, 0x202));
        // Jumped to, with interrupts on: whatever R11 says.
        for r11 in [0x202, 0x3202, 2] {
            assert!(!is_one(frame(5, 0x33, 0x202), ENTRY, r11), "{r11:#x}");
        }
        // The kernel's own fault; a fault elsewhere.
        assert!(!is_one(frame(0, 0x10, 2), ENTRY, 0x202));
        assert!(!is_one(frame(5, 0x33, 2), ENTRY + 1, 0x202));
    }
}
