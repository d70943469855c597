//! A vCPU's state in the form that no engine owns, both ways.
//!
//! Invariant: the order of calls is what KVM needs. Read: the multiprocessing state first,
//! as that lets waiting events happen; events last. Written: CPUID is there from the
//! start; registers before events, which they would clear; the APIC's base before its
//! registers, these before MSRs; the TSC before its deadline.

use std::sync::Arc;

use hv::{Completed, Completion, Error, Exit, Io, VcpuState};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, Msrs,
    kvm_mp_state, kvm_msr_entry, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::Kvm;
use x86::control::vector;
use x86::cpu_template::CpuTemplate;
use x86::features::{Feature, Features};
use x86::msr;
use x86::registers::rflags;
use x86::state::{PendingEvents, PendingException, same_tsc_rate};

use crate::vcpu::KvmVcpu;
use crate::{NAME, failed, ioctl, registers};

/// Interrupt shadows (Linux, arch/x86/include/uapi/asm/kvm.h).
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;

/// MSRs of KVM's list that are no state: what the processor is, what has a place of its
/// own in [`VcpuState`], and old numbers of KVM's clock.
const NO_STATE: [u32; 11] = [
    msr::ARCH_CAPABILITIES,
    msr::PLATFORM_INFO,
    msr::PERF_CAPABILITIES,
    msr::MICROCODE_REVISION,
    msr::EFER,
    msr::APIC_BASE,
    msr::TSC_DEADLINE,
    msr::FS_BASE,
    msr::GS_BASE,
    OLD_WALL_CLOCK,
    OLD_SYSTEM_TIME,
];
const OLD_WALL_CLOCK: u32 = 0x11;
const OLD_SYSTEM_TIME: u32 = 0x12;

/// Registers of KVM's features that no guest is shown: all but its clock.
const NOT_SHOWN: std::ops::RangeInclusive<u32> = msr::KVM_SYSTEM_TIME + 1..=0x4b56_4dff;

/// Registers of the other engine's that a KVM may lack, and that no guest misses.
const NOT_MISSED: [u32; 5] = [
    msr::MICROCODE_REVISION,
    msr::FEATURE_CONTROL,
    msr::MISC_ENABLE,
    msr::MTRR_DEF_TYPE,
    msr::TSC_ADJUST,
];

/// What the vCPUs of a machine have in common.
#[derive(Debug)]
pub(crate) struct Shape {
    msrs: Vec<u32>,
    avx: bool,
}

impl Shape {
    pub(crate) fn new(
        kvm: &Kvm,
        features: Features,
        template: &CpuTemplate,
    ) -> Result<Arc<Self>, Error> {
        let list = kvm
            .get_msr_index_list()
            .map_err(failed("ask KVM for its registers"))?;
        let state = |index: &u32| !NO_STATE.contains(index) && !NOT_SHOWN.contains(index);
        let changed = template.msr_modifiers.iter().map(|one| one.addr);
        let all = list.as_slice().iter().copied().chain(changed);
        let mut msrs: Vec<u32> = all.filter(state).collect();
        msrs.push(msr::MTRR_DEF_TYPE);
        msrs.sort_unstable();
        msrs.dedup();
        Ok(Arc::new(Self {
            msrs,
            avx: features.has(Feature::Avx),
        }))
    }
}

fn refuse(why: impl Into<String>) -> Error {
    Error::State {
        engine: NAME,
        why: why.into(),
    }
}

impl KvmVcpu {
    /// Takes the state. Not during a run.
    pub(crate) fn save(&self) -> Result<VcpuState, Error> {
        let get = "read a virtual CPU's state";
        let mut state = VcpuState::after_reset();
        let fd = &self.fd;
        let waits = fd.get_mp_state().map_err(failed(get))?.mp_state;
        registers::load_general(&mut state, &fd.get_regs().map_err(failed(get))?);
        registers::load_special(&mut state, &fd.get_sregs().map_err(failed(get))?);
        let xsave = fd.get_xsave().map_err(failed(get))?;
        registers::load_extended(&mut state, &xsave, self.shape.avx);
        let xcrs = fd.get_xcrs().map_err(failed(get))?;
        let xcrs = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize);
        let xcr0 = xcrs.into_iter().find(|xcr| xcr.xcr == 0);
        state.xcr0 = xcr0.map_or(1, |xcr| xcr.value);
        registers::load_debug(&mut state, &fd.get_debug_regs().map_err(failed(get))?);
        let mut page = fd.get_lapic().map_err(failed(get))?;
        state.msrs = self.read_msrs(&self.shape.msrs)?;
        state.tsc_khz = self.fd.get_tsc_khz().unwrap_or(0);
        let deadline = self.read_msrs(&[msr::TSC_DEADLINE])?;
        let events = fd.get_vcpu_events().map_err(failed(get))?;

        if events.interrupt.injected != 0 {
            registers::put_back(&mut page, events.interrupt.nr);
        }
        state.apic.tsc_deadline = deadline.first().map_or(0, |(_, value)| *value);
        if state.apic.tsc_deadline == 0
            && registers::has_deadline(&page)
            && !registers::timer_is_seen(&page)
        {
            // A timer that went off may be nowhere to be seen. One interrupt too many
            // hurts nobody, one too few stops a guest that waits for it: now.
            let tsc = state.msrs.iter().find(|(index, _)| *index == msr::TSC);
            state.apic.tsc_deadline = tsc.map_or(0, |(_, value)| *value);
        }
        registers::load_apic(&mut state.apic, &page);
        state.events = neutral_events(&events);
        state.events.halted = waits == KVM_MP_STATE_HALTED;
        state.events.waits_for_startup =
            waits == KVM_MP_STATE_UNINITIALIZED || waits == KVM_MP_STATE_INIT_RECEIVED;
        Ok(state)
    }

    /// Replaces the state.
    pub(crate) fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        let set = "replace a virtual CPU's state";
        let Some(xsave) = registers::extended(state) else {
            return Err(refuse("its extended state is too long"));
        };
        let invalid = |what: &'static str| {
            move |error: kvm_ioctls::Error| {
                if error.errno() == libc::EINVAL {
                    refuse(format!("KVM takes its {what} for invalid"))
                } else {
                    failed(set)(error)
                }
            }
        };
        let fd = &self.fd;
        if !same_tsc_rate(state.tsc_khz, fd.get_tsc_khz().unwrap_or(0)) {
            // Where the processor can scale it.
            fd.set_tsc_khz(state.tsc_khz).map_err(|_| {
                refuse(format!(
                    "its TSC ran at {} kHz, to which KVM cannot scale this processor's",
                    state.tsc_khz
                ))
            })?;
        }
        let mp_state = if state.events.waits_for_startup {
            KVM_MP_STATE_UNINITIALIZED
        } else if state.events.halted {
            KVM_MP_STATE_HALTED
        } else {
            KVM_MP_STATE_RUNNABLE
        };
        fd.set_mp_state(kvm_mp_state { mp_state })
            .map_err(failed(set))?;
        fd.set_regs(&registers::general(state))
            .map_err(invalid("registers"))?;
        fd.set_sregs(&registers::special(state))
            .map_err(invalid("control registers or segments"))?;
        ioctl::set_xsave(fd, &xsave).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => refuse("KVM takes its extended state for invalid"),
            _ => failed(set)(error),
        })?;
        fd.set_xcrs(&xcr0(state.xcr0)).map_err(invalid("XCR0"))?;
        fd.set_debug_regs(&registers::debug(state))
            .map_err(invalid("debug registers"))?;
        let mut page = fd.get_lapic().map_err(failed(set))?;
        registers::apic(&mut page, &state.apic);
        fd.set_lapic(&page).map_err(invalid("local APIC"))?;
        self.write_msrs(state)?;
        fd.set_vcpu_events(&kvm_events(state))
            .map_err(invalid("pending events"))?;
        // The guest's watchdogs shall know that it stood still. Without KVM's clock in
        // use there is nobody to tell.
        match fd.kvmclock_ctrl() {
            Err(error) if error.errno() != libc::EINVAL => Err(failed(set)(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Has `by` execute the instruction at RIP, and takes what it changed: not the clock,
    /// nor the interrupt controller, which go on meanwhile. The guest's end, if it ends.
    pub(crate) fn complete_by(
        &mut self,
        by: &mut dyn Completion,
        io: &dyn Io,
    ) -> Result<Option<Exit>, Error> {
        let doing = "hand over an instruction";
        // KVM has raised #UD for an instruction that it gives up, and yet asks us.
        let mut events = self.fd.get_vcpu_events().map_err(failed(doing))?;
        events.exception = Default::default();
        self.fd.set_vcpu_events(&events).map_err(failed(doing))?;
        let before = self.save()?;
        let after = match by.complete(&before, io)? {
            Completed::GoesOn(after) => after,
            Completed::Ended(exit) => return Ok(Some(exit)),
        };
        let fd = &self.fd;
        fd.set_regs(&registers::general(&after))
            .map_err(failed(doing))?;
        fd.set_sregs(&registers::special(&after))
            .map_err(failed(doing))?;
        if after.xsave != before.xsave {
            // User code may use more than the guest's CPUID gives.
            let whole = fd.get_xsave().map_err(failed(doing))?;
            let area = registers::extended_within(&whole, &after, self.shape.avx);
            let area = area.ok_or_else(|| refuse("its extended state is too long"))?;
            ioctl::set_xsave(fd, &area).map_err(failed(doing))?;
        }
        if after.xcr0 != before.xcr0 {
            fd.set_xcrs(&xcr0(after.xcr0)).map_err(failed(doing))?;
        }
        if after.debug != before.debug {
            fd.set_debug_regs(&registers::debug(&after))
                .map_err(failed(doing))?;
        }
        // Those alone that it wrote: time has gone on.
        let mut changed = VcpuState {
            msrs: after.msrs.clone(),
            ..VcpuState::after_reset()
        };
        changed.msrs.retain(|msr| {
            msr.0 != msr::TSC
                && before
                    .msrs
                    .iter()
                    .any(|one| one.0 == msr.0 && one.1 != msr.1)
        });
        changed.apic.tsc_deadline = 0;
        if !changed.msrs.is_empty() {
            self.write_msrs(&changed)?;
        }
        events.interrupt.shadow = match after.events.interrupt_shadow {
            true => events.interrupt.shadow.max(SHADOW_STI),
            false => 0,
        };
        self.fd.set_vcpu_events(&events).map_err(failed(doing))?;
        Ok(None)
    }

    /// Those of `indices` that there are.
    pub(crate) fn read_msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
        let mut found = Vec::with_capacity(indices.len());
        let mut left = indices;
        while !left.is_empty() {
            let entries: Vec<_> = left.iter().map(|index| entry(*index, 0)).collect();
            let mut msrs = list(&entries)?;
            let read = self
                .fd
                .get_msrs(&mut msrs)
                .map_err(failed("read a virtual CPU's registers"))?;
            let read_entries = msrs.as_slice().iter().take(read);
            found.extend(read_entries.map(|entry| (entry.index, entry.data)));
            // The kernel stops at the first one that is not there.
            left = left.get(read + 1..).unwrap_or_default();
        }
        Ok(found)
    }

    fn write_msrs(&self, state: &VcpuState) -> Result<(), Error> {
        let own = state.msrs.iter().filter(|(index, _)| {
            // Not restored: see `NO_STATE`.
            !NO_STATE.contains(index)
        });
        let mut entries: Vec<_> = own.map(|(index, value)| entry(*index, *value)).collect();
        // After the TSC, and the APIC's timer mode.
        if state.apic.tsc_deadline != 0 {
            entries.push(entry(msr::TSC_DEADLINE, state.apic.tsc_deadline));
        }
        let mut left = entries.as_slice();
        while !left.is_empty() {
            let written = self
                .fd
                .set_msrs(&list(left)?)
                .map_err(failed("write a virtual CPU's registers"))?;
            if let Some(refused) = left.get(written)
                && refused.data != 0
                && !NOT_MISSED.contains(&refused.index)
            {
                return Err(refuse(format!(
                    "KVM refuses {:#x} in register {:#x}",
                    refused.data, refused.index
                )));
            }
            left = left.get(written + 1..).unwrap_or_default();
        }
        Ok(())
    }
}

fn xcr0(value: u64) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0] = kvm_xcr {
        xcr: 0,
        reserved: 0,
        value,
    };
    xcrs
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(entries).map_err(|_| refuse("it has more registers than KVM takes at once"))
}

fn neutral_events(events: &kvm_vcpu_events) -> PendingEvents {
    let raised = events.exception.injected != 0 || events.exception.pending != 0;
    let has_code = events.exception.has_error_code != 0;
    PendingEvents {
        interrupt_shadow: events.interrupt.shadow != 0,
        nmi_pending: events.nmi.pending != 0 || events.nmi.injected != 0,
        // One that was injected is not in its handler yet, though KVM has masked others.
        nmi_blocked: events.nmi.masked != 0 && events.nmi.injected == 0,
        exception: raised.then(|| PendingException {
            vector: events.exception.nr,
            error_code: has_code.then_some(events.exception.error_code),
        }),
        halted: false,
        waits_for_startup: false,
    }
}

fn kvm_events(state: &VcpuState) -> kvm_vcpu_events {
    let from = &state.events;
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if from.interrupt_shadow {
        // Processors refuse a shadow of STI while interrupts are off (SDM vol. 3,
        // §27.3.1.5).
        events.interrupt.shadow = if state.rflags & rflags::IF != 0 {
            SHADOW_STI
        } else {
            SHADOW_MOV_SS
        };
    }
    events.nmi.pending = from.nmi_pending.into();
    events.nmi.masked = from.nmi_blocked.into();
    // Others are raised again by the instruction that RIP is at.
    let lost = [vector::DB, vector::BP, vector::OF];
    if let Some(exception) = from.exception.filter(|one| lost.contains(&one.vector)) {
        events.exception.injected = 1;
        events.exception.nr = exception.vector;
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_back_as_they_went() {
        let mut state = VcpuState::after_reset();
        state.rflags |= rflags::IF;
        state.events = PendingEvents {
            interrupt_shadow: true,
            nmi_pending: true,
            nmi_blocked: true,
            exception: Some(PendingException {
                vector: vector::DB,
                error_code: None,
            }),
            ..PendingEvents::default()
        };
        let events = kvm_events(&state);
        assert_eq!(neutral_events(&events), state.events);
        assert_eq!(events.interrupt.shadow, SHADOW_STI);
        state.rflags &= !rflags::IF;
        assert_eq!(kvm_events(&state).interrupt.shadow, SHADOW_MOV_SS);
    }

    #[test]
    fn a_fault_on_its_way_is_raised_again_by_its_instruction() {
        let mut state = VcpuState::after_reset();
        state.events.exception = Some(PendingException {
            vector: vector::PF,
            error_code: Some(2),
        });
        assert_eq!(kvm_events(&state).exception.injected, 0);
    }

    #[test]
    fn an_injected_nmi_waits_rather_than_being_served() {
        let mut events = kvm_vcpu_events::default();
        (events.nmi.injected, events.nmi.masked) = (1, 1);
        let neutral = neutral_events(&events);
        assert!(neutral.nmi_pending && !neutral.nmi_blocked);
    }
}
