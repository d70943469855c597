//! The XSAVE area in its standard form (SDM vol. 1, §13.4): the 512 bytes of FXSAVE,
//! a header of 64, and the upper halves of YMM registers.

/// XCR0 and XSTATE_BV: x87.
pub const X87: u64 = 1 << 0;
/// XMM registers and MXCSR.
pub const SSE: u64 = 1 << 1;
/// Upper halves of YMM registers.
pub const AVX: u64 = 1 << 2;

/// Offset of FCW, where x87's environment begins.
pub const FCW: usize = 0;
/// Offset of MXCSR; its mask is in the next four bytes.
pub const MXCSR: usize = 24;
/// x87 and MMX registers, 16 bytes each.
pub const X87_REGISTERS: core::ops::Range<usize> = 32..160;
/// XMM registers.
pub const XMM: core::ops::Range<usize> = 160..416;
/// Length of FXSAVE's image.
pub const LEGACY_BYTES: usize = 512;
/// Offset of XSTATE_BV; XCOMP_BV is in the next eight bytes.
pub const XSTATE_BV: usize = 512;
/// Length of the header.
pub const HEADER_BYTES: usize = 64;
/// Length of an area without AVX.
pub const SSE_BYTES: usize = LEGACY_BYTES + HEADER_BYTES;
/// Upper halves of YMM registers.
pub const YMM_HIGH: core::ops::Range<usize> = SSE_BYTES..SSE_BYTES + 256;
/// Length of an area with AVX.
pub const AVX_BYTES: usize = YMM_HIGH.end;

/// FCW after FNINIT (SDM vol. 1, §8.1.5).
pub const FCW_INIT: u16 = 0x037f;
/// MXCSR after reset (SDM vol. 1, §10.2.3).
pub const MXCSR_INIT: u32 = 0x1f80;

/// The area after reset, without AVX.
#[must_use]
pub fn after_reset() -> Vec<u8> {
    let mut area = vec![0; SSE_BYTES];
    area[FCW..FCW + 2].copy_from_slice(&FCW_INIT.to_le_bytes());
    area[MXCSR..MXCSR + 4].copy_from_slice(&MXCSR_INIT.to_le_bytes());
    area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&(X87 | SSE).to_le_bytes());
    area
}
