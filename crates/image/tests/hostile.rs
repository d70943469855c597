//! Images made to do harm: each is refused with an error that names the object, or harmless, and leaves nothing behind.

mod support;

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use image::{Digest, Image, ImageError, Limits, Reference, Silent, Store};
use serde_json::json;
use support::chain;
use support::erofs_walk::{Walked, walk};
use support::layout::{self, Layer, blob, blob_path, gzip, plain};
use support::tars::Tar;
use tar::EntryType;

struct Room {
    dir: tempfile::TempDir,
    limits: Limits,
}

impl Room {
    fn new() -> Room {
        Room {
            dir: tempfile::tempdir().expect("a folder"),
            limits: Limits::default(),
        }
    }

    fn layout(&self) -> PathBuf {
        self.dir.path().join("layout")
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn prepare(&self) -> Result<Image, ImageError> {
        let reference = Reference::Oci {
            dir: self.layout(),
            tag: None,
        };
        Store::open_with_limits(self.store(), self.limits)?.prepare(&reference, &mut Silent)
    }

    /// The image must be refused; says why, after looking that nothing was left.
    fn refusal(&self) -> String {
        let error = self.prepare().expect_err("a refusal");
        for folder in ["tmp", "layers", "rootfs"] {
            let left = fs::read_dir(self.store().join(folder))
                .expect("a folder")
                .count();
            assert_eq!(left, 0, "left in {folder} after: {}", chain(&error));
        }
        chain(&error)
    }

    fn tree(&self, layer: usize) -> std::collections::BTreeMap<Vec<u8>, Walked> {
        let image = self
            .prepare()
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        walk(&fs::read(&image.layers[layer]).expect("the layer"))
    }
}

/// Why an image of this one layer is refused; the layer's digest must be named.
fn refusal_of(tar: Tar) -> String {
    let room = Room::new();
    let layer = gzip(&tar.end());
    let digest = Digest::sha256_of(&layer.stored);
    layout::layout(&room.layout(), &[layer]);
    let text = room.refusal();
    assert!(
        text.contains(&digest.to_string()),
        "the layer is not named: {text}"
    );
    text
}

fn expect(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[test]
fn names_that_climb_out_are_refused_with_their_entry() {
    for name in ["../x", "a/../../x", "./../../etc/cron.d/x", "a/.."] {
        expect(
            &refusal_of(Tar::new().file(name, b"x")),
            &[name, "leave the root"],
        );
    }
    let long = format!("{}/../../../x", "d/".repeat(60));
    expect(
        &refusal_of(Tar::new().file(&long, b"x")),
        &["leave the root"],
    );
    expect(
        &refusal_of(Tar::new().pax(&[(b"path", b"../p")]).file("innocent", b"x")),
        &["../p", "leave the root"],
    );
}

#[test]
fn hard_links_out_of_the_root_are_refused_with_their_target() {
    for target in ["../../etc/passwd", "/etc/passwd", "a/../../b"] {
        let text = refusal_of(Tar::new().dir("a").hard_link("a/link", target));
        expect(&text, &["a/link", target, "hard link"]);
    }
    expect(
        &refusal_of(Tar::new().hard_link("x", "nowhere")),
        &["nowhere", "neither in this layer nor in a lower one"],
    );
    expect(
        &refusal_of(Tar::new().dir("d").hard_link("x", "d")),
        &["hard link to a directory"],
    );
}

#[test]
fn writing_through_a_link_out_of_the_root_is_refused() {
    for target in ["/", "/etc", "..", "../../tmp", "a/../.."] {
        let text = refusal_of(
            Tar::new()
                .dir("a")
                .symlink("out", target)
                .file("out/passwd", b"x"),
        );
        expect(&text, &["out/passwd", "symbolic link"]);
    }
    expect(
        &refusal_of(Tar::new().symlink("l", "l").file("l/x", b"")),
        &["too many symbolic links"],
    );
    expect(
        &refusal_of(Tar::new().file("f", b"").file("f/x", b"")),
        &["no directory"],
    );
}

#[test]
fn links_and_absolute_names_mean_the_guests_root() {
    let room = Room::new();
    let tar = Tar::new()
        .symlink("abs", "/etc/passwd")
        .symlink("up", "../../..")
        .file("/abs2/x", b"inside");
    layout::layout(&room.layout(), &[gzip(&tar.end())]);
    let tree = room.tree(0);
    assert_eq!(tree[&b"abs"[..]].data, b"/etc/passwd");
    assert_eq!(tree[&b"up"[..]].data, b"../../..");
    assert_eq!(tree[&b"abs2/x"[..]].data, b"inside");
}

#[test]
fn names_that_are_none_are_refused() {
    expect(
        &refusal_of(Tar::new().pax(&[(b"path", b"a\0b")]).file("x", b"")),
        &["NUL"],
    );
    expect(
        &refusal_of(Tar::new().file(&"n".repeat(256), b"")),
        &["name longer"],
    );
    expect(
        &refusal_of(Tar::new().file(&"n/".repeat(2100), b"")),
        &["path longer"],
    );
    expect(
        &refusal_of(Tar::new().file(".wh.", b"")),
        &["whiteout of no name"],
    );
    expect(
        &refusal_of(Tar::new().file(".wh...", b"")),
        &["whiteout of no name"],
    );
    expect(
        &refusal_of(Tar::new().file(".wh.a/b", b"")),
        &["lies in a whiteout"],
    );
    expect(
        &refusal_of(Tar::new().file(".", b"")),
        &["replace the root"],
    );
    expect(
        &refusal_of(Tar::new().symlink("s", &"t".repeat(4096))),
        &["no path"],
    );
    expect(
        &refusal_of(Tar::new().symlink("s", "")),
        &["link to nothing"],
    );
}

#[test]
fn entries_of_unknown_or_impossible_kind_are_refused() {
    let odd = Tar::new().raw(b"odd", EntryType::new(b'M'), b"", b"", |_| ());
    expect(&refusal_of(odd), &["odd", "unsupported type 'M'"]);
    let device = Tar::new().raw(b"dev", EntryType::Char, b"", b"", |h| {
        h.set_device_major(0o7777777).expect("a GNU header");
        h.set_device_minor(0).expect("a GNU header");
    });
    expect(&refusal_of(device), &["dev", "device number"]);
    let owner = Tar::new().raw(b"own", EntryType::Regular, b"", b"", |h| h.set_uid(1 << 40));
    expect(&refusal_of(owner), &["own", "owner beyond 32 bits"]);
    let sum = Tar::new()
        .file("a", b"")
        .raw(b"bad", EntryType::Regular, b"", b"", |_| ())
        .end();
    let mut sum = sum;
    sum[512] = b'B';
    let room = Room::new();
    layout::layout(&room.layout(), &[plain(sum)]);
    expect(&room.refusal(), &["wrong checksum"]);
}

#[test]
fn wrong_digest_is_told_even_when_the_content_is_garbage_too() {
    let room = Room::new();
    let layer = gzip(&Tar::new().file("a", b"good").end());
    layout::layout(&room.layout(), std::slice::from_ref(&layer));
    let digest = Digest::sha256_of(&layer.stored);
    let mut damaged = layer.stored.clone();
    let last = damaged.len() / 2;
    damaged[last] ^= 0x55;
    fs::write(blob_path(&room.layout(), &digest), &damaged).expect("damaged");
    expect(
        &room.refusal(),
        &[
            &digest.to_string(),
            "is corrupt",
            &Digest::sha256_of(&damaged).to_string(),
        ],
    );
}

#[test]
fn wrong_diff_id_is_refused_with_both() {
    let room = Room::new();
    let good = gzip(&Tar::new().file("a", b"good").end());
    let lying = Layer {
        diff_id: Digest::sha256_of(b"something else").to_string(),
        ..good.clone()
    };
    layout::layout(&room.layout(), std::slice::from_ref(&lying));
    expect(&room.refusal(), &["diff_id", &good.diff_id, &lying.diff_id]);
}

#[test]
fn size_lies_are_refused_in_both_directions() {
    for lie in [-1_i64, 1, 1 << 33] {
        let room = Room::new();
        let dir = room.layout();
        let layer = gzip(&Tar::new().file("a", b"good").end());
        layout::layout(&dir, std::slice::from_ref(&layer));
        let config = layout::config(std::slice::from_ref(&layer), json!({}));
        let config_digest = blob(&dir, &config);
        let digest = blob(&dir, &layer.stored);
        let size = (layer.stored.len() as i64 + lie) as usize;
        let manifest = json!({
            "schemaVersion": 2,
            "config": layout::descriptor("application/vnd.oci.image.config.v1+json", &config_digest, config.len()),
            "layers": [layout::descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &digest, size)],
        });
        let manifest = manifest.to_string().into_bytes();
        let manifest_digest = blob(&dir, &manifest);
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        layout::index(
            &dir,
            &[layout::descriptor(
                media_type,
                &manifest_digest,
                manifest.len(),
            )],
        );
        expect(
            &room.refusal(),
            &[&digest.to_string(), &size.to_string(), "descriptor"],
        );
    }
}

#[test]
fn truncated_streams_are_refused_whatever_the_compression() {
    let tar = Tar::new().file("a", &[7; 100_000]).end();
    for layer in [gzip(&tar), layout::zstd(&tar), plain(tar.clone())] {
        for keep in [1, 10, layer.stored.len() / 2, layer.stored.len() - 3] {
            let room = Room::new();
            let cut = Layer {
                stored: layer.stored[..keep].to_vec(),
                diff_id: layer.diff_id.clone(),
            };
            layout::layout(&room.layout(), &[cut]);
            let text = room.refusal();
            let known = [
                "failed to read",
                "diff_id",
                "bad size",
                "checksum",
                "end of file",
            ];
            assert!(
                known.iter().any(|part| text.contains(part)),
                "{keep}: {text}"
            );
        }
    }
}

#[test]
fn missing_blobs_and_documents_are_named() {
    let room = Room::new();
    let layer = gzip(&Tar::new().file("a", b"x").end());
    layout::layout(&room.layout(), std::slice::from_ref(&layer));
    let digest = Digest::sha256_of(&layer.stored);
    fs::remove_file(blob_path(&room.layout(), &digest)).expect("removed");
    expect(&room.refusal(), &[&digest.to_string(), "is missing"]);
    fs::remove_file(room.layout().join("index.json")).expect("removed");
    expect(&room.refusal(), &["index.json", "no image layout"]);
    fs::remove_dir_all(room.layout()).expect("removed");
    expect(&room.refusal(), &["layout", "open image layout"]);
}

#[test]
fn decompression_bomb_stops_at_the_limit() {
    let mut room = Room::new();
    room.limits.layer_tar_bytes_max = 1 << 20;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let head = Tar::new()
        .raw(b"big", EntryType::Regular, b"", b"", |h| {
            h.set_size(64 << 20)
        })
        .end();
    encoder.write_all(&head[..512]).expect("written");
    for _ in 0..64 {
        encoder.write_all(&vec![0; 1 << 20]).expect("written");
    }
    let stored = encoder.finish().expect("finished");
    assert!(stored.len() < 100_000);
    let diff_id = Digest::sha256_of(b"").to_string();
    layout::layout(&room.layout(), &[Layer { stored, diff_id }]);
    expect(&room.refusal(), &["layer_tar_bytes_max", "1048576"]);
}

#[test]
fn bomb_after_the_archives_end_stops_too() {
    let mut room = Room::new();
    room.limits.layer_tar_bytes_max = 1 << 20;
    let mut tar = Tar::new().file("a", b"x").end();
    tar.resize(8 << 20, 0);
    layout::layout(&room.layout(), &[gzip(&tar)]);
    expect(&room.refusal(), &["layer_tar_bytes_max"]);
}

#[test]
fn sparse_file_of_terabytes_stops_at_the_limit() {
    let mut room = Room::new();
    room.limits.layer_file_bytes_max = 1 << 30;
    let sparse = Tar::new()
        .pax(&[
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", b"huge"),
            (b"GNU.sparse.realsize", b"8796093022208"),
        ])
        .file("GNUSparseFile.0/huge", &{
            let mut map = b"1\n0\n4\n".to_vec();
            map.resize(512, 0);
            map.extend(b"data");
            map
        });
    layout::layout(&room.layout(), &[gzip(&sparse.end())]);
    expect(&room.refusal(), &["layer_file_bytes_max"]);
}

#[test]
fn million_entries_stop_at_the_limit() {
    let mut room = Room::new();
    room.limits.layer_entries_max = 20_000;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for n in 0..30_000 {
        let bytes = Tar::new().file(&format!("f{n}"), b"").end();
        encoder.write_all(&bytes[..512]).expect("written");
    }
    let stored = encoder.finish().expect("finished");
    let diff_id = Digest::sha256_of(b"").to_string();
    layout::layout(&room.layout(), &[Layer { stored, diff_id }]);
    expect(&room.refusal(), &["layer_entries_max", "20000"]);
}

#[test]
fn endless_names_stop_at_the_limit() {
    let mut room = Room::new();
    room.limits.layer_metadata_bytes_max = 100_000;
    let mut tar = Tar::new();
    for n in 0..100 {
        tar = tar.symlink(&format!("s{n}"), &"t".repeat(4000));
    }
    layout::layout(&room.layout(), &[gzip(&tar.end())]);
    expect(&room.refusal(), &["layer_metadata_bytes_max"]);
    expect(
        &refusal_of(
            Tar::new()
                .pax(&[(b"SCHILY.xattr.user.big", &[1; 70_000])])
                .file("x", b""),
        ),
        &["xattr_bytes_max"],
    );
}

#[test]
fn deepest_possible_tree_is_no_trouble() {
    let room = Room::new();
    let deep = "d/".repeat(2000) + "f";
    layout::layout(
        &room.layout(),
        &[gzip(&Tar::new().file(&deep, b"deep").end())],
    );
    let tree = room.tree(0);
    assert_eq!(tree.len(), 2002);
    assert_eq!(tree[deep.as_bytes()].data, b"deep");
}

#[test]
fn later_entries_win() {
    let room = Room::new();
    let tar = Tar::new()
        .file("twice", b"first")
        .file("twice", b"second")
        .file("was-file", b"x")
        .dir("was-file")
        .file("was-file/inside", b"y")
        .dir("was-dir")
        .file("was-dir/gone", b"z")
        .file("was-dir", b"now a file")
        .file("linked", b"kept by its other name")
        .hard_link("other", "linked")
        .file("linked", b"replaced");
    layout::layout(&room.layout(), &[gzip(&tar.end())]);
    let tree = room.tree(0);
    assert_eq!(tree[&b"twice"[..]].data, b"second");
    assert_eq!(tree[&b"was-file/inside"[..]].data, b"y");
    assert_eq!(tree[&b"was-dir"[..]].data, b"now a file");
    assert!(!tree.contains_key(&b"was-dir/gone"[..]));
    assert_eq!(tree[&b"other"[..]].data, b"kept by its other name");
    assert_eq!(tree[&b"linked"[..]].data, b"replaced");
}

#[test]
fn whiteouts_take_overlayfs_form() {
    let room = Room::new();
    let tar = Tar::new()
        .file(".wh.never-there", b"")
        .dir("d")
        .file("d/.wh..wh..opq", b"")
        .file("d/.wh.old", b"")
        .file("d/new", b"n")
        .file(".wh.replaced", b"")
        .dir("replaced")
        .file(".wh..wh.plnk/1.2", b"aufs");
    layout::layout(&room.layout(), &[gzip(&tar.end())]);
    let tree = room.tree(0);
    let names: Vec<_> = tree
        .keys()
        .map(|name| String::from_utf8_lossy(name))
        .collect();
    assert_eq!(names, ["", "d", "d/new", "never-there", "replaced"]);
    let whiteout = &tree[&b"never-there"[..]];
    assert_eq!((whiteout.mode >> 12, whiteout.rdev), (0o02, 0));
    for opaque in ["d", "replaced"] {
        assert_eq!(
            tree[opaque.as_bytes()].xattrs[&b"trusted.overlay.opaque"[..]],
            b"y"
        );
    }
}

#[test]
fn overlay_attributes_of_an_image_are_dropped() {
    let room = Room::new();
    let tar = Tar::new()
        .pax(&[
            (b"SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            (b"SCHILY.xattr.user.kept", b"a\nb"),
            (b"SCHILY.xattr.lustre.unknown", b"x"),
        ])
        .dir("d");
    layout::layout(&room.layout(), &[gzip(&tar.end())]);
    let xattrs = &room.tree(0)[&b"d"[..]].xattrs;
    assert_eq!(xattrs.len(), 1);
    assert_eq!(xattrs[&b"user.kept"[..]], b"a\nb");
}

#[test]
fn documents_of_impossible_size_or_kind_are_refused() {
    let room = Room::new();
    let dir = room.layout();
    layout::layout(&dir, &[gzip(&Tar::new().file("a", b"x").end())]);
    let index = fs::read(dir.join("index.json")).expect("index");
    for (text, part) in [
        (&b"{"[..], "index.json"),
        (b"[]", "index.json"),
        (
            br#"{"schemaVersion":2,"manifests":[]}"#,
            "no usable image in index.json",
        ),
    ] {
        fs::write(dir.join("index.json"), text).expect("written");
        expect(&room.refusal(), &[part]);
    }
    fs::write(dir.join("index.json"), vec![b' '; 9 << 20]).expect("written");
    expect(&room.refusal(), &["json_bytes_max"]);
    let both = br#"{"schemaVersion":2,"manifests":[],"layers":[],"config":{}}"#;
    let digest = blob(&dir, both);
    layout::index(
        &dir,
        &[layout::descriptor(
            "application/vnd.oci.image.index.v1+json",
            &digest,
            both.len(),
        )],
    );
    expect(&room.refusal(), &["neither an image manifest nor an index"]);
    let traversal = json!({"mediaType": "x", "digest": "sha256:../../../etc/passwd", "size": 1});
    layout::index(&dir, &[traversal]);
    expect(&room.refusal(), &["index.json"]);
    fs::write(dir.join("index.json"), index).expect("written");
    room.prepare().expect("the good one again");
}

#[test]
fn holes_of_a_lower_layer_are_not_multiplied_on_the_host() {
    use std::os::unix::fs::MetadataExt;
    let mut room = Room::new();
    room.limits.layer_file_bytes_max = 1 << 26;
    let sparse = Tar::new()
        .pax(&[
            (b"GNU.sparse.map", b"0,4"),
            (b"GNU.sparse.size", b"33554432"),
        ])
        .file("hole", b"data");
    let two = Tar::new().hard_link("a", "hole").end();
    layout::layout(&room.layout(), &[gzip(&sparse.end()), gzip(&two)]);
    let image = room
        .prepare()
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    for layer in &image.layers {
        let metadata = fs::metadata(layer).expect("a layer");
        assert!(metadata.len() > 1 << 25);
        assert!(
            metadata.blocks() * 512 < 2 << 20,
            "{} blocks",
            metadata.blocks()
        );
    }
    let tree = room.tree(1);
    assert!(tree[&b"a"[..]].data.starts_with(b"data\0\0"));
    assert_eq!(tree[&b"a"[..]].data.len(), 1 << 25);
    room.limits.layer_file_bytes_max = (1 << 25) - 1;
    fs::remove_dir_all(room.store()).expect("removed");
    expect(&room.refusal(), &["layer_file_bytes_max"]);
}
