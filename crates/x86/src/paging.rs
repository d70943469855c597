//! Page table entries of 4-level paging (SDM vol. 3, §4.5) and page-fault error
//! codes (§4.7).

/// The entry is valid.
pub const PRESENT: u64 = 1 << 0;
/// Writes are allowed.
pub const WRITABLE: u64 = 1 << 1;
/// CPL 3 may use it.
pub const USER: u64 = 1 << 2;
/// Was used.
pub const ACCESSED: u64 = 1 << 5;
/// Was written through.
pub const DIRTY: u64 = 1 << 6;
/// Maps a large page (levels 2 and 3).
pub const LARGE: u64 = 1 << 7;
/// Survives loads of CR3.
pub const GLOBAL: u64 = 1 << 8;
/// May not be executed.
pub const NO_EXECUTE: u64 = 1 << 63;
/// The next table's, or the page's, address.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Error code: the page was present.
pub const ERROR_PRESENT: u32 = 1 << 0;
/// Error code: a write.
pub const ERROR_WRITE: u32 = 1 << 1;
/// Error code: from CPL 3.
pub const ERROR_USER: u32 = 1 << 2;
/// Error code: a reserved bit was set.
pub const ERROR_RESERVED: u32 = 1 << 3;
/// Error code: an instruction fetch.
pub const ERROR_FETCH: u32 = 1 << 4;

/// CR3: the process-context identifier, where CR4.PCIDE is set.
pub const CR3_PCID: u64 = 0xfff;
/// CR3, written with CR4.PCIDE set: keep what is cached of the new identifier.
pub const CR3_NO_FLUSH: u64 = 1 << 63;

/// Whether a linear address is canonical with 48 bits.
#[must_use]
pub const fn is_canonical(va: u64) -> bool {
    ((va << 16) as i64 >> 16) as u64 == va
}
