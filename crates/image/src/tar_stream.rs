//! A tar stream as entries with everything known about each: ustar, GNU and PAX forms (POSIX.1-2017 `pax`; GNU tar
//! manual, "Basic Tar Format"), sparse files of all their versions.
//!
//! The `tar` crate gives the header's layout and type letters. Its own iterator is not used, because it reads long
//! names and PAX headers of any size into memory and splits PAX records at newlines, which binary values contain.
//!
//! Invariant: what an entry holds in memory is bounded by [`Limits`]; an entry's data never runs into the next header.
//! Left to others: judging names.

use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, Header};

use crate::error::ImageError;
use crate::limits::Limits;
use crate::pax::{self, PaxRecords};

const BLOCK_BYTES: usize = 512;

/// One entry, before its data.
#[derive(Clone, Debug)]
pub(crate) struct TarEntry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: TarKind,
    /// Permission bits with set-id and sticky, no type bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds since the epoch.
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TarKind {
    /// A file of `size` bytes; `extents` says where its data belongs when it has holes.
    File {
        size: u64,
        extents: Option<Vec<Extent>>,
    },
    Directory,
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A run of data in a sparse file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// Reads entries one after another; the data of the current one is read through `Read`.
pub(crate) struct TarStream<R> {
    inner: R,
    limits: Limits,
    /// Data of the current entry not yet read.
    remaining: u64,
    /// Bytes after it up to the next header.
    padding: u64,
}

impl<R: Read> Read for TarStream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(buffer) = buffer.get_mut(..most) else {
            return Ok(0);
        };
        if buffer.is_empty() {
            return Ok(0);
        }
        let count = self.inner.read(buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.remaining = self.remaining.saturating_sub(count as u64);
        Ok(count)
    }
}

impl<R: Read> TarStream<R> {
    pub(crate) fn new(inner: R, limits: Limits) -> Self {
        TarStream {
            inner,
            limits,
            remaining: 0,
            padding: 0,
        }
    }

    /// The next entry, or none at the end of the archive.
    pub(crate) fn next_entry(&mut self) -> Result<Option<TarEntry>, ImageError> {
        let mut long_name = None;
        let mut long_link = None;
        let mut records = PaxRecords::default();
        loop {
            let Some(header) = self.next_header()? else {
                return Ok(None);
            };
            let name = header.path_bytes().into_owned();
            let size = number(&header.as_old().size)
                .ok_or_else(|| ImageError::entry(&name, "has a bad size"))?;
            let size =
                u64::try_from(size).map_err(|_| ImageError::entry(&name, "has a negative size"))?;
            match header.entry_type() {
                EntryType::GNULongName => long_name = Some(self.extension_text(size, &name)?),
                EntryType::GNULongLink => long_link = Some(self.extension_text(size, &name)?),
                EntryType::XHeader => {
                    let data = self.extension(size, &name)?;
                    records =
                        pax::parse(&data).map_err(|reason| ImageError::entry(&name, reason))?;
                }
                EntryType::XGlobalHeader => {
                    // Comments of git archive, mostly; bounded and not applied.
                    self.extension(size, &name)?;
                }
                _ => {
                    let path = records.path.take().or(long_name).unwrap_or(name);
                    let link = records.link_path.take().or(long_link);
                    let entry = self.entry(&header, path, link, size, records)?;
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// Passes over the current entry's data without reading it; the caller moves the stream by that many bytes.
    pub(crate) fn forget_data(&mut self) -> u64 {
        let bytes = self.remaining.saturating_add(self.padding);
        self.remaining = 0;
        self.padding = 0;
        bytes
    }

    fn entry(
        &mut self,
        header: &Header,
        mut path: Vec<u8>,
        link: Option<Vec<u8>>,
        header_size: u64,
        records: PaxRecords,
    ) -> Result<TarEntry, ImageError> {
        if let Some(name) = records.sparse.name.clone() {
            path = name;
        }
        let link = || {
            link.clone()
                .or_else(|| header.link_name_bytes().map(|l| l.into_owned()))
                .unwrap_or_default()
        };
        let size = records.size.unwrap_or(header_size);
        let old = header.as_old();
        let refuse = |reason: &str| ImageError::entry(&path, reason);
        let owner = |field: &[u8], record: Option<u64>| -> Result<u32, ImageError> {
            let value = match record {
                Some(value) => Some(value),
                None => number(field).and_then(|v| u64::try_from(v).ok()),
            };
            value
                .and_then(|v| u32::try_from(v).ok())
                .ok_or_else(|| refuse("has an owner beyond 32 bits"))
        };
        let uid = owner(&old.uid, records.uid)?;
        let gid = owner(&old.gid, records.gid)?;
        let mode = number(&old.mode).ok_or_else(|| refuse("has a bad mode"))?;
        let mode = u16::try_from(mode & 0o7777).map_err(|_| refuse("has a bad mode"))?;
        let mtime = match records.mtime {
            Some(mtime) => mtime,
            None => (
                number(&old.mtime).ok_or_else(|| refuse("has a bad time"))?,
                0,
            ),
        };
        let device = || -> Result<(u32, u32), ImageError> {
            let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
                (Some(h), _) => (number(&h.dev_major), number(&h.dev_minor)),
                (None, Some(h)) => (number(&h.dev_major), number(&h.dev_minor)),
                (None, None) => (None, None),
            };
            let part = |n: Option<i64>, bits: u32| {
                n.and_then(|n| u32::try_from(n).ok())
                    .filter(|n| *n >> bits == 0)
            };
            // Linux device numbers have 12 and 20 bits (new_encode_dev in kdev_t.h).
            match (part(major, 12), part(minor, 20)) {
                (Some(major), Some(minor)) => Ok((major, minor)),
                _ => Err(refuse("has a device number that Linux does not have")),
            }
        };
        let kind = match header.entry_type() {
            // Version 7 tar marks a directory by its name only.
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => {
                TarKind::Directory
            }
            EntryType::Regular | EntryType::Continuous => {
                self.expect_data(size, &path)?;
                self.file(&path, size, &records)?
            }
            EntryType::GNUSparse => {
                let real_size = header.as_gnu().and_then(|h| number(&h.realsize));
                let real_size = real_size
                    .and_then(|s| u64::try_from(s).ok())
                    .ok_or_else(|| refuse("has a bad size"))?;
                let extents = self.gnu_sparse_map(header, &path)?;
                self.expect_data(size, &path)?;
                self.sparse(&path, real_size, extents)?
            }
            // These have no data, whatever their size says (as in Go's archive/tar, which writes most layers).
            EntryType::Directory => TarKind::Directory,
            EntryType::Symlink => TarKind::Symlink(link()),
            EntryType::Link => TarKind::HardLink(link()),
            EntryType::Char => {
                let (major, minor) = device()?;
                TarKind::CharDevice { major, minor }
            }
            EntryType::Block => {
                let (major, minor) = device()?;
                TarKind::BlockDevice { major, minor }
            }
            EntryType::Fifo => TarKind::Fifo,
            other => {
                let letter = char::from(other.as_byte()).escape_default().to_string();
                return Err(refuse(&format!("has the unsupported type '{letter}'")));
            }
        };
        Ok(TarEntry {
            path,
            kind,
            mode,
            uid,
            gid,
            mtime,
            xattrs: records.xattrs,
        })
    }

    fn file(
        &mut self,
        path: &[u8],
        size: u64,
        records: &PaxRecords,
    ) -> Result<TarKind, ImageError> {
        let sparse = &records.sparse;
        if sparse.major == Some(1) {
            let real_size = sparse
                .real_size
                .ok_or_else(|| ImageError::entry(path, "has no sparse size"))?;
            let extents = self.pax_sparse_map(path)?;
            return self.sparse(path, real_size, extents);
        }
        match sparse.real_size {
            Some(real_size) if !sparse.numbers.is_empty() => {
                let extents = self.extents(path, &sparse.numbers)?;
                self.sparse(path, real_size, extents)
            }
            Some(_) | None => Ok(TarKind::File {
                size,
                extents: None,
            }),
        }
    }

    /// Checks a sparse map against the data that follows.
    fn sparse(
        &self,
        path: &[u8],
        size: u64,
        mut extents: Vec<Extent>,
    ) -> Result<TarKind, ImageError> {
        let refuse = || ImageError::entry(path, "has a sparse map that contradicts its size");
        let mut end: u64 = 0;
        let mut bytes: u64 = 0;
        for extent in &extents {
            if extent.offset < end {
                return Err(refuse());
            }
            end = extent.offset.checked_add(extent.bytes).ok_or_else(refuse)?;
            bytes = bytes.checked_add(extent.bytes).ok_or_else(refuse)?;
        }
        if end > size || bytes != self.remaining {
            return Err(refuse());
        }
        // The closing empty extent that marks the end says nothing new.
        extents.retain(|extent| extent.bytes != 0);
        Ok(TarKind::File {
            size,
            extents: Some(extents),
        })
    }

    fn extents(&self, path: &[u8], numbers: &[u64]) -> Result<Vec<Extent>, ImageError> {
        let (pairs, rest) = numbers.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(ImageError::entry(path, "has a bad sparse map"));
        }
        self.check_extent_count(path, pairs.len())?;
        Ok(pairs
            .iter()
            .map(|[offset, bytes]| Extent {
                offset: *offset,
                bytes: *bytes,
            })
            .collect())
    }

    fn check_extent_count(&self, path: &[u8], count: usize) -> Result<(), ImageError> {
        if count <= self.limits.sparse_extents_max {
            return Ok(());
        }
        Err(ImageError::Limit {
            what: format!("sparse map of {:?}", String::from_utf8_lossy(path)),
            limit: "sparse_extents_max",
            max: self.limits.sparse_extents_max as u64,
        })
    }

    /// Old GNU form: four extents in the header, more in blocks after it.
    fn gnu_sparse_map(&mut self, header: &Header, path: &[u8]) -> Result<Vec<Extent>, ImageError> {
        let gnu = header
            .as_gnu()
            .ok_or_else(|| ImageError::entry(path, "has no GNU header"))?;
        let mut extents = Vec::new();
        let mut add = |fields: &[tar::GnuSparseHeader]| -> Result<usize, ImageError> {
            for field in fields.iter().filter(|f| !f.is_empty()) {
                let read = |raw: &[u8]| number(raw).and_then(|n| u64::try_from(n).ok());
                match (read(&field.offset), read(&field.numbytes)) {
                    (Some(offset), Some(bytes)) => extents.push(Extent { offset, bytes }),
                    _ => return Err(ImageError::entry(path, "has a bad sparse map")),
                }
            }
            Ok(extents.len())
        };
        let mut count = add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            self.check_extent_count(path, count)?;
            let mut block = GnuExtSparseHeader::new();
            self.inner
                .read_exact(block.as_mut_bytes())
                .map_err(stream_error)?;
            count = add(block.sparse())?;
            more = block.is_extended();
        }
        Ok(extents)
    }

    /// PAX 1.0 form: decimal lines at the start of the data, padded to a block.
    fn pax_sparse_map(&mut self, path: &[u8]) -> Result<Vec<Extent>, ImageError> {
        let refuse = || ImageError::entry(path, "has a bad sparse map");
        let mut numbers: Vec<u64> = Vec::new();
        let mut wanted = None;
        let mut digits: Vec<u8> = Vec::new();
        loop {
            let mut block = [0; BLOCK_BYTES];
            self.read_exact(&mut block).map_err(stream_error)?;
            for byte in block {
                if byte != b'\n' {
                    digits.push(byte);
                    if digits.len() > 20 {
                        return Err(refuse());
                    }
                    continue;
                }
                let value = pax::decimal(&digits).ok_or_else(refuse)?;
                digits.clear();
                match wanted {
                    None => {
                        let count = usize::try_from(value).map_err(|_| refuse())?;
                        self.check_extent_count(path, count)?;
                        wanted = Some(count.saturating_mul(2));
                    }
                    Some(_) => numbers.push(value),
                }
                if wanted == Some(numbers.len()) {
                    return self.extents(path, &numbers);
                }
            }
        }
    }

    /// Skips to the next header; none at the end-of-archive block or where the stream ends between entries.
    fn next_header(&mut self) -> Result<Option<Header>, ImageError> {
        let skip = self.remaining.saturating_add(self.padding);
        let skipped =
            io::copy(&mut (&mut self.inner).take(skip), &mut io::sink()).map_err(stream_error)?;
        if skipped != skip {
            return Err(stream_error(io::ErrorKind::UnexpectedEof.into()));
        }
        self.remaining = 0;
        self.padding = 0;
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.inner.read(rest) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(stream_error(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => filled = filled.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(stream_error(error)),
            }
        }
        if header.as_bytes().iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let sum: i64 = header
            .as_bytes()
            .iter()
            .enumerate()
            .map(|(at, byte)| checksummed(at, *byte))
            .sum();
        if number(&header.as_old().cksum) != Some(sum) {
            return Err(ImageError::entry(
                &header.path_bytes(),
                "has a header with a wrong checksum",
            ));
        }
        Ok(Some(header))
    }

    fn expect_data(&mut self, size: u64, path: &[u8]) -> Result<(), ImageError> {
        let padded = size.checked_next_multiple_of(BLOCK_BYTES as u64);
        let padded = padded.ok_or_else(|| ImageError::entry(path, "has a bad size"))?;
        self.remaining = size;
        self.padding = padded.saturating_sub(size);
        Ok(())
    }

    fn extension(&mut self, size: u64, name: &[u8]) -> Result<Vec<u8>, ImageError> {
        if size > self.limits.tar_extension_bytes_max {
            return Err(ImageError::Limit {
                what: "a tar extension header".to_owned(),
                limit: "tar_extension_bytes_max",
                max: self.limits.tar_extension_bytes_max,
            });
        }
        self.expect_data(size, name)?;
        let mut data = Vec::new();
        self.read_to_end(&mut data).map_err(stream_error)?;
        Ok(data)
    }

    fn extension_text(&mut self, size: u64, name: &[u8]) -> Result<Vec<u8>, ImageError> {
        let mut data = self.extension(size, name)?;
        let end = data.iter().position(|b| *b == 0).unwrap_or(data.len());
        data.truncate(end);
        Ok(data)
    }
}

/// The byte's part in the checksum: the checksum's own field (148..156) counts as spaces.
fn checksummed(at: usize, byte: u8) -> i64 {
    if (148..156).contains(&at) {
        i64::from(b' ')
    } else {
        i64::from(byte)
    }
}

fn stream_error(source: io::Error) -> ImageError {
    ImageError::Stream {
        what: "its tar stream",
        source,
    }
}

/// A header's number: octal text, or GNU's base 256 (first bit set, big-endian two's complement). Blank is zero.
fn number(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // Bit 6 of the first byte is the sign.
        let negative = first & 0x40 != 0;
        let start = if negative { -1_i64 } else { 0 };
        let lead = i64::from(first & 0x3f) | if negative { !0x3f } else { 0 };
        if lead != start && field.len() > 8 {
            return None;
        }
        let mut value = lead;
        for byte in rest {
            value = value.checked_mul(256)?.checked_add(i64::from(*byte))?;
        }
        return Some(value);
    }
    let text: &[u8] = field
        .split(|b| *b == 0)
        .find(|part| !part.is_empty())
        .unwrap_or_default();
    let text = text.trim_ascii();
    if text.is_empty() {
        return Some(0);
    }
    if !text.iter().all(|b| (b'0'..=b'7').contains(b)) {
        return None;
    }
    i64::from_str_radix(std::str::from_utf8(text).ok()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_all_forms() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"0000648\0"), None);
        assert_eq!(number(b"\x80\0\0\0\0\0\0\0\0\0\x01\0"), Some(256));
        assert_eq!(
            number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
            Some(-1)
        );
        assert_eq!(
            number(b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
            None
        );
    }

    #[test]
    fn huge_extension_is_refused_before_it_is_read() {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(8 << 30);
        header.set_cksum();
        let endless = header.as_bytes().chain(io::repeat(b'a'));
        let error = TarStream::new(endless, Limits::default())
            .next_entry()
            .expect_err("8 GiB of name");
        assert!(
            matches!(
                error,
                ImageError::Limit {
                    limit: "tar_extension_bytes_max",
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn header_with_wrong_checksum_is_refused() {
        let mut header = Header::new_ustar();
        header.set_size(0);
        header.set_path("a").expect("short path");
        header.set_cksum();
        header.as_mut_bytes()[0] = b'b';
        let error = TarStream::new(&header.as_bytes()[..], Limits::default())
            .next_entry()
            .expect_err("bad sum");
        assert!(error.to_string().contains("wrong checksum"), "{error}");
    }
}
