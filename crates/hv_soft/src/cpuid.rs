//! What CPUID tells the guest ([`x86::guest_cpuid`]), and what the host's says of clocks.
//!
//! Hiding a bit does not hide the instruction: the translator's allow-list does, which
//! the same features gate.

use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use x86::cpuid::{self, Leaf, leaf1_ecx, leaf7_ebx};
use x86::features::{Feature, Features};
use x86::guest_cpuid::{self, Place, Shown};

use crate::cpu::Cpu;
use crate::mmu::walk::PHYSICAL_BITS;

/// What the host has, and what the engine makes itself.
#[must_use]
pub fn host_features() -> Features {
    Features::of_host().with(Features::of(&[Feature::Rdpid]))
}

impl Cpu {
    /// What CPUID gives now.
    pub(crate) fn cpuid(&self, leaf: u32, sub: u32) -> Leaf {
        let shown = Shown {
            place: Place {
                id: self.id,
                count: self.peers.count() as u32,
                smt: self.smt,
            },
            tsc_khz: self.clock.khz(),
            cpu_model: self.cpu_model,
            features: self.model,
            physical_bits: PHYSICAL_BITS,
            cr4: self.regs.cr4,
            xcr0: self.regs.xcr0,
        };
        let values = guest_cpuid::guest(leaf, sub, &shown);
        if self.template.is_empty() {
            return values;
        }
        let sub = if guest_cpuid::has_subleaves(leaf) {
            sub
        } else {
            0
        };
        self.template.apply(leaf, sub, values)
    }
}

fn host(leaf: u32, sub: u32) -> Leaf {
    let r = __cpuid_count(leaf, sub);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// Whether AMD or Hygon made the host's CPU.
pub(crate) fn host_is_amds() -> bool {
    static IS: OnceLock<bool> = OnceLock::new();
    *IS.get_or_init(|| {
        let [_, b, c, d] = host(cpuid::VENDOR, 0);
        let name = [b, d, c].map(u32::to_le_bytes).concat();
        name == b"AuthenticAMD" || name == b"HygonGenuine"
    })
}

/// The rate of the host's TSC, if CPUID says so.
pub(crate) fn host_tsc_khz() -> Option<u64> {
    let [last, ..] = host(cpuid::VENDOR, 0);
    if last >= cpuid::TSC {
        let [denominator, numerator, crystal, _] = host(cpuid::TSC, 0);
        if denominator != 0 && numerator != 0 && crystal != 0 {
            let hz = u64::from(crystal) * u64::from(numerator) / u64::from(denominator);
            return Some(hz / 1000);
        }
    }
    let [_, _, c, _] = host(cpuid::FEATURES, 0);
    if c & leaf1_ecx::HYPERVISOR != 0 {
        // VMware's convention, which KVM and Xen follow: kHz at 4000_0010.
        let [last, ..] = host(cpuid::HYPERVISOR, 0);
        if (cpuid::HYPERVISOR + 0x10..cpuid::HYPERVISOR + 0x100).contains(&last) {
            let [khz, ..] = host(cpuid::HYPERVISOR + 0x10, 0);
            return (khz != 0).then_some(u64::from(khz));
        }
    }
    None
}

/// The nominal rate of the host's CPU, which its TSC has within some parts in a
/// million.
pub(crate) fn host_base_khz() -> Option<u64> {
    let [last, ..] = host(cpuid::VENDOR, 0);
    let [base, ..] = host(cpuid::FREQUENCY, 0);
    (last >= cpuid::FREQUENCY && base != 0).then_some(u64::from(base) * 1000)
}

/// Whether the engine can run on this CPU.
///
/// # Errors
/// What is missing, in words.
pub fn host_check() -> Result<(), String> {
    let [last, ..] = host(cpuid::VENDOR, 0);
    let bmi2 = last >= cpuid::EXTENDED_FEATURES
        && host(cpuid::EXTENDED_FEATURES, 0)[1] & leaf7_ebx::BMI2 != 0;
    if !bmi2 {
        return Err("the CPU lacks BMI2 (Intel since Haswell, AMD since Excavator have it)".into());
    }
    let [_, _, c, _] = host(cpuid::FEATURES, 0);
    let v2 = leaf1_ecx::SSE4_2 | leaf1_ecx::POPCNT | leaf1_ecx::CMPXCHG16B;
    if c & v2 != v2 {
        return Err("the CPU lacks SSE4.2, POPCNT or CMPXCHG16B".into());
    }
    Ok(())
}
