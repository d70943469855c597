//! From guest code to blocks: what the translator sees of guest memory, and what
//! happens to blocks when memory changes.
//!
//! Invariant: before a block is used its pages were marked as code and watched, on
//! all vCPUs, and its bytes were (still) those of memory after that, so that no
//! store in between goes unseen.

use std::cell::{Cell, OnceCell};

use hv::Gpa;
use translator::block::{GuestCode, Refused, Request};
use translator::context::Mode;

use crate::blocks::{Id, Key};
use crate::cpu::Cpu;
use crate::enter::tsc;
use crate::exceptions::{Fault, GP};
use crate::guest_ram::Ram;
use crate::mmu::walk::{Access, Paging};

/// Room that any one translation fits in, in bytes.
const ROOM: usize = 128 << 10;
/// Pages that one translation looks at.
const PAGES: usize = 4;

type PageCopy = Box<[u8; 4096]>;
/// Linear page address, and the page.
type Copied = Option<(u64, Option<PageCopy>)>;

/// Guest memory as an instruction fetch sees it. Pages are copied: a device may
/// write them at any time, and Rust must not see that.
pub(crate) struct Fetch<'a> {
    paging: Paging,
    pub(crate) ram: &'a Ram,
    mode: Mode,
    stops: &'a [u64],
    /// First byte of the block.
    va: u64,
    page: u32,
    copies: [OnceCell<(u64, Option<PageCopy>)>; PAGES],
    pool: Cell<Vec<PageCopy>>,
}

impl Fetch<'_> {
    pub(crate) fn page_of(&self, va: u64) -> Option<u32> {
        if (va ^ self.va) & !0xfff == 0 {
            return Some(self.page);
        }
        let walked = self
            .paging
            .walk(self.ram, va, Access::Execute, self.mode)
            .ok()?;
        self.ram
            .contains(walked.pa, 1)
            .then_some((walked.pa >> 12) as u32)
    }

    /// Whether `va` is in a page of the block's own: the others are only looked at for
    /// flags.
    pub(crate) fn own(&self, va: u64) -> bool {
        va & !0xfff == self.va & !0xfff || va & !0xfff == (self.va | 0xfff).wrapping_add(1)
    }

    /// Before one of the block's own pages is read: see `PageEpochs::watch`.
    pub(crate) fn watch(&self, page: u32) {
        let page = Gpa(u64::from(page) << 12);
        self.ram.guest_ram().epochs().watch(page);
    }

    fn copy(&self, va: u64) -> Option<PageCopy> {
        let page = self.page_of(va)?;
        if self.own(va) {
            self.watch(page);
        }
        let mut pool = self.pool.take();
        let mut copy = pool.pop().unwrap_or_else(|| Box::new([0; 4096]));
        self.pool.set(pool);
        self.ram
            .read(u64::from(page) << 12, &mut copy[..])
            .then_some(copy)
    }
}

impl GuestCode for Fetch<'_> {
    fn stops(&self) -> &[u64] {
        self.stops
    }

    fn tail(&self, va: u64) -> Option<&[u8]> {
        for slot in &self.copies {
            let (known, copy) = slot.get_or_init(|| (va & !0xfff, self.copy(va)));
            if *known == va & !0xfff {
                return copy.as_ref().map(|copy| &copy[(va & 0xfff) as usize..]);
            }
        }
        None
    }
}

/// Why there is no block.
#[derive(Debug)]
pub(crate) enum NoBlock {
    /// The fetch faults.
    Fault(Fault),
    /// The instruction cannot take its operand from the bounce page.
    NotBounceable,
}

impl Cpu {
    /// The block of a key, translated if need be.
    pub(crate) fn block(&mut self, key: Key) -> Result<Id, NoBlock> {
        match self.blocks.find(key) {
            Some(id) => Ok(id),
            None => self.translate(key),
        }
    }

    /// Translates the code at `key.va`, which is in guest-physical page `key.page`.
    /// May flush the code cache first.
    pub(crate) fn translate(&mut self, key: Key) -> Result<Id, NoBlock> {
        if self.blocks.buf.free() < ROOM {
            self.flush_code();
        }
        let started = tsc();
        let result = loop {
            self.claim(key.page);
            match self.translate_once(key) {
                // Another vCPU changed the code meanwhile.
                Ok(None) => self.stats.retranslations += 1,
                Ok(Some(id)) => break Ok(id),
                Err(why) => break Err(why),
            }
        };
        self.stats.translation_ticks += tsc().wrapping_sub(started);
        if let Ok(id) = result {
            self.fail_on_purpose(id);
        }
        result
    }

    fn translate_once(&mut self, key: Key) -> Result<Option<Id>, NoBlock> {
        let Some(mut translating) = self.translating.take() else {
            return Err(NoBlock::Fault(Fault::Engine(
                "translation within a translation".into(),
            )));
        };
        let fetch = Fetch {
            paging: self.paging(),
            ram: &self.ram,
            mode: key.mode,
            stops: self.breakpoints.stops(),
            va: key.va,
            page: key.page,
            copies: Default::default(),
            pool: Cell::new(std::mem::take(&mut translating.pool)),
        };
        let request = Request {
            va: key.va,
            mode: key.mode,
            kind: key.kind,
            features: self.executable,
            place: self.blocks.buf.address(self.blocks.buf.used()),
            first_exit: self.blocks.next_exit(),
            thunks: self.blocks.thunks,
        };
        // What is cut for a breakpoint is nobody else's.
        let cut = fetch.stops.iter().any(|va| (va ^ key.va) & !0xfff == 0);
        let kept = self.kept.as_deref().filter(|_| !cut);
        let result = translating.obtain(kept, &request, &fetch);
        let Fetch { copies, pool, .. } = fetch;
        let copies = copies.map(OnceCell::into_inner);
        let id = match result {
            Ok(kept) => {
                self.stats.recalled += u64::from(kept);
                self.stats.translations += u64::from(!kept);
                if let Some(observer) = self.observer {
                    observer(&request, &translating.block);
                }
                if let Some(trace) = &mut self.watch.trace {
                    trace.block(&request, &translating.block, kept);
                }
                let seen = if kept {
                    Seen::Bytes(&translating.guest)
                } else {
                    Seen::Pages(&copies)
                };
                self.keep(key, &translating.block, seen)
                    .map_err(NoBlock::Fault)
            }
            Err(Refused::NotBounceable) => Err(NoBlock::NotBounceable),
            Err(Refused::Fetch(va)) => Err(NoBlock::Fault(self.fetch_fault(va))),
        };
        translating.pool = pool.into_inner();
        translating
            .pool
            .extend(copies.into_iter().filter_map(|slot| slot?.1));
        self.translating = Some(translating);
        id
    }

    fn fetch_fault(&mut self, va: u64) -> Fault {
        let mode = self.mode();
        // Code outside of memory: there is no bus to fetch from.
        self.walk(va, Access::Execute, mode)
            .map_or_else(|fault| fault, |_| GP)
    }

    /// `None` when the code is no longer what was translated.
    fn keep(
        &mut self,
        key: Key,
        block: &translator::Block,
        seen: Seen<'_>,
    ) -> Result<Option<Id>, Fault> {
        let second = if block.crosses_page {
            let mode = self.mode();
            let next = (key.va | 0xfff).wrapping_add(1);
            Some((self.walk(next, Access::Execute, mode)?.pa >> 12) as u32)
        } else {
            None
        };
        let len = u64::from(block.guest_len);
        let first = (4096 - (key.va & 0xfff)).min(len);
        let pieces = [
            (u64::from(key.page) << 12 | key.va & 0xfff, first),
            (u64::from(second.unwrap_or(0)) << 12, len - first),
        ];
        let pieces = &pieces[..1 + usize::from(second.is_some())];
        self.cover(pieces);
        if self.peers.count() > 1 && !self.as_seen(key.va, pieces, seen) {
            return Ok(None);
        }
        let Some(id) = self.blocks.insert(key, second, block) else {
            return Err(Fault::Engine(format!(
                "a block of {} bytes does not fit",
                block.code.len()
            )));
        };
        self.stats.translated_instructions += u64::from(block.instructions);
        self.stats.guest_bytes += u64::from(block.guest_len);
        self.stats.host_bytes += block.code.len() as u64;
        Ok(Some(id))
    }

    /// Whether memory still holds what was seen from `va` on.
    fn as_seen(&self, va: u64, pieces: &[(u64, u64)], seen: Seen<'_>) -> bool {
        let mut now = [0; 4096];
        pieces.iter().zip([va, (va | 0xfff).wrapping_add(1)]).all(
            |(&(pa, len), at): (&(u64, u64), u64)| {
                let now = &mut now[..len as usize];
                let seen = seen.piece(va, at, now.len());
                self.ram.read(pa, now) && seen == Some(&*now)
            },
        )
    }

    /// The guest stored into a page that holds code: what the store overlaps goes,
    /// its neighbours stay. JITs patch and append to pages that they run.
    pub(crate) fn stored_into_code(&mut self, pa: u64, len: u64) {
        let page = (pa >> 12) as u32;
        let hit = self.blocks.hit(pa, len);
        if hit.is_empty() && self.blocks.near_miss(page) {
            self.invalidate(page);
        }
        self.stats.patched += u64::from(!hit.is_empty());
        if let Some(trace) = &mut self.watch.trace
            && !hit.is_empty()
        {
            trace.store(pa, len, hit.len());
        }
        self.drop_blocks(hit);
    }

    pub(crate) fn drop_blocks(&mut self, ids: Vec<Id>) {
        for id in ids {
            if let Some(record) = self.blocks.kill(id) {
                let code = self.blocks.buf.address(record.indirect());
                self.drop_jump(record.va, record.mode(), code);
            }
        }
    }

    /// Drops all translations of a page; stores into it are ordinary again.
    pub(crate) fn invalidate(&mut self, page: u32) {
        self.stats.invalidations += 1;
        let ids = self.blocks.take_page(page);
        if let Some(trace) = &mut self.watch.trace {
            trace.drop_page(page, ids.len());
        }
        self.drop_blocks(ids);
        self.disclaim(u64::from(page));
    }

    /// Drops every translation. Only between blocks: the caller goes on by lookup.
    pub(crate) fn flush_code(&mut self) {
        // Addresses mean nothing any more behind this.
        self.take_samples();
        self.stats.code_flushes += 1;
        if let Some(trace) = &mut self.watch.trace {
            trace.flush();
        }
        for page in self.blocks.clear() {
            self.disclaim(page);
        }
        self.flush_jumps();
        self.decoded.clear();
    }
}

/// The guest's code of a block, as it was when the block was made or compared.
#[derive(Clone, Copy)]
enum Seen<'a> {
    /// In copies of its pages.
    Pages(&'a [Copied]),
    /// Itself.
    Bytes(&'a [u8]),
}

impl<'a> Seen<'a> {
    /// The `len` bytes at `at`, in one page, of the block at `va`.
    fn piece(self, va: u64, at: u64, len: usize) -> Option<&'a [u8]> {
        let (bytes, from) = match self {
            Self::Bytes(bytes) => (bytes, at.wrapping_sub(va) as usize),
            Self::Pages(copies) => {
                let copied = |copy: &&(u64, Option<PageCopy>)| copy.0 == at & !0xfff;
                let (_, copy) = copies.iter().flatten().find(copied)?;
                (&copy.as_ref()?[..], (at & 0xfff) as usize)
            }
        };
        bytes.get(from..)?.get(..len)
    }
}

/// What a translation needs and the next one reuses.
pub(crate) struct Translating {
    pub(crate) translator: translator::Translator,
    pub(crate) block: translator::Block,
    /// The guest's code of `block`, where it was kept.
    pub(crate) guest: Vec<u8>,
    pub(crate) pool: Vec<PageCopy>,
}
