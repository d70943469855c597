//! Which pages of memory hold translated code on which vCPU, which may be written
//! by whose translated code, and who is about to store into code.
//!
//! ```text
//! page:   written by (a bit per vCPU) | code of (a bit per vCPU)      one word
//! parts:  64 bytes a bit, of the page's code on one vCPU              one word
//! ```
//!
//! Invariants. A vCPU has a write tag for a page only where its bit was set in the
//! page's word when no code bit was; a vCPU with a code bit has seen all write tags
//! go that there were before: both are one read-modify-write, so that one of two
//! comes second and knows. A page with a code bit is watched for device writes. The
//! parts of a vCPU cover its translations of the page.
//!
//! Left to others: asking other vCPUs to drop what they have (`peers`).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use hv::Gpa;
use ram::PageEpochs;

/// A bit per vCPU.
pub(crate) type Mask = u8;

const WRITERS: u32 = 8;
/// Bytes per bit of a page's parts.
const PART: u64 = 64;
const NOTHING: u64 = !0;

/// The registry of one machine.
pub(super) struct CodePages {
    cpus: usize,
    /// Code in bits 0 to 7, writers in bits 8 to 15.
    pages: Box<[AtomicU32]>,
    /// By page, then by vCPU. Empty where there is one vCPU only.
    parts: Box<[AtomicU64]>,
    /// The page of code that each vCPU is storing into.
    storing: Box<[AtomicU64]>,
    /// Held where a code bit and a watch change together.
    watching: Mutex<()>,
}

/// The bits of a page's parts that `len` bytes from `pa` touch; within the page.
fn parts_of(pa: u64, len: u64) -> u64 {
    let first = (pa & 0xfff) / PART;
    let last = ((pa & 0xfff) + len.max(1) - 1).min(0xfff) / PART;
    (!0 << first) & (!0 >> (63 - last))
}

impl CodePages {
    pub(super) fn new(cpus: usize, pages: usize) -> Self {
        let parts = if cpus > 1 { pages * cpus } else { 0 };
        Self {
            cpus,
            pages: ram::zeroed_u32(pages),
            parts: ram::zeroed_u64(parts),
            storing: (0..cpus).map(|_| AtomicU64::new(NOTHING)).collect(),
            watching: Mutex::new(()),
        }
    }

    /// vCPUs with code in the page.
    #[inline]
    pub(super) fn coders(&self, page: u64) -> Mask {
        self.pages
            .get(page as usize)
            .map_or(0, |word| word.load(Ordering::SeqCst) as Mask)
    }

    /// vCPU `cpu` is about to have a write tag of the page; false where it must not,
    /// as there is code in it.
    #[inline]
    pub(super) fn may_write(&self, page: u64, cpu: usize) -> bool {
        let Some(word) = self.pages.get(page as usize) else {
            return false;
        };
        let bit = 1 << (WRITERS + cpu as u32);
        let before = word.load(Ordering::Relaxed);
        if before & 0xff != 0 {
            return false;
        }
        if before & bit != 0 {
            // Whoever sets a code bit from now on finds ours, and has us drop tags.
            return true;
        }
        if word.fetch_or(bit, Ordering::SeqCst) & 0xff == 0 {
            return true;
        }
        word.fetch_and(!bit, Ordering::SeqCst);
        false
    }

    /// vCPU `cpu` has no write tag of the page any more.
    pub(super) fn dropped_tags(&self, page: u64, cpu: usize) {
        if let Some(word) = self.pages.get(page as usize) {
            let bit = 1 << (WRITERS + cpu as u32);
            if word.load(Ordering::Relaxed) & bit != 0 {
                word.fetch_and(!bit, Ordering::SeqCst);
            }
        }
    }

    /// vCPU `cpu` is going to read the page's code; gives who may have write tags.
    pub(super) fn enter(&self, page: u64, cpu: usize, epochs: &PageEpochs) -> Mask {
        let Some(word) = self.pages.get(page as usize) else {
            return 0;
        };
        let _guard = self.watching.lock().unwrap_or_else(PoisonError::into_inner);
        let before = word.fetch_or(1 << cpu, Ordering::SeqCst);
        epochs.watch(Gpa(page << 12));
        (before >> WRITERS) as Mask
    }

    /// vCPU `cpu` has no translation of the page any more.
    pub(super) fn leave(&self, page: u64, cpu: usize, epochs: &PageEpochs) {
        let Some(word) = self.pages.get(page as usize) else {
            return;
        };
        let _guard = self.watching.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(parts) = self.parts(page, cpu) {
            parts.store(0, Ordering::SeqCst);
        }
        let before = word.fetch_and(!(1 << cpu), Ordering::SeqCst);
        if before & 0xff & !(1 << cpu) == 0 {
            epochs.unwatch(Gpa(page << 12));
        }
    }

    fn parts(&self, page: u64, cpu: usize) -> Option<&AtomicU64> {
        self.parts.get(page as usize * self.cpus + cpu)
    }

    /// vCPU `cpu` has, or is about to have, a translation of these bytes.
    pub(super) fn cover(&self, cpu: usize, pa: u64, len: u64) {
        if let Some(parts) = self.parts(pa >> 12, cpu) {
            parts.fetch_or(parts_of(pa, len), Ordering::SeqCst);
        }
    }

    /// vCPUs other than `cpu` that may have translations of these bytes.
    pub(super) fn covered(&self, cpu: usize, pa: u64, len: u64) -> Mask {
        let mut mask = self.coders(pa >> 12) & !(1 << cpu);
        let wanted = parts_of(pa, len);
        for other in 0..self.cpus {
            if mask >> other & 1 != 0
                && self
                    .parts(pa >> 12, other)
                    .is_some_and(|parts| parts.load(Ordering::SeqCst) & wanted == 0)
            {
                mask &= !(1 << other);
            }
        }
        mask
    }

    /// vCPU `cpu` is going to store into the page, or has done so (`None`).
    pub(super) fn set_storing(&self, cpu: usize, page: Option<u64>) {
        if let Some(slot) = self.storing.get(cpu) {
            slot.store(page.unwrap_or(NOTHING), Ordering::SeqCst);
        }
    }

    /// Whether a vCPU other than `cpu` is storing into the page.
    pub(super) fn stored_into(&self, cpu: usize, page: u64) -> bool {
        self.storing
            .iter()
            .enumerate()
            .any(|(other, slot)| other != cpu && slot.load(Ordering::SeqCst) == page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_64_bytes_each() {
        assert_eq!(parts_of(0x1000, 1), 1);
        assert_eq!(parts_of(0x103f, 1), 1);
        assert_eq!(parts_of(0x103f, 2), 3);
        assert_eq!(parts_of(0x1000, 4096), !0);
        assert_eq!(parts_of(0x1ff8, 8), 1 << 63);
        assert_eq!(parts_of(0x1ff8, 64), 1 << 63);
    }

    #[test]
    fn of_a_writer_and_a_reader_of_code_the_second_knows_of_the_first() {
        let ram = hv::GuestRam::new(ram::ByteSize::mib(1)).unwrap();
        let pages = CodePages::new(2, 256);
        assert!(pages.may_write(3, 0));
        assert_eq!(pages.enter(3, 1, ram.epochs()), 1);
        assert!(!pages.may_write(3, 0));
        pages.dropped_tags(3, 0);
        assert_eq!(pages.enter(3, 0, ram.epochs()), 0);
        pages.leave(3, 0, ram.epochs());
        assert!(ram.epochs().is_watched(Gpa(0x3000)) && !pages.may_write(3, 0));
        pages.leave(3, 1, ram.epochs());
        assert!(!ram.epochs().is_watched(Gpa(0x3000)) && pages.may_write(3, 0));
        assert!(!pages.may_write(256, 0));
    }

    #[test]
    fn only_who_translated_the_bytes_is_asked() {
        let ram = hv::GuestRam::new(ram::ByteSize::mib(1)).unwrap();
        let pages = CodePages::new(3, 256);
        for cpu in [0, 2] {
            pages.enter(3, cpu, ram.epochs());
            pages.cover(cpu, 0x3100, 10);
        }
        assert_eq!(pages.covered(0, 0x3100, 1), 0b100);
        assert_eq!(pages.covered(1, 0x3108, 100), 0b101);
        assert_eq!(pages.covered(1, 0x3200, 8), 0);
        pages.leave(3, 2, ram.epochs());
        assert_eq!(pages.covered(0, 0x3100, 1), 0);
    }
}
