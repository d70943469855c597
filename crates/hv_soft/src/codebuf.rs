//! The code cache: host memory that is written through one view and executed
//! through another.
//!
//! Invariant: no address is writable and executable. The two views map one
//! memfd; a byte at offset `o` is written at `write + o` and runs at `run + o`.
//! Offsets below [`CodeBuf::used`] were written by [`CodeBuf::append`].
//!
//! Left to others: what the bytes mean, and that nothing runs in the buffer
//! while it is rewound or patched (one vCPU, on whose thread all this happens).
#![allow(unsafe_code)] // mmap, madvise and writes through the writable view

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Pages are made present this many bytes at a time: one call instead of a
/// fault for each.
const STEP: usize = 256 << 10;
/// Most of the writable view that stays present behind the last step. A boot patches
/// what it placed before, so that each page that goes may have to come again.
const WRITABLE_BEHIND_MAX: usize = 2 << 20;

/// A code cache of a fixed size.
pub(crate) struct CodeBuf {
    _memfd: OwnedFd,
    write: usize,
    run: usize,
    len: usize,
    used: usize,
    present: usize,
    /// The writable view was dropped up to here.
    dropped: usize,
}

impl CodeBuf {
    /// Reserves `len` bytes, rounded up to whole steps.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let len = len.max(STEP).next_multiple_of(STEP);
        // SAFETY: a constant, NUL-terminated name.
        let fd = unsafe { libc::memfd_create(c"kombi-code".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is fresh and ours.
        let memfd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: no memory is involved.
        if unsafe { libc::ftruncate(fd, len as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let write = map(&memfd, len, libc::PROT_READ | libc::PROT_WRITE)?;
        let run = match map(&memfd, len, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(run) => run,
            Err(error) => {
                unmap(write, len);
                return Err(error);
            }
        };
        Ok(Self {
            _memfd: memfd,
            write,
            run,
            len,
            used: 0,
            present: 0,
            dropped: 0,
        })
    }

    /// Host address at which the byte at `offset` runs.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        (self.run + offset) as u64
    }

    /// Where the buffer runs: first address and the one behind the last.
    pub(crate) fn span(&self) -> (u64, u64) {
        (self.run as u64, (self.run + self.len) as u64)
    }

    pub(crate) fn used(&self) -> usize {
        self.used
    }

    pub(crate) fn free(&self) -> usize {
        self.len - self.used
    }

    /// Writes code behind what there is, aligned to 16 bytes. `None` when full.
    pub(crate) fn append(&mut self, code: &[u8]) -> Option<usize> {
        let at = self.used;
        let end = at.checked_add(code.len())?.checked_next_multiple_of(16)?;
        if end > self.len {
            return None;
        }
        if end > self.present {
            self.make_present(end);
        }
        // SAFETY: at..end lies inside of the writable view, checked above;
        // nothing else refers to these bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), (self.write + at) as *mut u8, code.len());
        }
        self.used = end;
        Some(at)
    }

    /// Overwrites code that is there. Ignored outside of what was written.
    pub(crate) fn patch(&mut self, offset: usize, bytes: &[u8]) {
        if offset
            .checked_add(bytes.len())
            .is_none_or(|end| end > self.used)
        {
            debug_assert!(false, "patch outside of the code");
            return;
        }
        // SAFETY: inside of the writable view, checked above; nothing executes in
        // the buffer meanwhile, as this thread is the one that would.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                (self.write + offset) as *mut u8,
                bytes.len(),
            );
        }
    }

    /// What is at `from` up to `to`, as far as it was written.
    pub(crate) fn bytes(&self, from: usize, to: usize) -> Vec<u8> {
        let to = to.min(self.used);
        let mut bytes = vec![0; to.saturating_sub(from)];
        // SAFETY: from..to lies in the running view, which may be read, and only this
        // thread writes it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (self.run + from) as *const u8,
                bytes.as_mut_ptr(),
                bytes.len(),
            );
        }
        bytes
    }

    /// Makes the rel32 at `offset` lead to `target`, an offset too.
    pub(crate) fn patch_rel32(&mut self, offset: usize, target: usize) {
        let rel = (target as i64 - (offset as i64 + 4)) as i32;
        self.patch(offset, &rel.to_le_bytes());
    }

    /// Puts `jmp target` at `offset`.
    pub(crate) fn patch_jump(&mut self, offset: usize, target: usize) {
        let rel = (target as i64 - (offset as i64 + 5)) as i32;
        let mut jump = [0xe9, 0, 0, 0, 0];
        jump[1..].copy_from_slice(&rel.to_le_bytes());
        self.patch(offset, &jump);
    }

    /// Forgets everything behind `offset`.
    pub(crate) fn rewind(&mut self, offset: usize) {
        self.used = offset.min(self.used);
    }

    /// Returns the memory behind what is used to the host.
    pub(crate) fn release(&mut self) {
        self.drop_writable(self.used / STEP * STEP);
        let from = self.used.next_multiple_of(STEP).min(self.present);
        let len = self.present - from;
        if len == 0 {
            return;
        }
        // SAFETY: from..present lies in the writable view and holds nothing that
        // is used; MADV_REMOVE frees it in the file, and so in both views.
        let removed =
            unsafe { libc::madvise((self.write + from) as *mut _, len, libc::MADV_REMOVE) };
        if removed == 0 {
            self.present = from;
            self.dropped = self.dropped.min(from);
        }
    }

    /// Both views present up to the step that holds `end`. The writable view
    /// of older steps is dropped now and then: it would count the same memory twice.
    fn make_present(&mut self, end: usize) {
        let to = end.next_multiple_of(STEP).min(self.len);
        let (from, len) = (self.present, to - self.present);
        // SAFETY: from..to lies in both views; populating changes no content.
        unsafe {
            // Failure only means that pages fault in one by one.
            libc::madvise(
                (self.write + from) as *mut _,
                len,
                libc::MADV_POPULATE_WRITE,
            );
            libc::madvise((self.run + from) as *mut _, len, libc::MADV_POPULATE_READ);
        }
        self.present = to;
        if from - self.dropped.min(from) >= WRITABLE_BEHIND_MAX {
            self.drop_writable(from - STEP);
        }
    }

    /// Takes the writable view of what is before `end` out of this process.
    fn drop_writable(&mut self, end: usize) {
        // SAFETY: 0..end lies in the view; MADV_DONTNEED on a shared file mapping only
        // drops page table entries.
        unsafe { libc::madvise(self.write as *mut _, end, libc::MADV_DONTNEED) };
        self.dropped = end;
    }
}

impl Drop for CodeBuf {
    fn drop(&mut self) {
        unmap(self.write, self.len);
        unmap(self.run, self.len);
    }
}

fn map(memfd: &OwnedFd, len: usize, protection: i32) -> io::Result<usize> {
    // SAFETY: a null hint replaces no mapping.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            protection,
            libc::MAP_SHARED,
            memfd.as_raw_fd(),
            0,
        )
    };
    if at == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(at as usize)
    }
}

fn unmap(at: usize, len: usize) {
    // SAFETY: `at` came from `map` with this length, and is unmapped once.
    let result = unsafe { libc::munmap(at as *mut _, len) };
    debug_assert_eq!(result, 0, "unmapping a view that we mapped");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_view_is_writable_and_executable() {
        let buf = CodeBuf::new(1 << 20).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let views: Vec<_> = maps
            .lines()
            .filter(|line| line.contains("kombi-code"))
            .collect();
        assert!(views.len() >= 2, "{views:?}");
        assert!(
            views
                .iter()
                .all(|line| !(line.contains("wx") || line.contains("rwx"))),
            "{views:?}"
        );
        drop(buf);
    }

    #[test]
    fn a_full_buffer_refuses_and_can_be_rewound() {
        let mut buf = CodeBuf::new(STEP).unwrap();
        assert_eq!(buf.append(&vec![0x90; STEP - 32]), Some(0));
        assert_eq!(buf.append(&[0; 17]), Some(STEP - 32));
        assert_eq!(buf.append(&[0]), None);
        buf.rewind(4096);
        assert_eq!(buf.append(&[0xc3]), Some(4096));
    }
}
