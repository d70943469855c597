//! The TLBs and jump caches of the context: filling and flushing them.
//!
//! Invariant: an entry is in the fill bitmaps of its mode if, and only if, its
//! mapping is not global, so that a load of CR3 costs what was used since the last
//! one; every entry with a page in it is in the other one, as nothing may look at all
//! of them. A page with translated code in it has no write tag, in any mode.

use translator::block::Kind;
use translator::context::{Context, JumpCache, MODES, Mode, TLB_ENTRIES, Tlb};
use x86::control::cr4;

use super::bits::{Bits, ones};
use super::spaces::{JUMPS_KEPT_MAX, Page, Space};
use crate::blocks::Key;
use crate::cpu::Cpu;

/// Jump cache entries per bit of a fill bitmap: one cache line.
const CHUNK: usize = 8;
/// A page that no canonical address is in. With an addend of zero, an access
/// that matches raises the host's #GP, which becomes the guest's.
const NO_STACK: u64 = 1 << 63;

/// Which entries must go when.
pub(crate) struct Fills {
    /// TLB entries that are not global.
    tlb: [Bits; MODES],
    /// TLB entries that may hold anything.
    held: [Bits; MODES],
    /// Jump cache chunks that hold anything.
    used: [Bits; MODES],
    /// Chunks that may hold something not global.
    local: [Bits; MODES],
    /// Which entries of a chunk are not global.
    local_entries: [Box<[u8]>; MODES],
    /// Pages that may have entries in the jump cache, by a hash of their number:
    /// INVLPG is mostly of data pages, and then has nothing to look for.
    executed: [Box<[u64; EXECUTED_WORDS]>; MODES],
    /// Likewise: pages whose blocks were all entered since the user's entries went.
    entered: Box<[u64; EXECUTED_WORDS]>,
    /// Memory for [`Cpu::fill_jumps_beside`].
    beside: Vec<(u64, u64)>,
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
        let chunks = |mode: Mode| Bits::new(mode.jump_entries() / CHUNK);
        let entries = |mode: Mode| vec![0; mode.jump_entries() / CHUNK].into_boxed_slice();
        Self {
            tlb: Mode::ALL.map(|_| Bits::new(TLB_ENTRIES)),
            held: Mode::ALL.map(|_| Bits::new(TLB_ENTRIES)),
            used: Mode::ALL.map(chunks),
            local: Mode::ALL.map(chunks),
            local_entries: Mode::ALL.map(entries),
            executed: Mode::ALL.map(|_| Box::new([0; EXECUTED_WORDS])),
            entered: Box::new([0; EXECUTED_WORDS]),
            beside: Vec::new(),
        }
    }
}

const fn empty_tag(index: usize) -> u64 {
    ((index ^ (TLB_ENTRIES / 2)) as u64) << 12
}

pub(crate) const fn tlb_index(va: u64) -> usize {
    (va >> 12) as usize & (TLB_ENTRIES - 1)
}

fn clear_stack(tlb: &mut Tlb) {
    tlb.stack_tag = NO_STACK;
    tlb.stack_host = NO_STACK;
    tlb.stack_addend = 0;
}

fn clear_entry(tlb: &mut Tlb, index: usize) {
    tlb.read_tag[index] = empty_tag(index);
    tlb.write_tag[index] = empty_tag(index);
}

fn clear_chunks(cache: &mut JumpCache, chunks: &mut Bits, miss: u64) {
    chunks.drain(|chunk| cache.code[chunk * CHUNK..][..CHUNK].fill(miss));
}

/// Sets up a zeroed context: masks, empty tables.
pub(crate) fn initialize(context: &mut Context, miss: u64) {
    context.tlb_mask = (TLB_ENTRIES as u64 - 1) << 12;
    context.page_mask = !0xfff;
    context.jump_mask = Mode::User.jump_mask();
    context.user_access_jump_mask = Mode::KernelUserAccess.jump_mask();
    context.rflags = 2;
    crate::crossing::initialize(context);
    for mode in Mode::ALL {
        let tlb = &mut context.tlb[mode as usize];
        (0..TLB_ENTRIES).for_each(|index| clear_entry(tlb, index));
        clear_stack(tlb);
        context.jumps[mode as usize].code[..mode.jump_entries()].fill(miss);
    }
}

impl Cpu {
    /// Puts a page into a TLB.
    pub(crate) fn fill_tlb(&mut self, va: u64, pa: u64, writable: bool, global: bool, mode: Mode) {
        let (mode, index, page) = (mode as usize, tlb_index(va), va & !0xfff);
        self.set_entry(mode, page, self.ram.host(pa & !0xfff), writable);
        if writable {
            self.written.set(pa >> 12);
        }
        let fills = &mut self.fills.tlb[mode];
        if global && self.regs.cr4 & cr4::PGE != 0 {
            fills.unset(index);
        } else {
            fills.set(index);
        }
    }

    fn set_entry(&mut self, mode: usize, page: u64, host: u64, writable: bool) {
        let index = tlb_index(page);
        self.fills.held[mode].set(index);
        let tlb = &mut self.context.tlb[mode];
        if tlb.read_tag[index] != page {
            tlb.write_tag[index] = empty_tag(index);
        }
        tlb.read_tag[index] = page;
        tlb.host[index] = host;
        tlb.addend[index] = host.wrapping_sub(page);
        if writable {
            tlb.write_tag[index] = page;
        }
    }

    /// Puts an entry back that was taken out with its address space.
    pub(super) fn put_page(&mut self, mode: usize, page: u64, host: u64, writable: bool) {
        if self.breakpoints.watches_page(page) {
            return;
        }
        let index = tlb_index(page);
        let number = host.wrapping_sub(self.ram.host(0)) >> 12;
        let writable = writable && self.may_write(number);
        self.set_entry(mode, page, host, writable);
        if writable {
            self.written.set(number);
        }
        self.fills.tlb[mode].set(index);
    }

    /// As [`Cpu::put_page`], for the jump cache.
    pub(super) fn put_jump(&mut self, mode: usize, index: usize, code: u64) {
        self.context.jumps[mode].code[index] = code;
        let chunk = index / CHUNK;
        self.fills.used[mode].set(chunk);
        self.fills.local[mode].set(chunk);
        self.fills.local_entries[mode][chunk] |= 1 << (index % CHUNK);
    }

    /// Copies an entry that may be written into the stack's slot.
    pub(crate) fn fill_stack(&mut self, va: u64, mode: Mode) {
        let (index, page) = (tlb_index(va), va & !0xfff);
        let tlb = &mut self.context.tlb[mode as usize];
        if tlb.write_tag[index] == page {
            tlb.stack_tag = page;
            tlb.stack_host = tlb.host[index];
            tlb.stack_addend = tlb.addend[index];
        }
    }

    /// Enters a block's indirect entry into the jump cache of the present mode.
    pub(crate) fn fill_jump(&mut self, va: u64, code: u64, global: bool) {
        let mode = self.mode();
        let (mode, index) = (mode as usize, mode.jump_index(va));
        self.context.jumps[mode].code[index] = code;
        let chunk = index / CHUNK;
        self.fills.used[mode].set(chunk);
        let (word, bit) = executed_bit(va);
        self.fills.executed[mode][word] |= bit;
        let entries = &mut self.fills.local_entries[mode][chunk];
        if global && self.regs.cr4 & cr4::PGE != 0 {
            *entries &= !(1 << (index % CHUNK));
        } else {
            *entries |= 1 << (index % CHUNK);
            self.fills.local[mode].set(chunk);
        }
    }

    /// Enters the other blocks of a user's page, when a first one was in this address
    /// space since its entries went: a process that was forked runs what its parent
    /// ran, and the page's mapping is known now.
    pub(crate) fn fill_jumps_beside(&mut self, key: &Key, global: bool) {
        if key.mode != Mode::User || !self.breakpoints.stops().is_empty() {
            return;
        }
        let (word, bit) = executed_bit(key.va);
        let entered = &mut self.fills.entered[word];
        if *entered & bit != 0 {
            return;
        }
        *entered |= bit;
        let mut beside = std::mem::take(&mut self.fills.beside);
        self.blocks.each_in_page(key.page, |record| {
            let same = (record.va ^ key.va) & !0xfff == 0 && record.mode() == key.mode;
            if same && record.kind() == Kind::Grouped && !record.crosses() {
                beside.push((record.va, self.blocks.buf.address(record.indirect())));
            }
        });
        for (va, code) in beside.drain(..) {
            let slot = self.context.jumps[key.mode as usize].code[key.mode.jump_index(va)];
            if slot == self.jump_miss {
                self.fill_jump(va, code, global);
            }
        }
        self.fills.beside = beside;
    }

    /// Drops one jump cache entry if it leads to `code`.
    pub(crate) fn drop_jump(&mut self, va: u64, mode: Mode, code: u64) {
        let miss = self.jump_miss;
        let slot = &mut self.context.jumps[mode as usize].code[mode.jump_index(va)];
        if *slot == code {
            *slot = miss;
        }
    }

    /// Drops every jump cache entry.
    pub(crate) fn flush_jumps(&mut self) {
        self.fills.entered.fill(0);
        for mode in Mode::ALL.map(|mode| mode as usize) {
            clear_chunks(
                &mut self.context.jumps[mode],
                &mut self.fills.used[mode],
                self.jump_miss,
            );
            let entries = &mut self.fills.local_entries[mode];
            self.fills.local[mode].drain(|chunk| entries[chunk] = 0);
            self.fills.executed[mode].fill(0);
        }
        self.spaces.clear_jumps();
    }

    /// Everything, of all address spaces: CR0.WP, CR4 paging bits, EFER.NXE.
    pub(crate) fn flush_all(&mut self) {
        self.stats.flushes += 1;
        for mode in Mode::ALL.map(|mode| mode as usize) {
            let tlb = &mut self.context.tlb[mode];
            self.fills.held[mode].drain(|index| clear_entry(tlb, index));
            clear_stack(tlb);
            self.fills.tlb[mode].clear();
        }
        self.flush_jumps();
        self.spaces.clear();
    }

    /// Drops everything of the present address space that is not global.
    pub(crate) fn flush_local(&mut self) {
        self.stats.flushes += 1;
        self.remove_local(|_| {}, |_, _| {});
    }

    /// Moves everything of the present address space that is not global to `space`.
    pub(super) fn take_local(&mut self, space: &mut Space) {
        let base = self.blocks.buf.address(0);
        let Space { pages, jumps, .. } = space;
        self.remove_local(
            |page| pages.push(page),
            |mode, (index, code)| {
                if jumps[mode].len() < JUMPS_KEPT_MAX {
                    jumps[mode].push((index, code.wrapping_sub(base) as u32));
                }
            },
        );
    }

    fn remove_local(
        &mut self,
        mut page: impl FnMut(Page),
        mut jump: impl FnMut(usize, (u32, u64)),
    ) {
        let miss = self.jump_miss;
        self.fills.entered.fill(0);
        for mode in Mode::ALL.map(|mode| mode as usize) {
            let tlb = &mut self.context.tlb[mode];
            self.fills.tlb[mode].drain(|index| {
                let (at, empty) = (tlb.read_tag[index], empty_tag(index));
                if at != empty {
                    let writable = tlb.write_tag[index] == at;
                    page(Page::new(at, tlb.host[index], writable, mode));
                }
                clear_entry(tlb, index);
            });
            clear_stack(tlb);
            let code = &mut self.context.jumps[mode].code;
            let entries = &mut self.fills.local_entries[mode];
            self.fills.local[mode].drain(|chunk| {
                for entry in ones(u64::from(std::mem::take(&mut entries[chunk]))) {
                    let index = chunk * CHUNK + entry;
                    let there = std::mem::replace(&mut code[index], miss);
                    if there != miss {
                        jump(mode, (index as u32, there));
                    }
                }
            });
        }
    }

    /// INVLPG. Blocks may start up to 14 bytes before the page and run into it.
    pub(crate) fn flush_page(&mut self, va: u64) {
        let (index, page) = (tlb_index(va), va & !0xfff);
        for mode in Mode::ALL {
            let tlb = &mut self.context.tlb[mode as usize];
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
                if self.fills.executed[mode as usize][word] & bit == 0 {
                    continue;
                }
                let (first, last) = (mode.jump_index(at), mode.jump_index(at + (len - 1)));
                let mode = mode as usize;
                let chunks = first / CHUNK..=last / CHUNK;
                for chunk in chunks {
                    if self.fills.used[mode].contains(chunk) {
                        self.context.jumps[mode].code[chunk * CHUNK..][..CHUNK]
                            .fill(self.jump_miss);
                        self.fills.used[mode].unset(chunk);
                        self.fills.local[mode].unset(chunk);
                        self.fills.local_entries[mode][chunk] = 0;
                    }
                }
            }
        }
    }

    /// The page got its first translated code: no store may go past the engine.
    pub(crate) fn drop_write_tags(&mut self, page: u64) {
        self.dropped_tags(page);
        if !self.written.get(page) {
            return;
        }
        let host = self.ram.host(page << 12);
        for mode in Mode::ALL {
            let tlb = &mut self.context.tlb[mode as usize];
            self.fills.held[mode as usize].each(|index| {
                if tlb.host[index] == host {
                    tlb.write_tag[index] = empty_tag(index);
                }
            });
            if tlb.stack_host == host {
                clear_stack(tlb);
            }
        }
    }

    /// Records every page that may have been written, and forgets write tags, so
    /// that the next run's stores are seen anew.
    pub(crate) fn record_writes(&mut self) {
        for mode in Mode::ALL {
            let tlb = &mut self.context.tlb[mode as usize];
            self.fills.held[mode as usize].each(|index| tlb.write_tag[index] = empty_tag(index));
            clear_stack(tlb);
        }
        let mut written = std::mem::take(&mut self.written);
        written.drain(|page| {
            self.ram.mark(page);
            self.dropped_tags(page);
        });
        self.written = written;
    }
}

/// One bit per page of memory. Costs memory only where bits were set.
#[derive(Default)]
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
