//! When each page of guest memory was last written, and which writes hit pages
//! that somebody watches.
//!
//! Time is a count of epochs. A writer stamps its page with the current epoch;
//! a reader starts a new epoch and keeps its number as a [`Cursor`]: pages
//! stamped with that number or a later one were written since. Any number of
//! readers keep cursors without knowing of each other.
//!
//! Invariant: a write whose record returned before a cursor was taken is seen by
//! readers of every earlier cursor, and its data are visible to them.
//!
//! Left to others: recording the writes of guest code. Every write through
//! `vm_memory` is recorded here, by way of [`RegionEpochs`].

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::Gpa;
use crate::access::Access;
use crate::layout::{Layout, PAGE_SIZE};
use crate::map::{zeroed_u32, zeroed_u64};

/// A moment in the history of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor(u32);

impl Cursor {
    /// Before the first write.
    pub const START: Self = Self(1);
}

/// Per-page epochs and watches of one machine's memory. Costs 4.25 bytes a page,
/// which the host only backs once a page of them is touched.
#[derive(Debug)]
pub struct PageEpochs {
    /// The current epoch; starts at 1, never wraps (it sticks at the end, where
    /// every later write is reported to everyone: wrong only by being too much).
    now: AtomicU32,
    /// Epoch of the last write by page; 0 is never.
    stamps: Box<[AtomicU32]>,
    /// One bit a page: a write is to be reported.
    watched: Box<[AtomicU64]>,
    /// One bit a page: is in `queue`.
    queued: Box<[AtomicU64]>,
    queue: Mutex<Vec<Gpa>>,
    pending: AtomicBool,
    low_pages: u64,
    /// Regions behind the low one: first page, and its index.
    others: Vec<(Range<u64>, u64)>,
}

impl PageEpochs {
    pub(crate) fn new(layout: &Layout) -> Self {
        let mut regions = layout.regions();
        let low_pages = regions.next().map_or(0, |low| low.len / PAGE_SIZE);
        let mut pages = low_pages;
        let mut others = Vec::new();
        for region in regions {
            let first = region.start.0 / PAGE_SIZE;
            others.push((first..region.end().0 / PAGE_SIZE, pages));
            pages += region.len / PAGE_SIZE;
        }
        let pages = usize::try_from(pages).unwrap_or(usize::MAX);
        let words = pages.div_ceil(64);
        Self {
            now: AtomicU32::new(Cursor::START.0),
            stamps: zeroed_u32(pages),
            watched: zeroed_u64(words),
            queued: zeroed_u64(words),
            queue: Mutex::default(),
            pending: AtomicBool::new(false),
            low_pages,
            others,
        }
    }

    /// Starts a new epoch: what is written from now on is newer than this.
    ///
    /// To read changes without losing any: take the next cursor, then scan
    /// [`PageEpochs::written_since`] the previous one.
    pub fn cursor(&self) -> Cursor {
        let before = self
            .now
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |e| e.checked_add(1));
        Cursor(before.map_or(u32::MAX, |e| e + 1))
    }

    /// First addresses of the pages written since `cursor` was taken, ascending.
    pub fn written_since(&self, cursor: Cursor) -> impl Iterator<Item = Gpa> {
        self.stamps
            .iter()
            .enumerate()
            .filter(move |(_, stamp)| stamp.load(Ordering::Acquire) >= cursor.0)
            .map(|(index, _)| self.page_at(index))
    }

    /// Whether the page that holds `at` was written since `cursor` was taken.
    /// Addresses without memory never are.
    pub fn was_written_since(&self, at: Gpa, cursor: Cursor) -> bool {
        self.index(at)
            .and_then(|index| self.stamps.get(index))
            .is_some_and(|stamp| stamp.load(Ordering::Acquire) >= cursor.0)
    }

    /// Records a write of `len` bytes at `at`, after the data were written.
    /// What lies outside of memory is ignored.
    pub fn mark(&self, at: Gpa, len: u64) {
        let Some(last) = len.checked_sub(1).map(|n| at.0.saturating_add(n)) else {
            return;
        };
        for page in at.0 / PAGE_SIZE..=last / PAGE_SIZE {
            let Some(index) = self.index(Gpa(page * PAGE_SIZE)) else {
                return;
            };
            self.mark_index(index);
        }
    }

    /// Has device writes into the page that holds `at` reported.
    ///
    /// Whoever reads the page after this call either reads what a device wrote
    /// or gets the write reported.
    pub fn watch(&self, at: Gpa) {
        if let Some((word, bit)) = self.bit(&self.watched, at) {
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Ends [`PageEpochs::watch`]. A report that is already pending stays.
    pub fn unwatch(&self, at: Gpa) {
        if let Some((word, bit)) = self.bit(&self.watched, at) {
            word.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    /// Whether the page that holds `at` is watched.
    pub fn is_watched(&self, at: Gpa) -> bool {
        self.bit(&self.watched, at)
            .is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Whether [`PageEpochs::take_watched_writes`] has something to give. One
    /// load, for hot paths.
    #[inline]
    pub fn watched_write_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    /// Takes the reports: first addresses of watched pages that were written, in
    /// order of their first write, each once.
    pub fn take_watched_writes(&self) -> Vec<Gpa> {
        let mut pages = Vec::new();
        self.deliver_watched_writes(|page| pages.push(page));
        pages
    }

    /// Takes the reports and calls `f` with each. Until `f` had the last of them,
    /// [`PageEpochs::watched_write_pending`] goes on to say so, and other callers
    /// wait: whoever finds nothing pending comes after all that `f` did.
    pub fn deliver_watched_writes(&self, mut f: impl FnMut(Gpa)) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        for page in queue.drain(..) {
            if let Some((word, bit)) = self.bit(&self.queued, page) {
                word.fetch_and(!bit, Ordering::SeqCst);
            }
            f(page);
        }
        self.pending.store(false, Ordering::SeqCst);
    }

    fn mark_index(&self, index: usize) {
        let Some(stamp) = self.stamps.get(index) else {
            return;
        };
        // The fence orders the caller's data before the loads of `now` and of the
        // watch. When `now` moved meanwhile, a reader may have scanned already:
        // stamp again, so that its next scan reports the page.
        loop {
            let now = self.now.load(Ordering::SeqCst);
            if stamp.load(Ordering::Relaxed) != now {
                stamp.store(now, Ordering::Release);
            }
            fence(Ordering::SeqCst);
            if self.now.load(Ordering::SeqCst) == now {
                break;
            }
        }
        let (word, bit) = (index / 64, 1 << (index % 64));
        if self
            .watched
            .get(word)
            .is_some_and(|word| word.load(Ordering::SeqCst) & bit != 0)
        {
            self.report(index, word, bit);
        }
    }

    #[cold]
    fn report(&self, index: usize, word: usize, bit: u64) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = self
            .queued
            .get(word)
            .is_some_and(|word| word.fetch_or(bit, Ordering::SeqCst) & bit == 0);
        if fresh {
            queue.push(self.page_at(index));
        }
        self.pending.store(true, Ordering::SeqCst);
    }

    fn bit<'a>(&self, words: &'a [AtomicU64], at: Gpa) -> Option<(&'a AtomicU64, u64)> {
        let index = self.index(at)?;
        Some((words.get(index / 64)?, 1 << (index % 64)))
    }

    /// Position of the page among all pages of memory.
    fn index(&self, at: Gpa) -> Option<usize> {
        let page = at.0 / PAGE_SIZE;
        let index = if page < self.low_pages {
            page
        } else {
            let holds = |(pages, _): &&(Range<u64>, u64)| pages.contains(&page);
            let (pages, index) = self.others.iter().find(holds)?;
            page - pages.start + index
        };
        usize::try_from(index)
            .ok()
            .filter(|&index| index < self.stamps.len())
    }

    fn page_at(&self, index: usize) -> Gpa {
        let index = index as u64;
        let behind = self.others.iter().rev().find(|(_, first)| index >= *first);
        let page = behind.map_or(index, |(pages, first)| index - first + pages.start);
        Gpa(page * PAGE_SIZE)
    }
}

/// What a region of [`crate::GuestMemory`] records its writes with. It also keeps
/// the mapping alive for as long as the region exists.
#[derive(Clone, Debug)]
pub struct RegionEpochs {
    pub(crate) epochs: Arc<PageEpochs>,
    pub(crate) start: Gpa,
    pub(crate) access: Arc<Access>,
    pub(crate) _keeps: Arc<crate::map::Span>,
}

/// Records writes of one slice of a region.
#[derive(Clone, Copy, Debug)]
pub struct EpochSlice<'a> {
    epochs: &'a PageEpochs,
    access: &'a Access,
    start: Gpa,
}

impl EpochSlice<'_> {
    // vm_memory checked its bounds; wrapping can only mark too much.
    fn at(&self, offset: usize) -> Gpa {
        Gpa(self.start.0.wrapping_add(offset as u64))
    }

    /// Guest-physical address of the slice.
    #[must_use]
    pub fn start(&self) -> Gpa {
        self.start
    }

    /// Whether the first `len` bytes of the slice may be reached by the guest now:
    /// a device asks before it does on the guest's behalf.
    #[must_use]
    pub fn allows(&self, len: usize, write: bool) -> bool {
        self.access.allows(self.start, len as u64, write)
    }
}

impl<'a> WithBitmapSlice<'a> for RegionEpochs {
    type S = EpochSlice<'a>;
}

impl Bitmap for RegionEpochs {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> EpochSlice<'_> {
        let whole = EpochSlice {
            epochs: &self.epochs,
            access: &self.access,
            start: self.start,
        };
        EpochSlice {
            start: whole.at(offset),
            ..whole
        }
    }
}

impl WithBitmapSlice<'_> for EpochSlice<'_> {
    type S = Self;
}

impl BitmapSlice for EpochSlice<'_> {}

impl Bitmap for EpochSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.epochs.mark(self.at(offset), len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.epochs
            .was_written_since(self.at(offset), Cursor::START)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            start: self.at(offset),
            ..*self
        }
    }
}
