//! Files and sockets straight into and out of guest memory.
//!
//! The guest may change that memory at any time, so it never becomes a Rust
//! slice: the kernel gets raw addresses. What was read in is recorded in
//! [`crate::PageEpochs`].
//!
//! Every function moves as much as one call of the kernel does: callers loop.
#![allow(unsafe_code)] // vectored input and output on raw addresses

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

use crate::EpochSlice;

/// A piece of guest memory.
pub type Slice<'m> = VolatileSlice<'m, EpochSlice<'m>>;

/// The kernel takes no more pieces in one call (UIO_MAXIOV).
pub(crate) const PIECES_MAX: usize = 1024;

/// How long a call may wait for the disk behind a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It fails with [`io::ErrorKind::WouldBlock`] in place of waiting, and with
    /// [`io::ErrorKind::Unsupported`] where the file system cannot tell
    /// (RWF_NOWAIT, preadv2(2)).
    NotAtAll,
    /// Until it is done.
    AsLongAsItTakes,
}

impl Wait {
    fn flags(self) -> libc::c_int {
        match self {
            Wait::NotAtAll => libc::RWF_NOWAIT,
            Wait::AsLongAsItTakes => 0,
        }
    }
}

/// Reads from `file` at `offset` bytes; 0 is its end.
///
/// # Errors
/// The kernel's, interruptions excepted; those of [`Wait`].
pub fn read_at(file: impl AsFd, into: &[Slice<'_>], offset: u64, wait: Wait) -> io::Result<usize> {
    let at = file_offset(offset)?;
    let pieces = pieces(into);
    let n = retry(|| {
        // SAFETY: each piece is mapped for as long as its slice lives; the guest
        // tolerates writes into its memory at any time.
        unsafe {
            libc::preadv2(
                file.as_fd().as_raw_fd(),
                pieces.as_ptr(),
                pieces.len() as i32,
                at,
                wait.flags(),
            )
        }
    })?;
    record(into, n);
    Ok(n)
}

/// Writes into `file` at `offset` bytes.
///
/// # Errors
/// The kernel's, interruptions excepted; those of [`Wait`].
pub fn write_at(file: impl AsFd, from: &[Slice<'_>], offset: u64, wait: Wait) -> io::Result<usize> {
    let at = file_offset(offset)?;
    let pieces = pieces(from);
    // SAFETY: each piece is mapped for as long as its slice lives.
    retry(|| unsafe {
        libc::pwritev2(
            file.as_fd().as_raw_fd(),
            pieces.as_ptr(),
            pieces.len() as i32,
            at,
            wait.flags(),
        )
    })
}

/// Reads from what has no offsets, such as a device; 0 is its end. What does not fit goes
/// to `overflow`.
///
/// # Errors
/// The kernel's, interruptions excepted.
pub fn read(file: impl AsFd, into: &[Slice<'_>], overflow: &mut [u8]) -> io::Result<usize> {
    let mut pieces = pieces(into);
    pieces.truncate(PIECES_MAX - 1);
    pieces.push(libc::iovec {
        iov_base: overflow.as_mut_ptr().cast(),
        iov_len: overflow.len(),
    });
    // SAFETY: as in `read_at`; `overflow` is ours alone.
    let n = retry(|| unsafe {
        libc::readv(
            file.as_fd().as_raw_fd(),
            pieces.as_ptr(),
            pieces.len() as i32,
        )
    })?;
    record(into, n);
    Ok(n)
}

/// Writes into what has no offsets, such as a device.
///
/// # Errors
/// The kernel's, interruptions excepted.
pub fn write(file: impl AsFd, from: &[Slice<'_>]) -> io::Result<usize> {
    let pieces = pieces(from);
    // SAFETY: as in `write_at`.
    retry(|| unsafe {
        libc::writev(
            file.as_fd().as_raw_fd(),
            pieces.as_ptr(),
            pieces.len() as i32,
        )
    })
}

/// Receives from a stream socket without waiting; 0 is its end.
///
/// # Errors
/// The kernel's, interruptions excepted.
pub fn receive(socket: impl AsFd, into: &[Slice<'_>]) -> io::Result<usize> {
    let mut pieces = pieces(into);
    let mut message = message(&mut pieces);
    let n = retry(|| {
        // SAFETY: `message` points at `pieces`, which outlive the call, and those
        // at memory that is mapped for as long as its slices live.
        unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
    })?;
    record(into, n);
    Ok(n)
}

/// Sends to a stream socket without waiting and without SIGPIPE.
///
/// # Errors
/// The kernel's, interruptions excepted.
pub fn send(socket: impl AsFd, from: &[Slice<'_>]) -> io::Result<usize> {
    let mut pieces = pieces(from);
    let message = message(&mut pieces);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: as in `receive`.
    retry(|| unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &message, flags) })
}

fn pieces(slices: &[Slice<'_>]) -> Vec<libc::iovec> {
    slices
        .iter()
        .take(PIECES_MAX)
        .map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect()
}

fn message(pieces: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeros is a message without name, pieces and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len();
    message
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn record(into: &[Slice<'_>], mut n: usize) {
    for slice in into {
        let here = n.min(slice.len());
        if here == 0 && n == 0 {
            return;
        }
        slice.bitmap().mark_dirty(0, here);
        n -= here;
    }
}
