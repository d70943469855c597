//! A vCPU's state in the form that no engine owns, both ways.

use hv::Error;
use x86::control::{cr0, cr4, efer};
use x86::registers::rflags;
use x86::state::{PendingEvents, VcpuState};
use x86::{descriptor, msr, paging};

use crate::cpu::{Cpu, Phase};
use crate::enter::{Fpu, MXCSR_MASK};
use crate::interp::CR4_KNOWN;
use crate::msr::PLAIN;

fn refuse(why: impl Into<String>) -> Error {
    Error::State {
        engine: crate::NAME,
        why: why.into(),
    }
}

impl Cpu {
    /// Takes the state. Not during a run.
    pub(crate) fn state(&self) -> VcpuState {
        let mut apic = self.apic.clone();
        let mut nmi_pending = self.nmi_pending;
        if let Some(inbox) = self.chips.inbox(self.id as usize) {
            inbox.peek(|vector, level| apic.request(vector, level));
            nmi_pending |= inbox.nmi();
        }
        let regs = &self.regs;
        let context = &self.context;
        let mut segments = regs.segments;
        segments[VcpuState::FS].base = context.fs_base;
        segments[VcpuState::GS].base = context.gs_base;
        let mut msrs = vec![
            (msr::STAR, regs.star),
            (msr::LSTAR, regs.lstar),
            (msr::CSTAR, regs.cstar),
            (msr::FMASK, regs.fmask),
            (msr::KERNEL_GS_BASE, context.kernel_gs_base),
            (msr::TSC_AUX, regs.tsc_aux),
            (msr::TSC, self.clock.now()),
            (msr::KVM_SYSTEM_TIME, regs.kvm_system_time),
            (msr::KVM_WALL_CLOCK, regs.kvm_wall_clock),
        ];
        msrs.extend(
            PLAIN
                .iter()
                .zip(regs.plain_msrs)
                .map(|((index, _), value)| (*index, value)),
        );
        msrs.sort_unstable();
        VcpuState {
            gpr: context.gpr,
            rip: context.rip,
            rflags: self.rflags(),
            segments,
            tr: regs.tr,
            ldtr: regs.ldtr,
            gdt: regs.gdt,
            idt: regs.idt,
            cr0: regs.cr0,
            cr2: regs.cr2,
            cr3: regs.cr3,
            cr4: regs.cr4,
            cr8: u64::from(self.apic.tpr() >> 4),
            xcr0: 1,
            efer: regs.efer,
            debug: regs.debug,
            fxsave: self.fpu.0.to_vec(),
            msrs,
            apic: apic.save(self.clock.now()),
            events: PendingEvents {
                interrupt_shadow: self.shadowed(),
                nmi_pending,
                halted: self.halted,
                waits_for_startup: self.phase == Phase::Waits,
            },
        }
    }

    /// Replaces the state. On an error nothing has changed.
    pub(crate) fn set_state(&mut self, state: &VcpuState) -> Result<(), Error> {
        let fpu = check(state)?;
        let mut apic = self.apic.clone();
        let now = self.clock.now();
        apic.load(&state.apic, now)
            .map_err(|_| refuse("the local APIC has a register that does not exist"))?;
        apic.set_tpr((state.cr8 as u8) << 4);
        self.apic = apic;
        self.publish_apic();
        let context = &mut *self.context;
        context.gpr = state.gpr;
        context.rip = state.rip;
        context.fs_base = state.segments[VcpuState::FS].base;
        context.gs_base = state.segments[VcpuState::GS].base;
        self.set_rflags(state.rflags);
        self.fpu = fpu;
        let regs = &mut self.regs;
        regs.segments = state.segments;
        regs.cpl = (state.segments[VcpuState::SS].rights >> 5) as u8 & 3;
        if state.segments[VcpuState::SS].rights & descriptor::PRESENT == 0 {
            regs.cpl = (state.segments[VcpuState::CS].selector & 3) as u8;
        }
        (regs.tr, regs.ldtr, regs.gdt, regs.idt) = (state.tr, state.ldtr, state.gdt, state.idt);
        (regs.cr0, regs.cr2, regs.cr3, regs.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
        regs.efer = state.efer;
        regs.debug = state.debug;
        for &(index, value) in &state.msrs {
            self.load_msr(index, value)?;
        }
        self.phase = if state.events.waits_for_startup {
            Phase::Waits
        } else {
            Phase::Long
        };
        self.halted = state.events.halted;
        self.restore_shadow(state.events.interrupt_shadow);
        self.nmi_pending = state.events.nmi_pending;
        self.nmi_blocked = false;
        self.flush_all();
        self.breakpoints.hit = 0;
        self.rearm();
        Ok(())
    }

    /// A register as saved: nothing happens but that it has the value.
    fn load_msr(&mut self, index: u32, value: u64) -> Result<(), Error> {
        let regs = &mut self.regs;
        match index {
            msr::STAR => regs.star = value,
            msr::LSTAR => regs.lstar = value,
            msr::CSTAR => regs.cstar = value,
            msr::FMASK => regs.fmask = value,
            msr::TSC_AUX => regs.tsc_aux = value,
            msr::KERNEL_GS_BASE => self.context.kernel_gs_base = value,
            msr::KVM_WALL_CLOCK => regs.kvm_wall_clock = value,
            msr::KVM_SYSTEM_TIME => {
                regs.kvm_system_time = value;
                if value & 1 != 0 {
                    self.update_system_time(value & !1);
                }
            }
            msr::TSC => self.clock.set(value),
            // Repeated from elsewhere in the state.
            msr::FS_BASE | msr::GS_BASE | msr::EFER | msr::APIC_BASE | msr::TSC_DEADLINE => {}
            _ => match PLAIN.iter().position(|(known, _)| *known == index) {
                Some(i) => regs.plain_msrs[i] = value,
                // Zero is what a register that does not exist would be.
                None if value == 0 => {}
                None => return Err(refuse(format!("register {index:#x} does not exist"))),
            },
        }
        Ok(())
    }
}

/// Whether this engine can run a state; its x87 and SSE registers.
fn check(state: &VcpuState) -> Result<Fpu, Error> {
    let long = efer::LME | efer::LMA;
    let waits = state.events.waits_for_startup;
    let in_long_mode = state.efer & long == long
        && state.cr0 & (cr0::PE | cr0::PG) == cr0::PE | cr0::PG
        && state.cr4 & cr4::PAE != 0
        && state.segments[VcpuState::CS].rights & descriptor::LONG != 0;
    if !waits && !in_long_mode {
        return Err(refuse("it is not in 64-bit mode"));
    }
    if state.cr4 & !CR4_KNOWN != 0 {
        return Err(refuse(format!(
            "CR4 {:#x} has features that it lacks",
            state.cr4
        )));
    }
    if state.rflags & rflags::VM != 0 || !paging::is_canonical(state.rip) {
        return Err(refuse("RFLAGS or RIP cannot be in 64-bit mode"));
    }
    let image: Result<[u8; 512], _> = state.fxsave.as_slice().try_into();
    let fpu = Fpu(image.map_err(|_| refuse("the FXSAVE image is not 512 bytes"))?);
    if fpu.mxcsr() & !MXCSR_MASK != 0 {
        return Err(refuse("MXCSR has reserved bits set"));
    }
    Ok(fpu)
}
