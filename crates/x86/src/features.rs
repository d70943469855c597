//! CPU features and CPU models: what a guest may be shown, as data.
//!
//! A [`CpuModel`] is a set of features; what a machine gets is that set where the
//! host has all of it, or for [`CpuModel::Host`] whatever both host and engine have.
//! Features here are those that come with instructions of their own; bits that an
//! engine makes itself (paging, APIC) are its own business.

use serde::{Deserialize, Serialize};

use crate::cpuid::{self, Leaf};

/// Declares [`Feature`] and its table.
macro_rules! features {
    ($($(#[$doc:meta])* $name:ident $text:literal $place:expr;)*) => {
        /// One feature.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Feature {
            $($(#[$doc])* $name,)*
        }

        impl Feature {
            /// Every feature.
            pub const ALL: &'static [Feature] = &[$(Feature::$name,)*];

            /// As Linux's `/proc/cpuinfo` calls it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Feature::$name => $text,)* }
            }

            /// Where CPUID shows it, if one bit does.
            #[must_use]
            pub const fn place(self) -> Option<Place> {
                match self { $(Feature::$name => $place,)* }
            }
        }
    };
}

/// A bit of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// EAX.
    pub leaf: u32,
    /// ECX.
    pub sub: u32,
    /// Index into [`Leaf`].
    pub register: usize,
    /// Bit number.
    pub bit: u32,
}

const fn bit(leaf: u32, sub: u32, register: usize, bit: u32) -> Option<Place> {
    Some(Place {
        leaf,
        sub,
        register,
        bit,
    })
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;
const AMD: u32 = cpuid::EXTENDED_AMD_FEATURES;

features! {
    /// What every x86-64 CPU has besides the units below.
    Base "lm" bit(AMD, 0, EDX, 29);
    /// x87.
    Fpu "fpu" bit(1, 0, EDX, 0);
    /// RDTSC.
    Tsc "tsc" bit(1, 0, EDX, 4);
    /// MMX.
    Mmx "mmx" bit(1, 0, EDX, 23);
    /// SSE and SSE2.
    Sse "sse2" bit(1, 0, EDX, 26);
    /// SSE3.
    Sse3 "pni" bit(1, 0, ECX, 0);
    /// SSSE3.
    Ssse3 "ssse3" bit(1, 0, ECX, 9);
    /// CMPXCHG16B.
    Cx16 "cx16" bit(1, 0, ECX, 13);
    /// SSE4.1.
    Sse41 "sse4_1" bit(1, 0, ECX, 19);
    /// SSE4.2.
    Sse42 "sse4_2" bit(1, 0, ECX, 20);
    /// POPCNT.
    Popcnt "popcnt" bit(1, 0, ECX, 23);
    /// LAHF and SAHF in 64-bit mode.
    Lahf "lahf_lm" bit(AMD, 0, ECX, 0);
    /// XSAVE, XRSTOR, XGETBV, XSETBV.
    Xsave "xsave" bit(1, 0, ECX, 26);
    /// AVX.
    Avx "avx" bit(1, 0, ECX, 28);
    /// Half-precision conversion.
    F16c "f16c" bit(1, 0, ECX, 29);
    /// Fused multiply and add.
    Fma "fma" bit(1, 0, ECX, 12);
    /// MOVBE.
    Movbe "movbe" bit(1, 0, ECX, 22);
    /// LZCNT.
    Lzcnt "abm" bit(AMD, 0, ECX, 5);
    /// BMI1, TZCNT included.
    Bmi1 "bmi1" bit(7, 0, EBX, 3);
    /// AVX2.
    Avx2 "avx2" bit(7, 0, EBX, 5);
    /// BMI2.
    Bmi2 "bmi2" bit(7, 0, EBX, 8);
    /// Carry-less multiplication.
    Pclmulqdq "pclmulqdq" bit(1, 0, ECX, 1);
    /// AES rounds.
    Aes "aes" bit(1, 0, ECX, 25);
    /// RDRAND.
    Rdrand "rdrand" bit(1, 0, ECX, 30);
    /// RDFSBASE and its family.
    Fsgsbase "fsgsbase" bit(7, 0, EBX, 0);
    /// Fast REP MOVSB and STOSB.
    Erms "erms" bit(7, 0, EBX, 9);
    /// RDSEED.
    Rdseed "rdseed" bit(7, 0, EBX, 18);
    /// ADCX and ADOX.
    Adx "adx" bit(7, 0, EBX, 19);
    /// CLFLUSHOPT.
    Clflushopt "clflushopt" bit(7, 0, EBX, 23);
    /// CLWB.
    Clwb "clwb" bit(7, 0, EBX, 24);
    /// SHA rounds.
    Sha "sha_ni" bit(7, 0, EBX, 29);
    /// RDPID.
    Rdpid "rdpid" bit(7, 0, ECX, 22);
    /// XSAVEOPT.
    Xsaveopt "xsaveopt" bit(0xd, 1, EAX, 0);
    /// XGETBV with ECX = 1.
    Xgetbv1 "xgetbv1" bit(0xd, 1, EAX, 2);
    /// PREFETCHW.
    Prefetchw "3dnowprefetch" bit(AMD, 0, ECX, 8);
    /// RDTSCP.
    Rdtscp "rdtscp" bit(AMD, 0, EDX, 27);
    /// AES rounds with VEX prefix: both AES and AVX.
    VexAes "aes with avx" None;
    /// Carry-less multiplication with VEX prefix.
    VexPclmulqdq "pclmulqdq with avx" None;
}

/// A set of features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(u64);

impl Features {
    /// The set of these.
    #[must_use]
    pub const fn of(list: &[Feature]) -> Self {
        let (mut bits, mut i) = (0, 0);
        while i < list.len() {
            bits |= 1 << list[i] as u8;
            i += 1;
        }
        Self(bits)
    }

    /// Everything that has a name here.
    pub const EVERYTHING: Self = Self::of(Feature::ALL);

    /// One number per set; the same for equal sets of one version of Kombi.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether `feature` is in.
    #[must_use]
    #[inline]
    pub const fn has(self, feature: Feature) -> bool {
        self.0 >> feature as u8 & 1 != 0
    }

    /// Both sets.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What both have.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What `other` lacks.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// One after the other.
    pub fn iter(self) -> impl Iterator<Item = Feature> {
        Feature::ALL
            .iter()
            .copied()
            .filter(move |feature| self.has(*feature))
    }

    /// Names, separated by commas.
    #[must_use]
    pub fn names(self) -> String {
        let names: Vec<_> = self.iter().map(Feature::name).collect();
        names.join(", ")
    }

    /// The bits of one CPUID leaf.
    #[must_use]
    pub fn leaf(self, leaf: u32, sub: u32) -> Leaf {
        let mut answer = [0; 4];
        for place in self.iter().filter_map(Feature::place) {
            if (place.leaf, place.sub) == (leaf, sub)
                && let Some(register) = answer.get_mut(place.register)
            {
                *register |= 1 << place.bit;
            }
        }
        answer
    }

    /// The host's. AVX counts where its operating system lets programs use it.
    #[must_use]
    pub fn of_host() -> Self {
        let cpuid = |leaf, sub| {
            let r = std::arch::x86_64::__cpuid_count(leaf, sub);
            [r.eax, r.ebx, r.ecx, r.edx]
        };
        Self::of_cpu(cpuid, std::is_x86_feature_detected!("avx"))
    }

    /// Whether the host's processor has VMX (SDM vol. 2A, CPUID, leaf 1) or SVM (APM
    /// vol. 3, leaf 8000_0001), as far as it says so.
    #[must_use]
    pub fn host_has_virtualisation() -> bool {
        let cpuid = std::arch::x86_64::__cpuid;
        let vmx = cpuid(cpuid::FEATURES).ecx & 1 << 5 != 0;
        let svm = cpuid(cpuid::EXTENDED).eax >= cpuid::EXTENDED_AMD_FEATURES
            && cpuid(cpuid::EXTENDED_AMD_FEATURES).ecx & 1 << 2 != 0;
        vmx || svm
    }

    /// Those that a CPU shows, and its operating system lets programs use.
    #[must_use]
    pub fn of_cpu(cpuid: impl Fn(u32, u32) -> Leaf, avx_enabled: bool) -> Self {
        let [last, ..] = cpuid(cpuid::VENDOR, 0);
        let [last_extended, ..] = cpuid(cpuid::EXTENDED, 0);
        let mut found = 0;
        for feature in Feature::ALL {
            let Some(place) = feature.place() else {
                continue;
            };
            let most = if place.leaf < cpuid::EXTENDED {
                last
            } else {
                last_extended
            };
            let known = place.leaf <= most;
            let register = cpuid(place.leaf, place.sub).get(place.register).copied();
            if known && register.unwrap_or(0) >> place.bit & 1 != 0 {
                found |= 1 << *feature as u8;
            }
        }
        let found = Self(found);
        let found = if avx_enabled {
            found
        } else {
            found.without(AVX_STATE)
        };
        found.with_combinations()
    }

    /// Adds what follows from two features being there.
    #[must_use]
    pub fn with_combinations(self) -> Self {
        let mut all = self.without(Self::of(&[Feature::VexAes, Feature::VexPclmulqdq]));
        for (first, both) in [
            (Feature::Aes, Feature::VexAes),
            (Feature::Pclmulqdq, Feature::VexPclmulqdq),
        ] {
            if self.has(first) && self.has(Feature::Avx) {
                all = all.with(Self::of(&[both]));
            }
        }
        all
    }
}

/// What works on YMM registers.
pub const AVX_STATE: Features = Features::of(&[
    Feature::Avx,
    Feature::Avx2,
    Feature::F16c,
    Feature::Fma,
    Feature::VexAes,
    Feature::VexPclmulqdq,
]);

/// x86-64-v2 (psABI, 3.1.1), and RDTSCP, which each such CPU has.
const V2: Features = Features::of(&[
    Feature::Base,
    Feature::Fpu,
    Feature::Tsc,
    Feature::Mmx,
    Feature::Sse,
    Feature::Sse3,
    Feature::Ssse3,
    Feature::Cx16,
    Feature::Sse41,
    Feature::Sse42,
    Feature::Popcnt,
    Feature::Lahf,
    Feature::Rdtscp,
]);

/// What x86-64-v3 adds.
const V3: Features = V2.with(Features::of(&[
    Feature::Xsave,
    Feature::Avx,
    Feature::F16c,
    Feature::Fma,
    Feature::Movbe,
    Feature::Lzcnt,
    Feature::Bmi1,
    Feature::Avx2,
    Feature::Bmi2,
]));

/// Beyond the levels, of no consequence where a guest may go, and worth having.
const V2_EXTRAS: Features = Features::of(&[
    Feature::Aes,
    Feature::Pclmulqdq,
    Feature::Rdrand,
    Feature::Erms,
]);

/// A guest's CPU. The first paragraphs are what `--help` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum CpuModel {
    /// x86-64-v2, the same on every host.
    ///
    /// What every host on which the engine runs has, so that a machine may move to any
    /// of them.
    Baseline,
    /// x86-64-v2 with AES, PCLMULQDQ, RDRAND and ERMS where the host has them.
    V2,
    /// As v2, with x86-64-v3: AVX2, BMI2, FMA and others.
    V3,
    /// All that host and engine have.
    ///
    /// What programs find on this host outside of a machine, and so the default.
    #[default]
    Host,
}

impl CpuModel {
    /// Every model, the smallest first.
    pub const ALL: [Self; 4] = [Self::Baseline, Self::V2, Self::V3, Self::Host];

    /// As on command lines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::V2 => "v2",
            Self::V3 => "v3",
            Self::Host => "host",
        }
    }

    /// What a host must have.
    #[must_use]
    pub const fn required(self) -> Features {
        match self {
            Self::Baseline | Self::V2 | Self::Host => V2,
            Self::V3 => V3,
        }
    }

    /// The guest's features on a host with `host`.
    ///
    /// # Errors
    /// What the host lacks.
    pub fn on(self, host: Features) -> Result<Features, Features> {
        let required = self.required();
        let missing = required.without(host);
        if missing != Features::default() {
            return Err(missing);
        }
        let all = match self {
            Self::Baseline => required,
            Self::V2 | Self::V3 => required.with(V2_EXTRAS.and(host)),
            Self::Host => {
                // AVX without the instruction that saves it is of no use.
                if host.has(Feature::Xsave) {
                    host
                } else {
                    host.without(AVX_STATE)
                }
            }
        };
        Ok(all.with_combinations())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_the_host_cannot_give_names_what_is_missing() {
        let host = Features::EVERYTHING.without(Features::of(&[Feature::Avx2, Feature::Movbe]));
        assert_eq!(CpuModel::V3.on(host).unwrap_err().names(), "movbe, avx2");
        assert!(!CpuModel::Host.on(host).unwrap().has(Feature::Avx2));
        assert!(CpuModel::V2.on(host).is_ok());
    }

    #[test]
    fn baseline_is_the_same_on_every_host() {
        assert_eq!(
            CpuModel::Baseline.on(V2),
            CpuModel::Baseline.on(Features::EVERYTHING)
        );
        assert_ne!(CpuModel::V2.on(V2), CpuModel::V2.on(Features::EVERYTHING));
    }

    #[test]
    fn each_model_has_what_smaller_ones_have() {
        let sets = CpuModel::ALL.map(|model| model.on(Features::EVERYTHING).unwrap());
        for pair in sets.windows(2) {
            assert_eq!(pair[0].without(pair[1]), Features::default());
        }
    }

    #[test]
    fn bits_are_where_they_were_found() {
        let cpu = |leaf, sub| match (leaf, sub) {
            (0, _) => [0xd, 0, 0, 0],
            (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
            _ => Features::EVERYTHING.leaf(leaf, sub),
        };
        assert_eq!(Features::of_cpu(cpu, true), Features::EVERYTHING);
        let without = Features::of_cpu(cpu, false);
        assert_eq!(without, Features::EVERYTHING.without(AVX_STATE));
        assert_eq!(
            Features::of(&[Feature::Xsaveopt]).leaf(0xd, 1),
            [1, 0, 0, 0]
        );
    }
}
