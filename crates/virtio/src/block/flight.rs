//! A request that the kernel has, and what of it is still to do.
//!
//! Invariant: it names guest memory by its addresses, which are looked up anew for each call, so that nothing is
//! reached that the guest lost meanwhile. What it has done before a call fails stays done.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use ram::ring::{Call, Piece};
use ram::{Gpa, GuestMemory};
use rustix::io::Errno;
use vm_memory::{Bytes, GuestMemoryBackend};

use super::device::Flushing;
use super::disk::{Asked, Disk, Failed};
use super::plan::{Hole, Plan};
use super::spec::Status;
use crate::{Buffers, Chain};

/// A thread that ends takes what it submitted with it once. A kernel that may make no thread
/// for what takes time does so each time.
const CANCELLED_MAX: u8 = 16;

/// A request in flight.
#[derive(Debug)]
pub(super) struct Flight {
    /// The so manieth of its drive.
    pub(super) nth: u64,
    /// Its name.
    pub(super) head: u16,
    /// Of its file in the ring.
    pub(super) place: u32,
    disk: Arc<Disk>,
    start: Instant,
    status: Gpa,
    work: Work,
    /// How often the next call was cancelled.
    cancelled: u8,
    /// Bytes that the driver finds in its buffers.
    filled: usize,
}

/// What is still to do.
#[derive(Debug)]
enum Work {
    Read {
        into: Vec<Piece>,
        at: u64,
    },
    Write {
        from: Vec<Piece>,
        at: u64,
        bytes: usize,
        durable: bool,
    },
    Flush,
    Clear {
        holes: VecDeque<Hole>,
        then_flush: bool,
    },
}

/// A request that was begun.
pub(super) enum Begun {
    /// It is over, with so many bytes filled in.
    Over(u32),
    /// It has a call to make.
    Flight(Flight),
}

impl Flight {
    /// Begins what `chain` asks of `disk`.
    pub(super) fn begin(
        nth: u64,
        place: u32,
        chain: Chain<'_>,
        disk: &Arc<Disk>,
        flushing: Flushing,
    ) -> Begun {
        let head = chain.head;
        let Some(Asked { plan, mut status }) = disk.read(chain, flushing) else {
            return Begun::Over(0);
        };
        let durable = flushing == Flushing::EachWrite;
        let with = |status: &mut Buffers<'_>, work| {
            // `Disk::read` left one byte of it.
            let status = pieces(status).first().map_or(Gpa(0), |piece| piece.at);
            Begun::Flight(Self {
                nth,
                head,
                place,
                disk: disk.clone(),
                start: Instant::now(),
                status,
                work,
                cancelled: 0,
                filled: 0,
            })
        };
        let (done, filled) = match plan {
            Ok(Plan::Read { at, mut into }) if !into.is_empty() => {
                let into = pieces(&mut into);
                return with(&mut status, Work::Read { into, at });
            }
            Ok(Plan::Write { at, mut from }) if !from.is_empty() => {
                let work = Work::Write {
                    bytes: from.len(),
                    from: pieces(&mut from),
                    at,
                    durable,
                };
                return with(&mut status, work);
            }
            Ok(Plan::Flush) => return with(&mut status, Work::Flush),
            Ok(Plan::Clear { holes }) if !holes.is_empty() => {
                let work = Work::Clear {
                    holes: holes.into(),
                    then_flush: durable,
                };
                return with(&mut status, work);
            }
            Ok(Plan::GetId { mut into }) => (Ok(()), into.write(&disk.id)),
            Ok(Plan::Read { .. }) => {
                disk.count_read(Instant::now(), 0);
                (Ok(()), 0)
            }
            Ok(Plan::Write { .. }) => {
                disk.count_write(Instant::now(), 0);
                (Ok(()), 0)
            }
            Ok(Plan::Clear { .. } | Plan::Nothing) => (Ok(()), 0),
            Err(failed) => (Err(failed), 0),
        };
        status.write(&[disk.status(done) as u8]);
        Begun::Over(filled as u32 + 1)
    }

    /// Whether it makes others durable, which have to be done before it.
    pub(super) fn is_flush(&self) -> bool {
        matches!(self.work, Work::Flush)
    }

    /// Whether a flush has to come after it.
    pub(super) fn changes(&self) -> bool {
        matches!(self.work, Work::Write { .. } | Work::Clear { .. })
    }

    /// The next call to make.
    pub(super) fn call(&self) -> Call<'_> {
        match &self.work {
            Work::Read { into, at } => Call::Read { into, at: *at },
            Work::Write {
                from, at, durable, ..
            } => Call::Write {
                from,
                at: *at,
                durable: *durable,
            },
            Work::Flush => Call::Flush,
            Work::Clear { holes, .. } => match holes.front() {
                Some(&Hole { at, len, give_back }) => Call::Clear { at, len, give_back },
                None => Call::Flush,
            },
        }
    }

    /// What became of that call; returns what became of the request, if nothing is left to do.
    pub(super) fn advance(&mut self, result: io::Result<usize>) -> Option<Result<(), Failed>> {
        let n = match result {
            Ok(n) => n,
            // The thread that submitted it has ended, or was interrupted: it was not begun.
            Err(error) if was_cancelled(&error) && self.cancelled < CANCELLED_MAX => {
                self.cancelled += 1;
                return None;
            }
            Err(error) => return Some(Err(error.into())),
        };
        self.cancelled = 0;
        match &mut self.work {
            // The file became shorter under us.
            Work::Read { .. } | Work::Write { .. } if n == 0 => {
                Some(Err(Failed::Host(Status::IoError)))
            }
            Work::Read { into, at } => {
                skip(into, n);
                *at += n as u64;
                self.filled += n;
                into.is_empty().then_some(Ok(()))
            }
            Work::Write { from, at, .. } => {
                skip(from, n);
                *at += n as u64;
                from.is_empty().then_some(Ok(()))
            }
            Work::Flush => Some(Ok(())),
            Work::Clear { holes, then_flush } => {
                let over = holes.pop_front().is_none() || holes.is_empty() && !*then_flush;
                over.then_some(Ok(()))
            }
        }
    }

    /// Tells the driver in its buffers; returns how many bytes of them are filled in.
    pub(super) fn end(&self, done: Result<(), Failed>, memory: &GuestMemory) -> u32 {
        if done.is_ok() {
            match self.work {
                Work::Read { .. } => self.disk.count_read(self.start, self.filled),
                Work::Write { bytes, .. } => self.disk.count_write(self.start, bytes),
                Work::Flush => self.disk.count_flush(),
                Work::Clear { .. } => {}
            }
        }
        let status = self.disk.status(done);
        if let Ok(byte) = memory.get_slice(self.status, 1)
            && byte.bitmap().allows(1, true)
        {
            let _ = byte.write(&[status as u8], 0);
        }
        // Chains are shorter than 2^32 bytes.
        self.filled as u32 + 1
    }
}

fn was_cancelled(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    [Errno::CANCELED, Errno::INTR]
        .map(|again| Some(again.raw_os_error()))
        .contains(&errno)
}

/// Where `buffers` lie.
pub(super) fn pieces(buffers: &mut Buffers<'_>) -> Vec<Piece> {
    let pieces = buffers.pieces().iter();
    pieces
        .map(|piece| Piece {
            at: piece.bitmap().start(),
            len: piece.len(),
        })
        .collect()
}

/// Takes the first `n` bytes away.
fn skip(pieces: &mut Vec<Piece>, mut n: usize) {
    let whole = pieces.iter().take_while(|piece| {
        let whole = piece.len <= n;
        n -= if whole { piece.len } else { 0 };
        whole
    });
    let whole = whole.count();
    pieces.drain(..whole);
    if let Some(first) = pieces.first_mut() {
        first.at = Gpa(first.at.0.wrapping_add(n as u64));
        first.len -= n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Access;

    #[test]
    fn a_call_that_is_cancelled_is_made_again_and_not_for_ever() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let disk = Disk::open(file.path(), Access::ReadWrite, Arc::default()).unwrap();
        let mut flight = Flight {
            nth: 1,
            head: 0,
            place: 0,
            disk: Arc::new(disk),
            start: Instant::now(),
            status: Gpa(0),
            work: Work::Flush,
            cancelled: 0,
            filled: 0,
        };
        let cancelled = || Err(Errno::CANCELED.into());
        for _ in 0..CANCELLED_MAX {
            assert_eq!(flight.advance(cancelled()), None);
        }
        let failed = Some(Err(Failed::Host(Status::IoError)));
        assert_eq!(flight.advance(cancelled()), failed);
        assert_eq!(flight.advance(Ok(0)), Some(Ok(())));
        assert_eq!(flight.advance(Err(Errno::INTR.into())), None);
        assert_eq!(flight.advance(Err(Errno::IO.into())), failed);
    }

    #[test]
    fn what_was_done_of_pieces_is_skipped() {
        let three = [(0, 10), (100, 20), (200, 30)];
        for (n, left) in [
            (0, &[(0, 10), (100, 20), (200, 30)][..]),
            (9, &[(9, 1), (100, 20), (200, 30)]),
            (10, &[(100, 20), (200, 30)]),
            (11, &[(101, 19), (200, 30)]),
            (59, &[(229, 1)]),
            (60, &[]),
        ] {
            let piece = |&(at, len)| Piece { at: Gpa(at), len };
            let mut pieces: Vec<_> = three.iter().map(piece).collect();
            skip(&mut pieces, n);
            assert_eq!(pieces, left.iter().map(piece).collect::<Vec<_>>(), "{n}");
        }
    }
}
