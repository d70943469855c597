//! Where things are: at the same linear addresses natively and in the guest.

use x86::xsave::AVX_BYTES;

/// The oracle's page with the state that it loads and stores.
pub const STATE: u64 = 0x0e00_0000;
/// Data that programs work on.
pub const DATA: u64 = 0x1000_0000;
/// Its size: five pages to write, then [`READ_ONLY`].
pub const DATA_LEN: usize = 6 * 4096;
/// The page of [`DATA`] that may not be written. The next one is absent.
pub const READ_ONLY: u64 = DATA + 5 * 4096;
/// Constants that programs do not write: jump targets.
pub const SLOTS: u64 = 0x1100_0000;
/// Code; two addresses 256 KiB apart share a jump cache entry.
pub const CODE: u64 = 0x2000_0000;
/// Its size.
pub const CODE_LEN: usize = 0x20_0000;
/// GS base on both sides.
pub const GS_BASE: u64 = 0x40;

/// No fault.
pub const NO_VECTOR: u64 = u64::MAX;

/// What a program starts from and leaves behind.
#[repr(C, align(64))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Where it starts, or faulted.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Vector of the fault that ended it, or [`NO_VECTOR`].
    pub vector: u64,
    /// The address of a page fault.
    pub cr2: u64,
    /// The page fault was a write.
    pub wrote: u64,
    /// The oracle's own.
    pub host_rsp: u64,
    /// The oracle's own: an MXCSR to work with.
    pub host_mxcsr: u64,
    /// The oracle's own: 1 when the CPU has AVX.
    pub avx: u64,
    /// The XSAVE area, with XSTATE_BV 7 when the CPU has AVX.
    pub xsave: [u8; AVX_BYTES],
}
