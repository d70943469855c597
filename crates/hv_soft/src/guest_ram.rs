//! The guest's memory as the engine reads and writes it: by guest-physical
//! address, with a race-tolerant copy, never as a Rust slice.
//!
//! Invariant: [`Ram::contains`] was asked before every raw load, and [`Ram::allows`]
//! before every raw store; the mapping lives as long as `self`. Bytes that a device or the
//! guest changes meanwhile may be torn, as they are on hardware.
//!
//! Left to others: which stores hit translated code (`blocks`), dirty pages
//! (`mmu`).
#![allow(unsafe_code)] // raw loads and stores on guest memory

use std::sync::atomic::{AtomicU64, Ordering};

use ram::{Gpa, GuestRam, Kind};

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;

/// One machine's memory.
pub(crate) struct Ram {
    ram: GuestRam,
    base: u64,
    low_end: u64,
    high: (u64, u64),
    /// Whether there is anything behind these two, of which `ram` knows more.
    further: bool,
}

impl Ram {
    pub(crate) fn new(ram: GuestRam) -> Self {
        let mut memory = ram
            .regions()
            .filter(|region| region.kind == Kind::Memory)
            .map(|region| (region.start.0, region.end().0));
        let low_end = memory.next().map_or(0, |(_, end)| end);
        let high = memory.next().unwrap_or((0, 0));
        drop(memory);
        let further = ram.regions().any(|region| region.kind != Kind::Memory);
        let base = ram.host_base().as_ptr() as u64;
        Self {
            ram,
            base,
            low_end,
            high,
            further,
        }
    }

    pub(crate) fn guest_ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Page numbers up to here may occur.
    pub(crate) fn page_end(&self) -> usize {
        (self.ram.end().0 / PAGE) as usize
    }

    /// Whether there is memory at all of `len` bytes from `pa`; `len` at most 4 KiB.
    #[inline]
    pub(crate) fn contains(&self, pa: u64, len: u64) -> bool {
        self.allows(pa, len, false)
    }

    /// Whether there is memory at all of `len` bytes from `pa` that may be loaded, and
    /// stored into if `write`.
    #[inline]
    pub(crate) fn allows(&self, pa: u64, len: u64, write: bool) -> bool {
        let inside = |start: u64, end: u64| pa >= start && pa < end && len <= end - pa;
        inside(0, self.low_end)
            || inside(self.high.0, self.high.1)
            || (self.further && self.allows_further(pa, len, write))
    }

    #[cold]
    fn allows_further(&self, pa: u64, len: u64, write: bool) -> bool {
        self.ram.allows(Gpa(pa), len, write)
    }

    /// Host address of guest-physical `pa`, which must be memory.
    #[inline]
    pub(crate) fn host(&self, pa: u64) -> u64 {
        self.base.wrapping_add(pa)
    }

    /// The entry of a page table, or `None` where there is no memory for one: walks store
    /// into it.
    #[inline]
    pub(crate) fn entry(&self, pa: u64) -> Option<&AtomicU64> {
        if pa & 7 != 0 || !self.allows(pa, 8, true) {
            return None;
        }
        // SAFETY: eight aligned bytes of guest memory, checked above, mapped as
        // long as `self`; every access of the engine to them is atomic or a
        // copy that tolerates races.
        Some(unsafe { AtomicU64::from_ptr(self.host(pa) as *mut u64) })
    }

    /// Copies from memory; false, and nothing done, where there is none.
    pub(crate) fn read(&self, pa: u64, into: &mut [u8]) -> bool {
        if !self.contains(pa, into.len() as u64) {
            return false;
        }
        // SAFETY: the source is guest memory, checked above, and the target a
        // Rust slice outside of it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.host(pa) as *const u8,
                into.as_mut_ptr(),
                into.len(),
            );
        }
        true
    }

    /// Copies into memory; false, and nothing done, where there is none.
    pub(crate) fn write(&self, pa: u64, from: &[u8]) -> bool {
        if !self.allows(pa, from.len() as u64, true) {
            return false;
        }
        // SAFETY: as in `read`, the other way round.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.host(pa) as *mut u8, from.len());
        }
        true
    }

    /// Up to eight bytes as a number.
    #[inline]
    pub(crate) fn load(&self, pa: u64, size: usize) -> Option<u64> {
        if !self.contains(pa, size as u64) {
            return None;
        }
        let at = self.host(pa);
        // SAFETY: `size` bytes of guest memory, checked above; no alignment is
        // asked for.
        Some(unsafe {
            match size {
                1 => u64::from((at as *const u8).read()),
                2 => u64::from((at as *const u16).read_unaligned()),
                4 => u64::from((at as *const u32).read_unaligned()),
                _ => (at as *const u64).read_unaligned(),
            }
        })
    }

    /// Stores a number of 1, 2, 4 or 8 bytes.
    #[inline]
    pub(crate) fn store(&self, pa: u64, size: usize, value: u64) -> bool {
        if !self.allows(pa, size as u64, true) {
            return false;
        }
        let at = self.host(pa);
        // SAFETY: as in `load`.
        unsafe {
            match size {
                1 => (at as *mut u8).write(value as u8),
                2 => (at as *mut u16).write_unaligned(value as u16),
                4 => (at as *mut u32).write_unaligned(value as u32),
                _ => (at as *mut u64).write_unaligned(value),
            }
        }
        true
    }

    /// `rep movs` of `count` elements of `size` bytes upwards, exact also when
    /// the ranges overlap; false where either lacks memory. Both lie in one page.
    pub(crate) fn copy_up(&self, to: u64, from: u64, count: u64, size: u64) -> bool {
        let len = count.saturating_mul(size);
        if !self.allows(to, len, true) || !self.contains(from, len) {
            return false;
        }
        if to > from && to < from + len {
            for i in 0..count {
                let Some(value) = self.load(from + i * size, size as usize) else {
                    return false;
                };
                self.store(to + i * size, size as usize, value);
            }
            return true;
        }
        // SAFETY: both ranges are guest memory, checked above.
        unsafe {
            std::ptr::copy(
                self.host(from) as *const u8,
                self.host(to) as *mut u8,
                len as usize,
            );
        }
        true
    }

    /// `rep stos` upwards within a page.
    pub(crate) fn fill_up(&self, to: u64, count: u64, size: u64, value: u64) -> bool {
        let len = count.saturating_mul(size);
        if !self.allows(to, len, true) {
            return false;
        }
        if size == 1 || value == 0 {
            // SAFETY: guest memory, checked above.
            unsafe { std::ptr::write_bytes(self.host(to) as *mut u8, value as u8, len as usize) };
            return true;
        }
        for i in 0..count {
            self.store(to + i * size, size as usize, value);
        }
        true
    }

    /// Records that the page was written.
    pub(crate) fn mark(&self, page: u64) {
        self.ram.epochs().mark(Gpa(page * PAGE), PAGE);
    }
}

/// Sets bits in a page table entry; false when it changed meanwhile.
#[inline]
pub(crate) fn set_bits(entry: &AtomicU64, seen: u64, bits: u64) -> bool {
    seen & bits == bits
        || entry
            .compare_exchange(seen, seen | bits, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
}
