//! Translations: where they are, which guest code they stand for, which exit
//! belongs to which.
//!
//! Invariants: records are in ascending order of host place, of first exit and of
//! first position, as they are only ever appended; a live record is in one hash
//! chain and in the list of its page, and if it runs into a second page, in that
//! page's list too; a page in `code` is watched for device writes and has no
//! write tag in any TLB.
//!
//! A record costs 48 bytes, an exit what the translator's [`Exit`] is, an
//! instruction four. All go at once when the cache is full.

use std::collections::HashMap;

use translator::block::{Block, Exit, FIRST_BLOCK_EXIT, Kind, POLL_BYTES, Thunks};
use translator::context::Mode;

use crate::codebuf::CodeBuf;
use crate::mmu::tlb::PageSet;

/// A power of two, some for each block of a boot: most programs add as many.
const HASH_HEADS: usize = 1 << HASH_BITS;
const HASH_BITS: u32 = 17;
/// Exits per entry of the owner table.
const OWNER_STEP: usize = 16;
/// Stores next to code that a page bears, at least, and for each block in it: a
/// block is translated in the time of some such stores.
const NEAR_MISSES: u32 = 8;
const NEAR_MISSES_PER_BLOCK: u32 = 2;
const LIVE: u8 = 1 << 7;
const CROSSES: u8 = 1 << 6;
/// Mode and kind.
const KEY: u8 = 0xf;

/// Index of a record.
pub(crate) type Id = u32;

/// One translation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    /// Guest linear address.
    pub(crate) va: u64,
    /// Guest-physical page.
    pub(crate) page: u32,
    /// The page it runs into, where `crosses()`.
    pub(crate) second: u32,
    /// Offset in the code cache.
    pub(crate) place: u32,
    pub(crate) first_exit: u32,
    first_position: u32,
    /// Offset from `place`.
    stale: u32,
    next_hash: Id,
    next_in_page: Id,
    pub(crate) guest_len: u16,
    indirect: u16,
    direct: u16,
    /// Mode (bits 0 and 1), kind (bits 2 and 3), [`CROSSES`], [`LIVE`].
    bits: u8,
}

impl Record {
    pub(crate) fn mode(&self) -> Mode {
        match self.bits & 3 {
            0 => Mode::Kernel,
            1 => Mode::User,
            _ => Mode::KernelUserAccess,
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        match self.bits >> 2 & 3 {
            0 => Kind::Grouped,
            1 => Kind::PerAccess,
            2 => Kind::Bounce,
            _ => Kind::Step,
        }
    }

    pub(crate) fn crosses(&self) -> bool {
        self.bits & CROSSES != 0
    }

    pub(crate) fn live(&self) -> bool {
        self.bits & LIVE != 0
    }

    /// Offset of the entry for jumps through the jump cache.
    pub(crate) fn indirect(&self) -> usize {
        self.place as usize + usize::from(self.indirect)
    }

    /// Offset of the entry that does not look for requests: for links to a later
    /// address, and for forms that are no loop's beginning.
    pub(crate) fn direct(&self) -> usize {
        self.place as usize + usize::from(self.direct)
    }

    /// Offset of the entry of an ordinary block for a link from the block at `from`.
    /// Every loop of links leads to an address that is not later, and there the poll
    /// page is read.
    pub(crate) fn linked_from(&self, from: u64) -> usize {
        if self.va > from {
            self.direct()
        } else {
            self.direct() - POLL_BYTES
        }
    }

    /// Whether its guest code overlaps `len` bytes at guest-physical `pa`.
    fn overlaps(&self, pa: u64, len: u64) -> bool {
        let first = 4096 - (self.va & 0xfff);
        let own = u64::from(self.guest_len);
        let pieces = [
            (u64::from(self.page) << 12 | self.va & 0xfff, own.min(first)),
            (u64::from(self.second) << 12, own.saturating_sub(first)),
        ];
        pieces
            .iter()
            .any(|(start, size)| pa < start + size && *start < pa + len)
    }
}

/// A bit for each 64-byte line of a page that `len` bytes from `at` on touch in it.
fn lines(at: u64, len: u64) -> u64 {
    let Some(behind) = len.checked_sub(1) else {
        return 0;
    };
    let first = (at & 0xfff) / 64;
    let last = ((at & 0xfff) + behind).min(0xfff) / 64;
    u64::MAX << first & u64::MAX >> (63 - last)
}

/// What names a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) va: u64,
    pub(crate) page: u32,
    pub(crate) mode: Mode,
    pub(crate) kind: Kind,
}

impl Key {
    fn bits(self) -> u8 {
        let kind = match self.kind {
            Kind::Grouped => 0,
            Kind::PerAccess => 1,
            Kind::Bounce => 2,
            Kind::Step => 3,
        };
        self.mode as u8 | kind << 2
    }

    fn hash(self) -> usize {
        let mixed = self.va ^ u64::from(self.page) << 32 ^ u64::from(self.bits()) << 60;
        (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - HASH_BITS)) as usize
    }
}

/// All translations of a machine, and the cache they are in.
pub(crate) struct Blocks {
    pub(crate) buf: CodeBuf,
    pub(crate) thunks: Thunks,
    /// Offset in the cache behind the thunks.
    first_place: usize,
    records: Vec<Record>,
    exits: Vec<Exit>,
    positions: Vec<(u16, u16)>,
    /// The record that holds exit `n * OWNER_STEP`.
    owners: Vec<Id>,
    /// Heads of hash chains; ids are stored plus one, 0 is none.
    heads: Vec<Id>,
    /// Heads of the lists of pages.
    page_heads: Vec<Id>,
    /// Records that run into a page.
    seconds: HashMap<u32, Vec<Id>>,
    /// Which 64-byte lines of a page a record, live or dead, was made from: most stores
    /// of a kernel that patches itself hit none, and need no walk of the page's list.
    lines: Vec<u64>,
    code: PageSet,
    /// Stores into code pages that hit no translation, by page: how many more
    /// until the page is dropped.
    near_misses: HashMap<u32, u32>,
    /// Stores into pages with other vCPUs' code, by page.
    stray_stores: HashMap<u32, u8>,
    /// Failures of group checks, by exit.
    group_failures: HashMap<u32, u8>,
    /// Counts flushes: ids and exit numbers of another generation mean nothing.
    pub(crate) generation: u32,
}

impl Blocks {
    /// `buf` holds the thunks already.
    pub(crate) fn new(buf: CodeBuf, thunks: Thunks, pages: usize) -> Self {
        Self {
            first_place: buf.used(),
            buf,
            thunks,
            records: Vec::new(),
            exits: Vec::new(),
            positions: Vec::new(),
            owners: Vec::new(),
            heads: vec![0; HASH_HEADS],
            page_heads: vec![0; pages],
            lines: vec![0; pages],
            seconds: HashMap::new(),
            code: PageSet::new(pages),
            near_misses: HashMap::new(),
            stray_stores: HashMap::new(),
            group_failures: HashMap::new(),
            generation: 0,
        }
    }

    /// Whether a page holds translated code.
    #[inline]
    pub(crate) fn holds_code(&self, page: u64) -> bool {
        self.code.get(page)
    }

    /// True when the page did not hold code before.
    pub(crate) fn mark_code(&mut self, page: u32) -> bool {
        let page = u64::from(page);
        let new = !self.code.get(page);
        self.code.set(page);
        new
    }

    pub(crate) fn next_exit(&self) -> u32 {
        FIRST_BLOCK_EXIT + self.exits.len() as u32
    }

    /// The exit of a number, and the record it belongs to.
    #[inline]
    pub(crate) fn exit(&self, number: u32) -> Option<(Exit, Id)> {
        let index = number.checked_sub(FIRST_BLOCK_EXIT)? as usize;
        let exit = *self.exits.get(index)?;
        let mut id = *self.owners.get(index / OWNER_STEP)?;
        while self
            .records
            .get(id as usize + 1)
            .is_some_and(|next| next.first_exit <= number)
        {
            id += 1;
        }
        Some((exit, id))
    }

    #[inline]
    pub(crate) fn record(&self, id: Id) -> Record {
        self.records[id as usize]
    }

    /// A record's host code, and where it runs.
    pub(crate) fn code(&self, id: Id) -> (u64, Vec<u8>) {
        let place = self.records[id as usize].place as usize;
        let next = self.records.get(id as usize + 1);
        let end = next.map_or(self.buf.used(), |next| next.place as usize);
        (self.buf.address(place), self.buf.bytes(place, end))
    }

    pub(crate) fn find(&self, key: Key) -> Option<Id> {
        let bits = key.bits();
        let mut next = self.heads[key.hash()];
        while let Some(id) = next.checked_sub(1) {
            let record = &self.records[id as usize];
            if record.va == key.va && record.page == key.page && record.bits & KEY == bits {
                return Some(id);
            }
            next = record.next_hash;
        }
        None
    }

    /// Host address of an offset from a record's place.
    #[inline]
    pub(crate) fn address(&self, record: &Record, offset: u32) -> u64 {
        self.buf.address(record.place as usize + offset as usize)
    }

    /// Puts a translation into the cache. `None` when there is no room.
    pub(crate) fn insert(&mut self, key: Key, second: Option<u32>, block: &Block) -> Option<Id> {
        let place = self.buf.append(&block.code)? as u32;
        let id = self.records.len() as Id;
        let first_exit = self.next_exit();
        let hash = key.hash();
        let page_head = &mut self.page_heads[key.page as usize];
        self.records.push(Record {
            va: key.va,
            page: key.page,
            second: second.unwrap_or(0),
            place,
            first_exit,
            first_position: self.positions.len() as u32,
            stale: block.stale,
            next_hash: self.heads[hash],
            next_in_page: *page_head,
            guest_len: block.guest_len,
            indirect: block.indirect_entry,
            direct: block.direct_entry,
            bits: key.bits() | LIVE | if second.is_some() { CROSSES } else { 0 },
        });
        self.heads[hash] = id + 1;
        *page_head = id + 1;
        let len = u64::from(block.guest_len);
        let first = (4096 - (key.va & 0xfff)).min(len);
        self.lines[key.page as usize] |= lines(key.va, first);
        if let Some(second) = second {
            if let Some(there) = self.lines.get_mut(second as usize) {
                *there |= lines(0, len - first);
            }
            self.seconds.entry(second).or_default().push(id);
        }
        self.exits.extend_from_slice(&block.exits);
        self.positions.extend_from_slice(&block.positions);
        while self.owners.len() * OWNER_STEP < self.exits.len() {
            // The first record whose exits reach this far.
            self.owners.push(id);
        }
        Some(id)
    }

    /// The record whose code holds a host address, and the guest address of the
    /// instruction there.
    pub(crate) fn instruction_at(&self, pc: u64) -> Option<(Id, u64)> {
        let offset = pc.checked_sub(self.buf.address(0))?;
        let offset = u32::try_from(offset).ok()?;
        let id = self
            .records
            .partition_point(|r| r.place <= offset)
            .checked_sub(1)?;
        let record = &self.records[id];
        let end = self
            .records
            .get(id + 1)
            .map_or(self.positions.len(), |r| r.first_position as usize);
        let positions = &self.positions[record.first_position as usize..end];
        let at = offset - record.place;
        let i = positions.partition_point(|(host, _)| u32::from(*host) <= at);
        let guest = i.checked_sub(1).map_or(0, |i| positions[i].1);
        Some((id as Id, record.va.wrapping_add(u64::from(guest))))
    }

    /// Makes a record unreachable: links into it lead to its stale exit. Gives
    /// what the jump cache may hold of it.
    pub(crate) fn kill(&mut self, id: Id) -> Option<Record> {
        let record = self.records[id as usize];
        if !record.live() {
            return None;
        }
        self.records[id as usize].bits &= !LIVE;
        self.unchain(id, record);
        self.buf.patch_jump(
            record.direct(),
            record.place as usize + record.stale as usize,
        );
        Some(record)
    }

    /// Lets links into a dead record lead to what was translated in its place, if
    /// there is something by now: the links themselves are not known. Whoever comes by
    /// one is in the same page, or asked for this very block.
    pub(crate) fn replace(&mut self, id: Id) {
        let record = self.records[id as usize];
        let key = Key {
            va: record.va,
            page: record.page,
            mode: record.mode(),
            kind: record.kind(),
        };
        if record.live() || !matches!(key.kind, Kind::Grouped | Kind::PerAccess) {
            return;
        }
        if let Some(new) = self.find(key).map(|id| self.records[id as usize])
            && !new.crosses()
            && !record.crosses()
        {
            self.buf.patch_jump(record.direct(), new.direct());
        }
    }

    fn unchain(&mut self, id: Id, record: Record) {
        let key = Key {
            va: record.va,
            page: record.page,
            mode: record.mode(),
            kind: record.kind(),
        };
        let hash = key.hash();
        if self.heads[hash] == id + 1 {
            self.heads[hash] = record.next_hash;
            return;
        }
        let mut at = self.heads[hash];
        while let Some(i) = at.checked_sub(1) {
            let next = self.records[i as usize].next_hash;
            if next == id + 1 {
                self.records[i as usize].next_hash = record.next_hash;
                return;
            }
            at = next;
        }
    }

    /// Live records whose guest code holds linear address `va`.
    pub(crate) fn covering(&self, va: u64) -> Vec<Id> {
        let covers = |record: &Record| {
            record.live() && va.wrapping_sub(record.va) < u64::from(record.guest_len)
        };
        let found = self.records.iter().enumerate().filter(|(_, r)| covers(r));
        found.map(|(id, _)| id as Id).collect()
    }

    /// Calls `f` for each live record that begins in a page.
    pub(crate) fn each_in_page(&self, page: u32, mut f: impl FnMut(&Record)) {
        let mut next = self.page_heads.get(page as usize).copied().unwrap_or(0);
        while let Some(id) = next.checked_sub(1) {
            let record = &self.records[id as usize];
            if record.live() {
                f(record);
            }
            next = record.next_in_page;
        }
    }

    /// Takes a page's records out of its lists; the page holds no code any more.
    pub(crate) fn take_page(&mut self, page: u32) -> Vec<Id> {
        let mut ids = self.seconds.remove(&page).unwrap_or_default();
        if let Some(head) = self.page_heads.get_mut(page as usize) {
            let mut next = std::mem::take(head);
            while let Some(id) = next.checked_sub(1) {
                ids.push(id);
                next = self.records[id as usize].next_in_page;
            }
        }
        if let Some(lines) = self.lines.get_mut(page as usize) {
            *lines = 0;
        }
        self.code.unset(u64::from(page));
        self.near_misses.remove(&page);
        ids
    }

    /// The live translations that a store overlaps. The dead leave the page's lists,
    /// which would only grow where code is patched again and again.
    pub(crate) fn hit(&mut self, pa: u64, len: u64) -> Vec<Id> {
        let page = (pa >> 12) as u32;
        let there = self.lines.get(page as usize).copied().unwrap_or(0);
        if there & lines(pa, len) == 0 {
            return Vec::new();
        }
        let Self {
            records,
            page_heads,
            seconds,
            ..
        } = self;
        let mut hits = Vec::new();
        if let Some(ids) = seconds.get_mut(&page) {
            ids.retain(|id| records[*id as usize].live());
            let overlaps = |id: &&Id| records[**id as usize].overlaps(pa, len);
            hits.extend(ids.iter().filter(overlaps));
        }
        let Some(head) = page_heads.get_mut(page as usize) else {
            return hits;
        };
        let mut next = std::mem::take(head);
        let mut last = None;
        while let Some(id) = next.checked_sub(1) {
            let record = records[id as usize];
            next = record.next_in_page;
            if !record.live() {
                continue;
            }
            match last.replace(id) {
                Some(last) => records[last as usize].next_in_page = id + 1,
                None => *head = id + 1,
            }
            if record.overlaps(pa, len) {
                hits.push(id);
            }
        }
        if let Some(last) = last {
            records[last as usize].next_in_page = 0;
        }
        hits
    }

    /// Counts a store next to code; true when there were so many that the page's
    /// translations should go, and stores be ordinary: each cost an exit, but
    /// translating anew what still runs costs more per block.
    pub(crate) fn near_miss(&mut self, page: u32) -> bool {
        let (records, page_heads) = (&self.records, &self.page_heads);
        let left = self.near_misses.entry(page).or_insert_with(|| {
            let mut live = 0;
            let mut next = page_heads.get(page as usize).copied().unwrap_or(0);
            while let Some(id) = next.checked_sub(1) {
                let record = &records[id as usize];
                live += u32::from(record.live());
                next = record.next_in_page;
            }
            NEAR_MISSES + NEAR_MISSES_PER_BLOCK * live
        });
        *left = left.saturating_sub(1);
        *left == 0
    }

    /// Counts a store into a page with other vCPUs' code in it; starts again at 0
    /// when the page is dropped, or `at_most` is reached.
    pub(crate) fn stray_store(&mut self, page: u32, at_most: u8) -> bool {
        let count = self.stray_stores.entry(page).or_insert(0);
        *count += 1;
        let enough = *count >= at_most;
        if enough {
            self.stray_stores.remove(&page);
        }
        enough
    }

    /// Counts a failed group check; gives how often it failed.
    pub(crate) fn group_failed(&mut self, exit: u32) -> u8 {
        let count = self.group_failures.entry(exit).or_insert(0);
        *count = count.saturating_add(1);
        *count
    }

    /// Drops everything; gives the pages that held code.
    pub(crate) fn clear(&mut self) -> Vec<u64> {
        self.generation = self.generation.wrapping_add(1);
        for record in &self.records {
            self.page_heads[record.page as usize] = 0;
        }
        self.records.clear();
        self.exits.clear();
        self.positions.clear();
        self.owners.clear();
        self.heads.fill(0);
        self.seconds.clear();
        self.near_misses.clear();
        self.stray_stores.clear();
        self.group_failures.clear();
        self.buf.rewind(self.first_place);
        let mut pages = Vec::new();
        self.code.drain(|page| {
            if let Some(lines) = self.lines.get_mut(page as usize) {
                *lines = 0;
            }
            pages.push(page);
        });
        pages
    }

    /// After [`Blocks::clear`]: returns the memory to the host.
    pub(crate) fn release(&mut self) {
        self.records = Vec::new();
        self.exits = Vec::new();
        self.positions = Vec::new();
        self.owners = Vec::new();
        self.buf.release();
    }
}

#[cfg(test)]
mod tests {
    use super::lines;

    #[test]
    fn a_range_touches_the_lines_of_its_first_and_last_byte_and_all_between() {
        for (at, len) in [(0, 1), (63, 1), (63, 2), (5, 200), (0xfff, 1), (0, 4096)] {
            let touched = (0..64).filter(|line| at < (line + 1) * 64 && line * 64 < at + len);
            let wanted = touched.fold(0, |bits, line| bits | 1 << line);
            assert_eq!(lines(0xffff_8000_0000 + at, len), wanted, "{at:#x} {len}");
        }
        assert_eq!(lines(0x1234, 0), 0);
        assert_eq!(
            lines(0xff0, 0x100),
            1 << 63,
            "what is in the next page is its own"
        );
    }
}
