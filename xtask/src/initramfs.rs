//! Packs the guest's init as `/init` of an initramfs: an uncompressed "newc"
//! archive (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst).
//! The same input gives the same bytes.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Writes an archive with `/init` (the file `init`), `/dev` and `/dev/console`.
pub(crate) fn pack(init: &Path, output: &Path) -> Result<()> {
    let program = fs::read(init).with_context(|| format!("failed to read {}", init.display()))?;
    let mut archive = Vec::with_capacity(program.len() + 4096);
    let mut inode = 1;
    let mut add = |name: &str, mode: u32, device: (u32, u32), data: &[u8]| {
        entry(&mut archive, name, inode, mode, device, data);
        inode += 1;
    };
    add("dev", DIRECTORY, (0, 0), &[]);
    add("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
    add("init", EXECUTABLE, (0, 0), &program);
    add("TRAILER!!!", 0, (0, 0), &[]);

    // replaced in one step, so that a machine starting now never reads half of it
    let draft = output.with_extension("tmp");
    fs::write(&draft, &archive).with_context(|| format!("failed to write {}", draft.display()))?;
    fs::rename(&draft, output).with_context(|| format!("failed to write {}", output.display()))
}

fn entry(
    archive: &mut Vec<u8>,
    name: &str,
    inode: u32,
    mode: u32,
    device: (u32, u32),
    data: &[u8],
) {
    let size = u32::try_from(data.len()).expect("an init of less than 4 GiB");
    let name_size = u32::try_from(name.len() + 1).expect("a short name");
    let fields = [
        inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0,
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(data);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_sized_as_newc_wants() {
        let mut archive = Vec::new();
        entry(&mut archive, "init", 3, EXECUTABLE, (0, 0), b"abcde");
        assert_eq!(&archive[..6], b"070701");
        assert_eq!(&archive[54..62], b"00000005");
        assert_eq!(&archive[94..102], b"00000005");
        assert_eq!(&archive[110..115], b"init\0");
        assert_eq!(&archive[116..121], b"abcde");
        assert_eq!(archive.len() % 4, 0);
    }
}
