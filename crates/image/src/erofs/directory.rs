//! Directory contents: blocks of entries sorted by name.
//!
//! Invariant: names ascend bytewise over the whole directory, `.` and `..` among them, since the kernel searches by
//! halves within and between blocks (`fs/erofs/namei.c`). Left to others: where the blocks go.

use super::spec::{BLOCK_BYTES, DIRENT_BYTES};

/// One name.
pub(crate) struct DirEntry<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) nid: u64,
    /// `EROFS_FT_*`.
    pub(crate) file_type: u8,
}

/// How many bytes a directory with these names has; `names` must ascend.
pub(crate) fn directory_bytes<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let mut full_blocks: u64 = 0;
    let mut used: u64 = 0;
    for name in names {
        let need = (DIRENT_BYTES + name.len()) as u64;
        if used + need > BLOCK_BYTES {
            full_blocks += 1;
            used = 0;
        }
        used += need;
    }
    full_blocks * BLOCK_BYTES + used
}

/// The directory's bytes; all blocks but the last are whole.
pub(crate) fn directory_data(entries: &[DirEntry<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let fits = |entry: &&DirEntry<'_>| {
            used += DIRENT_BYTES + entry.name.len();
            used as u64 <= BLOCK_BYTES
        };
        let count = rest.iter().take_while(fits).count();
        let (block, later) = rest.split_at(count);
        if !out.is_empty() {
            out.resize(out.len().next_multiple_of(BLOCK_BYTES as usize), 0);
        }
        let mut name_offset = count * DIRENT_BYTES;
        for entry in block {
            out.extend(entry.nid.to_le_bytes());
            // At most 4095, since everything fits one block.
            out.extend((name_offset as u16).to_le_bytes());
            out.extend([entry.file_type, 0]);
            name_offset += entry.name.len();
        }
        for entry in block {
            out.extend_from_slice(entry.name);
        }
        rest = later;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_known_before_the_entries_are() {
        for count in [1, 2, 100, 1000] {
            let names: Vec<String> = (0..count)
                .map(|n| format!("{n:0width$}", width = 4 + n % 200))
                .collect();
            let mut names: Vec<&[u8]> = names.iter().map(|n| n.as_bytes()).collect();
            names.sort();
            let entries: Vec<_> = names
                .iter()
                .map(|name| DirEntry {
                    name,
                    nid: 2,
                    file_type: 1,
                })
                .collect();
            assert_eq!(
                directory_data(&entries).len() as u64,
                directory_bytes(names.iter().copied())
            );
        }
    }

    #[test]
    fn names_fill_a_block_to_its_last_byte() {
        let long = [b'x'; 244];
        let names = vec![&long[..]; 17];
        assert_eq!(directory_bytes(names[..16].iter().copied()), 4096);
        assert_eq!(directory_bytes(names.iter().copied()), 4096 + 256);
    }
}
