//! Address spaces that are not the present one: what the TLBs and jump caches held
//! of them, kept by process-context identifier (SDM vol. 3, §4.10).
//!
//! The tables of the context have no identifiers, as translated code compares tags
//! with one instruction. So a load of CR3 takes out the entries of the space that
//! is left, and puts back those of the space that is entered: some nanoseconds an
//! entry, where a miss costs an exit and a page walk.
//!
//! Invariant: global entries are never here. Code addresses are of the present
//! generation of the code cache; the block of one may have been dropped, which its
//! stale exit finds out. Whether a page may be written is asked again when its
//! entry comes back.

use translator::context::{MODES, Mode};
use x86::control::cr4;
use x86::paging;

use crate::cpu::Cpu;

/// Spaces that are kept; Linux uses six identifiers on a CPU.
const SPACES_MAX: usize = 8;
/// Jump cache entries of one space and mode that are kept: 128 KiB.
pub(super) const JUMPS_KEPT_MAX: usize = 16 << 10;

/// A TLB entry: linear page, writable in bit 0, mode in bits 1 and 2; host address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    tag: u64,
    pub(super) host: u64,
}

impl Page {
    pub(super) fn new(page: u64, host: u64, writable: bool, mode: usize) -> Self {
        Self {
            tag: page | u64::from(writable) | (mode as u64) << 1,
            host,
        }
    }

    fn mode(self) -> usize {
        (self.tag >> 1 & 3) as usize
    }

    fn page(self) -> u64 {
        self.tag & !0xfff
    }
}

/// A jump cache entry: index in its mode's cache, offset in the code cache.
pub(super) type Jump = (u32, u32);

/// What is kept of one address space.
#[derive(Default)]
pub(super) struct Space {
    pcid: u64,
    /// When it was left.
    left: u64,
    pub(super) pages: Vec<Page>,
    pub(super) jumps: [Vec<Jump>; MODES],
}

/// All that are kept.
#[derive(Default)]
pub(crate) struct Spaces {
    kept: Vec<Space>,
    /// Counts departures.
    clock: u64,
}

impl Spaces {
    /// Memory for the space that is left now.
    fn make(&mut self, pcid: u64) -> Space {
        self.clock += 1;
        let mut space = match self.kept.iter().position(|space| space.pcid == pcid) {
            Some(i) => self.kept.swap_remove(i),
            None if self.kept.len() < SPACES_MAX => Space::default(),
            None => {
                let by_age = self.kept.iter().enumerate().min_by_key(|(_, s)| s.left);
                let oldest = by_age.map_or(0, |(i, _)| i);
                self.kept.swap_remove(oldest)
            }
        };
        space.clear();
        space.pcid = pcid;
        space.left = self.clock;
        space
    }

    fn find(&mut self, pcid: u64) -> Option<&mut Space> {
        self.kept.iter_mut().find(|space| space.pcid == pcid)
    }

    /// Forgets one space.
    pub(crate) fn forget(&mut self, pcid: u64) {
        if let Some(space) = self.find(pcid) {
            space.clear();
        }
    }

    /// Forgets every space.
    pub(crate) fn clear(&mut self) {
        self.kept.iter_mut().for_each(Space::clear);
    }

    /// Forgets every jump: the code cache was emptied.
    pub(crate) fn clear_jumps(&mut self) {
        for space in &mut self.kept {
            space.jumps.iter_mut().for_each(Vec::clear);
        }
    }
}

impl Space {
    fn clear(&mut self) {
        self.pages.clear();
        self.jumps.iter_mut().for_each(Vec::clear);
    }
}

impl Cpu {
    /// The present process-context identifier.
    pub(crate) fn pcid(&self) -> u64 {
        if self.regs.cr4 & cr4::PCIDE != 0 {
            self.regs.cr3 & paging::CR3_PCID
        } else {
            0
        }
    }

    /// Loads CR3, whose reserved bits were checked.
    pub(crate) fn load_cr3(&mut self, value: u64) {
        let old = self.pcid();
        let keep = self.regs.cr4 & cr4::PCIDE != 0 && value & paging::CR3_NO_FLUSH != 0;
        self.regs.cr3 = value & !paging::CR3_NO_FLUSH;
        let new = self.pcid();
        if old == new {
            if !keep {
                self.flush_local();
            }
            return;
        }
        self.stats.space_switches += 1;
        let mut space = self.spaces.make(old);
        self.take_local(&mut space);
        self.spaces.kept.push(space);
        if !keep {
            self.stats.flushes += 1;
            self.spaces.forget(new);
        } else if let Some(i) = self.spaces.kept.iter().position(|space| space.pcid == new) {
            let mut space = self.spaces.kept.swap_remove(i);
            self.put_back(&space);
            space.clear();
            self.spaces.kept.push(space);
        }
    }

    fn put_back(&mut self, space: &Space) {
        for &page in &space.pages {
            let writable = page.tag & 1 != 0;
            self.put_page(page.mode(), page.page(), page.host, writable);
        }
        for mode in Mode::ALL {
            for &(index, offset) in &space.jumps[mode as usize] {
                let code = self.blocks.buf.address(offset as usize);
                self.put_jump(mode as usize, index as usize, code);
            }
        }
    }

    /// INVPCID of one address in a space.
    pub(crate) fn invalidate_address(&mut self, pcid: u64, va: u64) {
        if pcid == self.pcid() {
            return self.flush_page(va);
        }
        let Some(space) = self.spaces.find(pcid) else {
            return;
        };
        space.pages.retain(|page| page.page() != va & !0xfff);
        // Blocks may start up to 14 bytes before the page.
        let first = (va & !0xfff).wrapping_sub(15);
        for mode in Mode::ALL {
            let mask = mode.jump_entries() - 1;
            let (start, end) = (mode.jump_index(first), mode.jump_index(va | 0xfff));
            let entries = end.wrapping_sub(start) & mask;
            space.jumps[mode as usize]
                .retain(|&(index, _)| (index as usize).wrapping_sub(start) & mask > entries);
        }
    }

    /// INVPCID of one space.
    pub(crate) fn invalidate_space(&mut self, pcid: u64) {
        if pcid == self.pcid() {
            self.flush_local();
        } else {
            self.stats.flushes += 1;
            self.spaces.forget(pcid);
        }
    }

    /// INVPCID of all spaces, but not of global entries.
    pub(crate) fn invalidate_spaces(&mut self) {
        self.flush_local();
        self.spaces.clear();
    }
}
