//! Memory as a file: every byte at the offset that it has in the memfd, holes where it is
//! zero.
//!
//! Left to others: that nobody stores meanwhile.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::layout::{Kind, PAGE_SIZE, Region};
use crate::map::GuestRam;
use crate::{Error, Gpa};

/// Bytes looked at at once.
const CHUNK: u64 = 256 << 10;
const PAGE: usize = PAGE_SIZE as usize;

impl GuestRam {
    /// Writes all of memory but the host's files into `file`, an empty one. Returns how
    /// many bytes were not zero pages.
    ///
    /// # Errors
    /// [`Error::Host`]: the file has a part of it then.
    pub fn write_image(&self, file: &File) -> Result<u64, Error> {
        let bytes = self.image_bytes();
        let failed = |source| Error::Host {
            doing: "write the memory file",
            bytes,
            source,
        };
        file.set_len(bytes).map_err(failed)?;
        let mut written = 0;
        let mut chunk = vec![0; CHUNK as usize];
        for region in self.regions() {
            match region.kind {
                Kind::Memory | Kind::Pluggable { .. } => {}
                Kind::File { .. } => continue,
            }
            let mut at = 0;
            while let Some((from, to)) = self.backed(&region, at).map_err(|e| failed(e.into()))? {
                at = from;
                while at < to {
                    let len = CHUNK.min(to - at);
                    let part = chunk.get_mut(..len as usize).unwrap_or_default();
                    self.copy(Gpa(region.start.0 + at), part)
                        .map_err(|source| failed(std::io::Error::other(source)))?;
                    written += write_pages(file, region.file_offset + at, part).map_err(failed)?;
                    at += len;
                }
            }
        }
        Ok(written)
    }

    fn copy(&self, from: Gpa, to: &mut [u8]) -> Result<(), vm_memory::GuestMemoryError> {
        let slice: VolatileSlice<'_, _> = self.memory().get_slice(from, to.len())?;
        slice.copy_to(to);
        Ok(())
    }

    /// The next part of `region` from offset `at` that may be other than zero.
    fn backed(&self, region: &Region, at: u64) -> Result<Option<(u64, u64)>, Errno> {
        if at >= region.len {
            return Ok(None);
        }
        let Some(memfd) = self.memfd() else {
            return Ok(Some((at, region.len)));
        };
        let start = region.file_offset;
        let from = match rustix::fs::seek(memfd, SeekFrom::Data(start + at)) {
            Ok(from) => from - start,
            // Nothing behind it.
            Err(Errno::NXIO) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        if from >= region.len {
            return Ok(None);
        }
        let to = rustix::fs::seek(memfd, SeekFrom::Hole(start + from))? - start;
        Ok(Some((from, to.min(region.len))))
    }
}

/// Writes the pages of `bytes` that are not zero to `at`; returns how many bytes these are.
fn write_pages(file: &File, at: u64, bytes: &[u8]) -> std::io::Result<u64> {
    const ZERO: [u8; PAGE] = [0; PAGE];
    let (mut written, mut from) = (0, 0);
    // A run of pages that are not zero ends before `to`, a zero page or the end.
    for to in (0..=bytes.len()).step_by(PAGE) {
        let page = bytes.get(to..to + PAGE);
        if page.is_some_and(|page| page != ZERO) {
            continue;
        }
        if let Some(run) = bytes.get(from..to).filter(|run| !run.is_empty()) {
            file.write_all_at(run, at + from as u64)?;
            written += run.len() as u64;
        }
        from = to + PAGE;
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::Bytes;

    use super::*;
    use crate::{ByteSize, Further};

    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 2 * MIB;

    fn further() -> Vec<Further> {
        let len = 2 * BLOCK;
        vec![Further::Pluggable { len, block: BLOCK }]
    }

    fn image_of(ram: &GuestRam) -> File {
        let file = tempfile::tempfile().unwrap();
        ram.write_image(&file).unwrap();
        file
    }

    fn again(image: &File) -> GuestRam {
        let image = image.try_clone().unwrap();
        GuestRam::from_image(ByteSize::mib(8), further(), image).unwrap()
    }

    fn byte(ram: &GuestRam, at: u64) -> u8 {
        ram.memory().read_obj(Gpa(at)).unwrap()
    }

    #[test]
    fn an_image_has_every_byte_in_its_place_and_holes_for_zeros() {
        let ram = GuestRam::with(ByteSize::mib(8), further()).unwrap();
        let plugged = ram.regions().last().unwrap();
        ram.plug(plugged.start, BLOCK).unwrap();
        // Written, and zero all the same.
        ram.memory().write_slice(&[0; 3 * PAGE], Gpa(MIB)).unwrap();
        let places = [
            0,
            4095,
            MIB - 1,
            MIB + 5 * 4096,
            8 * MIB - 1,
            plugged.start.0 + 7,
        ];
        for (n, at) in (1_u8..).zip(places) {
            ram.memory().write_obj(n, Gpa(at)).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        assert_eq!(ram.write_image(&file).unwrap(), 5 * PAGE_SIZE);
        assert_eq!(file.metadata().unwrap().len(), 8 * MIB + 2 * BLOCK);
        assert!(file.metadata().unwrap().blocks() * 512 < MIB);
        let mut bytes = [0; 1];
        file.read_exact_at(&mut bytes, 8 * MIB + 7).unwrap();
        assert_eq!(bytes, [6]);
        let restored = again(&file);
        for (n, at) in (1_u8..).zip(places) {
            assert_eq!(byte(&restored, at), n);
        }
        assert!(
            !restored.contains(plugged.start, 1),
            "plugging is a device's"
        );
        // And an image of what came from an image is the same.
        let (second, mut one, mut two) = (image_of(&restored), vec![], vec![]);
        for (file, bytes) in [(&file, &mut one), (&second, &mut two)] {
            bytes.resize(file.metadata().unwrap().len() as usize, 0);
            file.read_exact_at(bytes, 0).unwrap();
        }
        assert!(one == two);
    }

    #[test]
    fn machines_from_one_image_do_not_see_each_other() {
        let ram = GuestRam::with(ByteSize::mib(8), further()).unwrap();
        ram.memory().write_obj(1_u8, Gpa(5)).unwrap();
        let image = image_of(&ram);
        let (one, two) = (again(&image), again(&image));
        one.memory().write_obj(2_u8, Gpa(5)).unwrap();
        assert_eq!(
            (byte(&one, 5), byte(&two, 5), byte(&again(&image), 5)),
            (2, 1, 1)
        );
    }

    #[test]
    fn what_is_given_back_is_zero_and_not_what_the_image_has() {
        let ram = GuestRam::with(ByteSize::mib(8), further()).unwrap();
        ram.memory().write_slice(&[7; 4 * PAGE], Gpa(MIB)).unwrap();
        let restored = again(&image_of(&ram));
        assert_eq!(
            restored.discard(Gpa(MIB + 1), 2 * PAGE_SIZE).unwrap(),
            PAGE_SIZE
        );
        let at = |page| byte(&restored, MIB + page * PAGE_SIZE);
        assert_eq!([at(0), at(1), at(2), at(3)], [7, 0, 7, 7]);
        restored
            .memory()
            .write_obj(9_u8, Gpa(MIB + PAGE_SIZE))
            .unwrap();
        assert_eq!([at(0), at(1), at(2)], [7, 9, 7]);
    }

    #[test]
    fn an_image_of_another_length_is_refused() {
        for len in [0, 8 * MIB, 12 * MIB - 1, 12 * MIB + 1, 16 * MIB] {
            let image = tempfile::tempfile().unwrap();
            image.set_len(len).unwrap();
            let refused = GuestRam::from_image(ByteSize::mib(8), further(), image);
            assert!(matches!(refused, Err(Error::Image { .. })), "{len}");
        }
        let device = File::open("/dev/zero").unwrap();
        assert!(GuestRam::from_image(ByteSize::mib(8), further(), device).is_err());
    }

    #[test]
    fn an_image_that_shrinks_under_its_readers_becomes_zeros() {
        let ram = GuestRam::with(ByteSize::mib(8), further()).unwrap();
        let plugged = ram.regions().last().unwrap().start;
        ram.plug(plugged, 2 * BLOCK).unwrap();
        for at in [MIB, plugged.0, plugged.0 + BLOCK] {
            ram.memory().write_obj(7_u8, Gpa(at)).unwrap();
        }
        let image = image_of(&ram);
        let restored = again(&image);
        restored.plug(plugged, 2 * BLOCK).unwrap();
        image.set_len(8 * MIB + BLOCK).unwrap();
        assert_eq!(byte(&restored, plugged.0 + BLOCK), 0);
        assert_eq!((byte(&restored, MIB), byte(&restored, plugged.0)), (7, 7));
    }
}
