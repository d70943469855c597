//! RDMSR and WRMSR: what exists, what it does; everything else is #GP, as Linux
//! probes for registers that way.

use x86::control::{cr0, efer};
use x86::{msr, paging};

use crate::apic::local::Effect;
use crate::cpu::Cpu;
use crate::exceptions::{Fault, GP};

/// Registers without effect: they read what was written, at first this.
pub(crate) const PLAIN: [(u32, u64); 9] = [
    (msr::PAT, 0x0007_0406_0007_0406),
    (msr::SYSENTER_CS, 0),
    (msr::SYSENTER_ESP, 0),
    (msr::SYSENTER_EIP, 0),
    (msr::MICROCODE_REVISION, 0),
    (msr::MTRR_DEF_TYPE, 0x806),
    (msr::TSC_ADJUST, 0),
    // DEBUGCTL and SPEC_CTRL-like registers stay absent; these two are probed
    // by every Linux.
    (msr::FEATURE_CONTROL, 1),
    (msr::MISC_ENABLE, 1),
];

/// Registers that read as a constant and ignore what is written.
const CONSTANT: [(u32, u64); 8] = [
    // RDCL_NO: no hardware walks the guest's page tables, so that its kernel need
    // not hide from its own processes (PTI, which doubles loads of CR3).
    (msr::ARCH_CAPABILITIES, 1),
    (msr::DEBUGCTL, 0),
    (msr::PLATFORM_ID, 0),
    (msr::PLATFORM_INFO, 0),
    (msr::MTRR_CAP, 0),
    (msr::MICROCODE_UPDATE, 0),
    // Kernels expect these of AMD's processors, and touch them nowhere else.
    (msr::HWCR, msr::HWCR_TSC_FREQ_SEL),
    (msr::NB_CFG, 0),
];

/// Eight memory types: uncacheable, write-combining, write-through, write-protected,
/// write-back, uncached (SDM vol. 3, table 12-10).
fn is_memory_types(pat: u64) -> bool {
    pat.to_le_bytes()
        .iter()
        .all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

const EFER_KNOWN: u64 = efer::SCE | efer::LME | efer::LMA | efer::NXE;

impl Cpu {
    pub(crate) fn read_msr(&mut self, index: u32) -> Result<u64, Fault> {
        Ok(match index {
            msr::TSC => self.clock.now(),
            msr::APIC_BASE => self.apic.base(),
            msr::TSC_DEADLINE => self.apic.tsc_deadline(),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => return self.read_x2apic(index),
            msr::EFER => self.regs.efer,
            msr::STAR => self.regs.star,
            msr::LSTAR => self.regs.lstar,
            msr::CSTAR => self.regs.cstar,
            msr::FMASK => self.regs.fmask,
            msr::FS_BASE => self.context.fs_base,
            msr::GS_BASE => self.context.gs_base,
            msr::KERNEL_GS_BASE => self.context.kernel_gs_base,
            msr::TSC_AUX => self.context.tsc_aux,
            msr::KVM_SYSTEM_TIME => self.regs.kvm_system_time,
            msr::KVM_WALL_CLOCK => self.regs.kvm_wall_clock,
            _ => {
                if let Some(i) = PLAIN.iter().position(|(known, _)| *known == index) {
                    return Ok(self.regs.plain_msrs[i]);
                }
                let constant = CONSTANT.iter().find(|(known, _)| *known == index);
                let shown = |(_, value): &(u32, u64)| self.template.msr(index, *value);
                return constant.map(shown).ok_or_else(|| {
                    tracing::debug!(
                        msr = format_args!("{index:#x}"),
                        "read of an unknown register"
                    );
                    GP
                });
            }
        })
    }

    pub(crate) fn write_msr(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        let address = |value| {
            if paging::is_canonical(value) {
                Ok(value)
            } else {
                Err(GP)
            }
        };
        match index {
            // All vCPUs have the same; Linux only writes it to synchronize.
            msr::TSC => {}
            msr::APIC_BASE => {
                self.apic.set_base(value).map_err(|_| GP)?;
                self.publish_apic();
            }
            msr::TSC_DEADLINE => {
                self.apic.set_tsc_deadline(value);
                self.timer_changed();
            }
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => return self.write_x2apic(index, value),
            msr::EFER => {
                if value & !EFER_KNOWN != 0 {
                    return Err(GP);
                }
                let changed = (self.regs.efer ^ value) & !efer::LMA;
                if changed & efer::LME != 0 {
                    // Only with paging off: see `startup`.
                    if self.regs.cr0 & cr0::PG != 0 {
                        return Err(GP);
                    }
                }
                self.regs.efer ^= changed;
                self.refresh_crossing();
                if changed & efer::NXE != 0 {
                    self.flush_all();
                }
            }
            msr::STAR => self.regs.star = value,
            msr::LSTAR => {
                self.regs.lstar = address(value)?;
                self.refresh_crossing();
            }
            msr::CSTAR => self.regs.cstar = address(value)?,
            msr::FMASK | msr::TSC_AUX if value >> 32 != 0 => return Err(GP),
            msr::FMASK => {
                self.regs.fmask = value;
                self.refresh_crossing();
            }
            msr::FS_BASE => self.context.fs_base = address(value)?,
            msr::GS_BASE => self.context.gs_base = address(value)?,
            msr::KERNEL_GS_BASE => self.context.kernel_gs_base = address(value)?,
            msr::TSC_AUX => self.context.tsc_aux = value,
            // No branch records, no steps by branches: nothing to switch on.
            msr::DEBUGCTL if value != 0 => return Err(GP),
            // Read-only (SDM vol. 4, table 2-2).
            msr::ARCH_CAPABILITIES => return Err(GP),
            msr::PAT if !is_memory_types(value) => return Err(GP),
            msr::SYSENTER_ESP | msr::SYSENTER_EIP if !paging::is_canonical(value) => {
                return Err(GP);
            }
            msr::KVM_SYSTEM_TIME => {
                self.regs.kvm_system_time = value;
                if value & 1 != 0 {
                    self.update_system_time(value & !1);
                }
            }
            msr::KVM_WALL_CLOCK => {
                self.regs.kvm_wall_clock = value;
                let page = self.clock.wall_clock(2);
                self.write_physical(value, &page);
            }
            _ => {
                if let Some(i) = PLAIN.iter().position(|(known, _)| *known == index) {
                    self.regs.plain_msrs[i] = value;
                    return Ok(());
                }
                if !CONSTANT.iter().any(|(known, _)| *known == index) {
                    tracing::debug!(
                        msr = format_args!("{index:#x}"),
                        value,
                        "write of an unknown register"
                    );
                    return Err(GP);
                }
            }
        }
        Ok(())
    }

    /// Writes KVM's clock page at a guest-physical address.
    pub(crate) fn update_system_time(&mut self, pa: u64) {
        let version = self.ram.load(pa, 4).unwrap_or(0) as u32 & !1;
        let page = self.clock.system_time(version.wrapping_add(2));
        // Odd while it changes: the first vCPU's page is read by all of user space.
        self.write_physical(pa, &version.wrapping_add(1).to_le_bytes());
        self.write_physical(pa.wrapping_add(4), &page[4..]);
        self.write_physical(pa, &page[..4]);
    }

    /// Writes memory at a guest-physical address, within a page; translated code
    /// there is dropped.
    pub(crate) fn write_physical(&mut self, pa: u64, bytes: &[u8]) {
        let len = bytes.len() as u64;
        if !self.ram.allows(pa, len, true) {
            return;
        }
        self.written.set(pa >> 12);
        // No tag tells whether there is code: as for a page that holds some.
        self.begin_code_store(pa, len);
        self.ram.write(pa, bytes);
        self.end_code_store(pa, len);
    }

    fn read_x2apic(&mut self, index: u32) -> Result<u64, Fault> {
        if !self.apic.x2apic() {
            return Err(GP);
        }
        let at = ((index - msr::X2APIC_FIRST) << 4) as u16;
        let now = self.clock.now();
        let low = u64::from(self.apic.read(at, now).map_err(|_| GP)?);
        Ok(if at == 0x300 { self.apic.icr() } else { low })
    }

    fn write_x2apic(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        if !self.apic.x2apic() {
            return Err(GP);
        }
        let at = ((index - msr::X2APIC_FIRST) << 4) as u16;
        if at == 0x300 {
            let effect = self.apic.write_icr(value);
            self.apic_effect(effect);
            return Ok(());
        }
        if value >> 32 != 0 {
            return Err(GP);
        }
        let now = self.clock.now();
        let effect = self.apic.write(at, value as u32, now).map_err(|_| GP)?;
        self.apic_effect(effect);
        Ok(())
    }

    /// xAPIC page load.
    pub(crate) fn apic_read(&mut self, pa: u64) -> u32 {
        let now = self.clock.now();
        self.apic.read((pa & 0xfff) as u16, now).unwrap_or(0)
    }

    /// xAPIC page store.
    pub(crate) fn apic_write(&mut self, pa: u64, value: u32) {
        let now = self.clock.now();
        if let Ok(effect) = self.apic.write((pa & 0xfff) as u16, value, now) {
            self.apic_effect(effect);
        }
    }

    fn apic_effect(&mut self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::EndOfLevel(vector) => self.chips.end_of_interrupt(vector),
            Effect::Send(message) => self.chips.send(Some(message), Some(self.id)),
        }
        self.publish_apic();
        self.timer_changed();
    }

    /// Other vCPUs' interrupts find the APIC by what it answers to.
    pub(crate) fn publish_apic(&self) {
        self.chips
            .set_address(self.id as usize, self.apic.address());
    }
}
