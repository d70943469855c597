//! What CPUID tells a guest: its CPU model's features, and the rates of clocks so that no
//! guest measures them. The same on every engine, so that a machine may move between them.
//!
//! Hiding a bit does not hide the instruction: that is for the engine to do.

use std::arch::x86_64::__cpuid_count;

use crate::control::cr4;
use crate::cpuid::{
    self, Leaf, extended_edx, kvm, leaf1_ecx, leaf1_edx, leaf7_ebx, leaf7_ecx, leaf7_edx,
};
use crate::features::{CpuModel, Feature, Features};
use crate::xsave;

/// What every engine makes itself, whatever the host has.
const OWN_ECX: u32 =
    leaf1_ecx::PCID | leaf1_ecx::X2APIC | leaf1_ecx::TSC_DEADLINE | leaf1_ecx::HYPERVISOR;
const OWN_LEAF7_EBX: u32 = leaf7_ebx::SMEP | leaf7_ebx::INVPCID | leaf7_ebx::SMAP;
const OWN_LEAF7_ECX: u32 = leaf7_ecx::UMIP;
/// CR4.OSXSAVE, as leaf 1 shows it in ECX.
const OSXSAVE: u32 = 1 << 27;
/// What every machine has besides its model's features.
const OWN_EDX: u32 = leaf1_edx::DE
    | leaf1_edx::PSE
    | leaf1_edx::MSR
    | leaf1_edx::PAE
    | leaf1_edx::CX8
    | leaf1_edx::APIC
    | leaf1_edx::PGE
    | leaf1_edx::CMOV
    | leaf1_edx::PAT
    | leaf1_edx::PSE36
    | leaf1_edx::CLFLUSH
    | leaf1_edx::FXSR
    | leaf1_edx::SSE;
const EXTENDED_EDX: u32 =
    extended_edx::SYSCALL | extended_edx::NX | extended_edx::GIB_PAGES | extended_edx::LONG_MODE;
const LAST_BASIC: u32 = cpuid::FREQUENCY;

/// What [`CpuModel::Baseline`] calls itself: an early CPU with x86-64-v3, cut down, so
/// that guests know what to protect themselves against.
mod baseline {
    use crate::cpuid::Leaf;

    pub(super) const VENDOR: &[u8; 12] = b"GenuineIntel";
    /// Family 6, model 60, stepping 3.
    pub(super) const VERSION: u32 = 0x0003_06c3;
    /// At most 48 bytes.
    pub(super) const BRAND: &[u8] = b"Kombi x86-64-v2";
    /// 32 KiB of data and of instructions, 256 KiB of both: 8 ways of lines of 64 bytes.
    pub(super) const CACHES: [Leaf; 3] = [
        [0x121, 7 << 22 | 63, 63, 0],
        [0x122, 7 << 22 | 63, 63, 0],
        [0x143, 7 << 22 | 63, 511, 0],
    ];
    /// The last of these as leaf 8000_0006 shows it.
    pub(super) const L2: Leaf = [0, 0, 256 << 16 | 6 << 12 | 64, 0];
}

/// Where a vCPU is among the others: cores of one package, each with one thread or two.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// APIC id.
    pub id: u32,
    /// How many there are.
    pub count: u32,
    /// Two by two they are threads of a core.
    pub smt: bool,
}

impl Place {
    /// Ids that the package has room for.
    fn ids(self) -> u32 {
        self.count.next_power_of_two()
    }

    /// Threads of a core, a power of two.
    fn threads(self) -> u32 {
        if self.smt && self.count > 1 { 2 } else { 1 }
    }
}

/// Whom CPUID describes.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    /// Where the vCPU is.
    pub place: Place,
    /// The rate of its TSC.
    pub tsc_khz: u64,
    /// What it is like.
    pub cpu_model: CpuModel,
    /// What it has: the model's on this host.
    pub features: Features,
    /// Bits of a physical address.
    pub physical_bits: u32,
    /// CR4 now: leaf 1 shows OSXSAVE.
    pub cr4: u64,
    /// XCR0 now: leaf 0xd shows the size of what it has switched on.
    pub xcr0: u64,
}

fn host(leaf: u32, sub: u32) -> Leaf {
    let r = __cpuid_count(leaf, sub);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// What CPUID gives.
#[must_use]
pub fn guest(leaf: u32, sub: u32, shown: &Shown) -> Leaf {
    let (place, features) = (shown.place, shown.features);
    let id = place.id;
    let khz = u32::try_from(shown.tsc_khz).unwrap_or(u32::MAX);
    let baseline = shown.cpu_model == CpuModel::Baseline;
    let [_, b, c, d] = features.leaf(leaf, if has_subleaves(leaf) { sub } else { 0 });
    match leaf {
        cpuid::VENDOR => {
            let [b, c, d] = vendor(baseline);
            [LAST_BASIC, b, c, d]
        }
        cpuid::FEATURES => {
            let version = if baseline {
                baseline::VERSION
            } else {
                host(leaf, 0)[0]
            };
            let osxsave = if shown.cr4 & cr4::OSXSAVE != 0 {
                OSXSAVE
            } else {
                0
            };
            let several = if place.count > 1 { leaf1_edx::HTT } else { 0 };
            // CLFLUSH of 64 bytes.
            [
                version,
                id << 24 | place.ids() << 16 | 8 << 8,
                c | OWN_ECX | osxsave,
                d | OWN_EDX | several,
            ]
        }
        cpuid::CACHES => {
            let [a, b, c, d] = if baseline {
                let cache = baseline::CACHES.get(sub as usize);
                cache.copied().unwrap_or_default()
            } else {
                host(leaf, sub)
            };
            // Level 3 and above are the package's, the others a core's own.
            let sharing = if a >> 5 & 7 >= 3 {
                place.ids() - 1
            } else {
                place.threads() - 1
            };
            let cores = place.ids() / place.threads() - 1;
            match a & 0x1f {
                0 => [a & 0x3ff, b, c, d],
                _ => [a & 0x3ff | sharing << 14 | cores << 26, b, c, d],
            }
        }
        // Without it Linux trusts the timer for periodic ticks only: no tickless
        // idle, no timer finer than a tick.
        cpuid::THERMAL_AND_POWER => [cpuid::APIC_TIMER_ALWAYS_RUNS, 0, 0, 0],
        cpuid::EXTENDED_FEATURES if sub == 0 => [
            0,
            b | OWN_LEAF7_EBX,
            c | OWN_LEAF7_ECX,
            d | leaf7_edx::ARCH_CAPABILITIES,
        ],
        cpuid::TOPOLOGY => match sub {
            0 => [
                place.threads().trailing_zeros(),
                place.threads(),
                1 << 8,
                id,
            ],
            1 => [place.ids().trailing_zeros(), place.count, 2 << 8 | 1, id],
            _ => [0, 0, sub, id],
        },
        cpuid::EXTENDED_STATE if features.has(Feature::Xsave) => extended_state(sub, shown),
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
            let [b, c, d] = if baseline {
                [0; 3]
            } else {
                let [_, b, c, d] = host(leaf, 0);
                [b, c, d]
            };
            [cpuid::ADDRESS_WIDTHS, b, c, d]
        }
        cpuid::EXTENDED_AMD_FEATURES => [0, 0, c, d | EXTENDED_EDX],
        cpuid::BRAND_FIRST..=cpuid::BRAND_LAST if baseline => {
            let at = (leaf - cpuid::BRAND_FIRST) as usize * 16;
            let word = |i: usize| {
                let byte = |k| baseline::BRAND.get(at + 4 * i + k).copied().unwrap_or(0);
                u32::from_le_bytes(std::array::from_fn(byte))
            };
            [word(0), word(1), word(2), word(3)]
        }
        cpuid::L2_CACHE if baseline => baseline::L2,
        cpuid::BRAND_FIRST..=cpuid::BRAND_LAST | cpuid::L2_CACHE => host(leaf, 0),
        cpuid::POWER => [0, 0, 0, cpuid::INVARIANT_TSC],
        cpuid::ADDRESS_WIDTHS => [48 << 8 | shown.physical_bits, 0, 0, 0],
        _ => [0; 4],
    }
}

/// Whether ECX means something; elsewhere it is whatever the guest had in it (SDM
/// vol. 2A, CPUID).
#[must_use]
pub const fn has_subleaves(leaf: u32) -> bool {
    matches!(
        leaf,
        cpuid::CACHES | cpuid::EXTENDED_FEATURES | cpuid::TOPOLOGY | cpuid::EXTENDED_STATE
    )
}

/// EBX, ECX and EDX of leaf 0.
fn vendor(baseline: bool) -> [u32; 3] {
    if !baseline {
        let [_, b, c, d] = host(cpuid::VENDOR, 0);
        return [b, c, d];
    }
    let words = baseline::VENDOR.as_chunks::<4>().0;
    let word = |i: usize| words.get(i).copied().map_or(0, u32::from_le_bytes);
    [word(0), word(2), word(1)]
}

/// Leaf d (SDM vol. 1, §13.2).
fn extended_state(sub: u32, shown: &Shown) -> Leaf {
    let avx = shown.features.has(Feature::Avx);
    let len = |with_avx| {
        if with_avx {
            xsave::AVX_BYTES as u32
        } else {
            xsave::SSE_BYTES as u32
        }
    };
    match sub {
        0 => {
            let components = xsave::X87 | xsave::SSE | if avx { xsave::AVX } else { 0 };
            let now = len(shown.xcr0 & xsave::AVX != 0);
            [components as u32, now, len(avx), 0]
        }
        1 => {
            let [a, ..] = shown.features.leaf(cpuid::EXTENDED_STATE, 1);
            [a, 0, 0, 0]
        }
        2 if avx => {
            let range = xsave::YMM_HIGH;
            [range.len() as u32, range.start as u32, 0, 0]
        }
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(cpu_model: CpuModel, tsc_khz: u64) -> Shown {
        Shown {
            place: Place {
                id: 0,
                count: 1,
                smt: false,
            },
            tsc_khz,
            cpu_model,
            features: cpu_model.on(Features::EVERYTHING).unwrap(),
            physical_bits: 46,
            cr4: 0,
            xcr0: 7,
        }
    }

    #[test]
    fn nothing_that_needs_xsave_is_shown_below_v3() {
        for model in [CpuModel::Baseline, CpuModel::V2] {
            let shown = shown(model, 2_500_000);
            let [_, _, c, _] = guest(1, 0, &shown);
            assert_eq!(c & (1 << 26 | 1 << 27 | 1 << 28 | 1 << 12 | 1 << 29), 0);
            let vex = 1 << 3 | 1 << 5 | 1 << 8 | 1 << 16;
            assert_eq!(guest(7, 0, &shown)[1] & vex, 0);
            assert_eq!(guest(0xd, 0, &shown), [0; 4]);
        }
    }

    #[test]
    fn the_size_of_the_xsave_area_follows_xcr0() {
        let mut shown = shown(CpuModel::V3, 2_500_000);
        assert_eq!(guest(0xd, 0, &shown), [7, 832, 832, 0]);
        shown.xcr0 = 3;
        assert_eq!(guest(0xd, 0, &shown), [7, 576, 832, 0]);
        assert_eq!(guest(0xd, 2, &shown), [256, 576, 0, 0]);
    }

    #[test]
    fn ecx_matters_only_to_leaves_that_have_subleaves() {
        let shown = shown(CpuModel::Host, 2_500_000);
        for leaf in [0, 1, 6, 0x15, 0x4000_0001, 0x8000_0001, 0x8000_0008] {
            assert_eq!(
                guest(leaf, 0xdead, &shown),
                guest(leaf, 0, &shown),
                "{leaf:#x}"
            );
        }
        assert_ne!(guest(7, 1, &shown), guest(7, 0, &shown));
    }

    #[test]
    fn baseline_says_nothing_of_the_host() {
        let shown = shown(CpuModel::Baseline, 2_500_000);
        assert_eq!(&guest(0, 0, &shown)[1].to_le_bytes(), b"Genu");
        assert_eq!(&guest(0x8000_0002, 0, &shown)[0].to_le_bytes(), b"Komb");
        assert_eq!(guest(4, 3, &shown), [0; 4]);
    }

    #[test]
    fn the_tsc_rate_can_be_computed_from_leaf_15() {
        for khz in [1_000_000u64, 2_500_000, 4_294_967, 4_999_999] {
            let [denominator, numerator, crystal, _] = guest(0x15, 0, &shown(CpuModel::Host, khz));
            let hz = u64::from(crystal) * u64::from(numerator) / u64::from(denominator);
            assert_eq!(hz / 1000, khz);
        }
    }

    #[test]
    fn every_core_has_an_id_of_its_own_in_one_package() {
        for count in [2, 3, 8] {
            for id in 0..count {
                let mut shown = shown(CpuModel::Host, 2_500_000);
                shown.place = Place {
                    id,
                    count,
                    smt: false,
                };
                let [_, b, _, d] = guest(1, 0, &shown);
                assert_eq!((b >> 24, d >> 28 & 1), (id, 1));
                assert!(b >> 16 & 0xff >= count);
                let [shift, cores, kind, own] = guest(0xb, 1, &shown);
                assert_eq!((cores, kind >> 8, own), (count, 2, id));
                assert!(1 << shift >= count && own >> shift == 0);
                assert_eq!(guest(0xb, 0, &shown), [0, 1, 1 << 8, id]);
            }
        }
    }

    #[test]
    fn threads_share_a_core_two_by_two_and_its_caches() {
        for (count, threads) in [(1, 1), (2, 2), (6, 2)] {
            for id in 0..count {
                let mut shown = shown(CpuModel::Baseline, 2_500_000);
                shown.place = Place {
                    id,
                    count,
                    smt: true,
                };
                let [shift, of_core, kind, own] = guest(0xb, 0, &shown);
                assert_eq!((of_core, kind, own), (threads, 1 << 8, id));
                assert_eq!(id >> shift, id / threads, "its core");
                let [package, all, ..] = guest(0xb, 1, &shown);
                assert_eq!((id >> package, all), (0, count));
                let [a, ..] = guest(4, 0, &shown);
                assert_eq!(a >> 14 & 0xfff, threads - 1);
                let cores = count.next_power_of_two() / threads;
                assert_eq!(a >> 26, cores - 1);
                assert_eq!(guest(4, 3, &shown), [0; 4], "no further cache");
            }
        }
    }
}
