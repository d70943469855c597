//! What CPUID tells the guest: x86-64-v2 as far as the host has it, nothing that
//! needs XSAVE, and the rates of clocks so that no guest measures them.
//!
//! Hiding a bit does not hide the instruction: the translator's allow-list does.

use std::arch::x86_64::__cpuid_count;

use x86::cpuid::{self, extended_edx, kvm, leaf1_ecx, leaf1_edx, leaf7_ebx, leaf7_ecx, leaf7_edx};

use crate::mmu::walk::PHYSICAL_BITS;

/// EAX, EBX, ECX, EDX.
pub(crate) type Leaf = [u32; 4];

const FEATURES_ECX: u32 = leaf1_ecx::SSE3
    | leaf1_ecx::PCLMULQDQ
    | leaf1_ecx::SSSE3
    | leaf1_ecx::CMPXCHG16B
    | leaf1_ecx::SSE4_1
    | leaf1_ecx::SSE4_2
    | leaf1_ecx::MOVBE
    | leaf1_ecx::POPCNT
    | leaf1_ecx::AES
    | leaf1_ecx::RDRAND;
/// The engine's own, whatever the host has.
const OWN_ECX: u32 =
    leaf1_ecx::PCID | leaf1_ecx::X2APIC | leaf1_ecx::TSC_DEADLINE | leaf1_ecx::HYPERVISOR;
const OWN_LEAF7_EBX: u32 = leaf7_ebx::SMEP | leaf7_ebx::INVPCID | leaf7_ebx::SMAP;
const OWN_LEAF7_ECX: u32 = leaf7_ecx::UMIP;
const FEATURES_EDX: u32 = leaf1_edx::FPU
    | leaf1_edx::DE
    | leaf1_edx::PSE
    | leaf1_edx::TSC
    | leaf1_edx::MSR
    | leaf1_edx::PAE
    | leaf1_edx::CX8
    | leaf1_edx::APIC
    | leaf1_edx::PGE
    | leaf1_edx::CMOV
    | leaf1_edx::PAT
    | leaf1_edx::PSE36
    | leaf1_edx::CLFLUSH
    | leaf1_edx::MMX
    | leaf1_edx::FXSR
    | leaf1_edx::SSE
    | leaf1_edx::SSE2;
const EXTENDED_EDX: u32 = extended_edx::SYSCALL
    | extended_edx::NX
    | extended_edx::GIB_PAGES
    | extended_edx::RDTSCP
    | extended_edx::LONG_MODE;
const LAST_BASIC: u32 = cpuid::FREQUENCY;

fn host(leaf: u32, sub: u32) -> Leaf {
    let r = __cpuid_count(leaf, sub);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// Where a vCPU is among the others: cores of one package, each with one thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) id: u32,
    pub(crate) count: u32,
}

impl Place {
    /// Ids that the package has room for.
    fn ids(self) -> u32 {
        self.count.next_power_of_two()
    }
}

/// What leaf `leaf`, subleaf `sub` gives on the vCPU at `place`.
pub(crate) fn guest(leaf: u32, sub: u32, place: Place, tsc_khz: u64) -> Leaf {
    let id = place.id;
    let khz = u32::try_from(tsc_khz).unwrap_or(u32::MAX);
    match leaf {
        cpuid::VENDOR => {
            let [_, b, c, d] = host(leaf, 0);
            [LAST_BASIC, b, c, d]
        }
        cpuid::FEATURES => {
            let [version, _, c, d] = host(leaf, 0);
            let several = if place.count > 1 { leaf1_edx::HTT } else { 0 };
            // CLFLUSH of 64 bytes.
            [
                version,
                id << 24 | place.ids() << 16 | 8 << 8,
                c & FEATURES_ECX | OWN_ECX,
                d & FEATURES_EDX | several,
            ]
        }
        cpuid::CACHES => {
            let [a, b, c, d] = host(leaf, sub);
            // Level 3 and above are the package's, the others a core's own.
            let sharing = if a >> 5 & 7 >= 3 { place.ids() - 1 } else { 0 };
            let cores = if a & 0x1f == 0 { 0 } else { place.ids() - 1 };
            [a & 0x3ff | sharing << 14 | cores << 26, b, c, d]
        }
        // Without it Linux trusts the timer for periodic ticks only: no tickless
        // idle, no timer finer than a tick.
        cpuid::THERMAL_AND_POWER => [cpuid::APIC_TIMER_ALWAYS_RUNS, 0, 0, 0],
        cpuid::EXTENDED_FEATURES if sub == 0 => [
            0,
            leaf7_ebx::ERMS | OWN_LEAF7_EBX,
            OWN_LEAF7_ECX,
            leaf7_edx::ARCH_CAPABILITIES,
        ],
        cpuid::TOPOLOGY => match sub {
            0 => [0, 1, 1 << 8, id],
            1 => [place.ids().trailing_zeros(), place.count, 2 << 8 | 1, id],
            _ => [0, 0, sub, id],
        },
        // TSC = crystal × EBX / EAX; a crystal of 1 kHz per tick keeps it exact.
        cpuid::TSC => match khz.checked_mul(1000) {
            Some(hz) => [1, 1, hz, 0],
            None => [1000, khz, 1_000_000, 0],
        },
        cpuid::FREQUENCY => [khz / 1000, khz / 1000, 100, 0],
        cpuid::HYPERVISOR => [
            cpuid::KVM_FEATURES,
            u32::from_le_bytes(*b"KVMK"),
            u32::from_le_bytes(*b"VMKV"),
            u32::from_le_bytes(*b"M\0\0\0"),
        ],
        cpuid::KVM_FEATURES => [
            kvm::NOP_IO_DELAY | kvm::CLOCKSOURCE2 | kvm::CLOCKSOURCE_STABLE,
            0,
            0,
            0,
        ],
        cpuid::EXTENDED => {
            let [_, b, c, d] = host(leaf, 0);
            [cpuid::ADDRESS_WIDTHS, b, c, d]
        }
        cpuid::EXTENDED_AMD_FEATURES => {
            let [_, _, c, d] = host(leaf, 0);
            [
                0,
                0,
                c & cpuid::LAHF,
                d & EXTENDED_EDX | extended_edx::RDTSCP,
            ]
        }
        cpuid::BRAND_FIRST..=cpuid::BRAND_LAST | cpuid::L2_CACHE => host(leaf, 0),
        cpuid::POWER => [0, 0, 0, cpuid::INVARIANT_TSC],
        cpuid::ADDRESS_WIDTHS => [48 << 8 | PHYSICAL_BITS, 0, 0, 0],
        _ => [0; 4],
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Place = Place { id: 0, count: 1 };

    #[test]
    fn nothing_that_needs_xsave_is_shown() {
        let [_, _, c, _] = guest(1, 0, ONE, 2_500_000);
        assert_eq!(c & (1 << 26 | 1 << 27 | 1 << 28 | 1 << 12 | 1 << 29), 0);
        let vex = 1 << 3 | 1 << 5 | 1 << 8 | 1 << 16;
        assert_eq!(guest(7, 0, ONE, 2_500_000)[1] & vex, 0);
        assert_eq!(guest(0xd, 0, ONE, 2_500_000), [0; 4]);
    }

    #[test]
    fn the_tsc_rate_can_be_computed_from_leaf_15() {
        for khz in [1_000_000u64, 2_500_000, 4_294_967, 4_999_999] {
            let [denominator, numerator, crystal, _] = guest(0x15, 0, ONE, khz);
            let hz = u64::from(crystal) * u64::from(numerator) / u64::from(denominator);
            assert_eq!(hz / 1000, khz);
        }
    }

    #[test]
    fn every_core_has_an_id_of_its_own_in_one_package() {
        for count in [2, 3, 8] {
            for id in 0..count {
                let place = Place { id, count };
                let [_, b, _, d] = guest(1, 0, place, 2_500_000);
                assert_eq!((b >> 24, d >> 28 & 1), (id, 1));
                assert!(b >> 16 & 0xff >= count);
                let [shift, cores, kind, own] = guest(0xb, 1, place, 2_500_000);
                assert_eq!((cores, kind >> 8, own), (count, 2, id));
                assert!(1 << shift >= count && own >> shift == 0);
                assert_eq!(guest(0xb, 0, place, 2_500_000), [0, 1, 1 << 8, id]);
            }
        }
    }
}
