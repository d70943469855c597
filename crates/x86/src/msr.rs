//! Model-specific register numbers (SDM vol. 4) and those that KVM defines for
//! its guests (Linux, Documentation/virt/kvm/x86/msr.rst).

/// Time-stamp counter.
pub const TSC: u32 = 0x10;
/// Platform identification.
pub const PLATFORM_ID: u32 = 0x17;
/// Address and mode of the local APIC.
pub const APIC_BASE: u32 = 0x1b;
/// Feature control.
pub const FEATURE_CONTROL: u32 = 0x3a;
/// Offset of the time-stamp counter.
pub const TSC_ADJUST: u32 = 0x3b;
/// Loads a microcode update.
pub const MICROCODE_UPDATE: u32 = 0x79;
/// Microcode revision.
pub const MICROCODE_REVISION: u32 = 0x8b;
/// Platform information.
pub const PLATFORM_INFO: u32 = 0xce;
/// What the processor is not vulnerable to (SDM vol. 4, table 2-2).
pub const ARCH_CAPABILITIES: u32 = 0x10a;
/// MTRR capabilities.
pub const MTRR_CAP: u32 = 0xfe;
/// Performance monitoring features.
pub const PERF_CAPABILITIES: u32 = 0x345;
/// SYSENTER's CS.
pub const SYSENTER_CS: u32 = 0x174;
/// SYSENTER's RSP.
pub const SYSENTER_ESP: u32 = 0x175;
/// SYSENTER's RIP.
pub const SYSENTER_EIP: u32 = 0x176;
/// Miscellaneous enables.
pub const MISC_ENABLE: u32 = 0x1a0;
/// Branch records and steps by branches.
pub const DEBUGCTL: u32 = 0x1d9;
/// Page attribute table.
pub const PAT: u32 = 0x277;
/// Default memory type.
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
/// Deadline of the local APIC's timer, in ticks of the TSC.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// First register of the local APIC in x2APIC mode.
pub const X2APIC_FIRST: u32 = 0x800;
/// Last register of the local APIC in x2APIC mode.
pub const X2APIC_LAST: u32 = 0x8ff;
/// Extended features: long mode, SYSCALL, no-execute.
pub const EFER: u32 = 0xc000_0080;
/// Selectors of SYSCALL and SYSRET.
pub const STAR: u32 = 0xc000_0081;
/// SYSCALL's target in 64-bit mode.
pub const LSTAR: u32 = 0xc000_0082;
/// SYSCALL's target in compatibility mode.
pub const CSTAR: u32 = 0xc000_0083;
/// RFLAGS bits that SYSCALL clears.
pub const FMASK: u32 = 0xc000_0084;
/// FS base.
pub const FS_BASE: u32 = 0xc000_0100;
/// GS base.
pub const GS_BASE: u32 = 0xc000_0101;
/// What SWAPGS exchanges the GS base with.
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// What RDTSCP loads into ECX.
pub const TSC_AUX: u32 = 0xc000_0103;

/// AMD's hardware configuration (APM vol. 2, section 3.2.10).
pub const HWCR: u32 = 0xc001_0015;
/// AMD's northbridge configuration.
pub const NB_CFG: u32 = 0xc001_001f;

/// HWCR: the TSC counts at the rate of P-state 0.
pub const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;

/// Guest-physical address where KVM writes the wall clock of boot.
pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
/// Guest-physical address of the vCPU's clock, and bit 0 to enable it.
pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;

/// APIC_BASE: this is the bootstrap processor.
pub const APIC_BASE_BSP: u64 = 1 << 8;
/// APIC_BASE: x2APIC mode.
pub const APIC_BASE_X2APIC: u64 = 1 << 10;
/// APIC_BASE: enabled.
pub const APIC_BASE_ENABLE: u64 = 1 << 11;
