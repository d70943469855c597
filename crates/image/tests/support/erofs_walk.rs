//! Reads a whole EROFS image, written from the format's description alone and sharing nothing with the crate.
//! Panics where the kernel would refuse.

use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walked {
    pub nid: u64,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub links: u32,
    pub rdev: u32,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Of files and symbolic links.
    pub data: Vec<u8>,
}

const BLOCK: usize = 4096;

fn le(bytes: &[u8], at: usize, count: usize) -> u64 {
    bytes[at..at + count]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Every path (relative, the root is empty) with what lies there.
pub fn walk(image: &[u8]) -> BTreeMap<Vec<u8>, Walked> {
    assert_eq!(image.len() % BLOCK, 0, "whole blocks");
    let sb = &image[1024..];
    assert_eq!(le(sb, 0, 4), 0xe0f5_e1e2, "magic");
    assert_eq!(le(sb, 36, 4) as usize, image.len() / BLOCK, "blocks");
    assert_eq!(le(sb, 80, 4), 0, "incompatible features");
    assert_eq!(sb[12], 12, "block size");
    let meta = le(sb, 40, 4) as usize * BLOCK;
    let mut found = BTreeMap::new();
    let mut todo = vec![(Vec::new(), le(sb, 14, 2), le(sb, 14, 2))];
    let mut numbers = std::collections::BTreeSet::new();
    while let Some((path, nid, parent)) = todo.pop() {
        let node = inode(image, meta, nid);
        numbers.insert(nid);
        if node.mode >> 12 == 0o04 {
            let names = directory(&node.data);
            let dots: Vec<_> = names
                .iter()
                .filter(|(name, ..)| name == b"." || name == b"..")
                .map(|(_, nid, _)| *nid)
                .collect();
            assert_eq!(dots, [nid, parent], "dots of {path:?}");
            let mut subdirectories = 0;
            for (name, child, file_type) in names {
                let mode = inode(image, meta, child).mode;
                let expected = match mode >> 12 {
                    0o10 => 1,
                    0o04 => 2,
                    0o02 => 3,
                    0o06 => 4,
                    0o01 => 5,
                    0o14 => 6,
                    0o12 => 7,
                    other => panic!("file type {other:o}"),
                };
                assert_eq!(file_type, expected, "type of {name:?}");
                if name == b"." || name == b".." {
                    continue;
                }
                subdirectories += u32::from(mode >> 12 == 0o04);
                let mut full = path.clone();
                if !full.is_empty() {
                    full.push(b'/');
                }
                full.extend(name);
                todo.push((full, child, nid));
            }
            assert_eq!(node.links, 2 + subdirectories, "links of {path:?}");
        }
        let node = match node.mode >> 12 {
            0o04 => Walked {
                data: Vec::new(),
                ..node
            },
            _ => node,
        };
        assert!(found.insert(path, node).is_none(), "a name twice");
    }
    assert_eq!(le(sb, 16, 8), numbers.len() as u64, "inode count");
    for node in found.values().filter(|node| node.mode >> 12 != 0o04) {
        let names = found.values().filter(|other| other.nid == node.nid).count();
        assert_eq!(node.links as usize, names, "links of inode {}", node.nid);
    }
    found
}

fn inode(image: &[u8], meta: usize, nid: u64) -> Walked {
    assert_ne!(nid, 0, "readers of directories skip number 0");
    let start = meta + nid as usize * 32;
    let raw = &image[start..];
    let format = le(raw, 0, 2);
    assert_eq!(format & 1, 1, "extended");
    let inline = match format >> 1 {
        0 => false,
        2 => true,
        other => panic!("layout {other}"),
    };
    let xattr_count = le(raw, 2, 2) as usize;
    let xattr_bytes = if xattr_count == 0 {
        0
    } else {
        12 + (xattr_count - 1) * 4
    };
    assert_ne!(
        xattr_bytes, 12,
        "the kernel refuses a bare attribute header"
    );
    let mode = le(raw, 4, 2) as u16;
    let size = le(raw, 8, 8) as usize;
    let union = le(raw, 16, 4) as u32;
    let has_data = matches!(mode >> 12, 0o10 | 0o04 | 0o12);
    let mut data = Vec::new();
    if has_data && size > 0 {
        let apart = if inline {
            (size - 1) / BLOCK * BLOCK
        } else {
            size
        };
        let first = union as usize * BLOCK;
        data.extend_from_slice(&image[first..first + apart]);
        if inline {
            let tail = start + 64 + xattr_bytes;
            assert!(
                tail % BLOCK + (size - apart) <= BLOCK,
                "inline data across blocks"
            );
            data.extend_from_slice(&image[tail..tail + size - apart]);
        }
    }
    Walked {
        nid,
        mode,
        uid: le(raw, 24, 4) as u32,
        gid: le(raw, 28, 4) as u32,
        mtime: (le(raw, 32, 8) as i64, le(raw, 40, 4) as u32),
        links: le(raw, 44, 4) as u32,
        rdev: if has_data { 0 } else { union },
        xattrs: xattrs(&raw[64..64 + xattr_bytes]),
        data,
    }
}

fn xattrs(body: &[u8]) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut found = BTreeMap::new();
    if body.is_empty() {
        return found;
    }
    assert_eq!(body[4], 0, "shared attributes");
    let mut rest = &body[12..];
    while !rest.is_empty() {
        let prefix = match rest[1] {
            1 => "user.",
            2 => "system.posix_acl_access",
            3 => "system.posix_acl_default",
            4 => "trusted.",
            6 => "security.",
            other => panic!("attribute index {other}"),
        };
        let name_end = 4 + usize::from(rest[0]);
        let value_end = name_end + le(rest, 2, 2) as usize;
        let name = [prefix.as_bytes(), &rest[4..name_end]].concat();
        assert!(
            found
                .insert(name, rest[name_end..value_end].to_vec())
                .is_none()
        );
        rest = &rest[value_end.div_ceil(4) * 4..];
    }
    found
}

fn directory(data: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
    let mut entries: Vec<(Vec<u8>, u64, u8)> = Vec::new();
    for block in data.chunks(BLOCK) {
        let first = le(block, 8, 2) as usize;
        assert!(
            first > 0 && first.is_multiple_of(12),
            "first name at {first}"
        );
        for at in (0..first).step_by(12) {
            let start = le(block, at + 8, 2) as usize;
            let name = if at + 12 < first {
                &block[start..le(block, at + 20, 2) as usize]
            } else {
                block[start..].split(|b| *b == 0).next().expect("a name")
            };
            assert!((1..=255).contains(&name.len()), "length of {name:?}");
            if let Some((before, ..)) = entries.last() {
                assert!(before.as_slice() < name, "{before:?} before {name:?}");
            }
            entries.push((name.to_vec(), le(block, at, 8), block[at + 10]));
        }
    }
    entries
}
