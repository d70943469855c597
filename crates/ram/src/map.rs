//! The mapping of guest memory into this process.
//!
//! Invariant: one reserved span of addresses holds all regions at their
//! guest-physical offsets; the rest of it, and the page after it, is
//! inaccessible. It is unmapped when the last handle that can reach it goes.
#![allow(unsafe_code)] // mmap and munmap, vm_memory's regions made from raw mappings, zeroed atomics

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use crate::access::{Access, AccessListener, Blocks};
use crate::epochs::{PageEpochs, RegionEpochs};
use crate::layout::{ByteSize, Further, Kind, Layout, PAGE_SIZE, Region};
use crate::vanished::Watched;
use crate::{Error, Gpa};

/// Guest memory as rust-vmm crates want it: implements `vm_memory`'s
/// `GuestMemory` and `Bytes`, and records every write in [`PageEpochs`].
pub type GuestMemory = GuestMemoryMmap<RegionEpochs>;

/// The memory of one machine. Clones are handles of the same memory.
#[derive(Clone, Debug)]
pub struct GuestRam {
    inner: Arc<Inner>,
}

struct Inner {
    layout: Layout,
    memory: GuestMemory,
    epochs: Arc<PageEpochs>,
    /// By region.
    access: Vec<Arc<Access>>,
    listeners: Mutex<Vec<Weak<dyn AccessListener>>>,
    span: Arc<Span>,
    backing: Backing,
    pages: Pages,
}

/// The pages of the host that hold the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// What the host does by itself.
    #[default]
    Ordinary,
    /// Large ones where the host finds some (madvise(2), `MADV_HUGEPAGE`).
    Transparent,
    /// Of 2 MiB, reserved by the host's owner (hugetlbfs).
    Huge,
}

/// Bytes of a large page.
const HUGE_PAGE: u64 = 2 << 20;

/// Where memory comes from that is not a file of the host.
enum Backing {
    /// Zeros; what is stored is in it.
    Memfd(OwnedFd),
    /// A file whose pages are copied once they are stored to.
    Image(File),
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("layout", &self.layout)
            .field("span", &self.span)
            .finish_non_exhaustive()
    }
}

/// The reserved addresses. Handles inside of [`RegionEpochs`] keep it mapped.
#[derive(Debug)]
pub(crate) struct Span {
    base: NonNull<u8>,
    len: usize,
    /// The host's files in it.
    files: Vec<Watched>,
}

// SAFETY: `Span` only carries the address of a mapping and unmaps it once, in
// `drop`; it never reads or writes through it.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    /// `len` bytes of addresses, whole pages, from one where a large page may be.
    fn reserve(len: usize) -> rustix::io::Result<Self> {
        let room = len.checked_add(HUGE_PAGE as usize);
        let room = room.ok_or(rustix::io::Errno::NOMEM)?;
        // SAFETY: a null hint without MAP_FIXED never replaces a mapping.
        let all = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                room,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let before = (all as usize).next_multiple_of(HUGE_PAGE as usize) - all as usize;
        // SAFETY: `before` is at most a large page, so that `len` bytes behind it, and what is
        // left behind those, lie in the mapping, which is ours and which nobody knows yet.
        let base = unsafe {
            let base = all.byte_add(before);
            let after = room - before - len;
            for (unused, bytes) in [(all, before), (base.byte_add(len), after)] {
                if bytes > 0 {
                    rustix::mm::munmap(unused, bytes)?;
                }
            }
            base
        };
        let base = NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self {
            base,
            len,
            files: Vec::new(),
        })
    }

    /// The host address of `region`, which must lie in the span.
    fn place(&self, region: &Region) -> rustix::io::Result<(NonNull<u8>, usize)> {
        let (Ok(offset), Ok(len)) = (usize::try_from(region.start.0), usize::try_from(region.len))
        else {
            return Err(rustix::io::Errno::NOMEM);
        };
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(rustix::io::Errno::NOMEM);
        }
        // SAFETY: offset + len lies inside the span, checked above.
        Ok((unsafe { self.base.add(offset) }, len))
    }

    /// Maps `region` of `memfd` at its place.
    fn map(
        &self,
        region: &Region,
        memfd: BorrowedFd<'_>,
        pages: Pages,
    ) -> rustix::io::Result<NonNull<u8>> {
        let (at, len) = self.place(region)?;
        let mut flags = MapFlags::SHARED | MapFlags::FIXED;
        if pages != Pages::Huge {
            // Of huge pages, what is not reserved may not be there when it is touched.
            flags |= MapFlags::NORESERVE;
        }
        // SAFETY: the range lies inside the span, which is ours, so that MAP_FIXED
        // replaces nothing but its reservation.
        unsafe {
            rustix::mm::mmap(
                at.as_ptr().cast::<c_void>(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
                memfd,
                region.file_offset,
            )?;
            if pages == Pages::Transparent {
                // A kernel without them has said so by its answer, and is asked for no more.
                let _ = rustix::mm::madvise(at.as_ptr().cast(), len, Advice::LinuxHugepage);
            }
            // A core dump of the monitor must not carry the guest's secrets.
            rustix::mm::madvise(at.as_ptr().cast::<c_void>(), len, Advice::LinuxDontDump)?;
        }
        Ok(at)
    }

    /// Maps `region` of `image` at its place, so that stores change nothing but this
    /// mapping.
    fn map_image(&mut self, region: &Region, image: &File) -> std::io::Result<NonNull<u8>> {
        let (at, len) = self.place(region)?;
        // SAFETY: as in `map`.
        unsafe {
            rustix::mm::mmap(
                at.as_ptr().cast::<c_void>(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                image,
                region.file_offset,
            )?;
            rustix::mm::madvise(at.as_ptr().cast::<c_void>(), len, Advice::LinuxDontDump)?;
        }
        let (start, file) = (at.as_ptr() as u64, image.try_clone()?.into());
        self.files
            .push(Watched::new(start, region.len, file, region.file_offset)?);
        Ok(at)
    }

    /// Puts zeros in place of `len` bytes of `region` from `offset`: whole pages.
    fn zero(&self, region: &Region, offset: u64, len: u64) -> rustix::io::Result<()> {
        let (at, room) = self.place(region)?;
        let (Ok(offset), Ok(len)) = (usize::try_from(offset), usize::try_from(len)) else {
            return Err(rustix::io::Errno::INVAL);
        };
        if offset.checked_add(len).is_none_or(|end| end > room) {
            return Err(rustix::io::Errno::INVAL);
        }
        // SAFETY: the range lies inside the region, checked above, which is guest memory:
        // Rust makes no references to it.
        unsafe {
            let start = at.add(offset).as_ptr().cast::<c_void>();
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
            let both = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap_anonymous(start, len, both, flags)?;
            rustix::mm::madvise(start, len, Advice::LinuxDontDump)
        }
    }

    /// Maps `file`, of `file_len` bytes, at the place of `region`, zeros behind it.
    fn map_file(
        &mut self,
        region: &Region,
        file: File,
        file_len: u64,
        protection: ProtFlags,
    ) -> std::io::Result<NonNull<u8>> {
        let (at, len) = self.place(region)?;
        let of_file = file_len.next_multiple_of(PAGE_SIZE).min(region.len);
        // SAFETY: as in `map`.
        unsafe {
            let start = at.as_ptr().cast::<c_void>();
            let fixed = MapFlags::FIXED | MapFlags::NORESERVE;
            rustix::mm::mmap_anonymous(start, len, protection, MapFlags::PRIVATE | fixed)?;
            let shared = MapFlags::SHARED | fixed;
            rustix::mm::mmap(start, of_file as usize, protection, shared, &file, 0)?;
            rustix::mm::madvise(start, len, Advice::LinuxDontDump)?;
        }
        self.files
            .push(Watched::new(at.as_ptr() as u64, of_file, file.into(), 0)?);
        Ok(at)
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        // First: whatever is mapped here next is not theirs.
        self.files.clear();
        // SAFETY: the mapping is ours, and whoever could reach it held a handle
        // of this span.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast::<c_void>(), self.len) };
        debug_assert!(result.is_ok(), "unmapping a span that we mapped");
    }
}

impl GuestRam {
    /// Makes zeroed memory of `size`, a multiple of [`PAGE_SIZE`]. The host backs
    /// its pages as they are touched.
    ///
    /// # Errors
    /// [`Error::Size`], or [`Error::Host`] when the host cannot reserve it.
    pub fn new(size: ByteSize) -> Result<Self, Error> {
        Self::with(size, Vec::new())
    }

    /// As [`GuestRam::new`], with `further` regions behind it: the last ones of
    /// [`GuestRam::regions`], in this order.
    ///
    /// # Errors
    /// Besides, [`Error::Blocks`].
    pub fn with(size: ByteSize, further: Vec<Further>) -> Result<Self, Error> {
        Self::of_pages(Pages::Ordinary, size, further)
    }

    /// As [`GuestRam::with`], in `pages` of the host. Large ones are reserved now, and
    /// what is given back of one is zero but stays reserved.
    ///
    /// # Errors
    /// Besides, [`Error::HugePages`].
    pub fn of_pages(pages: Pages, size: ByteSize, further: Vec<Further>) -> Result<Self, Error> {
        Self::make(size, further, None, pages)
    }

    /// As [`GuestRam::with`], with the content that [`GuestRam::write_image`] wrote to
    /// `image`, which is read as it is touched and never written: it may have many
    /// readers, and must stay as it is.
    ///
    /// # Errors
    /// Besides, [`Error::Image`] when it is not as long as the memory.
    pub fn from_image(size: ByteSize, further: Vec<Further>, image: File) -> Result<Self, Error> {
        Self::make(size, further, Some(image), Pages::Ordinary)
    }

    fn make(
        size: ByteSize,
        further: Vec<Further>,
        image: Option<File>,
        pages: Pages,
    ) -> Result<Self, Error> {
        let mut layout = Layout::new(size)?;
        let mut files = Vec::new();
        for further in further {
            match further {
                Further::File { file, read_only } => {
                    let meta = file.metadata().map_err(host("examine a file", 0))?;
                    layout.add_file(meta.len(), read_only)?;
                    files.push((file, meta.len()));
                }
                Further::Pluggable { len, block } => {
                    layout.add_pluggable(len, block)?;
                }
            }
        }
        Self::map(layout, files, image, pages)
    }

    /// `files` are those of the layout, with their lengths.
    fn map(
        layout: Layout,
        files: Vec<(File, u64)>,
        image: Option<File>,
        pages: Pages,
    ) -> Result<Self, Error> {
        let bytes = layout.memfd_bytes;
        let backing = match image {
            None => {
                let made = make_memfd(bytes, pages);
                Backing::Memfd(made.map_err(pages.failed("make a memfd", bytes))?)
            }
            Some(image) => {
                let meta = image.metadata().map_err(host("examine an image", bytes))?;
                if !meta.is_file() || meta.len() != bytes {
                    return Err(Error::Image {
                        has: meta.len(),
                        wants: bytes,
                    });
                }
                Backing::Image(image)
            }
        };
        let guarded = layout.end().0 + PAGE_SIZE;
        let mut span = usize::try_from(guarded)
            .map_err(|_| rustix::io::Errno::NOMEM)
            .and_then(Span::reserve)
            .map_err(host("reserve addresses", guarded))?;
        let epochs = Arc::new(PageEpochs::new(&layout));

        let mut files = files.into_iter();
        let mut mapped = Vec::new();
        for region in layout.regions() {
            let (read, both) = (ProtFlags::READ, ProtFlags::READ | ProtFlags::WRITE);
            let (access, protection) = match region.kind {
                Kind::Memory => (Access::All, both),
                Kind::Pluggable { block } => {
                    let blocks = Blocks::new(region.start, region.len, block);
                    (Access::Blocks(blocks), both)
                }
                Kind::File { read_only: false } => (Access::All, both),
                Kind::File { read_only: true } => (Access::ReadOnly, read),
            };
            let at = match region.kind {
                Kind::Memory | Kind::Pluggable { .. } => match &backing {
                    Backing::Memfd(memfd) => span
                        .map(&region, memfd.as_fd(), pages)
                        .map_err(pages.failed("map the memfd", bytes))?,
                    Backing::Image(image) => span
                        .map_image(&region, image)
                        .map_err(host("map an image", region.len))?,
                },
                Kind::File { .. } => {
                    let (file, len) = files.next().ok_or(rustix::io::Errno::INVAL).map_err(
                        // `with` made one per region.
                        host("map a file", region.len),
                    )?;
                    span.map_file(&region, file, len, protection)
                        .map_err(host("map a file", region.len))?
                }
            };
            mapped.push((region, at, Arc::new(access), protection));
        }

        let span = Arc::new(span);
        let mut regions = Vec::with_capacity(mapped.len());
        let mut access = Vec::with_capacity(mapped.len());
        for (region, at, of_region, protection) in mapped {
            access.push(Arc::clone(&of_region));
            let bitmap = RegionEpochs {
                epochs: Arc::clone(&epochs),
                start: region.start,
                access: of_region,
                _keeps: Arc::clone(&span),
            };
            let invalid = host("describe a region", region.len);
            // `place` checked that the length fits.
            let builder = MmapRegionBuilder::new_with_bitmap(region.len as usize, bitmap);
            // SAFETY: `at` and the length are a mapping that `bitmap`, owned by the
            // region, keeps alive.
            let described = unsafe { builder.with_raw_mmap_pointer(at.as_ptr()) }
                .with_mmap_prot(protection.bits() as i32)
                .with_mmap_flags(MapFlags::SHARED.bits() as i32)
                .build()
                .ok()
                .and_then(|mapped| GuestRegionMmap::new(mapped, region.start))
                .ok_or(rustix::io::Errno::INVAL)
                .map_err(invalid)?;
            regions.push(described);
        }
        let memory = GuestMemory::from_regions(regions)
            .map_err(|_| rustix::io::Errno::INVAL)
            .map_err(host("describe the regions", bytes))?;
        Ok(Self {
            inner: Arc::new(Inner {
                layout,
                memory,
                epochs,
                access,
                listeners: Mutex::default(),
                span,
                backing,
                pages,
            }),
        })
    }

    /// The memory for virtqueues, loaders and devices. Clones of it stay valid
    /// after `self` is gone.
    pub fn memory(&self) -> &GuestMemory {
        &self.inner.memory
    }

    /// The regions in ascending order: one, or two when there are more than 3 GiB, then
    /// the further ones.
    pub fn regions(&self) -> impl Iterator<Item = Region> {
        self.inner.layout.regions()
    }

    /// Bytes of memory that the machine starts with, gap and further regions not counted.
    pub fn size(&self) -> ByteSize {
        ByteSize(self.inner.layout.bytes())
    }

    /// First guest-physical address after the last region.
    pub fn end(&self) -> Gpa {
        self.inner.layout.end()
    }

    /// Whether each of `len` bytes from `at` may be read now.
    pub fn contains(&self, at: Gpa, len: u64) -> bool {
        self.allows(at, len, false)
    }

    /// Whether each of `len` bytes from `at` may be read now, and written if `write`.
    pub fn allows(&self, at: Gpa, len: u64, write: bool) -> bool {
        self.region_of(at, len)
            .is_some_and(|(_, access)| access.allows(at, len, write))
    }

    fn region_of(&self, at: Gpa, len: u64) -> Option<(Region, &Access)> {
        let end = at.0.checked_add(len)?;
        let mut regions = self.regions().zip(&self.inner.access);
        regions
            .find(|(region, _)| region.start <= at && end <= region.end().0)
            .map(|(region, access)| (region, &**access))
    }

    /// Gives the whole pages within `len` bytes from `at` back to the host: they are
    /// zero afterwards. Returns how many bytes that were.
    ///
    /// # Errors
    /// [`Error::Range`] where that is not memory of this machine's own, or not plugged;
    /// [`Error::Host`].
    pub fn discard(&self, at: Gpa, len: u64) -> Result<u64, Error> {
        let wanted = "memory that can be given back";
        let refused = || Error::Range {
            at: at.0,
            len,
            wanted,
        };
        let (region, access) = self.region_of(at, len).ok_or_else(refused)?;
        if matches!(region.kind, Kind::File { .. }) || !access.allows(at, len, true) {
            return Err(refused());
        }
        self.punch(&region, at, len)
    }

    fn punch(&self, region: &Region, at: Gpa, len: u64) -> Result<u64, Error> {
        // Regions begin and end at page boundaries.
        let from = at.0.next_multiple_of(PAGE_SIZE);
        let whole = (at.0 + len).saturating_sub(from) / PAGE_SIZE * PAGE_SIZE;
        if whole == 0 {
            return Ok(0);
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let offset = from - region.start.0 + region.file_offset;
        let given = match &self.inner.backing {
            Backing::Memfd(memfd) => {
                rustix::io::retry_on_intr(|| rustix::fs::fallocate(memfd, flags, offset, whole))
            }
            // Advice would bring back what the image has.
            Backing::Image(_) => self.inner.span.zero(region, from - region.start.0, whole),
        };
        given.map_err(host("give pages back", whole))?;
        self.inner.epochs.mark(Gpa(from), whole);
        Ok(match self.inner.pages {
            Pages::Ordinary | Pages::Transparent => whole,
            // Of a page that is given back in part, the host has nothing.
            Pages::Huge => {
                let first = from.next_multiple_of(HUGE_PAGE);
                ((from + whole) / HUGE_PAGE * HUGE_PAGE).saturating_sub(first)
            }
        })
    }

    /// Lets `len` bytes from `at` be reached: whole blocks that are all unplugged.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub fn plug(&self, at: Gpa, len: u64) -> Result<(), Error> {
        let (_, blocks) = self.blocks(at, len, false)?;
        blocks.set(at, len, true);
        self.tell(|listener| listener.granted(at, len));
        Ok(())
    }

    /// Takes `len` bytes from `at` away, whole blocks that are all plugged, and gives
    /// them back to the host. Waits until no vCPU can reach them.
    ///
    /// # Errors
    /// [`Error::Range`]; [`Error::Host`] when the host does not take them back, which
    /// are unplugged all the same.
    pub fn unplug(&self, at: Gpa, len: u64) -> Result<(), Error> {
        let (region, blocks) = self.blocks(at, len, true)?;
        blocks.set(at, len, false);
        self.tell(|listener| listener.withdrawn(at, len));
        self.punch(&region, at, len).map(drop)
    }

    /// Whether all blocks that `len` bytes from `at` touch are plugged (`Some(true)`), or
    /// none of them. `None` if some are, or where nothing can be plugged.
    pub fn plugged(&self, at: Gpa, len: u64) -> Option<bool> {
        match self.region_of(at, len)?.1 {
            Access::Blocks(blocks) if blocks.all(at, len, true) => Some(true),
            Access::Blocks(blocks) if blocks.all(at, len, false) => Some(false),
            Access::All | Access::ReadOnly | Access::Blocks(_) => None,
        }
    }

    fn blocks(&self, at: Gpa, len: u64, plugged: bool) -> Result<(Region, &Blocks), Error> {
        match self.region_of(at, len) {
            Some((region, Access::Blocks(blocks)))
                if blocks.whole(at, len) && blocks.all(at, len, plugged) =>
            {
                Ok((region, blocks))
            }
            Some(_) | None => Err(Error::Range {
                at: at.0,
                len,
                wanted: if plugged {
                    "blocks that are plugged"
                } else {
                    "blocks that can be plugged"
                },
            }),
        }
    }

    /// Has `listener` told of what may be reached, for as long as it lives.
    pub fn listen(&self, listener: Weak<dyn AccessListener>) {
        let mut listeners = self.listeners();
        listeners.retain(|listener| listener.strong_count() > 0);
        listeners.push(listener);
    }

    fn listeners(&self) -> std::sync::MutexGuard<'_, Vec<Weak<dyn AccessListener>>> {
        let listeners = self.inner.listeners.lock();
        listeners.unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, what: impl Fn(&dyn AccessListener)) {
        let listeners = self.listeners().clone();
        for listener in listeners.iter().filter_map(Weak::upgrade) {
            what(&*listener);
        }
    }

    /// Puts zeros in place of what mapped files lost since they were mapped, for
    /// whoever got EFAULT on them. True if that was something: try again then.
    ///
    /// # Errors
    /// [`Error::Host`] when a file cannot be examined.
    pub fn heal_files(&self) -> Result<bool, Error> {
        let mut healed = false;
        for file in &self.inner.span.files {
            healed |= file.heal().map_err(host("examine a mapped file", 0))?;
        }
        Ok(healed)
    }

    /// Host address of guest-physical address 0. Valid for as long as a clone of
    /// `self` lives; only the addresses of [`GuestRam::regions`] are accessible, and of
    /// files that are read-only not to stores.
    ///
    /// Writes through it are not recorded: call [`PageEpochs::mark`].
    pub fn host_base(&self) -> NonNull<u8> {
        self.inner.span.base
    }

    /// The file that the memory is, in the order of [`Region::file_offset`]; none when it
    /// came from an image.
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        match &self.inner.backing {
            Backing::Memfd(memfd) => Some(memfd.as_fd()),
            Backing::Image(_) => None,
        }
    }

    /// Bytes of an image: all of memory but the host's files, whether plugged or not.
    pub fn image_bytes(&self) -> u64 {
        self.inner.layout.memfd_bytes
    }

    /// Which page was written when.
    pub fn epochs(&self) -> &Arc<PageEpochs> {
        &self.inner.epochs
    }

    /// Bytes of memory that the host backs (in memory or in swap).
    ///
    /// # Errors
    /// [`Error::Host`] when the memfd cannot be asked, or there is none.
    pub fn resident_bytes(&self) -> Result<u64, Error> {
        let stat = match &self.inner.backing {
            Backing::Memfd(memfd) => rustix::fs::fstat(memfd),
            Backing::Image(_) => Err(rustix::io::Errno::NOTSUP),
        };
        let stat = stat.map_err(host("count the resident pages", self.size().bytes()))?;
        // stat(2): st_blocks counts 512-byte units.
        Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
    }
}

/// Has the host back `len` bytes from `at` with one call, as each page that is touched
/// first costs a fault; for what is about to be written whole. Where it cannot, pages
/// are backed as they are touched.
pub fn populate(memory: &GuestMemory, at: Gpa, len: u64) {
    let Ok(len) = usize::try_from(len) else {
        return;
    };
    let Ok(slice) = memory.get_slice(at, len) else {
        return;
    };
    let guard = slice.ptr_guard();
    let start = guard.as_ptr() as usize;
    let from = start & !(PAGE_SIZE as usize - 1);
    let len = (start + len - from).next_multiple_of(PAGE_SIZE as usize);
    // SAFETY: the pages lie in the mapping, which begins and ends at page boundaries;
    // populating changes no content.
    let _ = unsafe { rustix::mm::madvise(from as *mut c_void, len, Advice::LinuxPopulateWrite) };
}

fn host<E: Into<std::io::Error>>(doing: &'static str, bytes: u64) -> impl FnOnce(E) -> Error {
    move |error| Error::Host {
        doing,
        bytes,
        source: error.into(),
    }
}

/// A file of `bytes` whose length nobody can change any more: a truncated file
/// would turn accesses into SIGBUS.
impl Pages {
    fn failed<E: Into<std::io::Error>>(
        self,
        doing: &'static str,
        bytes: u64,
    ) -> impl FnOnce(E) -> Error {
        move |error| match self {
            Pages::Ordinary | Pages::Transparent => host(doing, bytes)(error),
            Pages::Huge => Error::HugePages {
                bytes,
                source: error.into(),
            },
        }
    }
}

fn make_memfd(bytes: u64, pages: Pages) -> rustix::io::Result<OwnedFd> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if pages == Pages::Huge {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let memfd = rustix::fs::memfd_create("kombi-guest", flags)?;
    rustix::fs::ftruncate(&memfd, bytes)?;
    rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(memfd)
}

/// Zeros that the host does not back before they are touched.
pub fn zeroed_u32(n: usize) -> Box<[AtomicU32]> {
    // SAFETY: all zeros is a valid AtomicU32.
    unsafe { Box::new_zeroed_slice(n).assume_init() }
}

/// As [`zeroed_u32`].
pub fn zeroed_u64(n: usize) -> Box<[AtomicU64]> {
    // SAFETY: all zeros is a valid AtomicU64.
    unsafe { Box::new_zeroed_slice(n).assume_init() }
}
