//! The disk itself: requests are served inside of the notification, from guest
//! memory to the file without a copy. Those that have to wait for the rate limiter stay
//! in the queue until its timer.
//!
//! Invariant: nothing outside of the capacity at opening is read or written;
//! every request gets a status, and a failed one never panics.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use ram::{GuestMemory, volatile};
use rustix::fs::FallocateFlags;
use rustix::io::retry_on_intr;

use super::saved::SavedBlock;
use super::spec::{
    Config, F_BLK_SIZE, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX, F_WRITE_ZEROES, HEADER_LEN, Header,
    ID_LEN, Operation, RANGE_LEN, RANGE_UNMAP, Range, SECTOR, Status,
};
use crate::rate_limiter::{Limits, RateLimiter};
use crate::{
    Activation, Buffers, Chain, DeviceType, Error, EventSource, Interrupt, QueueError, SavedDevice,
    VirtQueue, VirtioDevice,
};

const QUEUE_SIZE: u16 = 256;
/// A request is its segments, a header and a status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// 2 GiB a range.
const RANGE_SECTORS_MAX: u32 = 1 << 22;
const RANGES_MAX: u32 = 32;

/// What the guest may do with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Writes fail.
    ReadOnly,
    /// Writes reach the file.
    ReadWrite,
}

/// What the guest is told of the cache between it and the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Nothing: it cannot flush, and what it wrote is as durable as the host's cache.
    Unsafe,
    /// A flush makes writes durable.
    Writeback,
}

/// A disk.
#[derive(Debug)]
pub struct Block {
    pub(super) disk: Disk,
    pub(super) cache: Cache,
    pub(super) limiter: RateLimiter,
    pub(super) state: State,
}

#[derive(Debug)]
pub(super) enum State {
    Idle,
    Live {
        memory: GuestMemory,
        queue: VirtQueue,
        interrupt: Interrupt,
    },
}

/// The file and what is known of it.
#[derive(Debug)]
pub(super) struct Disk {
    path: PathBuf,
    file: File,
    access: Access,
    id: [u8; ID_LEN],
    pub(super) sectors: u64,
    pub(super) flushing: Flushing,
}

/// When written data become durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flushing {
    /// When the host likes.
    Never,
    /// When the driver asks.
    Asked,
    /// The driver was offered a flush and knows none: with each write.
    EachWrite,
}

impl Block {
    /// Opens `path`, whose length at this moment is the disk's capacity; what does
    /// not fill a sector of 512 bytes at its end is left out.
    ///
    /// # Errors
    /// [`Error::OpenDisk`], [`Error::NotADisk`], [`Error::Host`].
    pub fn open(path: &Path, access: Access, cache: Cache, limits: Limits) -> Result<Self, Error> {
        let disk = Disk::open(path, access)?;
        Ok(Self {
            disk,
            cache,
            limiter: RateLimiter::new(limits)?,
            state: State::Idle,
        })
    }

    /// Puts the file at `path` in place of the one there is, or looks at its length anew if
    /// it is the same; tells the driver. What was written before may not be durable.
    ///
    /// # Errors
    /// [`Error::OpenDisk`], [`Error::NotADisk`]: nothing has changed then.
    pub fn update_path(&mut self, path: &Path) -> Result<(), Error> {
        let flushing = self.disk.flushing;
        self.disk = Disk::open(path, self.disk.access)?;
        self.disk.flushing = flushing;
        if let State::Live { interrupt, .. } = &self.state {
            interrupt.config_changed();
        }
        Ok(())
    }

    /// Replaces the limits that `limits` names; see [`RateLimiter::update`].
    pub fn update_limiter(&mut self, limits: Limits) {
        self.limiter.update(limits);
    }

    /// The limits that there are.
    pub fn limits(&self) -> Limits {
        self.limiter.limits()
    }

    /// The file behind it.
    pub fn path(&self) -> &Path {
        &self.disk.path
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.disk.sectors
    }
}

impl Disk {
    fn open(path: &Path, access: Access) -> Result<Self, Error> {
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .open(path)
            .map_err(|source| Error::OpenDisk {
                path: path.into(),
                source,
            })?;
        Self::of(file, path, access)
    }

    fn of(mut file: File, path: &Path, access: Access) -> Result<Self, Error> {
        let failed = |source| Error::OpenDisk {
            path: path.into(),
            source,
        };
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
            file,
            access,
            id,
            sectors: len / SECTOR,
            flushing: Flushing::Never,
        })
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let access = match self.disk.access {
            Access::ReadOnly => F_RO,
            Access::ReadWrite => F_DISCARD | F_WRITE_ZEROES,
        };
        let cache = match self.cache {
            Cache::Unsafe => 0,
            Cache::Writeback => F_FLUSH,
        };
        access | cache | F_SEG_MAX | F_BLK_SIZE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config {
            sectors: self.disk.sectors,
            segments_max: SEGMENTS_MAX,
            block_size: SECTOR as u32,
            range_sectors_max: RANGE_SECTORS_MAX,
            ranges_max: RANGES_MAX,
        };
        crate::device::copy_config(&config.bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        self.disk.flushing = match self.cache {
            Cache::Unsafe => Flushing::Never,
            Cache::Writeback if activation.features & F_FLUSH == 0 => Flushing::EachWrite,
            Cache::Writeback => Flushing::Asked,
        };
        self.state = match activation.queues.into_iter().next() {
            Some(queue) => State::Live {
                memory: activation.memory,
                queue,
                interrupt: activation.interrupt,
            },
            None => State::Idle,
        };
        Ok(())
    }

    fn notify(&mut self, _queue: u16) -> Result<(), QueueError> {
        let State::Live { memory, queue, .. } = &mut self.state else {
            return Ok(());
        };
        loop {
            while let Some(chain) = queue.pop(memory)? {
                if !self.limiter.allow(data_bytes(&chain)) {
                    // The timer brings us back; until then no kick is of use.
                    queue.undo_pop();
                    return queue.signal(memory);
                }
                let head = chain.head;
                let written = self.disk.serve(chain);
                queue.complete(memory, head, written)?;
            }
            if !queue.want_kick(memory)? {
                return queue.signal(memory);
            }
        }
    }

    fn reset(&mut self) {
        self.state = State::Idle;
    }

    fn save(&mut self) -> Result<SavedDevice, Error> {
        Ok(SavedDevice::Block(SavedBlock::of(self)))
    }

    fn restore(
        &mut self,
        saved: &SavedDevice,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> Result<(), Error> {
        match saved {
            SavedDevice::Block(saved) => saved.put_into(self, memory, interrupt),
            other => Err(other.misplaced()),
        }
    }
}

impl EventSource for Block {
    fn fd(&self) -> BorrowedFd<'_> {
        self.limiter.fd()
    }

    fn on_event(&mut self) {
        if !self.limiter.acknowledge() {
            return;
        }
        if let Err(error) = self.notify(0) {
            tracing::warn!(%error, "disk needs a reset");
            if let State::Live { interrupt, .. } = &self.state {
                interrupt.needs_reset();
            }
        }
    }
}

/// What a request costs in bytes: only what moves between guest and disk does.
fn data_bytes(chain: &Chain<'_>) -> u64 {
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

/// A failed request, as the guest learns of it.
impl From<io::Error> for Status {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::Unsupported => Status::Unsupported,
            _ => Status::IoError,
        }
    }
}

impl Disk {
    /// Answers one request; returns how many bytes were filled in.
    fn serve(&self, mut chain: Chain<'_>) -> u32 {
        // §5.2.6: the status is the last byte that the device may write.
        let Some(room) = chain.writable.len().checked_sub(1) else {
            tracing::debug!(head = chain.head, "disk request without a status byte");
            return 0;
        };
        let input = chain.writable.take(room);
        let (status, filled) = match chain.readable.read_array().map(Header::parse) {
            Some(header) => self.execute(header, chain.readable, input),
            None => (Status::IoError, 0),
        };
        chain.writable.write(&[status as u8]);
        // Chains are shorter than 2^32 bytes.
        filled as u32 + 1
    }

    /// `output` is the driver's data, `input` is room for ours.
    fn execute(&self, header: Header, output: Buffers<'_>, input: Buffers<'_>) -> (Status, usize) {
        let done = match header.operation {
            Operation::Read => return self.read(header.sector, input),
            Operation::GetId => return self.get_id(input),
            Operation::Write => self.write(header.sector, output),
            Operation::Flush if self.flushing == Flushing::Never => Ok(()),
            Operation::Flush => self.flush(),
            Operation::Discard | Operation::WriteZeroes => self.clear(header.operation, output),
            Operation::Other => Err(Status::Unsupported),
        };
        (done.err().unwrap_or(Status::Ok), 0)
    }

    fn read(&self, sector: u64, mut input: Buffers<'_>) -> (Status, usize) {
        let wanted = input.len();
        let mut at = match self.place(sector, wanted as u64) {
            Ok(at) => at,
            Err(status) => return (status, 0),
        };
        while !input.is_empty() {
            match volatile::read_at(&self.file, input.pieces(), at) {
                // The file became shorter under us.
                Ok(0) => return (Status::IoError, wanted - input.len()),
                Ok(n) => {
                    input.take(n);
                    at += n as u64;
                }
                Err(error) => {
                    tracing::debug!(sector, %error, "disk read failed");
                    return (error.into(), wanted - input.len());
                }
            }
        }
        (Status::Ok, wanted)
    }

    fn write(&self, sector: u64, mut output: Buffers<'_>) -> Result<(), Status> {
        self.check_writable()?;
        let mut at = self.place(sector, output.len() as u64)?;
        while !output.is_empty() {
            let n = volatile::write_at(&self.file, output.pieces(), at)?;
            if n == 0 {
                return Err(Status::IoError);
            }
            output.take(n);
            at += n as u64;
        }
        self.written()
    }

    /// After each change.
    fn written(&self) -> Result<(), Status> {
        match self.flushing {
            Flushing::EachWrite => self.flush(),
            Flushing::Never | Flushing::Asked => Ok(()),
        }
    }

    fn flush(&self) -> Result<(), Status> {
        match self.access {
            Access::ReadOnly => Ok(()),
            Access::ReadWrite => Ok(self.file.sync_data()?),
        }
    }

    fn get_id(&self, mut input: Buffers<'_>) -> (Status, usize) {
        // §5.2.6: the buffer is 20 bytes.
        if input.len() < ID_LEN {
            return (Status::IoError, 0);
        }
        (Status::Ok, input.write(&self.id))
    }

    fn clear(&self, operation: Operation, mut output: Buffers<'_>) -> Result<(), Status> {
        self.check_writable()?;
        if !output.len().is_multiple_of(RANGE_LEN) || output.len() > RANGE_LEN * RANGES_MAX as usize
        {
            return Err(Status::IoError);
        }
        while let Some(range) = output.read_array().map(Range::parse) {
            let how = match (operation, range.flags) {
                (Operation::Discard, 0) | (Operation::WriteZeroes, RANGE_UNMAP) => {
                    FallocateFlags::PUNCH_HOLE
                }
                (Operation::WriteZeroes, 0) => FallocateFlags::ZERO_RANGE,
                // §5.2.6.2: flags that the device does not know.
                _ => return Err(Status::Unsupported),
            };
            if range.sectors > RANGE_SECTORS_MAX {
                return Err(Status::IoError);
            }
            let len = u64::from(range.sectors) * SECTOR;
            let at = self.place(range.sector, len)?;
            if len > 0 {
                // The guest falls back to writing zeros where the host cannot.
                let flags = how | FallocateFlags::KEEP_SIZE;
                retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, at, len))
                    .map_err(io::Error::from)?;
            }
        }
        self.written()
    }

    fn check_writable(&self) -> Result<(), Status> {
        match self.access {
            Access::ReadOnly => Err(Status::IoError),
            Access::ReadWrite => Ok(()),
        }
    }

    /// Byte offset of `len` bytes at `sector`, all of them on the disk.
    fn place(&self, sector: u64, len: u64) -> Result<u64, Status> {
        if !len.is_multiple_of(SECTOR) {
            return Err(Status::IoError);
        }
        sector
            .checked_add(len / SECTOR)
            .filter(|&end| end <= self.sectors)
            .and_then(|_| sector.checked_mul(SECTOR))
            .ok_or(Status::IoError)
    }
}
