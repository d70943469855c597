//! The initial RAM disk: read straight into the top of low memory.

use std::path::Path;

use ram::{Gpa, GuestMemory};
use vm_memory::Bytes;

use crate::Error;

const PAGE: u64 = 4096;

/// An initial RAM disk in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Initrd {
    /// Its first byte, on a page boundary.
    pub(crate) start: Gpa,
    /// Its length in bytes.
    pub(crate) len: u32,
}

/// Loads the file at `path` as high as it goes below `top`, at or above `floor`.
pub(crate) fn load(
    memory: &GuestMemory,
    floor: u64,
    top: u64,
    path: &Path,
) -> Result<Initrd, Error> {
    let open_failed = |source| Error::OpenInitrd {
        path: path.into(),
        source,
    };
    let (mut file, len) = super::kernel::open_regular(path).map_err(open_failed)?;
    if len == 0 {
        return Err(Error::InitrdEmpty { path: path.into() });
    }
    let start = top
        .checked_sub(len)
        .map(|start| start / PAGE * PAGE)
        .filter(|&at| at >= floor);
    let (Some(start), Ok(len)) = (start, u32::try_from(len)) else {
        let room = top.saturating_sub(floor.next_multiple_of(PAGE));
        return Err(Error::InitrdTooLarge {
            path: path.into(),
            len,
            room,
        });
    };
    ram::populate(memory, Gpa(start), u64::from(len));
    memory
        .read_exact_volatile_from(Gpa(start), &mut file, len as usize)
        .map_err(|source| Error::LoadInitrd {
            path: path.into(),
            source,
        })?;
    Ok(Initrd {
        start: Gpa(start),
        len,
    })
}
