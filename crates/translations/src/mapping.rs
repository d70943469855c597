//! A whole file in memory, read-only and shared with all who map it.
//!
//! Invariant: the bytes stay mapped as long as the [`Mapping`] lives. Nobody writes
//! the file or makes it shorter: files of this crate are made under another name
//! and only ever renamed and removed, and the folder is its owner's alone
//! (`folder.rs`).
#![allow(unsafe_code)] // mmap, munmap, madvise, a slice of the mapping

use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// A mapped file.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is only read, and unmapped once, in `drop`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `file`, which has so many.
    pub(crate) fn new(file: &File, len: usize) -> io::Result<Self> {
        // SAFETY: a null hint without MAP_FIXED replaces no mapping.
        let base = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED,
                file,
                0,
            )
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes are mapped as long as `self`, and nobody changes them:
        // see the invariant.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// Takes the pages out of this process; they come back when they are read.
    pub(crate) fn release(&self) {
        // SAFETY: dropping page table entries of a read-only file mapping changes no
        // content.
        let _ = unsafe {
            rustix::mm::madvise(self.base.as_ptr().cast(), self.len, Advice::LinuxDontNeed)
        };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` came from `mmap` with this length, and is unmapped once.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "unmapping what we mapped");
    }
}
