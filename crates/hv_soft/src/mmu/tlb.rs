//! The TLBs and jump caches of the context: filling and flushing them.
//!
//! Invariant: an entry whose mapping is not global is in the fill bitmap of its
//! mode, so that a load of CR3 costs what was used since the last one. A page
//! with translated code in it has no write tag, in either mode.

use translator::context::{Context, JUMP_CACHE_ENTRIES, JumpCache, Mode, TLB_ENTRIES, Tlb};
use x86::control::cr4;

use crate::cpu::Cpu;

/// Jump cache entries per bit of a fill bitmap: one cache line.
const CHUNK: usize = 8;
const MODES: [usize; 2] = [Mode::Kernel as usize, Mode::User as usize];
/// A page that no canonical address is in. With an addend of zero, an access
/// that matches raises the host's #GP, which becomes the guest's.
const NO_STACK: u64 = 1 << 63;

/// Which entries must go when.
pub(crate) struct Fills {
    /// TLB entries that are not global.
    tlb: [[u64; TLB_ENTRIES / 64]; 2],
    /// Jump cache chunks that hold anything.
    used: [Box<[u64]>; 2],
    /// Chunks that hold something not global.
    local: [Box<[u64]>; 2],
    /// Pages that may have entries in the jump cache, by a hash of their number:
    /// INVLPG is mostly of data pages, and then has nothing to look for.
    executed: [Box<[u64; EXECUTED_WORDS]>; 2],
}

/// Words of one `Fills::executed`: 32,768 bits, some ten times the pages of a
/// kernel's code.
const EXECUTED_WORDS: usize = 512;

/// Word and bit of a page in `Fills::executed`.
const fn executed_bit(page: u64) -> (usize, u64) {
    // the upper bits of a product by 2^64 / the golden ratio (Fibonacci hashing)
    let hash = (page >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 49;
    (hash as usize / 64, 1 << (hash % 64))
}

impl Fills {
    pub(crate) fn new() -> Self {
        let chunks = || vec![0; JUMP_CACHE_ENTRIES / CHUNK / 64].into_boxed_slice();
        Self {
            tlb: [[0; TLB_ENTRIES / 64]; 2],
            used: [chunks(), chunks()],
            local: [chunks(), chunks()],
            executed: [Box::new([0; EXECUTED_WORDS]), Box::new([0; EXECUTED_WORDS])],
        }
    }
}

const fn empty_tag(index: usize) -> u64 {
    ((index ^ (TLB_ENTRIES / 2)) as u64) << 12
}

pub(crate) const fn tlb_index(va: u64) -> usize {
    (va >> 12) as usize & (TLB_ENTRIES - 1)
}

pub(crate) const fn jump_index(va: u64) -> usize {
    va as usize & (JUMP_CACHE_ENTRIES - 1)
}

fn clear_stack(tlb: &mut Tlb) {
    tlb.stack_tag = NO_STACK;
    tlb.stack_host = NO_STACK;
    tlb.stack_addend = 0;
}

fn clear_tlb(tlb: &mut Tlb) {
    for i in 0..TLB_ENTRIES {
        tlb.read_tag[i] = empty_tag(i);
        tlb.write_tag[i] = empty_tag(i);
        tlb.host[i] = 0;
        tlb.addend[i] = 0;
    }
    clear_stack(tlb);
}

fn clear_chunks(cache: &mut JumpCache, bits: &mut [u64], miss: u64) {
    for (w, word) in bits.iter_mut().enumerate() {
        let mut left = std::mem::take(word);
        while left != 0 {
            let chunk = w * 64 + left.trailing_zeros() as usize;
            left &= left - 1;
            cache.code[chunk * CHUNK..][..CHUNK].fill(miss);
        }
    }
}

/// Sets up a zeroed context: masks, empty tables.
pub(crate) fn initialize(context: &mut Context, miss: u64) {
    context.tlb_mask = (TLB_ENTRIES as u64 - 1) << 12;
    context.page_mask = !0xfff;
    context.jump_mask = JUMP_CACHE_ENTRIES as u64 - 1;
    context.rflags = 2;
    for mode in MODES {
        clear_tlb(&mut context.tlb[mode]);
        context.jumps[mode].code.fill(miss);
    }
}

impl Cpu {
    /// Puts a page into a TLB.
    pub(crate) fn fill_tlb(&mut self, va: u64, pa: u64, writable: bool, global: bool, user: bool) {
        let (mode, index, page) = (usize::from(user), tlb_index(va), va & !0xfff);
        let host = self.ram.host(pa & !0xfff);
        let tlb = &mut self.context.tlb[mode];
        if tlb.read_tag[index] != page {
            tlb.write_tag[index] = empty_tag(index);
        }
        tlb.read_tag[index] = page;
        tlb.host[index] = host;
        tlb.addend[index] = host.wrapping_sub(page);
        if writable {
            tlb.write_tag[index] = page;
            self.written.set(pa >> 12);
        }
        if !(global && self.regs.cr4 & cr4::PGE != 0) {
            self.fills.tlb[mode][index / 64] |= 1 << (index % 64);
        }
    }

    /// Copies an entry that may be written into the stack's slot.
    pub(crate) fn fill_stack(&mut self, va: u64, user: bool) {
        let (index, page) = (tlb_index(va), va & !0xfff);
        let tlb = &mut self.context.tlb[usize::from(user)];
        if tlb.write_tag[index] == page {
            tlb.stack_tag = page;
            tlb.stack_host = tlb.host[index];
            tlb.stack_addend = tlb.addend[index];
        }
    }

    /// Enters a block's indirect entry into the jump cache of the present mode.
    pub(crate) fn fill_jump(&mut self, va: u64, code: u64, global: bool) {
        let (mode, index) = (self.mode() as usize, jump_index(va));
        self.context.jumps[mode].code[index] = code;
        let chunk = index / CHUNK;
        self.fills.used[mode][chunk / 64] |= 1 << (chunk % 64);
        let (word, bit) = executed_bit(va);
        self.fills.executed[mode][word] |= bit;
        if !(global && self.regs.cr4 & cr4::PGE != 0) {
            self.fills.local[mode][chunk / 64] |= 1 << (chunk % 64);
        }
    }

    /// Drops one jump cache entry if it leads to `code`.
    pub(crate) fn drop_jump(&mut self, va: u64, mode: Mode, code: u64) {
        let miss = self.jump_miss;
        let slot = &mut self.context.jumps[mode as usize].code[jump_index(va)];
        if *slot == code {
            *slot = miss;
        }
    }

    /// Drops every jump cache entry.
    pub(crate) fn flush_jumps(&mut self) {
        for mode in MODES {
            clear_chunks(
                &mut self.context.jumps[mode],
                &mut self.fills.used[mode],
                self.jump_miss,
            );
            self.fills.local[mode].fill(0);
            self.fills.executed[mode].fill(0);
        }
    }

    /// Everything: CR0.WP, CR0.PG, CR4 paging bits, EFER.NXE.
    pub(crate) fn flush_all(&mut self) {
        self.stats.flushes += 1;
        for mode in MODES {
            clear_tlb(&mut self.context.tlb[mode]);
            self.fills.tlb[mode].fill(0);
        }
        self.flush_jumps();
    }

    /// A load of CR3: everything that is not global.
    pub(crate) fn flush_local(&mut self) {
        self.stats.flushes += 1;
        for mode in MODES {
            let tlb = &mut self.context.tlb[mode];
            for (w, word) in self.fills.tlb[mode].iter_mut().enumerate() {
                let mut left = std::mem::take(word);
                while left != 0 {
                    let index = w * 64 + left.trailing_zeros() as usize;
                    left &= left - 1;
                    tlb.read_tag[index] = empty_tag(index);
                    tlb.write_tag[index] = empty_tag(index);
                }
            }
            clear_stack(tlb);
            clear_chunks(
                &mut self.context.jumps[mode],
                &mut self.fills.local[mode],
                self.jump_miss,
            );
        }
    }

    /// INVLPG. Blocks may start up to 14 bytes before the page and run into it.
    pub(crate) fn flush_page(&mut self, va: u64) {
        let (index, page) = (tlb_index(va), va & !0xfff);
        for mode in MODES {
            let tlb = &mut self.context.tlb[mode];
            // Tags compare unequal where another page is in the slot.
            if tlb.read_tag[index] == page {
                tlb.read_tag[index] = empty_tag(index);
            }
            if tlb.write_tag[index] == page {
                tlb.write_tag[index] = empty_tag(index);
            }
            if tlb.stack_tag == page {
                clear_stack(tlb);
            }
            for (at, len) in [(page, 4096), (page.wrapping_sub(15), 15)] {
                let (word, bit) = executed_bit(at);
                if self.fills.executed[mode][word] & bit == 0 {
                    continue;
                }
                let start = jump_index(at);
                let chunks = start / CHUNK..=(start + len - 1) / CHUNK;
                for chunk in chunks {
                    let bit = 1 << (chunk % 64);
                    if self.fills.used[mode][chunk / 64] & bit != 0 {
                        self.context.jumps[mode].code[chunk * CHUNK..][..CHUNK]
                            .fill(self.jump_miss);
                        self.fills.used[mode][chunk / 64] &= !bit;
                        self.fills.local[mode][chunk / 64] &= !bit;
                    }
                }
            }
        }
    }

    /// The page got its first translated code: no store may go past the engine.
    pub(crate) fn drop_write_tags(&mut self, page: u64) {
        if !self.written.get(page) {
            return;
        }
        let host = self.ram.host(page << 12);
        for mode in MODES {
            let tlb = &mut self.context.tlb[mode];
            for index in 0..TLB_ENTRIES {
                if tlb.host[index] == host {
                    tlb.write_tag[index] = empty_tag(index);
                }
            }
            if tlb.stack_host == host {
                clear_stack(tlb);
            }
        }
    }

    /// Records every page that may have been written, and forgets write tags, so
    /// that the next run's stores are seen anew.
    pub(crate) fn record_writes(&mut self) {
        let ram = &self.ram;
        self.written.drain(|page| ram.mark(page));
        for mode in MODES {
            let tlb = &mut self.context.tlb[mode];
            for index in 0..TLB_ENTRIES {
                tlb.write_tag[index] = empty_tag(index);
            }
            clear_stack(tlb);
        }
    }
}

/// One bit per page of memory. Costs memory only where bits were set.
pub(crate) struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            words: vec![0; pages.div_ceil(64)],
        }
    }

    #[inline]
    pub(crate) fn set(&mut self, page: u64) {
        if let Some(word) = self.words.get_mut((page / 64) as usize) {
            *word |= 1 << (page % 64);
        }
    }

    #[inline]
    pub(crate) fn unset(&mut self, page: u64) {
        if let Some(word) = self.words.get_mut((page / 64) as usize) {
            *word &= !(1 << (page % 64));
        }
    }

    #[inline]
    pub(crate) fn get(&self, page: u64) -> bool {
        self.words
            .get((page / 64) as usize)
            .is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// Calls `f` for each page of the set, ascending, and empties it.
    pub(crate) fn drain(&mut self, mut f: impl FnMut(u64)) {
        for (w, word) in self.words.iter_mut().enumerate() {
            // Reading untouched memory maps the shared zero page only.
            if *word == 0 {
                continue;
            }
            let mut left = std::mem::take(word);
            while left != 0 {
                f(w as u64 * 64 + u64::from(left.trailing_zeros()));
                left &= left - 1;
            }
        }
    }
}
