//! The file behind a drive, and how requests are done on it: from guest memory to the file
//! and back without a copy.
//!
//! Invariant: nothing outside of the capacity at opening is read or written; every request
//! that is done gets a status, and a failed one never panics. Who must not wait does not:
//! [`Patience::None`] does only what the host does from memory, [`Patience::Little`] also
//! what it did so a moment ago where it cannot say (`pace`).

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ram::volatile::{self, Slice, Wait};
use rustix::fs::FallocateFlags;
use rustix::io::retry_on_intr;

use super::counters::Metrics;
use super::device::{Access, Flushing};
use super::pace::Pace;
use super::plan::{Hole, Plan};
use super::spec::{HEADER_LEN, Header, ID_LEN, Operation, SECTOR, Status};
use crate::counters::{add, count};
use crate::{Buffers, Chain, Error};

/// 2 GiB a range.
pub(super) const RANGE_SECTORS_MAX: u32 = 1 << 22;
pub(super) const RANGES_MAX: u32 = 32;

/// The file and what is known of it.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) access: Access,
    pub(super) id: [u8; ID_LEN],
    pub(super) sectors: u64,
    pub(super) metrics: Arc<Metrics>,
    /// What its file system can do without a wait.
    at_once: AtOnce,
    #[cfg(test)]
    pub(super) gate: std::sync::Mutex<Option<Arc<super::gate::Gate>>>,
}

/// Whether the host says "not now" in place of waiting.
#[derive(Debug)]
struct AtOnce {
    /// It is in memory: nothing of it waits for a disk.
    all: bool,
    /// Reads, as far as is known.
    reads: AtomicBool,
    /// Writes.
    writes: AtomicBool,
    /// How writes went, where it does not.
    pace: Pace,
}

impl AtOnce {
    fn knows(&self, moves: Moves) -> &AtomicBool {
        match moves {
            Moves::In => &self.reads,
            Moves::Out { .. } => &self.writes,
        }
    }

    fn known(&self, moves: Moves) -> bool {
        self.knows(moves).load(Ordering::Relaxed)
    }

    fn forget(&self, moves: Moves) {
        self.knows(moves).store(false, Ordering::Relaxed);
    }
}

/// Which way data go.
#[derive(Clone, Copy, Debug)]
enum Moves {
    /// From the disk to the guest.
    In,
    /// To the disk, since then.
    Out { start: Instant },
}

/// Whether who asks may be kept waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// Not at all: a vCPU or the event loop, if others are at hand that nobody waits for.
    None,
    /// Hardly ever: a vCPU or the event loop, if the next one is slower to come.
    Little,
    /// For as long as the disk needs.
    Endless,
}

/// The request is not done, as it takes more [`Patience`]. It may have been begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TakesTime;

/// Why a request fails, or is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    TakesTime,
    /// The driver asks for what cannot be.
    Invalid(Status),
    /// The host says no.
    Host(Status),
}

/// A failed request, as the guest learns of it.
impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock => Failed::TakesTime,
            io::ErrorKind::Unsupported => Failed::Host(Status::Unsupported),
            _ => Failed::Host(Status::IoError),
        }
    }
}

/// A request, read.
#[derive(Debug)]
pub(super) struct Asked<'m> {
    pub(super) plan: Result<Plan<'m>, Failed>,
    /// Where the status goes.
    pub(super) status: Buffers<'m>,
}

impl Disk {
    pub(super) fn open(path: &Path, access: Access, metrics: Arc<Metrics>) -> Result<Self, Error> {
        let failed = |source| Error::OpenDisk {
            path: path.into(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::NotADisk { path: path.into() });
        }
        // A block device has no length in its metadata.
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if !len.is_multiple_of(SECTOR) {
            tracing::warn!(?path, len, "the end of the disk does not fill a sector");
        }
        // As Firecracker: the same file has the same name in each machine.
        let (dev, rdev, ino) = (metadata.dev(), metadata.rdev(), metadata.ino());
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(format!("{dev}{rdev}{ino}").bytes()) {
            *to = from;
        }
        Ok(Self {
            path: path.into(),
            at_once: AtOnce {
                all: kind.is_file() && is_in_memory(&file),
                reads: AtomicBool::new(true),
                writes: AtomicBool::new(true),
                pace: Pace::new(),
            },
            file,
            access,
            id,
            sectors: len / SECTOR,
            metrics,
            #[cfg(test)]
            gate: std::sync::Mutex::default(),
        })
    }

    /// Does one request, or nothing that its driver could notice; returns how many bytes
    /// were filled in.
    pub(super) fn serve(
        &self,
        chain: Chain<'_>,
        flushing: Flushing,
        patience: Patience,
    ) -> Result<u32, TakesTime> {
        #[cfg(test)]
        self.pass_gate(patience)?;
        let Some(Asked { plan, mut status }) = self.read(chain, flushing) else {
            return Ok(0);
        };
        let request = Request {
            disk: self,
            flushing,
            patience,
        };
        let (done, filled) = match plan {
            Ok(plan) => request.execute(plan),
            Err(failed) => (Err(failed), 0),
        };
        if patience != Patience::Endless && done == Err(Failed::TakesTime) {
            return Err(TakesTime);
        }
        status.write(&[self.status(done) as u8]);
        // Chains are shorter than 2^32 bytes.
        Ok(filled as u32 + 1)
    }

    /// What a request asks for; nothing where there is no room to say how it went.
    pub(super) fn read<'m>(&self, mut chain: Chain<'m>, flushing: Flushing) -> Option<Asked<'m>> {
        // §5.2.6: the status is the last byte that the device may write.
        let Some(room) = chain.writable.len().checked_sub(1) else {
            tracing::debug!(head = chain.head, "disk request without a status byte");
            count(&self.metrics.counters.invalid_reqs_count);
            return None;
        };
        let input = chain.writable.take(room);
        let plan = self.plan(&mut chain, input, flushing);
        Some(Asked {
            plan,
            status: chain.writable,
        })
    }

    /// How the guest learns of what became of a request; counts it.
    pub(super) fn status(&self, done: Result<(), Failed>) -> Status {
        let counters = &self.metrics.counters;
        match done {
            Ok(()) => Status::Ok,
            Err(Failed::Invalid(status)) => {
                count(&counters.invalid_reqs_count);
                status
            }
            Err(Failed::Host(status)) => {
                count(&counters.execute_fails);
                status
            }
            // No file says so to who waits.
            Err(Failed::TakesTime) => Status::IoError,
        }
    }

    /// How a read or a write may wait.
    fn wait(&self, patience: Patience, moves: Moves) -> Result<Wait, Failed> {
        if patience == Patience::Endless || self.at_once.all {
            return Ok(Wait::AsLongAsItTakes);
        }
        match (self.at_once.known(moves), moves) {
            (true, _) => Ok(Wait::NotAtAll),
            (false, Moves::Out { start })
                if patience == Patience::Little && self.at_once.pace.is_quick(start) =>
            {
                Ok(Wait::AsLongAsItTakes)
            }
            (false, Moves::In | Moves::Out { .. }) => Err(Failed::TakesTime),
        }
    }
}

/// One request that is being done.
#[derive(Clone, Copy)]
struct Request<'d> {
    disk: &'d Disk,
    flushing: Flushing,
    patience: Patience,
}

impl Request<'_> {
    fn execute(self, plan: Plan<'_>) -> (Result<(), Failed>, usize) {
        let done = match plan {
            Plan::Read { at, into } => return self.read(at, into),
            Plan::GetId { mut into } => return (Ok(()), into.write(&self.disk.id)),
            Plan::Write { at, from } => self.write(at, from),
            Plan::Flush => self.flush(),
            Plan::Clear { holes } => self.clear(&holes),
            Plan::Nothing => Ok(()),
        };
        (done, 0)
    }

    fn read(self, at: u64, mut input: Buffers<'_>) -> (Result<(), Failed>, usize) {
        let (start, wanted) = (Instant::now(), input.len());
        let file = &self.disk.file;
        let done = self.transfer(&mut input, at, Moves::In, |into, at, wait| {
            volatile::read_at(file, into, at, wait)
        });
        let read = wanted - input.len();
        match done {
            Ok(()) => self.disk.count_read(start, read),
            Err(Failed::Host(_)) => tracing::debug!(at, "disk read failed"),
            Err(Failed::TakesTime | Failed::Invalid(_)) => {}
        }
        (done, read)
    }

    fn write(self, at: u64, mut output: Buffers<'_>) -> Result<(), Failed> {
        let (start, wanted) = (Instant::now(), output.len());
        if self.flushing == Flushing::EachWrite {
            self.take_time()?;
        }
        let file = &self.disk.file;
        let moves = Moves::Out { start };
        let moved = self.transfer(&mut output, at, moves, |from, at, wait| {
            volatile::write_at(file, from, at, wait)
        });
        self.disk.at_once.pace.done(start, Instant::now());
        moved?;
        self.written()?;
        self.disk.count_write(start, wanted);
        Ok(())
    }

    /// Moves all of `data` by `call`, which moves a part.
    fn transfer(
        self,
        data: &mut Buffers<'_>,
        mut at: u64,
        moves: Moves,
        call: impl Fn(&[Slice<'_>], u64, Wait) -> io::Result<usize>,
    ) -> Result<(), Failed> {
        while !data.is_empty() {
            let wait = self.disk.wait(self.patience, moves)?;
            match call(data.pieces(), at, wait) {
                // The file became shorter under us.
                Ok(0) => return Err(Failed::Host(Status::IoError)),
                Ok(n) => {
                    data.take(n);
                    at += n as u64;
                }
                Err(error) if wait == Wait::NotAtAll && is_unknown(&error) => {
                    self.disk.at_once.forget(moves);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// After each change.
    fn written(self) -> Result<(), Failed> {
        match self.flushing {
            Flushing::EachWrite => self.sync(),
            Flushing::Never | Flushing::Asked => Ok(()),
        }
    }

    fn flush(self) -> Result<(), Failed> {
        self.sync()?;
        self.disk.count_flush();
        Ok(())
    }

    fn sync(self) -> Result<(), Failed> {
        match self.disk.access {
            Access::ReadOnly => Ok(()),
            Access::ReadWrite => {
                self.take_time()?;
                Ok(self.disk.file.sync_data()?)
            }
        }
    }

    fn clear(self, holes: &[Hole]) -> Result<(), Failed> {
        self.take_time()?;
        for hole in holes {
            let how = if hole.give_back {
                FallocateFlags::PUNCH_HOLE
            } else {
                FallocateFlags::ZERO_RANGE
            };
            // The guest falls back to writing zeros where the host cannot.
            let flags = how | FallocateFlags::KEEP_SIZE;
            retry_on_intr(|| rustix::fs::fallocate(&self.disk.file, flags, hole.at, hole.len))
                .map_err(io::Error::from)?;
        }
        self.written()
    }

    /// What follows may wait for the disk.
    fn take_time(self) -> Result<(), Failed> {
        match self.patience {
            Patience::None | Patience::Little if !self.disk.at_once.all => Err(Failed::TakesTime),
            Patience::None | Patience::Little | Patience::Endless => Ok(()),
        }
    }
}

#[cfg(test)]
impl Disk {
    /// Is as on a file system that cannot say whether a write would wait.
    pub(super) fn know_no_writes_at_once(&mut self) {
        self.at_once.all = false;
        self.at_once.forget(Moves::Out {
            start: Instant::now(),
        });
    }
}

impl Disk {
    /// A read of `bytes` that began at `start` is done.
    pub(super) fn count_read(&self, start: Instant, bytes: usize) {
        count(&self.metrics.counters.read_count);
        add(&self.metrics.counters.read_bytes, bytes);
        self.metrics.read_agg.add(start);
    }

    /// A write of `bytes` that began at `start` is done.
    pub(super) fn count_write(&self, start: Instant, bytes: usize) {
        count(&self.metrics.counters.write_count);
        add(&self.metrics.counters.write_bytes, bytes);
        self.metrics.write_agg.add(start);
    }

    /// A flush is done.
    pub(super) fn count_flush(&self) {
        count(&self.metrics.counters.flush_count);
    }
}

/// What a request costs in bytes: only what moves between guest and disk does.
pub(super) fn data_bytes(chain: &Chain<'_>) -> u64 {
    let header = chain.readable.clone().read_array().map(Header::parse);
    let bytes = match header.map(|header| header.operation) {
        Some(Operation::Read) => chain.writable.len().saturating_sub(1),
        Some(Operation::Write) => chain.readable.len().saturating_sub(HEADER_LEN),
        Some(
            Operation::Flush
            | Operation::GetId
            | Operation::Discard
            | Operation::WriteZeroes
            | Operation::Other,
        )
        | None => 0,
    };
    bytes as u64
}

/// Whether the file system keeps its files in memory: it then knows no "not now".
fn is_in_memory(file: &File) -> bool {
    /// linux/magic.h: TMPFS_MAGIC and RAMFS_MAGIC.
    const MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
    rustix::fs::fstatfs(file).is_ok_and(|of| MEMORY.contains(&(of.f_type as u64)))
}

/// Whether the file system cannot say "not now" to this.
fn is_unknown(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
}
