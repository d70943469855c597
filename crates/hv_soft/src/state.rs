//! A vCPU's state in the form that no engine owns, both ways.

use hv::Error;
use x86::control::{cr0, cr4, efer, vector};
use x86::features::Feature;
use x86::registers::rflags;
use x86::state::{PendingEvents, PendingException, VcpuState, same_tsc_rate};
use x86::xsave as area;
use x86::{descriptor, msr, paging};

use crate::cpu::{Cpu, Phase};
use crate::enter::{Fpu, MXCSR_MASK};
use crate::interp::{CR4_KNOWN, xcr0_is_valid};
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
            (msr::TSC_AUX, context.tsc_aux),
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
            xcr0: regs.xcr0,
            efer: regs.efer,
            debug: regs.debug,
            xsave: self.xsave_area(),
            msrs,
            tsc_khz: u32::try_from(self.clock.khz()).unwrap_or(0),
            apic: apic.save(self.clock.now()),
            events: PendingEvents {
                interrupt_shadow: self.shadowed(),
                nmi_pending,
                nmi_blocked: self.nmi_blocked,
                exception: None,
                halted: self.halted,
                waits_for_startup: self.phase == Phase::Waits,
            },
        }
    }

    /// Replaces the state. On an error nothing has changed. The first vCPU's TSC becomes
    /// the machine's: of several, it comes first.
    pub(crate) fn set_state(&mut self, state: &VcpuState) -> Result<(), Error> {
        let fpu = self.check(state)?;
        let mut apic = self.apic.clone();
        let tsc = state.msrs.iter().find(|(index, _)| *index == msr::TSC);
        let tsc = tsc.filter(|_| self.id == 0).map(|(_, value)| *value);
        let now = tsc.unwrap_or_else(|| self.clock.now());
        apic.load(&state.apic, now)
            .map_err(|_| refuse("the local APIC has a register that does not exist"))?;
        apic.set_tpr((state.cr8 as u8) << 4);
        if let Some(value) = tsc {
            self.clock.set(value);
        }
        self.apic = apic;
        self.publish_apic();
        let context = &mut *self.context;
        context.gpr = state.gpr;
        context.rip = state.rip;
        context.fs_base = state.segments[VcpuState::FS].base;
        context.gs_base = state.segments[VcpuState::GS].base;
        self.set_rflags(state.rflags);
        self.fpu = fpu;
        let upper = in_area(state) & area::AVX != 0;
        self.load_upper(state.xsave.get(area::YMM_HIGH).filter(|_| upper));
        let regs = &mut self.regs;
        regs.segments = state.segments;
        regs.cpl = (state.segments[VcpuState::SS].rights >> 5) as u8 & 3;
        if state.segments[VcpuState::SS].rights & descriptor::PRESENT == 0 {
            regs.cpl = (state.segments[VcpuState::CS].selector & 3) as u8;
        }
        (regs.tr, regs.ldtr, regs.gdt, regs.idt) = (state.tr, state.ldtr, state.gdt, state.idt);
        (regs.cr0, regs.cr2, regs.cr3, regs.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
        regs.efer = state.efer;
        regs.xcr0 = state.xcr0;
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
        self.nmi_blocked = state.events.nmi_blocked;
        self.flush_all();
        self.breakpoints.hit = 0;
        self.rearm();
        self.units_changed();
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
            msr::TSC_AUX => self.context.tsc_aux = value & 0xffff_ffff,
            msr::KERNEL_GS_BASE => self.context.kernel_gs_base = value,
            msr::KVM_WALL_CLOCK => regs.kvm_wall_clock = value,
            msr::KVM_SYSTEM_TIME => {
                regs.kvm_system_time = value;
                if value & 1 != 0 {
                    self.update_system_time(value & !1);
                }
            }
            // The machine's: see `set_state`.
            msr::TSC => {}
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

/// XSTATE_BV of the area in a state.
fn in_area(state: &VcpuState) -> u64 {
    let word = state.xsave.get(area::XSTATE_BV..);
    let word = word.and_then(|bytes| bytes.first_chunk::<8>());
    word.copied().map_or(0, u64::from_le_bytes)
}

impl Cpu {
    /// The registers outside of a run, as XSAVE stores them.
    fn xsave_area(&self) -> Vec<u8> {
        let avx = self.model.has(Feature::Avx);
        let len = if avx {
            area::AVX_BYTES
        } else {
            area::SSE_BYTES
        };
        let mut bytes = vec![0; len];
        bytes[..area::LEGACY_BYTES].copy_from_slice(&self.fpu.0);
        let mut there = area::X87 | area::SSE;
        if avx && self.context.upper_live != 0 {
            there |= area::AVX;
            self.save_upper(&mut bytes[area::YMM_HIGH]);
        }
        bytes[area::XSTATE_BV..][..8].copy_from_slice(&there.to_le_bytes());
        bytes
    }

    /// Whether this CPU can run a state; its x87 and SSE registers.
    fn check(&self, state: &VcpuState) -> Result<Fpu, Error> {
        let long = efer::LME | efer::LMA;
        let waits = state.events.waits_for_startup;
        let in_long_mode = state.efer & long == long
            && state.cr0 & (cr0::PE | cr0::PG) == cr0::PE | cr0::PG
            && state.cr4 & cr4::PAE != 0
            && state.segments[VcpuState::CS].rights & descriptor::LONG != 0;
        if !waits && !in_long_mode {
            return Err(refuse("it is not in 64-bit mode"));
        }
        if state.cr4 & !(CR4_KNOWN | self.cr4_of_model()) != 0 {
            return Err(refuse(format!(
                "CR4 {:#x} has features that it lacks",
                state.cr4
            )));
        }
        let khz = u32::try_from(self.clock.khz()).unwrap_or(0);
        if !same_tsc_rate(state.tsc_khz, khz) {
            return Err(refuse(format!(
                "its TSC ran at {} kHz, this host's runs at {khz}",
                state.tsc_khz
            )));
        }
        // Faults are raised again by the instruction that RIP is at.
        if let Some(PendingException { vector, .. }) = state.events.exception
            && matches!(vector, vector::DB | vector::BP | vector::OF)
        {
            return Err(refuse(format!(
                "exception {vector} is on its way, which nothing would raise again"
            )));
        }
        if state.rflags & rflags::VM != 0 || !paging::is_canonical(state.rip) {
            return Err(refuse("RFLAGS or RIP cannot be in 64-bit mode"));
        }
        let there = in_area(state);
        let long_enough = if there & area::AVX != 0 {
            state.xsave.len() >= area::AVX_BYTES
        } else {
            state.xsave.len() >= area::SSE_BYTES
        };
        let supported = self.xcr0_supported();
        if !long_enough || there & !supported != 0 || !xcr0_is_valid(state.xcr0, supported) {
            return Err(refuse("its XSAVE area or XCR0 is not this CPU's"));
        }
        let mut fpu = Fpu([0; 512]);
        fpu.0.copy_from_slice(&state.xsave[..area::LEGACY_BYTES]);
        let reset = area::after_reset();
        if there & area::X87 == 0 {
            fpu.0[..area::MXCSR].copy_from_slice(&reset[..area::MXCSR]);
            fpu.0[area::X87_REGISTERS].fill(0);
        }
        if there & area::SSE == 0 {
            fpu.0[area::XMM].fill(0);
        }
        if fpu.mxcsr() & !MXCSR_MASK != 0 {
            return Err(refuse("MXCSR has reserved bits set"));
        }
        Ok(fpu)
    }
}
