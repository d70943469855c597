//! What a request asks of the file, checked.
//!
//! Invariant: a plan touches nothing outside of the capacity, and changes nothing that is read-only. What is refused
//! has changed nothing.

use super::device::{Access, Flushing};
use super::disk::{Disk, Failed, RANGE_SECTORS_MAX, RANGES_MAX};
use super::spec::{Header, ID_LEN, Operation, RANGE_LEN, RANGE_UNMAP, Range, SECTOR, Status};
use crate::{Buffers, Chain};

/// What is to be done.
#[derive(Debug)]
pub(super) enum Plan<'m> {
    /// Fill `into` from byte `at`.
    Read { at: u64, into: Buffers<'m> },
    /// Write `from` to byte `at`.
    Write { at: u64, from: Buffers<'m> },
    /// Make what was written durable.
    Flush,
    /// Fill in the file's identifier.
    GetId { into: Buffers<'m> },
    /// Put zeros there.
    Clear { holes: Vec<Hole> },
    /// No more than to say so.
    Nothing,
}

/// Bytes that are to be zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hole {
    pub(super) at: u64,
    pub(super) len: u64,
    /// And what they take is given back.
    pub(super) give_back: bool,
}

impl Disk {
    /// What `chain`, whose status byte was taken from it, asks for.
    pub(super) fn plan<'m>(
        &self,
        chain: &mut Chain<'m>,
        input: Buffers<'m>,
        flushing: Flushing,
    ) -> Result<Plan<'m>, Failed> {
        let header = chain.readable.read_array().map(Header::parse);
        let header = header.ok_or(Failed::Invalid(Status::IoError))?;
        let output = std::mem::take(&mut chain.readable);
        match header.operation {
            Operation::Read => Ok(Plan::Read {
                at: self.place(header.sector, input.len() as u64)?,
                into: input,
            }),
            Operation::Write => {
                self.check_writable()?;
                Ok(Plan::Write {
                    at: self.place(header.sector, output.len() as u64)?,
                    from: output,
                })
            }
            Operation::Flush if flushing == Flushing::Never => Ok(Plan::Nothing),
            Operation::Flush => Ok(Plan::Flush),
            // §5.2.6: the buffer is 20 bytes.
            Operation::GetId if input.len() < ID_LEN => Err(Failed::Invalid(Status::IoError)),
            Operation::GetId => Ok(Plan::GetId { into: input }),
            Operation::Discard | Operation::WriteZeroes => Ok(Plan::Clear {
                holes: self.holes(header.operation, output)?,
            }),
            Operation::Other => Err(Failed::Invalid(Status::Unsupported)),
        }
    }

    fn holes(&self, operation: Operation, mut output: Buffers<'_>) -> Result<Vec<Hole>, Failed> {
        let invalid = |status| Err(Failed::Invalid(status));
        self.check_writable()?;
        if !output.len().is_multiple_of(RANGE_LEN) || output.len() > RANGE_LEN * RANGES_MAX as usize
        {
            return invalid(Status::IoError);
        }
        let mut holes = Vec::with_capacity(output.len() / RANGE_LEN);
        while let Some(range) = output.read_array().map(Range::parse) {
            let give_back = match (operation, range.flags) {
                (Operation::Discard, 0) | (Operation::WriteZeroes, RANGE_UNMAP) => true,
                (Operation::WriteZeroes, 0) => false,
                // §5.2.6.2: flags that the device does not know.
                _ => return invalid(Status::Unsupported),
            };
            if range.sectors > RANGE_SECTORS_MAX {
                return invalid(Status::IoError);
            }
            let len = u64::from(range.sectors) * SECTOR;
            let at = self.place(range.sector, len)?;
            if len > 0 {
                holes.push(Hole { at, len, give_back });
            }
        }
        Ok(holes)
    }

    fn check_writable(&self) -> Result<(), Failed> {
        match self.access {
            Access::ReadOnly => Err(Failed::Invalid(Status::IoError)),
            Access::ReadWrite => Ok(()),
        }
    }

    /// Byte offset of `len` bytes at `sector`, all of them on the disk.
    fn place(&self, sector: u64, len: u64) -> Result<u64, Failed> {
        if !len.is_multiple_of(SECTOR) {
            return Err(Failed::Invalid(Status::IoError));
        }
        sector
            .checked_add(len / SECTOR)
            .filter(|&end| end <= self.sectors)
            .and_then(|_| sector.checked_mul(SECTOR))
            .ok_or(Failed::Invalid(Status::IoError))
    }
}
