//! Finding out what a kernel image is, whether it fits, and reading it straight
//! into guest memory.
//!
//! Every number of a header is checked here against the file and the memory
//! before the loader uses it: the image is hostile until shown otherwise.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use ram::{Gpa, GuestMemory};
use rustix::fs::OFlags;

use crate::Error;
use crate::layout::HIMEM_START;

/// Bytes of an ELF-64 header and of one program header.
const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
/// More segments than any kernel has; bounds what a hostile header costs.
const PROGRAM_HEADERS_MAX: u16 = 64;
/// More notes than any kernel has.
const NOTES_MAX: u64 = 64 << 10;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_X86_64: u16 = 62;
/// Offset of the 64-bit entry point in a bzImage's protected-mode part.
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// Boot protocol 2.12 has `xloadflags`.
const PROTOCOL_MIN: u16 = 0x020c;
/// Bytes that hold a bzImage's setup header.
const SETUP_HEADER_END: usize = 0x1f1 + size_of::<setup_header>();

/// A kernel in guest memory.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Its 64-bit entry point.
    pub(crate) entry: Gpa,
    /// First address that it leaves alone before it has read its memory map.
    pub(crate) end: u64,
    /// A bzImage's own header, which goes into the zero page.
    pub(crate) header: Option<setup_header>,
}

/// Opens a regular file for reading; never blocks on a pipe's other end.
///
/// Returns it with its length in bytes, or the reason in `Err`.
pub(super) fn open_regular(path: &Path) -> std::io::Result<(File, u64)> {
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options()
        .read(true)
        .custom_flags(nonblocking)
        .open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(std::io::ErrorKind::IsADirectory.into());
    }
    if !metadata.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    Ok((file, metadata.len()))
}

/// Loads the kernel at `path`, `low_end` being the end of the low memory region.
pub(crate) fn load(memory: &GuestMemory, low_end: u64, path: &Path) -> Result<Kernel, Error> {
    let (mut file, len) = open_regular(path).map_err(|source| Error::OpenKernel {
        path: path.into(),
        source,
    })?;
    if len == 0 {
        return Err(Error::KernelEmpty { path: path.into() });
    }
    let mut head = Vec::with_capacity(4096);
    (&mut file)
        .take(4096)
        .read_to_end(&mut head)
        .map_err(|source| Error::OpenKernel {
            path: path.into(),
            source,
        })?;

    let image = Image { path, len, low_end };
    if head.starts_with(b"\x7fELF") {
        let segments = image.check_elf(&head, &mut file)?;
        for segment in &segments {
            ram::populate(memory, segment.start, segment.file_len);
        }
        // The loader passes over those of which nothing is in the file.
        let end = segments.iter().map(|segment| segment.end).max();
        let loaded = Elf::load(memory, None, &mut file, Some(Gpa(HIMEM_START)));
        let loaded = loaded.map_err(|source| image.load_failed(source))?;
        Ok(Kernel {
            entry: loaded.kernel_load,
            end: end.unwrap_or(0).max(loaded.kernel_end),
            header: None,
        })
    } else if head.get(0x202..0x206) == Some(b"HdrS") {
        let end = image.check_bzimage(&head)?;
        ram::populate(memory, Gpa(HIMEM_START), len);
        let loaded = BzImage::load(memory, Some(Gpa(HIMEM_START)), &mut file, None);
        let loaded = loaded.map_err(|source| image.load_failed(source))?;
        let entry = Gpa(loaded.kernel_load.0 + BZIMAGE_ENTRY_64);
        Ok(Kernel {
            entry,
            end: end.max(loaded.kernel_end),
            header: loaded.setup_header,
        })
    } else {
        Err(Error::KernelFormat { path: path.into() })
    }
}

/// A part of an ELF kernel, in memory.
struct Segment {
    start: Gpa,
    /// First address behind it.
    end: u64,
    /// Bytes at its start that come from the file; the rest is zero.
    file_len: u64,
}

/// What headers are checked against.
struct Image<'a> {
    path: &'a Path,
    len: u64,
    low_end: u64,
}

impl Image<'_> {
    fn load_failed(&self, source: linux_loader::loader::Error) -> Error {
        Error::LoadKernel {
            path: self.path.into(),
            source,
        }
    }

    fn header(&self, fault: &'static str) -> Error {
        Error::KernelHeader {
            path: self.path.into(),
            fault,
        }
    }

    /// `[offset, offset + len)` must lie in the file.
    fn within_file(&self, offset: u64, len: u64) -> Result<(), Error> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Error::KernelTruncated {
                path: self.path.into(),
                len: self.len,
            }),
        }
    }

    /// `[start, start + len)` must lie in low memory, above what boot writes.
    fn within_memory(&self, start: u64, len: u64) -> Result<u64, Error> {
        if start < HIMEM_START {
            return Err(self.header("it wants to be loaded below 1 MiB"));
        }
        match start.checked_add(len) {
            Some(end) if end <= self.low_end => Ok(end),
            end => Err(Error::KernelTooLarge {
                path: self.path.into(),
                end: end.unwrap_or(u64::MAX),
                memory: self.low_end,
            }),
        }
    }

    /// Returns its segments.
    fn check_elf(&self, head: &[u8], file: &mut File) -> Result<Vec<Segment>, Error> {
        self.within_file(0, ELF_HEADER)?;
        let (class, data) = (field::<1>(head, 4), field::<1>(head, 5));
        if (class, data, u16_at(head, 18)) != ([2], [1], EM_X86_64) {
            return Err(self.header("it is not an ELF file for 64-bit x86"));
        }
        let (entry, table) = (u64_at(head, 24), u64_at(head, 32));
        let (entry_size, count) = (u16_at(head, 54), u16_at(head, 56));
        if u64::from(entry_size) != PROGRAM_HEADER || table < ELF_HEADER {
            return Err(self.header("its program headers are malformed"));
        }
        if count == 0 || count > PROGRAM_HEADERS_MAX {
            return Err(self.header("it has no program headers, or too many"));
        }
        let table_len = PROGRAM_HEADER * u64::from(count);
        self.within_file(table, table_len)?;
        let segments = read_at(file, table, table_len).map_err(|source| Error::OpenKernel {
            path: self.path.into(),
            source,
        })?;

        let mut entry_is_loaded = false;
        let mut loaded = Vec::new();
        for segment in segments.chunks_exact(PROGRAM_HEADER as usize) {
            let (offset, start) = (u64_at(segment, 8), u64_at(segment, 24));
            let (file_len, memory_len) = (u64_at(segment, 32), u64_at(segment, 40));
            match u32_at(segment, 0) {
                PT_LOAD if memory_len == 0 && file_len == 0 => {}
                PT_LOAD => {
                    if file_len > memory_len {
                        return Err(self.header("a segment is longer in the file than in memory"));
                    }
                    self.within_file(offset, file_len)?;
                    let end = self.within_memory(start, memory_len)?;
                    entry_is_loaded |= (start..end).contains(&entry);
                    loaded.push(Segment {
                        start: Gpa(start),
                        end,
                        file_len,
                    });
                }
                PT_NOTE => {
                    self.within_file(offset, file_len)?;
                    if file_len > NOTES_MAX {
                        return Err(self.header("its notes are too long"));
                    }
                }
                _ => {}
            }
        }
        if !entry_is_loaded {
            return Err(self.header("its entry point is in none of its segments"));
        }
        Ok(loaded)
    }

    /// Returns the first address that unpacking leaves alone.
    fn check_bzimage(&self, head: &[u8]) -> Result<u64, Error> {
        self.within_file(0, SETUP_HEADER_END as u64)?;
        let version = u16_at(head, 0x206);
        let [load_flags] = field::<1>(head, 0x211);
        if version < PROTOCOL_MIN
            || load_flags & LOADED_HIGH == 0
            || u16_at(head, 0x236) & XLF_KERNEL_64 == 0
        {
            return Err(self.header("it lacks the 64-bit entry point of boot protocol 2.12"));
        }
        let [sectors] = field::<1>(head, 0x1f1);
        let setup_len = (u64::from(if sectors == 0 { 4 } else { sectors }) + 1) * 512;
        let packed_len = u64::from(u32_at(head, 0x1f4)) * 16;
        if packed_len <= BZIMAGE_ENTRY_64 {
            return Err(self.header("its protected-mode part is empty"));
        }
        self.within_file(setup_len, packed_len)?;
        self.within_memory(HIMEM_START, self.len - setup_len)?;
        // It unpacks itself where it prefers to run, in init_size bytes.
        let run_at = u64_at(head, 0x258).max(HIMEM_START);
        self.within_memory(run_at, u64::from(u32_at(head, 0x260)))
    }
}

fn read_at(file: &File, offset: u64, len: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, offset)?;
    Ok(bytes)
}

/// Bytes of a header; those beyond its end are zero.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    for (out, byte) in out.iter_mut().zip(bytes.get(at..).unwrap_or_default()) {
        *out = *byte;
    }
    out
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}
