//! Files into and out of guest memory while the caller goes on: io_uring(7).
//!
//! ```text
//! push ──▶ submit ──▶ kernel ──▶ take_done        eventfd: something may be had from `take_done`
//! ```
//!
//! Invariant: what the kernel may still read or write stays mapped, as each call keeps the memory that it is about
//! and a ring that is dropped waits for what was begun. Filters of system calls do not see what is in a ring, so the
//! kernel is told what this one may ask for: to read, write, flush and punch holes in the files that it was given.
//!
//! Left to others: how much of a call was done, and what to do about the rest.
#![allow(unsafe_code)] // addresses that the kernel uses after the call that names them

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::{Gpa, GuestMemory};

/// Some bytes of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The first.
    pub at: Gpa,
    /// How many.
    pub len: usize,
}

/// Files that a ring has at most.
pub const FILES_MAX: u32 = 16;

/// IORING_REGISTER_FILES_UPDATE (linux/io_uring.h): which files a ring has. It is all that may be registered once calls
/// may be made.
pub const REPLACE_FILES: u8 = 6;

/// What is asked of a file.
#[derive(Clone, Copy, Debug)]
pub enum Call<'p> {
    /// Reads from byte `at`; done are as many bytes as the result says, 0 at the end.
    Read {
        /// Where to.
        into: &'p [Piece],
        /// Of the file.
        at: u64,
    },
    /// Writes to byte `at`.
    Write {
        /// What.
        from: &'p [Piece],
        /// Of the file.
        at: u64,
        /// It is done once it would survive the host (RWF_DSYNC).
        durable: bool,
    },
    /// Makes durable whatever was done before it is submitted (fdatasync(2)).
    Flush,
    /// Puts zeros in place of `len` bytes from `at`; the length of the file stays.
    Clear {
        /// Of the file.
        at: u64,
        /// Bytes.
        len: u64,
        /// And gives back what they take.
        give_back: bool,
    },
}

/// What became of a call.
#[derive(Debug)]
pub struct Done<T> {
    /// What it was begun with.
    pub of: T,
    /// Bytes that were read or written; else 0.
    pub result: io::Result<usize>,
}

/// A call that can be pushed: what it is about can be reached.
pub struct Ready {
    /// Points at `pieces`.
    entry: Entry,
    /// What of guest memory is to be filled.
    into: Vec<Piece>,
    /// What the kernel is given. Behind a box: it stays where it is.
    _pieces: Box<[libc::iovec]>,
    memory: GuestMemory,
}

// SAFETY: the addresses in `_pieces` are those of guest memory, which is mapped for all threads for as long as `memory`
// lives, and nobody reads them but the kernel.
unsafe impl Send for Ready {}

impl Ready {
    /// Prepares a call on the file in `place` of a ring, and on pieces of `memory`.
    ///
    /// # Errors
    /// EFAULT: a piece is not memory that may be reached now.
    pub fn new(place: u32, memory: &GuestMemory, call: Call<'_>) -> io::Result<Self> {
        let (pieces, into) = match call {
            Call::Read { into, .. } => (resolve(memory, into, true)?, into.to_vec()),
            Call::Write { from, .. } => (resolve(memory, from, false)?, Vec::new()),
            Call::Flush | Call::Clear { .. } => (Box::default(), Vec::new()),
        };
        Ok(Self {
            entry: entry(types::Fixed(place), call, &pieces),
            into,
            _pieces: pieces,
            memory: memory.clone(),
        })
    }

    /// The first `n` bytes of what was to be filled were.
    fn record(&self, mut n: usize) {
        for piece in &self.into {
            let here = n.min(piece.len);
            for slice in self.memory.get_slices(piece.at, here).flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
            n -= here;
        }
    }
}

impl std::fmt::Debug for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ready").finish_non_exhaustive()
    }
}

/// Calls on files, in flight beside each other. They end in any order.
pub struct Ring<T> {
    uring: IoUring,
    /// By what the kernel knows them by.
    begun: Box<[Option<Begun<T>>]>,
    in_flight: usize,
}

struct Begun<T> {
    of: T,
    call: Ready,
}

impl<T> Ring<T> {
    /// A ring without files, for up to `calls` in flight, which writes to the eventfd `bell` when one is done.
    ///
    /// # Errors
    /// The kernel's, with what was being done: it may be older than Linux 5.10, or configured to give none.
    pub fn new(calls: u32, bell: BorrowedFd<'_>) -> Result<Self, (&'static str, io::Error)> {
        let failed = |doing| move |error| (doing, error);
        let uring = IoUring::builder()
            .dontfork()
            // Until it is restricted nothing can be submitted.
            .setup_r_disabled()
            .build(calls)
            .map_err(failed("make an io_uring"))?;
        let submitter = uring.submitter();
        submitter
            .register_files(&[NO_FILE; FILES_MAX as usize])
            .map_err(failed("make room for files in an io_uring"))?;
        submitter
            .register_eventfd(bell.as_raw_fd())
            .map_err(failed("give an eventfd to an io_uring"))?;
        let mut restrictions = [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
            Restriction::register_op(REPLACE_FILES),
        ];
        submitter
            .register_restrictions(&mut restrictions)
            .and_then(|()| submitter.register_enable_rings())
            .map_err(failed("restrict an io_uring"))?;
        Ok(Self {
            uring,
            begun: (0..calls).map(|_| None).collect(),
            in_flight: 0,
        })
    }

    /// Puts `file`, or none, into `place`. What is in flight goes on with the one that there was.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_file(&mut self, place: u32, file: Option<&File>) -> io::Result<()> {
        // What was prepared for the one that there is is begun with it.
        self.submit()?;
        let file = file.map_or(NO_FILE, AsRawFd::as_raw_fd);
        let set = self.uring.submitter().register_files_update(place, &[file]);
        set.map(drop)
    }

    /// How many calls were pushed and not taken yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// What they were begun with, in no order.
    pub fn begun(&self) -> impl Iterator<Item = &T> {
        self.begun.iter().flatten().map(|begun| &begun.of)
    }

    /// Takes `call` in, for `of`; [`Ring::submit`] has the kernel begin it.
    ///
    /// # Errors
    /// `of`: as many calls are in flight as may be.
    pub fn push(&mut self, call: Ready, of: T) -> Result<(), T> {
        let Some((place, room)) = (0..).zip(&mut self.begun).find(|(_, one)| one.is_none()) else {
            return Err(of);
        };
        let entry = call.entry.clone().user_data(place);
        // SAFETY: what the entry points at is kept in `begun` until the kernel is done with it: the pieces, which their
        // box holds in place, and the guest's memory behind them, which `memory` keeps mapped. Nothing in the process
        // is a Rust reference to that memory.
        if unsafe { self.uring.submission().push(&entry) }.is_err() {
            return Err(of);
        }
        *room = Some(Begun { of, call });
        self.in_flight += 1;
        Ok(())
    }

    /// Has the kernel begin what was pushed. Does not wait for it.
    ///
    /// # Errors
    /// The kernel's, which has no memory for a moment: what is left is submitted the next time.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.uring.submission().is_empty() {
            match self.uring.submit() {
                Ok(0) => return Err(io::ErrorKind::WouldBlock.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A call that is done, if there is one.
    pub fn take_done(&mut self) -> Option<Done<T>> {
        loop {
            let entry = self.uring.completion().next()?;
            let place = usize::try_from(entry.user_data()).ok();
            let begun = place
                .and_then(|place| self.begun.get_mut(place))
                .and_then(Option::take);
            // The kernel says each once.
            let Some(begun) = begun else {
                continue;
            };
            self.in_flight -= 1;
            let result = usize::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
            // Nobody knows how much one that failed has filled.
            begun.call.record(*result.as_ref().unwrap_or(&usize::MAX));
            return Some(Done {
                of: begun.of,
                result,
            });
        }
    }

    /// Submits what was pushed, and returns once something is done, if anything is in flight.
    pub fn wait(&mut self) {
        while self.in_flight > 0 && self.uring.completion().is_empty() {
            if self.uring.submit_and_wait(1).is_err() {
                // Interrupted, or the kernel is out of memory: what is in flight goes on.
                std::thread::yield_now();
            }
        }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            self.wait();
            while self.take_done().is_some() {}
        }
    }
}

impl<T> std::fmt::Debug for Ring<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

/// The host's addresses of `pieces`.
fn resolve(memory: &GuestMemory, pieces: &[Piece], write: bool) -> io::Result<Box<[libc::iovec]>> {
    let unreachable = || io::Error::from_raw_os_error(libc::EFAULT);
    let mut addresses = Vec::with_capacity(pieces.len());
    for piece in pieces {
        for slice in memory.get_slices(piece.at, piece.len) {
            let slice: VolatileSlice<'_, crate::EpochSlice<'_>> =
                slice.map_err(|_| unreachable())?;
            if !slice.bitmap().allows(slice.len(), write) {
                return Err(unreachable());
            }
            addresses.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
    }
    Ok(addresses.into_boxed_slice())
}

/// Of a place without one.
const NO_FILE: i32 = -1;

fn entry(file: types::Fixed, call: Call<'_>, pieces: &[libc::iovec]) -> Entry {
    // A driver's request is at most as many as the kernel takes in one call; more are left for the next.
    let count = pieces.len().min(crate::volatile::PIECES_MAX) as u32;
    match call {
        Call::Read { at, .. } => opcode::Readv::new(file, pieces.as_ptr(), count)
            .offset(at)
            .build(),
        Call::Write { at, durable, .. } => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(file, pieces.as_ptr(), count)
                .offset(at)
                .rw_flags(flags as _)
                .build()
        }
        Call::Flush => opcode::Fsync::new(file)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Call::Clear { at, len, give_back } => {
            let how = if give_back {
                libc::FALLOC_FL_PUNCH_HOLE
            } else {
                libc::FALLOC_FL_ZERO_RANGE
            };
            opcode::Fallocate::new(file, len)
                .offset(at)
                .mode(how | libc::FALLOC_FL_KEEP_SIZE)
                .build()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::fs::FileExt;

    use rustix::event::{EventfdFlags, eventfd};
    use vm_memory::Bytes;

    use super::*;
    use crate::{ByteSize, Further, GuestRam};

    const LEN: u64 = 64 << 10;

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..LEN).map(|at| (at % 251) as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        file
    }

    fn bell() -> OwnedFd {
        eventfd(0, EventfdFlags::NONBLOCK).unwrap()
    }

    fn ring<T>(file: &File, calls: u32) -> Ring<T> {
        let ring = Ring::new(calls, bell().as_fd());
        let mut ring = ring.expect("these tests need a host with io_uring");
        ring.set_file(0, Some(file)).unwrap();
        ring
    }

    fn ram() -> GuestRam {
        GuestRam::new(ByteSize::mib(1)).unwrap()
    }

    fn pieces<const N: usize>(pieces: [(u64, usize); N]) -> [Piece; N] {
        pieces.map(|(at, len)| Piece { at: Gpa(at), len })
    }

    /// Begins `call` and waits for it.
    fn does(ring: &mut Ring<u8>, ram: &GuestRam, call: Call<'_>) -> io::Result<usize> {
        ring.push(Ready::new(0, ram.memory(), call)?, 7).unwrap();
        ring.wait();
        let done = ring.take_done().unwrap();
        assert_eq!((done.of, ring.in_flight()), (7, 0));
        done.result
    }

    #[test]
    fn a_file_is_read_into_pieces_and_written_from_them() {
        let (file, ram) = (file(), ram());
        let mut ring = ring(&file, 4);
        let cursor = ram.epochs().cursor();
        let into = pieces([(0x1ffe, 4), (0x8000, 6)]);
        let read = does(
            &mut ring,
            &ram,
            Call::Read {
                into: &into,
                at: 300,
            },
        );
        assert_eq!(read.unwrap(), 10);
        let mut bytes = [0; 10];
        ram.memory()
            .read_slice(&mut bytes[..4], Gpa(0x1ffe))
            .unwrap();
        ram.memory()
            .read_slice(&mut bytes[4..], Gpa(0x8000))
            .unwrap();
        assert_eq!(bytes, [49, 50, 51, 52, 53, 54, 55, 56, 57, 58]);
        let written: Vec<_> = ram.epochs().written_since(cursor).collect();
        assert_eq!(written, [Gpa(0x1000), Gpa(0x2000), Gpa(0x8000)]);
        for durable in [false, true] {
            let call = Call::Write {
                from: &into,
                at: 5,
                durable,
            };
            assert_eq!(does(&mut ring, &ram, call).unwrap(), 10);
        }
        file.read_exact_at(&mut bytes, 5).unwrap();
        assert_eq!(bytes, [49, 50, 51, 52, 53, 54, 55, 56, 57, 58]);
        assert_eq!(does(&mut ring, &ram, Call::Flush).unwrap(), 0);
        let end = Call::Read {
            into: &into,
            at: LEN,
        };
        assert_eq!(does(&mut ring, &ram, end).unwrap(), 0);
    }

    #[test]
    fn cleared_bytes_read_as_zeros_and_the_length_stays() {
        let (file, ram) = (file(), ram());
        let mut ring = ring(&file, 4);
        for (at, give_back) in [(4096, true), (8192, false)] {
            let clear = Call::Clear {
                at,
                len: 4096,
                give_back,
            };
            assert_eq!(does(&mut ring, &ram, clear).unwrap(), 0);
        }
        let mut bytes = vec![1; 8192];
        file.read_exact_at(&mut bytes, 4096).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
        assert_eq!(file.metadata().unwrap().len(), LEN);
    }

    #[test]
    fn no_more_are_in_flight_than_may_be_and_each_is_done_once() {
        let (file, ram) = (file(), ram());
        let mut ring = ring(&file, 4);
        let into = pieces([(0x1000, 512)]);
        let call = Call::Read { into: &into, at: 0 };
        let ready = || Ready::new(0, ram.memory(), call).unwrap();
        for nth in 0..4 {
            ring.push(ready(), nth).unwrap();
        }
        assert_eq!(ring.push(ready(), 4), Err(4));
        let mut begun: Vec<_> = ring.begun().copied().collect();
        begun.sort_unstable();
        assert_eq!(begun, [0, 1, 2, 3]);
        let mut done = Vec::new();
        while ring.in_flight() > 0 {
            ring.wait();
            done.extend(std::iter::from_fn(|| ring.take_done()).map(|done| done.of));
        }
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2, 3]);
        ring.push(ready(), 4).unwrap();
    }

    #[test]
    fn memory_stays_until_the_kernel_is_done_with_it() {
        let (file, ram) = (file(), ram());
        let mut ring = ring(&file, 4);
        let into = pieces([(0x1000, 4096)]);
        let call = Call::Read { into: &into, at: 0 };
        ring.push(Ready::new(0, ram.memory(), call).unwrap(), ())
            .unwrap();
        drop(ram);
        ring.wait();
        assert_eq!(ring.take_done().unwrap().result.unwrap(), 4096);
    }

    #[test]
    fn what_may_not_be_reached_is_refused() {
        let (file, block) = (file(), 2 << 20);
        let further = vec![Further::Pluggable {
            len: 2 * block,
            block,
        }];
        let ram = GuestRam::with(ByteSize::mib(1), further).unwrap();
        let start = ram.regions().last().unwrap().start;
        let mut ring = ring(&file, 4);
        let into = [Piece {
            at: start,
            len: 512,
        }];
        let call = Call::Read { into: &into, at: 0 };
        let refused = Ready::new(0, ram.memory(), call).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EFAULT));
        ram.plug(start, block).unwrap();
        ring.push(Ready::new(0, ram.memory(), call).unwrap(), ())
            .unwrap();
        ring.wait();
        assert_eq!(ring.take_done().unwrap().result.unwrap(), 512);
        // One that goes between preparation and submission stays mapped for the kernel.
        ring.push(Ready::new(0, ram.memory(), call).unwrap(), ())
            .unwrap();
        ram.unplug(start, block).unwrap();
        ring.wait();
        assert_eq!(ring.take_done().unwrap().result.unwrap(), 512);
        // A piece that lies nowhere.
        let into = pieces([(u64::MAX - 10, 5)]);
        let call = Call::Read { into: &into, at: 0 };
        assert!(Ready::new(0, ram.memory(), call).is_err());
    }

    #[test]
    fn a_file_that_is_replaced_is_done_with_first_and_one_that_is_taken_is_closed() {
        let (old, new, ram) = (file(), tempfile::tempfile().unwrap(), ram());
        let mut ring = ring(&old, 4);
        let into = pieces([(0x1000, 512)]);
        let call = Call::Read { into: &into, at: 0 };
        let ready = |place| Ready::new(place, ram.memory(), call).unwrap();
        ring.push(ready(0), "old").unwrap();
        ring.set_file(0, Some(&new)).unwrap();
        ring.set_file(1, Some(&old)).unwrap();
        ring.push(ready(0), "new").unwrap();
        ring.push(ready(1), "old in its new place").unwrap();
        let mut done = Vec::new();
        while ring.in_flight() > 0 {
            ring.wait();
            done.extend(std::iter::from_fn(|| ring.take_done()));
        }
        let mut done: Vec<_> = done
            .iter()
            .map(|done| (done.of, *done.result.as_ref().unwrap()))
            .collect();
        done.sort_unstable();
        // The new one is empty.
        assert_eq!(
            done,
            [("new", 0), ("old", 512), ("old in its new place", 512)]
        );
        ring.set_file(1, None).unwrap();
        ring.push(ready(1), "none").unwrap();
        ring.wait();
        let error = ring.take_done().unwrap().result.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        assert!(ring.set_file(FILES_MAX, Some(&old)).is_err());
    }

    #[test]
    fn the_bell_rings_when_something_is_done() {
        let (file, ram, bell) = (file(), ram(), bell());
        let mut ring = Ring::new(4, bell.as_fd()).unwrap();
        ring.set_file(0, Some(&file)).unwrap();
        let flush = Ready::new(0, ram.memory(), Call::Flush).unwrap();
        ring.push(flush, ()).unwrap();
        assert!(rustix::io::read(&bell, &mut [0; 8]).is_err());
        ring.submit().unwrap();
        ring.wait();
        assert_eq!(rustix::io::read(&bell, &mut [0; 8]), Ok(8));
    }

    #[test]
    fn the_kernel_refuses_all_but_four_kinds_of_calls_on_files_that_it_was_given() {
        let file = file();
        let mut ring = ring::<()>(&file, 8);
        let fd = types::Fd(file.as_raw_fd());
        for entry in [
            opcode::Nop::new().build().flags(Flags::FIXED_FILE),
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr()).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Fsync::new(fd).build(),
            opcode::Fsync::new(types::Fixed(1)).build(),
        ] {
            // SAFETY: none of them points at anything but a constant.
            unsafe { ring.uring.submission().push(&entry) }.unwrap();
            ring.uring.submit_and_wait(1).unwrap();
            let done = ring.uring.completion().next().unwrap().result();
            assert!(done == -libc::EACCES || done == -libc::EBADF, "{done}");
        }
        let again = ring.uring.submitter().unregister_files();
        assert_eq!(again.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}
