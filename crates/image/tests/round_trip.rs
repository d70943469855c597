//! Random layers: what the EROFS image shows is what the tar stream said, byte for byte, by a reader of its own and by
//! the file system's own checker.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use image::{Reference, Silent, Store};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use support::erofs_walk::{Walked, walk};
use support::layout::{self, Layer};
use support::tars::Tar;
use support::{cases, chain, run};
use tar::EntryType;

#[derive(Clone, Debug)]
enum What {
    File(usize),
    Directory,
    Symlink(usize),
    Device(bool, u32, u32),
    Fifo,
    /// To the entry with this number, if it can be linked to.
    HardLink(usize),
}

#[derive(Clone, Debug)]
struct Entry {
    path: Vec<String>,
    what: What,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    xattrs: BTreeMap<String, Vec<u8>>,
}

/// What the layer must look like: a second, simpler telling of the rules.
#[derive(Clone, Debug, PartialEq)]
struct Expected {
    id: usize,
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    rdev: u32,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    data: Vec<u8>,
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[ab]",
        2 => "[!-.0-9A-Z]{1,3}".prop_filter("no dots", |n| n != "." && n != ".." && !n.starts_with(".wh.")),
        1 => "[x-z]{200,255}",
        1 => "[äöü€]{1,5}",
    ]
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        Just(0),
        1_usize..200,
        3900_usize..4200,
        8000_usize..8300,
        Just(300_000),
    ]
}

fn entry() -> impl Strategy<Value = Entry> {
    let what = prop_oneof![
        5 => size().prop_map(What::File),
        3 => Just(What::Directory),
        1 => prop_oneof![1_usize..100, 3900_usize..4095].prop_map(What::Symlink),
        1 => (any::<bool>(), 0_u32..4096, 0_u32..1 << 20).prop_map(|(b, major, minor)| What::Device(b, major, minor)),
        1 => Just(What::Fifo),
        2 => (0_usize..40).prop_map(What::HardLink),
    ];
    let key = prop_oneof![
        "user\\.[a-z]{1,20}",
        "trusted\\.[a-z]{1,9}",
        Just("security.capability".to_owned()),
        Just("system.posix_acl_access".to_owned()),
    ];
    let value = prop_oneof![
        3 => prop::collection::vec(any::<u8>(), 0..50),
        1 => prop::collection::vec(any::<u8>(), 3900..5000),
    ];
    let xattrs = prop_oneof![
        3 => Just(BTreeMap::new()),
        1 => prop::collection::btree_map(key, value, 0..4),
    ];
    let mtime = (-5_000_000_000_i64..5_000_000_000, 0_u32..1_000_000_000);
    (
        prop::collection::vec(name(), 1..4),
        what,
        0_u32..0o10000,
        prop_oneof![Just(0), any::<u32>()],
        0_u32..70_000,
        mtime,
        xattrs,
    )
        .prop_map(|(path, what, mode, uid, gid, mtime, xattrs)| Entry {
            path,
            what,
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        })
}

fn data(seed: usize, size: usize) -> Vec<u8> {
    let mut state = seed as u32 | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..size).map(step).collect()
}

fn new_encode_dev(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn implied(id: usize) -> Expected {
    Expected {
        id,
        mode: 0o040755,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        rdev: 0,
        xattrs: BTreeMap::new(),
        data: Vec::new(),
    }
}

fn is_directory(model: &BTreeMap<Vec<u8>, Expected>, path: &[u8]) -> bool {
    path.is_empty() || model.get(path).is_some_and(|node| node.mode >> 12 == 0o04)
}

fn replace(model: &mut BTreeMap<Vec<u8>, Expected>, path: Vec<u8>, node: Expected) {
    let keeps_children = is_directory(model, &path) && node.mode >> 12 == 0o04;
    if !keeps_children {
        let below = [&path[..], b"/"].concat();
        model.retain(|other, _| !other.starts_with(&below));
    }
    model.insert(path, node);
}

/// The tar stream of the entries that make sense one after another, and what it means.
fn tell(entries: &[Entry]) -> (Vec<u8>, BTreeMap<Vec<u8>, Expected>) {
    let mut tar = Tar::new();
    let mut model: BTreeMap<Vec<u8>, Expected> = BTreeMap::new();
    model.insert(Vec::new(), implied(usize::MAX));
    let mut put_names: Vec<Vec<u8>> = Vec::new();
    for (id, entry) in entries.iter().enumerate() {
        let mut parents = Vec::new();
        for depth in 1..entry.path.len() {
            parents.push(entry.path[..depth].join("/").into_bytes());
        }
        if parents
            .iter()
            .any(|parent| model.contains_key(parent) && !is_directory(&model, parent))
        {
            continue;
        }
        let path = entry.path.join("/").into_bytes();
        let rdev = match entry.what {
            What::Device(_, major, minor) => new_encode_dev(major, minor),
            _ => 0,
        };
        let (kind, type_bits, link, data) = match &entry.what {
            What::File(size) => (EntryType::Regular, 0o100000, Vec::new(), data(id, *size)),
            What::Directory => (EntryType::Directory, 0o040000, Vec::new(), Vec::new()),
            What::Symlink(length) => (
                EntryType::Symlink,
                0o120000,
                vec![b'/'; *length],
                Vec::new(),
            ),
            What::Device(true, ..) => (EntryType::Block, 0o060000, Vec::new(), Vec::new()),
            What::Device(false, ..) => (EntryType::Char, 0o020000, Vec::new(), Vec::new()),
            What::Fifo => (EntryType::Fifo, 0o010000, Vec::new(), Vec::new()),
            What::HardLink(to) => {
                let Some(target) = put_names.get(*to) else {
                    continue;
                };
                let Some(node) = model.get(target).cloned() else {
                    continue;
                };
                if node.mode >> 12 == 0o04
                    || *target == path
                    || target.starts_with(&[&path[..], b"/"].concat())
                {
                    continue;
                }
                tar = tar.entry(&path, EntryType::Link, target, b"", |_| ());
                for (depth, parent) in parents.into_iter().enumerate() {
                    model
                        .entry(parent)
                        .or_insert_with(|| implied((id + 1) * 1000 + depth));
                }
                replace(&mut model, path, node);
                continue;
            }
        };
        let mtime = format!("{}", Seconds(entry.mtime));
        let keys: Vec<(Vec<u8>, &[u8])> = entry
            .xattrs
            .iter()
            .map(|(key, value)| (format!("SCHILY.xattr.{key}").into_bytes(), value.as_slice()))
            .collect();
        let uid = entry.uid.to_string();
        let mut records: Vec<(&[u8], &[u8])> =
            vec![(b"mtime", mtime.as_bytes()), (b"uid", uid.as_bytes())];
        records.extend(keys.iter().map(|(key, value)| (&key[..], *value)));
        let stored: &[u8] = if kind == EntryType::Regular {
            &data
        } else {
            b""
        };
        tar = tar
            .pax(&records)
            .entry(&path, kind, &link, stored, |header| {
                header.set_mode(entry.mode);
                header.set_gid(entry.gid.into());
                if let What::Device(_, major, minor) = entry.what {
                    header.set_device_major(major).expect("a GNU header");
                    header.set_device_minor(minor).expect("a GNU header");
                }
            });
        for (depth, parent) in parents.into_iter().enumerate() {
            model
                .entry(parent)
                .or_insert_with(|| implied((id + 1) * 1000 + depth));
        }
        let node = Expected {
            id,
            mode: type_bits | entry.mode as u16,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            rdev,
            xattrs: entry
                .xattrs
                .iter()
                .map(|(k, v)| (k.clone().into_bytes(), v.clone()))
                .collect(),
            data: if kind == EntryType::Symlink {
                link
            } else {
                data
            },
        };
        put_names.push(path.clone());
        replace(&mut model, path, node);
    }
    (tar.end(), model)
}

struct Seconds((i64, u32));

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (seconds, nanos) = self.0;
        if seconds < 0 && nanos > 0 {
            write!(f, "-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanos)
        } else {
            write!(f, "{seconds}.{nanos:09}")
        }
    }
}

/// Prepares an image of this one layer; gives the EROFS file's path.
fn prepare(dir: &Path, layer: Layer) -> std::path::PathBuf {
    let oci = dir.join("layout");
    layout::layout(&oci, &[layer]);
    let store = Store::open(dir.join("store")).expect("a store");
    let reference = Reference::Oci {
        dir: oci,
        tag: None,
    };
    let image = store.prepare(&reference, &mut Silent);
    image
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
        .layers
        .remove(0)
}

fn compare(found: &BTreeMap<Vec<u8>, Walked>, expected: &BTreeMap<Vec<u8>, Expected>) {
    let names = |keys: Vec<&Vec<u8>>| {
        keys.iter()
            .map(|k| String::from_utf8_lossy(k).into_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        names(found.keys().collect()),
        names(expected.keys().collect())
    );
    for (path, node) in found {
        let want = &expected[path];
        let shown = String::from_utf8_lossy(path);
        let got = Expected {
            id: want.id,
            mode: node.mode,
            uid: node.uid,
            gid: node.gid,
            mtime: node.mtime,
            rdev: node.rdev,
            xattrs: node.xattrs.clone(),
            data: node.data.clone(),
        };
        assert!(
            got == *want,
            "{shown}: {:?}",
            (
                got.mode, want.mode, got.mtime, want.mtime, got.rdev, want.rdev
            )
        );
        // Same inode where, and only where, the layer says so.
        for (other_path, other) in found {
            assert_eq!(
                node.nid == other.nid,
                want.id == expected[other_path].id,
                "{shown}"
            );
        }
    }
}

#[test]
fn random_layers_come_out_as_they_went_in() {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let config = Config {
        cases: cases(48),
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, rng);
    let strategy = (prop::collection::vec(entry(), 0..40), 0_u8..3);
    runner
        .run(&strategy, |(entries, compression)| {
            let (tar, expected) = tell(&entries);
            let dir = tempfile::tempdir().expect("a folder");
            let layer = match compression {
                0 => layout::plain(tar),
                1 => layout::gzip(&tar),
                _ => layout::zstd(&tar),
            };
            let path = prepare(dir.path(), layer);
            compare(&walk(&fs::read(&path).expect("the layer")), &expected);
            run("fsck.erofs", &[path.to_str().expect("UTF-8")]);
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn big_directory_is_found_by_name_and_by_the_checker() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut tar = Tar::new();
    for n in 0..5000 {
        tar = tar.file(
            &format!("big/{}-{n}", "n".repeat(n % 97)),
            format!("{n}").as_bytes(),
        );
    }
    let path = prepare(dir.path(), layout::gzip(&tar.end()));
    let tree = walk(&fs::read(&path).expect("the layer"));
    assert_eq!(tree.len(), 5002);
    for n in 0..5000 {
        let name = format!("big/{}-{n}", "n".repeat(n % 97));
        assert_eq!(tree[name.as_bytes()].data, n.to_string().as_bytes());
    }
    run("fsck.erofs", &[path.to_str().expect("UTF-8")]);
    let listed = run(
        "dump.erofs",
        &["--ls", "--path=/big", path.to_str().expect("UTF-8")],
    );
    assert!(listed.contains("-4947"), "{}", &listed[..300]);
}

#[test]
fn the_checker_extracts_what_went_in() {
    let dir = tempfile::tempdir().expect("a folder");
    let sizes = [
        0,
        1,
        4031,
        4032,
        4033,
        4095,
        4096,
        4097,
        8191,
        8192,
        1 << 20,
        (1 << 20) + 1,
    ];
    let mut tar = Tar::new();
    for (seed, size) in sizes.iter().enumerate() {
        tar = tar.file(&format!("f{size}"), &data(seed, *size));
    }
    tar = tar
        .symlink("link", &"long/".repeat(815))
        .hard_link("again", "f4097");
    let path = prepare(dir.path(), layout::gzip(&tar.end()));
    let out = dir.path().join("out");
    let option = format!("--extract={}", out.display());
    run("fsck.erofs", &[&option, path.to_str().expect("UTF-8")]);
    for (seed, size) in sizes.iter().enumerate() {
        assert_eq!(
            fs::read(out.join(format!("f{size}"))).expect("extracted"),
            data(seed, *size),
            "{size}"
        );
    }
    assert_eq!(
        fs::read(out.join("again")).expect("extracted"),
        data(7, 4097)
    );
    let target = fs::read_link(out.join("link")).expect("a link");
    assert_eq!(target.to_str(), Some("long/".repeat(815).as_str()));
}

#[test]
fn same_layer_gives_the_same_bytes() {
    let entries = |seed| {
        let mut tar = Tar::new().dir("d");
        for n in 0..50 {
            tar = tar.file(&format!("d/{n}"), &data(n + seed, n * 100));
        }
        tar.end()
    };
    let build = |layer: Layer| {
        let dir = tempfile::tempdir().expect("a folder");
        fs::read(prepare(dir.path(), layer)).expect("the layer")
    };
    let first = build(layout::gzip(&entries(1)));
    assert_eq!(
        first,
        build(layout::zstd(&entries(1))),
        "whatever the compression"
    );
    let other = build(layout::gzip(&entries(2)));
    assert_ne!(
        first[1024 + 48..1024 + 64],
        other[1024 + 48..1024 + 64],
        "UUIDs differ"
    );
}

#[test]
fn sparse_files_have_their_holes_in_all_tar_forms() {
    let dir = tempfile::tempdir().expect("a folder");
    let source = dir.path().join("source");
    fs::create_dir(&source).expect("a folder");
    let mut want = vec![0; 3 << 20];
    for at in [0, 500_000, 1 << 20, (3 << 20) - 10] {
        want[at..at + 10].copy_from_slice(b"0123456789");
    }
    {
        use std::os::unix::fs::FileExt;
        let file = fs::File::create(source.join("sparse")).expect("a file");
        file.set_len(want.len() as u64).expect("sized");
        for at in [0, 500_000, 1 << 20, (3 << 20) - 10] {
            file.write_all_at(b"0123456789", at as u64)
                .expect("written");
        }
    }
    fs::write(source.join("after"), b"what follows").expect("written");
    for format in [
        &["--format=gnu"][..],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
        &["--format=posix", "--sparse-version=1.0"],
    ] {
        let archive = dir.path().join("sparse.tar");
        let mut args = vec![
            "-cS",
            "-f",
            archive.to_str().expect("UTF-8"),
            "-C",
            source.to_str().expect("UTF-8"),
        ];
        args.extend(format);
        args.extend(["sparse", "after"]);
        run("tar", &args);
        let tar = fs::read(&archive).expect("the archive");
        assert!(tar.len() < 1 << 20, "tar saw the holes");
        let room = tempfile::tempdir().expect("a folder");
        let tree = walk(&fs::read(prepare(room.path(), layout::plain(tar))).expect("the layer"));
        assert_eq!(tree[&b"sparse"[..]].data, want, "{format:?}");
        assert_eq!(tree[&b"after"[..]].data, b"what follows", "{format:?}");
    }
}

#[test]
fn inode_that_ends_with_a_block_does_not_end_the_image() {
    // With names of three bytes, 102 or 103 empty files after the root end exactly at the second block.
    for count in 98..108 {
        let dir = tempfile::tempdir().expect("a folder");
        let mut tar = Tar::new();
        for n in 0..count {
            tar = tar.file(&format!("{n:03}"), b"");
        }
        let path = prepare(dir.path(), layout::plain(tar.end()));
        assert_eq!(walk(&fs::read(&path).expect("the layer")).len(), count + 1);
        run("fsck.erofs", &[path.to_str().expect("UTF-8")]);
    }
}
