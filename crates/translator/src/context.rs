//! The vCPU context: the memory that translated code addresses through the
//! host's GS, and so the ABI between translated code and the engine.
//!
//! Register convention inside translated code:
//!
//! | host | holds |
//! |---|---|
//! | all GPRs but r14, r15 | the guest's, RSP included |
//! | r14 ([`S1`]), r15 ([`S2`]) | scratch; the guest's live in [`Context::gpr`] |
//! | RFLAGS status bits and DF | the guest's; IF and the rest live in the context |
//! | XMM0–15, MXCSR, x87/MMX | the guest's |
//! | upper halves of YMM0–15 | the guest's; zero unless [`Context::upper_live`] |
//! | GS base | this structure; FS is the host's TLS and never touched |
//!
//! An instruction that may set bits in the upper half of a YMM register sets
//! [`Context::upper_live`] before, VZEROUPPER and VZEROALL clear it. Only while it is
//! set are these halves saved on leaving and loaded on entering: code without AVX
//! pays nothing for them, and runs on registers whose upper halves the CPU knows to
//! be unused. Where they are not loaded they are zeroed if the guest could see them:
//! libraries of the host may leave something there.
//!
//! The engine allocates a zeroed [`Context`], page-aligned, and keeps it put.

/// First scratch register: addresses, and the target of indirect jumps.
pub const S1: u8 = 14;
/// Second scratch register: table indexes, and the exit's number on leaving.
pub const S2: u8 = 15;

/// Entries of one TLB; a power of two.
pub const TLB_ENTRIES: usize = 16384;
/// Entries of one jump cache; a power of two.
pub const JUMP_CACHE_ENTRIES: usize = 1 << 17;
/// Entries that [`Mode::KernelUserAccess`] uses of its jump cache: what runs there
/// is a few loops that copy.
pub const USER_ACCESS_JUMP_ENTRIES: usize = 1 << 12;

/// What a block may access, and so which of the TLBs and jump caches it uses: the
/// index into [`Context::tlb`] and [`Context::jumps`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Mode {
    /// CPL 0 to 2, EFLAGS.AC clear.
    Kernel = 0,
    /// CPL 3.
    User = 1,
    /// CPL 0 to 2, EFLAGS.AC set: SMAP lets supervisor code access user pages.
    KernelUserAccess = 2,
}

impl Mode {
    /// Every mode, in the order of its index.
    pub const ALL: [Mode; MODES] = [Mode::Kernel, Mode::User, Mode::KernelUserAccess];

    /// Whether this is CPL 3.
    #[must_use]
    pub const fn is_user(self) -> bool {
        matches!(self, Mode::User)
    }

    /// Entries of the mode's jump cache that are used; a power of two.
    #[must_use]
    pub const fn jump_entries(self) -> usize {
        match self {
            Mode::Kernel | Mode::User => JUMP_CACHE_ENTRIES,
            Mode::KernelUserAccess => USER_ACCESS_JUMP_ENTRIES,
        }
    }

    /// Bits of an address that choose the mode's jump cache entry. Two blocks hardly ever
    /// begin at neighbouring bytes, so the lowest says nothing.
    #[must_use]
    pub const fn jump_mask(self) -> u64 {
        (self.jump_entries() as u64 - 1) << 1
    }

    /// The jump cache entry of an address.
    #[must_use]
    pub const fn jump_index(self, va: u64) -> usize {
        ((va & self.jump_mask()) >> 1) as usize
    }
}

/// What translated code did to the privilege level since the engine looked: it keeps
/// CS, SS and CPL, and sets them by the last of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Crossed {
    /// Nothing.
    No = 0,
    /// SYSCALL.
    Called = 1,
    /// SYSRET.
    Returned = 2,
}

/// Number of modes.
pub const MODES: usize = 3;

/// Translations of guest linear pages to host addresses. Entry `i` serves pages
/// whose number is `i` modulo [`TLB_ENTRIES`].
///
/// An empty tag is a page address that belongs to another index, and not to a
/// neighbour's: an operand that runs into the next page must not match it either.
#[repr(C)]
pub struct Tlb {
    /// Linear page address that may be read.
    pub read_tag: [u64; TLB_ENTRIES],
    /// Linear page address that may be written: dirty bit set, no code in it.
    pub write_tag: [u64; TLB_ENTRIES],
    /// Host address of the page.
    pub host: [u64; TLB_ENTRIES],
    /// Host address of the page less its linear address.
    pub addend: [u64; TLB_ENTRIES],
    /// The stack's page, checked once per block: as `write_tag`.
    pub stack_tag: u64,
    /// As `host`.
    pub stack_host: u64,
    /// As `addend`.
    pub stack_addend: u64,
    /// Keeps the size a multiple of 64 bytes.
    pub reserved: u64,
}

/// Where indirect and page-crossing jumps look for the host address of a
/// target's block: entry [`Mode::jump_index`]. An empty entry holds
/// the address of the `jump_miss` stub. A block's indirect entry checks that it
/// is the one that was meant.
#[repr(C)]
pub struct JumpCache {
    /// Host addresses of indirect entries.
    pub code: [u64; JUMP_CACHE_ENTRIES],
}

/// One page of its own.
#[repr(C, align(4096))]
pub struct Page(pub [u8; 4096]);

/// The context. Offsets below 128 fields never move at run time; translated code
/// has them as immediates.
#[repr(C, align(4096))]
pub struct Context {
    /// The guest's GPRs while outside translated code; inside, only r14 and r15.
    pub gpr: [u64; 16],
    /// The two scratch registers at the last exit, or for the next entry.
    pub scratch: [u64; 2],
    /// Guest RIP while outside translated code.
    pub rip: u64,
    /// Host RFLAGS with the guest's status bits and DF.
    pub rflags: u64,
    /// Host stack pointer while inside.
    pub host_rsp: u64,
    /// Host address at which to enter.
    pub resume: u64,
    /// Mask for `pext`: TLB index bits of an address.
    pub tlb_mask: u64,
    /// Mask for `pext`: all bits above the page offset.
    pub page_mask: u64,
    /// Mask for `pext`: jump cache index bits.
    pub jump_mask: u64,
    /// Temporaries of single instructions: the engine keeps them over an exit that it
    /// retries.
    pub temp: [u64; 4],
    /// Saved RCX around flag-free checks.
    pub saved_rcx: u64,
    /// Addends of the open access groups, by base register.
    pub group_addend: [u64; 14],
    /// `stack_refill`: where to go on failure; success is five bytes before.
    pub refill_fail: u64,
    /// `stack_refill`: the address meant.
    pub refill_va: u64,
    /// DF as 0 or 1, for in-line string instructions (mirrors the host flag).
    pub direction: u64,
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IF as 0 or 1.
    pub interrupts_enabled: u64,
    /// Not zero when the engine wants control at the next chance.
    pub pending: u64,
    /// RFLAGS bits that live in no host flag: TF, IOPL, NT, ID.
    pub rflags_high: u64,
    /// Host address that a [`crate::Kind::Bounce`] block uses as its operand.
    pub bounce_at: u64,
    /// Host address of the instruction that raised a host fault.
    pub fault_pc: u64,
    /// Host signal number of that fault.
    pub fault_signal: u64,
    /// Host trap number (x86 vector) of that fault.
    pub fault_trap: u64,
    /// RFLAGS.AC in its place: below CPL 3 it tells the two kernel modes apart.
    pub alignment_check: u64,
    /// `jump_mask` of [`Mode::KernelUserAccess`].
    pub user_access_jump_mask: u64,
    /// Where no interrupt may come: the address behind the last STI.
    pub shadow: u64,
    /// Not zero when an upper half of a YMM register may not be zero.
    pub upper_live: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// Not zero when the guest's CPU has AVX: what the host left in upper halves is
    /// then zeroed on entering.
    pub avx: u64,
    /// Guest instructions executed, where counting is on: kernel, user.
    pub instructions: [u64; 2],
    /// Host MXCSR while inside; the guest's while outside.
    pub mxcsr: [u32; 2],
    /// XMM registers while outside.
    pub xmm: [[u64; 2]; 16],
    /// Upper halves of YMM registers while outside.
    pub ymm_high: [[u64; 2]; 16],
    /// TLBs by [`Mode`].
    pub tlb: [Tlb; MODES],
    /// Jump caches by [`Mode`].
    pub jumps: [JumpCache; MODES],
    /// Guest TSC less host TSC, wrapping.
    pub tsc_offset: u64,
    /// Where accesses that the hot path cannot do are done: 64 spare bytes on
    /// each side of an operand of at most 64 bytes.
    pub bounce: Page,
    /// Read at every block head. The engine takes away its access rights to get
    /// control.
    pub poll: Page,
    /// Where SYSCALL leads: IA32_LSTAR.
    pub call_target: u64,
    /// Not zero where the engine must execute SYSCALL: with a small value.
    pub calls_barred: u64,
    /// Likewise SYSRET.
    pub returns_barred: u64,
    /// A [`Crossed`]: what translated code last did to the privilege level.
    pub crossed: u64,
    /// Mask for `pext`: bits of an address that is not in the lower half.
    pub upper_half_mask: u64,
    /// Mask for `pext`: flags in R11 that the engine must load.
    pub odd_flags_mask: u64,
    /// Mask for `pext`: RFLAGS.IF.
    pub interrupts_mask: u64,
    /// Mask for `pext`: RFLAGS.OF.
    pub overflow_mask: u64,
}

const _: () = assert!(core::mem::offset_of!(Context, xmm).is_multiple_of(16));
