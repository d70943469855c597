//! CPUID leaves and feature bits (SDM vol. 2A, CPUID; KVM's in Linux,
//! Documentation/virt/kvm/x86/cpuid.rst). Only what the house names.

/// EAX, EBX, ECX, EDX.
pub type Leaf = [u32; 4];

/// Vendor and highest basic leaf.
pub const VENDOR: u32 = 0;
/// Version and features.
pub const FEATURES: u32 = 1;
/// Deterministic cache parameters.
pub const CACHES: u32 = 4;
/// Thermal and power management.
pub const THERMAL_AND_POWER: u32 = 6;
/// [`THERMAL_AND_POWER`] EAX: the APIC timer runs in every sleep state (ARAT).
pub const APIC_TIMER_ALWAYS_RUNS: u32 = 1 << 2;
/// Structured extended features.
pub const EXTENDED_FEATURES: u32 = 7;
/// Topology.
pub const TOPOLOGY: u32 = 0xb;
/// Processor extended state: what XSAVE saves.
pub const EXTENDED_STATE: u32 = 0xd;
/// TSC and crystal clock.
pub const TSC: u32 = 0x15;
/// Processor frequency.
pub const FREQUENCY: u32 = 0x16;
/// Hypervisor signature.
pub const HYPERVISOR: u32 = 0x4000_0000;
/// KVM's features.
pub const KVM_FEATURES: u32 = 0x4000_0001;
/// Highest extended leaf.
pub const EXTENDED: u32 = 0x8000_0000;
/// Extended features of AMD's numbering.
pub const EXTENDED_AMD_FEATURES: u32 = 0x8000_0001;
/// First of three leaves with the brand string.
pub const BRAND_FIRST: u32 = 0x8000_0002;
/// Last of them.
pub const BRAND_LAST: u32 = 0x8000_0004;
/// L2 cache.
pub const L2_CACHE: u32 = 0x8000_0006;
/// Advanced power management: the invariant TSC.
pub const POWER: u32 = 0x8000_0007;
/// Address widths.
pub const ADDRESS_WIDTHS: u32 = 0x8000_0008;

/// Leaf 1, ECX.
pub mod leaf1_ecx {
    /// SSE3.
    pub const SSE3: u32 = 1 << 0;
    /// PCLMULQDQ.
    pub const PCLMULQDQ: u32 = 1 << 1;
    /// SSSE3.
    pub const SSSE3: u32 = 1 << 9;
    /// CMPXCHG16B.
    pub const CMPXCHG16B: u32 = 1 << 13;
    /// Process-context identifiers.
    pub const PCID: u32 = 1 << 17;
    /// SSE4.1.
    pub const SSE4_1: u32 = 1 << 19;
    /// SSE4.2.
    pub const SSE4_2: u32 = 1 << 20;
    /// x2APIC.
    pub const X2APIC: u32 = 1 << 21;
    /// MOVBE.
    pub const MOVBE: u32 = 1 << 22;
    /// POPCNT.
    pub const POPCNT: u32 = 1 << 23;
    /// TSC deadline in the local APIC.
    pub const TSC_DEADLINE: u32 = 1 << 24;
    /// AES.
    pub const AES: u32 = 1 << 25;
    /// RDRAND.
    pub const RDRAND: u32 = 1 << 30;
    /// There is a hypervisor.
    pub const HYPERVISOR: u32 = 1 << 31;
}

/// Leaf 1, EDX.
pub mod leaf1_edx {
    /// x87.
    pub const FPU: u32 = 1 << 0;
    /// CR4.DE.
    pub const DE: u32 = 1 << 2;
    /// Large pages.
    pub const PSE: u32 = 1 << 3;
    /// RDTSC.
    pub const TSC: u32 = 1 << 4;
    /// RDMSR and WRMSR.
    pub const MSR: u32 = 1 << 5;
    /// Physical address extension.
    pub const PAE: u32 = 1 << 6;
    /// CMPXCHG8B.
    pub const CX8: u32 = 1 << 8;
    /// Local APIC.
    pub const APIC: u32 = 1 << 9;
    /// SYSENTER.
    pub const SEP: u32 = 1 << 11;
    /// Global pages.
    pub const PGE: u32 = 1 << 13;
    /// CMOVcc.
    pub const CMOV: u32 = 1 << 15;
    /// Page attribute table.
    pub const PAT: u32 = 1 << 16;
    /// 36-bit large pages.
    pub const PSE36: u32 = 1 << 17;
    /// CLFLUSH.
    pub const CLFLUSH: u32 = 1 << 19;
    /// MMX.
    pub const MMX: u32 = 1 << 23;
    /// FXSAVE.
    pub const FXSR: u32 = 1 << 24;
    /// SSE.
    pub const SSE: u32 = 1 << 25;
    /// SSE2.
    pub const SSE2: u32 = 1 << 26;
    /// Several logical processors in the package.
    pub const HTT: u32 = 1 << 28;
}

/// Leaf 7, EBX.
pub mod leaf7_ebx {
    /// Supervisor-mode execution prevention.
    pub const SMEP: u32 = 1 << 7;
    /// BMI2.
    pub const BMI2: u32 = 1 << 8;
    /// Fast REP MOVSB and STOSB.
    pub const ERMS: u32 = 1 << 9;
    /// INVPCID.
    pub const INVPCID: u32 = 1 << 10;
    /// Supervisor-mode access prevention, and with it STAC and CLAC.
    pub const SMAP: u32 = 1 << 20;
}

/// Leaf 7, ECX.
pub mod leaf7_ecx {
    /// User-mode instruction prevention.
    pub const UMIP: u32 = 1 << 2;
}

/// Leaf 7, EDX.
pub mod leaf7_edx {
    /// The register IA32_ARCH_CAPABILITIES.
    pub const ARCH_CAPABILITIES: u32 = 1 << 29;
}

/// Leaf 8000_0001, EDX.
pub mod extended_edx {
    /// SYSCALL.
    pub const SYSCALL: u32 = 1 << 11;
    /// No-execute pages.
    pub const NX: u32 = 1 << 20;
    /// 1 GiB pages.
    pub const GIB_PAGES: u32 = 1 << 26;
    /// RDTSCP.
    pub const RDTSCP: u32 = 1 << 27;
    /// Long mode.
    pub const LONG_MODE: u32 = 1 << 29;
}

/// Leaf 8000_0001, ECX: LAHF in 64-bit mode.
pub const LAHF: u32 = 1 << 0;
/// Leaf 8000_0007, EDX: the TSC never stops nor changes its rate.
pub const INVARIANT_TSC: u32 = 1 << 8;

/// KVM's feature bits in leaf 4000_0001, EAX.
pub mod kvm {
    /// No delay after port accesses.
    pub const NOP_IO_DELAY: u32 = 1 << 1;
    /// Clock MSRs at 4b56_4d00 and 4b56_4d01.
    pub const CLOCKSOURCE2: u32 = 1 << 3;
    /// The clock's TSC_STABLE flag may be trusted.
    pub const CLOCKSOURCE_STABLE: u32 = 1 << 24;
}
