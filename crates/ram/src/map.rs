//! The mapping of guest memory into this process.
//!
//! Invariant: one reserved span of addresses holds both regions at their
//! guest-physical offsets; the rest of it, and the page after it, is
//! inaccessible. It is unmapped when the last handle that can reach it goes.
#![allow(unsafe_code)] // mmap and munmap, vm_memory's regions made from raw mappings, zeroed atomics

use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use crate::epochs::{PageEpochs, RegionEpochs};
use crate::layout::{ByteSize, Layout, PAGE_SIZE, Region};
use crate::{Error, Gpa};

/// Guest memory as rust-vmm crates want it: implements `vm_memory`'s
/// `GuestMemory` and `Bytes`, and records every write in [`PageEpochs`].
pub type GuestMemory = GuestMemoryMmap<RegionEpochs>;

/// The memory of one machine. Clones are handles of the same memory.
#[derive(Clone, Debug)]
pub struct GuestRam {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    layout: Layout,
    memory: GuestMemory,
    epochs: Arc<PageEpochs>,
    span: Arc<Span>,
    memfd: OwnedFd,
}

/// The reserved addresses. Handles inside of [`RegionEpochs`] keep it mapped.
#[derive(Debug)]
pub(crate) struct Span {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: `Span` only carries the address of a mapping and unmaps it once, in
// `drop`; it never reads or writes through it.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    fn reserve(len: usize) -> rustix::io::Result<Self> {
        // SAFETY: a null hint without MAP_FIXED never replaces a mapping.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let base = NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { base, len })
    }

    /// Maps `region` of `memfd` at its place.
    fn map(&self, region: &Region, memfd: BorrowedFd<'_>) -> rustix::io::Result<NonNull<u8>> {
        let (Ok(offset), Ok(len)) = (usize::try_from(region.start.0), usize::try_from(region.len))
        else {
            return Err(rustix::io::Errno::NOMEM);
        };
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(rustix::io::Errno::NOMEM);
        }
        // SAFETY: offset + len lies inside the span, checked above; the span is
        // ours, so that MAP_FIXED replaces nothing but its reservation.
        let at = unsafe {
            let at = self.base.add(offset);
            rustix::mm::mmap(
                at.as_ptr().cast::<c_void>(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                memfd,
                region.file_offset,
            )?;
            // A core dump of the monitor must not carry the guest's secrets.
            rustix::mm::madvise(at.as_ptr().cast::<c_void>(), len, Advice::LinuxDontDump)?;
            at
        };
        Ok(at)
    }
}

impl Drop for Span {
    fn drop(&mut self) {
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
        let layout = Layout::new(size)?;
        let bytes = layout.bytes();
        let host = |doing| {
            move |errno: rustix::io::Errno| Error::Host {
                doing,
                bytes,
                source: errno.into(),
            }
        };

        let memfd = make_memfd(bytes).map_err(host("make a memfd"))?;
        let guarded = layout.end().0 + PAGE_SIZE;
        let span = usize::try_from(guarded)
            .map_err(|_| rustix::io::Errno::NOMEM)
            .and_then(Span::reserve)
            .map_err(host("reserve addresses"))?;
        let span = Arc::new(span);
        let epochs = Arc::new(PageEpochs::new(&layout));

        let mut regions = Vec::with_capacity(2);
        for region in layout.regions() {
            let at = span
                .map(&region, memfd.as_fd())
                .map_err(host("map the memfd"))?;
            let bitmap = RegionEpochs {
                epochs: Arc::clone(&epochs),
                start: region.start,
                _keeps: Arc::clone(&span),
            };
            // `map` checked that the length fits.
            let builder = MmapRegionBuilder::new_with_bitmap(region.len as usize, bitmap);
            // SAFETY: `at` and the length are a mapping that `bitmap`, owned by the
            // region, keeps alive.
            let mapped = unsafe { builder.with_raw_mmap_pointer(at.as_ptr()) }
                .with_mmap_prot((ProtFlags::READ | ProtFlags::WRITE).bits() as i32)
                .with_mmap_flags(MapFlags::SHARED.bits() as i32)
                .build()
                .map_err(|_| host("describe a region")(rustix::io::Errno::INVAL))?;
            let region = GuestRegionMmap::new(mapped, region.start)
                .ok_or_else(|| host("describe a region")(rustix::io::Errno::INVAL))?;
            regions.push(region);
        }
        let memory = GuestMemory::from_regions(regions)
            .map_err(|_| host("describe the regions")(rustix::io::Errno::INVAL))?;
        Ok(Self {
            inner: Arc::new(Inner {
                layout,
                memory,
                epochs,
                span,
                memfd,
            }),
        })
    }

    /// The memory for virtqueues, loaders and devices. Clones of it stay valid
    /// after `self` is gone.
    pub fn memory(&self) -> &GuestMemory {
        &self.inner.memory
    }

    /// The regions in ascending order: one, or two when there are more than 3 GiB.
    pub fn regions(&self) -> impl Iterator<Item = Region> {
        self.inner.layout.regions()
    }

    /// Bytes of memory, the gap not counted.
    pub fn size(&self) -> ByteSize {
        ByteSize(self.inner.layout.bytes())
    }

    /// First guest-physical address after the last region.
    pub fn end(&self) -> Gpa {
        self.inner.layout.end()
    }

    /// Whether there is memory at every one of `len` bytes from `at`.
    pub fn contains(&self, at: Gpa, len: u64) -> bool {
        let Some(end) = at.0.checked_add(len) else {
            return false;
        };
        self.regions()
            .any(|region| region.start <= at && end <= region.end().0)
    }

    /// Host address of guest-physical address 0. Valid for as long as a clone of
    /// `self` lives; only the addresses of [`GuestRam::regions`] are accessible.
    ///
    /// Writes through it are not recorded: call [`PageEpochs::mark`].
    pub fn host_base(&self) -> NonNull<u8> {
        self.inner.span.base
    }

    /// The file that the memory is, in the order of [`Region::file_offset`].
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.inner.memfd.as_fd()
    }

    /// Which page was written when.
    pub fn epochs(&self) -> &Arc<PageEpochs> {
        &self.inner.epochs
    }

    /// Bytes of memory that the host backs (in memory or in swap).
    ///
    /// # Errors
    /// [`Error::Host`] when the memfd cannot be asked.
    pub fn resident_bytes(&self) -> Result<u64, Error> {
        let stat = rustix::fs::fstat(&self.inner.memfd).map_err(|errno| Error::Host {
            doing: "count the resident pages",
            bytes: self.size().bytes(),
            source: errno.into(),
        })?;
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

/// A file of `bytes` whose length nobody can change any more: a truncated file
/// would turn accesses into SIGBUS.
fn make_memfd(bytes: u64) -> rustix::io::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create(
        "kombi-guest",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
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
