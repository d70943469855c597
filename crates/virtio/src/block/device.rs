//! The disk itself: requests are served inside of the notification, from guest
//! memory to the file without a copy.
//!
//! Invariant: nothing outside of the capacity at opening is read or written;
//! every request gets a status, and a failed one never panics.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use ram::{GuestMemory, volatile};
use rustix::fs::FallocateFlags;
use rustix::io::retry_on_intr;

use super::spec::{
    Config, F_BLK_SIZE, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX, F_WRITE_ZEROES, Header, ID_LEN,
    Operation, RANGE_LEN, RANGE_UNMAP, Range, SECTOR, Status,
};
use crate::{Activation, Buffers, Chain, DeviceType, Error, QueueError, VirtQueue, VirtioDevice};

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
    /// Writes reach the file; a flush makes them durable.
    ReadWrite,
}

/// A disk.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    state: State,
}

#[derive(Debug)]
enum State {
    Idle,
    Live {
        memory: GuestMemory,
        queue: VirtQueue,
    },
}

/// The file and what is known of it.
#[derive(Debug)]
struct Disk {
    file: File,
    access: Access,
    id: [u8; ID_LEN],
    sectors: u64,
    /// The driver knows no flush, so that each write must be durable.
    write_through: bool,
}

impl Block {
    /// Opens `path`, whose length at this moment is the disk's capacity; what does
    /// not fill a sector of 512 bytes at its end is left out. The guest sees the
    /// first 20 bytes of `id` as serial number.
    ///
    /// # Errors
    /// [`Error::OpenDisk`], [`Error::NotADisk`].
    pub fn open(path: &Path, access: Access, id: &str) -> Result<Self, Error> {
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .open(path)
            .map_err(|source| Error::OpenDisk {
                path: path.into(),
                source,
            })?;
        Self::from_file(file, path, access, id)
    }

    /// As [`Block::open`], for a file that is open already; `path` is for errors.
    ///
    /// # Errors
    /// [`Error::OpenDisk`], [`Error::NotADisk`].
    pub fn from_file(mut file: File, path: &Path, access: Access, id: &str) -> Result<Self, Error> {
        let failed = |source| Error::OpenDisk {
            path: path.into(),
            source,
        };
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::NotADisk { path: path.into() });
        }
        // A block device has no length in its metadata.
        let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if !len.is_multiple_of(SECTOR) {
            tracing::warn!(?path, len, "the end of the disk does not fill a sector");
        }
        let mut serial = [0; ID_LEN];
        for (to, from) in serial.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        let disk = Disk {
            file,
            access,
            id: serial,
            sectors: len / SECTOR,
            write_through: false,
        };
        Ok(Self {
            disk,
            state: State::Idle,
        })
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.disk.sectors
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
        access | F_SEG_MAX | F_BLK_SIZE | F_FLUSH
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
        self.disk.write_through = activation.features & F_FLUSH == 0;
        self.state = match activation.queues.into_iter().next() {
            Some(queue) => State::Live {
                memory: activation.memory,
                queue,
            },
            None => State::Idle,
        };
        Ok(())
    }

    fn notify(&mut self, _queue: u16) -> Result<(), QueueError> {
        match &mut self.state {
            State::Idle => Ok(()),
            State::Live { memory, queue } => queue.serve(memory, |chain| self.disk.serve(chain)),
        }
    }

    fn reset(&mut self) {
        self.state = State::Idle;
    }
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
        if self.write_through {
            self.flush()
        } else {
            Ok(())
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
        if self.write_through {
            self.flush()
        } else {
            Ok(())
        }
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
