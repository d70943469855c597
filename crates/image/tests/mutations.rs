//! Damaged input of every kind: nothing panics, nothing runs away, and what is accepted is a sound file system.
//! `KOMBI_FUZZ_CASES` says how many; the seed is fixed.

mod support;

use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use support::cases;
use support::erofs_walk::walk;
use support::layout;
use support::tars::Tar;
use tar::EntryType;

fn rng(seed: u8) -> TestRng {
    TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32])
}

fn below(rng: &mut TestRng, end: usize) -> usize {
    rng.next_u32() as usize % end.max(1)
}

/// One to eight small damages.
fn mutate(rng: &mut TestRng, bytes: &mut Vec<u8>) {
    const ODD: [u8; 10] = [0, 1, 0x7f, 0x80, 0xff, b'/', b'.', b'7', b' ', b'\n'];
    for _ in 0..=below(rng, 8) {
        let at = below(rng, bytes.len());
        match below(rng, 8) {
            0..=3 if !bytes.is_empty() => bytes[at] = rng.next_u32() as u8,
            4 | 5 if !bytes.is_empty() => bytes[at] = ODD[below(rng, ODD.len())],
            6 => bytes.truncate(at.max(bytes.len() / 2)),
            _ => {
                let from = below(rng, bytes.len()) / 512 * 512;
                let block: Vec<u8> = bytes.iter().skip(from).take(512).copied().collect();
                let at = at / 512 * 512;
                bytes.splice(at..at, block);
            }
        }
    }
}

/// Makes headers' checksums right again, so that damage gets past them.
fn mend_checksums(bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(512) {
        if &block[257..262] == b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let sparse_map = {
        let mut map = b"2\n0\n4\n600\n4\n".to_vec();
        map.resize(512, 0);
        map.extend(b"datadata");
        map
    };
    let everything = Tar::new()
        .dir("a")
        .file("a/file", b"contents")
        .hard_link("a/link", "a/file")
        .symlink("lib", "usr/lib")
        .file("lib/x", &[5; 5000])
        .pax(&[
            (b"path", b"a/long name"),
            (b"mtime", b"-1.5"),
            (b"SCHILY.xattr.user.k", b"v"),
            (b"SCHILY.xattr.security.capability", &[1, 0, 0, 2]),
        ])
        .file("x", b"short")
        .file(&"long/".repeat(40), b"")
        .file("a/.wh.gone", b"")
        .file("a/.wh..wh..opq", b"")
        .entry(b"dev", EntryType::Char, b"", b"", |h| {
            h.set_device_minor(3).expect("GNU")
        })
        .entry(b"pipe", EntryType::Fifo, b"", b"", |_| ())
        .pax(&[
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", b"sparse"),
            (b"GNU.sparse.realsize", b"1000"),
        ])
        .file("GNUSparseFile.0/sparse", &sparse_map)
        .pax(&[
            (b"GNU.sparse.map", b"0,4,10,4"),
            (b"GNU.sparse.size", b"20"),
        ])
        .file("sparse01", b"datadata")
        .end();
    let old_sparse = Tar::new()
        .entry(b"old", EntryType::GNUSparse, b"", b"datadata", |header| {
            let gnu = header.as_gnu_mut().expect("GNU");
            gnu.set_real_size(5000);
            gnu.sparse[0].set_offset(0);
            gnu.sparse[0].set_length(4);
            gnu.sparse[1].set_offset(4096);
            gnu.sparse[1].set_length(4);
        })
        .end();
    vec![everything, old_sparse]
}

#[test]
fn damaged_layers_are_refused_or_sound() {
    let mut rng = rng(1);
    let mut accepted = 0;
    let seeds = seeds();
    for seed in &seeds {
        walk(&image::fuzz::layer(seed).expect("the seeds themselves are good"));
    }
    for _ in 0..cases(1500) {
        let mut bytes = seeds[below(&mut rng, seeds.len())].clone();
        mutate(&mut rng, &mut bytes);
        if below(&mut rng, 5) > 0 {
            mend_checksums(&mut bytes);
        }
        if let Ok(image) = image::fuzz::layer(&bytes) {
            walk(&image);
            accepted += 1;
        }
    }
    assert!(accepted > 0, "damage never got past the first check");
}

#[test]
fn damaged_compression_is_refused_or_sound() {
    let mut rng = rng(2);
    let seeds = seeds();
    for _ in 0..cases(500) {
        let tar = &seeds[below(&mut rng, seeds.len())];
        let layer = if below(&mut rng, 2) == 0 {
            layout::gzip(tar)
        } else {
            layout::zstd(tar)
        };
        let mut bytes = layer.stored;
        mutate(&mut rng, &mut bytes);
        if let Ok(image) = image::fuzz::layer(&bytes) {
            walk(&image);
        }
    }
    let twice = [
        layout::gzip(&seeds[0][..700]).stored,
        layout::gzip(&seeds[0][700..]).stored,
    ]
    .concat();
    let whole = image::fuzz::layer(&seeds[0]).expect("plain");
    assert!(image::fuzz::layer(&twice).expect("two gzip members are one stream") == whole);
    let frames = [
        layout::zstd(&seeds[0][..700]).stored,
        layout::zstd(&seeds[0][700..]).stored,
    ]
    .concat();
    assert!(image::fuzz::layer(&frames).expect("two zstd frames are one stream") == whole);
}

#[test]
fn damaged_documents_and_records_never_panic() {
    let mut rng = rng(3);
    let layers = [layout::plain(seeds().remove(0))];
    let config = layout::config(
        &layers,
        serde_json::json!({"Env": ["A=b"], "ExposedPorts": {"80/tcp": {}}, "Volumes": null}),
    );
    let dir = tempfile::tempdir().expect("a folder");
    let descriptor = layout::manifest(dir.path(), &layers, serde_json::json!({}));
    let digest: image::Digest = descriptor["digest"]
        .as_str()
        .expect("text")
        .parse()
        .expect("a digest");
    let manifest = std::fs::read(layout::blob_path(dir.path(), &digest)).expect("the manifest");
    layout::index(dir.path(), &[descriptor]);
    let index = std::fs::read(dir.path().join("index.json")).expect("the index");
    let records =
        b"18 path=some/path\n30 mtime=1234567890.123456789\n20 SCHILY.xattr.a=b\n".to_vec();
    for _ in 0..cases(2000) {
        for seed in [&config, &manifest, &index] {
            let mut bytes = seed.clone();
            mutate(&mut rng, &mut bytes);
            image::fuzz::documents(&bytes);
        }
        let mut bytes = records.clone();
        mutate(&mut rng, &mut bytes);
        image::fuzz::pax_records(&bytes);
    }
}
